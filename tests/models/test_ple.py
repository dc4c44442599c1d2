import pytest
import torch
from backbones import build, config, mixed
from pydantic import ValidationError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def expert(weights, biases, index, x):
    for weight, bias in zip(weights, biases, strict=True):
        x = torch.relu(x @ weight[index] + bias[index])
    return x


def mixture(scores, opinions):
    share = torch.softmax(scores, dim=0)
    return sum(share[k] * opinion for k, opinion in enumerate(opinions))


@pytest.mark.parametrize("levels", [((9, 7),), ((9,), (8, 7)), ((9,), (8,), (7,))])
def test_follows_its_formula(levels):
    settings = {"experts": 2, "shared_experts": 3, "levels": levels, "tower_widths": (6,)}
    model, batch = build("ple", labels=2, **settings), mixed(30)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    expected = torch.empty(30, 2)
    for i, (x, s) in enumerate(zip(batch.joined(), batch.scenario, strict=True)):
        own = shared = x
        for depth, level in enumerate(model.levels):
            opinions = [expert(level.own.weights, level.own.biases, (s, e), own) for e in range(2)]
            opinions += [expert(level.shared.weights, level.shared.biases, e, shared) for e in range(3)]
            if depth + 1 < len(model.levels):
                gate = model.own_gates[depth]
                own = mixture(own @ gate.weight[s] + gate.bias[s], opinions)
                shared = mixture(model.shared_gates[depth](shared), opinions)
        for t, (gate, tower) in enumerate(zip(model.gates, model.towers, strict=True)):
            h = mixture(own @ gate.weight[s] + gate.bias[s], opinions)
            h = torch.relu(h @ tower.hidden[0].weight[s] + tower.hidden[0].bias[s])
            expected[i, t] = (h @ tower.last.weight[s] + tower.last.bias[s])[0]
    torch.testing.assert_close(model(batch), expected, atol=1e-5, rtol=1e-5)


def test_one_level_whose_own_experts_are_ignored_is_mmoe():
    batch = mixed(30)
    model = build("ple", labels=2, experts=2, shared_experts=4, levels=((128, 64),))
    mmoe = build("mmoe", labels=2, experts=4, widths=(128, 64), seed=1)
    mmoe.experts.load_state_dict(model.levels[0].shared.state_dict())
    mmoe.towers.load_state_dict(model.towers.state_dict())
    for gate, narrow in zip(model.gates, mmoe.gates, strict=True):
        gate.bias.data[:, :2] = -1e9
        narrow.weight.data.copy_(gate.weight[:, :, 2:])
    torch.testing.assert_close(model(batch), mmoe(batch))


def test_the_shared_gate_asks_the_experts_of_the_rows_own_scenario():
    model, batch = build("ple"), mixed(120)
    for gate in (*model.own_gates, *model.gates):
        gate.bias.data[:, :2] = -1e9
    # What is left to a scenario's experts of the first level is the way through the shared gate.
    model(batch)[batch.scenario == 4].sum().backward()
    touched = model.levels[0].own.weights[0].grad.flatten(1).any(dim=1)
    assert touched.nonzero().flatten().tolist() == [4]


def test_two_labels_share_all_but_the_last_gates_and_the_towers():
    model = build("ple", labels=2)
    model(mixed(30))[:, 0].sum().backward()
    for shared in (model.levels, model.own_gates, model.shared_gates):
        assert all(parameter.grad.any() for parameter in shared.parameters())
    for own, other in (model.gates, model.towers):
        assert all(parameter.grad.any() for parameter in own.parameters())
        assert not any(parameter.grad.any() for parameter in other.parameters())


def test_a_row_meets_its_own_layers_alone_where_public_code_runs_all_of_them():
    def flops(scenarios):
        batch = mixed(120)
        with FlopCounterMode(display=False) as counter:
            build("ple", scenarios=scenarios)(batch).sum().backward()
        return counter.get_total_flops()

    assert flops(100) == flops(13)


@pytest.mark.parametrize("levels", [(), ((),), ((8,), ()), ((0,),), (8,)])
def test_faulty_levels_are_refused(levels):
    with pytest.raises(ValidationError):
        config("ple", levels=levels)
