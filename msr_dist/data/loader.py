"""Source + order -> this rank's ScenarioBatches, decoded and assembled ahead in threads, from any step on."""

import contextlib
import itertools
import queue
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from msr_dist.batch import ScenarioBatch
from msr_dist.config import Config
from msr_dist.data.order import Order
from msr_dist.data.parquet import Column, Lists
from msr_dist.schema import OPEN_IDS, Feature, FeatureSchema


class LoaderConfig(Config):
    """How rows become batches. Only `threads`, `prefetch` and `memory_limit` leave the losses as they are."""

    batch_size: int = Field(default=8192, ge=1)
    """Rows of a global batch, all ranks together; where two towers are pre-trained, pairs."""
    partitions: int = Field(default=24, ge=1)
    """The world size must divide it; a run continues the same data at any such world size."""
    window_rows: int = Field(default=1 << 20, ge=1)
    """Rows, of all ranks together, among which rows are permuted. Row groups are shuffled over the whole split."""
    shuffle: bool = True
    """false: rows come in the order of the files, hence of time, as far as row groups of one size allow: each partition
    reads its own in their order."""
    threads: int = Field(default=2, ge=1)
    """Decoding threads of a rank."""
    prefetch: int = Field(default=4, ge=1)
    """Batches of a rank that stand ready."""
    memory_limit: str = "2GB"
    """What DuckDB may use where it makes the rows of two towers; beyond it, it spills to disk in the run's folder."""


class Source(Protocol):
    """Row groups to read from."""

    def read(self, group: int) -> Mapping[str, Column]:
        """The columns of the schema for one row group."""
        ...


PADDING = -1
"""Number of a row that only fills up a batch; its weights are 0."""

Ints = npt.NDArray[np.int64]
Narrow = npt.NDArray[Any]
"""In the narrowest type that holds the values: rows that stand ready take memory, and memory takes time."""
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rows:
    """Some rows as plain arrays; `n` rows, `F` single-valued features, `N` numerics, `T` labels."""

    integers: Narrow
    """`[1 + T + F, n]`: scenario, labels, ids. One matrix, for a batch takes pieces of many."""
    lists: tuple[tuple[Lists, Ints], ...]
    """Per multi-valued feature, and `[n + 1]` offsets into its values."""
    numeric: Floats
    """`[N, n]`."""
    weights: Floats | None
    """`[T, n]`; None where all are 1."""


class Part(NamedTuple):
    """Consecutive rows: a batch has many, so they are not even sliced before they are copied."""

    rows: Rows
    start: int
    stop: int


class Loader:
    """Batches of one rank. Two loaders of the same order that differ in rank never read the same row group."""

    def __init__(
        self,
        source: Source,
        schema: FeatureSchema,
        order: Order,
        rank: int,
        world_size: int,
        config: LoaderConfig,
        together: int = 1,
    ) -> None:
        """Nothing is read yet. `together` rows, which follow each other, are one to `order`, and stay so in batches."""
        if order.num_partitions % world_size:
            raise ValueError(
                f"world size {world_size} does not divide {order.num_partitions} partitions: "
                f"set loader.partitions to a multiple of the number of workers, or choose another number of workers"
            )
        self.order = order
        self._source, self._schema, self._config = source, schema, config
        self._world_size, self.together = world_size, together
        self._partitions = range(rank, order.num_partitions, world_size)

    def batches(self, first: int, last: int) -> Iterator[ScenarioBatch]:
        """Batches of steps `first` to `last - 1`, counted over epochs; what the source raises is raised here."""
        ready: queue.Queue[ScenarioBatch | BaseException | None] = queue.Queue(self._config.prefetch)
        stop = threading.Event()
        thread = threading.Thread(target=self._fill, args=(ready, stop, first, last), daemon=True, name="loader")
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _fill(self, ready: "queue.Queue[Any]", stop: threading.Event, first: int, last: int) -> None:
        def put(item: Any) -> None:
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(item, timeout=0.1)
                    break

        try:
            with ThreadPoolExecutor(self._config.threads, thread_name_prefix="decode") as pool:
                for step in range(first, last):
                    if step == first or step % self.order.steps == 0:
                        streams = [_Stream(self, pool, p, *divmod(step, self.order.steps)) for p in self._partitions]
                        first_rows = np.array([stream.first_row for stream in streams])
                        pieces = zip(*streams, strict=True)
                    put(self._batch(next(pieces), first_rows, step))
                    if stop.is_set():
                        break
                pool.shutdown(cancel_futures=True)
            put(None)
        except BaseException as error:  # noqa: BLE001 - it is raised again in the thread that asked
            put(error)

    def _batch(self, pieces: Sequence[list[Part]], first_rows: Ints, step: int) -> ScenarioBatch:
        shares = self.together * self.order.shares(step % self.order.steps)
        sizes = shares[:, 1] - shares[:, 0]
        # Equal batches are what collectives need.
        width, mine = sizes.max(), sizes[self._partitions]
        parts: list[Part] = []
        for of_partition, missing in zip(pieces, (width - mine).tolist(), strict=True):
            parts += of_partition
            parts += _first_again(of_partition, missing) if missing else ()
        places = np.arange(width)
        numbers = (first_rows + shares[self._partitions, 0])[:, None] + places
        numbers[places >= mine[:, None]] = PADDING
        return _assemble(self._schema, parts, numbers.ravel(), int(sizes.sum()) / self.together / self._world_size)

    def decode(self, partition: int, epoch: int, window: int, groups: tuple[int, ...]) -> Rows:
        """One window of one partition, its rows in the order of `epoch`."""
        each, units = self.together, sum(self.order.group_rows[group] for group in groups)
        permutation = self.order.permutation(partition, epoch, window, units)
        if permutation is not None and each > 1:
            permutation = (permutation[:, None] * each + np.arange(each)).ravel()
        return _decode([self._source.read(group) for group in groups], units * each, self._schema, permutation)


