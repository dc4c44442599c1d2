"""What every pair of towers has to keep, and what their settings make of a schema; a new file is found by itself."""

import pytest
import torch
from backbones import SCENARIOS, inputs, listed_schema, mixed, schema, take
from towers import KINDS, build, config

from msr_dist.config import kind_config
from msr_dist.models.towers import ITEM_SIDE, USER_SIDE, unit
from msr_dist.schema import Feature, Numeric, Table

every_kind = pytest.mark.parametrize("kind", KINDS)
SIDES = (USER_SIDE, ITEM_SIDE)


def everywhere(rows_each=3):
    """Rows of all scenarios, in turn."""
    return inputs(torch.arange(SCENARIOS * rows_each) % SCENARIOS)


def two_features():
    """A schema with a feature of the context, which has a table of its own, and one of an item's brand."""
    plain = schema()
    brand = Feature(name="brand", table="brand", group="details")
    slot = Feature(name="slot", table="slot", group="context")
    tables = Table(name="brand", rows=5, width=4), Table(name="slot", rows=5, width=4)
    numerics = (*plain.numerics, Numeric(name="price", group="item"))
    return plain.model_copy(
        update={
            "features": (*plain.features, brand, slot),
            "tables": (*plain.tables, *tables),
            "numerics": numerics,
        }
    )


@every_kind
@pytest.mark.parametrize("side", SIDES)
class TestEveryKind:
    def test_vectors_have_length_1(self, kind, side):
        vectors = getattr(build(kind), side)(mixed(30))
        assert vectors.shape[0] == 30
        torch.testing.assert_close(vectors.square().sum(dim=1), torch.ones(30))

    def test_reads_its_own_side_alone(self, kind, side):
        towers, batch = build(kind), everywhere()
        vectors = getattr(towers, side)(batch)
        (vectors * torch.randn_like(vectors)).sum().backward()
        assert {name for name, x in batch.groups.items() if x.grad is not None} == {side}
        assert (batch.groups[side].grad != 0).any(dim=1).all()
        for name, parameter in towers.named_parameters():
            if name.startswith(side):
                assert parameter.grad.any(), name
            else:
                assert parameter.grad is None, name

    def test_reads_all_groups_of_its_side(self, kind, side):
        towers, batch = build(kind, **{f"{side}_groups": (side, "context")}), everywhere()
        vectors = getattr(towers, side)(batch)
        (vectors * torch.randn_like(vectors)).sum().backward()
        assert {name for name, x in batch.groups.items() if x.grad is not None} == {side, "context"}
        assert batch.groups["context"].grad.any(dim=0).all()

    def test_a_vector_does_not_depend_on_the_rest_of_the_batch(self, kind, side):
        towers, batch = build(kind, dropout=0.4), mixed(30)
        for training in (True, False):
            together = getattr(towers.train(training), side)(batch)
            for part in (slice(7, 8), slice(3, 20), slice(None, None, 4), slice(0, 0)):
                torch.testing.assert_close(getattr(towers, side)(take(batch, part)), together[part], atol=1e-6, rtol=0)

    def test_dropout_is_of_training(self, kind, side):
        plain, towers, batch = build(kind), build(kind, dropout=0.4), mixed(30)
        towers.load_state_dict(plain.state_dict())
        assert not torch.allclose(getattr(towers.train(), side)(batch), getattr(plain, side)(batch), atol=1e-3)
        assert torch.equal(getattr(towers.eval(), side)(batch), getattr(plain, side)(batch))

    def test_the_scenario_decides(self, kind, side):
        """The same features have another vector in another scenario."""
        towers, batch = build(kind), mixed(SCENARIOS)
        alike = {name: x[:1].expand_as(x) for name, x in batch.groups.items()}
        batch.groups.update(alike)
        vectors = getattr(towers, side)(take(batch, slice(None)))
        batch.scenario.fill_(int(batch.scenario[0]))
        same = getattr(towers, side)(take(batch, slice(None)))
        assert (vectors[1:] - vectors[0]).abs().amax(dim=1).count_nonzero() >= SCENARIOS - 2
        if kind != "sass" or side == ITEM_SIDE:  # the user's side reads knowledge, which differs
            torch.testing.assert_close(same, same[:1].expand_as(same))


