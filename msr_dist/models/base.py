"""What every model is: a plain module from dense inputs to one logit per label.

Shapes: `B` rows of a batch, `D` width of a feature group, `S` scenarios, `T` labels.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from msr_dist.config import Kinded
from msr_dist.schema import FeatureSchema

Width = Annotated[int, Field(ge=1)]
"""A setting: units of a layer, or vectors of a bank."""
Widths = Annotated[tuple[Width, ...], Field(min_length=1)]
"""A setting: units of each hidden layer, first to last."""
Rate = Annotated[float, Field(ge=0, lt=1)]
"""A setting: the share of hidden units that dropout silences."""


@dataclass(frozen=True)
class Behaviours:
    """A list of ids, such as the user's last clicks, before it is pooled; `L` the longest list of the batch."""

    vectors: Tensor
    """`[B, L, W]`, 0 behind the end of a list."""
    present: Tensor
    """`[B, L]` bool: where the list goes on."""
    target: Tensor
    """`[B, W]`: what the row is about, from the same table; attention asks how the behaviours bear on it."""


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
    behaviours: Mapping[str, Behaviours] = field(default_factory=dict)
    """Feature name -> its list, for features with pooling "attention"; their pooled vectors are in `groups` as well."""
    user: Tensor | None = None
    """`[B]` int64: the row's user; there where the schema has knowledge."""
    knowledge: Tensor | None = None
    """`[B, K + 1]`: what a language model says of the user, and 1, or 0 where it was not asked about that user and the
    vector is the mean; there where the schema has knowledge."""
    whole: Tensor | None = None
    """`[B, sum of widths]`, where `groups` are its parts: see `cut`. Then nothing has to be copied to join them."""

    def __post_init__(self) -> None:
        assert self.whole is None or self.whole.data_ptr() == next(iter(self.groups.values())).data_ptr()

    def with_whole(self, whole: Tensor) -> "Inputs":
        """The same rows with other values, `[B, sum of widths]`, in all groups."""
        widths = {name: x.shape[1] for name, x in self.groups.items()}
        return replace(self, groups=cut(whole, widths), whole=whole)

    def take(self, rows: Tensor) -> "Inputs":
        """The rows of those indices."""
        behaviours = {
            name: Behaviours(lists.vectors[rows], lists.present[rows], lists.target[rows])
            for name, lists in self.behaviours.items()
        }
        groups = {name: x[rows] for name, x in self.groups.items()}
        user, knowledge = (None if x is None else x[rows] for x in (self.user, self.knowledge))
        return Inputs(groups, self.scenario[rows], self.row[rows], behaviours, user, knowledge)

    def split(self, sizes: list[int]) -> "list[Inputs]":
        """Consecutive parts of those sizes."""
        groups = {name: x.split_with_sizes(sizes) for name, x in self.groups.items()}
        lists = {
            name: [x.split_with_sizes(sizes) for x in (each.vectors, each.present, each.target)]
            for name, each in self.behaviours.items()
        }
        scenario, row = self.scenario.split_with_sizes(sizes), self.row.split_with_sizes(sizes)
        user, knowledge = (None if x is None else x.split_with_sizes(sizes) for x in (self.user, self.knowledge))
        return [
            Inputs(
                {name: parts[i] for name, parts in groups.items()},
                scenario[i],
                row[i],
                {name: Behaviours(*(parts[i] for parts in each)) for name, each in lists.items()},
                None if user is None else user[i],
                None if knowledge is None else knowledge[i],
            )
            for i in range(len(sizes))
        ]

    def joined(self) -> Tensor:
        """All groups side by side: `[B, sum of widths]`."""
        return torch.cat(list(self.groups.values()), dim=1) if self.whole is None else self.whole


def cut(whole: Tensor, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """`[B, sum of widths]` as groups: its parts, not copies."""
    return dict(zip(widths, whole.split_with_sizes(list(widths.values()), dim=1), strict=True))


@dataclass(frozen=True)
class Objective:
    """What a backbone is trained on: log losses of its logits, and what its paper adds to them."""

    logits: Tensor
    """`[B, T]`."""
    weight: Tensor | None = None
    """`[B]`: factor of the row's log losses, beside the weights that the data give."""
    penalty: Tensor | None = None
    """`[B]`: added to the row's loss."""

    def float(self) -> "Objective":
        """The same in fp32."""
        weight, penalty = (None if x is None else x.float() for x in (self.weight, self.penalty))
        return Objective(self.logits.float(), weight, penalty)

    def loss(self, labels: Tensor, weights: Tensor) -> Tensor:
        """Binary cross-entropy plus penalties, summed over labels and rows; `labels` and `weights` are `[B, T]`.

        A row without any weight, such as padding, has no part in it.
        """
        factors = weights if self.weight is None else weights * self.weight[:, None]
        total = binary_cross_entropy_with_logits(self.logits, labels, factors, reduction="sum")
        if self.penalty is not None:
            total = total + (self.penalty * (weights > 0).any(dim=1)).sum()
        return total


class WholeBatch(nn.Module):
    """A module that in training sees batches as a whole: takes statistics of their rows, or counts them.

    It cannot be computed in parts: see `dense_rows` of a run.
    """


def of_whole_batch(model: nn.Module) -> list[str]:
    """The classes of those parts of `model` that need all rows of a batch at once, torch's own among them."""
    kinds = (WholeBatch, nn.modules.batchnorm._BatchNorm)
    return sorted({type(module).__name__ for module in model.modules() if isinstance(module, kinds)})


class Backbone(nn.Module, ABC):
    """A multi-scenario model without its embedding tables. Subclasses are final.

    A row's part in the objective depends on that row alone, but for what a `WholeBatch` computes.
    """

    @abstractmethod
    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`: column t is the log odds of label t under the row's own scenario."""

    def objective(self, inputs: Inputs) -> Objective:
        """What training minimises; a model with a loss of its own overrides it, and derives `forward` from it."""
        return Objective(self(inputs))


class ModelConfig(Kinded, ABC):
    """Settings of any model: each file in `models/` has one final subclass called `Config`."""

    reads_knowledge: ClassVar[bool] = False
    """Whether it needs what a language model says of users and scenarios: `FeatureSchema.knowledge`."""
    takes_knowledge: ClassVar[bool] = False
    """Whether it makes use of that where a run gives it."""

    def adapt(self, schema: FeatureSchema) -> FeatureSchema:
        """The schema with the tables that this model needs: by default, those that it has."""
        return schema


class BackboneConfig(ModelConfig, ABC):
    """Settings of a model that predicts labels."""

    @abstractmethod
    def build(self, schema: FeatureSchema) -> Backbone:
        """The module for this schema; parameters are drawn from torch's global generator."""


def predicting(config: Kinded) -> Kinded:
    """`config`, of a model to go around; ValueError where it is none that predicts labels."""
    if not isinstance(config, BackboneConfig):
        raise ValueError(f"kind {config.kind!r} predicts no labels, so no model goes around it; choose another kind")
    return config
