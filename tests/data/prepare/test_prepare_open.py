"""Tables whose vocabulary is open: ids are hashed, nothing is listed."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msr_dist.data.prepare.canonical import prepare
from msr_dist.data.prepare.mapping import Columns, History, IdColumn, LabelColumn, ListColumn, NumericColumn, Split
from msr_dist.data.prepare.table import Config
from msr_dist.schema import OPEN_IDS, FeatureSchema


def expected(raw: object) -> int:
    """The documented hash, in the words of another library."""
    return 1 + int.from_bytes(hashlib.md5(str(raw).encode()).digest()[8:], "little") % (OPEN_IDS - 1)


def write(folder: Path) -> None:
    splits = ["train"] * 6 + ["valid"] * 2 + ["test"] * 2
    log = {
        "user": ["ann", "bob", "cem", "ann", "bob", "cem", "ann", "dora", "ann", "eve"],
        "item": [7, 7, 8, 9, 9, 7, 8, 11, 12, 7],
        "place": [0, 1] * 5,
        "device": [1, None, 2, 1, 1, 2, 3, None, 4, 1],
        "words": [["x"], [], ["y", "x"], None, ["x"], ["z"], ["new"], ["x", "new"], ["y"], []],
        "time": list(range(10)),
        "click": [1, 0, 1, 1, 1, 0, 1, 1, 1, 0],
        "split": splits,
    }
    pq.write_table(pa.table(log), folder / "log.parquet")
    items = {"item": [7, 8, 9, 11, 13], "maker": ["m", "n", None, "o", "m"], "title": list("abcde"), "price": [1.0] * 5}
    pq.write_table(pa.table(items), folder / "items.parquet")


def prepared(folder: Path, opened: dict[str, int] | None) -> tuple[FeatureSchema, dict[str, list[dict]]]:
    write(folder)
    config = Config(
        interactions=(str(folder / "log.parquet"),),
        items=(str(folder / "items.parquet"),),
        columns=Columns(
            user="user",
            item="item",
            scenario="place",
            time="time",
            labels=(LabelColumn(name="click"),),
            ids=(IdColumn(name="device"), IdColumn(name="maker", source="items")),
            lists=(ListColumn(name="words"),),
            numerics=(NumericColumn(name="price", source="items"),),
            item_text=("title",),
        ),
        split=Split(kind="column", column="split"),
        history=History(length=3),
        open_tables=opened,
        threads=1,
    )
    report = prepare(config, folder / "out")
    assert (report.users, report.items) == (3, 3)
    schema = FeatureSchema.read(folder / "out")
    splits = {name: pq.read_table(folder / "out" / name).to_pylist() for name in ("train", "valid", "test")}
    return schema, splits


ALL = {"user": 320, "item": 640, "device": 32, "maker": 32, "words": 64}


def test_ids_are_hashes_in_every_split(tmp_path):
    schema, splits = prepared(tmp_path, ALL)
    assert {table.name: (table.rows, table.vocabulary) for table in schema.tables} == {
        name: (rows, "open") for name, rows in ALL.items()
    }
    rows = [row for split in splits.values() for row in split]
    raw = pq.read_table(tmp_path / "log.parquet").to_pylist()
    makers = {7: "m", 8: "n", 11: "o"}
    for row, was in zip(rows, raw, strict=True):
        assert row["user"] == expected(was["user"])
        assert row["item"] == expected(was["item"])
        assert row["device"] == (expected(was["device"]) if was["device"] else 0)
        assert row["maker"] == (expected(makers[was["item"]]) if was["item"] in makers else 0)
        assert row["words"] == [expected(word) for word in was["words"] or []]
    # What ann clicked before, in training alone: with splits of a column, nothing else is known to be earlier.
    assert splits["test"][0]["history"] == [expected(9), expected(7)]


def test_nothing_is_listed(tmp_path):
    prepared(tmp_path, ALL)
    assert list((tmp_path / "out/vocabulary").iterdir()) == []
    items = pq.read_table(tmp_path / "out/items.parquet").to_pylist()
    assert sorted((item["id"], item["row"], item["title"]) for item in items) == [
        (raw, expected(raw), title) for raw, title in zip([7, 8, 9, 11, 13], "abcde", strict=True)
    ]


def test_some_tables_may_be_open_and_others_not(tmp_path):
    (tmp_path / "closed").mkdir()
    (tmp_path / "open").mkdir()
    listed, before = prepared(tmp_path / "closed", None)
    schema, splits = prepared(tmp_path / "open", {"item": 96})
    assert [table for table in schema.tables if not table.is_open] == [
        table for table in listed.tables if table.name != "item"
    ]
    for name in ("user", "device", "maker", "words"):
        assert [[row[name] for row in splits[split]] for split in splits] == [
            [row[name] for row in before[split]] for split in before
        ]
    assert [row["item"] for row in splits["valid"]] == [expected(8), expected(11)]
    assert sorted(file.stem for file in (tmp_path / "open/out/vocabulary").iterdir()) == [
        "device", "maker", "user", "words"
    ]  # fmt: skip
    text = (tmp_path / "closed/out/schema.toml").read_text() + (tmp_path / "closed/out/prepare.toml").read_text()
    assert "vocabulary =" not in text
    assert "open_tables" not in text


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(
        ValueError, match="open_tables: there is no table 'itme'; there are user, item, device, maker, words"
    ):
        prepared(tmp_path, {"itme": 32})