class TestAdapt:
    @every_kind
    def test_what_no_tower_reads_is_gone(self, kind):
        adapted = config(kind).adapt(two_features())
        assert [feature.name for feature in adapted.features] == ["user", "item"]
        assert [table.name for table in adapted.tables] == ["user", "item"]
        assert [numeric.name for numeric in adapted.numerics] == ["price"]
        assert adapted.group_widths() == {"user": 8, "item": 13}

    @every_kind
    def test_what_a_tower_reads_stays(self, kind):
        settings = config(kind, user_groups=("context", "user"), item_groups=("item", "details"))
        adapted = settings.adapt(two_features())
        assert adapted == two_features()
        assert settings.widths_of(adapted) == (8 + 4 + 2, 12 + 1 + 4)

    def test_a_table_that_another_feature_reads_stays(self):
        """The context's list of items goes, the item's table does not."""
        listed = schema().model_copy(
            update={"features": (*schema().features, Feature(name="seen", table="item", group="context"))}
        )
        adapted = config("two_tower").adapt(listed)
        assert [feature.name for feature in adapted.features] == ["user", "item"]
        assert adapted.tables == schema().tables

    @every_kind
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            (
                {"user_groups": ("user", "profile")},
                r"model\.user_groups: there is no group 'profile'; the data have user, item, context",
            ),
            ({"item_groups": ("items",)}, r"model\.item_groups: there is no group 'items'; the data have user, item"),
            ({"item_groups": ()}, r"model\.item_groups: a tower needs features; the data have user, item, context"),
            ({"user_groups": ()}, r"model\.user_groups: a tower needs features"),
            ({"user_groups": ("user", "user")}, r"model\.user_groups: user, user names a group twice; name each once"),
            (
                {"item_groups": ("item", "user")},
                r"model\.user_groups and model\.item_groups both name 'user': a tower has its own side",
            ),
            (
                {"user_groups": ("item",), "item_groups": ("user",)},
                r"model\.user_groups: 'user' is in group 'user', which is not among item",
            ),
            ({"user_groups": ("context",)}, r"model\.user_groups: 'user' is in group 'user', which is not among conte"),
            ({"item_groups": ("context",)}, r"model\.item_groups: 'item' is in group 'item', which is not among conte"),
        ],
    )
    def test_sides_that_make_no_sense_are_refused(self, kind, settings, words):
        with pytest.raises(ValueError, match=words):
            config(kind, **settings).adapt(schema())

    @every_kind
    def test_attention_to_the_item_is_refused(self, kind):
        words = (
            r"features\.clicks: pooling 'attention' asks about the item, .* "
            r"embeddings\.features\.clicks\.pooling='mean' or 'sum'"
        )
        with pytest.raises(ValueError, match=words):
            config(kind).adapt(listed_schema())

    @every_kind
    def test_attention_that_no_tower_reads_does_no_harm(self, kind):
        clicks = listed_schema().features[-1].model_copy(update={"group": "context"})
        listed = schema().model_copy(update={"features": (*schema().features, clicks)})
        assert config(kind).adapt(listed).features == schema().features


def test_a_vector_of_0_stays_one_and_harms_no_gradient():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    vectors = unit(torch.relu(x))
    vectors.sum().backward()
    assert vectors.tolist() == [[0.0, 0.0], [pytest.approx(0.6), pytest.approx(0.8)]]
    assert x.grad.isfinite().all()


@every_kind
@pytest.mark.parametrize("around", ["single", "llm4msr"])
def test_no_model_of_labels_goes_around_towers(kind, around):
    with pytest.raises(ValueError, match=f"kind '{kind}' predicts no labels, so no model goes around it"):
        kind_config("msr_dist.models", around)(backbone={"kind": kind})
