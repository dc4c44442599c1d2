"""Shared bottom: one network under a tower per scenario.

Caruana, 1997, "Multitask learning", with scenarios for tasks:

    logits = tower_s(MLP(x))                 x [B, D] joined groups, s the row's scenario, logits [B, T]

Deviations:
- Tasks are scenarios, and a row is computed by its own scenario's tower alone.
- With T labels a tower ends in T outputs: the labels of a scenario share its hidden layers.
- The towers' biases start at 0.
"""

from typing import Literal, final

from torch import Tensor

from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Rate, Widths
from msr_dist.models.layers import MLP, ScenarioGroups, ScenarioTower
from msr_dist.schema import FeatureSchema


class Config(BackboneConfig):
    """Settings of the shared bottom."""

    kind: Literal["shared_bottom"] = "shared_bottom"
    widths: Widths = (128, 64)
    """Units of each layer of the bottom."""
    tower_widths: Widths = (32,)
    """Units of each hidden layer of a tower."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training, in the bottom and in the towers."""

    def build(self, schema: FeatureSchema) -> "SharedBottom":
        """The network for this schema."""
        return SharedBottom(self, schema)


@final
class SharedBottom(Backbone):
    """A shared MLP and one tower per scenario."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        self.scenarios = len(schema.scenarios)
        self.bottom = MLP(schema.input_width, config.widths, config.dropout)
        self.tower = ScenarioTower(
            self.scenarios, self.bottom.out_width, config.tower_widths, len(schema.labels), config.dropout
        )

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        groups = ScenarioGroups.of(inputs.scenario, self.scenarios)
        row = groups.group(inputs.row)
        hidden = self.bottom(groups.group(inputs.joined()), row)
        return groups.restore(self.tower(hidden, row, groups))
