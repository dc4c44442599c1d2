"""MMoE: multi-gate mixture of experts.

Ma et al., 2018, "Modeling task relationships in multi-task learning with multi-gate mixture-of-experts":

    h_k     = expert_k(x)                                       x [B, D] joined groups, h [B, E, W]
    g_st    = softmax(x G_st + c_st)                            [B, E]
    logit_t = tower_st(sum_k g_stk h_k)                         s the row's scenario, t a label; logits [B, T]

Deviations:
- A task is a pair of scenario and label: it has its own gate and its own tower. The experts are shared by all.
- A row is computed by its own scenario's gates and towers alone.
- With `per_scenario` off, a task is a label, as in the paper: there is one gate and one tower of each label, and the
  scenario is a feature, x = [joined groups ; p_s].
- The gates have a bias; it starts at 0, as do those of experts and towers.
"""

from typing import Literal, Self, final

import torch
from pydantic import model_validator
from torch import Tensor, nn

from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Rate, Width, Widths
from msr_dist.models.layers import Experts, ScenarioGroups, ScenarioLinear, ScenarioTower, mixture, side_by_side
from msr_dist.schema import FeatureSchema


class Config(BackboneConfig):
    """Settings of MMoE."""

    kind: Literal["mmoe"] = "mmoe"
    experts: Width = 4
    """Number of experts, shared by all scenarios and labels."""
    widths: Widths = (128, 64)
    """Units of each layer of an expert."""
    tower_widths: Widths = (32,)
    """Units of each hidden layer of a tower."""
    per_scenario: bool = True
    """Every scenario has gates and towers of its own. Off: all share them, and the scenario is a feature, for scenarios
    that are alike or have few rows."""
    scenario_width: Width = 16
    """Length of the scenario's embedding, where it is a feature."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training, in experts and towers."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.per_scenario and self.scenario_width != type(self).model_fields["scenario_width"].default:
            raise ValueError("scenario_width: the scenario is a feature with per_scenario=false alone; leave it out")
        return self

    def build(self, schema: FeatureSchema) -> "Mmoe":
        """The network for this schema."""
        return Mmoe(self, schema)


@final
class Mmoe(Backbone):
    """Shared experts, mixed and judged by a gate and a tower per scenario and label."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        apart, width = config.per_scenario, schema.input_width + (0 if config.per_scenario else config.scenario_width)
        self.scenario = None if apart else nn.Embedding(len(schema.scenarios), config.scenario_width)
        self.groups = len(schema.scenarios) if apart else 1
        self.experts = Experts(config.experts, width, config.widths, config.dropout)
        self.gates = nn.ModuleList(ScenarioLinear(self.groups, width, config.experts) for _ in schema.labels)
        self.towers = nn.ModuleList(
            ScenarioTower(self.groups, self.experts.out_width, config.tower_widths, 1, config.dropout)
            for _ in schema.labels
        )

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        x, scenario = inputs.joined(), inputs.scenario
        if self.scenario is None:
            groups = ScenarioGroups.of(scenario, self.groups)
        else:
            x = torch.cat([x, self.scenario(scenario)], dim=1)
            groups = ScenarioGroups.whole(len(x), x.device)
        row, x = groups.group(inputs.row), groups.group(x)
        hidden = self.experts(x, row)
        logits = [
            tower(mixture(scores, hidden), row, groups)
            for scores, tower in zip(side_by_side(self.gates, x, groups), self.towers, strict=True)
        ]
        return groups.restore(torch.cat(logits, dim=1))
