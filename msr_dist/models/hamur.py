"""HAMUR: adapters between the layers of a network, their weights written by a hyper-network.

Li et al., 2023, "HAMUR: hyper adapter for multi-domain recommendation":

    z    = [x ; p_s]                                 p_s embedding of the scenario
    H    = reshape(hyper(z))                         one matrix per row, for all adapters
    h    = relu(Linear(h))                           per hidden layer, from h = z; and after the last ones an adapter:
    a    = sigmoid(h U H V + b)                      down
    h   <- h + DN_s(a U' H V')                       up; domain norm: `layers.ScenarioNorm`; shortcut
    logits = Linear(h)

Shapes: z `[B, D]`; H `[B, R, R]`; h `[B, W]`; a `[B, A]`; U `[W, R]`, V `[R, A]`, U' `[A, R]`, V' `[R, W]`, b `[A]` are
each adapter's own and shared by the scenarios; logits `[B, T]`. hyper is an MLP with a linear last layer. U H V is
never formed: a row costs R (W + R + A) products in place of the W A of a full matrix.

The paper leaves open, or could not be checked for it, and this does:
- Start: U, V, U', V' as `nn.Linear` draws them. Constant ones would make U H V a matrix of rank 1. The norm's scale
  starts at 1, as in any such layer, which costs quality on two of four data sets: see `norm_start`.
- The hyper-network reads z, and runs once per row: H is the same whichever adapter asks for it.
- Adapters follow the last `adapters` hidden layers.
- With T labels the last layer has T outputs.

Deviations:
- One network with the scenario's embedding as input, where public code has a network per scenario: what the scenarios
  differ in is left to p_s, H and the norm.
- The norm's statistics are per scenario, over the rows of all ranks in training and saved ones in evaluation, and its
  scale and shift are shared times (plus) the scenario's own.
- The projection up has no bias: the norm would subtract it.
- No batch normalisation in network and hyper-network. Dropout, off by default.
"""

from itertools import pairwise
from typing import Literal, Self, final

import torch
from pydantic import model_validator
from torch import Tensor, nn

from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Rate, Width, Widths
from msr_dist.models.layers import MLP, Dropout, ScenarioGroups, ScenarioNorm
from msr_dist.schema import FeatureSchema


class Config(BackboneConfig):
    """Settings of HAMUR."""

    kind: Literal["hamur"] = "hamur"
    widths: Widths = (128, 64)
    """Units of each hidden layer."""
    adapters: Width = 1
    """How many hidden layers have an adapter behind them, counted from the last."""
    adapter_width: Width = 32
    """Units in the middle of an adapter."""
    rank: Width = 8
    """Rows and columns of the matrix that the hyper-network writes."""
    hyper_widths: Widths = (64,)
    """Units of each hidden layer of the hyper-network."""
    scenario_width: Width = 16
    """Length of the scenario's embedding, which network and hyper-network read."""
    norm_start: float = 1.0
    """Scale of the norm at the start. At 1 an adapter that has learned nothing is as loud as the hidden units beside
    it, or louder; at 0 training begins with the plain network."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training, in network and hyper-network."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.adapters > len(self.widths):
            raise ValueError(f"{self.adapters} adapters for {len(self.widths)} hidden layers: one per layer at most")
        return self

    def build(self, schema: FeatureSchema) -> "Hamur":
        """The network for this schema."""
        return Hamur(self, schema)


class HyperLinear(nn.Module):
    """A linear layer without a bias whose weight is `down @ core @ up`, with a core for every row."""

    def __init__(self, in_width: int, out_width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(in_width, rank, bias=False)
        self.up = nn.Linear(rank, out_width, bias=False)

    def forward(self, x: Tensor, core: Tensor) -> Tensor:
        """`x` `[B, in]` and `core` `[B, R, R]` -> `[B, out]`."""
        projected: Tensor = self.up(torch.bmm(self.down(x)[:, None, :], core)[:, 0])
        return projected


class Adapter(nn.Module):
    """A bottleneck with a norm per scenario and a shortcut."""

    def __init__(self, config: Config, scenarios: int, width: int) -> None:
        super().__init__()
        self.down = HyperLinear(width, config.adapter_width, config.rank)
        self.bias = nn.Parameter(torch.zeros(config.adapter_width))
        self.up = HyperLinear(config.adapter_width, width, config.rank)
        self.norm = ScenarioNorm(scenarios, width)
        nn.init.constant_(self.norm.gamma, config.norm_start)

    def forward(self, x: Tensor, core: Tensor, row: Tensor, groups: ScenarioGroups) -> Tensor:
        """`[B, W]` -> `[B, W]`, all grouped."""
        inner = torch.sigmoid(self.down(x, core) + self.bias)
        adapted: Tensor = x + self.norm(self.up(inner, core), row, groups)
        return adapted


@final
class Hamur(Backbone):
    """An MLP with adapters behind its last layers, and the hyper-network that writes their weights."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        self.scenarios, self.rank = len(schema.scenarios), config.rank
        in_width = schema.input_width + config.scenario_width
        self.scenario = nn.Embedding(self.scenarios, config.scenario_width)
        self.hyper = MLP(in_width, config.hyper_widths, config.dropout)
        self.hyper_last = nn.Linear(self.hyper.out_width, config.rank**2)
        shapes = pairwise([in_width, *config.widths])
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in shapes)
        self.dropouts = nn.ModuleList(Dropout(config.dropout) for _ in config.widths)
        plain = len(config.widths) - config.adapters
        self.adapters = nn.ModuleList(
            nn.Identity() if layer < plain else Adapter(config, self.scenarios, width)
            for layer, width in enumerate(config.widths)
        )
        self.last = nn.Linear(config.widths[-1], len(schema.labels))

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        groups = ScenarioGroups.of(inputs.scenario, self.scenarios)
        row = groups.group(inputs.row)
        hidden = torch.cat([groups.group(inputs.joined()), self.scenario(groups.scenario)], dim=1)
        core = self.hyper_last(self.hyper(hidden, row)).unflatten(1, (self.rank, self.rank))
        for linear, adapter, dropout in zip(self.hidden, self.adapters, self.dropouts, strict=True):
            hidden = torch.relu(linear(hidden))
            if isinstance(adapter, Adapter):
                hidden = adapter(hidden, core, row, groups)
            hidden = dropout(hidden, row)
        return groups.restore(self.last(hidden))
