import tomllib
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from backbones import ABSENT, KINDS, KNOWN, SCENARIOS, build, config, mixed, said, schema, take, train
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from msr_dist.config import dump, parse
from msr_dist.models.base import Backbone, Inputs
from msr_dist.models.llm4msr import Config, Llm4msr, MetaLinear, fastest
from msr_dist.models.mlp import Config as Mlp

OTHERS = [kind for kind in KINDS if kind != "llm4msr"]
FORMS = ["grouped", "gathered", "bilinear"]
SMALL = {"code_width": 8, "generator_width": 6, "rank": 5, "scenario_widths": (9, 7)}
VARIANTS = [
    {},
    {"user_layers": 3},
    {"rank": "full", "residual": False, "user_layers": 2},
    {"fusion": "weighted"},
    {"user_level": False},
    {"scenario_level": False},
]

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def around(kind: str, *, labels: int = 2, seed: int = 0, dropout: float = 0.0, **settings) -> Llm4msr:
    settings = SMALL | {"backbone": config(kind, dropout=dropout), "dropout": dropout} | settings
    model = build("llm4msr", labels, seed=seed, **settings)
    assert isinstance(model, Llm4msr)
    return model


def by_hand(layer: MetaLinear, x: Tensor, code: Tensor) -> Tensor:
    """One row through its own layer."""
    of_weight, of_bias = torch.relu(layer.hidden(code)).chunk(2)
    weight, bias = layer.weight, layer.bias
    for j in range(len(of_weight)):
        weight = weight + of_weight[j] * layer.weight_basis[j]
        bias = bias + of_bias[j] * layer.bias_basis[j]
    return x @ weight + bias


@every_variant
def test_follows_its_formula(variant):
    batch = mixed(30)
    model = train(around("mlp", **variant), batch)
    e = batch.joined()
    found = model.parts(batch)
    torch.testing.assert_close(found.before, e)
    if model.user_level is not None:
        rows = []
        for x, known in zip(e, batch.knowledge, strict=True):
            start, code = x, model.user_level.code(known)
            for layer in model.user_level.layers[:-1]:
                x = torch.relu(layer.leave(by_hand(layer.core, layer.enter(x), code)))
            last = model.user_level.layers[-1]
            x = last.leave(by_hand(last.core, last.enter(x), code))
            start = start if model.user_level.shortcut is None else start @ model.user_level.shortcut
            rows.append(known[-1] * x + start)
        e = torch.stack(rows)
    torch.testing.assert_close(found.after, e, atol=1e-5, rtol=1e-5)
    widths = [x.shape[1] for x in batch.groups.values()]
    groups = dict(zip(batch.groups, e.split(widths, dim=1), strict=True))
    expected = model.backbone(replace(batch, groups=groups))
    torch.testing.assert_close(found.backbone.logits, expected, atol=1e-5, rtol=1e-5)
    if model.scenario_level is not None:
        level, rows = model.scenario_level, []
        given = torch.tensor(schema().knowledge.scenarios)
        vectors = (given - given.mean(0)) / (given - given.mean(0)).square().mean().sqrt()
        for v, s in zip(e, batch.scenario, strict=True):
            code = level.codes.code(vectors[s])
            for layer in level.hidden:
                v = torch.relu(by_hand(layer, v, code))
            rows.append(by_hand(level.last, v, code))
        v = torch.stack(rows)
        torch.testing.assert_close(found.scenario, v, atol=1e-5, rtol=1e-5)
        expected = expected + v if model.share is None else (1 - model.share) * expected + model.share * v
    assert (model.share is not None) == (variant.get("fusion") == "weighted")
    torch.testing.assert_close(model(batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("variant", [{}, {"fusion": "weighted", "rank": "full", "residual": False, "user_layers": 2}])
def test_starts_exactly_as_its_backbone(kind, variant):
    alone, model, batch = build(kind, labels=2, dropout=0.3), around(kind, dropout=0.3, **variant), mixed(40)
    for name, x in alone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], x), name
    expected, found = alone.objective(batch), model.objective(batch)
    assert torch.equal(found.logits, expected.logits)
    for own, plain in ((found.weight, expected.weight), (found.penalty, expected.penalty)):
        assert own is plain is None or torch.equal(own, plain)
    assert torch.equal(model.eval()(batch), alone.eval()(batch))
    assert not torch.equal(train(model, batch)(batch), train(alone, batch)(batch))


