"""A search on small data through the real command and Ray's own trials."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import canonical
import command
from msr_dist.config import load
from msr_dist.run import RunConfig

TUNE = [sys.executable, str(Path(__file__).parents[2] / "jobs" / "tune.py")]


@pytest.fixture
def data(tmp_path):
    return canonical.write(tmp_path / "data", rows=3000)


@pytest.fixture
def tune(monkeypatch):
    """The script as a module; what it sets in the environment is taken back."""
    monkeypatch.syspath_prepend(Path(TUNE[1]).parent)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "1")
    import tune

    return tune


def table(printed: str) -> list[list[str]]:
    """The rows of the table of trials."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│ 0." in line]
    return [row for row in rows if len(row) == 6]


def test_a_search_is_broken_off_and_goes_on_without_the_test_split(tmp_path, data, tune):
    # Relative, as in the examples: Ray's trials have a working directory of their own.
    config = command.write_config(tmp_path, Path(os.path.relpath(data)), stages=[{"epochs": 6}])
    (data / "test").rename(tmp_path / "hidden")
    words = [config, "--trials", "3", "--workers", "1"]
    process = subprocess.Popen(
        [*TUNE, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    results = tmp_path / "runs/run-tune/tune"
    begun = time.monotonic()
    while not any(file.stat().st_size for file in results.glob("*/result.json")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - begun < 120
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the same command goes on" in errors
    assert not (tmp_path / "runs/run-tuned.toml").exists()

    done = command.call(*words, launched_by=TUNE)
    assert done.returncode == 0, done.stderr
    trials = table(done.stdout)
    assert len(trials) == 3
    assert trials[0][1] == "6"
    finished = [float(row[0]) for row in trials if row[1] == "6"]
    assert finished == sorted(finished, reverse=True)
    assert finished[0] > 0.6
    assert (tmp_path / "runs/run-tune/curves.svg").stat().st_size > 1000

    # A search that is over is shown again, another one refused.
    again = command.call(*words, launched_by=TUNE)
    assert table(again.stdout) == trials
    base = load(RunConfig, config)
    with pytest.raises(ValueError, match="holds another search: choose another name=, or delete that folder"):
        tune._search(base, tune._space(base, None, ""), 3, 1, 0.0, seed=1)

    (tmp_path / "hidden").rename(data / "test")
    tuned = command.call("train", tmp_path / "runs/run-tuned.toml")
    assert tuned.returncode == 0, tuned.stderr
    assert "run-tuned: test split" in tuned.stdout
    assert f"lr = {trials[0][2]}"[:8] in (tmp_path / "runs/run-tuned.toml").read_text()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ('"stages.0.dense.lr" = {log_uniform = [0.0, 0.1]}', "[0.0, 0.1] is no range to draw from"),
        ('"stages.0.dense.lr" = {choice = []}', "choice = [] has nothing to draw from"),
        ('"stages.0.dense.lr" = {}', "give one of log_uniform"),
        ('"model.dropuot" = {choice = [0.1]}', "model.dropuot: unknown key; did you mean 'dropout'?"),
        ('"model.dropout" = {uniform = [0.1, 1.5]}', "less than 1 (got 1.5)"),
        ('"stages.3.dense.lr" = {choice = [0.1]}', "stages.3.dense.lr: the run has one stage; the last is stages.0"),
        ('"evaluation.final" = {choice = ["test"]}', "evaluation.final: a search draws settings of loader, embeddings"),
        ('"name" = {choice = ["a"]}', "name: a search draws settings of"),
        ("", "search: Dictionary should have at least 1 item"),
    ],
)
def test_a_wrong_space(tmp_path, data, tune, space, message):
    (tmp_path / "space.toml").write_text(f"[search]\n{space}\n")
    base = load(RunConfig, command.write_config(tmp_path, data))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        tune._space(base, tmp_path / "space.toml", "run.toml")
    assert "\n" not in str(error.value)


def test_a_search_that_cannot_begin_keeps_no_other_from_its_name(tmp_path, data):
    # No machine of the tests has as many: Ray would wait for one.
    done = command.call(command.write_config(tmp_path, data), "--gpus", "1000", launched_by=TUNE)
    assert done.returncode == 2
    assert "--gpus 1000: no machine of this Ray has as many" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs/run-tune/request.json").exists()


@pytest.mark.parametrize("words", [("--workers", "0"), ("--gpus", "-1"), ("--trials", "0")])
def test_numbers_out_of_range(tune, words):
    done = CliRunner().invoke(tune.main, ["run.toml", *words])
    assert done.exit_code == 2
    assert f"Invalid value for '{words[0]}'" in done.output
