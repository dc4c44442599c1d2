"""What a stage minimises: log losses of labels, or, for two towers, retrieval or the contrast of scenarios.

Shapes: `B` rows of this rank, `R` ranks, `C = R * B` rows of the global batch, `P` pairs, `d` width of a vector.

Negatives come from the global batch, whatever the number of ranks, and always from the scenario that is asked: a
user's items are ranked within a scenario, and vectors of different scenarios could be told apart by the scenario alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import Field, model_validator
from torch import Tensor

from msr_dist.config import Config
from msr_dist.models.base import Inputs
from msr_dist.models.layers import gather_over_ranks
from msr_dist.models.towers import ITEM_SIDE, USER_SIDE, TwoTower

Temperature = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Shown:
    """Rows of a batch as objectives of two towers see them."""

    inputs: Inputs
    user: Tensor
    """`[B]` int64."""
    item: Tensor
    """`[B]` int64."""
    labels: Tensor
    """`[B, T]`; what the columns mean is the objective's."""
    weights: Tensor
    """`[B, T]`; 0 for rows that only fill up the batch."""
    log_share: Tensor
    """`[B]`: logarithm of the item's share of its scenario's rows, from which batches are drawn; 0 where unknown."""


class Labels(Config):
    """The log losses of the labels, by models that predict them; what the model's paper adds is the model's own."""

    kind: Literal["labels"] = "labels"


class Retrieval(Config):
    """Finding what a user chose among a scenario's items.

    Softmax over the global batch's items of the row's scenario (Yi et al., 2019, "Sampling-bias-corrected neural
    modeling for large corpus item recommendations", section 4), over rows r with positive label:

        loss_r = - log  exp(s_rr - log q_r) / sum over c of exp(s_rc - log q_c)        s_rc = <u_r, v_c> / temperature

    c runs over r itself and over rows of r's scenario with other items; q_c is the share of c's item in the rows of
    the scenario, exact and not estimated while training. The loss is the mean over positive rows by their weights
    (such as watch time; the label's weight column), or with loss "bce" over all rows.
    """

    kind: Literal["retrieval"] = "retrieval"
    label: str | None = None
    """What makes a row positive; by default the first label."""
    loss: Literal["softmax", "bce"] = "softmax"
    """bce: log loss of s_rr against the label, for rows that have negatives."""
    temperature: Temperature = 0.1
    correct_popularity: bool = True
    """Subtract log q: in a batch, popular items are negatives more often than their share of all items."""
    shown_negatives: bool = False
    """Rows whose label is 0 (shown, but not chosen) are negatives as well."""
    uniform_negatives: float = Field(default=0.0, ge=0)
    """For each positive row so many rows of items drawn evenly from the scenario's; their vectors are negatives too."""

    @model_validator(mode="after")
    def _has_negatives(self) -> Self:
        if self.loss == "bce" and not (self.shown_negatives or self.uniform_negatives):
            raise ValueError(
                "loss 'bce' needs rows with label 0: set shown_negatives=true, where the data have them, or "
                "uniform_negatives=4"
            )
        return self

    def value(self, towers: TwoTower, shown: Shown) -> Tensor:
        """The loss: a scalar on each rank, whose mean over ranks is that of the global batch."""
        items = towers.item(shown.inputs)
        weight, label = shown.weights[:, 0], shown.labels[:, 0]
        if self.loss == "bce":
            scores = (towers.user(shown.inputs) * items).sum(1) / self.temperature
            total = F.binary_cross_entropy_with_logits(scores, label, weight, reduction="sum")
            return total / _per_rank(weight)
        # Rows of negatives have no user worth a forward pass.
        positive = (weight * label > 0).nonzero().squeeze(1)
        users = towers.user(shown.inputs.take(positive)) / self.temperature
        offset = -shown.log_share if self.correct_popularity else torch.zeros_like(shown.log_share)
        rivals = _Rivals.of(items, shown.item, shown.inputs.scenario, weight > 0, offset)
        losses = rivals.losses(users, rivals.first + positive)
        return (losses * weight[positive]).sum() / _per_rank(weight * (label > 0))


