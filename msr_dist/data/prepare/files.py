"""Raw parquet and CSV files as views or tables of the database, checked before the work and located in messages."""

import csv
import difflib
import gzip
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import glob
from itertools import accumulate
from pathlib import Path
from typing import IO

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from msr_dist.data.prepare.database import Database, first_line, is_integer, quoted, text
from msr_dist.data.prepare.mapping import ROW, Relation

PARQUET = (".parquet", ".pq")
CSV = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
OTHER_DELIMITERS = (",", ";", "\t", "|")
"""What to look for in a header that has not the delimiter that was given."""
REJECTS = ", store_rejects = true, rejects_limit = 100"
"""Options of DuckDB's reader: go on after bad lines, and list them."""


@dataclass(frozen=True)
class Layout:
    """How text files are written, where their own text does not say so."""

    delimiter: str = ","
    names: tuple[str, ...] = ()
    """The columns of files that have no header."""
    types: Mapping[str, str] = field(default_factory=dict)
    """Column -> DuckDB type. All other columns are text then; without any, types are found in the first rows."""
    quotes: bool = True
    """Whether fields may stand in quotes; otherwise a quote is a letter like any other."""
    lenient: bool = False
    """Whether quotes within quotes may stand there undoubled. Lines cannot be told from broken fields then."""
    nulls: tuple[str, ...] = ()
    """What means null besides the empty field, except in text."""


@dataclass(frozen=True)
class Part:
    """A text file, and SQL of what a table is to hold of it."""

    file: Path
    layout: Layout
    selected: Sequence[str] = ("*",)


def open_files(database: Database, view: str, patterns: Sequence[str], key: str, delimiter: str = ",") -> Relation:
    """A view over the files that `patterns` (paths or globs) name; `key` is the configuration's, for messages.

    `delimiter` separates the fields of .csv files; those of .tsv files are separated by tabs.
    """
    files = _find(patterns, key)
    if all(file.name.endswith(PARQUET) for file in files):
        return _open_parquet(database, view, files, key)
    if all(file.name.endswith(CSV) for file in files):
        tabs = [".tsv" in file.suffixes[-2:] for file in files]
        if any(tabs) and not all(tabs):
            raise ValueError(f"{key}: some of the files are .tsv and some .csv; give files of one kind")
        return open_text(database, view, files, Layout("\t" if any(tabs) else delimiter), f"remove it ({key})")
    endings = ", ".join(sorted({file.suffix or file.name for file in files}))
    raise ValueError(f"{key}: files end in {endings}; give either parquet (.parquet) or CSV (.csv, .tsv, .csv.gz)")


def open_text(database: Database, view: str, files: Sequence[Path], layout: Layout, advice: str) -> Relation:
    """A view over text files of one layout; `advice` says what to do about a file that is missing or has no rows."""
    for file in files:
        _expect_content(file, advice)
    lines = _Lines(database, files, layout)
    # Numbering in the order of the text needs one thread; the parser itself stays the slower part.
    _view(database, view, f"SELECT {lines.values}, row_number() OVER () - 1 AS {ROW} FROM {lines.read()}", where(files))
    for file in files:
        try:
            (rows,) = database.row(f"SELECT count(*) FROM (SELECT 1 FROM {lines.read([file])} LIMIT 1)")
        except duckdb.Error as error:
            raise ValueError(lines.fault() or f"{where(files)}: {first_line(error)}") from None
        if not rows:
            raise ValueError(f"{file}: no rows in there; {advice}")

    def locate(row: int) -> str:
        for file in files:
            (held,) = database.row(f"SELECT count(*) FROM {lines.read([file])}")
            if row < held:
                return _place(file, row, layout)
            row -= held
        raise AssertionError("the row is beyond the files")

    return Relation(view, where(files), database.types(view), locate, lines.fault)


def load(database: Database, view: str, parts: Sequence[Part], advice: str) -> Relation:
    """A view over a table with the rows of text files, one after the other, and whatever is computed of them.

    Unlike the rows of a view over the files, all threads compute them, and only once. `advice` is the source's, on what
    to do about a file that is not as expected.
    """
    table, starts = quoted(f"{view}_rows"), dict[Path, int]()
    for part in parts:
        _expect_content(part.file, advice)
        lines = _Lines(database, [part.file], part.layout)
        lacking = [name for name in part.layout.types if name not in lines.kinds]
        if lacking:
            among = f"no column {lacking[0]!r} among {', '.join(lines.kinds)}"
            raise ValueError(f"{part.file}, line 1: {among}; {advice}")
        target = f"INSERT INTO {table}" if starts else f"CREATE TABLE {table} AS"
        starts[part.file] = database.row(f"SELECT count(*) FROM {table}")[0] if starts else 0
        source = f"(SELECT {lines.values} FROM {lines.read()})"
        try:
            # The rows keep the order of the file, so that the database's own row numbers say which they are.
            database.execute(f"{target} SELECT {', '.join(part.selected)} FROM {source}")
        except duckdb.Error:
            fault = lines.fault()
            if fault is None:
                raise
            raise ValueError(f"{fault}, or {advice}") from None
        if database.row(f"SELECT count(*) FROM {table}")[0] == starts[part.file]:
            raise ValueError(f"{part.file}: no rows in there; {advice}")
    database.execute(f"CREATE VIEW {quoted(view)} AS SELECT *, rowid AS {ROW} FROM {table}")
    layouts = {part.file: part.layout for part in parts}

    def locate(row: int) -> str:
        file, place = within(starts, row)
        return _place(file, place, layouts[file])

    return Relation(view, where([*starts]), database.types(view), locate)


