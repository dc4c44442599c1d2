"""Compiled layers compute what they did, and a machine without a compiler says so and goes on."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from msr_dist.compiled import compile_layers
from msr_dist.models.layers import MLP, Experts

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")  # inductor's advice on threads and precision

WITHOUT_COMPILER = """
import logging, torch
from msr_dist.compiled import compile_layers
from msr_dist.models.layers import MLP
logging.basicConfig()
model = MLP(4, (3,), 0.0)
assert compile_layers(model, torch.device("cpu")) == 0
print(model(torch.ones(2, 4), torch.arange(2)).shape)
"""


def test_compiled_layers_compute_the_same():
    torch.manual_seed(0)
    model = nn.ModuleList([MLP(6, (5, 4), 0.3), Experts(3, 6, (5, 4), 0.0), nn.Linear(6, 2)])
    row = torch.arange(40)

    def results(rows: int) -> list[torch.Tensor]:
        x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows), requires_grad=True)
        model.zero_grad()
        outs = [layer(x, row[:rows]) for layer in model[:2]]
        sum(out.square().sum() for out in outs).backward()
        return [*outs, x.grad, *(p.grad.clone() for layer in model[:2] for p in layer.parameters())]

    sizes = (40, 17, 0)
    before, names = [results(rows) for rows in sizes], list(model.state_dict())
    assert compile_layers(model, torch.device("cpu")) == 2
    for rows, expected in zip(sizes, before, strict=True):
        torch.testing.assert_close(results(rows), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert list(model.state_dict()) == names


def test_without_a_compiler_it_goes_on(tmp_path):
    environment = os.environ | {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "this machine cannot, and goes on without" in done.stderr
    assert "[2, 3]" in done.stdout
