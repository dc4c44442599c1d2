from dataclasses import replace

import torch
from backbones import build, mixed, train
from torch.nn.functional import leaky_relu
from torch.utils.flop_counter import FlopCounterMode


def test_follows_its_formula():
    sizes = {"experts": 3, "widths": (9, 7), "attention_width": 6, "tower_layers": 2, "scenario_width": 5}
    batch = mixed(30)
    model = train(build("m2m", labels=2, label_width=4, **sizes), batch)

    def meta(unit, x, p):
        weight = unit.weight[0] + sum(p[j] * unit.weight_basis[j] for j in range(5))
        return x @ weight + unit.bias + sum(p[j] * unit.bias_basis[j] for j in range(5))

    expected = torch.empty(30, 2)
    for i, (x, s) in enumerate(zip(batch.joined(), batch.scenario, strict=True)):
        p = leaky_relu(model.knowledge(model.scenario.weight[s]))
        views = []
        for e in range(3):
            h = x
            for weight, bias in zip(model.experts.weights, model.experts.biases, strict=True):
                h = torch.relu(h @ weight[e] + bias[e])
            views.append(h)
        for t, tower in enumerate(model.towers):
            pairs = [torch.cat([view, model.label.weight[t]]) for view in views]
            scores = torch.stack([model.score.weight[0] @ leaky_relu(meta(model.attention, each, p)) for each in pairs])
            h = sum(share * view for share, view in zip(torch.softmax(scores, 0), views, strict=True))
            for unit in tower.units:
                h = leaky_relu(meta(unit, h, p) + h)
            expected[i, t] = tower.last(h)[0]
    torch.testing.assert_close(model(batch), expected, atol=1e-5, rtol=1e-5)


def test_no_row_attends_to_another_even_in_training():
    """Public code hands `[B, D]` to a transformer, which takes it for one sequence of length B."""
    model, batch = build("m2m"), mixed(30)
    model.train()(batch)[4].sum().backward()
    for x in batch.groups.values():
        assert (x.grad != 0).any(dim=1).nonzero().flatten().tolist() == [4]


def test_weights_are_generated_once_per_scenario():
    assert _flops_of_a_row(4) == _flops_of_a_row(32)


def _flops_of_a_row(scenario_width: int) -> int:
    model, counts = build("m2m", scenario_width=scenario_width), []
    for rows in (24, 48):
        with FlopCounterMode(display=False) as flops:
            model(mixed(rows))
        counts.append(flops.get_total_flops())
    return counts[1] - counts[0]


def test_without_generated_weights_the_scenario_is_out_of_sight():
    model, batch = build("m2m"), mixed(30)
    moved = replace(batch, scenario=(batch.scenario + 1) % 13)
    assert not torch.isclose(model(moved), model(batch)).any()
    for unit in (model.attention, model.towers[0].units[0]):
        torch.nn.init.zeros_(unit.weight_basis)
    torch.testing.assert_close(model(moved), model(batch))
