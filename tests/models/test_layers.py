import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from msr_dist.models.base import Behaviours
from msr_dist.models.layers import (
    MLP,
    Dropout,
    Experts,
    ScenarioExperts,
    ScenarioGroups,
    ScenarioLinear,
    ScenarioNorm,
    ScenarioTower,
    TargetAttention,
    grouped_linear,
    sum_over_ranks,
)

SCENARIO = torch.tensor([3, 0, 3, 1, 0, 3, 3, 0])
ROW = torch.arange(8) + 40
GROUPS = ScenarioGroups.of(SCENARIO, 5)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class TestDropout:
    def test_the_mask_belongs_to_the_row(self):
        dropout, x, row = Dropout(0.5), torch.ones(50, 20), torch.arange(50) * 7
        together = dropout(x, row)
        order = torch.randperm(50)[:13]
        assert torch.equal(dropout(x[order], row[order]), together[order])
        assert torch.equal(dropout(x, row), together)

    def test_rows_units_and_layers_differ(self):
        x, row = torch.ones(50, 64), torch.arange(50)
        first, second = (Dropout(0.5)(x, row) for _ in range(2))
        for masks in (first, first.T, torch.cat([first, second])):
            assert len(masks.unique(dim=0)) == len(masks)

    def test_layers_are_independent(self):
        x, row = torch.ones(400, 256), torch.arange(400)
        first, second = (Dropout(0.5)(x, row).flatten() for _ in range(2))
        assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.02

    @pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
    def test_rate_and_scale(self, rate):
        x = Dropout(rate)(torch.ones(1000, 100), torch.arange(1000))
        assert (x == 0).float().mean() == pytest.approx(rate, abs=0.01)
        torch.testing.assert_close(x[x != 0].unique(), torch.tensor([1 / (1 - rate)]))

    def test_more_dimensions_than_two(self):
        dropout, x = Dropout(0.5), torch.ones(8, 3, 4)
        assert torch.equal(dropout(x, ROW).flatten(1), dropout(x.flatten(1), ROW))

    def test_is_absent_in_evaluation_and_at_rate_0(self):
        x = torch.ones(8, 4)
        assert Dropout(0.5).eval()(x, ROW) is x
        assert Dropout(0.0)(x, ROW) is x

    def test_the_salt_is_saved(self):
        dropout, other, x = Dropout(0.5), Dropout(0.5), torch.ones(8, 16)
        assert not torch.equal(other(x, ROW), dropout(x, ROW))
        other.load_state_dict(dropout.state_dict())
        assert torch.equal(other(x, ROW), dropout(x, ROW))


class TestMlp:
    def test_is_linear_and_relu(self):
        mlp, x = MLP(6, (5, 4), dropout=0.0), torch.randn(8, 6)
        expected = x
        for linear in mlp.linears:
            expected = linear(expected).clamp(min=0)
        assert torch.equal(mlp(x, ROW), expected)
        assert expected.shape == (8, mlp.out_width)

    def test_drops_after_each_layer(self):
        mlp = MLP(6, (500, 400), dropout=0.5)
        mlp.linears[1].weight.data.zero_()
        mlp.linears[1].bias.data.fill_(1.0)
        assert (mlp(torch.randn(8, 6), ROW) == 0).float().mean() == pytest.approx(0.5, abs=0.05)
        assert len({int(dropout.salt) for dropout in mlp.dropouts}) == 2


class TestExperts:
    def test_each_is_an_mlp(self):
        experts, x = Experts(3, 6, (5, 4), dropout=0.0), torch.randn(8, 6)
        for bias in experts.biases:
            nn.init.normal_(bias)
        found = experts(x, ROW)
        assert found.shape == (8, 3, 4)
        for e in range(3):
            expected = x
            for weight, bias in zip(experts.weights, experts.biases, strict=True):
                expected = torch.relu(expected @ weight[e] + bias[e])
            torch.testing.assert_close(found[:, e], expected)

    def test_masks_belong_to_rows_and_differ_by_expert(self):
        experts, x = Experts(3, 6, (50,), dropout=0.5), torch.randn(8, 6)
        found = experts(x, ROW)
        torch.testing.assert_close(experts(x[5:], ROW[5:]), found[5:])
        zeros = found == 0
        assert not torch.equal(zeros[:, 0], zeros[:, 1])