def where(files: Sequence[Path]) -> str:
    """Files, for messages."""
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def within(starts: Mapping[Path, int], row: int) -> tuple[Path, int]:
    """The file that a row stands in, and its place there; `starts` has the first row of each, which none lacks."""
    file = max((file for file in starts if starts[file] <= row), key=lambda file: starts[file])
    return file, row - starts[file]


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
        _expect_content(file, f"remove it or write it again ({key})")
    return files


def _expect_content(file: Path, advice: str) -> None:
    if not file.is_file() or not file.stat().st_size:
        what = "the file is empty" if file.is_file() else "no such file"
        raise ValueError(f"{file}: {what}; {advice}")


def _open_parquet(database: Database, view: str, files: Sequence[Path], key: str) -> Relation:
    footers = {file: _footer(file) for file in files}
    _same_columns(files, {file: footer.schema.to_arrow_schema().names for file, footer in footers.items()})
    # Those that write parts in parallel leave some without rows.
    files = [file for file in files if footers[file].num_rows] or files
    if not footers[files[0]].num_rows:
        raise ValueError(f"{where(files)}: no rows in there; give files with rows ({key})")
    starts = dict(zip(files, accumulate([0, *(footers[file].num_rows for file in files)]), strict=False))
    # A file's own row numbers, which DuckDB reads in parallel, plus where the file begins.
    offset = f"CAST(map({_texts([*map(str, files)])}, [{', '.join(map(str, starts.values()))}])[__file] AS BIGINT)"
    source = f"read_parquet({_texts([*map(str, files)])}, filename = '__file', file_row_number = true)"
    columns = f"* EXCLUDE (__file, file_row_number), {offset if len(files) > 1 else 0} + file_row_number AS {ROW}"
    _view(database, view, f"SELECT {columns} FROM {source}", where(files))

    def locate(row: int) -> str:
        file, place = within(starts, row)
        return f"{file}, row {place}, row group {_group(footers[file], place)}"

    return Relation(view, where(files), database.types(view), locate, lambda: _damaged_group(files))


def without(
    database: Database, relation: Relation, view: str, column: str, values: Mapping[int | str, str], key: str, what: str
) -> tuple[Relation, tuple[str, ...]]:
    """`relation` less the rows whose `column` holds one of `values`, as the view `view`; and a note on how many.

    `values` has their names and `what` is the kind of thing they are, for messages; `key` is the configuration's.
    """
    if not values:
        return relation, ()
    listed = ", ".join(text(value) if isinstance(value, str) else str(value) for value in values)
    among = f"coalesce({quoted(column)} IN ({listed}), false)"
    database.execute(f"CREATE VIEW {quoted(view)} AS SELECT * FROM {quoted(relation.view)} WHERE NOT {among}")
    try:
        left_out, rows = database.row(f"SELECT count(*) FILTER ({among}), count(*) FROM {quoted(relation.view)}")
    except duckdb.Error as error:
        raise explain(error, [relation]) from None
    those = f"{what} {', '.join(values.values())}"
    if left_out == rows:
        raise ValueError(f"{relation.where}: all rows are those of {those}; keep others ({key})")
    note = f"{left_out:,} rows left out ({key}): those of {those}"
    return replace(relation, view=view), (note,) if left_out else ()


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


