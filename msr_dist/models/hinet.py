"""HiNet: what scenarios share, own and can tell each other; then what tasks share and own.

Zhou et al., 2023, "HiNet: novel multi-scenario & multi-task learning with hierarchical information extraction".
Scenario extraction layer; Q a sub-expert (an MLP), SEI the sub-experts' integration:

    SEI(x)  = sum_k softmax(x U + u)_k Q_k(x)                            [B, W]
    G       = SEI_shared(x),  S_s = SEI_s(x)                             s the row's scenario
    A_s     = sum_(j != s) a_sj S_j(x),  a_s = softmax(p_s V)            SAN, the scenario-aware attentive network
    C       = [G ; S_s ; A_s]                                            [B, 3W]

Task extraction layer, customised gate control (CGC) as in PLE; t a label:

    F_st    = sum_k softmax(C M_st + m_st)_k [E_st ; E_shared]_k(C)      over own and shared experts
    logit_t = tower_st(F_st)                                             [B, T]

Shapes: x `[B, D]` joined groups; p_s `[P]` embedding of the scenario; V `[P, S]`, one column per scenario that may be
attended to: it is shared, since every scenario's rows train all of it.

Where descriptions of the paper leave room, this follows the code that its authors published:
- The softmax of a_s runs over all scenarios and its own share is dropped: a scenario may attend to hardly any other.
- A task is a pair of scenario and label: it has experts, a gate and a tower of its own. E_shared serves all pairs.

Deviations:
- SAN reads the other scenarios' networks as constants: neither they nor x get a gradient by A, only p and V do. So a
  scenario's network learns from its own rows alone, and the cost below is that of a forward pass.
- SAN reads them without dropout, and reads none that the schema says to have no training rows: nothing taught it.
- SAN's attention is one linear layer without bias; the authors' code has hidden layers. All gates are linear, where
  that code puts a ReLU before the softmax.
- No batch normalisation of x, which would make rows depend on each other.
- Biases start at 0.

Cost: a row passes the scenario-specific networks of *all* scenarios once forward, as SAN demands: time and, for
`[B, S, W]`, memory in proportion to S. All else, and all backward passes, are once per row.
"""

from typing import Literal, final

import torch
from torch import Tensor, nn

from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Rate, Width, Widths
from msr_dist.models.layers import (
    Experts,
    ScenarioExperts,
    ScenarioGroups,
    ScenarioLinear,
    ScenarioTower,
    mixture,
    stacked_weight,
)
from msr_dist.schema import FeatureSchema


class Config(BackboneConfig):
    """Settings of HiNet."""

    kind: Literal["hinet"] = "hinet"
    sub_experts: Width = 4
    """Sub-experts of the shared network, and of each scenario's."""
    widths: Widths = (128, 64)
    """Units of each layer of a sub-expert."""
    scenario_width: Width = 16
    """Length of the scenario's embedding, which the attention reads."""
    task_experts: Width = 2
    """Experts that all tasks share, and as many of each task's own."""
    task_widths: Widths = (64,)
    """Units of each layer of a task's expert."""
    tower_widths: Widths = (32,)
    """Units of each hidden layer of a tower."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training, in experts and towers."""

    def build(self, schema: FeatureSchema) -> "Hinet":
        """The network for this schema."""
        return Hinet(self, schema)


@final
class ScenarioNetworks(nn.Module):
    """One network of sub-experts and gate per scenario, and the attention on those of other scenarios."""

    readable: Tensor

    def __init__(self, schema: FeatureSchema, in_width: int, config: Config) -> None:
        super().__init__()
        scenarios = len(schema.scenarios)
        self.experts = ScenarioExperts(scenarios, config.sub_experts, in_width, config.widths, config.dropout)
        self.gate = ScenarioLinear(scenarios, in_width, config.sub_experts)
        self.scenario = nn.Parameter(torch.randn(scenarios, config.scenario_width))
        self.attention = stacked_weight(1, config.scenario_width, scenarios)
        taught = torch.tensor([float(scenario.taught) for scenario in schema.scenarios])
        self.register_buffer("readable", taught * (1.0 - torch.eye(scenarios)), persistent=False)

    def forward(self, x: Tensor, row: Tensor, groups: ScenarioGroups) -> tuple[Tensor, Tensor]:
        """Grouped `[B, in]` -> S_s and A_s, `[B, W]` each, grouped."""
        own = mixture(self.gate(x, groups), self.experts(x, row, groups))
        shares = torch.softmax(self.scenario @ self.attention[0], dim=1)
        return own, torch.bmm(groups.spread(shares * self.readable)[:, None, :], self._read(x))[:, 0]

    @torch.no_grad()
    def _read(self, x: Tensor) -> Tensor:
        """`[B, S, W]`: each row as every scenario's network sees it, without a gradient."""
        seen = []
        # One scenario at a time, so that no hidden layer is held for all of them at once.
        for s, (weight, bias) in enumerate(zip(self.gate.weight, self.gate.bias, strict=True)):
            hidden = x.expand(len(bias), -1, -1)
            for w, b in zip(self.experts.weights, self.experts.biases, strict=True):
                hidden = torch.relu_(torch.baddbmm(b[s][:, None, :], hidden, w[s]))
            seen.append(mixture(torch.addmm(bias, x, weight), hidden.transpose(0, 1)))
        return torch.stack(seen, dim=1)


@final
class Hinet(Backbone):
    """The scenario extraction layer and a customised gate control per scenario and label."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        self.scenarios = scenarios = len(schema.scenarios)
        width, dropout = schema.input_width, config.dropout
        self.shared = Experts(config.sub_experts, width, config.widths, dropout)
        self.shared_gate = nn.Linear(width, config.sub_experts)
        nn.init.zeros_(self.shared_gate.bias)
        self.networks = ScenarioNetworks(schema, width, config)
        extracted, experts, task_widths = 3 * config.widths[-1], config.task_experts, config.task_widths
        self.task_shared = Experts(experts, extracted, task_widths, dropout)
        self.task_experts = nn.ModuleList(
            ScenarioExperts(scenarios, experts, extracted, task_widths, dropout) for _ in schema.labels
        )
        self.task_gates = nn.ModuleList(ScenarioLinear(scenarios, extracted, 2 * experts) for _ in schema.labels)
        self.towers = nn.ModuleList(
            ScenarioTower(scenarios, task_widths[-1], config.tower_widths, 1, dropout) for _ in schema.labels
        )

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        groups = ScenarioGroups.of(inputs.scenario, self.scenarios)
        row, x = groups.group(inputs.row), groups.group(inputs.joined())
        shared = mixture(self.shared_gate(x), self.shared(x, row))
        extracted = torch.cat([shared, *self.networks(x, row, groups)], dim=1)
        task_shared = self.task_shared(extracted, row)
        logits = []
        for experts, gate, tower in zip(self.task_experts, self.task_gates, self.towers, strict=True):
            opinions = torch.cat([experts(extracted, row, groups), task_shared], dim=1)
            logits.append(tower(mixture(gate(extracted, groups), opinions), row, groups))
        return groups.restore(torch.cat(logits, dim=1))
