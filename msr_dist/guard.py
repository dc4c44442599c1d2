"""Watches the losses of a stage, and finds what broke one: the step, the rows of its batch, their scenarios.

Costs next to nothing while all goes well: predictions of the last steps are kept, and looked at a few times a minute.
Which rows a step reads is a pure function of its number, so the guilty batch is read again when it is asked for.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from msr_dist.batch import ScenarioBatch
from msr_dist.checkpoint import not_finite
from msr_dist.config import Config
from msr_dist.data.loader import PADDING, Loader
from msr_dist.data.order import Order
from msr_dist.data.parquet import ParquetSource
from msr_dist.distributed import World
from msr_dist.recommender import Predictions

_EVERY = 20
"""Steps between two looks."""
_PATIENCE = 10
"""Steps in a row that a loss may be far too large: a few strange rows pass, broken weights do not."""
_REMEMBERED = 200
"""Losses whose median is what is usual."""
_SHOWN = 3
"""Rows that are named."""


class GuardConfig(Config):
    """When a run is given up because it no longer learns anything. A loss that is no number always ends it."""

    explodes_at: float = Field(default=100.0, ge=0)
    """So many times the usual loss (the median of the last 200 steps, and at least 1), for ten steps in a row, ends the
    run; 0 lets it go on."""


@dataclass(frozen=True)
class Place:
    """A row of the run, in its file."""

    group: int
    """Index of the row group in the split."""
    row: int
    """Within the row group, from 0."""


def find(order: Order, number: int, together: int = 1) -> Place:
    """Where the row stands that a batch calls `number` (`ScenarioBatch.row`)."""
    joined, part = divmod(number, together)
    epoch, place = divmod(joined, order.rows)
    partition, place = _within(order.partition_rows, place)
    windows = order.windows(partition, epoch)
    sizes = [sum(order.group_rows[group] for group in groups) for groups in windows]
    window, place = _within(sizes, place)
    permutation = order.permutation(partition, epoch, window, sizes[window])
    place = place if permutation is None else int(permutation[place])
    index, place = _within([order.group_rows[group] for group in windows[window]], place)
    return Place(windows[window][index], place * together + part)


def _within(sizes: Sequence[int], place: int) -> tuple[int, int]:
    """Which of parts that follow each other holds `place`, and the place within it."""
    begins = np.cumsum([0, *sizes])
    index = int(np.searchsorted(begins, place, side="right")) - 1
    return index, place - int(begins[index])


class Guard:
    """The last predictions and the usual loss of a stage; all its methods are for all ranks together."""

    def __init__(
        self, config: GuardConfig, stage: str, loader: Loader, source: ParquetSource, first: int, world: World
    ) -> None:
        """`first` is the number, in all epochs, of the stage's step 0."""
        self._config, self._stage, self._first, self._world = config, stage, first, world
        self._loader, self._source, self._schema = loader, source, source.schema
        self._unseen: list[tuple[int, Predictions]] = []
        self._kept: deque[tuple[int, Predictions]] = deque(maxlen=_EVERY + _PATIENCE + 1)
        self._usual: deque[float] = deque(maxlen=_REMEMBERED)
        self._high: list[tuple[int, float]] = []
        self._strange: int | None = None

    @property
    def doubts(self) -> bool:
        """Whether the newest loss that was looked at is far too large."""
        return bool(self._high)

    def add(self, step: int, predictions: Predictions, look: bool = False) -> None:
        """Keep what the `step`-th step predicted; look at the losses now and then, and where it says so.

        Raises:
            ValueError: a loss is no number, or has exploded; says what did it.
        """
        self._unseen.append((step, predictions))
        if look or len(self._unseen) == _EVERY:
            self._look()

    def fault(self, step: int, what: str) -> ValueError:
        """What to raise where `what` is wrong after a step that was looked at."""
        if step not in dict(self._kept):
            return ValueError(f"stage {self._stage}: {what}. {_REMEDY}")
        bad, told = self._worst(step)
        # Rows break their own predictions; where most are broken, the weights were, by the step before.
        if bad > 0.5 and step - 1 in dict(self._kept):
            told = f"{told}; the weights were damaged by step {step - 1}: {self._worst(step - 1)[1]}"
        return ValueError(f"stage {self._stage}: {what}. In step {step}, {told}. {_REMEDY}")

    def require_sound(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Raise ValueError where what `step`, which was looked at, has left shall not be saved."""
        if self.doubts:
            raise self.fault(step, f"the loss is far too large, {self._high[-1][1]:.4g} at step {step}")
        if (broken := not_finite(tensors, self._world)) is not None:
            what, strange = f"{broken} holds NaN or infinity after step {step}", self._strange
            if strange is None:
                raise self.fault(step, what)
            raise self.fault(strange, f"{what}, and the loss was far too large at step {strange}")

    def _look(self) -> None:
        window, self._unseen = self._unseen, []
        parts = torch.stack([predictions.loss.double() for _, predictions in window]).cpu()
        losses = (self._world.sum(parts) / self._world.world_size).tolist()
        for (step, predictions), loss in zip(window, losses, strict=True):
            self._kept.append((step, predictions))
            usual = max(1.0, statistics.median(self._usual)) if self._usual else math.inf
            limit = self._config.explodes_at * usual if self._config.explodes_at else math.inf
            if math.isfinite(loss) and loss <= limit:
                self._usual.append(loss)
                self._high = []
                continue
            self._high.append((step, loss))
            self._strange = step
            if not math.isfinite(loss) or len(self._high) == _PATIENCE:
                begun, large = self._high[0]
                before = f", after {large:.4g} at step {begun}" if begun < step else ""
                common = f", and {statistics.median(self._usual):.4g} usually" if self._usual else ""
                raise self.fault(begun, f"the loss is {loss:.4g} at step {step}{before}{common}")

    def _worst(self, step: int) -> tuple[float, str]:
        """The share of rows without a sane prediction, and in words: which scenarios have such rows, and the worst."""
        batches = self._loader.batches(self._first + step - 1, self._first + step)
        batch = next(batches)
        del batches
        losses = _row_losses(batch, dict(self._kept)[step].logits.float().cpu())
        if losses is None:
            return 0.0, f"with {self._named(batch)}"
        real = batch.row != PADDING
        limit = max(100.0, 100 * float(losses[real & losses.isfinite()].median().nan_to_num(0)))
        broken = real & ~(losses <= limit)
        count = len(self._schema.scenarios)
        by_scenario = [torch.bincount(batch.scenario[rows], minlength=count) for rows in (broken, real)]
        bad, all_rows = self._world.sum(torch.stack(by_scenario)).tolist()
        names = [
            f"{bad[s.id]} of {all_rows[s.id]} rows of scenario {s.name!r}" for s in self._schema.scenarios if bad[s.id]
        ]
        if names:
            said = f"no sane prediction for {', '.join(names)}; the worst rows"
            badness = losses.nan_to_num(math.inf, math.inf).where(broken, -1.0)
        else:
            # Statistics of the inputs, such as a normalisation's, can break without a prediction.
            said = "every row has a sane prediction; the rows with the largest inputs"
            badness = self._largest_inputs(batch).where(real, -1.0)
        chosen = [row for row in badness.argsort(descending=True)[:_SHOWN].tolist() if badness[row] >= 0]
        mine = [(float(badness[row]), self._row(batch, row, float(losses[row]))) for row in chosen]
        gathered: list[list[tuple[float, str]]] = [[] for _ in range(self._world.world_size)]
        dist.all_gather_object(gathered, mine)
        worst = sorted((entry for rank in gathered for entry in rank), key=lambda entry: -entry[0])[:_SHOWN]
        return sum(bad) / max(1, sum(all_rows)), f"{said}: {'; '.join(text for _, text in worst)}"

    def _largest_inputs(self, batch: ScenarioBatch) -> Tensor:
        """`[B]`: of each row's numeric inputs, the largest without its sign."""
        numeric = batch.numeric[:, : len(self._schema.numerics)].abs()
        return numeric.amax(1) if numeric.numel() else torch.zeros(len(numeric))

    def _row(self, batch: ScenarioBatch, row: int, loss: float) -> str:
        place = find(self._loader.order, int(batch.row[row]), self._loader.together)
        scenario = self._schema.scenarios[int(batch.scenario[row])].name
        text = f"{self._source.row_groups[place.group]}, row {place.row} (scenario {scenario!r}, loss {loss:.4g}"
        if self._schema.numerics:
            largest = int(batch.numeric[row, : len(self._schema.numerics)].abs().argmax())
            text += f", {self._schema.numerics[largest].name} = {float(batch.numeric[row, largest]):.4g}"
        return f"{text})"

    def _named(self, batch: ScenarioBatch) -> str:
        """Two towers predict no labels: a loss is the batch's."""
        count = len(self._schema.scenarios)
        rows = self._world.sum(torch.bincount(batch.scenario[batch.row != PADDING], minlength=count)).tolist()
        named = ", ".join(f"{rows[s.id]} rows of scenario {s.name!r}" for s in self._schema.scenarios if rows[s.id])
        extremes = self._world.gather(self._largest_inputs(batch).amax(0, keepdim=True))
        return f"{named}; the largest numeric input is {float(extremes.max()):.4g}"


def _row_losses(batch: ScenarioBatch, logits: Tensor) -> Tensor | None:
    """`[B]`: what each row's labels cost, without what a model adds of its own; None where there are no logits."""
    if logits.shape[1] != batch.labels.shape[1]:
        return None
    each = binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
    # A label that is unknown weighs nothing, also where its prediction is no number.
    return each.where(batch.weights > 0, 0.0).mul(batch.weights).sum(1)


_REMEDY = (
    "The checkpoints before it are kept; mend the rows, or start a run of another name with lower learning rates "
    "(stages.N.sparse.lr, stages.N.dense.lr)"
)
