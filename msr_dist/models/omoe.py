"""OMoE: mixture of experts with one gate.

The single-gate baseline of Ma et al., 2018, "Modeling task relationships in multi-task learning with multi-gate
mixture-of-experts":

    h_k     = expert_k(x)                                       x [B, D] joined groups, h [B, E, W]
    g       = softmax(x G + c)                                  [B, E]
    logit_t = tower_st(sum_k g_k h_k)                           s the row's scenario, t a label; logits [B, T]

It differs from `mmoe` in its gate alone: all scenarios and labels judge the same mixture.

Deviations:
- A task is a pair of scenario and label: it has its own tower. Experts and gate are shared by all.
- A row is computed by its own scenario's towers alone.
- The gate has a bias; it starts at 0, as do those of experts and towers.
"""

from typing import Literal, final

import torch
from torch import Tensor, nn

from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Rate, Width, Widths
from msr_dist.models.layers import Experts, ScenarioGroups, ScenarioTower, mixture
from msr_dist.schema import FeatureSchema


class Config(BackboneConfig):
    """Settings of OMoE."""

    kind: Literal["omoe"] = "omoe"
    experts: Width = 4
    """Number of experts, shared by all scenarios and labels."""
    widths: Widths = (128, 64)
    """Units of each layer of an expert."""
    tower_widths: Widths = (32,)
    """Units of each hidden layer of a tower."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training, in experts and towers."""

    def build(self, schema: FeatureSchema) -> "Omoe":
        """The network for this schema."""
        return Omoe(self, schema)


@final
class Omoe(Backbone):
    """Shared experts under one gate, judged by a tower per scenario and label."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        self.scenarios = len(schema.scenarios)
        width = schema.input_width
        self.experts = Experts(config.experts, width, config.widths, config.dropout)
        self.gate = nn.Linear(width, config.experts)
        nn.init.zeros_(self.gate.bias)
        self.towers = nn.ModuleList(
            ScenarioTower(self.scenarios, self.experts.out_width, config.tower_widths, 1, config.dropout)
            for _ in schema.labels
        )

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        groups = ScenarioGroups.of(inputs.scenario, self.scenarios)
        row, x = groups.group(inputs.row), groups.group(inputs.joined())
        hidden = mixture(self.gate(x), self.experts(x, row))
        return groups.restore(torch.cat([tower(hidden, row, groups) for tower in self.towers], dim=1))
