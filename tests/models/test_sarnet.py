from dataclasses import replace

import pytest
import torch
from backbones import build, config, mixed, schema, train

from msr_dist.models.base import Behaviours
from msr_dist.models.layers import ScenarioGroups
from msr_dist.models.sarnet import Fairness
from msr_dist.schema import Feature

LENGTHS = torch.tensor([3, 0, 1, 5, 2])
"""Row i has the i-th length, over and over: some lists are empty, none is as long as the batch's space for them."""
SIZES = {"shared_experts": 2, "own_experts": 3, "widths": (9, 7), "attention_widths": (6,)}


def build_listed(**settings):
    """A model for two lists: items, 12 wide, and users, 8 wide."""
    torch.manual_seed(0)
    plain = schema(labels=2)
    lists = (
        Feature(name="clicks", table="item", group="user", pooling="attention"),
        Feature(name="friends", table="user", group="user", pooling="attention"),
    )
    return config("sarnet", **settings).build(plain.model_copy(update={"features": plain.features + lists}))


def listed(rows, longest=6, seed=3):
    """Random rows with lists; the pooled vectors stand in the user's group."""
    generator = torch.Generator().manual_seed(seed)
    batch, lengths = mixed(rows), LENGTHS[torch.arange(rows) % 5]
    present = torch.arange(longest) < lengths[:, None]
    behaviours = {
        name: Behaviours(
            (torch.randn(rows, longest, width, generator=generator) * present[:, :, None]).requires_grad_(),
            present,
            torch.randn(rows, width, generator=generator),
        )
        for name, width in (("clicks", 12), ("friends", 8))
    }
    pooled = torch.randn(rows, 20, generator=generator)
    groups = batch.groups | {"user": torch.cat([batch.groups["user"].detach(), pooled], dim=1).requires_grad_()}
    return replace(batch, groups=groups, behaviours=behaviours)


