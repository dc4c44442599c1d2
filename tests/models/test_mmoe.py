from dataclasses import replace

import pytest
import torch
from backbones import build, config, mixed
from torch import nn


def test_follows_its_formula():
    model, batch = build("mmoe", labels=2, experts=3, widths=(9, 7), tower_widths=(6,)), mixed(30)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    expected = torch.empty(30, 2)
    for i, (x, s) in enumerate(zip(batch.joined(), batch.scenario, strict=True)):
        opinions = []
        for e in range(3):
            h = x
            for weight, bias in zip(model.experts.weights, model.experts.biases, strict=True):
                h = torch.relu(h @ weight[e] + bias[e])
            opinions.append(h)
        for t, (gate, tower) in enumerate(zip(model.gates, model.towers, strict=True)):
            share = torch.softmax(x @ gate.weight[s] + gate.bias[s], dim=0)
            h = sum(share[e] * opinions[e] for e in range(3))
            h = torch.relu(h @ tower.hidden[0].weight[s] + tower.hidden[0].bias[s])
            expected[i, t] = (h @ tower.last.weight[s] + tower.last.bias[s])[0]
    torch.testing.assert_close(model(batch), expected, atol=1e-5, rtol=1e-5)


def test_two_labels_share_the_experts_alone():
    model = build("mmoe", labels=2)
    model(mixed(30))[:, 0].sum().backward()
    assert all(parameter.grad.any() for parameter in model.experts.parameters())
    for own, other in (model.gates, model.towers):
        assert all(parameter.grad.any() for parameter in own.parameters())
        assert not any(parameter.grad.any() for parameter in other.parameters())


def test_scenarios_that_share_everything_differ_by_a_feature():
    model, batch = build("mmoe", labels=2, per_scenario=False, scenario_width=5), mixed(30)
    assert all(parameter.shape[0] == 1 for part in (model.gates, model.towers) for parameter in part.parameters())
    logits = model(batch)
    assert logits.shape == (30, 2)
    one = replace(batch, scenario=torch.zeros_like(batch.scenario))
    assert not torch.allclose(model(one), logits)
    nn.init.zeros_(model.scenario.weight)
    torch.testing.assert_close(model(one), model(batch))


def test_a_width_that_nothing_has_is_refused():
    with pytest.raises(ValueError, match="per_scenario=false"):
        config("mmoe", scenario_width=8)
