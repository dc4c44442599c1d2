"""DeepFM: a factorisation machine beside a deep network, over the same vectors; the scenario is a field like any other.

Guo et al., 2017, "DeepFM: a factorization-machine based neural network for CTR prediction":

    first  = a + sum_f w_f . v_f                                             v_f [B, W], one vector per field
    second = sum_{f < g} v_f . v_g = 1/2 sum_d ((sum_f v_fd)^2 - sum_f v_fd^2)
    deep   = Linear(MLP([v_1 ; ... ; v_F]))
    logits = first + second + deep                                           [B, T]

Fields: one per feature (a list counts as pooled), one per numeric, and the scenario. W is the widest feature's width.

A reference without any part of its own per scenario: what feature crosses alone achieve.

Deviations:
- The first order is a linear function of a field's vector, where the paper has a number per value: tables are shared
  by features and sharded over ranks, and backbones see vectors alone. So values with similar vectors have similar
  first orders.
- Narrower features are mapped to W by a linear layer without bias, as an inner product wants equal widths. A numeric is
  the same with width 1: a learned vector times the value.
- With T labels the second order would be one number for all of them: each label has a weight per dimension d, from 1,
  which is the paper's sum.
- Dropout, off by default.

Vectors of scenario and numerics start uniform within 1 / W, about as small as those of tables: a second order of many
large vectors would drown the rest.
"""

from typing import Literal, final

import torch
from torch import Tensor, nn

from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Rate, Widths
from msr_dist.models.layers import MLP
from msr_dist.schema import FeatureSchema


class Config(BackboneConfig):
    """Settings of DeepFM."""

    kind: Literal["deepfm"] = "deepfm"
    widths: Widths = (128, 64)
    """Units of each hidden layer of the deep network."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training, in the deep network."""

    def build(self, schema: FeatureSchema) -> "DeepFm":
        """The network for this schema."""
        return DeepFm(self, schema)


@final
class DeepFm(Backbone):
    """First order, second order and a deep network over one vector per field."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        self.field_widths = {
            group: [schema.table(feature.table).width for feature in schema.features if feature.group == group]
            + [1 for numeric in schema.numerics if numeric.group == group]
            for group in schema.group_widths()
        }
        widths = [width for of_group in self.field_widths.values() for width in of_group]
        width, labels = max(widths), len(schema.labels)
        self.lifts = nn.ModuleList(nn.Identity() if w == width else nn.Linear(w, width, bias=False) for w in widths)
        self.scenario = nn.Embedding(len(schema.scenarios), width)
        nn.init.uniform_(self.scenario.weight, -1 / width, 1 / width)
        for lift in self.lifts:
            if isinstance(lift, nn.Linear) and lift.in_features == 1:
                nn.init.uniform_(lift.weight, -1 / width, 1 / width)
        self.first = nn.Linear((len(widths) + 1) * width, labels)
        self.second = nn.Parameter(torch.ones(labels, width))
        self.mlp = MLP((len(widths) + 1) * width, config.widths, config.dropout)
        self.last = nn.Linear(self.mlp.out_width, labels, bias=False)

    def fields(self, inputs: Inputs) -> Tensor:
        """`[B, F, W]`: every field's vector, the scenario's last."""
        parts = [
            part
            for group, widths in self.field_widths.items()
            for part in inputs.groups[group].split_with_sizes(widths, dim=1)
        ]
        vectors = [lift(part) for lift, part in zip(self.lifts, parts, strict=True)]
        return torch.stack([*vectors, self.scenario(inputs.scenario)], dim=1)

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        vectors = self.fields(inputs)
        crossed = (vectors.sum(dim=1).square() - vectors.square().sum(dim=1)) / 2
        x = vectors.flatten(1)
        logits: Tensor = self.first(x) + crossed @ self.second.T + self.last(self.mlp(x, inputs.row))
        return logits
