import pytest
import torch
from backbones import SCENARIOS, build, config, inputs, mixed, schema
from torch import nn

SETTINGS = {
    "star_width": 11,
    "widths": (10, 9),
    "experts": 3,
    "expert_widths": (8, 7),
    "tower_widths": (6,),
}


def _opinions(weights, biases, x):
    """What each of a stack of MLPs says of `x`."""
    said = []
    for k in range(len(weights[0])):
        h = x
        for weight, bias in zip(weights, biases, strict=True):
            h = torch.relu(h @ weight[k] + bias[k])
        said.append(h)
    return said


def _blended(opinions, own, share):
    others = [opinion for k, opinion in enumerate(opinions) if k != own]
    return share * opinions[own] + (1 - share) * sum(others) / len(others)


@pytest.mark.parametrize("other_scenarios", [True, False])
def test_follows_its_formula(other_scenarios):
    model = build("m3oe", labels=2, other_scenarios=other_scenarios, **SETTINGS)
    batch = mixed(30)
    for name, parameter in model.named_parameters():
        if "bias" in name or "balance" in name or name in ("scenario_weight", "label_weight"):
            nn.init.normal_(parameter)
    star = model.star
    nn.init.normal_(star.scenario_weight, 1, 0.3)
    # One expert per scenario: without that dimension the stack is as any other.
    own_weights = [weight[:, 0] for weight in model.scenario_experts.weights]
    own_biases = [bias[:, 0] for bias in model.scenario_experts.biases]
    expected = torch.empty(30, 2)
    for i, (x, s) in enumerate(zip(batch.joined(), batch.scenario, strict=True)):
        e = x @ (star.weight[0] * star.scenario_weight[s]) + star.bias + star.scenario_bias[s]
        for linear in model.bottom.linears:
            e = torch.relu(linear(e))
        e = e + torch.relu(model.skip.linears[0](x))
        common = _opinions(model.experts.weights, model.experts.biases, e)
        of_labels = _opinions(model.label_experts.weights, model.label_experts.biases, e)
        share = torch.sigmoid(model.scenario_balance) if other_scenarios else 1.0
        d = _blended(_opinions(own_weights, own_biases, e), s, share)
        for t, (gate, tower) in enumerate(zip(model.gates, model.towers, strict=True)):
            weight = torch.softmax(e @ gate.weight[s] + gate.bias[s], dim=0)
            h = sum(weight[k] * common[k] for k in range(3)) + torch.sigmoid(model.scenario_weight) * d
            h = h + torch.sigmoid(model.label_weight) * _blended(of_labels, t, torch.sigmoid(model.label_balance))
            h = torch.relu(h @ tower.hidden[0].weight[s] + tower.hidden[0].bias[s])
            expected[i, t] = (h @ tower.last.weight[s] + tower.last.bias[s])[0]
    torch.testing.assert_close(model(batch), expected, atol=1e-5, rtol=1e-5)


def test_other_scenarios_are_read_but_learn_nothing():
    model, batch = build("m3oe"), inputs(torch.full((20,), 3))
    before = model(batch)
    before.sum().backward()
    for parameter in model.scenario_experts.parameters():
        assert parameter.grad.flatten(1).any(dim=1).tolist() == [s == 3 for s in range(SCENARIOS)]
    with torch.no_grad():
        model.scenario_experts.weights[0][7].neg_()
    assert (model(batch) != before).any()


def test_a_full_balance_is_as_if_there_were_no_others():
    model, alone, batch = build("m3oe"), build("m3oe", other_scenarios=False), mixed(30)
    state = model.state_dict()
    state.pop("scenario_balance")
    alone.load_state_dict(state)
    assert not torch.allclose(model(batch), alone(batch), atol=1e-4)
    nn.init.constant_(model.scenario_balance, float("inf"))
    torch.testing.assert_close(model(batch), alone(batch))


def test_scenarios_without_training_rows_are_not_read():
    known = [scenario.model_copy(update={"rows": 100 * (scenario.id != 7)}) for scenario in schema().scenarios]
    model, batch = config("m3oe").build(schema().model_copy(update={"scenarios": tuple(known)})), mixed(30)
    others = batch.scenario != 7
    before = model(batch)[others]
    with torch.no_grad():
        for parameter in model.scenario_experts.parameters():
            parameter[7] = torch.randn_like(parameter[7])
        assert torch.equal(model(batch)[others], before)
        model.scenario_experts.weights[0][8].neg_()
        assert (model(batch)[others] != before).any()


def test_reading_other_scenarios_passes_a_gradient_to_the_input():
    model, batch = build("m3oe"), inputs(torch.full((20,), 3))
    for name, parameter in model.named_parameters():
        if name.startswith(("experts", "label_experts")):
            nn.init.zeros_(parameter)
    with torch.no_grad():
        for parameter in model.scenario_experts.parameters():
            parameter[3] = 0
    model(batch).sum().backward()
    assert all(x.grad.any() for x in batch.groups.values())


@pytest.mark.parametrize("labels", [1, 2])
def test_one_scenario_alone_has_no_others(labels):
    model = build("m3oe", labels=labels, scenarios=1)
    batch = inputs(torch.zeros(30, dtype=torch.int64))
    model(batch).square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    balances = {name for name, _ in model.named_parameters() if "balance" in name}
    assert balances == ({"label_balance"} if labels > 1 else set())
