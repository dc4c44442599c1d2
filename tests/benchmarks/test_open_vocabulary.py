"""The benchmark of vocabularies through the real command."""

import json
import sys
from pathlib import Path

import command

VOCABULARY = [sys.executable, str(Path(__file__).parents[2] / "benchmarks" / "vocabulary.py")]


def test_every_way_is_measured_once(tmp_path):
    words = ("--folder", tmp_path, "--rows", 6000, "--shares", 0.25, "--seeds", 1)
    for _ in range(2):
        done = command.call(*words, launched_by=VOCABULARY, timeout=250)
        assert done.returncode == 0, done.stderr
    assert "| data | rows / ids | all | managed | no ageing | shared | hits, managed |" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["way"] for line in lines] == ["all", "managed", "shared", "no ageing"]
    assert all(0.3 < line["auc"] < 0.9 for line in lines)
    assert lines[0]["rows"]["user_id"] > 3 * lines[1]["rows"]["user_id"]
    assert set(lines[1]["used"]) == {
        f"{table}/{value}"
        for table in ("user_id", "item_id")
        for value in ("occupancy", "hits", "admissions", "evictions")
    }


def test_files_that_are_not_given():
    done = command.call("--data", "amazon14", launched_by=VOCABULARY)
    assert done.returncode == 2
    assert "--data amazon14 needs --raw" in done.stderr.splitlines()[-1]
