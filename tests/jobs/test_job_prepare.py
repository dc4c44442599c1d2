"""Jobs that are a phase alone, as Ray would run them: data that are prepared, a run that is evaluated."""

import json
import sys
from pathlib import Path

import pytest
import tomli_w

import canonical
import command
from msr_dist.metrics import Report

JOBS = Path(__file__).parents[2] / "jobs"
PREPARE, EVALUATE = ([sys.executable, str(JOBS / f"{name}.py")] for name in ("prepare", "evaluate"))


def test_data_are_prepared_once(tmp_path):
    config, out = tmp_path / "prepare.toml", tmp_path / "data"
    config.write_text(tomli_w.dumps({"kind": "synthetic", "users": 20, "items": 20, "scenarios": 2}))
    done = command.call(config, out, "rows=300", launched_by=PREPARE)
    assert done.returncode == 0, done.stderr
    assert "written to" in done.stderr
    made = (out / "schema.toml").stat().st_mtime_ns
    done = command.call(config, out, "rows=300", launched_by=PREPARE)
    assert done.returncode == 0, done.stderr
    assert "prepare: done before" in done.stderr
    assert (out / "schema.toml").stat().st_mtime_ns == made

    done = command.call(config, out, "rows=400", launched_by=PREPARE)
    assert done.returncode == 2
    assert "data holds data prepared with rows = 300, not 400: choose another folder" in done.stderr
    assert done.stderr.count("\n") == 1
    done = command.call(config, out, "knid=3", launched_by=PREPARE)
    assert done.returncode == 2
    assert done.stderr.startswith("prepare: ")
    assert "knid: unknown key; did you mean 'kind'?" in done.stderr


def test_a_run_is_evaluated(tmp_path):
    data = canonical.write(tmp_path / "data", rows=1500)
    assert command.call("train", command.write_config(tmp_path, data)).returncode == 0
    run = tmp_path / "runs/run"
    test = Report.from_json(json.loads((run / "metrics.json").read_text()))
    (run / "metrics.json").unlink()
    done = command.call(run, "--workers", 2, launched_by=EVALUATE)
    assert done.returncode == 0, done.stderr
    assert "run: test split" in done.stdout
    found = Report.from_json(json.loads((run / "metrics.json").read_text()))
    # Two ranks round other sums than one.
    assert found.flat("test") == pytest.approx(test.flat("test"), rel=1e-6)
    done = command.call(tmp_path, launched_by=EVALUATE)
    assert done.returncode == 2
    assert "no config.toml there" in done.stderr
    assert done.stderr.count("\n") == 1
