"""APG: layers whose weights are generated through a small core.

Yan et al., 2022, "APG: adaptive parameter generation network for click-through rate prediction":

    W_s  = V K_s U                            rows times W; U and V are shared, only the core K_s [r, r] is generated
    V    = V_n V_p,  U = U_p U_m              over-parameterisation: [n, p] [p, r] and [r, p] [p, m], with p > r
    K_s  = K_0 + sum_j c_sj G_j               c_s the condition: the scenario's embedding
    h    = relu(((h V) K_s) U + b)            per hidden layer, from h = x; the products in this order
    logits = Linear(h)                        [B, T]

Shapes: x `[B, D]` joined groups; c_s `[C]`; G `[C, r, r]`.

Cores are generated once per scenario and step, `[S, r, r]`. With feature groups named in `condition` (the paper's mixed
condition) there is one per row instead, `[B, r, r]`, from `[c_s ; groups]`. The factors of U and V are multiplied once
per step, so that p costs nothing per row.

The paper leaves open, and this does:
- Start: K_0 the identity, so that every scenario starts near the shared V U; the factors are drawn normal, so that each
  keeps its input's variance; G uniform within 1 / sqrt(C r).
- The generator is linear; it also makes a bias in the core's space, from 0: without it the scenario could turn what a
  row holds, but add nothing to it.

Deviations:
- The last layer is plain: it has fewer outputs than the core has units.
- Dropout, off by default.
- The algebra is checked against summaries and public code, not against the paper's print.
"""

from itertools import pairwise
from typing import Literal, final

import torch
from torch import Tensor, nn

from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Rate, Width, Widths
from msr_dist.models.layers import Dropout, ScenarioGroups, grouped_linear
from msr_dist.schema import FeatureSchema


class Config(BackboneConfig):
    """Settings of APG."""

    kind: Literal["apg"] = "apg"
    widths: Widths = (128, 64)
    """Units of each hidden layer."""
    rank: Width = 16
    """Units of the core, r."""
    factor_width: Width = 64
    """Units between the factors of the shared matrices, p."""
    scenario_width: Width = 16
    """Length of the scenario's embedding."""
    condition: tuple[str, ...] = ()
    """Feature groups that generate the cores beside the scenario; with any, each row has a core of its own."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training."""

    def build(self, schema: FeatureSchema) -> "Apg":
        """The network for this schema."""
        unknown = [group for group in self.condition if group not in schema.group_widths()]
        if unknown:
            known = ", ".join(schema.group_widths())
            raise ValueError(f"model.condition: there is no feature group {unknown[0]!r}, only {known}")
        return Apg(self, schema)


class ApgLinear(nn.Module):
    """A linear layer through a core that its condition generates."""

    def __init__(self, config: Config, condition_width: int, in_width: int, out_width: int) -> None:
        super().__init__()
        rank, between = config.rank, config.factor_width
        bound = (condition_width * rank) ** -0.5
        self.enter = nn.ParameterList([_factor(in_width, between), _factor(between, rank)])
        self.leave = nn.ParameterList([_factor(rank, between), _factor(between, out_width)])
        self.core = nn.Parameter(torch.eye(rank))
        self.core_basis = nn.Parameter(torch.empty(condition_width, rank, rank).uniform_(-bound, bound))
        self.core_bias_basis = nn.Parameter(torch.zeros(condition_width, rank))
        self.bias = nn.Parameter(torch.zeros(out_width))

    def forward(self, x: Tensor, condition: Tensor, groups: ScenarioGroups | None) -> Tensor:
        """`[B, in]` -> `[B, out]`; `condition` is `[S, C]` with `groups`, and `[B, C]`, of the rows, without."""
        core = self.core + torch.tensordot(condition, self.core_basis, dims=1)
        core_bias = condition @ self.core_bias_basis
        low = x @ (self.enter[0] @ self.enter[1])
        if groups is None:
            low = torch.baddbmm(core_bias[:, None], low[:, None], core).squeeze(1)
        else:
            low = grouped_linear(low, core, core_bias, groups)
        return torch.addmm(self.bias, low, self.leave[0] @ self.leave[1])


def _factor(in_width: int, out_width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(in_width, out_width) * in_width**-0.5)


@final
class Apg(Backbone):
    """A network whose hidden layers have a generated core each."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        self.scenarios, self.condition = len(schema.scenarios), config.condition
        group_widths = schema.group_widths()
        condition_width = config.scenario_width + sum(group_widths[group] for group in config.condition)
        self.scenario = nn.Embedding(self.scenarios, config.scenario_width)
        self.hidden = nn.ModuleList(
            ApgLinear(config, condition_width, i, o) for i, o in pairwise([sum(group_widths.values()), *config.widths])
        )
        self.dropouts = nn.ModuleList(Dropout(config.dropout) for _ in config.widths)
        self.last = nn.Linear(config.widths[-1], len(schema.labels))

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        groups = ScenarioGroups.of(inputs.scenario, self.scenarios)
        row, hidden = groups.group(inputs.row), groups.group(inputs.joined())
        condition = self.scenario.weight
        if self.condition:
            own = [groups.group(inputs.groups[group]) for group in self.condition]
            condition = torch.cat([groups.spread(condition), *own], dim=1)
        for linear, dropout in zip(self.hidden, self.dropouts, strict=True):
            product = linear(hidden, condition, None if self.condition else groups)
            hidden = dropout(torch.relu(product), row)
        return groups.restore(self.last(hidden))
