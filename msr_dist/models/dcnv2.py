"""DCN-v2: explicit crosses of bounded degree; the scenario is a feature like any other.

Wang et al., 2021, "DCN V2: improved deep & cross network and practical lessons for web-scale learning to rank systems":

    x_0     = [x ; p_s]                            x joined groups, p_s embedding of the scenario; x_0 [B, D]
    x_{l+1} = x_0 * (W_l x_l + b_l) + x_l          * is elementwise; W_l [D, D], or U_l V_l^T with U_l and V_l [D, R]
    logits  = Linear(MLP(x_L))                     structure "stacked": the deep network reads the crosses
    logits  = Linear([x_L ; MLP(x_0)])             structure "parallel": the deep network stands beside them

L cross layers hold all products of up to L + 1 of the inputs; logits [B, T].

A reference without any part of its own per scenario: what feature crosses alone achieve.

The paper leaves open, and this does: W_l, or U_l and V_l, start as `nn.Linear` draws them, b_l at 0. With T labels the
last layer has T outputs.

Deviations:
- The mixture of low-rank experts, with its gates and its non-linear maps between V and U, is left out.
- Dropout in the deep network, off by default.
"""

from typing import Literal, final

import torch
from torch import Tensor, nn

from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Rate, Width, Widths
from msr_dist.models.layers import MLP
from msr_dist.schema import FeatureSchema


class Config(BackboneConfig):
    """Settings of DCN-v2."""

    kind: Literal["dcnv2"] = "dcnv2"
    cross_layers: Width = 3
    """Number of cross layers."""
    rank: Width | None = None
    """Rank of the cross layers' matrices; without one they are full."""
    structure: Literal["stacked", "parallel"] = "stacked"
    """Where the deep network stands: on top of the cross layers, or beside them."""
    widths: Widths = (128, 64)
    """Units of each hidden layer of the deep network."""
    scenario_width: Width = 16
    """Length of the scenario's embedding."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training, in the deep network."""

    def build(self, schema: FeatureSchema) -> "DcnV2":
        """The network for this schema."""
        return DcnV2(self, schema)


class CrossLayer(nn.Module):
    """`x_0 * (W x + b) + x`, of full or of low rank."""

    def __init__(self, width: int, rank: int | None) -> None:
        super().__init__()
        self.down = None if rank is None else nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank or width, width)
        nn.init.zeros_(self.up.bias)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        """`[B, D]` and `[B, D]` -> `[B, D]`."""
        product: Tensor = self.up(x if self.down is None else self.down(x))
        return x0 * product + x


@final
class DcnV2(Backbone):
    """Cross layers and a deep network over the joined groups and an embedding of the scenario."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        width = schema.input_width + config.scenario_width
        self.stacked = config.structure == "stacked"
        self.scenario = nn.Embedding(len(schema.scenarios), config.scenario_width)
        self.crosses = nn.ModuleList(CrossLayer(width, config.rank) for _ in range(config.cross_layers))
        self.mlp = MLP(width, config.widths, config.dropout)
        self.last = nn.Linear(self.mlp.out_width + (0 if self.stacked else width), len(schema.labels))

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        x0 = torch.cat([inputs.joined(), self.scenario(inputs.scenario)], dim=1)
        x = x0
        for cross in self.crosses:
            x = cross(x0, x)
        deep = self.mlp(x if self.stacked else x0, inputs.row)
        logits: Tensor = self.last(deep if self.stacked else torch.cat([x, deep], dim=1))
        return logits