@pytest.mark.parametrize("with_lists", [False, True])
def test_follows_its_formula(with_lists):
    batch = listed(30) if with_lists else mixed(30)
    model = train(build_listed(**SIZES) if with_lists else build("sarnet", labels=2, **SIZES), batch)

    def affinity(unit, b, q):
        return unit.last.weight[0] @ torch.relu(unit.mlp.linears[0](torch.cat([b, q, b * q, b - q])))

    expected = []
    for i, (joined, s) in enumerate(zip(batch.joined(), batch.scenario, strict=True)):
        parts = [joined]
        for lists, unit in zip(batch.behaviours.values(), model.interests, strict=True):
            interest, total = torch.zeros(lists.vectors.shape[2]), 0.0
            for b in lists.vectors[i, : LENGTHS[i % 5]]:
                item = affinity(unit.item_affinity, b, lists.target[i]).exp()
                factor = item * affinity(unit.scenario_affinity, b, unit.scenario.weight[s]).exp()
                interest, total = interest + factor * b, total + factor
            parts.append(interest / total if total else interest)
        e = torch.cat(parts) * model.scale[s] + model.shift[s]
        share = torch.softmax(e @ model.gate.weight[s] + model.gate.bias[s], dim=0)
        logits = model.shared_last.bias + model.own_last.bias[s]
        for k in range(5):
            h = e
            for layer in range(2):
                if k < 2:
                    h = torch.relu(h @ model.shared.weights[layer][k] + model.shared.biases[layer][k])
                else:
                    h = torch.relu(h @ model.own.weights[layer][s, k - 2] + model.own.biases[layer][s, k - 2])
            last = torch.cat([model.shared_last.weight.T, model.own_last.weight[s]])[7 * k : 7 * k + 7]
            logits = logits + share[k] * (h @ last)
        expected.append(logits)
    torch.testing.assert_close(model(batch), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_everything_learns_from_lists_and_reads_nothing_else():
    model, batch = build_listed(), listed(120)
    model.objective(batch).loss(torch.randint(2, (120, 2)).float(), torch.ones(120, 2)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.any(), name
        if len(parameter) == 13:
            assert (parameter.grad != 0).flatten(1).any(dim=1).tolist() == [s != 10 for s in range(13)], name
    for lists in batch.behaviours.values():
        assert torch.equal((lists.vectors.grad != 0).any(dim=2), lists.present)


def test_lists_may_be_empty_or_have_no_space_at_all():
    model, batch = build_listed(dropout=0.3).eval(), listed(10, longest=9)
    together = model(batch)
    for i, length in enumerate(LENGTHS):
        row = batch.take(torch.tensor([i]))
        short = {
            name: replace(each, vectors=each.vectors[:, :length], present=each.present[:, :length])
            for name, each in row.behaviours.items()
        }
        torch.testing.assert_close(model(replace(row, behaviours=short))[0], together[i], atol=1e-6, rtol=0)
    assert model(batch.take(torch.tensor([], dtype=torch.int64))).shape == (0, 2)


def test_lists_cost_parameters_only_where_the_schema_has_any():
    assert not any("interest" in name for name, _ in build("sarnet").named_parameters())
    assert sum("interest" in name for name, _ in build_listed().named_parameters()) == 2 * (1 + 2 * 3)


def planted(rows=4000):
    """Scenario 0 has three quarters of the rows; it shows item 0 four times in five, the others one time in five."""
    generator = torch.Generator().manual_seed(0)
    scenario = (torch.rand(rows, generator=generator) < 0.25).long()
    item = (torch.rand(rows, generator=generator) < torch.where(scenario == 0, 0.2, 0.8)).long()
    groups = ScenarioGroups.of(scenario, 2)
    return groups, groups.group(torch.eye(2)[item]), groups.group(torch.arange(rows))


def fitted(bound, steps=600):
    groups, item, row = planted()
    fairness = Fairness(2, 2, bound, fading=0.9)
    optimizer = torch.optim.Adam(fairness.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        weight, penalty = fairness(item, row, groups)
        penalty.mean().backward()
        optimizer.step()
    return groups, item, weight, fairness


def test_weights_undo_a_scenarios_preference_for_an_item():
    groups, item, weight, _ = fitted(bound=10.0)
    zero = item[:, 0] == 1
    for s in range(2):
        own = groups.scenario == s
        assert weight[own].mean() == pytest.approx(1.0, abs=0.01)
        # Reweighed, both scenarios show item 0 as often as all rows do, before they are weighed.
        assert weight[own & zero].sum() / weight[own].sum() == pytest.approx(zero.float().mean().item(), abs=0.01)


def test_weights_are_bounded_and_still_1_on_average():
    groups, _, weight, fairness = fitted(bound=1.5)
    coefficient = weight / (fairness.seen[:, 0] / fairness.seen[:, 1])[groups.scenario]
    assert coefficient.min() == pytest.approx(1 / 1.5, rel=1e-3)
    assert coefficient.max() == pytest.approx(1.5, rel=1e-3)
    assert all(weight[groups.scenario == s].mean() == pytest.approx(1.0, abs=0.01) for s in range(2))
    assert (fitted(bound=1.0, steps=20)[2] == 1).all()


def test_no_loss_is_lowered_through_the_weights():
    model, batch = train(build("sarnet"), mixed(60)), mixed(120)
    for _ in range(3):
        objective = model.objective(batch)
        (gradient,) = torch.autograd.grad(objective.penalty.sum(), model.fairness.weight, retain_graph=True)
        with torch.no_grad():
            model.fairness.weight -= 0.1 * gradient
    assert objective.weight.std() > 0.01
    assert not objective.weight.requires_grad
    leaves = [*batch.groups.values(), *(x for n, x in model.named_parameters() if n != "fairness.weight")]
    assert all(x is None for x in torch.autograd.grad(objective.penalty.sum(), leaves, allow_unused=True))


def test_weights_start_at_1_and_leave_evaluation_alone():
    model, batch = build("sarnet"), mixed(60)
    assert (model.objective(batch).weight == 1).all()
    assert model.eval().objective(batch).weight is None


def test_padding_is_not_counted():
    groups, item, row = planted(40)
    padded, plain = Fairness(2, 2, 3.0), Fairness(2, 2, 3.0)
    order = torch.arange(40) % 2 == 0
    padded(item, torch.where(order, row, -1), groups)
    kept = ScenarioGroups.of(groups.scenario[order], 2)
    plain(item[order], row[order], kept)
    assert torch.equal(padded.seen, plain.seen)


def test_a_scenario_that_has_long_been_absent_returns_with_a_finite_weight():
    model = build("sarnet")
    model.fairness.seen[4] = 0.0
    objective = model.objective(mixed(60))
    assert objective.weight.isfinite().all()
    assert objective.penalty.isfinite().all()
    assert model.fairness.seen.isfinite().all()
