"""What every model is: a plain module from dense inputs to one logit per label.

Shapes: `B` rows of a batch, `D` width of a feature group, `S` scenarios, `T` labels.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from msr_dist.config import Kinded
from msr_dist.schema import FeatureSchema

Width = Annotated[int, Field(ge=1)]
"""A setting: units of a layer, or vectors of a bank."""
Widths = Annotated[tuple[Width, ...], Field(min_length=1)]
"""A setting: units of each hidden layer, first to last."""
Rate = Annotated[float, Field(ge=0, lt=1)]
"""A setting: the share of hidden units that dropout silences."""


@dataclass(frozen=True)
class Inputs:
    """What a backbone sees of a batch: embeddings are looked up, tables and ranks are out of sight."""

    groups: dict[str, Tensor]
    """Feature group -> `[B, D]`, widths as `FeatureSchema.group_widths` says."""
    scenario: Tensor
    """`[B]` int64."""
    row: Tensor
    """`[B]` int64, distinct for every row of the run: dropout draws by it, so that a mask belongs to the row. Negative
    for rows that only fill up the batch: they have no weight, and statistics leave them out."""

    def joined(self) -> Tensor:
        """All groups side by side: `[B, sum of widths]`."""
        return torch.cat(list(self.groups.values()), dim=1)


class Backbone(nn.Module, ABC):
    """A multi-scenario model without its embedding tables. Subclasses are final."""

    @abstractmethod
    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`: column t is the log odds of label t under the row's own scenario."""


class BackboneConfig(Kinded, ABC):
    """Settings of a backbone: each file in `models/` has one final subclass called `Config`."""

    @abstractmethod
    def build(self, schema: FeatureSchema) -> Backbone:
        """The module for this schema; parameters are drawn from torch's global generator."""
