import pytest
import torch
from backbones import build, config, mixed
from pydantic import ValidationError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def linear(layer, s, x):
    return x @ layer.weight[s] + layer.bias[s]


def test_follows_its_formula():
    model, batch = build("aitm", labels=3, widths=(9, 7), tower_widths=(6,)), mixed(30)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    expected = torch.empty(30, 3)
    for i, (x, s) in enumerate(zip(batch.joined(), batch.scenario, strict=True)):
        z = x
        for layer in model.shared.linears:
            z = torch.relu(layer(z))
        for t, (transfer, tower) in enumerate(zip(model.transfers, model.towers, strict=True)):
            q = x
            for weight, bias in zip(model.own.weights, model.own.biases, strict=True):
                q = torch.relu(q @ weight[s, t] + bias[s, t])
            p = torch.relu(linear(transfer.handover, s, z))
            values, scores = [], []
            for u in (p, q):
                h1, h2, h3 = linear(transfer.projections, s, u).split(7)
                values.append(h1)
                scores.append(h2 @ h3 / 7**0.5)
            share = torch.softmax(torch.stack(scores), dim=0)
            z = share[0] * values[0] + share[1] * values[1]
            expected[i, t] = linear(tower.last, s, torch.relu(linear(tower.hidden[0], s, z)))[0]
    torch.testing.assert_close(model(batch), expected, atol=1e-5, rtol=1e-5)


def test_information_flows_down_the_chain_alone():
    model, batch = build("aitm", labels=3), mixed(120)
    reached = []
    for t in range(3):
        model.zero_grad()
        model(batch)[:, t].sum().backward()
        own = [weight.grad.transpose(0, 1).flatten(1).any(dim=1).tolist() for weight in model.own.weights]
        assert own[0] == own[1]
        assert all(parameter.grad.any() for parameter in model.shared.parameters())
        towers = [
            any(parameter.grad is not None and parameter.grad.any() for parameter in tower.parameters())
            for tower in model.towers
        ]
        assert towers == [k == t for k in range(3)]
        reached.append(own[0])
    assert reached == [[True, False, False], [True, True, False], [True, True, True]]


def test_key_query_and_value_all_learn_where_public_code_leaves_the_key_out():
    model, batch = build("aitm"), mixed(120)
    model(batch).sum().backward()
    for part in model.transfers[0].projections.weight.grad.chunk(3, dim=2):
        assert part.any()


def test_the_calibrator_counts_the_rises_along_the_labels():
    model, batch = build("aitm", labels=3, calibrator=0.5), mixed(30)
    objective = model.objective(batch)
    chance = torch.sigmoid(objective.logits)
    expected = [0.5 * (max(c[1] - c[0], 0.0) + max(c[2] - c[1], 0.0)) for c in chance.tolist()]
    assert any(expected)
    torch.testing.assert_close(objective.penalty, torch.tensor(expected))


def test_the_calibrator_pulls_a_label_below_the_one_before():
    model, batch = build("aitm", labels=2, calibrator=1.0), mixed(120)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(30):
        optimizer.zero_grad()
        penalty = model.objective(batch).penalty.sum()
        penalty.backward()
        optimizer.step()
    assert (model(batch).diff(dim=1) <= 0).all()


def test_without_calibrator_nothing_is_added():
    assert build("aitm", labels=2).objective(mixed(30)).penalty is None


def test_one_label_cannot_rise():
    assert not build("aitm", calibrator=0.5).objective(mixed(30)).penalty.any()


@pytest.mark.parametrize("calibrator", [-0.1, float("nan"), float("inf")])
def test_a_faulty_calibrator_is_refused(calibrator):
    with pytest.raises(ValidationError):
        config("aitm", calibrator=calibrator)


def test_a_row_meets_its_own_layers_alone_where_public_code_runs_all_of_them():
    def flops(scenarios):
        batch = mixed(120)
        with FlopCounterMode(display=False) as counter:
            build("aitm", scenarios=scenarios)(batch).sum().backward()
        return counter.get_total_flops()

    assert flops(100) == flops(13)
