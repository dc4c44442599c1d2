"""STAR: star topology adaptive recommender.

Sheng et al., 2021, "One model to serve all: star topology adaptive recommender for multi-domain CTR prediction":

    z   = PN_s(x)                                        partitioned normalisation: `layers.ScenarioNorm`
    h   = relu(h (W * W_s) + b + b_s)                    per hidden layer, from h = z; * is elementwise
    main = h (W * W_s) + b + b_s                         the last layer: neither ReLU nor normalisation
    logits = main + auxiliary([x ; p_s])                 p_s embedding of the scenario

Shapes: x, z `[B, D]`; main, logits `[B, T]`; W `[1, in, out]` and b `[out]` are shared; W_s `[S, in, out]` and
b_s `[S, out]` are stacked.

The paper leaves open, and this does:
- Start: W as `nn.Linear` draws it, W_s all 1, b and b_s all 0. So every scenario starts from the shared network.
- The auxiliary network reads x before its normalisation; it is an MLP with one hidden layer by default.
- With T labels both last layers have T outputs.

Deviations:
- Batches mix scenarios, where the paper takes each batch from one; see `ScenarioNorm` for what follows.
- Dropout, off by default.
"""

from itertools import pairwise
from typing import Literal, final

import torch
from torch import Tensor, nn

from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Rate, Width, Widths
from msr_dist.models.layers import MLP, Dropout, ScenarioGroups, ScenarioNorm, StarLinear
from msr_dist.schema import FeatureSchema


class Config(BackboneConfig):
    """Settings of STAR."""

    kind: Literal["star"] = "star"
    widths: Widths = (128, 64)
    """Units of each hidden layer of the star-shaped network."""
    auxiliary_widths: Widths = (64,)
    """Units of each hidden layer of the auxiliary network."""
    scenario_width: Width = 16
    """Length of the scenario's embedding, which the auxiliary network reads."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training, in both networks."""

    def build(self, schema: FeatureSchema) -> "Star":
        """The network for this schema."""
        return Star(self, schema)


@final
class Star(Backbone):
    """Partitioned normalisation, a star-shaped network, and an auxiliary network beside it."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        self.scenarios, labels = len(schema.scenarios), len(schema.labels)
        width = schema.input_width
        shapes = pairwise([width, *config.widths])
        self.norm = ScenarioNorm(self.scenarios, width)
        self.hidden = nn.ModuleList(StarLinear(self.scenarios, i, o) for i, o in shapes)
        self.dropouts = nn.ModuleList(Dropout(config.dropout) for _ in config.widths)
        self.last = StarLinear(self.scenarios, config.widths[-1], labels)
        self.scenario = nn.Embedding(self.scenarios, config.scenario_width)
        self.auxiliary = MLP(width + config.scenario_width, config.auxiliary_widths, config.dropout)
        self.auxiliary_last = nn.Linear(self.auxiliary.out_width, labels)

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        groups = ScenarioGroups.of(inputs.scenario, self.scenarios)
        row, x = groups.group(inputs.row), groups.group(inputs.joined())
        hidden = self.norm(x, row, groups)
        for linear, dropout in zip(self.hidden, self.dropouts, strict=True):
            hidden = dropout(torch.relu(linear(hidden, groups)), row)
        beside = self.auxiliary(torch.cat([x, self.scenario(groups.scenario)], dim=1), row)
        return groups.restore(self.last(hidden, groups) + self.auxiliary_last(beside))
