"""Which rows a step reads: pure functions of the seed, the epoch and the row groups. No state, no ranks, no files.

The row groups of a split are dealt to `num_partitions` partitions of nearly equal size. A partition is a fixed sequence
of rows: its row groups in an order drawn per epoch, joined to windows, the rows of each window permuted. Step n of an
epoch takes from every partition the share of rows that lets all partitions end with the epoch's last step. So

- a rank that owns partitions p = rank mod world_size reads a row group that no other rank reads;
- a global batch holds the same rows at any world size that divides `num_partitions`;
- every row comes exactly once per epoch, however uneven the row groups are (shares that are shorter than the step's
  longest are padded with rows of weight 0);
- the position in the data is one integer, the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Order:
    """The order of one split's rows."""

    group_rows: tuple[int, ...]
    """Number of rows of every row group of the split."""
    num_partitions: int
    batch_size: int
    """Rows of a global batch, all ranks together. A step may differ from it by the number of partitions."""
    seed: int = 0
    window_rows: int | None = 1 << 20
    """Rows of all partitions' windows together, among which rows are permuted; None keeps the order of the files."""

    def __post_init__(self) -> None:
        """Raise ValueError where some step would find a partition empty."""
        groups = len(self.group_rows)
        if groups < self.num_partitions:
            raise ValueError(
                f"{groups} row groups cannot feed {self.num_partitions} partitions: write smaller row groups "
                "(row_group_rows of `msr-dist prepare`), or have fewer partitions"
            )
        if min(self.partition_rows) < self.steps:
            raise ValueError(
                f"batch_size {self.batch_size} leaves a partition without rows in some steps: its smallest has "
                f"{min(self.partition_rows)} rows for {self.steps} steps; raise batch_size or have fewer partitions"
            )

    @cached_property
    def rows(self) -> int:
        """Rows of the split."""
        return sum(self.group_rows)

    @cached_property
    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-self.rows // self.batch_size)

    @cached_property
    def partitions(self) -> tuple[tuple[int, ...], ...]:
        """Row groups of each partition: the largest first, each to the partition that has the fewest rows so far."""
        dealt: list[list[int]] = [[] for _ in range(self.num_partitions)]
        loads = [0] * self.num_partitions
        for group in sorted(range(len(self.group_rows)), key=lambda g: (-self.group_rows[g], g)):
            target = min(range(self.num_partitions), key=lambda p: (loads[p], len(dealt[p]), p))
            dealt[target].append(group)
            loads[target] += self.group_rows[group]
        return tuple(tuple(sorted(groups)) for groups in dealt)

    @cached_property
    def _partition_column(self) -> npt.NDArray[np.int64]:
        """`partition_rows`, `[P, 1]`."""
        return np.array(self.partition_rows)[:, None]

    @cached_property
    def partition_rows(self) -> tuple[int, ...]:
        """Rows of each partition."""
        return tuple(sum(self.group_rows[group] for group in groups) for groups in self.partitions)

    def shares(self, step: int) -> npt.NDArray[np.int64]:
        """First and last + 1 place, in each partition's sequence of an epoch, of what its `step` reads: `[P, 2]`."""
        return np.arange(step, step + 2) * self._partition_column // self.steps

    def ends(self, partition: int, step: int, place: int) -> npt.NDArray[np.int64]:
        """Where, in the partition's sequence, `step` of an epoch and those after it end, as far as `place`."""
        rows = self.partition_rows[partition]
        # The last step that ends there is the last k with k * rows // steps <= place.
        last = ((place + 1) * self.steps - 1) // rows
        return np.arange(step + 1, last + 1) * rows // self.steps

    def samples(self, step: int) -> int:
        """Rows that all ranks have read before `step`, counted from the start of the first epoch."""
        epoch, within = divmod(step, self.steps)
        return epoch * self.rows + int(self.shares(within)[:, 0].sum())

    def windows(self, partition: int, epoch: int) -> list[tuple[int, ...]]:
        """The partition's row groups in the order of `epoch`, cut into windows."""
        groups = list(self.partitions[partition])
        if self.window_rows is None:
            return [(group,) for group in groups]
        self._generator(partition, epoch).shuffle(groups)
        return list(_cut(groups, self.group_rows, self.window_rows // self.num_partitions))

    def permutation(self, partition: int, epoch: int, window: int, rows: int) -> npt.NDArray[np.int64] | None:
        """Order of the `rows` rows of the `window`-th window; None keeps the order of the files."""
        if self.window_rows is None:
            return None
        return self._generator(partition, epoch, window + 1).permutation(rows)

    def first_row(self, partition: int, epoch: int) -> int:
        """A number for the first place of the partition's sequence in `epoch`, such that no two rows share one."""
        return epoch * self.rows + sum(self.partition_rows[:partition])

    def _generator(self, partition: int, epoch: int, window: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.seed, partition, epoch, window])


def _cut(groups: Sequence[int], group_rows: Sequence[int], window_rows: int) -> list[tuple[int, ...]]:
    windows: list[list[int]] = []
    filled = window_rows
    for group in groups:
        if filled + group_rows[group] > window_rows:
            windows.append([])
            filled = 0
        windows[-1].append(group)
        filled += group_rows[group]
    return [tuple(window) for window in windows]
