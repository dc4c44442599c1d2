"""HMoE: hybrid of implicit and explicit mixture of experts.

Li et al., 2020, "Improving multi-scenario learning to rank in e-commerce by exploiting task relationships in the label
space". Scenarios share experts as in `mmoe` (implicit, in the feature space), and a scenario's logit is a mixture of
what all scenarios would say of the row (explicit, in the label space):

    h_k     = expert_k(x)                                       x [B, D] joined groups, h [B, E, W]
    o_jt    = tower_jt(sum_k softmax(x G_jt + c_jt)_k h_k)      every scenario j's opinion of every row: [B, S] a label
    logit_t = sum_j softmax(x R_st + d_st)_j o'_jt              s the row's scenario, t a label; logits [B, T]
    o'_jt   = o_jt if j = s, else stop_gradient(o_jt)           task-constrained back-propagation

So a row trains its own scenario's gates and towers, and the experts through these alone; the opinions of others it
weighs, but does not bend.

Cost: the mechanism itself asks all S scenarios about every row: S gates and towers per row forward, one backward, and
`[S, B, W]` numbers of memory. The experts run once.

Of the paper we could read the abstract alone; it names the mixture in the label space and the constraint on
back-propagation. This is open, and done so:
- The label space is that of the logits, so that a mixture is again a log odds.
- The weights are a softmax of one linear layer of x per scenario. They start from weights close to 1 / S.

Deviations:
- A task is a pair of scenario and label; opinions are mixed within a label.
- Other scenarios' towers are read without dropout: theirs is an opinion, not a training.
- A scenario without training rows, whose tower nothing has taught, has weight 0 with all others.
- The gates have a bias; all biases start at 0.
- Dropout, off by default.
"""

from typing import Literal, final

import torch
from torch import Tensor, nn

from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Rate, Width, Widths
from msr_dist.models.layers import Experts, ScenarioGroups, ScenarioLinear, ScenarioTower, mixture
from msr_dist.schema import FeatureSchema


class Config(BackboneConfig):
    """Settings of HMoE."""

    kind: Literal["hmoe"] = "hmoe"
    experts: Width = 4
    """Number of experts, shared by all scenarios and labels."""
    widths: Widths = (128, 64)
    """Units of each layer of an expert."""
    tower_widths: Widths = (32,)
    """Units of each hidden layer of a tower."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training, in experts and towers."""

    def build(self, schema: FeatureSchema) -> "Hmoe":
        """The network for this schema."""
        return Hmoe(self, schema)


@final
class LabelHead(nn.Module):
    """One label's gates and towers, and the weights that each scenario gives to the opinions of all."""

    unheard: Tensor

    def __init__(self, schema: FeatureSchema, in_width: int, expert_width: int, config: Config) -> None:
        super().__init__()
        scenarios = len(schema.scenarios)
        self.gate = ScenarioLinear(scenarios, in_width, config.experts)
        self.tower = ScenarioTower(scenarios, expert_width, config.tower_widths, 1, config.dropout)
        self.relation = ScenarioLinear(scenarios, in_width, scenarios)
        untaught = torch.tensor([not scenario.taught for scenario in schema.scenarios])
        self.register_buffer("unheard", untaught & ~torch.eye(scenarios, dtype=torch.bool), persistent=False)

    def forward(self, x: Tensor, hidden: Tensor, row: Tensor, groups: ScenarioGroups) -> Tensor:
        """`x` `[B, D]` and `hidden` `[B, E, W]` -> `[B, 1]`, all grouped."""
        own = self.tower(mixture(self.gate(x, groups), hidden), row, groups)
        with torch.no_grad():
            opinions = self._opinions(x, hidden)
        opinions = opinions.scatter(1, groups.scenario[:, None], own)
        scores = self.relation(x, groups).masked_fill(self.unheard[groups.scenario], -torch.inf)
        weight = torch.softmax(scores, dim=1)
        return (weight * opinions).sum(dim=1, keepdim=True)

    def _opinions(self, x: Tensor, hidden: Tensor) -> Tensor:
        """`[B, S]`: what each scenario's gate and tower say of each row."""
        share = torch.softmax(_each(self.gate, x.expand(len(self.gate.weight), -1, -1)), dim=2)
        mixed = torch.einsum("sbe,bew->sbw", share, hidden)
        for linear in self.tower.hidden:
            mixed = torch.relu(_each(linear, mixed))
        return _each(self.tower.last, mixed).squeeze(2).T


def _each(linear: nn.Module, x: Tensor) -> Tensor:
    """Rows `x` `[S, B, in]` through every scenario's layer: `[S, B, out]`."""
    assert isinstance(linear, ScenarioLinear)
    return torch.baddbmm(linear.bias[:, None, :], x, linear.weight)


@final
class Hmoe(Backbone):
    """Shared experts; a gate and a tower per scenario and label, whose logits each scenario mixes in its own way."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        self.scenarios = len(schema.scenarios)
        width = schema.input_width
        self.experts = Experts(config.experts, width, config.widths, config.dropout)
        self.heads = nn.ModuleList(LabelHead(schema, width, self.experts.out_width, config) for _ in schema.labels)

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        groups = ScenarioGroups.of(inputs.scenario, self.scenarios)
        row, x = groups.group(inputs.row), groups.group(inputs.joined())
        hidden = self.experts(x, row)
        return groups.restore(torch.cat([head(x, hidden, row, groups) for head in self.heads], dim=1))
