"""Runs of the real command on small data."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import tomli_w

COMMAND = [sys.executable, "-m", "msr_dist"]


def write_config(folder: Path, data: Path, **changes) -> Path:
    """A TOML file for a run of 25 steps per epoch over `canonical.write(data, rows=3000)`."""
    raw = {
        "name": "run",
        "runs": str(folder / "runs"),
        "data": str(data),
        "log_every": 1,
        "loader": {"batch_size": 120, "partitions": 6, "window_rows": 600},
        # Few units: each is a chance that rounding carries a row over a ReLU's edge, which no order of sums excludes.
        "model": {"kind": "star", "widths": [4], "auxiliary_widths": [4]},
        "stages": [{"epochs": 2, "schedule": {"warmup_steps": 5, "decay": "cosine"}}],
        "tracking": {"enabled": False},
    }
    file = folder / "run.toml"
    file.write_text(tomli_w.dumps(raw | changes))
    return file


def call(*arguments, launched_by=COMMAND, timeout: float = 240) -> subprocess.CompletedProcess:
    """The command's status and what it printed."""
    words = [*launched_by, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False)


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that hold the ranks: copies of the one that has loaded what they need."""
    found = psutil.Process(process.pid).children()
    servers = [child for child in found if "forkserver" in " ".join(child.cmdline())]
    return [rank for server in servers for rank in server.children()]


def losses(run: Path, name: str = "train/loss") -> dict[int, float]:
    """Step -> loss as it was recorded last."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["metrics"][name] for line in lines if name in line["metrics"]}