class TestScenarioGroups:
    def test_groups_and_restores(self):
        x = torch.randn(8, 4, requires_grad=True)
        grouped = GROUPS.group(x)
        assert torch.equal(GROUPS.group(SCENARIO), GROUPS.scenario)
        assert torch.equal(GROUPS.scenario, torch.tensor([0, 0, 0, 1, 3, 3, 3, 3]))
        assert GROUPS.sizes == GROUPS.counts.tolist() == [3, 1, 0, 4, 0]
        assert torch.equal(GROUPS.restore(grouped), x)
        weight = torch.randn(8, 4)
        (GROUPS.restore(grouped) * weight).sum().backward()
        assert torch.equal(x.grad, weight)

    def test_spreads_and_sums(self):
        table = torch.randn(5, 4)
        spread = GROUPS.spread(table)
        assert torch.equal(GROUPS.restore(spread), table[SCENARIO])
        torch.testing.assert_close(GROUPS.sums(spread), table.double() * GROUPS.counts[:, None])

    def test_refuses_an_unknown_scenario(self):
        with pytest.raises(ValueError, match="scenario 7, but the schema only 5"):
            ScenarioGroups.of(torch.tensor([0, 7]), 5)


class TestScenarioLinear:
    def test_each_row_through_its_own_layer(self):
        layer, x = ScenarioLinear(5, 6, 4), torch.randn(8, 6)
        nn.init.normal_(layer.bias)
        found = GROUPS.restore(layer(GROUPS.group(x), GROUPS))
        for i, s in enumerate(SCENARIO):
            torch.testing.assert_close(found[i], x[i] @ layer.weight[s] + layer.bias[s])

    def test_absent_scenarios_get_no_gradient(self):
        layer = ScenarioLinear(5, 6, 4)
        layer(torch.randn(8, 6), GROUPS).square().sum().backward()
        for parameter in layer.parameters():
            assert parameter.grad.flatten(1).any(dim=1).tolist() == [True, True, False, True, False]

    @pytest.mark.parametrize("scenarios", [5, 100])
    def test_each_row_is_computed_once(self, scenarios):
        layer, groups = ScenarioLinear(scenarios, 6, 4), ScenarioGroups.of(SCENARIO, scenarios)
        x = torch.randn(8, 6, requires_grad=True)
        with FlopCounterMode(display=False) as flops:
            layer(x, groups).sum().backward()
        assert flops.get_total_flops() == 3 * 2 * 8 * 6 * 4


def test_a_tower_ends_linear():
    tower, x = ScenarioTower(5, 6, (7, 3), 2, dropout=0.0), torch.randn(8, 6)
    found = tower(x, ROW, GROUPS)
    hidden = x
    for layer in tower.hidden:
        hidden = layer(hidden, GROUPS).clamp(min=0)
    assert torch.equal(found, tower.last(hidden, GROUPS))
    assert found.shape == (8, 2)


REAL = torch.arange(2000)


