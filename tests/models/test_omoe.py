import torch
from backbones import build, mixed
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def test_follows_its_formula():
    model, batch = build("omoe", labels=2, experts=3, widths=(9, 7), tower_widths=(6,)), mixed(30)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    expected = torch.empty(30, 2)
    for i, (x, s) in enumerate(zip(batch.joined(), batch.scenario, strict=True)):
        share, mixture = torch.softmax(model.gate(x), dim=0), torch.zeros(7)
        for e in range(3):
            h = x
            for weight, bias in zip(model.experts.weights, model.experts.biases, strict=True):
                h = torch.relu(h @ weight[e] + bias[e])
            mixture = mixture + share[e] * h
        for t, tower in enumerate(model.towers):
            h = torch.relu(mixture @ tower.hidden[0].weight[s] + tower.hidden[0].bias[s])
            expected[i, t] = (h @ tower.last.weight[s] + tower.last.bias[s])[0]
    torch.testing.assert_close(model(batch), expected, atol=1e-5, rtol=1e-5)


def test_is_mmoe_whose_gates_are_all_equal():
    model, mmoe, batch = build("omoe", labels=2), build("mmoe", labels=2, seed=1), mixed(30)
    mmoe.load_state_dict(model.state_dict(), strict=False)
    for gate in mmoe.gates:
        gate.weight.data.copy_(model.gate.weight.T.expand_as(gate.weight))
    torch.testing.assert_close(model(batch), mmoe(batch))


def test_a_row_meets_its_own_towers_alone_where_public_code_runs_all_of_them():
    def flops(scenarios):
        batch = mixed(120)
        with FlopCounterMode(display=False) as counter:
            build("omoe", scenarios=scenarios)(batch).sum().backward()
        return counter.get_total_flops()

    assert flops(100) == flops(13)
