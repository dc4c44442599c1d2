from dataclasses import replace

import pytest
import torch
from backbones import build, config, mixed, train
from torch.utils.flop_counter import FlopCounterMode

from msr_dist.models.apg import ApgLinear

SIZES = {"widths": (9, 7), "rank": 3, "factor_width": 6, "scenario_width": 5}


@pytest.mark.parametrize("condition", [(), ("user",), ("item", "user")])
def test_follows_its_formula(condition):
    batch = mixed(30)
    model = train(build("apg", labels=2, condition=condition, **SIZES), batch)
    expected = []
    for i, s in enumerate(batch.scenario):
        c = torch.cat([model.scenario.weight[s], *(batch.groups[group][i] for group in condition)])
        h = batch.joined()[i]
        for layer in model.hidden:
            enter, leave = layer.enter[0] @ layer.enter[1], layer.leave[0] @ layer.leave[1]
            core = layer.core + sum(c[j] * layer.core_basis[j] for j in range(len(c)))
            low_bias = sum(c[j] * layer.core_bias_basis[j] for j in range(len(c)))
            h = torch.relu(h @ (enter @ core @ leave) + low_bias @ leave + layer.bias)
        expected.append(model.last(h))
    torch.testing.assert_close(model(batch), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_is_a_plain_network_of_low_rank_where_cores_are_the_identity():
    model, batch = build("apg"), mixed(30)
    moved = replace(batch, scenario=(batch.scenario + 1) % 13)
    assert not torch.isclose(model(moved), model(batch)).any()
    h = batch.joined()
    for layer in model.hidden:
        torch.nn.init.zeros_(layer.core_basis)
        weight = layer.enter[0] @ layer.enter[1] @ layer.leave[0] @ layer.leave[1]
        assert torch.linalg.matrix_rank(weight) == 16
        h = torch.relu(h @ weight)
    torch.testing.assert_close(model(batch), model.last(h), atol=1e-5, rtol=1e-5)


def test_layers_keep_the_scale_of_their_input():
    torch.manual_seed(0)
    for widths in ((512, 256), (16, 16), (32, 512)):
        layer = ApgLinear(config("apg"), 4, *widths)
        product = layer(torch.randn(2000, widths[0]), torch.zeros(2000, 4), None)
        assert 0.5 < product.std() < 2, widths


@pytest.mark.parametrize("setting", ["scenario_width", "factor_width"])
def test_neither_generation_nor_factors_cost_anything_per_row(setting):
    assert _flops_of_a_row(**{setting: 17}) == _flops_of_a_row(**{setting: 34})


def test_a_mixed_condition_makes_a_core_per_row():
    assert _flops_of_a_row(condition=("user",)) > _flops_of_a_row() + 8 * 16 * 16


def _flops_of_a_row(**settings) -> float:
    model, counts = build("apg", **settings), []
    for rows in (24, 48):
        with FlopCounterMode(display=False) as flops:
            model(mixed(rows))
        counts.append(flops.get_total_flops())
    return (counts[1] - counts[0]) / 24


def test_refuses_an_unknown_group():
    with pytest.raises(ValueError, match=r"model.condition: there is no feature group 'users', only user, item"):
        build("apg", condition=("user", "users"))
