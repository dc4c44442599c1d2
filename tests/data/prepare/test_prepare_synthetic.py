import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msr_dist.config import parse
from msr_dist.data.prepare.canonical import prepare
from msr_dist.data.prepare.oracle import auc, best_possible
from msr_dist.data.prepare.planted import Popularity, normal, uniform
from msr_dist.data.prepare.report import PrepareReport
from msr_dist.data.prepare.synthetic import Config
from msr_dist.schema import SPLITS, FeatureSchema


def run(out: Path, **settings: object) -> PrepareReport:
    small = {"kind": "synthetic", "rows": 20_000, "users": 300, "items": 100}
    return prepare(parse(Config, small | settings, "test"), out)


def read(out: Path, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in sorted((out / split).glob("*.parquet")))


def test_scenarios_are_skewed_and_described(tmp_path: Path) -> None:
    report = run(tmp_path / "out", scenarios=9)
    assert sum(report.rows.values()) == 20_000
    train = [each.rows for each in report.scenarios if each.split == "train"]
    assert train == sorted(train, reverse=True)
    assert train[0] > 7 * train[-1]
    scenarios = FeatureSchema.read(tmp_path / "out").scenarios
    assert scenarios[8].name == "place 9"
    assert all(scenario.text.startswith("The ") for scenario in scenarios)


def test_texts_tags_and_labels(tmp_path: Path) -> None:
    run(tmp_path / "out")
    items = pq.read_table(tmp_path / "out/items.parquet").to_pydict()
    assert all(category in title for category, title in zip(items["category_text"], items["title"], strict=True))
    train = read(tmp_path / "out", "train").to_pydict()
    assert {len(tags) for tags in train["tags"]} == {1, 2, 3}
    assert [bool(click) for click in train["click"]] == train["clicked"]
    assert not any(
        bought and not clicked for bought, clicked in zip(train["conversion"], train["clicked"], strict=True)
    )


def test_oracle_is_on_the_rows_of_the_test_split(tmp_path: Path) -> None:
    run(tmp_path / "out")
    oracle = json.loads((tmp_path / "out/oracle.json").read_text())
    test = read(tmp_path / "out", "test")
    assert oracle["split"] == "test"
    assert oracle["overall"]["click"]["rows"] == test.num_rows
    assert oracle["overall"]["conversion"]["rows"] == sum(test["clicked"].to_pylist())
    names = [scenario.name for scenario in FeatureSchema.read(tmp_path / "out").scenarios]
    for place, name in enumerate(names):
        assert oracle["scenarios"][name]["click"]["rows"] == (test["scenario"].to_numpy() == place).sum()
        assert 0.65 < oracle["scenarios"][name]["click"]["auc"] < 0.9
        assert 0.3 < oracle["scenarios"][name]["click"]["log_loss"] < 0.69


def test_seeds_and_chunks(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(tmp_path / name, seed=seed, rows=300_000 if name == "a" else 20_000, users=50)
    assert sum(read(tmp_path / "a", split).num_rows for split in SPLITS) == 300_000
    run(tmp_path / "d", seed=3, users=50)
    assert read(tmp_path / "b", "train").equals(read(tmp_path / "d", "train"))
    assert not read(tmp_path / "b", "train").equals(read(tmp_path / "c", "train"))


def test_hashed_numbers_have_their_distributions() -> None:
    ids = np.arange(200_000)
    drawn = normal(1, "x", ids)
    assert drawn.mean() == pytest.approx(0, abs=0.01)
    assert drawn.std() == pytest.approx(1, abs=0.01)
    assert np.corrcoef(uniform(1, "x", ids), uniform(1, "y", ids))[0, 1] == pytest.approx(0, abs=0.01)
    assert np.histogram(uniform(2, "x", ids), 10, (0, 1))[0] == pytest.approx(20_000, rel=0.03)


def test_popularity_shares_are_those_drawn() -> None:
    popularity = Popularity(50, 0.7)
    assert popularity.share(np.arange(50)).sum() == pytest.approx(1)
    counts = np.bincount(popularity.draw(np.random.default_rng(0).random(400_000)), minlength=50) / 400_000
    assert counts == pytest.approx(popularity.share(np.arange(50)), abs=0.002)


def test_auc_counts_ties_as_half_and_one_class_has_none() -> None:
    score, label = np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, True, False, True])
    assert auc(score, label) == pytest.approx(3.5 / 4)
    assert "auc" not in best_possible(score, np.ones(4, bool))
    assert best_possible(score[:0], label[:0]) == {"rows": 0}
