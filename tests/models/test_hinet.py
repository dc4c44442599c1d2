from dataclasses import replace

import torch
from backbones import ABSENT, build, config, mixed, schema
from torch import nn

SIZES = {"sub_experts": 3, "widths": (9, 7), "task_experts": 2, "task_widths": (8, 6), "tower_widths": (5,)}


def mlp(weights, biases, x):
    for weight, bias in zip(weights, biases, strict=True):
        x = torch.relu(x @ weight + bias)
    return x


def average(scores, opinions):
    shares = torch.exp(scores) / torch.exp(scores).sum()
    return sum(share * opinion for share, opinion in zip(shares, opinions, strict=True))


def shared_opinions(layer, x):
    return [mlp([w[e] for w in layer.weights], [b[e] for b in layer.biases], x) for e in range(len(layer.biases[0]))]


def own_opinions(layer, s, x):
    count = layer.biases[0].shape[1]
    return [mlp([w[s, e] for w in layer.weights], [b[s, e] for b in layer.biases], x) for e in range(count)]


def network(model, s, x):
    gate = model.networks.gate
    return average(x @ gate.weight[s] + gate.bias[s], own_opinions(model.networks.experts, s, x))


def test_follows_its_formula():
    model, batch = build("hinet", labels=2, **SIZES), mixed(20)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    expected = torch.empty(20, 2)
    for i, (x, s) in enumerate(zip(batch.joined(), batch.scenario.tolist(), strict=True)):
        shared = average(model.shared_gate(x), shared_opinions(model.shared, x))
        shares = torch.softmax(model.networks.scenario[s] @ model.networks.attention[0], dim=0)
        others = sum(shares[j] * network(model, j, x) for j in range(13) if j != s)
        extracted = torch.cat([shared, network(model, s, x), others])
        for t, (experts, gate, tower) in enumerate(
            zip(model.task_experts, model.task_gates, model.towers, strict=True)
        ):
            opinions = own_opinions(experts, s, extracted) + shared_opinions(model.task_shared, extracted)
            h = average(extracted @ gate.weight[s] + gate.bias[s], opinions)
            h = torch.relu(h @ tower.hidden[0].weight[s] + tower.hidden[0].bias[s])
            expected[i, t] = (h @ tower.last.weight[s] + tower.last.bias[s])[0]
    torch.testing.assert_close(model(batch), expected, atol=1e-5, rtol=1e-5)


def test_a_scenario_reads_the_networks_of_others_without_training_them():
    model, batch = build("hinet"), mixed(30)
    batch = replace(batch, scenario=torch.full_like(batch.scenario, 2))
    before = model(batch)
    before.sum().backward()
    for parameter in model.networks.experts.parameters():
        assert [s for s in range(13) if parameter.grad[s].any()] == [2]
    with torch.no_grad():
        model.networks.experts.biases[-1][5] += 1.0
    assert (model(batch) != before).all()


def test_nothing_is_read_of_a_scenario_without_training_rows():
    known = [scenario.model_copy(update={"rows": int(scenario.id != ABSENT)}) for scenario in schema().scenarios]
    model, batch = config("hinet").build(schema().model_copy(update={"scenarios": tuple(known)})), mixed(30)
    before = model(batch)
    for parameter in model.networks.experts.parameters():
        parameter.data[ABSENT].normal_()
    assert torch.equal(model(batch), before)


def test_dropout_leaves_what_is_read_of_others_alone():
    batch = mixed(30)
    x = batch.joined().detach()
    dropped, plain = build("hinet", dropout=0.5), build("hinet")
    assert torch.equal(dropped.networks._read(x), plain.networks._read(x))
    assert not torch.equal(dropped(batch), plain(batch))


def test_one_scenario_has_no_others():
    model, batch = build("hinet", scenarios=1), mixed(30)
    batch = replace(batch, scenario=torch.zeros_like(batch.scenario))
    logits = model(batch)
    logits.sum().backward()
    assert logits.isfinite().all()
    width = model.shared.out_width
    assert not model.task_gates[0].weight.grad[0, 2 * width :].any()
    assert model.task_gates[0].weight.grad[0, width : 2 * width].any()


def test_two_labels_share_the_extraction_and_the_shared_experts_alone():
    model = build("hinet", labels=2)
    model(mixed(30))[:, 0].sum().backward()
    for shared in (model.shared, model.networks, model.task_shared):
        assert all(parameter.grad.any() for parameter in shared.parameters())
    for own, other in (model.task_experts, model.task_gates, model.towers):
        assert all(parameter.grad.any() for parameter in own.parameters())
        assert not any(parameter.grad.any() for parameter in other.parameters())
