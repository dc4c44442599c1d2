"""What sources of published text files share: reading them as they are, and a test set that the publisher chose."""

import csv
import re
from abc import ABC
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import duckdb
from pydantic import Field

from msr_dist.data.prepare.canonical import PrepareConfig
from msr_dist.data.prepare.database import Database, quoted, text
from msr_dist.data.prepare.mapping import LabelColumn, Relation, Split


class GivenTest(PrepareConfig, ABC):
    """Settings of clicks and conversions whose publisher split off the test rows, and gives no times.

    The interactions need the columns `split`, as `split_column` has it, `click` and `conversion`.
    """

    split: Split = Split(kind="column", column="split")
    valid: float = Field(default=0.1, gt=0, lt=1)
    """The share of the publisher's training pages that become validation rows, chosen by a hash with `split.seed`."""
    conversion: Literal["click", "impression"] = "click"
    """Where a conversion is known: after a click (CVR), or everywhere (CTCVR): without a click there is none."""

    def split_column(self, test: str, page: str) -> str:
        """SQL of the split; `test` is SQL of a boolean.

        Validation takes whole pages (`page` is SQL of their text id), as the publisher's test does: rows of a page have
        the user's features in common, and would otherwise stand on both sides.
        """
        place = f"md5_number_lower(concat({text(f'{self.split.seed}:')}, {page})) % 1000000"
        return f"CASE WHEN {test} THEN 'test' WHEN {place} < {round(self.valid * 1e6)} THEN 'valid' ELSE 'train' END"

    def labels(self) -> tuple[LabelColumn, ...]:
        """The two labels."""
        mask = "click" if self.conversion == "click" else None
        return LabelColumn(name="click"), LabelColumn(name="conversion", mask=mask)


class TextTable:
    """A table of the database with the rows of text files, one file after the other."""

    def __init__(self, database: Database, name: str, advice: str) -> None:
        self.name = name
        self._database, self._advice = database, advice
        self._files: list[tuple[Path, int, bool, bool]] = []

    def append(
        self,
        file: Path,
        columns: Mapping[str, str],
        selected: Sequence[str] = ("*",),
        *,
        delimiter: str = ",",
        header: bool = False,
        quotes: bool = False,
    ) -> None:
        """Add the rows of `file`. Raises ValueError with the line where it is not as expected.

        Args:
            file: UTF-8 text.
            columns: column -> DuckDB type; empty fields are null. Without a header all columns, in their order; with
                one those that are needed, in any order.
            selected: SQL of what the table holds.
            delimiter: what separates the fields.
            header: whether the first line has the names of the columns.
            quotes: whether fields may have quotes around them, and then hold delimiters and line breaks.
        """
        if not file.is_file() or not file.stat().st_size:
            what = "the file is empty" if file.is_file() else "no such file"
            raise ValueError(f"{file}: {what}; {self._advice}")
        kinds = dict(columns)
        if header:
            names = _header(file, delimiter)
            lacking = [name for name in columns if name not in names]
            if lacking:
                raise ValueError(f"{file}, line 1: no column {lacking[0]!r} among {', '.join(names)}; {self._advice}")
            kinds = {name: columns.get(name, "VARCHAR") for name in names}
        struct = ", ".join(f"{text(name)}: {text(kind)}" for name, kind in kinds.items())
        # Published quotes are not always doubled within quotes, which only the lenient mode reads.
        dialect = "quote = '\"', escape = '\"', strict_mode = false, parallel = false" if quotes else "quote = ''"
        dialect += (
            f", delim = {text(delimiter)}, comment = '', header = false, skip = {int(header)}, nullstr = ['', 'NA']"
        )
        source = f"read_csv({text(str(file))}, auto_detect = false, {dialect}, columns = {{{struct}}})"
        first = self._database.row(f"SELECT count(*) FROM {quoted(self.name)}")[0] if self._files else 0
        target = f"INSERT INTO {quoted(self.name)}" if self._files else f"CREATE TABLE {quoted(self.name)} AS"
        try:
            # The rows keep the order of the file, so that the database's own row numbers say which they are.
            self._database.execute(f"{target} SELECT {', '.join(selected)} FROM {source}")
        except duckdb.Error as error:
            raise self._explained(error, file, header, quotes) from None
        self._files.append((file, first, header, quotes))

    def locate(self, row: int) -> str:
        """A row number (`rowid`) as "FILE, line 17"; where lines may be broken, as "FILE, row 15"."""
        file, first, header, quotes = max((each for each in self._files if each[1] <= row), key=lambda each: each[1])
        return _place(file, row - first, header, quotes)

    def _explained(self, error: Exception, file: Path, header: bool, quotes: bool) -> Exception:
        """Where a file is not as expected; another error as it is."""
        found = re.search(r"CSV Error on Line: (\d+)\s*\nOriginal Line:(.*?)\n\s*([^\n]+)\n", str(error), re.DOTALL)
        if not found:
            return error
        # DuckDB counts a line that goes on after a break within quotes as one.
        place = _place(file, int(found[1]) - 1 - header, header, quotes)
        return ValueError(f"{place}: {found[3]} in {found[2].strip()[:80]!r}; correct it, or {self._advice}")

    @property
    def where(self) -> str:
        """The files, for messages."""
        first, more = self._files[0][0], len(self._files) - 1
        return f"{first} and {more} more" if more else str(first)

    def relation(self, view: str) -> Relation:
        """`view`, whose `ROW` is this table's row number."""
        return Relation(view, self.where, self._database.types(view), self.locate)

    def expect(self, wrong: str, what: str, advice: str = "") -> None:
        """ValueError for the first row where `wrong` (SQL) holds; `what` is SQL of words on what it has."""
        found = self._database.rows(
            f"SELECT rowid, {what}, count(*) OVER () FROM {quoted(self.name)} WHERE {wrong} ORDER BY rowid LIMIT 1"
        )
        for row, words, count in found:
            raise ValueError(f"{self.locate(row)}: {words}, here and in {count - 1} more; {advice or self._advice}")

    def expect_one_each(self, other: "TextTable", columns: Sequence[str]) -> None:
        """ValueError unless each row has exactly one in `other` with the same values in `columns`."""
        key = ", ".join(map(quoted, columns))
        shown = f"{quoted(columns[-1])}::VARCHAR"
        twice = f"rowid IN (SELECT max(rowid) FROM {quoted(other.name)} GROUP BY {key} HAVING count(*) > 1)"
        other.expect(twice, f"concat({shown}, ' stands there a second time')", "remove one of the lines")
        same = " AND ".join(f"o.{quoted(name)} = {quoted(self.name)}.{quoted(name)}" for name in columns)
        absent = f"NOT EXISTS (SELECT 1 FROM {quoted(other.name)} o WHERE {same})"
        self.expect(absent, f"concat({shown}, {text(f' is not in {other.where}')})")


def _header(file: Path, delimiter: str) -> list[str]:
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
        return [name.strip() for name in next(csv.reader(lines, delimiter=delimiter))]


def _place(file: Path, row: int, header: bool, quotes: bool) -> str:
    return f"{file}, row {row}" if quotes else f"{file}, line {row + 1 + header}"