class _Lines:
    """Text files of one layout, as DuckDB reads them.

    Where DuckDB's reader makes integers, it rounds. So columns of integers are read as text, and `values` casts them:
    whole numbers, also 7.0 as pandas writes them, and an error for others. The same goes for all numbers and times of
    layouts with nulls of their own, which the reader would find in text as well.
    """

    def __init__(self, database: Database, files: Sequence[Path], layout: Layout) -> None:
        self._database, self._files, self._layout = database, files, layout
        self.kinds: dict[str, str] = {}
        """Column -> DuckDB type."""
        self._integers: dict[str, str] = {}
        self._cast: dict[str, str] = {}
        """The columns that are read as text."""
        headers = {file: list(layout.names) or self._header(file) for file in files}
        _same_columns(files, headers)
        if layout.types:
            self.kinds = {name: layout.types.get(name, "VARCHAR") for name in headers[files[0]]}
            for file in files:
                if headers[file] != headers[files[0]]:
                    raise ValueError(f"{file}: the columns stand in another order than in {files[0]}; give them alike")
        else:
            try:
                self.kinds = dict(row[:2] for row in database.rows(f"DESCRIBE SELECT * FROM {self.read()}"))
            except duckdb.Error as error:
                raise ValueError(self.fault() or f"{where(files)}: {first_line(error)}") from None
        self._integers = {name: kind for name, kind in self.kinds.items() if is_integer(kind)}
        if layout.nulls:
            self._cast = {name: kind for name, kind in self.kinds.items() if kind != "VARCHAR"}
        else:
            self._cast = self._integers

    @property
    def values(self) -> str:
        """SQL of all columns of `read()`, in their types."""
        casts = []
        for name, kind in self._cast.items():
            column = quoted(name)
            value = f"CASE WHEN {column} NOT IN ({', '.join(map(text, self._layout.nulls))}) THEN {column} END"
            cast = f"CAST({value if self._layout.nulls else column} AS {kind})"
            if name in self._integers:
                # The dear comparison only where there is something to compare.
                fraction = f"(contains({column}, '.') OR contains(lower({column}), 'e')) AND {_fraction(column, kind)}"
                cast = f"CASE WHEN {fraction} THEN error({column}) ELSE {cast} END"
            casts.append(f"{cast} AS {column}")
        return f"* REPLACE ({', '.join(casts)})" if casts else "*"

    def read(self, files: Sequence[Path] = (), more: str = "", *, cast: bool = False) -> str:
        """SQL that reads `files`, or all: the dialect is settled, so that a bad line cannot make it another.

        `cast` leaves that to DuckDB, which lists in its rejects what cannot be cast, but rounds.
        """
        layout = self._layout
        quote = text('"' if layout.quotes else "")
        dialect = f"delim = {text(layout.delimiter)}, quote = {quote}, escape = {quote}, comment = ''"
        if layout.lenient:
            dialect += ", strict_mode = false, parallel = false"
        if layout.nulls and cast:
            dialect += f", nullstr = {_texts(['', *layout.nulls])}"
        as_text = {} if cast else dict.fromkeys(self._cast, "VARCHAR")
        if layout.types:
            dialect += f", auto_detect = false, header = false, skip = {int(not layout.names)}"
            dialect += f", columns = {_struct(self.kinds | as_text)}"
        else:
            dialect += ", header = true, skip = 0" + (f", types = {_struct(as_text)}" if as_text else "")
        return f"read_csv({_texts([str(file) for file in files or self._files])}, {dialect}{more})"

    def fault(self) -> str | None:
        """The first line that cannot be read: file, line, what is wrong and what to do."""
        return self._reject() or self._no_whole_number()

    def _header(self, file: Path) -> list[str]:
        if self._layout.types:
            with opened(file) as lines:
                first = next(lines).decode("utf-8-sig", errors="replace")
            return [name.strip() for name in next(csv.reader([first], delimiter=self._layout.delimiter), [])]
        names: list[str] = []
        delimiter = self._layout.delimiter
        try:
            # First without regard to bad lines: with the wrong delimiter, all lines may be bad.
            for more in (REJECTS, ""):
                found = self._database.rows(f"DESCRIBE SELECT * FROM {self.read([file], more)}")
                names = [name for name, *_ in found]
                other = next((other for other in OTHER_DELIMITERS if len(names) == 1 and other in names[0]), None)
                if other:
                    header = f"{file}: the header {names[0]!r}"
                    raise ValueError(f"{header} has no delimiter {delimiter!r}; set delimiter={other!r}")
        except duckdb.Error:
            fault = self._reject([file])
            advice = "it needs a header, as many fields in each line, and closed quotes"
            raise ValueError(fault or f"{file}: not CSV with the delimiter {delimiter!r}; {advice}") from None
        return names

    def _reject(self, files: Sequence[Path] = ()) -> str | None:
        """The first line that DuckDB rejects."""
        try:
            with self._database.single_threaded():  # With several threads, the limit might be spent on later lines.
                self._database.rows(f"SELECT count(COLUMNS(*)) FROM {self.read(files, REJECTS, cast=True)}")
            found = self._database.rows(
                "SELECT file_path, line_byte_position, error_type, column_name, csv_line, error_message "
                "FROM reject_errors JOIN reject_scans USING (scan_id, file_id) ORDER BY file_id, line, column_idx "
                "LIMIT 1"
            )
            for table in ("reject_errors", "reject_scans"):  # Or the next listing would begin with these lines.
                self._database.execute(f"DROP TABLE {table}")
        except duckdb.Error:
            return None
        if not found:
            return None
        file, start, kind, column, content, message = found[0]
        shown = str(content).lstrip("\r\n")
        line = _line_at(Path(file), start - 1 + len(str(content)) - len(shown))
        quotes = "put quotes around fields that contain the delimiter, or remove it"
        what, advice = {
            "MISSING COLUMNS": (
                f"no field for column {column!r}",
                "complete or remove it; if the file was cut, write it again",
            ),
            "TOO MANY COLUMNS": ("more fields than columns", quotes if self._layout.quotes else "correct or remove it"),
            "UNQUOTED VALUE": ("a quote that is not closed", "close it; a quote within a field is written twice"),
            "CAST": (
                str(message).removeprefix("Error when converting ").replace(". Could", ": could"),
                f"correct it{self._or_parquet('text')}",
            ),
            "INVALID ENCODING": ("it is not UTF-8", "write the file in UTF-8"),
        }.get(str(kind), (first_line(Exception(message)), "correct it"))
        return f"{file}, line {line}: {what} in {shown[:80].rstrip()!r}; {advice}"

    def _no_whole_number(self) -> str | None:
        """The first fraction in a column of integers."""
        wrong = [(name, _fraction(quoted(name), kind)) for name, kind in self._integers.items()]
        if not wrong:
            return None
        value = f"CASE {' '.join(f'WHEN {bad} THEN {quoted(name)}' for name, bad in wrong)} END"
        name = f"CASE {' '.join(f'WHEN {bad} THEN {text(name)}' for name, bad in wrong)} END"
        for file in self._files:
            rows = f"SELECT row_number() OVER () - 1 AS {ROW}, {name}, {value} AS wrong FROM {self.read([file])}"
            try:
                found = self._database.rows(f"SELECT * FROM ({rows}) WHERE wrong IS NOT NULL ORDER BY 1 LIMIT 1")
            except duckdb.Error:
                return None
            for row, column, got in found:
                place = _place(file, row, self._layout)
                return (
                    f"{place}, column {column!r}: {got!r} is no whole number; correct it{self._or_parquet('numbers')}"
                )
        return None

    def _or_parquet(self, kind: str) -> str:
        return "" if self._layout.types else f", or give parquet if the column is {kind}: its first rows do not show it"


