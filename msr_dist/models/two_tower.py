"""Two towers: the plain retrieval model, with the scenario as a feature of both sides, or a pair of towers for each.

Covington, Adams and Sargin, 2016, "Deep neural networks for YouTube recommendations", section 3; both sides as towers
as in Yi et al., 2019, "Sampling-bias-corrected neural modeling for large corpus item recommendations":

    r = normalise(W MLP([x ; e_s]) + b)          x [B, D] a side's features, s the row's scenario, r [B, d]

With `towers = "per_scenario"` nothing is shared, neither networks nor embeddings: what a scenario would have alone.

Deviations: the scenario is an input of both sides, since items are ranked within a scenario; vectors have length 1.
"""

from typing import Literal, final

import torch
from torch import Tensor, nn

from msr_dist.models.base import Inputs, Rate, Width, Widths
from msr_dist.models.layers import MLP, ScenarioGroups, ScenarioTower
from msr_dist.models.towers import TowersConfig, TwoTower, side, unit
from msr_dist.schema import FeatureSchema


class Config(TowersConfig):
    """Settings of the plain towers."""

    kind: Literal["two_tower"] = "two_tower"
    widths: Widths = (128, 64)
    """Units of each hidden layer of a tower."""
    out_width: Width = 64
    """Length of a vector."""
    towers: Literal["shared", "per_scenario"] = "shared"
    """One pair for all scenarios, or one pair and tables of its own for each."""
    scenario_width: Width = 16
    """Width of the scenario's embedding in shared towers."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training."""

    def adapt(self, schema: FeatureSchema) -> FeatureSchema:
        """The schema with what the towers read, and vectors for every scenario where nothing is shared."""
        schema = super().adapt(schema)
        if self.towers == "shared":
            return schema
        return schema.with_tables(
            {table.name: table.model_copy(update={"per_scenario": True}) for table in schema.tables}
        )

    def build(self, schema: FeatureSchema) -> "PlainTowers":
        """The networks for this schema."""
        return PlainTowers(self, schema)


@final
class PlainTowers(TwoTower):
    """A user's and an item's tower of one form."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        self._groups = config.user_groups, config.item_groups
        user_width, item_width = config.widths_of(schema)
        tower = _Shared if config.towers == "shared" else _PerScenario
        self.user_tower = tower(config, len(schema.scenarios), user_width)
        self.item_tower = tower(config, len(schema.scenarios), item_width)

    def user(self, inputs: Inputs) -> Tensor:
        """`[B, d]`."""
        return unit(self.user_tower(side(inputs, self._groups[0]), inputs))

    def item(self, inputs: Inputs) -> Tensor:
        """`[B, d]`."""
        return unit(self.item_tower(side(inputs, self._groups[1]), inputs))


@final
class _Shared(nn.Module):
    def __init__(self, config: Config, scenarios: int, in_width: int) -> None:
        super().__init__()
        self.scenario = nn.Embedding(scenarios, config.scenario_width)
        self.hidden = MLP(in_width + config.scenario_width, config.widths, config.dropout)
        self.last = nn.Linear(self.hidden.out_width, config.out_width)

    def forward(self, x: Tensor, inputs: Inputs) -> Tensor:
        together = torch.cat([x, self.scenario(inputs.scenario)], dim=1)
        vector: Tensor = self.last(self.hidden(together, inputs.row))
        return vector


@final
class _PerScenario(nn.Module):
    def __init__(self, config: Config, scenarios: int, in_width: int) -> None:
        super().__init__()
        self.scenarios = scenarios
        self.tower = ScenarioTower(scenarios, in_width, config.widths, config.out_width, config.dropout)

    def forward(self, x: Tensor, inputs: Inputs) -> Tensor:
        groups = ScenarioGroups.of(inputs.scenario, self.scenarios)
        return groups.restore(self.tower(groups.group(x), groups.group(inputs.row), groups))
