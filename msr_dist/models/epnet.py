"""EPNet: the half of PEPNet that personalises the embeddings.

Chang et al., 2023, "PEPNet: parameter and embedding personalized network for infusing with personalized prior
information", sections on the gate neural unit and on EPNet:

    GateNU(z) = gamma sigmoid(relu(z W + b) W' + b')      gamma = 2: a gate in (0, 2), near 1 at the start
    e'        = GateNU([p_s ; stopgrad(e)]) * e           one gate per element of e, not per field
    logit_t   = tower_t(e')                               t a label; the scenarios share the towers

Shapes: e, e' `[B, D]` joined groups; p_s `[B, P]` embedding of the scenario; W `[P + D, H]`, W' `[H, D]`;
logits `[B, T]`.

The paper leaves open, and this does:
- H is a setting. W and W' start as `nn.Linear` draws them, all biases at 0.
- On its own, EPNet stands below plain towers: an MLP with a linear last layer per label, as in the paper's ablation.

Deviations:
- The scenario's features are its embedding alone; statistics of user and item within the scenario are no part of the
  schema. Like the paper's, it is read by the gate only, not by the towers.
- Dropout in the towers, off by default.
"""

from typing import Literal, final

import torch
from torch import Tensor, nn

from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Rate, Width, Widths
from msr_dist.models.layers import Experts, stacked_weight
from msr_dist.schema import FeatureSchema

GAMMA = 2.0
"""The widest that a gate opens."""


class Config(BackboneConfig):
    """Settings of EPNet."""

    kind: Literal["epnet"] = "epnet"
    widths: Widths = (128, 64)
    """Units of each hidden layer of a label's tower."""
    gate_width: Width = 64
    """Hidden units of the gate."""
    scenario_width: Width = 16
    """Length of the scenario's embedding, which the gate reads."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training, in the towers."""

    def build(self, schema: FeatureSchema) -> "Epnet":
        """The network for this schema."""
        return Epnet(self, schema)


@final
class GateNU(nn.Module):
    """The gate neural unit: a factor between 0 and `GAMMA` per output."""

    def __init__(self, in_width: int, hidden_width: int, out_width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_width, hidden_width)
        self.last = nn.Linear(hidden_width, out_width)
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in]` -> `[B, out]`."""
        return GAMMA * torch.sigmoid(self.last(torch.relu(self.hidden(x))))


@final
class EmbeddingGate(nn.Module):
    """EPNet proper: the joined groups, scaled as the scenario sees them."""

    def __init__(self, schema: FeatureSchema, scenario_width: int, gate_width: int) -> None:
        super().__init__()
        self.out_width = schema.input_width
        self.scenario = nn.Embedding(len(schema.scenarios), scenario_width)
        self.gate = GateNU(scenario_width + self.out_width, gate_width, self.out_width)

    def forward(self, inputs: Inputs) -> Tensor:
        """The scaled embeddings, e': `[B, out_width]`."""
        x = inputs.joined()
        # The gate only looks at the embeddings: what it learns must not pull at the tables that all scenarios share.
        scaled: Tensor = x * self.gate(torch.cat([self.scenario(inputs.scenario), x.detach()], dim=1))
        return scaled


@final
class LabelLinear(nn.Module):
    """The last layer of one tower per label: `[B, T, in]` -> logits `[B, T]`."""

    def __init__(self, labels: int, in_width: int) -> None:
        super().__init__()
        self.weight = stacked_weight(labels, in_width, 1)
        self.bias = nn.Parameter(torch.zeros(labels))

    def forward(self, x: Tensor) -> Tensor:
        """Each label's hidden units through its own layer."""
        return (x * self.weight[:, :, 0]).sum(dim=2) + self.bias


@final
class Epnet(Backbone):
    """Gated embeddings below a tower per label."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        labels = len(schema.labels)
        self.embedding_gate = EmbeddingGate(schema, config.scenario_width, config.gate_width)
        self.towers = Experts(labels, self.embedding_gate.out_width, config.widths, config.dropout)
        self.last = LabelLinear(labels, self.towers.out_width)

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        logits: Tensor = self.last(self.towers(self.embedding_gate(inputs), inputs.row))
        return logits
