"""Files of a store: parquet and JSON that are whole or absent, with checksums that every reader compares."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from msr_dist.config import Config, parse
from msr_dist.files import digest_of, whole

FORMAT = 1
MANIFEST_FILE = "manifest.json"
_GROUP_ROWS = 2048
"""Rows of a row group: what a reader holds at a time, 16 MiB at a width of 4,096."""

F = TypeVar("F", bound=Config)


class StoredFile(Config):
    """One file of a store."""

    file: str = Field(pattern=r"^(\w+/)?[\w-]+\.parquet$")
    """Its path within the folder of the manifest."""
    rows: int = Field(ge=0)
    sha256: str


def stored_file(folder: Path, file: Path, rows: int) -> StoredFile:
    """What a manifest in `folder` says of `file`."""
    return StoredFile(file=file.relative_to(folder).as_posix(), rows=rows, sha256=digest_of(file))


def check(folder: Path, stored: StoredFile) -> None:
    """Compare a file with its manifest; ValueError where it is absent or differs."""
    file = folder / stored.file
    if not file.is_file():
        raise ValueError(f"{file}: is absent; make it again")
    if digest_of(file) != stored.sha256:
        raise ValueError(f"{file}: is damaged, its checksum is not the manifest's; remove it and make it again")


def write_table(file: Path, table: pa.Table) -> None:
    """Write `file` whole or not at all, with a checksum on every page."""
    with writing(file, table.schema) as writer:
        writer.write_table(table, row_group_size=_GROUP_ROWS)


@contextmanager
def writing(file: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A writer of `file`, which is whole when the block ends and absent where it fails."""
    # Nothing is gained by compressing the bits of floating point numbers.
    settings = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    with whole(file) as opened, pq.ParquetWriter(opened, schema, **settings) as writer:
        yield writer


def write_json(file: Path, config: Config) -> None:
    """Write `config` as JSON, whole or not at all."""
    with whole(file) as opened:
        opened.write((json.dumps(config.model_dump(mode="json"), indent=1) + "\n").encode())


def read_manifest(file: Path, cls: type[F]) -> F:
    """Read a manifest; ValueError where it is damaged or of a format that this version does not know."""
    try:
        raw = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read, the file is damaged ({_one_line(error)})") from None
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        raise ValueError(f"{file}: has format {found!r}, this version of msr-dist reads {FORMAT}; make it again")
    return parse(cls, raw, where=str(file))


def unpack(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """A column of lists of one length as an array `[N, width]`."""
    width = column.type.list_size
    return np.asarray(column.combine_chunks().flatten().to_numpy(zero_copy_only=False)).reshape(-1, width)


def pack(vectors: npt.NDArray[Any]) -> pa.Array:
    """An array `[N, width]` as a column of lists of one length."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def read_table(file: Path, columns: list[str] | None = None) -> pa.Table:
    """The whole of `file`, for files that are small; ValueError where it is damaged."""
    with reading(file, columns or []) as parquet:
        return parquet.read(columns=columns, use_threads=False)


def row_groups(file: Path, columns: list[str]) -> Iterator[pa.Table]:
    """The row groups of `file`, one at a time; ValueError where one is damaged."""
    with reading(file, columns) as parquet:
        for group in range(parquet.num_row_groups):
            yield parquet.read_row_group(group, columns=columns, use_threads=False)


@contextmanager
def reading(file: Path, columns: list[str]) -> Iterator[pq.ParquetFile]:
    """`file`, which has `columns`, opened; a ValueError names it in the place of whatever damaged bytes lead to."""
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            absent = sorted(set(columns) - set(parquet.schema_arrow.names))
            if absent:
                raise ValueError(f"{file}: has no column {absent[0]!r}; it has {', '.join(parquet.schema_arrow.names)}")
            yield parquet
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file}: cannot be read, it is absent or damaged ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
