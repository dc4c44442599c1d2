"""A user's own parquet or CSV files as a view of the database, checked before the work and located in messages."""

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
OTHER_DELIMITERS = (",", ";", "\t", "|")
"""What to look for in a header that has not the delimiter that was given."""
IS_TEXT = "give parquet if the column is text: its first rows do not show it"
REJECTS = ", store_rejects = true, rejects_limit = 100"
"""Options of DuckDB's reader: go on after bad lines, and list them."""


@dataclass(frozen=True)
class Layout:
    """How CSV files are written, where their own text does not say so."""

    delimiter: str = ","
    names: tuple[str, ...] = ()
    """The columns of files that have no header."""
    types: Mapping[str, str] = field(default_factory=dict)
    """Column -> DuckDB type; those of other columns are found in the first rows."""
    quotes: bool = True
    """Whether fields may stand in quotes; otherwise a quote is a letter like any other."""


def open_files(
    database: Database,
    view: str,
    patterns: Sequence[str],
    key: str,
    delimiter: str = ",",
    layout: Layout | None = None,
) -> Relation:
    """A view over the files that `patterns` (paths or globs) name; `key` is the configuration's, for messages.

    `delimiter` separates the fields of .csv files; those of .tsv files are separated by tabs. `layout` says more.
    """
    layout = layout or Layout(delimiter)
    files = _find(patterns, key)
    if all(file.name.endswith(PARQUET) for file in files):
        return _open_parquet(database, view, files)
    if all(file.name.endswith(CSV) for file in files):
        tabs = [".tsv" in file.suffixes[-2:] for file in files]
        if any(tabs) and not all(tabs):
            raise ValueError(f"{key}: some of the files are .tsv and some .csv; give files of one kind")
        return _open_csv(database, view, files, replace(layout, delimiter="\t") if any(tabs) else layout)
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

    return Relation(view, _where(files), database.types(view), locate, lambda: _damaged_group(files))


def _open_csv(database: Database, view: str, files: Sequence[Path], layout: Layout) -> Relation:
    _same_columns(files, headers := {file: _header(database, file, layout) for file in files})
    # DuckDB refuses types of columns that are not there; whoever uses them says so better.
    layout = replace(layout, types={name: kind for name, kind in layout.types.items() if name in headers[files[0]]})
    source = _read_csv(files, layout)
    # Numbering in the order of the text needs one thread; the parser itself stays the slower part.
    _view(database, view, f"SELECT *, row_number() OVER () - 1 AS {ROW} FROM {source}", _where(files))
    try:
        rows = database.row(f"SELECT count(*) FROM (SELECT 1 FROM {quoted(view)} LIMIT 1)")[0]
    except duckdb.Error as error:
        raise ValueError(_csv_fault(database, files, layout) or f"{_where(files)}: {first_line(error)}") from None
    if not rows:
        raise ValueError(f"{_where(files)}: no rows in there; give files with rows")

    def locate(row: int) -> str:
        for file in files:
            held = database.row(f"SELECT count(*) FROM {_read_csv([file], layout)}")[0]
            if row < held:
                # Without quotes, no field goes over several lines.
                return f"{file}, row {row}" if layout.quotes else f"{file}, line {row + 1 + (not layout.names)}"
            row -= held
        raise AssertionError("the row is beyond the files")

    return Relation(view, _where(files), database.types(view), locate, lambda: _csv_fault(database, files, layout))


def without(
    database: Database, relation: Relation, view: str, column: str, values: Collection[int | str]
) -> tuple[Relation, int]:
    """`relation` less the rows whose `column` holds one of `values`, as the view `view`; and how many those are."""
    if not values:
        return relation, 0
    listed = ", ".join(text(value) if isinstance(value, str) else str(value) for value in values)
    among = f"coalesce({quoted(column)} IN ({listed}), false)"
    database.execute(f"CREATE VIEW {quoted(view)} AS SELECT * FROM {quoted(relation.view)} WHERE NOT {among}")
    try:
        (left_out,) = database.row(f"SELECT count(*) FROM {quoted(relation.view)} WHERE {among}")
    except duckdb.Error as error:
        raise explain(error, [relation]) from None
    return replace(relation, view=view), left_out


