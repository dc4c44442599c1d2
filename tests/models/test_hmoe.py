from dataclasses import replace

import torch
from backbones import ABSENT, build, config, mixed, schema
from torch import nn


def tower_of(head, s, h):
    for linear in head.tower.hidden:
        h = torch.relu(h @ linear.weight[s] + linear.bias[s])
    return (h @ head.tower.last.weight[s] + head.tower.last.bias[s])[0]


def reference(model, batch):
    """Logits `[B, T]` and every scenario's opinion `[B, T, S]`, row by row; others' under stop-gradient."""
    logits, opinions = [], []
    for x, s in zip(batch.joined(), batch.scenario, strict=True):
        hidden = []
        for e in range(len(model.experts.weights[0])):
            h = x
            for weight, bias in zip(model.experts.weights, model.experts.biases, strict=True):
                h = torch.relu(h @ weight[e] + bias[e])
            hidden.append(h)
        for head in model.heads:
            said = []
            for j in range(model.scenarios):
                share = torch.softmax(x @ head.gate.weight[j] + head.gate.bias[j], dim=0)
                opinion = tower_of(head, j, sum(share[e] * h for e, h in enumerate(hidden)))
                said.append(opinion if j == s else opinion.detach())
            weight = torch.softmax(x @ head.relation.weight[s] + head.relation.bias[s], dim=0)
            logits.append((weight * torch.stack(said)).sum())
            opinions.append(torch.stack(said))
    shape = len(batch.row), len(model.heads)
    return torch.stack(logits).view(shape), torch.stack(opinions).view(*shape, -1)


def randomised(labels=2):
    model = build("hmoe", labels=labels, experts=3, widths=(9, 7), tower_widths=(6, 5))
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return model


def test_follows_its_formula_and_its_stop_gradient():
    model, batch, again = randomised(), mixed(30), mixed(30)
    weight = torch.randn(30, 2)
    found, (expected, _) = model(batch), reference(model, again)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad((found * weight).sum(), [*model.parameters(), *batch.groups.values()])
    wanted = torch.autograd.grad((expected * weight).sum(), [*model.parameters(), *again.groups.values()])
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, atol=1e-5, rtol=1e-4)


def test_mixes_in_the_label_space_where_public_code_mixes_hidden_units():
    model, batch = randomised(), mixed(30)
    _, opinions = reference(model, batch)
    logits = model(batch)
    assert (logits > opinions.amin(dim=2)).all()
    assert (logits < opinions.amax(dim=2)).all()


def test_without_an_ear_for_others_it_is_mmoe():
    model, mmoe, batch = build("hmoe", labels=2), build("mmoe", labels=2, seed=1), mixed(30)
    mmoe.experts.load_state_dict(model.experts.state_dict())
    for head, gate, tower in zip(model.heads, mmoe.gates, mmoe.towers, strict=True):
        gate.load_state_dict(head.gate.state_dict())
        tower.load_state_dict(head.tower.state_dict())
        head.relation.bias.data.copy_(1e9 * torch.eye(13))
    torch.testing.assert_close(model(batch), mmoe(batch))


def test_others_are_read_without_dropout():
    model, batch = build("hmoe", dropout=0.5, tower_widths=(40,)), mixed(30)
    for dropout in model.experts.dropouts:
        dropout.rate = 0.0
    head = model.heads[0]
    nn.init.zeros_(head.relation.weight)
    # Every row asks the next scenario alone.
    head.relation.bias.data.copy_(1e9 * torch.eye(13).roll(1, dims=1))
    asked = model(batch)
    torch.testing.assert_close(asked, model.eval()(batch))
    head.relation.bias.data.copy_(1e9 * torch.eye(13))
    moved = replace(batch, scenario=(batch.scenario + 1) % 13)
    torch.testing.assert_close(asked, model(moved))
    assert not torch.isclose(asked, model.train()(moved)).all()


def test_a_scenario_without_training_rows_has_no_say():
    known = [scenario.model_copy(update={"rows": int(scenario.id != ABSENT)}) for scenario in schema().scenarios]
    model, batch = config("hmoe").build(schema().model_copy(update={"scenarios": tuple(known)})), mixed(30)
    before = model(batch)
    for parameter in model.parameters():
        if len(parameter) == len(known):
            nn.init.normal_(parameter.data[ABSENT])
    assert torch.equal(model(batch), before)
    assert model(replace(batch, scenario=torch.full_like(batch.scenario, ABSENT))).isfinite().all()
