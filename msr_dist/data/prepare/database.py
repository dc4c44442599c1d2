"""The DuckDB database in which raw rows become canonical ones: bounded memory, spilling to disk, one-line errors."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import duckdb
import pyarrow as pa

DatabaseError = duckdb.Error
"""What a statement raises that failed, for want of disk or memory among other things."""


class Database:
    """A DuckDB database in a folder of its own, with limits on memory and threads."""

    def __init__(self, folder: Path, memory_limit: str, threads: int | None) -> None:
        self.folder = folder
        settings: dict[str, Any] = {"memory_limit": memory_limit, "temp_directory": str(folder / "spill")}
        if threads:
            settings["threads"] = threads
        try:
            self._connection = duckdb.connect(str(folder / "prepare.duckdb"), config=settings)
        except duckdb.Error as error:
            raise ValueError(f"memory_limit={memory_limit!r}, threads={threads}: {first_line(error)}") from None

        self.execute("SET enable_progress_bar = false")  # It would write to the standard output.

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def execute(self, sql: str, values: Sequence[Any] = ()) -> None:
        """Run a statement for its effect."""
        self._connection.execute(sql, list(values))

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a small result."""
        return list(self._connection.execute(sql, list(values)).fetchall())

    def row(self, sql: str, values: Sequence[Any] = ()) -> tuple[Any, ...]:
        """The first row of a result that has one."""
        return self.rows(sql, values)[0]

    def stream(self, sql: str, batch_rows: int) -> Iterator[pa.RecordBatch]:
        """The result in Arrow batches, never all in memory."""
        yield from self._connection.sql(sql).to_arrow_reader(batch_rows)

    def types(self, relation: str) -> dict[str, str]:
        """Column -> DuckDB type of a table or view."""
        return {name: kind for name, kind, *_ in self.rows(f"DESCRIBE {quoted(relation)}")}

    def single_threaded(self) -> "_SingleThreaded":
        """A context in which sums of floats do not depend on the number of threads."""
        return _SingleThreaded(self)

    def add(self, name: str, table: pa.Table) -> None:
        """A table of the database with the rows of a small Arrow table."""
        self._connection.register("arriving", table)
        self.execute(f"CREATE TABLE {quoted(name)} AS SELECT * FROM arriving")
        self._connection.unregister("arriving")


class _SingleThreaded:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._threads = database.row("SELECT current_setting('threads')")[0]

    def __enter__(self) -> None:
        self._database.execute("SET threads = 1")

    def __exit__(self, *_: object) -> None:
        self._database.execute(f"SET threads = {self._threads}")


def quoted(name: str) -> str:
    """`name` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def text(value: str) -> str:
    """`value` as an SQL string."""
    return "'" + value.replace("'", "''") + "'"


def first_line(error: Exception) -> str:
    """A database's or Arrow's error in one line."""
    return " ".join(str(error).strip().split("\n\n")[0].split())


def is_integer(kind: str) -> bool:
    """Whether a DuckDB type is one of the integers."""
    return kind.removeprefix("U") in ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")


def is_float(kind: str) -> bool:
    """Whether a DuckDB type is one of the floats."""
    return kind in ("FLOAT", "DOUBLE")


def is_number(kind: str) -> bool:
    """Whether a DuckDB type is a number."""
    return is_integer(kind) or is_float(kind) or kind.startswith("DECIMAL")
