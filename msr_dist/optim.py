"""Optimizers of tables and of the dense part, and the learning-rate schedule that moves both."""

import math
from collections.abc import Iterable
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from msr_dist.config import Config


class SparseOptimizer(Config):
    """Trains the embedding tables, fused into the backward pass: only rows that a batch looked up are touched."""

    kind: Literal["rowwise_adagrad", "adagrad", "adam", "sgd"] = "rowwise_adagrad"
    """rowwise_adagrad keeps one number per row, adagrad one and adam two per weight (adam: GPU only)."""
    lr: float = Field(default=0.05, gt=0)
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment (not used by sgd)."""

    def torch_class(self) -> type[torch.optim.Optimizer]:
        """The class by which TorchRec recognises the fused kernel; for a replicated table, the optimizer itself."""
        classes: dict[str, type[torch.optim.Optimizer]] = {
            "rowwise_adagrad": RowWiseAdagrad,
            "adagrad": torch.optim.Adagrad,
            "adam": torch.optim.Adam,
            "sgd": torch.optim.SGD,
        }
        return classes[self.kind]

    def arguments(self) -> dict[str, Any]:
        """Arguments of `torch_class`."""
        return {"lr": self.lr} if self.kind == "sgd" else {"lr": self.lr, "eps": self.eps}


class DenseOptimizer(Config):
    """Trains everything that is not a table."""

    kind: Literal["adam", "adamw", "adagrad", "sgd"] = "adam"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over `parameters`."""
        classes: dict[str, Any] = {
            "adam": torch.optim.Adam,
            "adamw": torch.optim.AdamW,
            "adagrad": torch.optim.Adagrad,
            "sgd": torch.optim.SGD,
        }
        # Fused: one pass over parameters and state instead of about ten, which is what many scenarios' weights cost.
        arguments = {"lr": self.lr, "weight_decay": self.weight_decay, "fused": True}
        optimizer: torch.optim.Optimizer = classes[self.kind](parameters, **arguments)
        return optimizer


class Schedule(Config):
    """Factor of every learning rate, a pure function of the step: resuming needs nothing but the step."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the factor rises linearly to 1."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How it falls from 1, after the warm-up, towards `final`, which the step after the stage's last would have."""
    final: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.decay == "constant" and self.final:
            raise ValueError(f"final = {self.final} needs a decay: 'linear' or 'cosine'")
        return self

    def factor(self, step: int, steps: int) -> float:
        """The factor at `step` of a stage of `steps` steps."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / max(1, steps - self.warmup_steps))
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final + (1 - self.final) * left
