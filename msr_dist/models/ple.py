"""PLE: progressive layered extraction; with one level, CGC: customised gate control.

Tang et al., 2020, "Progressive layered extraction (PLE): a novel multi-task learning (MTL) model for personalized
recommendations", with scenarios for tasks:

    e^l     = [own experts_s^l(u^l) ; shared experts^l(v^l)]          [B, E + F, W]: E own, F shared; u^1 = v^1 = x
    u^l+1   = sum_k softmax(u^l G_s^l + c_s^l)_k e_k^l                [B, W]: the scenario's gate
    v^l+1   = sum_k softmax(v^l H^l + d^l)_k e_k^l                    [B, W]: the shared gate, not at the last level L
    logit_t = tower_st(sum_k softmax(u^L G_st + c_st)_k e_k^L)        s the row's scenario, t a label; logits [B, T]

Shapes: x `[B, D]` joined groups; u, v of level l `[B, W]` of the level below.

The paper leaves open, and this does: an expert is one layer per level by default, so that two levels are as deep as the
experts of `mmoe`.

Deviations:
- The shared gate mixes the shared experts and those of the *row's own* scenario, where the paper mixes all tasks'. A
  row has all tasks, but one scenario: to ask the others' experts would cost S times as much per row, and would train a
  scenario's parameters by rows of others.
- The labels of a scenario share its experts and its gates below the last level; gates of the last level and towers are
  theirs alone.
- The gates have a bias; it starts at 0, as do those of experts and towers.
- Dropout, off by default.
"""

from typing import Annotated, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Rate, Width, Widths
from msr_dist.models.layers import (
    Experts,
    ScenarioExperts,
    ScenarioGroups,
    ScenarioLinear,
    ScenarioTower,
    mixture,
    side_by_side,
)
from msr_dist.schema import FeatureSchema


class Config(BackboneConfig):
    """Settings of PLE."""

    kind: Literal["ple"] = "ple"
    experts: Width = 2
    """Number of experts of each scenario, at each level."""
    shared_experts: Width = 2
    """Number of experts shared by all scenarios, at each level."""
    levels: Annotated[tuple[Widths, ...], Field(min_length=1)] = ((128,), (64,))
    """Units of each layer of an expert, level by level: `((128, 64),)` is CGC with two layers per expert."""
    tower_widths: Widths = (32,)
    """Units of each hidden layer of a tower."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training, in experts and towers."""

    def build(self, schema: FeatureSchema) -> "Ple":
        """The network for this schema."""
        return Ple(self, schema)


@final
class Level(nn.Module):
    """The experts of one level."""

    def __init__(self, scenarios: int, config: Config, in_width: int, widths: Widths) -> None:
        super().__init__()
        self.own = ScenarioExperts(scenarios, config.experts, in_width, widths, config.dropout)
        self.shared = Experts(config.shared_experts, in_width, widths, config.dropout)

    def forward(self, own: Tensor, shared: Tensor, row: Tensor, groups: ScenarioGroups) -> Tensor:
        """Twice `[B, in_width]` -> `[B, E + F, W]`, all grouped."""
        return torch.cat([self.own(own, row, groups), self.shared(shared, row)], dim=1)


@final
class Ple(Backbone):
    """Levels of shared and own experts under a gate of each kind, judged by a tower per scenario and label."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        self.scenarios, experts = len(schema.scenarios), config.experts + config.shared_experts
        in_widths = [schema.input_width, *(widths[-1] for widths in config.levels)]
        self.levels = nn.ModuleList(
            Level(self.scenarios, config, i, widths) for i, widths in zip(in_widths, config.levels, strict=False)
        )
        *lower, last, out = in_widths
        self.own_gates = nn.ModuleList(ScenarioLinear(self.scenarios, i, experts) for i in lower)
        shared_gates = [nn.Linear(i, experts) for i in lower]
        for gate in shared_gates:
            nn.init.zeros_(gate.bias)
        self.shared_gates = nn.ModuleList(shared_gates)
        self.gates = nn.ModuleList(ScenarioLinear(self.scenarios, last, experts) for _ in schema.labels)
        self.towers = nn.ModuleList(
            ScenarioTower(self.scenarios, out, config.tower_widths, 1, config.dropout) for _ in schema.labels
        )

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        groups = ScenarioGroups.of(inputs.scenario, self.scenarios)
        row, own = groups.group(inputs.row), groups.group(inputs.joined())
        shared = own
        *lower, last = self.levels
        for level, own_gate, shared_gate in zip(lower, self.own_gates, self.shared_gates, strict=True):
            hidden = level(own, shared, row, groups)
            own, shared = mixture(own_gate(own, groups), hidden), mixture(shared_gate(shared), hidden)
        hidden = last(own, shared, row, groups)
        logits = [
            tower(mixture(scores, hidden), row, groups)
            for scores, tower in zip(side_by_side(self.gates, own, groups), self.towers, strict=True)
        ]
        return groups.restore(torch.cat(logits, dim=1))
