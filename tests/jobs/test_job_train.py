"""The job of a cluster, as Ray would run it: both stages of SASS from one file."""

import json
import sys
from pathlib import Path

import choices
import command
from msr_dist.config import dump
from retrieving import run_config

TRAIN = [sys.executable, str(Path(__file__).parents[2] / "jobs" / "train.py")]


def test_two_ray_workers_run_both_stages(tmp_path):
    run = run_config(tmp_path, choices.write(tmp_path / "data"))
    config = tmp_path / "run.toml"
    config.write_text(dump(run))
    done = command.call(config, "--workers", 2, launched_by=TRAIN, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "recall@10" in done.stdout
    assert {"contrast", "retrieve"} <= {
        name.split("/")[0]
        for line in (run.folder / "metrics.jsonl").read_text().splitlines()
        for name in json.loads(line)["metrics"]
    }
    assert (run.folder / "metrics.json").exists()


def test_what_is_wrong_is_one_line(tmp_path):
    run = run_config(tmp_path, tmp_path / "nothing")
    config = tmp_path / "run.toml"
    config.write_text(dump(run))
    done = command.call(config, launched_by=TRAIN)
    assert done.returncode == 2
    assert done.stderr.startswith("train: ")
    assert "no schema.toml there" in done.stderr
    assert done.stderr.count("\n") == 1
