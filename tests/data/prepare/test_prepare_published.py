from pathlib import Path

import duckdb
import pytest

from msr_dist.data.prepare.database import Database
from msr_dist.data.prepare.files import Layout, Part, explain, load, open_text
from msr_dist.data.prepare.mapping import Relation

ROWS = 300_000
COLUMNS = {"number": "BIGINT", "word": "VARCHAR"}
HEADER = Layout(types=COLUMNS)
BARE = Layout(names=tuple(COLUMNS), types=COLUMNS, quotes=False)
LENIENT = Layout(types=COLUMNS, lenient=True, nulls=("NA",))
ADVICE = "write it again"


def opened(database: Database, file: Path, layout: Layout, whole: bool) -> Relation:
    if whole:
        return load(database, "lines", [Part(file, layout)], ADVICE)
    return open_text(database, "lines", [file], layout, ADVICE)


def test_rows_keep_the_order_of_the_files_with_any_number_of_threads(tmp_path: Path) -> None:
    parts = []
    for name, layout in (("a.csv", BARE), ("b.csv", HEADER)):
        lines = ["number,word"] * (layout is HEADER) + [f"{number},a word {number}" for number in range(ROWS)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        parts.append(Part(tmp_path / name, layout))
    with Database(tmp_path, "500MB", 4) as database:
        relation = load(database, "lines", parts, ADVICE)
        assert database.row("SELECT count(*), count(*) FILTER (number <> __row % 300000) FROM lines") == (2 * ROWS, 0)
    assert relation.locate(ROWS - 1) == f"{tmp_path / 'a.csv'}, line {ROWS}"
    assert relation.locate(ROWS) == f"{tmp_path / 'b.csv'}, line 2"
    assert relation.where == f"{tmp_path / 'a.csv'} and 1 more"


FAULTS = [
    (HEADER, b"number,word\n1,a\n\n1.5,b\n", r"a\.csv, line 4, column 'number': '1.5' is no whole number; correct it"),
    (HEADER, b'number,word\n1,"a\nb"\n\n0.4,b\n', r"a\.csv, line 5, column 'number': '0.4' is no whole number"),
    (HEADER, b"number,word\n1,a\n\n1e-1,b\n", r"a\.csv, line 4, column 'number': '1e-1' is no whole number"),
    (BARE, b"1,a\n\n\n2.5,b\n", r"a\.csv, line 4, column 'number': '2.5' is no whole number"),
    (LENIENT, b'number,word\n1,"a "b" c"\n2.5,b\n', r"a\.csv, row 1, column 'number': '2.5' is no whole number"),
    (BARE, b"1,a\n\n100000000000000000000000000000,b\n", r"a\.csv, line 3: .*'BIGINT'.* in '10000"),
    (BARE, b"1,a\n\n2,\xff\xfe\n", r"a\.csv, line 3: it is not UTF-8 in "),
    (LENIENT, b"number,word\n1,a\n\n2,\xff\xfe\n", r"a\.csv, line 4: it is not UTF-8 in "),
    (HEADER, b'number,word\n1,"a\nb"\n\nq,b\n', r"a\.csv, line 5: .* in 'q,b'"),
    (HEADER, b"\xef\xbb\xbfnumber,word\r\n1,a\r\n\r\nq,b\r\n", r"a\.csv, line 4: .* in 'q,b'"),
    (BARE, b"1,a\n2,b,c\n", r"a\.csv, line 2: more fields than columns in '2,b,c'; correct or remove it"),
    (HEADER, b"number,word\n1,a\n2,b,c\n", r"a\.csv, line 3: more fields than columns in '2,b,c'; put quotes around"),
    (HEADER, b'number,word\n1,a\n2,"open\n3,b\n', r"a\.csv, line 3: a quote that is not closed in '2,"),
    (HEADER, b"number,word\n", r"a\.csv: no rows in there; write it again"),
]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("layout", "content", "words"), FAULTS)
def test_a_fault_is_told_with_its_line(tmp_path: Path, layout: Layout, content: bytes, words: str, whole: bool) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with Database(tmp_path, "500MB", 2) as database, pytest.raises(ValueError, match=words) as error:
        _read_all(database, opened(database, tmp_path / "a.csv", layout, whole))
    assert "\n" not in str(error.value)


def _read_all(database: Database, relation: Relation) -> None:
    try:
        database.rows("SELECT sum(number), max(word) FROM lines")
    except duckdb.Error as error:
        raise explain(error, [relation]) from None


@pytest.mark.parametrize("whole", [True, False])
def test_whole_numbers_quotes_and_nulls(tmp_path: Path, whole: bool) -> None:
    big = 9223372036854775807
    (tmp_path / "a.csv").write_text(f'number,word\r\n7.0,"say, so"\r\n\r\n{big},NA\r\n-5,\r\nNA,1.5\r\n')
    with Database(tmp_path, "500MB", 2) as database:
        opened(database, tmp_path / "a.csv", LENIENT, whole)
        rows = [(7, "say, so"), (big, "NA"), (-5, None), (None, "1.5")]
        assert database.rows("SELECT number, word FROM lines ORDER BY __row") == rows


@pytest.mark.parametrize("whole", [True, False])
def test_rows_are_found_below_blank_lines_and_broken_fields(tmp_path: Path, whole: bool) -> None:
    (tmp_path / "a.csv").write_text('number,word\n\n1,"a ""b""\n\nc"\n\n2,5" disk\n3,d\n')
    with Database(tmp_path, "500MB", 2) as database:
        relation = opened(database, tmp_path / "a.csv", HEADER, whole)
        assert [relation.locate(row).split(", ")[1] for row in range(3)] == ["line 3", "line 7", "line 8"]


def test_bad_lines_far_below(tmp_path: Path) -> None:
    lines = [f"{number},a word" for number in range(ROWS)]
    lines[ROWS - 5] = "7"
    (tmp_path / "b.csv").write_text("\n".join(lines) + "\n")
    words = rf"b\.csv, line {ROWS - 4}: no field for column 'word'.*write it again"
    with Database(tmp_path, "500MB", 4) as database, pytest.raises(ValueError, match=words):
        opened(database, tmp_path / "b.csv", BARE, True)


def test_files_with_columns_in_another_order(tmp_path: Path) -> None:
    for name, content in (("a.csv", "number,word\n1,a\n"), ("b.csv", "word,number\na,1\n")):
        (tmp_path / name).write_text(content)
    words = r"b\.csv: the columns stand in another order than in .*a\.csv"
    with Database(tmp_path, "500MB", 1) as database, pytest.raises(ValueError, match=words):
        open_text(database, "lines", [tmp_path / "a.csv", tmp_path / "b.csv"], HEADER, ADVICE)
