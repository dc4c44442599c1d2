from dataclasses import replace

import torch
from backbones import build, mixed
from torch import nn


def test_follows_its_formula():
    model, batch = build("epnet", labels=2, widths=(9, 7), gate_width=5, scenario_width=3), mixed(30)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    unit, expected = model.embedding_gate.gate, torch.empty(30, 2)
    for i, (x, s) in enumerate(zip(batch.joined(), batch.scenario, strict=True)):
        seen = torch.cat([model.embedding_gate.scenario.weight[s], x])
        hidden = torch.relu(unit.hidden.weight @ seen + unit.hidden.bias)
        scaled = 2 / (1 + torch.exp(-(unit.last.weight @ hidden + unit.last.bias))) * x
        for t in range(2):
            h = scaled
            for weight, bias in zip(model.towers.weights, model.towers.biases, strict=True):
                h = torch.relu(h @ weight[t] + bias[t])
            expected[i, t] = (h @ model.last.weight[t])[0] + model.last.bias[t]
    torch.testing.assert_close(model(batch), expected, atol=1e-5, rtol=1e-5)


def test_with_even_gates_it_is_a_plain_network_that_does_not_know_the_scenario():
    model, batch = build("epnet"), mixed(30)
    nn.init.zeros_(model.embedding_gate.gate.last.weight)
    plain = model.last(model.towers(batch.joined(), batch.row))
    torch.testing.assert_close(model(batch), plain)
    assert torch.equal(model(batch), model(replace(batch, scenario=(batch.scenario + 1) % 13)))


def test_the_gate_scales_the_input_alone_so_the_names_are_not_swapped():
    """Public code calls PPNet by this name: there, wide open gates double every hidden layer (here: by 4)."""
    model, batch = build("epnet", widths=(9, 7)), mixed(30)
    nn.init.zeros_(model.embedding_gate.gate.last.weight)
    even = model(batch)
    nn.init.constant_(model.embedding_gate.gate.last.bias, 100.0)
    torch.testing.assert_close(model(batch), 2 * even)


def test_the_gate_pulls_at_the_scenario_but_not_at_the_embeddings():
    model, batch = build("epnet"), mixed(30)
    gate = model.embedding_gate
    scaled = gate(batch)
    factors = (scaled / batch.joined()).detach()
    scaled.sum().backward()
    assert gate.scenario.weight.grad.any()
    gradient = torch.cat([x.grad for x in batch.groups.values()], dim=1)
    torch.testing.assert_close(gradient, factors, atol=1e-4, rtol=1e-4)
