"""Runs of two towers over `choices`, in this process and in those that tests launch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msr_dist.evaluate import evaluate
from msr_dist.run import RunConfig, read_run
from msr_dist.train import train

PRETRAIN, FINETUNE = 2, 2
"""Epochs of the stages."""
FROZEN = 4
"""Steps of the second stage that leave the tables as they are."""


def run_config(folder: Path, data: Path, **changes: Any) -> RunConfig:
    """SASS with both of its stages, small, and every step saved and told."""
    raw: dict[str, Any] = {
        "name": "run",
        "runs": folder / "runs",
        "data": data,
        "log_every": 1,
        "loader": {"batch_size": 90, "partitions": 2, "window_rows": 200, "memory_limit": "500MB"},
        # Few units: each is a chance that rounding carries a row over a ReLU's edge.
        "model": {"kind": "sass", "widths": [8], "bias_widths": [4], "scenario_width": 4},
        "stages": [
            {
                "name": "contrast",
                "objective": "contrastive",
                "epochs": PRETRAIN,
                "sparse": {"lr": 0.1},
                "dense": {"lr": 0.01},
            },
            {
                "name": "retrieve",
                "objective": {"kind": "retrieval", "uniform_negatives": 0.5},
                "epochs": FINETUNE,
                "frozen_tables": FROZEN,
                "sparse": {"lr": 0.05},
                "dense": {"lr": 0.005},
                "schedule": {"warmup_steps": 3, "decay": "cosine"},
            },
        ],
        "checkpoint": {"every_steps": 1, "keep": 1000},
        "evaluation": {"batch_size": 50, "top_k": [3, 10]},
        "tracking": {"enabled": False},
    }
    return RunConfig.model_validate(raw | changes)


@dataclass(frozen=True)
class Work:
    """A run to train, and the folder of another to evaluate on a split."""

    run: RunConfig
    trained: Path
    split: str


def train_and_evaluate(work: Work) -> None:
    """Both, one after the other."""
    train(work.run)
    evaluate(read_run(work.trained), work.split)
