"""Dense layers as one kernel each, by torch.compile: less traffic with memory on GPUs, slower products on CPUs."""

import logging

import torch
from torch import nn

from msr_dist.models.layers import MLP, Experts

log = logging.getLogger(__name__)

_MOST_SHAPES = 64
"""Of one class of layers: torch's own limit of 8 is for code that has one shape, not the widths of a whole model."""


def compile_layers(model: nn.Module, device: torch.device) -> int:
    """Compile the MLPs and experts in `model`, at their first call; returns how many.

    Not what rows go through by scenario: its shapes are the batch's numbers of rows, which no two batches share. Where
    the machine cannot compile, such as one without a C++ compiler, that is said, and everything stays as it is.
    """
    try:
        torch.compile(_probe)(torch.ones(8, device=device))
    except RuntimeError as error:
        log.warning("compile=true: this machine cannot, and goes on without: %s", str(error).strip().splitlines()[0])
        return 0
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SHAPES)
    layers = [module for module in model.modules() if isinstance(module, MLP | Experts)]
    for layer in layers:
        layer.compile()
    return len(layers)


def _probe(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x) + 1