class _Stream:
    """The rows of one partition in one epoch: pieces of each step from one on. Windows are decoded one ahead."""

    def __init__(self, loader: Loader, pool: ThreadPoolExecutor, partition: int, epoch: int, step: int) -> None:
        order, self._each = loader.order, loader.together
        self._loader, self._pool, self._partition, self._epoch, self._step = loader, pool, partition, epoch, step
        self.first_row = self._each * order.first_row(partition, epoch)
        self._windows = order.windows(partition, epoch)
        self._begins = [0, *itertools.accumulate(sum(order.group_rows[g] for g in groups) for groups in self._windows)]
        self._place = int(order.shares(step)[partition, 0])
        self._window = bisect_right(self._begins, self._place) - 1
        self._ahead = self._decode(self._window)

    def __iter__(self) -> Iterator[list[Part]]:
        step, place = self._step, self._place
        begun: list[Part] = []
        for window in range(self._window, len(self._windows)):
            rows = self._ahead.result()
            if window + 1 < len(self._windows):
                self._ahead = self._decode(window + 1)
            begin, end = self._begins[window : window + 2]
            ends = self._loader.order.ends(self._partition, step, end)
            cuts = (self._each * (np.array([place, *ends, end]) - begin)).tolist()
            *whole, rest = (Part(rows, *each) for each in itertools.pairwise(cuts))
            for part in whole:
                yield [*begun, part]
                begun = []
            begun += [rest] if rest.start < rest.stop else []
            step, place = step + len(ends), end

    def _decode(self, window: int) -> "Future[Rows]":
        return self._pool.submit(self._loader.decode, self._partition, self._epoch, window, self._windows[window])


def _first_again(parts: list[Part], count: int) -> Iterator[Part]:
    """The first `count` rows of `parts`; again from the first, where there are fewer."""
    for rows, start, stop in itertools.cycle(parts):
        if count <= 0:
            break
        yield Part(rows, start, min(stop, start + count))
        count -= stop - start


def feature_names(schema: FeatureSchema) -> list[str]:
    """Keys of a batch's KeyedJaggedTensor: single-valued features first, then lists."""
    return [f.name for f in schema.features if not f.pooling] + [f.name for f in schema.features if f.pooling]


def id_type(schema: FeatureSchema) -> type[np.signedinteger[Any]]:
    """Of ids that stand ready: the narrowest that holds them all."""
    most = max(OPEN_IDS if each.is_open else each.rows * schema.copies(each) for each in schema.tables)
    return np.int32 if most < 1 << 31 else np.int64


def has_weights(schema: FeatureSchema) -> bool:
    """Whether a label of some row may weigh other than 1."""
    return any(label.weight or label.mask for label in schema.labels)


def _decode(groups: Sequence[Mapping[str, Any]], rows: int, schema: FeatureSchema, permutation: Ints | None) -> Rows:
    def stack(names: list[str], dtype: type) -> npt.NDArray[Any]:
        lines: Narrow = np.empty((len(names), rows), dtype)
        straight: Narrow = np.empty(rows, dtype)
        for name, line in zip(names, lines, strict=True):
            out = line if permutation is None else straight
            np.concatenate([group[name] for group in groups], out=out, casting="unsafe")
            if permutation is not None:
                # A permutation is never out of range: clipping only spares numpy a look at each of its numbers.
                straight.take(permutation, out=line, mode="clip")
        return lines

    weights = None
    if has_weights(schema):
        weights = np.ones((len(schema.labels), rows), np.float32)
        for line, label in zip(weights, schema.labels, strict=True):
            for (factor,) in (stack([name], np.float32) for name in (label.weight, label.mask) if name):
                line *= factor

    single = [feature.name for feature in schema.features if not feature.pooling]
    labels = [label.name for label in schema.labels]
    integers = stack([schema.scenario, *labels, *single], id_type(schema))
    scenario = integers[0]
    _own(integers[1 + len(labels) :], scenario, schema)
    return Rows(
        integers=integers,
        lists=tuple(
            _decode_list([group[f.name] for group in groups], f, scenario, schema, permutation)
            for f in schema.features
            if f.pooling
        ),
        numeric=stack([numeric.name for numeric in schema.numerics], np.float32),
        weights=weights,
    )