class Contrastive(Config):
    """One user, or item, as two scenarios have it: views that should be near, and far from those of anybody else.

    InfoNCE (van den Oord et al., 2018) over pairs of views, as SASS pre-trains (arXiv 2208.11457): a view is the vector
    of a user, or item, through the branch of a scenario. View a in scenario i of an entity has its view b in j for a
    positive, and for negatives all views of others in scenario j that the global batch holds:

        loss_a = - log  exp(<a, b> / temperature) / sum over c of exp(<a, c> / temperature)

    and the same from b to a; a pair's loss is the mean of both. L = mean over users' pairs + item_weight * mean over
    items' pairs. Nothing is said of temperature and weights in what is known of the paper.
    """

    kind: Literal["contrastive"] = "contrastive"
    temperature: Temperature = 0.1
    sides: Literal["both", "user", "item"] = "both"
    item_weight: float = Field(default=1.0, gt=0)
    """Weight of items' pairs beside users' pairs."""
    space: Literal["entire", "shown", "labelled"] = "entire"
    """Which views there are: of users and items in scenarios where they chose, or were chosen (labelled), or where
    anything was shown to them, or they were shown; entire: that, and items also in scenarios that never showed them."""
    pairs: int = Field(default=4, ge=1)
    """Most pairs of scenarios that are drawn for a user or an item; each epoch goes through all of them."""
    balance: float = Field(default=0.5, ge=0, le=1)
    """A pair of scenarios that n users share weighs n ** (balance - 1): 1 leaves frequent ones their part, 0 gives all
    pairs of scenarios the same."""

    def value(self, towers: TwoTower, shown: Shown) -> Tensor:
        """The loss; rows 2p and 2p + 1 are the views of pair p, label 0 says that it is a user's, label 1 an item's."""
        loss = shown.weights.new_zeros(())
        sides = (USER_SIDE, towers.user, shown.user, 1.0), (ITEM_SIDE, towers.item, shown.item, self.item_weight)
        for place, (side, tower, entity, weight) in enumerate(sides):
            if self.sides in ("both", side):
                loss = loss + weight * self._of_side(tower, entity, shown, place)
        return loss

    def _of_side(self, tower: Callable[[Inputs], Tensor], entity: Tensor, shown: Shown, place: int) -> Tensor:
        weight = shown.labels[:, place] * shown.weights[:, place]
        mine = (weight > 0).nonzero().squeeze(1)
        partner = mine ^ 1
        own_views = tower(shown.inputs.take(mine))
        # All ranks have as many rows, but not as many of this side.
        views = own_views.new_zeros(len(weight), own_views.shape[1]).index_copy(0, mine, own_views)
        rivals = _Rivals.of(views, entity, shown.inputs.scenario, weight > 0, torch.zeros_like(weight))
        losses = rivals.losses(own_views / self.temperature, rivals.first + partner)
        return (losses * weight[mine]).sum() / _per_rank(weight)


@dataclass(frozen=True)
class _Rivals:
    """The vectors of the global batch, among which each answer is to be found; `C` rows, by scenario."""

    vectors: Tensor
    """`[C, d]`, grouped by scenario; rows that only fill up the batch at the end."""
    entity: Tensor
    """`[C]`, as grouped."""
    offset: Tensor
    """`[C]`, as grouped: is added to scores."""
    place: Tensor
    """`[C]`: where the rows of the global batch stand in the groups."""
    scenario: Tensor
    """`[C]`, of the rows of the global batch."""
    sizes: list[int]
    """Rows of each scenario."""
    first: int
    """The first of this rank's rows in the global batch."""

    @classmethod
    def of(cls, vectors: Tensor, entity: Tensor, scenario: Tensor, present: Tensor, offset: Tensor) -> Self:
        """From what this rank has of each, `[B, ...]`."""
        everybody, first = gather_over_ranks(vectors)
        entities, scenarios, there, offsets = (gather_over_ranks(x)[0] for x in (entity, scenario, present, offset))
        counts = torch.bincount(scenarios[there])
        order = torch.argsort(torch.where(there, scenarios, len(counts)), stable=True)
        place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        sizes = counts.tolist()
        return cls(everybody[order], entities[order], offsets[order], place, scenarios, sizes, first)

    def losses(self, asking: Tensor, answer: Tensor) -> Tensor:
        """`[M]`: minus the log softmax of each answer's score among the rivals of its scenario that are not its like.

        Args:
            asking: `[M, d]`, whose products with vectors are scores.
            answer: `[M]`, rows of the global batch.
        """
        scenario, place = self.scenario[answer], self.place[answer]
        order = torch.argsort(scenario, stable=True)
        asked = torch.bincount(scenario, minlength=len(self.sizes)).tolist()
        rest = len(self.vectors) - sum(self.sizes)
        rivals = [x.split_with_sizes([*self.sizes, rest])[:-1] for x in (self.vectors, self.entity, self.offset)]
        asking_by_scenario = [x.split_with_sizes(asked) for x in (asking[order], place[order])]
        losses, begin = [], 0
        # A scenario at a time: the products with all scenarios' rivals would be many times more, to be masked.
        for vectors, entity, offset, queries, own in zip(*rivals, *asking_by_scenario, strict=True):
            here = own - begin
            scores = queries @ vectors.T + offset
            alike = entity == entity[here, None]
            alike[torch.arange(len(here), device=here.device), here] = False
            score = scores.gather(1, here[:, None]).squeeze(1)
            losses.append(scores.masked_fill(alike, -torch.inf).logsumexp(1) - score)
            begin += len(vectors)
        grouped = torch.cat(losses) if losses else asking.sum(1)
        return torch.empty_like(grouped).index_copy(0, order, grouped)


def _per_rank(weight: Tensor) -> Tensor:
    """Sum of the weights of the global batch, divided by the number of ranks; 1 where it is 0."""
    everybody, _ = gather_over_ranks(weight)
    total = everybody.double().sum() * len(weight) / len(everybody)
    return torch.where(total > 0, total, 1.0).to(weight.dtype)
