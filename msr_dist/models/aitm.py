"""AITM: adaptive information transfer multi-task.

Xi et al., 2021, "Modeling the sequential dependence among audience multi-step conversions with multi-task learning in
targeted display advertising". Tasks form a chain, such as click, then purchase, and each hands information to the next:

    q_t     = f_st(x)                                           x [B, D] joined groups, q [B, W], t = 1 .. T
    p_t     = g_st(z_t-1)                                       what the task before hands over; z_0 below
    z_t     = sum_u w_u h1_st(u),  u in {p_t, q_t}              [B, W]
    w_u     = softmax over {p_t, q_t} of <h2_st(u), h3_st(u)> / sqrt(W)
    logit_t = tower_st(z_t)                                     s the row's scenario, t a label; logits [B, T]
    penalty = calibrator * sum_t>1 max(y_t - y_t-1, 0)          behavioural expectation calibrator; y = sigmoid(logit)

The paper leaves open, and this does as the authors' code: g is a linear layer with ReLU, h1, h2 and h3 are linear.

Deviations:
- The chain starts from a network shared by all scenarios, z_0 = f_0(x), which has no loss of its own: the first label,
  too, weighs what is shared against what is its scenario's. The paper's chain starts with z_1 = q_1: with networks per
  scenario that would leave nothing shared, and with one label nothing to transfer. The alternative, a chain over
  scenarios, needs an order that they do not have, asks S networks about every row, and trains a scenario by rows of
  others.
- f, g, h1, h2, h3 and the towers are per scenario and label, and have biases; a row is computed by its own scenario's
  alone. The authors' code shares h1, h2 and h3 along the chain, without biases.
- The calibrator is off by default: it holds only where a label implies the one before it in the schema.
- Biases start at 0 but for those of f_0. Dropout, off by default.
"""

from typing import Annotated, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Objective, Rate, Widths
from msr_dist.models.layers import MLP, Dropout, ScenarioExperts, ScenarioGroups, ScenarioLinear, ScenarioTower
from msr_dist.schema import FeatureSchema


class Config(BackboneConfig):
    """Settings of AITM."""

    kind: Literal["aitm"] = "aitm"
    widths: Widths = (128, 64)
    """Units of each layer of the shared network, and of that of each scenario and label."""
    tower_widths: Widths = (32,)
    """Units of each hidden layer of a tower."""
    calibrator: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight of the penalty for a label that is likelier than the one before it; the authors' code has 0.3."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training, in all networks but h1, h2 and h3."""

    def build(self, schema: FeatureSchema) -> "Aitm":
        """The network for this schema."""
        return Aitm(self, schema)


@final
class Transfer(nn.Module):
    """The AIT module: a task's own representation and what the task before hands over, weighed by self-attention."""

    def __init__(self, scenarios: int, width: int, dropout: float) -> None:
        super().__init__()
        self.handover = ScenarioLinear(scenarios, width, width)
        self.dropout = Dropout(dropout)
        self.projections = ScenarioLinear(scenarios, width, 3 * width)

    def forward(self, before: Tensor, own: Tensor, row: Tensor, groups: ScenarioGroups) -> Tensor:
        """Twice `[B, W]` -> `[B, W]`, all grouped."""
        handed = self.dropout(torch.relu(self.handover(before, groups)), row)
        projected = torch.stack([self.projections(u, groups) for u in (handed, own)], dim=1)
        value, key, query = projected.chunk(3, dim=2)
        weight = torch.softmax((key * query).sum(dim=2, keepdim=True) * own.shape[1] ** -0.5, dim=1)
        return (weight * value).sum(dim=1)


@final
class Aitm(Backbone):
    """A shared network, then along the labels a network, a transfer and a tower per scenario."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        self.scenarios, labels = len(schema.scenarios), len(schema.labels)
        self.calibrator = config.calibrator
        width, out = schema.input_width, config.widths[-1]
        self.shared = MLP(width, config.widths, config.dropout)
        self.own = ScenarioExperts(self.scenarios, labels, width, config.widths, config.dropout)
        self.transfers = nn.ModuleList(Transfer(self.scenarios, out, config.dropout) for _ in schema.labels)
        self.towers = nn.ModuleList(
            ScenarioTower(self.scenarios, out, config.tower_widths, 1, config.dropout) for _ in schema.labels
        )

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        return self.objective(inputs).logits

    def objective(self, inputs: Inputs) -> Objective:
        """Logits `[B, T]`, and the calibrator's penalty if it is on."""
        groups = ScenarioGroups.of(inputs.scenario, self.scenarios)
        row, x = groups.group(inputs.row), groups.group(inputs.joined())
        state, logits = self.shared(x, row), []
        for own, transfer, tower in zip(self.own(x, row, groups).unbind(1), self.transfers, self.towers, strict=True):
            state = transfer(state, own, row, groups)
            logits.append(tower(state, row, groups))
        restored = groups.restore(torch.cat(logits, dim=1))
        if self.calibrator == 0.0:
            return Objective(restored)
        rise = torch.sigmoid(restored).diff(dim=1).clamp(min=0).sum(dim=1)
        return Objective(restored, penalty=self.calibrator * rise)
