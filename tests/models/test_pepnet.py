import torch
from backbones import build, mixed
from torch import nn


def test_follows_its_formula():
    model, batch = build("pepnet", labels=2, widths=(9, 7), gate_width=5, scenario_width=3), mixed(30)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    towers, below, expected = model.towers, model.embedding_gate, torch.empty(30, 2)
    for i, (x, s) in enumerate(zip(batch.joined(), batch.scenario, strict=True)):
        hidden = torch.relu(below.gate.hidden(torch.cat([below.scenario.weight[s], x])))
        scaled = 2 / (1 + torch.exp(-below.gate.last(hidden))) * x
        seen = torch.cat([batch.groups["user"][i], batch.groups["item"][i], scaled])
        for t in range(2):
            h = scaled
            for weight, bias, unit in zip(towers.weights, towers.biases, towers.gates, strict=True):
                scores = unit.last(torch.relu(unit.hidden(seen))).view(2, -1)[t]
                h = 2 / (1 + torch.exp(-scores)) * torch.relu(h @ weight[t] + bias[t])
            expected[i, t] = (h @ towers.last.weight[t])[0] + towers.last.bias[t]
    torch.testing.assert_close(model(batch), expected, atol=1e-5, rtol=1e-5)


def test_towers_per_scenario_and_label_on_top():
    model, batch = build("pepnet", labels=2, widths=(9, 7), scenario_towers=(6, 5)), mixed(30)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    hidden = model.towers._hidden(model.embedding_gate(batch), model.priors.of(batch), batch.row)
    expected = torch.empty(30, 2)
    for i, s in enumerate(batch.scenario):
        for t, top in enumerate(model.towers.tops):
            h = hidden[i, t]
            for linear in top.hidden:
                h = torch.relu(h @ linear.weight[s] + linear.bias[s])
            expected[i, t] = (h @ top.last.weight[s] + top.last.bias[s])[0]
    logits = model(batch)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    logits.sum().backward()
    taught = set(batch.scenario.tolist())
    for top in model.towers.tops:
        assert {s for s, own in enumerate(top.last.bias.grad) if own.any()} == taught
        assert {s for s, own in enumerate(top.hidden[0].weight.grad) if own.any()} <= taught
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_with_even_gates_on_its_towers_it_is_epnet():
    model, below, batch = build("pepnet", labels=2), build("epnet", labels=2, seed=1), mixed(30)
    for unit in model.towers.gates:
        nn.init.zeros_(unit.last.weight)
    below.embedding_gate.load_state_dict(model.embedding_gate.state_dict())
    for name in ("weights", "biases"):
        getattr(below.towers, name).load_state_dict(getattr(model.towers, name).state_dict())
    below.last.load_state_dict(model.towers.last.state_dict())
    torch.testing.assert_close(model(batch), below(batch))


def test_the_towers_gates_do_not_pull_at_the_embeddings_gate():
    model, batch = build("pepnet"), mixed(30)
    for weight, bias in zip(model.towers.weights, model.towers.biases, strict=True):
        nn.init.zeros_(weight)
        nn.init.ones_(bias)
    model(batch).sum().backward()
    assert all(parameter.grad.any() for parameter in model.towers.gates[-1].parameters())
    assert not any(parameter.grad.any() for parameter in model.embedding_gate.parameters())
    assert {name for name, x in batch.groups.items() if x.grad.any()} == {"user", "item"}
