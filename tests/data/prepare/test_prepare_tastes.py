import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from msr_dist.config import parse
from msr_dist.data.prepare.canonical import prepare
from msr_dist.data.prepare.report import PrepareReport
from msr_dist.data.prepare.tastes import Config
from msr_dist.schema import SPLITS


def run(out: Path, **settings: object) -> PrepareReport:
    small = {"kind": "tastes", "rows": 6000, "users": 200, "items": 40, "top_k": [5, 10]}
    return prepare(parse(Config, small | settings, "test"), out)


def read(out: Path, split: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = pa.concat_tables(
        pq.read_table(file) for file in sorted((out / split).glob("*.parquet"))
    ).to_pydict()
    return found


def test_the_last_scenario_is_new_in_training_alone(tmp_path: Path) -> None:
    report = run(tmp_path / "out")
    rows = {(each.split, each.scenario): each.rows for each in report.scenarios}
    assert rows["train", "cart"] < 0.05 * rows["train", "home"]
    assert 0.8 < rows["test", "cart"] / rows["test", "home"] < 1.25
    # Items are the scenario's own, users are everybody's.
    by_scenario: dict[int, set[int]] = {}
    for split in SPLITS:
        columns = read(tmp_path / "out", split)
        for scenario, item in zip(columns["scenario"], columns["item_id"], strict=True):
            if item:
                by_scenario.setdefault(scenario, set()).add(item)
        assert set(columns["chosen"]) == {1}
    assert not by_scenario[0] & by_scenario[1]
    assert not by_scenario[1] & by_scenario[2]


def test_choices_follow_the_tastes() -> None:
    config = parse(Config, {"kind": "tastes", "users": 50, "items": 30, "rows": 20_000}, "test")
    log = pa.concat_tables(config._log()).to_pydict()
    user, item, scenario = (np.array(log[name]) for name in ("user_id", "item_id", "scenario"))
    for place in (0, 2):
        here = scenario == place
        odds = config._odds(place, np.arange(50))
        p = np.exp(odds - odds.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        expected = p[user[here]].sum(0)
        counted = np.bincount(item[here] - place * 30, minlength=30)
        # Chi-square of 29 degrees of freedom: beyond 60 once in a thousand.
        assert ((counted - expected) ** 2 / np.maximum(expected, 1)).sum() < 60


def test_the_best_possible_beats_the_most_popular_by_hand(tmp_path: Path) -> None:
    run(tmp_path / "out")
    found = json.loads((tmp_path / "out/oracle.json").read_text())
    assert found["split"] == "test"
    best = found["scenarios"]["home"]
    columns = {split: read(tmp_path / "out", split) for split in SPLITS}

    def chosen(splits: tuple[str, ...]) -> dict[int, set[int]]:
        by_user: dict[int, set[int]] = {}
        for split in splits:
            of = columns[split]
            for user, item, scenario in zip(of["user_id"], of["item_id"], of["scenario"], strict=True):
                if scenario == 0 and user and item:
                    by_user.setdefault(user, set()).add(item)
        return by_user

    before, asked = chosen(("train", "valid")), chosen(("test",))
    counts: dict[int, int] = {}
    for items in chosen(("train",)).values():
        for item in items:
            counts[item] = counts.get(item, 0) + 1
    popular = sorted(counts, key=lambda item: -counts[item])
    recalls = []
    for user, items in asked.items():
        truth = items - before.get(user, set())
        if truth:
            offered = [item for item in popular if item not in before.get(user, set())]
            recalls.append(len(truth & set(offered[:5])) / len(truth))
    assert best["queries"] == len(recalls)
    assert best["recall_at_5"] > 1.3 * float(np.mean(recalls))
    assert best["recall_at_10"] > best["recall_at_5"]
    run(tmp_path / "again")
    assert (tmp_path / "again/oracle.json").read_text() == (tmp_path / "out/oracle.json").read_text()