class TestScenarioNorm:
    def test_is_a_batch_norm_per_scenario(self):
        norm = ScenarioNorm(5, 4)
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        x = torch.randn(8, 4, requires_grad=True)
        weight = torch.randn(8, 4)
        for groups in (GROUPS, ScenarioGroups.of(torch.tensor([0, 0, 0, 0, 0, 3, 3, 3]), 5)):
            found = norm(x, REAL[: len(x)], groups)
            gradient = torch.autograd.grad((found * weight).sum(), x)[0]
            for s in (0, 3):
                reference = nn.BatchNorm1d(4)
                reference.weight.data = (norm.gamma * norm.scenario_gamma[s]).data
                reference.bias.data = (norm.beta + norm.scenario_beta[s]).data
                own = groups.scenario == s
                expected = reference(x[own])
                torch.testing.assert_close(found[own], expected)
                wanted = torch.autograd.grad((expected * weight[own]).sum(), x)[0]
                torch.testing.assert_close(gradient[own], wanted[own], atol=1e-5, rtol=1e-5)

    def test_evaluation_reads_the_running_statistics(self):
        norm = ScenarioNorm(5, 4)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        x = torch.randn(8, 4)
        mean, var = norm.running_mean[GROUPS.scenario], norm.running_var[GROUPS.scenario]
        torch.testing.assert_close(norm.eval()(x, REAL[:8], GROUPS), (x - mean) / (var + norm.eps).sqrt())

    def test_running_statistics_average_first_and_forget_later(self):
        norm, groups = ScenarioNorm(2, 1, momentum=0.3), ScenarioGroups.of(torch.zeros(4, dtype=torch.int64), 2)
        batches = [torch.randn(4, 1) for _ in range(5)]
        mean, var = torch.tensor(0.0), torch.tensor(1.0)
        for k, x in enumerate(batches, start=1):
            norm(x, REAL[: len(x)], groups)
            mean, var = mean + max(0.3, 1 / k) * (x.mean() - mean), var + max(0.3, 1 / k) * (x.var() - var)
            torch.testing.assert_close(norm.running_mean, torch.tensor([[mean], [0.0]]))
            torch.testing.assert_close(norm.running_var, torch.tensor([[var], [1.0]]))
        assert norm.updates.tolist() == [[5], [0]]

    def test_a_single_row_is_normalised_as_in_evaluation(self):
        norm, x = ScenarioNorm(5, 4), torch.randn(8, 4) * 3
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        expected = norm.eval()(x, REAL[:8], GROUPS)
        before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
        found = norm.train()(x, REAL[:8], GROUPS)
        torch.testing.assert_close(found[3], expected[3])
        assert not torch.isclose(found[4:], expected[4:]).any()
        for name, buffer in norm.named_buffers():
            changed = [not torch.equal(buffer[s], before[name][s]) for s in range(5)]
            assert changed == [True, False, False, True, False], name

    def test_a_far_mean_and_a_constant_column(self):
        norm = ScenarioNorm(1, 3)
        groups = ScenarioGroups.of(torch.zeros(2000, dtype=torch.int64), 1)
        x = torch.randn(2000, 3) + torch.tensor([0.0, 300.0, 0.0])
        x[:, 2] = 7.0
        for tolerance in (1e-2, 1e-4):
            found = norm(x, REAL[: len(x)], groups)
            torch.testing.assert_close(found.std(0)[:2], torch.ones(2), atol=1e-3 + tolerance, rtol=0)
            assert found[:, 2].abs().max() < tolerance

    def test_padding_counts_nowhere(self):
        x, scenario = torch.randn(8, 4), torch.tensor([0, 0, 0, 1, 1, 1, 3, 3])
        row = torch.tensor([4, 5, 6, 7, 8, 9, 10, 11])
        padded = torch.cat([x, x[6:7], x[6:7] * 9]), torch.cat([row, torch.tensor([-1, -1])])
        scenarios = torch.cat([scenario, torch.tensor([0, 3])])
        plain, filled = ScenarioNorm(5, 4), ScenarioNorm(5, 4)
        groups, filled_groups = ScenarioGroups.of(scenario, 5), ScenarioGroups.of(scenarios, 5)
        expected = groups.restore(plain(groups.group(x), groups.group(row), groups))
        found = filled_groups.restore(filled(*map(filled_groups.group, padded), filled_groups))
        torch.testing.assert_close(found[:8], expected)
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(filled.get_buffer(name), buffer)


