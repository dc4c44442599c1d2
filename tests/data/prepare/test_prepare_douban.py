import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msr_dist.config import parse
from msr_dist.data.prepare.canonical import prepare
from msr_dist.data.prepare.douban import Config
from msr_dist.data.prepare.report import PrepareReport
from msr_dist.schema import SPLITS, FeatureSchema

HEADERS = {
    "book": ["user_id", "book_id", "rating", "labels", "comment", "time", "ID"],
    "music": ["user_id", "music_id", "rating", "labels", "comment", "useful_num", "time", "ID"],
    "movie": ["user_id", "movie_id", "rating", "comment", "time", "labels", "useful_num", "CategoryID", "ID"],
}
USERS = ["UID", "user_id", "living_place", "join_time", "self_statement"]
ROWS = {"book": 300, "music": 200, "movie": 500}
Row = dict[str, str]


def raw_rows() -> dict[str, list[Row]]:
    rng = np.random.default_rng(0)
    rows: dict[str, list[Row]] = {}
    for name, count in ROWS.items():
        listed = []
        for number in range(count):
            day = datetime.date(2010, 1, 1) + datetime.timedelta(days=int(rng.integers(0, 2000)))
            row = {
                "user_id": str(rng.integers(1, 30)),
                # Ids of all scenarios overlap.
                f"{name}_id": str(rng.integers(1, 20)),
                "rating": str(rng.integers(1, 6)),
                "labels": "小说|日本",
                "comment": 'said "so"\tand\nwent on' if number % 50 == 7 else "很好",
                "time": day.isoformat(),
                "useful_num": str(rng.integers(0, 9)),
                "CategoryID": "3",
                "ID": str(number + 1),
            }
            listed.append(row)
        rows[name] = listed
    place = ["北京", "Milano, Italy", ""]
    rows["users"] = [
        {"UID": str(n), "user_id": f"name{n}", "living_place": place[n % 3], "join_time": f"20{n % 8 + 10}-07-10"}
        | {"self_statement": f"I am {n}."}
        for n in range(1, 30)
    ]
    return rows


def write(folder: Path, rows: dict[str, list[Row]], headers: dict[str, list[str]] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, names in ((headers or HEADERS) | {"users": USERS}).items():
        lines = ["\t".join(f'"{column}"' for column in names)]
        lines += ["\t".join('"' + row[column].replace('"', '""') + '"' for column in names) for row in rows[name]]
        file = "users_cleaned.txt" if name == "users" else f"{name}reviews_cleaned.txt"
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run(folder: Path, **settings: object) -> PrepareReport:
    config = {"kind": "douban", "raw": str(folder / "raw"), "threads": 1, **settings}
    return prepare(parse(Config, config, "test"), folder / "out")


def read(out: Path, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in sorted((out / split).glob("*.parquet")))


def vocabulary(out: Path, table: str) -> dict[int, object]:
    listed = pq.read_table(out / "vocabulary" / f"{table}.parquet").to_pydict()
    return dict(zip(listed["row"], listed["id"], strict=True))


def prepared(out: Path) -> list[tuple[object, ...]]:
    """(scenario, user, item, like, time) of every row."""
    users, items = vocabulary(out, "user_id"), vocabulary(out, "item_id")
    table = pa.concat_tables(read(out, split) for split in SPLITS).to_pydict()
    columns = ("scenario", "user_id", "item_id", "like", "time")
    return [
        (scenario, users[user], items[item], like, time)
        for scenario, user, item, like, time in zip(*(table[column] for column in columns), strict=True)
    ]


def expected(rows: dict[str, list[Row]]) -> list[tuple[object, ...]]:
    found = []
    for scenario, name in enumerate(HEADERS):
        for row in rows[name]:
            day = datetime.datetime.fromisoformat(row["time"]).replace(tzinfo=datetime.UTC)
            item = f"{name}:{row[f'{name}_id']}"
            found.append((scenario, int(row["user_id"]), item, int(int(row["rating"]) > 3), int(day.timestamp())))
    return found


def test_rows_are_those_of_the_files(tmp_path: Path) -> None:
    rows = raw_rows()
    write(tmp_path / "raw", rows)
    report = run(tmp_path)
    assert [scenario.name for scenario in FeatureSchema.read(tmp_path / "out").scenarios] == ["book", "music", "movie"]
    assert sum(report.rows.values()) == 1000
    assert sorted(prepared(tmp_path / "out")) == sorted(expected(rows))
    assert report.items == 57
    # The order of the columns does not matter, nor quotes within a comment that are not doubled.
    (tmp_path / "b").mkdir()
    raw = write(tmp_path / "b" / "raw", rows, {name: names[::-1] for name, names in HEADERS.items()})
    file = raw / "moviereviews_cleaned.txt"
    file.write_text(file.read_text().replace('""so""', '"so"'))
    run(tmp_path / "b")
    for split in SPLITS:
        assert read(tmp_path / "out", split).equals(read(tmp_path / "b" / "out", split))


def test_feedback_and_what_others_said_are_no_features(tmp_path: Path) -> None:
    rows = raw_rows()
    write(tmp_path / "raw", rows)
    run(tmp_path)
    schema = FeatureSchema.read(tmp_path / "out")
    names = ["user_id", "item_id", "living_place", "joined", "history"]
    assert [feature.name for feature in schema.features] == names
    assert not schema.numerics
    assert set(vocabulary(tmp_path / "out", "joined").values()) == {f"20{n + 10}-07" for n in range(8)}
    assert set(vocabulary(tmp_path / "out", "living_place").values()) == {"北京", "Milano, Italy"}
    users = pq.read_table(tmp_path / "out" / "users.parquet").to_pydict()
    assert users["self_statement"][0] == f"I am {users['id'][0]}."


def test_splits_by_time_and_histories_cross_scenarios(tmp_path: Path) -> None:
    write(tmp_path / "raw", raw_rows())
    run(tmp_path)
    tables = [read(tmp_path / "out", split).to_pydict() for split in SPLITS]
    for scenario in range(3):
        times = [
            [time for time, its in zip(table["time"], table["scenario"], strict=True) if its == scenario]
            for table in tables
        ]
        assert max(times[0]) < min(times[1])
        assert max(times[1]) < min(times[2])
    items = vocabulary(tmp_path / "out", "item_id")
    kinds = {str(items[item]).split(":")[0] for history in tables[2]["history"] for item in history}
    assert kinds == set(HEADERS)


def test_a_review_without_a_rating_has_no_label(tmp_path: Path) -> None:
    rows = raw_rows()
    rows["book"][3]["rating"] = ""
    rows["book"][5]["rating"] = "NA"
    write(tmp_path / "raw", rows)
    assert sum(run(tmp_path).rows.values()) == 1000
    assert FeatureSchema.read(tmp_path / "out").labels[0].mask == "rated"
    table = pa.concat_tables(read(tmp_path / "out", split) for split in SPLITS).to_pydict()
    assert [like for like, rated in zip(table["like"], table["rated"], strict=True) if not rated] == [0, 0]


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ValueError, match=r"\S") as error:
        run(folder)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert not (folder / "out").exists()


