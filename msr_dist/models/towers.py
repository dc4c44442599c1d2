"""What every retrieval model is: a user and an item become vectors, and their product ranks a scenario's items.

Shapes: `B` rows, `D` width of a side's features, `d` width of a vector, `S` scenarios.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from msr_dist.models.base import Inputs, ModelConfig
from msr_dist.schema import FeatureSchema

ITEM_SIDE, USER_SIDE = "item", "user"


class TwoTower(nn.Module, ABC):
    """Both towers of a model, without their embedding tables. Subclasses are final.

    Neither tower reads the other side's features, so that vectors of items can be made before anybody asks.
    """

    @abstractmethod
    def user(self, inputs: Inputs) -> Tensor:
        """`[B, d]`, each of length 1: the rows' users, as they are in the rows' scenarios."""

    @abstractmethod
    def item(self, inputs: Inputs) -> Tensor:
        """`[B, d]`, each of length 1: the rows' items, as they are in the rows' scenarios."""


class TowersConfig(ModelConfig, ABC):
    """Settings that all retrieval models share."""

    user_groups: tuple[str, ...] = ("user",)
    """Feature groups that the user's tower reads: what is known when items are asked for."""
    item_groups: tuple[str, ...] = ("item",)
    """Feature groups that the item's tower reads. Groups on neither side are not read at all."""

    def adapt(self, schema: FeatureSchema) -> FeatureSchema:
        """The schema with what one of the towers reads.

        Raises:
            ValueError: a group is on both sides or in no data, a side has no features, or the user or the item is on
                the wrong side.
        """
        known = list(schema.group_widths())
        for key, groups in (("user_groups", self.user_groups), ("item_groups", self.item_groups)):
            unknown = [group for group in groups if group not in known]
            if unknown or not groups:
                what = f"there is no group {unknown[0]!r}" if unknown else "a tower needs features"
                raise ValueError(f"model.{key}: {what}; the data have {', '.join(known)}")
            if len(set(groups)) < len(groups):
                raise ValueError(f"model.{key}: {', '.join(groups)} names a group twice; name each once")
        both = sorted(set(self.user_groups) & set(self.item_groups))
        if both:
            raise ValueError(f"model.user_groups and model.item_groups both name {both[0]!r}: a tower has its own side")
        group_of = {feature.name: feature.group for feature in schema.features}
        for name, key, side in (
            (schema.user, "user_groups", self.user_groups),
            (schema.item, "item_groups", self.item_groups),
        ):
            if group_of[name] not in side:
                raise ValueError(
                    f"model.{key}: {name!r} is in group {group_of[name]!r}, which is not among {', '.join(side)}"
                )
        read = {*self.user_groups, *self.item_groups}
        features = tuple(feature for feature in schema.features if feature.group in read)
        asking = next((feature for feature in features if feature.pooling == "attention"), None)
        if asking is not None:
            raise ValueError(
                f"features.{asking.name}: pooling 'attention' asks about the item, which a user's tower must not know; "
                f"choose embeddings.features.{asking.name}.pooling='mean' or 'sum'"
            )
        tables = {feature.table for feature in features}
        return schema.model_copy(
            update={
                "features": features,
                "numerics": tuple(numeric for numeric in schema.numerics if numeric.group in read),
                "tables": tuple(table for table in schema.tables if table.name in tables),
            }
        )

    def widths_of(self, schema: FeatureSchema) -> tuple[int, int]:
        """Width of what the user's and the item's tower read, of features."""
        widths = schema.group_widths()
        return sum(widths[group] for group in self.user_groups), sum(widths[group] for group in self.item_groups)

    @abstractmethod
    def build(self, schema: FeatureSchema) -> TwoTower:
        """The module for this schema; parameters are drawn from torch's global generator."""


def side(inputs: Inputs, groups: tuple[str, ...]) -> Tensor:
    """Those groups side by side, `[B, D]`."""
    return torch.cat([inputs.groups[group] for group in groups], dim=1)


def unit(x: Tensor) -> Tensor:
    """`x` `[B, d]` with every row at length 1."""
    return F.normalize(x, dim=1)
