"""The comparison of retrieval models, through its own command, on small data."""

import json
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w

import canonical
import choices

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "retrieval.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return choices.write(tmp_path_factory.mktemp("data"))


def write_grid(folder: Path, data: Path, **changes) -> Path:
    raw = {
        "seeds": [0, 1],
        "judge": "recall_at_5",
        "against": [["sass", "base"]],
        "run": {
            "loader": {"batch_size": 120, "partitions": 2},
            "model": {"kind": "sass", "widths": [8]},
            "evaluation": {"top_k": [5]},
            "stages": [
                {"name": "contrast", "objective": {"kind": "contrastive"}},
                {"name": "choose", "objective": {"kind": "retrieval"}},
            ],
        },
        "search": {"trials": 2, "space": {"stages.choose.dense.lr": [0.001, 0.01], "stages.contrast.epochs": [1, 2]}},
        "data": [
            {
                "name": "small",
                "folder": str(data),
                "prepare": "none",
                # Of which the plain towers have neither.
                "set": ["model.share_gates=true", "stages.contrast.objective.pairs=3"],
            }
        ],
        "models": {
            "popular": {"untrained": "popularity", "stages": ["choose"]},
            "alike": {"untrained": "item_item", "stages": ["choose"]},
            "base": {"set": ["model.kind='two_tower'"], "stages": ["choose"]},
            "sass": {},
        },
    }
    file = folder / "small.toml"
    file.write_text(tomli_w.dumps(raw | changes))
    return file


def call(*words, timeout=200):
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "small" / name).read_text().splitlines()]


def expected(data: Path, kind: str) -> dict[int, tuple[int, float]]:
    """Queries and recall@5 by scenario, by hand."""
    rows = {split: choices.read(data / split) for split in ("train", "valid", "test")}
    known = {row["item"] for row in rows["train"] if row["item"]}
    offered = defaultdict(set)
    for split in rows.values():
        for row in split:
            if row["item"] in known:
                offered[row["scenario"]].add(row["item"])
    taken = [row for row in rows["train"] if row["click"] and row["item"]]
    popular = {s: Counter(row["item"] for row in taken if row["scenario"] == s) for s in offered}
    users = defaultdict(set)
    for row in taken:
        if row["user"]:
            users[row["item"]].add(row["user"])
    had = defaultdict(set)
    for row in [*rows["train"], *rows["valid"]]:
        if row["click"] and row["item"]:
            had[row["user"]].add(row["item"])
    truth = defaultdict(set)
    for row in rows["test"]:
        if row["click"] and row["user"] and row["item"] in known and row["item"] not in had[row["user"]]:
            truth[row["scenario"], row["user"]].add(row["item"])
    found = defaultdict(list)
    for (scenario, user), items in truth.items():
        most = max(1, max(popular[scenario].values(), default=0))

        def worth(item, scenario=scenario, user=user, most=most):
            near = sum(
                len(users[item] & users[other]) / max(1e-12, (len(users[item]) * len(users[other])) ** 0.5)
                for other in had[user]
                if other != item
            )
            counted = popular[scenario][item]
            return counted if kind == "popularity" else near + 1e-9 * counted / most

        order = sorted(offered[scenario] - had[user], key=lambda item: (-worth(item), item))
        found[scenario].append(len(items & set(order[:5])) / len(items))
    return {scenario: (len(each), sum(each) / len(each)) for scenario, each in found.items()}


