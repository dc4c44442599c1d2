"""Runs in which a rank hangs."""

import re
import signal
import subprocess
import time

import psutil
import pytest

import canonical
import command


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
    ranks = [each for each in psutil.Process(process.pid).children() if "spawn_main" in " ".join(each.cmdline())]
    stopped = max(ranks, key=lambda each: each.pid)
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
