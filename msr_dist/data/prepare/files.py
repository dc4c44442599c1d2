"""A user's own parquet or CSV files as a view of the database, checked before the work and located in messages."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from glob import glob
from itertools import accumulate
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from msr_dist.data.prepare.database import Database, first_line, quoted, text
from msr_dist.data.prepare.mapping import ROW, Relation

PARQUET = (".parquet", ".pq")
CSV = (".csv", ".tsv", ".csv.gz", ".tsv.gz")


def open_files(database: Database, view: str, patterns: Sequence[str], key: str) -> Relation:
    """A view over the files that `patterns` (paths or globs) name; `key` is the configuration's, for messages."""
    files = _find(patterns, key)
    if all(file.name.endswith(PARQUET) for file in files):
        return _open_parquet(database, view, files)
    if all(file.name.endswith(CSV) for file in files):
        return _open_csv(database, view, files)
    endings = ", ".join(sorted({file.suffix or file.name for file in files}))
    raise ValueError(f"{key}: files end in {endings}; give either parquet (.parquet) or CSV (.csv, .tsv, .csv.gz)")


def column_type(relation: Relation, column: str, key: str) -> str:
    """The DuckDB type of a raw column; ValueError with the nearest name where there is none."""
    if column in relation.types and column != ROW:
        return relation.types[column]
    known = [name for name in relation.types if name != ROW]
    close = difflib.get_close_matches(column, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"columns: {', '.join(known)}"
    raise ValueError(f"{relation.where}: no column {column!r} ({key}); {hint}")


def _find(patterns: Sequence[str], key: str) -> list[Path]:
    files: list[Path] = []
    for pattern in patterns:
        # Not Path.glob: that one takes no absolute patterns.
        found = sorted(Path(name) for name in glob(pattern, recursive=True) if Path(name).is_file())  # noqa: PTH207
        if not found:
            raise ValueError(f"{key}: no file matches {pattern!r}; give paths or globs of parquet or CSV files")
        files += [file for file in found if file not in files]
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{file}: the file is empty ({key}); remove it or write it again")
    return files


def _open_parquet(database: Database, view: str, files: Sequence[Path]) -> Relation:
    footers = {file: _footer(file) for file in files}
    _same_columns(files, {file: footer.schema.to_arrow_schema().names for file, footer in footers.items()})
    starts = dict(zip(files, accumulate([0, *(footer.num_rows for footer in footers.values())]), strict=False))
    if not sum(footer.num_rows for footer in footers.values()):
        raise ValueError(f"{_where(files)}: no rows in there; give files with rows")
    # A file's own row numbers, which DuckDB reads in parallel, plus where the file begins.
    offset = f"CAST(map({_list(files)}, [{', '.join(map(str, starts.values()))}])[__file] AS BIGINT)"
    source = f"read_parquet({_list(files)}, filename = '__file', file_row_number = true)"
    columns = f"* EXCLUDE (__file, file_row_number), {offset if len(files) > 1 else 0} + file_row_number AS {ROW}"
    _view(database, view, f"SELECT {columns} FROM {source}", _where(files))

    def locate(row: int) -> str:
        file = max((file for file in files if starts[file] <= row), key=lambda file: starts[file])
        return f"{file}, row {row - starts[file]}, row group {_group(footers[file], row - starts[file])}"

    return Relation(view, _where(files), database.types(view), locate, tuple(files))


def _open_csv(database: Database, view: str, files: Sequence[Path]) -> Relation:
    _same_columns(files, {file: _header(database, file) for file in files})
    source = f"read_csv({_list(files)}, header = true)"
    # Numbering in the order of the text needs one thread; the parser itself stays the slower part.
    _view(database, view, f"SELECT *, row_number() OVER () - 1 AS {ROW} FROM {source}", _where(files))
    if not database.row(f"SELECT count(*) FROM (SELECT 1 FROM {quoted(view)} LIMIT 1)")[0]:
        raise ValueError(f"{_where(files)}: no rows in there; give files with rows")

    def locate(row: int) -> str:
        for file in files:
            held = database.row(f"SELECT count(*) FROM read_csv({_list([file])}, header = true)")[0]
            if row < held:
                return f"{file}, row {row}"
            row -= held
        raise AssertionError("the row is beyond the files")

    return Relation(view, _where(files), database.types(view), locate, tuple(files))


def explain(error: Exception, relations: Iterable[Relation]) -> ValueError:
    """What to raise for an error while raw rows were read: the damaged file and row group, if that is the cause."""
    for relation in relations:
        for file in relation.files:
            damage = _damage(file) if file.name.endswith(PARQUET) else None
            if damage:
                return ValueError(damage)
    return ValueError(first_line(error))


def _damage(file: Path) -> str | None:
    with pq.ParquetFile(file) as parquet:
        for group in range(parquet.num_row_groups):
            try:
                parquet.read_row_group(group, use_threads=False)
            except (pa.ArrowException, OSError) as error:
                return f"{file}, row group {group}: cannot be read ({first_line(error)}); write the file again"
    return None


def _footer(file: Path) -> pq.FileMetaData:
    try:
        with pq.ParquetFile(file) as parquet:
            return parquet.metadata
    except (pa.ArrowException, OSError) as error:
        message = f"{file}: not a complete parquet file ({first_line(error)}); write it again"
        raise ValueError(message) from None


def _header(database: Database, file: Path) -> list[str]:
    try:
        described = database.rows(f"DESCRIBE SELECT * FROM read_csv({_list([file])}, header = true)")
    except duckdb.Error as error:
        raise ValueError(f"{file}: not a CSV file with a header ({first_line(error)})") from None
    return [row[0] for row in described]


def _view(database: Database, view: str, sql: str, where: str) -> None:
    try:
        database.execute(f"CREATE VIEW {quoted(view)} AS {sql}")
    except duckdb.Error as error:
        raise ValueError(f"{where}: {first_line(error)}") from None


def _same_columns(files: Sequence[Path], columns: Mapping[Path, Sequence[str]]) -> None:
    for file in files[1:]:
        for one, other in ((files[0], file), (file, files[0])):
            lacking = [name for name in columns[one] if name not in columns[other]]
            if lacking:
                raise ValueError(
                    f"{other}: no column {lacking[0]!r}, which {one} has; files must have the same columns"
                )


def _group(footer: pq.FileMetaData, row: int) -> int:
    group = 0
    while row >= footer.row_group(group).num_rows:
        row -= footer.row_group(group).num_rows
        group += 1
    return group


def _list(files: Sequence[Path]) -> str:
    return "[" + ", ".join(text(str(file)) for file in files) + "]"


def _where(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
