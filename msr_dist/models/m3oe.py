"""M3oE: experts for all, for the scenario and for the label.

Zhang et al., 2024, "M3oE: multi-domain multi-task mixture-of-experts recommendation framework":

    e       = MLP(x (W * W_s) + b + b_s) + relu(Linear(x))            STAR-shaped layer; * is elementwise
    c_st    = sum_k softmax(G_st e + g_st)_k C_k(e)                   experts for all, one gate per scenario and label
    d_s     = beta_D D_s(e) + (1 - beta_D) mean_{r != s} D_r(e)       experts of the scenarios
    l_t     = beta_L L_t(e) + (1 - beta_L) mean_{u != t} L_u(e)       experts of the labels
    logit_t = tower_st(c_st + w_D d_s + w_L l_t)                      s the row's scenario, t a label; logits [B, T]

Shapes: x `[B, D]` joined groups; e `[B, H]`; what an expert gives `[B, W]`; W `[1, D, F]` is shared, W_s `[S, D, F]`
stacked; G_st and g_st are a gate's weights and bias. beta_D, beta_L (how much of one's own) and w_D, w_L (how much of a
group) are the two levels of fusion: sigmoids of one learned number each, from 1/2.

The paper's text was not at hand: placement and names are from its abstract and reviews, the algebra is that of the
authors' public code. It leaves open, and this does:
- Start: W as `nn.Linear` draws it, W_s all 1 and biases 0, as in `star`: each scenario starts from the shared layer.
- There is no ReLU between the STAR-shaped layer and the MLP above it, as in that code; its gates read e under
  stop-gradient, and so do these.
- With one label there are no other labels' experts, and beta_L is 1; so with one scenario.

Deviations:
- The paper adapts the fusion weights by AutoML, a procedure of its own beside the training of the rest (its details
  could not be verified). Here they are parameters like any other, learned by plain gradient on the training loss.
- Other scenarios' experts are read under stop-gradient (their weights are constants, e still gets a gradient) and
  without dropout: a scenario's parameters learn from its own rows alone. Scenarios without training rows are not read.
- No normalisation between layers, where that code has a layer norm in each.
- Dropout, off by default.

Cost: the mechanism reads the experts of all scenarios, S of them per row, and holds `[B, S, W]` for it; all else runs
once per row. `other_scenarios = false` restricts a row to its own (beta_D = 1), so that the cost does not grow with S.
"""

from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Rate, Width, Widths
from msr_dist.models.layers import (
    MLP,
    Experts,
    ScenarioExperts,
    ScenarioGroups,
    ScenarioLinear,
    ScenarioTower,
    StarLinear,
    mixture,
)
from msr_dist.schema import FeatureSchema


class Config(BackboneConfig):
    """Settings of M3oE."""

    kind: Literal["m3oe"] = "m3oe"
    star_width: Width = 128
    """Units of the STAR-shaped layer."""
    widths: Widths = (64,)
    """Units of each layer between it and the experts."""
    experts: Width = 4
    """Number of experts that all scenarios and labels share; each scenario and each label has one of its own beside."""
    expert_widths: Widths = (64,)
    """Units of each layer of an expert."""
    tower_widths: Widths = (32,)
    """Units of each hidden layer of a tower."""
    other_scenarios: bool = True
    """Whether a row reads the experts of other scenarios too: S experts per row instead of one."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training, in bottom, experts and towers."""

    def build(self, schema: FeatureSchema) -> "M3oe":
        """The network for this schema."""
        return M3oe(self, schema)


@final
class M3oe(Backbone):
    """A STAR-shaped bottom, three groups of experts, two levels of fusion, a tower per scenario and label."""

    taught: Tensor

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        self.scenarios, self.labels = len(schema.scenarios), len(schema.labels)
        width, dropout = schema.input_width, config.dropout
        self.star = StarLinear(self.scenarios, width, config.star_width)
        self.bottom = MLP(config.star_width, config.widths, dropout)
        self.skip = MLP(width, config.widths[-1:], dropout)
        hidden, widths = self.bottom.out_width, config.expert_widths
        self.experts = Experts(config.experts, hidden, widths, dropout)
        self.scenario_experts = ScenarioExperts(self.scenarios, 1, hidden, widths, dropout)
        self.label_experts = Experts(self.labels, hidden, widths, dropout)
        self.gates = nn.ModuleList(ScenarioLinear(self.scenarios, hidden, config.experts) for _ in schema.labels)
        self.towers = nn.ModuleList(
            ScenarioTower(self.scenarios, widths[-1], config.tower_widths, 1, dropout) for _ in schema.labels
        )
        self.scenario_weight, self.label_weight = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        # What nothing has taught is not worth reading.
        taught = torch.tensor([float(scenario.taught) for scenario in schema.scenarios])
        self.register_buffer("taught", taught, persistent=False)
        # A balance without others would never get a gradient.
        exchange = config.other_scenarios and taught.sum() > 1
        self.scenario_balance = nn.Parameter(torch.zeros(1)) if exchange else None
        self.label_balance = nn.Parameter(torch.zeros(1)) if self.labels > 1 else None

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        groups = ScenarioGroups.of(inputs.scenario, self.scenarios)
        row, x = groups.group(inputs.row), groups.group(inputs.joined())
        e = self.bottom(self.star(x, groups), row) + self.skip(x, row)
        common = self.experts(e, row)
        of_scenario = self.scenario_experts(e, row, groups)[:, 0]
        if self.scenario_balance is not None:
            of_scenario = _blend(self.scenario_balance, of_scenario, self._other_scenarios(e, groups))
        of_label = self.label_experts(e, row)
        if self.label_balance is not None:
            others = (of_label.sum(dim=1, keepdim=True) - of_label) / (self.labels - 1)
            of_label = _blend(self.label_balance, of_label, others)
        own = torch.sigmoid(self.scenario_weight) * of_scenario
        logits = []
        for t, (gate, tower) in enumerate(zip(self.gates, self.towers, strict=True)):
            mixed = mixture(gate(e.detach(), groups), common)
            logits.append(tower(mixed + own + torch.sigmoid(self.label_weight) * of_label[:, t], row, groups))
        return groups.restore(torch.cat(logits, dim=1))

    def _other_scenarios(self, e: Tensor, groups: ScenarioGroups) -> Tensor:
        """`[B, H]` -> `[B, W]`: mean over the experts of all scenarios but the row's own, as constants."""
        hidden = e.expand(self.scenarios, -1, -1)
        for weight, bias in zip(self.scenario_experts.weights, self.scenario_experts.biases, strict=True):
            hidden = torch.relu(torch.baddbmm(bias.detach(), hidden, weight.detach()[:, 0]))
        others = self.taught * (1 - one_hot(groups.scenario, self.scenarios))
        return torch.einsum("bs,sbw->bw", others / others.sum(dim=1, keepdim=True), hidden)


def _blend(balance: Tensor, own: Tensor, others: Tensor) -> Tensor:
    share = torch.sigmoid(balance)
    return share * own + (1 - share) * others
