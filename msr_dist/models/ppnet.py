"""PPNet: the half of PEPNet that personalises the towers.

Chang et al., 2023, "PEPNet: parameter and embedding personalized network for infusing with personalized prior
information", section on PPNet; `GateNU` is in `epnet`:

    z       = [o ; p_s ; stopgrad(e)]                    o the priors: embeddings of user and item
    d^l     = GateNU^l(z)                                a unit per layer l, whose outputs serve all labels
    h_t^0   = e
    h_t^l   = d_t^l * relu(h_t^(l-1) W_t^l + b_t^l)      l = 1 .. L: every hidden unit of every layer is scaled
    logit_t = h_t^L w_t + c_t                            t a label; the scenarios share the towers

Shapes: e `[B, D]` joined groups; o `[B, O]`; p_s `[B, P]` embedding of the scenario; d^l, h^l `[B, T, width
of layer l]`; logits `[B, T]`. The scenario only looks up p_s: a step costs the same for any number of scenarios.

The paper leaves open, and this does:
- The towers' input is not scaled again, nor the logit; the gates scale hidden units after their ReLU and dropout.
- The priors are the schema's user and item, cut out of their groups, or the features that the settings name: the
  paper adds the author. The gates' gradient reaches them: the gradient is stopped for e alone.
- GateNU's hidden width is a setting. Weights start as `nn.Linear` draws them, biases at 0.

Deviations:
- `scenario_towers`, off by default: the gated layers end in a tower per scenario and label without gates, as in
  TorchEasyRec, in place of the linear last layer. A row is computed by its own scenario's alone.
- p_s is part of the gates' input. The paper brings the scenario in by EPNet (`pepnet` does), and PPNet alone would not
  know it.
- Dropout in the towers, off by default.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, final

import torch
from torch import Tensor, nn

from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Rate, Width, Widths
from msr_dist.models.epnet import GateNU, LabelLinear
from msr_dist.models.layers import Dropout, ScenarioGroups, ScenarioTower, banked_linear, stacked_weight
from msr_dist.schema import FeatureSchema


class Config(BackboneConfig):
    """Settings of PPNet."""

    kind: Literal["ppnet"] = "ppnet"
    widths: Widths = (128, 64)
    """Units of each hidden layer of a label's tower."""
    gate_width: Width = 64
    """Hidden units of each layer's gate."""
    scenario_width: Width = 16
    """Length of the scenario's embedding, which the gates read."""
    priors: tuple[str, ...] = ()
    """Features whose embeddings the gates read and train; without any, the schema's user and item."""
    scenario_towers: tuple[Width, ...] = ()
    """Units of each hidden layer of a tower per scenario and label, without gates, on top of the gated ones."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training, in the towers."""

    def build(self, schema: FeatureSchema) -> "Ppnet":
        """The network for this schema."""
        return Ppnet(self, schema)


class Priors:
    """Where the embeddings of some features lie in their groups."""

    def __init__(self, schema: FeatureSchema, names: Sequence[str]) -> None:
        places: dict[str, tuple[str, int, int]] = {}
        filled: dict[str, int] = {}
        for feature in schema.features:
            start, width = filled.get(feature.group, 0), schema.table(feature.table).width
            places[feature.name] = (feature.group, start, width)
            filled[feature.group] = start + width
        unknown = sorted(set(names) - set(places))
        if unknown:
            raise ValueError(f"model.priors: no feature {unknown[0]!r} in the data; it has {', '.join(places)}")
        self.places = [places[name] for name in names or (schema.user, schema.item)]
        self.width = sum(width for _, _, width in self.places)

    def of(self, inputs: Inputs) -> Tensor:
        """`[B, width]`: the embeddings side by side."""
        return torch.cat([inputs.groups[group].narrow(1, start, width) for group, start, width in self.places], dim=1)


@final
class GatedTowers(nn.Module):
    """One MLP per label with a gate on every hidden unit; the labels' weights are stacked `[T, in, out]`."""

    def __init__(
        self,
        schema: FeatureSchema,
        in_width: int,
        widths: Sequence[int],
        prior_width: int,
        gate_width: int,
        scenario_towers: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        labels, self.scenarios = len(schema.labels), len(schema.scenarios)
        shapes = pairwise([in_width, *widths])
        self.weights = nn.ParameterList(stacked_weight(labels, i, o) for i, o in shapes)
        self.biases = nn.ParameterList(torch.zeros(labels, width) for width in widths)
        self.gates = nn.ModuleList(GateNU(prior_width + in_width, gate_width, labels * width) for width in widths)
        self.dropouts = nn.ModuleList(Dropout(dropout) for _ in widths)
        self.last = None if scenario_towers else LabelLinear(labels, widths[-1])
        self.tops = nn.ModuleList(
            ScenarioTower(self.scenarios, widths[-1], scenario_towers, 1, dropout)
            for _ in range(labels if scenario_towers else 0)
        )

    def forward(self, x: Tensor, prior: Tensor, inputs: Inputs) -> Tensor:
        """`x` `[B, in_width]`, which the towers learn from and the gates only look at -> logits `[B, T]`."""
        if self.last is not None:
            logits: Tensor = self.last(self._hidden(x, prior, inputs.row))
            return logits
        groups = ScenarioGroups.of(inputs.scenario, self.scenarios)
        row = groups.group(inputs.row)
        hidden = self._hidden(groups.group(x), groups.group(prior), row)
        each = [top(own, row, groups) for top, own in zip(self.tops, hidden.unbind(1), strict=True)]
        return groups.restore(torch.cat(each, dim=1))

    def _hidden(self, x: Tensor, prior: Tensor, row: Tensor) -> Tensor:
        """`[B, T, widths[-1]]`."""
        seen = torch.cat([prior, x.detach()], dim=1)
        hidden = x
        for weight, bias, gate, dropout in zip(self.weights, self.biases, self.gates, self.dropouts, strict=True):
            hidden = dropout(torch.relu(banked_linear(hidden, weight, bias)), row)
            hidden = hidden * gate(seen).view(hidden.shape)
        return hidden


@final
class Ppnet(Backbone):
    """A gated tower per label; the gates read priors and scenario."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        self.priors = Priors(schema, config.priors)
        self.scenario = nn.Embedding(len(schema.scenarios), config.scenario_width)
        self.towers = GatedTowers(
            schema,
            schema.input_width,
            config.widths,
            self.priors.width + config.scenario_width,
            config.gate_width,
            config.scenario_towers,
            config.dropout,
        )

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        prior = torch.cat([self.priors.of(inputs), self.scenario(inputs.scenario)], dim=1)
        logits: Tensor = self.towers(inputs.joined(), prior, inputs)
        return logits