def test_a_grid_is_searched_run_resumed_and_told(tmp_path, data):
    grid = write_grid(tmp_path, data)
    done = call("run", grid, "--workers", 2, "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    trials, runs = lines(tmp_path, "small-search.jsonl"), lines(tmp_path, "small.jsonl")
    # What the model lacks is no trial of its own.
    assert Counter(line["model"] for line in trials) == {"base": 2, "sass": 2}
    assert Counter(line["model"] for line in runs) == {"popular": 1, "alike": 1, "base": 2, "sass": 2}
    best = max(
        (line for line in trials if line["model"] == "sass"), key=lambda line: line["report"]["mean"]["recall_at_5"]
    )
    assert all(line["chosen"] == best["chosen"] for line in runs if line["model"] == "sass")
    for model, kind in (("popular", "popularity"), ("alike", "item_item")):
        report = next(line["report"] for line in runs if line["model"] == model)
        by_hand = expected(data, kind)
        for place, (name, metrics) in enumerate(report["scenarios"].items()):
            count, recall = by_hand.get(place, (0, None))
            assert report["queries"][name] == count
            assert metrics.get("recall_at_5") == (None if recall is None else pytest.approx(recall, abs=1e-9))
    # What stands is not run again, also where it was written before runs had some setting; what was lost is.
    kept = (tmp_path / "small/small.jsonl").read_text().splitlines()
    older = [json.loads(line) for line in kept[:-1]]
    for line in older:
        for stage in line["settings"]["stages"]:
            del stage["frozen_tables"]
    (tmp_path / "small/small.jsonl").write_text("".join(json.dumps(line) + "\n" for line in older))
    assert call("run", grid, "--workers", 1, "--results", tmp_path).returncode == 0
    again = lines(tmp_path, "small.jsonl")
    assert again[:-1] == older
    assert [(line["model"], line["seed"]) for line in again] == [(line["model"], line["seed"]) for line in runs]
    assert again[-1]["report"] == json.loads(kept[-1])["report"]
    assert call("report", grid, "--results", tmp_path).returncode == 0
    page = (tmp_path / "small/README.md").read_text()
    assert "| popular | 1 |" in page
    assert "| sass | 2 |" in page
    assert "- sass over base, 2 seeds: mean " in page


def apart(folder: Path, data: Path) -> Path:
    """The same data, but that no item of training is chosen in two scenarios."""
    shutil.copytree(data, folder)
    rows = pa.concat_tables(pq.read_table(file) for file in sorted((data / "train").glob("*.parquet")))
    item, scenario = rows["item"].to_numpy(), rows["scenario"].to_numpy()
    few = choices.TAUGHT
    own = np.where(item > 0, np.minimum(item, choices.NEVER_ITEM - 1 - few) // few * few + 1 + scenario, 0)
    rows = rows.set_column(rows.schema.get_field_index("item"), "item", pa.array(own))
    shutil.rmtree(folder / "train")
    canonical.write_split(folder / "train", rows, canonical.uneven(rows.num_rows, 12, 0))
    return folder


def test_a_trial_that_the_data_cannot_have_is_told_and_not_chosen(tmp_path, data):
    data = apart(tmp_path / "apart", data)
    pairs = {"stages.contrast.objective.sides": ["item", "both"], "stages.contrast.objective.space": ["labelled"]}
    models = {"sass": {}}
    grid = write_grid(tmp_path, data, seeds=[0], models=models, against=[], search={"trials": 2, "space": pairs})
    for _ in range(2):
        done = call("run", grid, "--results", tmp_path / "results", "--workers", 1)
        assert done.returncode == 1
        assert "failed: small-sass-valid-0: " in done.stderr
        assert "nobody was seen in two scenarios" in done.stderr
    found = [json.loads(line) for line in (tmp_path / "results/small/small-search.jsonl").read_text().splitlines()]
    assert ["failed" in line for line in found] == ["item" in line["chosen"].values() for line in found]
    assert len(found) == 2
    (final,) = [json.loads(line) for line in (tmp_path / "results/small/small.jsonl").read_text().splitlines()]
    assert final["chosen"]["stages.contrast.objective.sides"] == "both"
    assert call("report", grid, "--results", tmp_path / "results").returncode == 0


def test_what_is_wrong_is_one_line(tmp_path, data):
    grid = write_grid(tmp_path, data, models={"odd": {"set": ["model.widht=[8]"]}})
    done = call("run", grid, "--results", tmp_path)
    assert done.returncode == 2
    assert "odd on small: model.widht: unknown key; did you mean 'widths'?" in done.stderr
    grid = write_grid(tmp_path, tmp_path / "nowhere")
    done = call("run", grid, "--results", tmp_path)
    assert done.returncode == 2
    assert "data set small: no data in" in done.stderr