def explain(error: Exception, relations: Iterable[Relation]) -> ValueError:
    """What to raise for an error while raw rows were read: where files are damaged, if that is the cause."""
    faults = (relation.fault() for relation in relations)
    return ValueError(next(filter(None, faults), first_line(error)))


def _damaged_group(files: Sequence[Path]) -> str | None:
    """The first row group of parquet files that cannot be read."""
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for group in range(parquet.num_row_groups):
                try:
                    parquet.read_row_group(group, use_threads=False)
                except (pa.ArrowException, OSError) as error:
                    return f"{file}, row group {group}: cannot be read ({first_line(error)}); write the file again"
    return None


def _read_csv(files: Sequence[Path], layout: Layout, more: str = "") -> str:
    """SQL that reads CSV files: everything about the dialect is settled, so that a bad line cannot make it another."""
    quote = text('"' if layout.quotes else "")
    dialect = f"delim = {text(layout.delimiter)}, quote = {quote}, escape = {quote}, comment = '', skip = 0"
    dialect += f", header = {not layout.names}"
    if layout.names:
        dialect += f", names = [{', '.join(map(text, layout.names))}]"
    if layout.types:
        types = ", ".join(f"{text(name)}: {text(kind)}" for name, kind in layout.types.items())
        dialect += f", types = {{{types}}}"
    return f"read_csv({_list(files)}, {dialect}{more})"


def _csv_fault(database: Database, files: Sequence[Path], layout: Layout) -> str | None:
    """The first line of CSV files that cannot be read: file, line, what is wrong and what to do."""
    source = _read_csv(files, layout, REJECTS)
    try:
        with database.single_threaded():  # With several threads, the limit might be spent on later lines.
            database.rows(f"SELECT count(COLUMNS(*)) FROM {source}")
        found = database.rows(
            "SELECT file_path, line, error_type, column_name, left(csv_line, 80), error_message "
            "FROM reject_errors JOIN reject_scans USING (scan_id, file_id) ORDER BY file_id, line, column_idx LIMIT 1"
        )
    except duckdb.Error:
        return None
    if not found:
        return None
    file, line, kind, column, content, message = found[0]
    what, advice = {
        "MISSING COLUMNS": (
            f"no field for column {column!r}",
            "complete or remove it; if the file was cut, write it again",
        ),
        "TOO MANY COLUMNS": ("more fields than the header", "put quotes around fields that contain the delimiter"),
        "UNQUOTED VALUE": ("a quote that is not closed", "close it; a quote within a field is written twice"),
        "CAST": (
            str(message).removeprefix("Error when converting ").replace(". Could", ": could"),
            "correct it" + ("" if str(column) in layout.types else f", or {IS_TEXT}"),
        ),
        "INVALID ENCODING": ("it is not UTF-8", "write the file in UTF-8"),
    }.get(str(kind), (first_line(Exception(message)), "correct it"))
    return f"{file}, line {line}: {what} in {content!r}; {advice}"


def _footer(file: Path) -> pq.FileMetaData:
    try:
        with pq.ParquetFile(file) as parquet:
            return parquet.metadata
    except (pa.ArrowException, OSError) as error:
        message = f"{file}: not a complete parquet file ({first_line(error)}); write it again"
        raise ValueError(message) from None


def _header(database: Database, file: Path, layout: Layout) -> list[str]:
    names: list[str] = []
    layout = replace(layout, types={})
    delimiter = layout.delimiter
    try:
        # First without regard to bad lines: with the wrong delimiter, all lines may be bad.
        for more in (REJECTS, ""):
            names = [row[0] for row in database.rows(f"DESCRIBE SELECT * FROM {_read_csv([file], layout, more)}")]
            other = next((other for other in OTHER_DELIMITERS if len(names) == 1 and other in names[0]), None)
            if other:
                where = f"{file}: the header {names[0]!r}"
                raise ValueError(f"{where} has no delimiter {delimiter!r}; set delimiter={other!r}")
    except duckdb.Error:
        fault = _csv_fault(database, [file], layout)
        advice = "it needs a header, as many fields in each line, and closed quotes"
        raise ValueError(fault or f"{file}: not CSV with the delimiter {delimiter!r}; {advice}") from None
    return names


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
