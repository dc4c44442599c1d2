import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from msr_dist.config import parse
from msr_dist.data.prepare.canonical import prepare
from msr_dist.data.prepare.drifting import Config
from msr_dist.schema import FeatureSchema


def run(out: Path, **settings: object) -> pa.Table:
    small = {"kind": "drifting", "rows": 20_000, "users": 200, "items": 100, "split": {"fractions": [0.5, 0.25, 0.25]}}
    prepare(parse(Config, small | settings, "test"), out)
    return pa.concat_tables(
        pq.read_table(file) for split in ("train", "valid", "test") for file in sorted((out / split).glob("*.parquet"))
    )


def test_users_and_items_come_and_go(tmp_path: Path) -> None:
    opened = run(tmp_path / "open", turnover=4.0, open_tables={"user_id": 64, "item_id": 32})
    assert [table.vocabulary for table in FeatureSchema.read(tmp_path / "open").tables] == ["open", "open"]
    for name, places in (("user_id", 200), ("item_id", 100)):
        ids = opened[name].to_numpy()
        assert 4 * places < len(np.unique(ids)) <= 5 * places
        # An eighth of the log is half of a life.
        first, second, last = (set(part.tolist()) for part in np.array_split(ids, 8)[:3])
        assert 0.6 * places < len(first) <= 1.6 * places
        assert len(first & second) > 0.4 * len(first)
        assert len(first & last) < len(first & second)
        assert not first & set(ids[-len(ids) // 2 :].tolist())


def test_without_turnover_nobody_leaves(tmp_path: Path) -> None:
    still = run(tmp_path / "still", turnover=0.0)
    halves = np.array_split(still["item_id"].to_numpy(), 2)
    assert len(set(halves[0].tolist()) ^ set(halves[1].tolist())) <= 2


def test_the_best_possible_is_known_and_ids_are_all_there_is(tmp_path: Path) -> None:
    run(tmp_path / "out", rows=40_000)
    oracle = json.loads((tmp_path / "out/oracle.json").read_text())["overall"]["click"]
    assert 0.75 < oracle["auc"] < 0.9
    assert oracle["rows"] == 10_000
    assert [feature.name for feature in FeatureSchema.read(tmp_path / "out").features] == ["user_id", "item_id"]
