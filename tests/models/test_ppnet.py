from dataclasses import replace

import pytest
import torch
from backbones import build, mixed, schema
from torch import nn

from msr_dist.models.ppnet import Priors
from msr_dist.schema import Feature


def test_follows_its_formula():
    model, batch = build("ppnet", labels=2, widths=(9, 7), gate_width=5, scenario_width=3), mixed(30)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    towers, expected = model.towers, torch.empty(30, 2)
    for i, (x, s) in enumerate(zip(batch.joined(), batch.scenario, strict=True)):
        priors = [batch.groups[name][i] for name in ("user", "item")]
        seen = torch.cat([*priors, model.scenario.weight[s], x])
        for t in range(2):
            h = x
            for weight, bias, unit in zip(towers.weights, towers.biases, towers.gates, strict=True):
                scores = unit.last(torch.relu(unit.hidden(seen))).view(2, -1)[t]
                h = 2 / (1 + torch.exp(-scores)) * torch.relu(h @ weight[t] + bias[t])
            expected[i, t] = (h @ towers.last.weight[t])[0] + towers.last.bias[t]
    torch.testing.assert_close(model(batch), expected, atol=1e-5, rtol=1e-5)


def test_the_towers_start_from_the_embeddings_so_tables_without_prior_learn():
    """Public code starts them from the gates' input, which looks at the embeddings without a gradient."""
    model, batch = build("ppnet"), mixed(30)
    model(batch).sum().backward()
    assert (batch.groups["context"].grad != 0).any(dim=1).all()


def test_the_gates_scale_every_hidden_layer_so_the_names_are_not_swapped():
    """Public code calls EPNet by this name: there, wide open gates double the input once (here: every layer)."""
    model, batch = build("ppnet", widths=(9, 7, 5)), mixed(30)
    for unit in model.towers.gates:
        nn.init.zeros_(unit.last.weight)
    even = model(batch)
    for unit in model.towers.gates:
        nn.init.constant_(unit.last.bias, 100.0)
    torch.testing.assert_close(model(batch), 8 * even)


@pytest.mark.parametrize(("priors", "trained"), [((), {"user", "item"}), (("item",), {"item"})])
def test_the_gates_pull_at_the_priors_alone(priors, trained):
    model, batch = build("ppnet", priors=priors), mixed(30)
    for weight, bias in zip(model.towers.weights, model.towers.biases, strict=True):
        nn.init.zeros_(weight)
        nn.init.ones_(bias)
    model(batch).sum().backward()
    assert {name for name, x in batch.groups.items() if x.grad is not None and x.grad.any()} == trained
    assert model.scenario.weight.grad.any()


def test_priors_are_cut_out_of_their_groups():
    plain = schema()
    wide = plain.model_copy(
        update={
            "features": (
                Feature(name="city", table="user", group="both"),
                Feature(name="item", table="item", group="both"),
                Feature(name="user", table="user", group="other"),
                Feature(name="author", table="user", group="both"),
            )
        }
    )
    both, other = torch.randn(5, 28), torch.randn(5, 8)
    batch = replace(mixed(5), groups={"both": both, "other": other})
    assert torch.equal(Priors(wide, ()).of(batch), torch.cat([other, both[:, 8:20]], dim=1))
    assert torch.equal(Priors(wide, ("author", "user")).of(batch), torch.cat([both[:, 20:], other], dim=1))
    assert Priors(wide, ("author", "user")).width == 16


def test_an_unknown_prior_is_refused():
    with pytest.raises(ValueError, match=r"model\.priors: no feature 'author' in the data; it has user, item"):
        build("ppnet", priors=("item", "author"))


def test_scenarios_add_nothing_but_their_embedding():
    few, many = (
        {name: parameter.shape for name, parameter in build("ppnet", scenarios=scenarios).named_parameters()}
        for scenarios in (5, 100)
    )
    assert {name for name in few if few[name] != many[name]} == {"scenario.weight"}
