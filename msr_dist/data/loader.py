"""Source + order -> this rank's ScenarioBatches, decoded and assembled ahead in threads, from any step on."""

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import Field
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from msr_dist.batch import ScenarioBatch
from msr_dist.config import Config
from msr_dist.data.order import Order
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

    def read(self, group: int) -> pa.Table:
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

    ids: Narrow
    """`[F, n]`."""
    lists: tuple[tuple[Ints, Ints], ...]
    """Per multi-valued feature: all values one after the other, and `[n + 1]` offsets into them."""
    numeric: Floats
    """`[N, n]`."""
    scenario: Narrow
    """`[n]`."""
    labels: Narrow
    """`[T, n]`."""
    weights: Floats
    """`[T, n]`."""

    def padding(self, count: int) -> "Rows":
        """The first of these rows `count` times over, with weight 0."""
        lists = tuple(
            (np.tile(values[offsets[0] : offsets[1]], count), np.arange(count + 1) * (offsets[1] - offsets[0]))
            for values, offsets in self.lists
        )
        return Rows(
            self.ids[:, :1].repeat(count, 1), lists, self.numeric[:, :1].repeat(count, 1),
            self.scenario[:1].repeat(count), self.labels[:, :1].repeat(count, 1),
            np.zeros((len(self.weights), count), np.float32),
        )  # fmt: skip

    def __getitem__(self, part: slice) -> "Rows":
        """A view of consecutive rows."""
        lists = tuple((values, offsets[part.start : part.stop + 1]) for values, offsets in self.lists)
        return Rows(
            self.ids[:, part], lists, self.numeric[:, part], self.scenario[part], self.labels[:, part],
            self.weights[:, part],
        )  # fmt: skip


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
                    put(self._batch(streams, step))
                    if stop.is_set():
                        break
                pool.shutdown(cancel_futures=True)
            put(None)
        except BaseException as error:  # noqa: BLE001 - it is raised again in the thread that asked
            put(error)

    def _batch(self, streams: "list[_Stream]", step: int) -> ScenarioBatch:
        within = step % self.order.steps
        width = self.order.padded_share(within)
        parts: list[Rows] = []
        numbers: list[Ints] = []
        for stream in streams:
            start, stop = self.order.share(stream.partition, within)
            taken, each = stream.take(start, stop), self.together
            missing = width - (stop - start)
            parts += [*taken, taken[0].padding(missing * each)] if missing else taken
            places = np.arange(start * each, stop * each, dtype=np.int64)
            numbers += [stream.first_row * each + places, np.full(missing * each, PADDING)]
        return _assemble(self._schema, parts, np.concatenate(numbers), self.order.step_rows(within) / self._world_size)

    def decode(self, partition: int, epoch: int, window: int, groups: tuple[int, ...]) -> Rows:
        """One window of one partition, its rows in the order of `epoch`."""
        table = pa.concat_tables([self._source.read(group) for group in groups])
        each = self.together
        permutation = self.order.permutation(partition, epoch, window, table.num_rows // each)
        if permutation is not None and each > 1:
            permutation = (permutation[:, None] * each + np.arange(each)).ravel()
        return _decode(table, self._schema, permutation)


class _Stream:
    """The rows of one partition in one epoch, from a step on; the window after the current one is decoded ahead."""

    def __init__(self, loader: Loader, pool: ThreadPoolExecutor, partition: int, epoch: int, step: int) -> None:
        order = loader.order
        self.partition = partition
        self._loader, self._pool, self._epoch, self._together = loader, pool, epoch, loader.together
        self._windows = order.windows(partition, epoch)
        self.first_row = order.first_row(partition, epoch)
        start = order.share(partition, step)[0]
        sizes = [sum(order.group_rows[group] for group in window) for window in self._windows]
        self._begins = np.cumsum([0, *sizes])
        self._current = int(np.searchsorted(self._begins, start, side="right")) - 1
        self._rows: Rows | None = None
        self._next = self._ahead(self._current)

    def take(self, start: int, stop: int) -> list[Rows]:
        """Rows `start` to `stop - 1` of the sequence."""
        parts = []
        while start < stop:
            if self._rows is None or start >= self._begins[self._current + 1]:
                self._advance()
            begin, end = self._begins[self._current], min(stop, self._begins[self._current + 1])
            assert self._rows is not None
            each = self._together
            parts.append(self._rows[(start - begin) * each : (end - begin) * each])
            start = end
        return parts

    def _advance(self) -> None:
        if self._rows is not None:
            self._current += 1
        assert self._next is not None
        self._rows = self._next.result()
        self._next = self._ahead(self._current + 1)

    def _ahead(self, window: int) -> "Future[Rows] | None":
        if window >= len(self._windows):
            return None
        return self._pool.submit(self._loader.decode, self.partition, self._epoch, window, self._windows[window])


def feature_names(schema: FeatureSchema) -> list[str]:
    """Keys of a batch's KeyedJaggedTensor: single-valued features first, then lists."""
    return [f.name for f in schema.features if not f.pooling] + [f.name for f in schema.features if f.pooling]


def _decode(table: pa.Table, schema: FeatureSchema, permutation: Ints | None) -> Rows:
    def stack(names: list[str], dtype: type) -> npt.NDArray[Any]:
        lines = np.empty((len(names), table.num_rows), dtype)
        for name, line in zip(names, lines, strict=True):
            values = table[name].to_numpy().astype(dtype, copy=False)
            if permutation is None:
                line[:] = values
            else:
                # A permutation is never out of range: clipping only spares numpy a copy in case it were.
                values.take(permutation, out=line, mode="clip")
        return lines

    # In most data no label has either: then all weights are one number, that is not written down row by row.
    weights = np.broadcast_to(np.float32(1), (len(schema.labels), table.num_rows))
    if any(label.weight or label.mask for label in schema.labels):
        weights = weights.copy()
        for line, label in zip(weights, schema.labels, strict=True):
            for (factor,) in (stack([name], np.float32) for name in (label.weight, label.mask) if name):
                line *= factor

    (scenario,) = stack([schema.scenario], np.int32)
    most = max(OPEN_IDS if each.is_open else each.rows * schema.copies(each) for each in schema.tables)
    return Rows(
        ids=_own(
            stack([f.name for f in schema.features if not f.pooling], np.int32 if most < 1 << 31 else np.int64),
            scenario,
            schema,
        ),
        lists=tuple(
            _own_list(_decode_list(table[f.name], permutation), f, scenario, schema)
            for f in schema.features
            if f.pooling
        ),
        numeric=stack([numeric.name for numeric in schema.numerics], np.float32),
        scenario=scenario,
        labels=stack([label.name for label in schema.labels], np.uint8),
        weights=weights,
    )


def _own(ids: Narrow, scenario: Narrow, schema: FeatureSchema) -> Narrow:
    """`ids` `[F, n]` where the tables of some features hold vectors for each scenario: see `Table.per_scenario`."""
    for line, feature in zip(ids, (f for f in schema.features if not f.pooling), strict=True):
        copies = schema.copies(schema.table(feature.table))
        if copies > 1:
            line *= copies
            line += np.array(schema.owners(), line.dtype)[scenario]
    return ids


def _own_list(
    column: tuple[Ints, Ints], feature: Feature, scenario: Narrow, schema: FeatureSchema
) -> tuple[Ints, Ints]:
    values, offsets = column
    copies = schema.copies(schema.table(feature.table))
    if copies > 1:
        owner = np.array(schema.owners())[scenario]
        values = values[offsets[0] : offsets[-1]] * copies + np.repeat(owner, np.diff(offsets))
        offsets = offsets - offsets[0]
    return values, offsets


def _decode_list(column: pa.ChunkedArray, permutation: Ints | None) -> tuple[Ints, Ints]:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if permutation is not None:
        array = array.take(pa.array(permutation))
    offsets = array.offsets.to_numpy().astype(np.int64)
    return array.values.to_numpy(), offsets


def _assemble(schema: FeatureSchema, parts: list[Rows], numbers: Ints, rows_per_rank: float) -> ScenarioBatch:
    flat = [
        (values[offsets[0] : offsets[-1]], np.diff(offsets))
        for of_parts in zip(*(part.lists for part in parts), strict=True)
        for values, offsets in of_parts
    ]
    features, rows = len(parts[0].ids), len(numbers)
    values = np.empty(features * rows + sum(len(each) for each, _ in flat), np.int64)
    _side_by_side([part.ids for part in parts], values[: features * rows].reshape(features, rows))
    if flat:
        np.concatenate([each for each, _ in flat], out=values[features * rows :])
    return ScenarioBatch(
        ids=KeyedJaggedTensor(
            keys=feature_names(schema),
            values=torch.from_numpy(values),
            lengths=torch.cat([_ones(features * rows), *(torch.from_numpy(each) for _, each in flat)])
            if flat
            else _ones(features * rows),
        ),
        numeric=_rows_first([part.numeric for part in parts], rows),
        scenario=torch.from_numpy(np.concatenate([part.scenario for part in parts], dtype=np.int64)),
        labels=_rows_first([part.labels for part in parts], rows),
        weights=_rows_first([part.weights for part in parts], rows),
        row=torch.from_numpy(numbers),
        rows_per_rank=rows_per_rank,
    )


@lru_cache(maxsize=4)
def _ones(count: int) -> torch.Tensor:
    """The lengths of single-valued features, which are the same in nearly all batches."""
    return torch.ones(count, dtype=torch.int64)


def _rows_first(parts: Sequence[Narrow], rows: int) -> torch.Tensor:
    """`[.., n]` of all parts -> one `[rows, ..]` fp32 tensor."""
    whole = np.empty((rows, len(parts[0])), np.float32)
    _side_by_side(parts, whole.T)
    return torch.from_numpy(whole)


def _side_by_side(parts: Sequence[Narrow], whole: npt.NDArray[Any]) -> None:
    """Write `[.., n]` of all parts into `whole`, one after the other along its last axis."""
    start = 0
    for part in parts:
        stop = start + part.shape[1]
        whole[:, start:stop] = part
        start = stop