def _fraction(column: str, kind: str) -> str:
    """SQL of whether text is a number that has a fraction."""
    return f"TRY_CAST({column} AS DECIMAL(38, 18)) IS DISTINCT FROM TRY_CAST({column} AS {kind})"


def opened(file: Path) -> IO[bytes]:
    """The bytes of a file that may be packed."""
    return gzip.open(file) if file.suffix == ".gz" else open(file, "rb")  # type: ignore[return-value]


def _line_at(file: Path, byte: int) -> int:
    """The line that holds a byte of the text, from 1."""
    with opened(file) as lines:
        for number, line in enumerate(lines, 1):
            byte -= len(line)
            if byte < 0:
                return number
    raise AssertionError("the byte is beyond the file")


def _place(file: Path, row: int, layout: Layout) -> str:
    """A row of a text file as "FILE, line 17"; where lines cannot be told, as "FILE, row 15"."""
    begins = _beginnings(file, layout)
    line = next((line for place, line in enumerate(begins, -(not layout.names)) if place == row), None)
    return f"{file}, row {row}" if line is None else f"{file}, line {line}"


def _beginnings(file: Path, layout: Layout) -> Iterator[int]:
    """The lines at which rows begin, the header's first. DuckDB takes no blank line for a row."""
    if layout.lenient or (layout.quotes and len(layout.delimiter) > 1):
        return
    with opened(file) as lines:
        if not layout.quotes:
            yield from (number for number, line in enumerate(lines, 1) if line.strip(b"\r\n"))
            return
        reader = csv.reader((line.decode(errors="replace") for line in lines), delimiter=layout.delimiter)
        before = 0
        for fields in reader:
            if fields:
                yield before + 1
            before = reader.line_num


def _footer(file: Path) -> pq.FileMetaData:
    try:
        with pq.ParquetFile(file) as parquet:
            return parquet.metadata
    except (pa.ArrowException, OSError) as error:
        message = f"{file}: not a complete parquet file ({first_line(error)}); write it again"
        raise ValueError(message) from None


def _view(database: Database, view: str, sql: str, files: str) -> None:
    try:
        database.execute(f"CREATE VIEW {quoted(view)} AS {sql}")
    except duckdb.Error as error:
        raise ValueError(f"{files}: {first_line(error)}") from None


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


def _texts(values: Sequence[str]) -> str:
    return f"[{', '.join(map(text, values))}]"


def _struct(kinds: Mapping[str, str]) -> str:
    return f"{{{', '.join(f'{text(name)}: {text(kind)}' for name, kind in kinds.items())}}}"
