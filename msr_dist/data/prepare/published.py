"""What sources of published text files share: checks across files, and a test set that the publisher chose."""

from abc import ABC
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from msr_dist.data.prepare.canonical import PrepareConfig
from msr_dist.data.prepare.database import Database, quoted, text
from msr_dist.data.prepare.mapping import ROW, LabelColumn, Relation, Split


class GivenTest(PrepareConfig, ABC):
    """Settings of clicks and conversions whose publisher split off the test rows, and gives no times.

    The interactions need the columns `split`, as `split_column` has it, `click` and `conversion`.
    """

    split: Split = Split(kind="column", column="split")
    valid: float = Field(default=0.1, gt=0, lt=1)
    """The share of the publisher's training pages that become validation rows, chosen by a hash with `split.seed`."""
    conversion: Literal["click", "impression"] = "click"
    """Where a conversion is known: after a click (CVR), or everywhere (CTCVR): without a click there is none."""

    @model_validator(mode="after")
    def _keeps_the_test_rows(self) -> Self:
        if self.split.kind == "time" or self.split.column not in (None, "split"):
            what = "the publisher gives the test rows and no times"
            raise ValueError(f'{what}; leave split.kind and split.column out, or set split.kind = "random"')
        return self

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


def expect(database: Database, relation: Relation, wrong: str, what: str, advice: str) -> None:
    """ValueError for the first row where `wrong` (SQL) holds; `what` is SQL of words on what it has."""
    found = database.rows(
        f"SELECT {ROW}, {what}, count(*) OVER () FROM {quoted(relation.view)} WHERE {wrong} ORDER BY {ROW} LIMIT 1"
    )
    for row, words, count in found:
        raise ValueError(f"{relation.locate(row)}: {words}, here and in {count - 1} more; {advice}")


def expect_one_each(
    database: Database, relation: Relation, other: Relation, columns: Sequence[str], advice: str
) -> None:
    """ValueError unless each row has exactly one in `other` with the same values in `columns`."""
    key = ", ".join(map(quoted, columns))
    shown = f"{quoted(columns[-1])}::VARCHAR"
    twice = f"{ROW} IN (SELECT max({ROW}) FROM {quoted(other.view)} GROUP BY {key} HAVING count(*) > 1)"
    expect(database, other, twice, f"concat({shown}, ' stands there a second time')", "remove one of the lines")
    same = " AND ".join(f"o.{quoted(name)} = {quoted(relation.view)}.{quoted(name)}" for name in columns)
    absent = f"NOT EXISTS (SELECT 1 FROM {quoted(other.view)} o WHERE {same})"
    expect(database, relation, absent, f"concat({shown}, {text(f' is not in {other.where}')})", advice)
