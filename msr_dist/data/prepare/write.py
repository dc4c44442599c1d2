"""Writes one split: row groups of nearly equal sizes, since training reads them as its unit of order."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

Compression = Literal["lz4", "zstd"]

LEAST_GROUPS = 96
"""Row groups of a split of at least as many rows. Ranks share a split by row groups: 96 divides evenly among 1, 2, 3,
4, 6, 8, 12, 16, 24, 32, 48 and 96 of them."""


def group_bounds(rows: int, row_group_rows: int, together: int = 1) -> list[int]:
    """Where row groups begin, and `rows` at the end: sizes differ by one at most.

    Rows that belong `together`, so many at a time, are in one group; sizes differ by so many at most.
    """
    units = rows // together
    groups = max(min(units, LEAST_GROUPS), -(-rows // row_group_rows))
    return [group * units // groups * together for group in range(groups + 1)] if rows else [0]


def write_split(
    folder: Path,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    rows: int,
    row_group_rows: int,
    file_rows: int,
    together: int = 1,
    compression: Compression = "lz4",
) -> None:
    """Write `rows` rows, in the order of `batches`, to part-00000.parquet, part-00001.parquet, ... of `folder`."""
    folder.mkdir(parents=True)
    bounds = group_bounds(rows, row_group_rows, together)
    sizes = [end - begin for begin, end in pairwise(bounds)]
    groups = regroup(batches, sizes)
    files = max(1, -(-rows // file_rows))
    for file in range(files):
        with pq.ParquetWriter(folder / f"part-{file:05d}.parquet", schema, compression=compression) as writer:
            for size in sizes[file * len(sizes) // files : (file + 1) * len(sizes) // files]:
                writer.write_table(next(groups).cast(schema), row_group_size=size)
    if next(groups, None) is not None:
        raise AssertionError(f"{folder.name}: more rows than the {rows} that were counted")


def regroup(batches: Iterable[pa.RecordBatch], sizes: Iterable[int]) -> Iterator[pa.Table]:
    """The rows of `batches` as tables of exactly `sizes` rows; what is left over comes as one more."""
    stream = iter(batches)
    rest: list[pa.RecordBatch] = []
    for size in sizes:
        while sum(batch.num_rows for batch in rest) < size:
            batch = next(stream, None)
            if batch is None:
                raise AssertionError("fewer rows than were counted")
            rest.append(batch)
        table = pa.Table.from_batches(rest)
        rest = table.slice(size).to_batches()
        yield table.slice(0, size)
    for batch in [*rest, *stream]:
        if batch.num_rows:
            yield pa.Table.from_batches([batch])
