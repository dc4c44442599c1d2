from pathlib import Path

import pytest

from msr_dist.data.prepare.database import Database
from msr_dist.data.prepare.published import TextTable

ROWS = 300_000
COLUMNS = {"number": "BIGINT", "word": "VARCHAR"}


def test_rows_keep_the_order_of_the_files_with_any_number_of_threads(tmp_path: Path) -> None:
    with Database(tmp_path, "500MB", 4) as database:
        table = TextTable(database, "lines", "write it again")
        for name, header in (("a.csv", False), ("b.csv", True)):
            lines = ["number,word"] * header + [f"{number},a word {number}" for number in range(ROWS)]
            (tmp_path / name).write_text("\n".join(lines) + "\n")
            table.append(tmp_path / name, COLUMNS, header=header)
        assert database.row("SELECT count(*), count(*) FILTER (number <> rowid % 300000) FROM lines") == (2 * ROWS, 0)
    assert table.locate(ROWS - 1) == f"{tmp_path / 'a.csv'}, line {ROWS}"
    assert table.locate(ROWS) == f"{tmp_path / 'b.csv'}, line 2"
    assert table.where == f"{tmp_path / 'a.csv'} and 1 more"


def test_text_that_is_not_utf_8_and_bad_lines_far_below(tmp_path: Path) -> None:
    with Database(tmp_path, "500MB", 4) as database:
        (tmp_path / "a.csv").write_bytes(b"1,a\n2,\xff\xfe\n")
        with pytest.raises(ValueError, match=r"a\.csv, line 2: Invalid unicode .*write it again"):
            TextTable(database, "lines", "write it again").append(tmp_path / "a.csv", COLUMNS)
        lines = [f"{number},a word" for number in range(ROWS)]
        lines[ROWS - 5] = "7"
        (tmp_path / "b.csv").write_text("\n".join(lines) + "\n")
        with pytest.raises(ValueError, match=rf"b\.csv, line {ROWS - 4}: Expected Number of Columns: 2 Found: 1"):
            TextTable(database, "lines", "write it again").append(tmp_path / "b.csv", COLUMNS)
