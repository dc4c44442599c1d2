"""One network for all scenarios: the scenario is a feature like any other.

The baseline that every multi-scenario model has to beat.

    logits = Linear(MLP([x ; p_s]))          x [B, D] joined groups, p_s [B, P] embedding of the scenario, logits [B, T]

With T labels the last layer has T outputs; all below is shared.
"""

from typing import Literal, final

import torch
from torch import Tensor, nn

from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Rate, Width, Widths
from msr_dist.models.layers import MLP
from msr_dist.schema import FeatureSchema


class Config(BackboneConfig):
    """Settings of the plain network."""

    kind: Literal["mlp"] = "mlp"
    widths: Widths = (128, 64)
    """Units of each hidden layer."""
    scenario_width: Width = 16
    """Length of the scenario's embedding."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training."""

    def build(self, schema: FeatureSchema) -> "Mlp":
        """The network for this schema."""
        return Mlp(self, schema)


@final
class Mlp(Backbone):
    """An MLP over the joined groups and an embedding of the scenario."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        self.scenario = nn.Embedding(len(schema.scenarios), config.scenario_width)
        self.mlp = MLP(schema.input_width + config.scenario_width, config.widths, config.dropout)
        self.last = nn.Linear(self.mlp.out_width, len(schema.labels))

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        x = torch.cat([inputs.joined(), self.scenario(inputs.scenario)], dim=1)
        logits: Tensor = self.last(self.mlp(x, inputs.row))
        return logits