def _own(ids: Narrow, scenario: Narrow, schema: FeatureSchema) -> None:
    """Change `ids` `[F, n]` where the tables of features hold vectors for each scenario: see `Table.per_scenario`."""
    for line, feature in zip(ids, (f for f in schema.features if not f.pooling), strict=True):
        copies = schema.copies(schema.table(feature.table))
        if copies > 1:
            line *= copies
            line += np.array(schema.owners(), line.dtype)[scenario]


def _decode_list(
    groups: Sequence[Lists], feature: Feature, scenario: Narrow, schema: FeatureSchema, permutation: Ints | None
) -> tuple[Lists, Ints]:
    values: Narrow = np.concatenate([group.values for group in groups], dtype=id_type(schema), casting="unsafe")
    lengths = np.concatenate([group.lengths for group in groups], dtype=np.int64)
    if permutation is not None:
        rows = map(torch.from_numpy, (permutation.astype(np.int32), lengths, values))
        moved = torch.ops.fbgemm.permute_1D_sparse_data(*rows, None, len(values))
        lengths, values = moved[0].numpy(), moved[1].numpy()
    copies = schema.copies(schema.table(feature.table))
    if copies > 1:
        values *= copies
        values += np.repeat(np.array(schema.owners(), values.dtype)[scenario], lengths)
    return Lists(values, lengths), np.concatenate([[0], np.cumsum(lengths)])


def _assemble(schema: FeatureSchema, parts: list[Part], numbers: Ints, rows_per_rank: float) -> ScenarioBatch:
    lists = [
        (column.values[offsets[part.start] : offsets[part.stop]], column.lengths[part.start : part.stop])
        for of_parts in zip(*(part.rows.lists for part in parts), strict=True)
        for part, (column, offsets) in zip(parts, of_parts, strict=True)
    ]
    lines, rows, labels = len(parts[0].rows.integers), len(numbers), len(schema.labels)
    # Ids come last, so that those of lists can follow them.
    integers = torch.empty(lines * rows + sum(len(values) for values, _ in lists), dtype=torch.int64)
    whole = integers[: lines * rows].view(lines, rows)
    # In two steps: many pieces are copied fast only where they need no conversion.
    whole.copy_(_side_by_side([rows.integers[:, start:stop] for rows, start, stop in parts]))
    ids, lengths = integers[(1 + labels) * rows :], _ones((lines - 1 - labels) * rows)
    if lists:
        np.concatenate([values for values, _ in lists], out=ids[len(lengths) :].numpy())
        lengths = torch.cat([lengths, _side_by_side([lengths for _, lengths in lists])])
    weights = torch.ones(rows, labels)
    if has_weights(schema):
        weights = _columns([rows.weights[:, start:stop] for rows, start, stop in parts if rows.weights is not None])
    numeric = torch.empty(rows, 0)
    if schema.numerics:
        numeric = _columns([rows.numeric[:, start:stop] for rows, start, stop in parts])
    weights.numpy()[numbers == PADDING] = 0
    return ScenarioBatch(
        ids=KeyedJaggedTensor(keys=feature_names(schema), values=ids, lengths=lengths),
        numeric=numeric,
        scenario=whole[0],
        labels=whole[1 : 1 + labels].float().T.contiguous(),
        weights=weights,
        row=torch.from_numpy(numbers),
        rows_per_rank=rows_per_rank,
    )


def _side_by_side(pieces: list[npt.NDArray[Any]]) -> Tensor:
    """Pieces `[.., n]` as one. By numpy, which has views of arrays for a fraction of what torch takes for its own."""
    return torch.from_numpy(np.concatenate(pieces, -1))


def _columns(pieces: list[Floats]) -> Tensor:
    """Pieces `[C, n]` as one `[rows, C]`."""
    return _side_by_side(pieces).T.contiguous()


@lru_cache(maxsize=4)
def _ones(count: int) -> Tensor:
    """The lengths of single-valued features, which are the same in nearly all batches."""
    return torch.ones(count, dtype=torch.int64)
