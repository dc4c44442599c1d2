"""A search on small data through the real command and Ray's own trials."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import canonical
import command

TUNE = [sys.executable, str(Path(__file__).parents[2] / "jobs" / "tune.py")]


@pytest.fixture
def data(tmp_path):
    return canonical.write(tmp_path / "data", rows=3000)


def table(printed: str) -> list[list[str]]:
    """The rows of the table of trials."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│ 0." in line]
    return [row for row in rows if len(row) == 6]


def test_a_search_is_broken_off_and_goes_on_without_the_test_split(tmp_path, data):
    config = command.write_config(tmp_path, data, stages=[{"epochs": 6}])
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
    refused = command.call(*words, "--seed", "1", launched_by=TUNE)
    assert refused.returncode == 2
    assert "holds another search: choose another name=, or delete that folder" in refused.stderr

    (tmp_path / "hidden").rename(data / "test")
    tuned = command.call("train", tmp_path / "runs/run-tuned.toml")
    assert tuned.returncode == 0, tuned.stderr
    assert "run-tuned: test split" in tuned.stdout
    assert f"lr = {trials[0][2]}"[:8] in (tmp_path / "runs/run-tuned.toml").read_text()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ('"stages.0.dense.lr" = {log_uniform = [0.0, 0.1]}', "[0.0, 0.1] is no range to draw from"),
        ('"stages.0.dense.lr" = {}', "give one of log_uniform"),
        ('"model.dropuot" = {choice = [0.1]}', "model.dropuot: unknown key; did you mean 'dropout'?"),
    ],
)
def test_a_wrong_space_ends_in_one_line(tmp_path, data, space, message):
    (tmp_path / "space.toml").write_text(f"[search]\n{space}\n")
    config = command.write_config(tmp_path, data)
    done = command.call(config, "--space", tmp_path / "space.toml", launched_by=TUNE)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