def test_one_process_sums_nothing():
    x = torch.randn(3)
    assert sum_over_ranks(x) is x


def test_target_attention_is_the_papers_sum_over_behaviours():
    torch.manual_seed(0)
    unit = TargetAttention(3, (5,))
    vectors, target = torch.randn(2, 4, 3), torch.randn(2, 3)
    present = torch.tensor([[True, True, False, False], [False] * 4])
    vectors = vectors * present[:, :, None]
    out = unit(Behaviours(vectors, present, target), torch.arange(2))
    expected = torch.zeros(3)
    for v in vectors[0, :2]:
        asked = torch.cat([v, target[0], v - target[0], v * target[0]])
        expected += unit.last(torch.relu(unit.mlp.linears[0](asked))) * v
    torch.testing.assert_close(out[0], expected)
    assert out[1].tolist() == [0.0, 0.0, 0.0]


def test_scenario_experts_run_a_row_through_its_own_scenarios_experts():
    torch.manual_seed(0)
    experts = ScenarioExperts(3, 2, 4, (5, 6), dropout=0.0)
    for bias in experts.biases:
        torch.nn.init.normal_(bias)
    x, scenario = torch.randn(7, 4), torch.tensor([2, 0, 2, 2, 0, 0, 2])
    groups = ScenarioGroups.of(scenario, 3)
    hidden = groups.restore(experts(groups.group(x), torch.arange(7), groups))
    for row, s in enumerate(scenario.tolist()):
        for e in range(2):
            h = x[row]
            for weight, bias in zip(experts.weights, experts.biases, strict=True):
                h = torch.relu(h @ weight[s, e] + bias[s, e])
            torch.testing.assert_close(hidden[row, e], h)


def test_a_column_that_is_constant_within_a_scenario_says_as_little_in_evaluation_as_in_training():
    norm, groups = ScenarioNorm(2, 2), ScenarioGroups.of(torch.tensor([0, 0, 0, 1, 1, 1]), 2)
    row = torch.arange(6)
    for step in range(50):
        # As the embedding of a category that is the scenario: it moves with training, ahead of its running mean.
        drifting = torch.tensor([0.1, -0.3]).repeat_interleave(3) + 0.0371 * step
        x = torch.stack([drifting, torch.randn(6)], dim=1)
        trained = norm(x, row, groups)
    assert trained[:, 0].tolist() == [0.0] * 6
    assert norm.eval()(x, row, groups)[:, 0].tolist() == [0.0] * 6
    assert norm(x, row, groups)[:, 1].abs().min() > 0


def test_a_shared_weight_multiplies_every_scenarios_own():
    torch.manual_seed(0)
    scenario = torch.tensor([2, 0, 2, 2, 0, 0, 2, 11])
    groups = ScenarioGroups.of(scenario, 12)  # more than one slab of scenarios, most of them absent
    leaves = [torch.randn(*shape, dtype=torch.float64) for shape in ((8, 4), (12, 4, 3), (12, 3), (4, 3))]
    x, weight, bias, shared = (leaf.requires_grad_() for leaf in leaves)
    out = grouped_linear(x, weight, bias, groups, shared)
    plain = grouped_linear(x, weight * shared, bias, groups)
    expected = torch.stack([x[i] @ (weight * shared)[s] + bias[s] for i, s in enumerate(groups.scenario.tolist())])
    seed = torch.randn_like(out)
    for other in (plain, expected):
        torch.testing.assert_close(out, other)
        of_out = torch.autograd.grad(out, leaves, seed, retain_graph=True)
        for gradient, wanted in zip(of_out, torch.autograd.grad(other, leaves, seed), strict=True):
            torch.testing.assert_close(gradient, wanted)
    assert not torch.autograd.grad(out, weight, seed)[0][3:11].any()
