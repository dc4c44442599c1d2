"""Writes one split: row groups of nearly equal sizes, since training reads them as its unit of order."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from msr_dist.schema import FeatureSchema, Table

Compression = Literal["lz4", "zstd"]

LEAST_GROUPS = 96
"""Row groups of a split of at least as many rows. Ranks share a split by row groups: 96 divides evenly among 1, 2, 3,
4, 6, 8, 12, 16, 24, 32, 48 and 96 of them."""
_FEW_IDS = 4096
"""Of a table whose ids a row group repeats so often that a dictionary of them is small."""


def group_bounds(rows: int, row_group_rows: int, together: int = 1) -> list[int]:
    """Where row groups begin, and `rows` at the end: sizes differ by one at most.

    Rows that belong `together`, so many at a time, are in one group; sizes differ by so many at most.
    """
    units = rows // together
    groups = max(min(units, LEAST_GROUPS), -(-rows // row_group_rows))
    return [group * units // groups * together for group in range(groups + 1)] if rows else [0]


def arrow_schema(schema: FeatureSchema) -> pa.Schema:
    """Columns and types of a split's files. All but the time are declared free of nulls, which are slow to look for."""
    ids = pa.field("element", pa.int64(), nullable=False)
    kinds: dict[str, pa.DataType] = {f.name: pa.list_(ids) if f.pooling else ids.type for f in schema.features}
    kinds |= {numeric.name: pa.float32() for numeric in schema.numerics}
    for label in schema.labels:
        kinds |= {label.name: pa.uint8()}
        kinds |= {label.mask: pa.bool_()} if label.mask else {}
        kinds |= {label.weight: pa.float32()} if label.weight else {}
    kinds[schema.scenario] = pa.int32()
    fields = [pa.field(name, kind, nullable=False) for name, kind in kinds.items()]
    return pa.schema([*fields, pa.field(schema.time, pa.int64())] if schema.time else fields)


def write_split(
    folder: Path,
    schema: FeatureSchema,
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
    columns = arrow_schema(schema)
    settings = {"compression": compression} | _encodings(schema, columns)
    for file in range(files):
        with pq.ParquetWriter(folder / f"part-{file:05d}.parquet", columns, **settings) as writer:
            for size in sizes[file * len(sizes) // files : (file + 1) * len(sizes) // files]:
                writer.write_table(next(groups).select(columns.names).cast(columns), row_group_size=size)
    if next(groups, None) is not None:
        raise AssertionError(f"{folder.name}: more rows than the {rows} that were counted")


def _encodings(schema: FeatureSchema, columns: pa.Schema) -> dict[str, Any]:
    """Ids of large tables, and times, as planes of bytes, many of which are all alike; of the rest, a dictionary.

    A dictionary of nearly as many ids as rows takes twice the room and time. Hashed ids have no zeros, but repeat.
    """

    def in_planes(table: Table) -> bool:
        return table.rows > _FEW_IDS and not table.is_open

    leaves = {f.name: f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name for f in columns}
    planes = {leaves[f.name] for f in schema.features if in_planes(schema.table(f.table))}
    planes |= {schema.time} if schema.time else set()
    return {
        "use_dictionary": [leaf for leaf in leaves.values() if leaf not in planes],
        "column_encoding": dict.fromkeys(planes, "BYTE_STREAM_SPLIT"),
    }


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
