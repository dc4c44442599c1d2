"""Row groups of canonical parquet files, read and checked."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from msr_dist.data.places import Place, Remote, one_line, store_failure
from msr_dist.schema import OPEN_IDS, FeatureSchema

TypeCheck = Callable[[pa.DataType], bool]
_FOOTERS_AT_ONCE = 16


@dataclass(frozen=True)
class RowGroup:
    """One row group of one file."""

    file: Place
    index: int
    rows: int

    def __str__(self) -> str:
        return f"{self.file}, row group {self.index}"


class Lists(NamedTuple):
    """A column of lists."""

    values: npt.NDArray[Any]
    """Of all rows, one after the other."""
    lengths: npt.NDArray[np.signedinteger[Any]]
    """How many each row has: `[rows]`."""


Column = npt.NDArray[Any] | Lists
"""One value per row, or any number."""


class ParquetSource:
    """The parquet files of one split, whose row groups it reads one by one.

    Every value that it hands out has been checked against the schema: no nulls, ids within their tables, labels and
    scenarios known, numbers finite.
    """

    def __init__(self, folder: Place, schema: FeatureSchema) -> None:
        """Read the footers of `folder`'s files.

        Raises:
            ValueError: one is damaged or does not match the schema.
            OSError: the object store that holds them fails, here or in `read`.
        """
        self.schema = schema
        self.columns = schema.columns()
        self._bounds = {column: (most, what) for column, most, what in _bounds(schema)}
        files: list[Place] = sorted(folder.glob("*.parquet"))
        if not files:
            raise ValueError(f"{folder}: no parquet files there; make the data with `msr-dist prepare`")
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
            self._opened = dict(zip(files, pool.map(_open, files), strict=True))
        footers = {file: opened.footer for file, opened in self._opened.items()}
        for file, metadata in footers.items():
            self._check_columns(file, metadata.schema.to_arrow_schema())
        self.row_groups = [
            RowGroup(file, index, metadata.row_group(index).num_rows)
            for file, metadata in footers.items()
            for index in range(metadata.num_row_groups)
        ]
        empty = next((file for file, metadata in footers.items() if metadata.num_rows == 0), None)
        if empty is not None:
            raise ValueError(f"{empty}: holds no rows; remove the file, or prepare the data again")

    def read(self, group: int) -> dict[str, Column]:
        """The columns of `FeatureSchema.columns` of one row group."""
        where = self.row_groups[group]
        opened = self._opened[where.file]
        try:
            # Buffered ahead, the columns of a row group come in one request, as far as they lie side by side.
            with pq.ParquetFile(opened.source, metadata=opened.footer, pre_buffer=True) as file:
                table = file.read_row_group(where.index, columns=self.columns, use_threads=False).combine_chunks()
        except (OSError, pa.ArrowInvalid) as error:
            if (failure := store_failure(error)) is not None:
                raise OSError(f"{where}: {failure}") from None
            raise ValueError(f"{where}: cannot be read, the file is damaged ({one_line(error)})") from None
        (batch,) = table.to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
        columns = zip(batch.schema.names, batch.columns, strict=True)
        return {name: self._checked(where, name, array) for name, array in columns}

    def _checked(self, where: RowGroup, name: str, array: pa.Array) -> Column:
        def faulty(what: str) -> ValueError:
            return ValueError(f"{where}, column {name!r}: {what}; prepare the data again")

        if nulls := array.null_count:
            raise faulty(f"{nulls} nulls")
        lists = isinstance(array, pa.ListArray | pa.LargeListArray)
        flat = array.flatten() if lists else array
        if nulls := flat.null_count:
            raise faulty(f"{nulls} nulls within lists")
        values = flat.to_numpy(zero_copy_only=False)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise faulty("NaN or infinite values")
        if name in self._bounds and self._outside(name, values):
            most, what = self._bounds[name]
            worst = values.min() if values.min() < 0 else values.max()
            raise faulty(f"value {worst}, but {what} run from 0 to {most}")
        return Lists(values, np.diff(array.offsets.to_numpy())) if lists else values

    def _outside(self, name: str, values: npt.NDArray[Any]) -> bool:
        if values.dtype.kind == "b":
            return False
        if values.dtype.kind == "f":
            return bool(values.min(initial=0) < 0)
        # Once over them: seen as unsigned, negative numbers are huge.
        return bool(values.view(_UNSIGNED[values.itemsize]).max(initial=0) > self._bounds[name][0])

    def _check_columns(self, file: Place, found: pa.Schema) -> None:
        for column, (expected, accepted) in self._expected_types().items():
            if column not in found.names:
                raise ValueError(
                    f"{file}: column {column!r} of the schema is absent; it has {', '.join(found.names)}. "
                    "Prepare the data again, or correct schema.toml"
                )
            if not accepted(found.field(column).type):
                raise ValueError(
                    f"{file}, column {column!r}: type {found.field(column).type}, but the schema wants {expected}; "
                    "prepare the data again, or correct schema.toml"
                )

    def _expected_types(self) -> dict[str, tuple[str, TypeCheck]]:
        schema = self.schema
        expected: dict[str, tuple[str, TypeCheck]] = {schema.scenario: ("an integer", pa.types.is_integer)}
        for feature in schema.features:
            expected[feature.name] = ("a list of integers", _is_id_list) if feature.pooling else ("int64", _is_id)
        for numeric in schema.numerics:
            expected[numeric.name] = ("a floating point number", pa.types.is_floating)
        for label in schema.labels:
            expected[label.name] = ("0 or 1 as an integer", _is_label)
            if label.mask:
                expected[label.mask] = ("a boolean", pa.types.is_boolean)
            if label.weight:
                expected[label.weight] = ("a floating point number", pa.types.is_floating)
        return expected


def _bounds(schema: FeatureSchema) -> Iterator[tuple[str, float, str]]:
    """Column, the most that its values may be, and what they are; the least is 0."""
    for feature in schema.features:
        table = schema.table(feature.table)
        most, having = (OPEN_IDS, "an open vocabulary") if table.is_open else (table.rows, f"{table.rows} rows")
        yield feature.name, most - 1, f"ids of table {table.name!r} with {having}"
    yield schema.scenario, len(schema.scenarios) - 1, "scenarios"
    for label in schema.labels:
        yield label.name, 1, "labels"
        if label.weight:
            yield label.weight, float("inf"), "weights"


def _is_id(found: pa.DataType) -> bool:
    return bool(found == pa.int64())


def _is_label(found: pa.DataType) -> bool:
    return bool(pa.types.is_integer(found) or pa.types.is_boolean(found))


def _is_id_list(found: pa.DataType) -> bool:
    return _is_list(found) and bool(found.value_type == pa.int64())


def _is_list(found: pa.DataType) -> bool:
    return bool(pa.types.is_list(found) or pa.types.is_large_list(found))


_UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


@dataclass(frozen=True)
class _Opened:
    """A file whose footer is known."""

    source: Path | pa.NativeFile
    """A file of an object store stays open: to open it takes a round trip, and being open takes nothing."""
    footer: pq.FileMetaData


def _open(file: Place) -> _Opened:
    source = file.open() if isinstance(file, Remote) else file
    try:
        return _Opened(source, pq.read_metadata(source))
    except (OSError, pa.ArrowInvalid) as error:
        if (failure := store_failure(error)) is not None:
            raise OSError(f"{file}: {failure}") from None
        raise ValueError(
            f"{file}: not a readable parquet file, it may be truncated ({one_line(error)}); prepare the data again"
        ) from None
