"""Runs that are told to stop, by signals that are really sent, and gone on with."""

import json
import re
import signal
import subprocess
import time

import pytest

import canonical
import command
import launched
from msr_dist.config import load
from msr_dist.launch import launch
from msr_dist.run import RunConfig
from msr_dist.train import train

LONG = {
    "stages": [{"epochs": 8, "schedule": {"decay": "cosine"}}],
    "evaluation": {"validate_epochs": 2},
    "checkpoint": {"background": True},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return canonical.write(tmp_path_factory.mktemp("data"), rows=3000)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    """The folder of a run of two ranks that nothing stops."""
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = LONG | {"checkpoint": {}}
    run = load(RunConfig, command.write_config(folder, data, **settings)).claim_folder()
    launch(train, run, "local", 2, run.folder)
    return run.folder


def agree(folder, undisturbed) -> None:
    """Not a bit is another one."""
    assert command.losses(folder) == command.losses(undisturbed)
    assert json.loads((folder / "metrics.json").read_text()) == json.loads((undisturbed / "metrics.json").read_text())


def test_sigterm_at_ten_random_steps_changes_nothing(tmp_path, data, undisturbed):
    run = load(RunConfig, command.write_config(tmp_path, data, **LONG)).claim_folder()
    launch(launched.train_with_stops, launched.Stops(run, times=10), "local", 2, run.folder)
    stops = json.loads((run.folder / "stops.json").read_text())
    steps = [
        int(re.match(r"stopped after step (\d+) of 200 of stage train, which is saved", stop)[1]) for stop in stops
    ]
    assert len(steps) == 10
    assert steps == sorted(set(steps))
    assert len(command.losses(run.folder)) == 200
    agree(run.folder, undisturbed)


def wait_for_steps(folder, process, count: int) -> None:
    begun = time.monotonic()
    while not (folder / "metrics.jsonl").exists() or len(command.losses(folder)) < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - begun < 250
        time.sleep(0.01)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("launcher", "workers", "number"),
    [("local", 1, signal.SIGINT), ("local", 2, signal.SIGTERM), ("ray", 2, signal.SIGTERM)],
)
def test_the_command_saves_and_leaves(tmp_path, data, launcher, workers, number):
    config = command.write_config(tmp_path, data, **LONG)
    # So long that it is not over before the wish has come to Ray's workers.
    words = [*command.COMMAND, "train", str(config), "stages.0.epochs=80"]
    words += ["--launcher", launcher, "--workers", str(workers)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(tmp_path / "runs/run", process, 3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 75, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("msr-dist: ")]
    step = re.match(r"msr-dist: stopped after step (\d+) of 2000 .* the same command goes on from there$", line)
    assert step, errors
    assert "starting all again" not in errors
    assert (tmp_path / f"runs/run/checkpoints/stage-0-step-{int(step[1]):09d}").is_dir()
    assert not list((tmp_path / "runs/run").glob("stopped*"))