@pytest.mark.parametrize("kind", OTHERS)
def test_after_one_step_everything_around_the_backbone_learns(kind):
    for variant in VARIANTS[:4]:
        model = train(around(kind, **variant), mixed(60), steps=1)
        model.zero_grad()
        model(mixed(60, seed=2)).square().sum().backward()
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone."):
                assert parameter.grad.any(), (variant, name)


def test_what_is_drawn_later_is_drawn_as_without_the_meta_networks():
    build("star")
    expected = torch.rand(3)
    build("llm4msr")
    assert torch.equal(torch.rand(3), expected)
    first, again, other = (around("mlp", seed=seed).user_level.layers[0].enter.weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["adasparse", "sarnet"])
def test_a_backbone_with_an_objective_of_its_own_keeps_it(kind):
    batch = mixed(60)
    model = train(around(kind), batch)
    found = model.objective(batch)
    assert found.penalty is not None
    assert (found.weight is not None) == (kind == "sarnet")
    assert not torch.isclose(found.logits, model.parts(batch).backbone.logits).all()


class TestUserLevel:
    @pytest.mark.parametrize("variant", [{}, {"rank": "full", "user_layers": 2}], ids=str)
    @pytest.mark.parametrize("rows", [0, 1, 40])
    def test_all_forms_are_equal_and_so_are_their_gradients(self, variant, rows):
        results = []
        for form in FORMS:
            model = train(around("mlp", execution="measured", **variant), mixed(40))
            model.user_level.execution = form
            batch = mixed(rows, seed=3)
            batch.knowledge.requires_grad_()
            model(batch).square().sum().backward()
            # Of a user's rows it does not matter which one has the gradient: the table adds them up.
            of_users = torch.zeros(100, KNOWN + 1).index_add(0, batch.user, batch.knowledge.grad)
            gradients = [parameter.grad for parameter in model.parameters()]
            results.append([model(batch).detach(), of_users, *(x.grad for x in batch.groups.values()), *gradients])
            assert not rows or of_users[batch.user.unique()].any(dim=1).all()
        for first, second in pairwise(results):
            for one, other in zip(first, second, strict=True):
                torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)

    def test_a_matrix_is_made_once_per_user_and_in_the_bilinear_form_never(self):
        def cost(form: str, users: int) -> int:
            model, batch = around("mlp", execution=form), mixed(48)
            user = torch.arange(48) % users
            with FlopCounterMode(display=False) as flops:
                model(replace(batch, user=user, knowledge=said(user)))
            return flops.get_total_flops()

        of_code = 2 * (KNOWN + 1) * 8 + 2 * 8 * 2 * 6 + 2 * 6 * 5
        a_matrix = 2 * 6 * 5 * 5
        for form in FORMS:
            made = 0 if form == "bilinear" else a_matrix
            of_bias = 2 * 6 * 5 if form == "bilinear" else 0
            assert cost(form, 16) - cost(form, 1) == 15 * (of_code - of_bias + made), form

    def test_each_batch_runs_in_the_form_that_measurement_found_fastest(self):
        assert fastest(rows=500, users=1, width=16, generator_width=64) == "grouped"
        assert fastest(rows=4096, users=3500, width=16, generator_width=64) == "gathered"
        assert fastest(rows=4096, users=3500, width=128, generator_width=64) == "bilinear"
        assert fastest(rows=4096, users=400, width=128, generator_width=64) == "grouped"
        level = around("mlp", rank=16, generator_width=64).user_level
        users = [torch.arange(200) // rows for rows in (1, 100, 200)]
        assert [level._users(user, said(user)).form for user in users] == ["gathered", "grouped", "grouped"]

    def test_who_is_unknown_is_left_to_the_backbone_and_is_not_who_is_average(self):
        batch = mixed(30)
        model = train(around("mlp", scenario_level=False), batch).eval()
        average = torch.zeros(30, KNOWN + 1)
        average[:, -1] = 1
        unknown = model(replace(batch, knowledge=torch.zeros(30, KNOWN + 1)))
        torch.testing.assert_close(unknown, model.backbone(batch))
        assert not torch.isclose(model(replace(batch, knowledge=average)), unknown).any()

    def test_the_groups_stay_groups_and_lists_stay_lists(self):
        class Listening(Backbone):
            def forward(self, inputs: Inputs) -> Tensor:
                self.seen = inputs
                return torch.zeros(len(inputs.row), 2)

        batch, model = mixed(30), train(around("mlp"), mixed(30))
        model.backbone = listening = Listening()
        model(batch)
        assert {name: x.shape for name, x in listening.seen.groups.items()} == {
            name: x.shape for name, x in batch.groups.items()
        }
        assert not any(torch.equal(x, batch.groups[name]) for name, x in listening.seen.groups.items())
        assert torch.equal(listening.seen.joined(), model.parts(batch).after)
        assert listening.seen.behaviours is batch.behaviours
        assert listening.seen.row is batch.row


class TestScenarioLevel:
    def test_weights_are_made_once_for_evaluation_and_anew_when_something_changed(self):
        batch = mixed(30)
        model = train(around("mlp"), batch)
        level = model.scenario_level
        expected = model(batch).detach()
        with torch.no_grad():
            assert level.weights()[0][0] is not level.weights()[0][0]
            model.eval()
            kept = level.weights()
            torch.testing.assert_close(model(batch), expected)
            assert level.weights() is kept
            model.load_state_dict(model.state_dict())
            assert level.weights() is not kept
            kept = level.weights()
            level.last.bias.add_(1.0)
            torch.testing.assert_close(model(batch), expected + 1)
        assert level.weights() is not kept
        assert level.weights()[-1][1].requires_grad
        with torch.no_grad():
            kept = level.weights()
            model.eval()
            assert level.weights() is not kept

    def test_kept_weights_cost_a_model_nothing(self):
        def cost(scenario: Tensor) -> int:
            with torch.no_grad(), FlopCounterMode(display=False) as flops:
                model(replace(batch, scenario=scenario))
            return flops.get_total_flops()

        model, batch = around("mlp", user_level=False).eval(), mixed(30)
        first = cost(batch.scenario)
        rows = 30 * 2 * (22 * 9 + 9 * 7 + 7 * 2)
        with FlopCounterMode(display=False) as flops:
            model.backbone(batch)
        assert cost(batch.scenario) == flops.get_total_flops() + rows
        assert first > cost(batch.scenario)

    def test_dropout_silences_hidden_units_in_training(self):
        model, batch = train(around("mlp", dropout=0.5), mixed(30)), mixed(30)
        assert torch.equal(model(batch), model(batch))
        assert not torch.isclose(model.parts(batch).scenario, model.eval().parts(batch).scenario).any()

    def test_what_scenarios_have_in_common_is_taken_away(self):
        """Prompts of one kind have nearly the same vectors, and their codes would be the same as well."""
        plain = schema()
        moved = tuple(tuple(0.01 * x + 5 for x in vector) for vector in plain.knowledge.scenarios)
        far = plain.model_copy(update={"knowledge": plain.knowledge.model_copy(update={"scenarios": moved})})
        torch.manual_seed(0)
        model, expected = config("llm4msr", **SMALL).build(far), around("star", labels=1)
        torch.testing.assert_close(
            model.scenario_level.codes.vectors, expected.scenario_level.codes.vectors, atol=1e-3, rtol=1e-3
        )

    def test_a_single_scenario_has_a_vector_too(self):
        model = build("llm4msr", scenarios=1)
        assert model.scenario_level.codes.vectors.square().mean().item() == pytest.approx(1)


VECTORS = ("knowledge", "random", "shuffled", "trained")


class TestVectors:
    def test_the_schema_says_which(self):
        for vectors in VECTORS:
            assert config("llm4msr", vectors=vectors).adapt(schema()).knowledge.vectors == vectors
        nested = config("llm4msr", backbone=config("single")).adapt(schema())
        assert all(table.per_scenario for table in nested.tables)
        without = schema().model_copy(update={"knowledge": None})
        assert config("llm4msr").adapt(without) == without

    def test_random_ones_are_as_many_and_as_wide_and_do_not_learn(self):
        known, drawn, again, other = (
            around("mlp", vectors=vectors, seed=seed).scenario_level.codes
            for vectors, seed in (("knowledge", 0), ("random", 0), ("random", 0), ("random", 1))
        )
        assert drawn.vectors.shape == known.vectors.shape
        assert not torch.isclose(drawn.vectors, known.vectors).any()
        assert torch.equal(drawn.vectors, again.vectors)
        assert not torch.equal(drawn.vectors, other.vectors)
        assert drawn.vectors.square().mean().item() == pytest.approx(1)
        assert "vectors" not in dict(drawn.named_parameters())
        assert "vectors" in drawn.state_dict()

    def test_all_else_starts_the_same_with_any_vectors(self):
        first, *others = (dict(around("mlp", vectors=each).named_parameters()) for each in VECTORS)
        for other in others:
            assert all(torch.equal(first[name], value) for name, value in other.items() if name in first)

    def test_shuffled_users_leave_the_scenarios_in_place(self):
        known, shuffled = (around("mlp", vectors=vectors).scenario_level.codes for vectors in ("knowledge", "shuffled"))
        assert torch.equal(shuffled.vectors, known.vectors)

    def test_trained_ones_learn_and_each_by_its_own_rows(self):
        batch = mixed(60)
        batch.knowledge.requires_grad_()
        model = train(around("mlp", vectors="trained"), batch, steps=1)
        model.zero_grad()
        batch.knowledge.grad = None
        model(batch).square().sum().backward()
        vectors = dict(model.named_parameters())["scenario_level.codes.vectors"]
        assert vectors.shape == (SCENARIOS, 10)
        assert vectors.grad.any(dim=1).tolist() == [s != ABSENT for s in range(SCENARIOS)]
        assert batch.knowledge.grad.any()


class TestAsFeatures:
    def test_the_backbone_reads_the_codes_as_one_more_group(self):
        batch = mixed(30)
        model = train(around("mlp", as_features=True), batch)
        assert not any(isinstance(module, MetaLinear) for module in model.modules())
        of_user = model.user_code(batch.knowledge) * batch.knowledge[:, -1:]
        codes = [of_user, model.scenario_codes()[batch.scenario]]
        groups = {**batch.groups, "knowledge": torch.cat(codes, dim=1) / 8**0.5}
        torch.testing.assert_close(model(batch), model.backbone(replace(batch, groups=groups)))
        parts = model.parts(batch)
        assert parts.scenario is None
        assert torch.equal(parts.after, batch.joined())

    @pytest.mark.parametrize("kind", OTHERS)
    def test_any_backbone_takes_them(self, kind):
        model, batch = around(kind, as_features=True), mixed(60)
        train(model, batch, steps=1).zero_grad()
        model(batch).square().sum().backward()
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone."):
                assert parameter.grad.any(), name

    @pytest.mark.parametrize("off", ["user_level", "scenario_level"])
    def test_either_half_may_be_left_out(self, off):
        batch = mixed(30)
        model = train(around("mlp", as_features=True, **{off: False}), batch).eval()
        others = replace(batch, knowledge=batch.knowledge + 1)
        assert torch.equal(model(others), model(batch)) == (off == "user_level")
        codes = model.scenario_codes if off == "user_level" else model.user_code
        assert codes is not None
        assert (model.scenario_codes is None) == (off == "scenario_level")

    def test_a_group_of_that_name_is_refused(self):
        features = tuple(each.model_copy(update={"group": "knowledge"}) for each in schema().features)
        taken = schema().model_copy(update={"features": features})
        with pytest.raises(ValueError, match="feature group 'knowledge' already"):
            config("llm4msr", as_features=True).build(taken)
        config("llm4msr").build(taken)


def test_a_level_that_is_off_reads_nothing():
    batch = mixed(30)
    bare = replace(batch, user=None, knowledge=None)
    without_user = train(around("mlp", user_level=False), batch)
    assert torch.equal(without_user(bare), without_user(batch))
    assert torch.equal(without_user.parts(batch).after, batch.joined())
    assert train(around("mlp", scenario_level=False), batch).parts(batch).scenario is None


def test_a_checkpoint_holds_the_scenarios_vectors():
    batch = mixed(30)
    model = train(around("mlp"), batch).eval()
    plain = schema(labels=2)
    knowledge = plain.knowledge.model_copy(update={"scenarios": tuple((float(s),) * 10 for s in range(SCENARIOS))})
    restored = config("llm4msr", **SMALL, backbone=config("mlp")).build(
        plain.model_copy(update={"knowledge": knowledge})
    )
    restored.load_state_dict(model.state_dict())
    assert torch.equal(restored.eval()(batch), model(batch))


def test_a_row_is_judged_alone_whatever_runs_and_stands_within():
    batch = mixed(30)
    for kind in ("sarnet", "hinet", "pepnet"):
        model = train(around(kind, rank="full"), batch).eval()
        together = model(batch)
        alone = torch.cat([model(take(batch, [i])) for i in range(30)])
        torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


def test_settings_survive_the_file():
    written = config("llm4msr", backbone=config("single", backbone=config("mlp", widths=(7,))), rank="full")
    assert parse(Config, tomllib.loads(dump(written)), where="here") == written


class TestRefusals:
    def test_no_level_at_all(self):
        with pytest.raises(ValueError, match="that is the backbone alone, kind = 'mlp'"):
            Config(backbone=Mlp(), user_level=False, scenario_level=False)

    def test_around_itself(self):
        with pytest.raises(ValueError, match=r"backbone\.kind is 'llm4msr' again"):
            Config(backbone=Config())

    def test_no_knowledge(self):
        without = schema().model_copy(update={"knowledge": None})
        with pytest.raises(ValueError, match=r"add a section \[knowledge\]"):
            config("llm4msr").build(without)

    def test_vectors_of_other_scenarios(self):
        knowledge = schema().knowledge
        fewer = schema().model_copy(
            update={"knowledge": knowledge.model_copy(update={"scenarios": knowledge.scenarios[:5]})}
        )
        with pytest.raises(ValueError, match="vectors of 5 scenarios, but the schema has 13"):
            config("llm4msr").build(fewer)
        with pytest.raises(ValueError, match="vectors of 13 scenarios, but the schema has 1"):
            config("single", backbone=config("llm4msr")).build(schema())

    def test_trained_vectors_beside_users_that_differ_by_scenario(self):
        around_single = config("llm4msr", vectors="trained", backbone=config("single"))
        with pytest.raises(ValueError, match="one vector per user, but the users' table has one for every scenario"):
            around_single.build(around_single.adapt(schema()))

    @pytest.mark.parametrize("rank", [0, -1, "half", 2.5])
    def test_a_rank_that_is_none(self, rank):
        with pytest.raises(ValueError, match="rank"):
            config("llm4msr", rank=rank)
