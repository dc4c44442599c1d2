import numpy as np
import pytest
import torch
from backbones import SCENARIOS, inputs, mixed, schema
from towers import build, config

from msr_dist.config import kind_config

SIDES = ("user", "item")


def by_hand(model, batch, side):
    """The formula, row by row."""
    state = {name.removeprefix(f"{side}_tower."): x.double().numpy() for name, x in model.state_dict().items()}
    rows = []
    for x, s in zip(batch.groups[side].detach().double().numpy(), batch.scenario.tolist(), strict=True):
        if "scenario.weight" in state:
            hidden = np.concatenate([x, state["scenario.weight"][s]])
            for layer in range(2):
                weight, bias = (state[f"hidden.linears.{layer}.{name}"] for name in ("weight", "bias"))
                hidden = np.maximum(weight @ hidden + bias, 0)
            out = state["last.weight"] @ hidden + state["last.bias"]
        else:
            hidden = x
            for layer in range(2):
                weight, bias = (state[f"tower.hidden.{layer}.{name}"][s] for name in ("weight", "bias"))
                hidden = np.maximum(hidden @ weight + bias, 0)
            out = hidden @ state["tower.last.weight"][s] + state["tower.last.bias"][s]
        rows.append(out / np.sqrt((out**2).sum()))
    return np.stack(rows)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("towers", ["shared", "per_scenario"])
def test_follows_its_formula(towers, side):
    model, batch = build("two_tower", towers=towers), mixed(30)
    found = getattr(model, side)(batch).detach().numpy()
    assert found.shape == (30, 5)
    np.testing.assert_allclose(found, by_hand(model, batch, side), atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_per_scenario_nothing_is_shared(side):
    model = build("two_tower", towers="per_scenario")
    batch = inputs(torch.arange(3 * SCENARIOS) % SCENARIOS)
    vectors = getattr(model, side)(batch)
    weights = torch.randn_like(vectors)
    (vectors * weights)[batch.scenario != 2].sum().backward()
    for name, parameter in model.named_parameters():
        assert len(parameter) == SCENARIOS, name
        if name.startswith(side):
            taught = (parameter.grad != 0).flatten(1).any(dim=1)
            assert taught.tolist() == [s != 2 for s in range(SCENARIOS)], name


def test_per_scenario_has_tables_of_its_own():
    for towers, own in (("shared", False), ("per_scenario", True)):
        adapted = config("two_tower", towers=towers).adapt(schema())
        assert [table.per_scenario for table in adapted.tables] == [own, own]
        assert {table.name: adapted.copies(table) for table in adapted.tables} == {
            "user": SCENARIOS if own else 1,
            "item": SCENARIOS if own else 1,
        }
        assert adapted.model_copy(update={"tables": ()}) == config("two_tower").adapt(schema()).model_copy(
            update={"tables": ()}
        )


def test_shared_towers_cost_an_embedding_per_scenario():
    def parameters(scenarios, **settings):
        model = build("two_tower", schema(scenarios=scenarios), **settings)
        return sum(parameter.numel() for parameter in model.parameters())

    assert parameters(7) - parameters(6) == 2 * 3
    assert parameters(6, towers="per_scenario") == 6 * parameters(1, towers="per_scenario")


def test_reads_no_knowledge():
    settings = kind_config("msr_dist.models", "two_tower")
    assert not settings.reads_knowledge
    assert not settings.takes_knowledge
