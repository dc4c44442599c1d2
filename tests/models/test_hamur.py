from dataclasses import replace

import pytest
import torch
from backbones import build, config, mixed, take, train
from pydantic import ValidationError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

SMALL = {"widths": (9, 7, 6), "adapters": 2, "adapter_width": 5, "rank": 3, "hyper_widths": (8,), "scenario_width": 4}


def test_follows_its_formula():
    batch = mixed(60)
    model = train(build("hamur", labels=2, **SMALL), batch).eval()
    expected = []
    for x, s in zip(batch.joined(), batch.scenario, strict=True):
        z = h = torch.cat([x, model.scenario.weight[s]])
        core = model.hyper_last(torch.relu(model.hyper.linears[0](z))).view(3, 3)
        for layer, linear in enumerate(model.hidden):
            h = torch.relu(linear(h))
            if layer > 0:
                adapter = model.adapters[layer]
                down, up = (part.down.weight.T @ core @ part.up.weight.T for part in (adapter.down, adapter.up))
                norm, out = adapter.norm, torch.sigmoid(h @ down + adapter.bias) @ up
                out = (out - norm.running_mean[s]) / (norm.running_var[s] + norm.eps).sqrt()
                h = h + out * norm.gamma * norm.scenario_gamma[s] + norm.beta + norm.scenario_beta[s]
        expected.append(model.last(h))
    torch.testing.assert_close(model(batch), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_adapters_that_add_nothing_leave_the_plain_network():
    model, batch = build("hamur", norm_start=0.0, **SMALL), mixed(60)
    plain = build("mlp", widths=(9, 7, 6), scenario_width=4)
    plain.scenario, plain.mlp.linears, plain.last = model.scenario, model.hidden, model.last
    torch.testing.assert_close(model(batch), plain(batch))


def test_the_adapters_weights_are_not_of_rank_1_at_the_start_as_from_constant_ones():
    model, batch = build("hamur", rank=8), mixed(30)
    z = torch.cat([batch.joined(), model.scenario(batch.scenario)], dim=1)
    cores = model.hyper_last(model.hyper(z, batch.row)).view(30, 8, 8)
    adapter = model.adapters[-1]
    for part in (adapter.down, adapter.up):
        assert (torch.linalg.matrix_rank(part.down.weight.T @ cores @ part.up.weight.T) == 8).all()


def test_the_hyper_network_runs_once_per_row_not_once_per_scenario():
    batch = mixed(30)
    costs = []
    for scenarios in (13, 100):
        model = build("hamur", scenarios=scenarios)
        with FlopCounterMode(display=False) as flops:
            model(batch).sum().backward()
        costs.append(flops.get_total_flops())
    assert costs[0] == costs[1]


def test_evaluation_normalises_by_saved_statistics_not_by_those_of_the_batch():
    batch = mixed(60)
    model = train(build("hamur"), batch).eval()
    first = torch.arange(60) == 0
    others = {name: torch.where(first[:, None], x, 10 * x) for name, x in batch.groups.items()}
    torch.testing.assert_close(model(replace(batch, groups=others))[0], model(batch)[0], atol=1e-5, rtol=1e-5)
    own = take(batch, batch.scenario == 3)
    assert not torch.isclose(model(own), model.train()(own)).any()


def test_every_scenario_has_statistics_of_its_own():
    model, batch = build("hamur"), mixed(60)
    model(batch)
    mean = model.adapters[-1].norm.running_mean
    seen = [s for s in range(13) if s != 10]
    assert len(mean[seen].unique(dim=0)) == 12
    assert not mean[10].any()


def test_only_the_last_layers_have_adapters():
    model = build("hamur", **SMALL)
    assert [isinstance(adapter, nn.Identity) for adapter in model.adapters] == [True, False, False]
    with pytest.raises(ValidationError, match="3 adapters for 2 hidden layers"):
        config("hamur", adapters=3, widths=(9, 7))
