"""Runs in which a rank hangs."""

import re
import signal
import subprocess
import threading
import time

import psutil
import pytest

import canonical
import command
from msr_dist.distributed import World
from msr_dist.watch import _blame as blame
from msr_dist.watch import _Watch as Watch


def last_beat(folder):
    """Where the second rank was when it last said so."""
    beat = folder / "heartbeats/rank-1.json"
    return beat.read_text() if beat.exists() else ""


@pytest.mark.timeout(600)
def test_a_rank_that_stops_is_named_and_replaced(tmp_path):
    data = canonical.write(tmp_path / "data", rows=3000)
    # Longer than the ranks of a busy machine take to begin.
    settings = {"stages": [{"epochs": 16}], "checkpoint": {"every_steps": 5}, "watch": {"stalled_after": 20}}
    config = command.write_config(tmp_path, data, **settings)
    words = [*command.COMMAND, "train", str(config), "--workers", "2", "--restarts", "1"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "runs/run"
    begun = time.monotonic()
    while not (list((folder / "checkpoints").glob("stage-0-step-*[0-9]")) and "train" in last_beat(folder)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - begun < 200
        time.sleep(0.02)
    stopped = max(command.ranks_of(process), key=lambda each: each.pid)
    stopped.send_signal(signal.SIGSTOP)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    (line,) = [line for line in errors.splitlines() if "starting all again" in line]
    assert re.search(
        r"nothing was done in \d+ s \(watch.stalled_after\): no sign of life from "
        rf"rank 1 \(train: step \d+, process {stopped.pid} on \S+\); stacks of",
        line,
    )
    assert "in _train_stage" in (folder / "stacks/rank-0.txt").read_text()
    assert not psutil.pid_exists(stopped.pid)
    assert list(command.losses(folder)) == list(range(1, 401))


def beat(what: str, done: int, pid: int = 1) -> dict:
    return {"at": what, "done": done, "pid": pid, "host": "here"}


@pytest.mark.parametrize(
    ("beats", "silent", "says"),
    [
        ([beat("train: step", 9), beat("train: step", 8)], [], "the others wait for rank 1 (train: step 8"),
        ([beat("train: step", 9), beat("train: step", 9)], [], "no rank gets beyond rank 0 (train: step 9"),
        # A rank that evaluates may be further than one that trains, whatever it counts.
        (
            [beat("train: step", 9), beat("evaluate: step", 0)],
            [],
            "ranks are at different works: rank 0 (train",
        ),
        ([beat("train: step", 9), beat("train: step", 8)], [0], "no sign of life from rank 0 (train: step 9"),
    ],
)
def test_who_is_to_blame(beats, silent, says):
    assert blame(dict(enumerate(beats)), silent, 2).startswith(says)


def test_a_watch_that_cannot_look_goes_on(tmp_path, caplog):
    world, ended = World.imagined(1), threading.Event()
    watch = Watch(20.0, tmp_path / "run", world, ended)
    thread = threading.Thread(target=watch.run)
    thread.start()
    begun = time.monotonic()
    while "could not look" not in caplog.text:
        assert time.monotonic() - begun < 15
        time.sleep(0.01)
    (tmp_path / "run/heartbeats").mkdir(parents=True)
    while not (tmp_path / "run/heartbeats/rank-0.json").exists():
        assert time.monotonic() - begun < 15
        time.sleep(0.01)
    ended.set()
    thread.join()