def test_missing_files_and_columns(tmp_path: Path) -> None:
    rows = raw_rows()
    refused(tmp_path, "bookreviews_cleaned.txt: no such file", "(raw)")
    write(tmp_path / "raw", rows, HEADERS | {"music": HEADERS["book"]} | {"music": ["user_id", "rating", "time"]})
    refused(tmp_path, "musicreviews_cleaned.txt, line 1: no column 'music_id' among user_id, rating, time")


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("user_id", "x1", ("line 12:", "to 'BIGINT'")),
        ("user_id", "3.7", ("row 9, column 'user_id': '3.7' is no whole number",)),
        ("rating", "good", ("line 12:", "to 'DOUBLE'")),
        ("time", "soon", ("line 12:", "to 'TIMESTAMP'")),
        ("user_id", "", ("row 9, column 'user_id': a null id",)),
        ("music_id", "", ("row 9, column 'item_id': a null id",)),
        ("time", "", ("row 9, column 'time': a null time",)),
    ],
)
def test_a_wrong_value(tmp_path: Path, column: str, value: str, words: tuple[str, ...]) -> None:
    rows = raw_rows()
    rows["music"][9][column] = value
    write(tmp_path / "raw", rows)
    refused(tmp_path, "musicreviews_cleaned.txt", *words)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('\t"500"\n', "\n", "line 511: no field for column 'ID'"),
        # The quote that is open takes in the following lines.
        ('\t"400"\n', '\t"400\n', "line "),
    ],
)
def test_a_line_that_was_cut(tmp_path: Path, old: str, new: str, words: str) -> None:
    write(tmp_path / "raw", raw_rows())
    file = tmp_path / "raw" / "moviereviews_cleaned.txt"
    file.write_text(file.read_text().replace(old, new))
    refused(tmp_path, f"moviereviews_cleaned.txt, {words}", "(raw)")


def test_a_place_called_na(tmp_path: Path) -> None:
    rows = raw_rows()
    rows["users"][0]["living_place"] = "NA"
    write(tmp_path / "raw", rows)
    run(tmp_path)
    assert set(vocabulary(tmp_path / "out", "living_place").values()) == {"北京", "Milano, Italy", "NA"}
