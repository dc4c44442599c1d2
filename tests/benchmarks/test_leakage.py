"""The benchmark of leakage through the real command, on choices of which one is newer than the row that it tells."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import command
from msr_dist.schema import Feature, FeatureSchema, Label, Scenario, Table

LEAKAGE = [sys.executable, str(Path(__file__).parents[2] / "benchmarks" / "leakage.py")]
TITLES = ["red apple", "green apple", "blue car", "fast car"]


@pytest.fixture
def data(tmp_path) -> Path:
    """User 1 chose an apple at time 1 and a car at 9; a row at time 5 asks about the other car, and another apple."""
    names = ("user", "item")
    FeatureSchema(
        user="user",
        item="item",
        labels=(Label(name="like"),),
        scenarios=(Scenario(id=0, name="shop"),),
        tables=tuple(Table(name=name, rows=5, width=4) for name in names),
        features=tuple(Feature(name=name, table=name, group=name) for name in names),
    ).save(tmp_path)
    pq.write_table(pa.table({"row": [1, 2, 3, 4], "title": TITLES}), tmp_path / "items.parquet")
    for split, items, likes, times in (("train", [1, 3, 2], [1, 1, 0], [1, 9, 0]), ("test", [4, 2], [1, 0], [5, 5])):
        (tmp_path / split).mkdir()
        rows = {"user": [1] * len(items), "item": items, "like": likes, "scenario": [0] * len(items), "time": times}
        pq.write_table(pa.table(rows), tmp_path / split / "part-00000.parquet")
    return tmp_path


def test_newer_choices_tell_what_older_ones_do_not(data):
    done = command.call(str(data), launched_by=LEAKAGE)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[0])
    assert line["rows"] == 2
    assert line["later"] == 1.0
    assert line["auc"]["older"] == 0.0
    assert line["auc"]["all"] > line["auc"]["older"]


def test_a_text_that_is_not_there_is_named(data):
    done = command.call(str(data), "--text", "name", launched_by=LEAKAGE)
    assert done.returncode == 2
    assert "items.parquet has no column 'name'; it has row, title" in done.stderr
