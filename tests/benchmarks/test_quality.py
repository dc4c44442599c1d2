"""Grids on small data through the real command."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w

import canonical
import command

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QUALITY = [sys.executable, str(BENCHMARKS / "quality.py")]


@pytest.fixture
def data(tmp_path):
    return canonical.write(tmp_path / "data", rows=3000)


def write_grid(folder: Path, **changes) -> Path:
    raw = {
        "seeds": [0, 1],
        "run": {"log_every": 2, "loader": {"batch_size": 300}, "tracking": {"enabled": False}},
        "data": [{"name": "small", "folder": str(folder / "data"), "prepare": "msr-dist prepare small"}],
    }
    file = folder / "grid.toml"
    file.write_text(tomli_w.dumps(raw | changes))
    return file


def quality(*words, **options) -> subprocess.CompletedProcess:
    return command.call(*words, launched_by=QUALITY, **options)


def lines(folder: Path, name: str = "small.jsonl") -> list[dict]:
    file = folder / "results" / "grid" / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


SEARCH = {"trials": 2, "space": {"stages.0.dense.lr": [0.001, 0.004], "model.dropout": [0.0, 0.2]}}
MODELS = {"mlp": {"widths": [4]}, "mmoe": {"experts": 2, "widths": [4], "tower_widths": [4], "dropout": 0.1}}


def test_a_grid_from_the_search_to_the_report(tmp_path, data):
    grid, results = write_grid(tmp_path, models=MODELS, search=SEARCH), tmp_path / "results"
    # Trials must not know the test split: it is not there.
    (data / "test").rename(tmp_path / "hidden")
    done = quality("run", grid, "--local", "--only", "search", "--results", results)
    assert done.returncode == 0, done.stderr
    search = lines(tmp_path, "small-search.jsonl")
    assert [line["model"] for line in search] == ["mlp", "mlp", "mmoe", "mmoe"]
    assert [line["chosen"] for line in search[:2]] == [line["chosen"] for line in search[2:]]
    assert {line["overall"]["rows"] for line in search} == {750}
    (tmp_path / "hidden").rename(data / "test")

    done = quality("run", grid, "--workers", "2", "--results", results)
    assert done.returncode == 0, done.stderr
    assert "search: 4 of 4 runs stand already" in done.stderr
    found = lines(tmp_path)
    assert {(line["model"], line["seed"]) for line in found} == {(m, s) for m in MODELS for s in (0, 1)}
    for model in MODELS:
        trials = [line for line in search if line["model"] == model]
        best = max(trials, key=lambda line: sum(b["auc"] * b["rows"] for b in line["scenarios"].values()))
        assert {str(line["chosen"]) for line in found if line["model"] == model} == {str(best["chosen"])}
    assert found[0]["dense_parameters"] > 0
    assert found[0]["samples_per_second"] > 0
    assert found[0]["commit"]

    # A lost line is made again, and nothing else; equal to what it was.
    file = results / "grid" / "small.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]) + '{"model": "ml')
    done = quality("run", grid, "--local", "--only", "final", "--results", results)
    assert done.returncode == 0, done.stderr
    kept = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    again = kept[3]["overall"]["auc"]
    assert kept[:3] == found[:3]
    assert (len(kept), again) == (4, found[3]["overall"]["auc"])

    done = quality("report", grid, "--results", results)
    assert done.returncode == 0, done.stderr
    text = (results / "grid" / "README.md").read_text()
    assert "| mlp | 2 |" in text
    assert "gain over mlp" in text
    plots = {plot: plot.read_bytes() for plot in (results / "grid").glob("*.svg")}
    assert {plot.stem for plot in plots} == {"small-gain", "small-speed"}
    assert quality("report", grid, "--results", results).returncode == 0
    assert all(plot.read_bytes() == before for plot, before in plots.items())


@pytest.mark.usefixtures("data")
def test_an_interrupted_grid_keeps_what_has_finished(tmp_path):
    grid = write_grid(tmp_path, models={"mlp": {}}, search={}, seeds=list(range(50)))
    words = [*QUALITY, "run", str(grid), "--local", "--results", str(tmp_path / "results")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begun = time.monotonic()
    while not lines(tmp_path):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - begun < 60
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command goes on" in errors
    before = lines(tmp_path)
    assert 1 <= len(before) < 50

    grid = write_grid(tmp_path, models={"mlp": {}}, search={}, seeds=list(range(len(before) + 1)))
    assert quality("run", grid, "--local", "--results", tmp_path / "results").returncode == 0
    assert lines(tmp_path)[:-1] == before
    assert [line["seed"] for line in lines(tmp_path)] == list(range(len(before) + 1))


@pytest.mark.usefixtures("data")
def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path):
    models = {"broken": {"kind": "mlp", "widths": [4]}, "mlp": {"widths": [4]}}
    run = {"loader": {"batch_size": 300}, "tracking": {"enabled": False}}
    search = {"trials": 2, "space": {"stages.0.dense.lr": [0.001, 1e30]}}
    grid = write_grid(tmp_path, models=models, run=run, search=search, seeds=[0])
    done = quality("run", grid, "--local", "--results", tmp_path / "results")
    assert done.returncode == 1
    assert done.stderr.count("failed: small-") == 2
    assert "ValueError: stage train: the loss is nan at step" in done.stderr
    assert [line["chosen"] for line in lines(tmp_path)] == [{"stages.0.dense.lr": 0.001}] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "sedes: unknown key; did you mean 'seeds'?"),
        ({"models": {"starr": {}}}, "starr on small: model: unknown kind 'starr'; did you mean 'star'?"),
        ({"search": {"trials": 1, "space": {"model.dropuot": [0.1]}}}, "model.dropuot: no model of this grid has"),
        ({"search": {"trials": 1, "space": {"stages.0.dense.lr": [-1.0]}}}, "greater than 0 (got -1.0)"),
        ({"run": {"seed": 3}}, "run.seed: the grid sets it; leave it out"),
        ({"seeds": [1, 1]}, "seeds: [1, 1] names one twice"),
    ],
)
def test_a_wrong_grid(tmp_path, monkeypatch, changes, message):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from quality_grid import Grid

    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Grid(write_grid(tmp_path, **({"models": {"mlp": {}}, "search": {}} | changes)))
    assert "\n" not in str(error.value)


def test_absent_data_end_in_one_line(tmp_path):
    done = quality("run", write_grid(tmp_path, models={"mlp": {}}), "--local")
    assert done.returncode == 2
    assert f"data set small: no data in {tmp_path}/data; make them: msr-dist prepare small" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("data")
def test_a_line_stands_under_defaults_that_are_new_and_no_others(tmp_path):
    grid = write_grid(tmp_path, models={"mlp": {}}, search={}, seeds=[0])
    words = ("run", grid, "--local", "--results", tmp_path / "results")
    assert quality(*words).returncode == 0
    file, (line,) = tmp_path / "results" / "grid" / "small.jsonl", lines(tmp_path)
    del line["settings"]["loader"]["window_rows"]
    file.write_text(json.dumps(line) + "\n")
    assert "seed 0: 1 of 1 runs stand already" in quality(*words).stderr
    line["settings"]["loader"]["window_rows"] = 77
    file.write_text(json.dumps(line) + "\n")
    assert "seed 0: 0 of 1 runs stand already" in quality(*words).stderr
    assert len(lines(tmp_path)) == 2
