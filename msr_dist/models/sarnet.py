"""SAR-Net: scenario-aware ranking network.

Shen et al., 2021, "SAR-Net: a scenario-aware ranking network for personalized fair recommendation in hundreds of travel
scenarios":

    a_l    = A([b_l ; v ; b_l * v ; b_l - v])          how behaviour l bears on the target v
    c_l    = C([b_l ; u_s ; b_l * u_s ; b_l - u_s])    how it bears on the scenario, u_s an embedding of the scenario
    i      = sum_l softmax_l(a_l + c_l) b_l            interest: one per feature with pooling "attention", or none
    e      = alpha_s * [x ; i] + beta_s                scenario-specific transformation, elementwise
    h_k    = expert_k(e)                               experts that all share, and experts of the scenario's own
    g      = softmax(e G_s + d_s)                      over both kinds
    logits = sum_k g_k (h_k w_k) + w_0 + w_s           [B, T]

Shapes: x `[B, D]` joined groups; b `[B, L, W]`; v, u_s, i `[B, W]`; A, C MLPs to one unit; alpha_s, beta_s `[D']`.

The fairness coefficient. The paper's abstract says that manual promotion makes the log unfair, that the coefficient
measures how important a single sample is, and that the debias experts use it to reweigh the prediction. Neither its
formula nor how it enters could be verified. One public implementation takes it ready from the data and adds a small net
of it to the experts' logits, in training alone. A platform that knows what it promoted can give such weights as a
label's weight column. What follows, for data that do not tell, is OURS:

    q_s(z)  = softmax_s(z F + log n_s)       which scenario shows item z; n_s share of the rows so far
    f       = n_s / q_s(z)                   the less, the more the scenario favours the item over other scenarios
    weight  = clip(f, 1/c, c) / mean_s       factor of the row's log losses; mean_s over the scenario's rows so far

- F learns by its own cross-entropy, the objective's penalty, on the item's vectors under stop-gradient; the weight is
  under stop-gradient too. So no parameter can lower its loss through the weights, and the classifier moves no table.
- F starts at 0: all weights are 1. Weights stay within 1 / c^2 and c^2, and near 1 on average within each scenario.
- n_s and mean_s are running sums over all ranks, of the batches before this one, fading slowly.
- This reads all scenarios: `B * S` times the width of the item's group. F is no scenario's own; it compares them.

The paper leaves open, and this does:
- All else than the coefficient is from summaries and public code, not from the paper's print.
- The interest's weights are the product of the two softmax attentions, normalised again.
- alpha starts at 1, beta and biases of stacked layers at 0. The experts' last biases stand outside of the gate.

Deviations:
- Behaviours have no scenarios of their own in the data, so the scenario attends to the behaviour itself.
- x holds each list as well, pooled by DIN's attention, as it does for every model: see `Inputs.behaviours`.
- With T labels the experts end in T outputs.
- No batch normalisation, so that a prediction depends on its row alone. Dropout, off by default.
"""

import math
from typing import Annotated, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from msr_dist.models.base import (
    Backbone,
    BackboneConfig,
    Behaviours,
    Inputs,
    Objective,
    Rate,
    WholeBatch,
    Width,
    Widths,
)
from msr_dist.models.layers import MLP, Experts, ScenarioExperts, ScenarioGroups, ScenarioLinear, sum_over_ranks
from msr_dist.schema import FeatureSchema


class Config(BackboneConfig):
    """Settings of SAR-Net."""

    kind: Literal["sarnet"] = "sarnet"
    shared_experts: Width = 2
    """Number of experts that all scenarios share."""
    own_experts: Width = 2
    """Number of experts of each scenario."""
    widths: Widths = (128, 64)
    """Units of each layer of an expert."""
    attention_widths: Widths = (32,)
    """Units of each hidden layer of an attention; features with pooling "attention" have two each."""
    fairness: Annotated[float, Field(ge=1, le=100)] = 2.0
    """c, the bound of the fairness coefficient; at 1 all rows weigh the same."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training, in attentions and experts."""

    def build(self, schema: FeatureSchema) -> "Sarnet":
        """The network for this schema."""
        return Sarnet(self, schema)


class Affinity(nn.Module):
    """A score of each behaviour against one query."""

    def __init__(self, width: int, widths: Widths, dropout: float) -> None:
        super().__init__()
        self.mlp = MLP(4 * width, widths, dropout)
        self.last = nn.Linear(self.mlp.out_width, 1, bias=False)

    def forward(self, behaviours: Tensor, query: Tensor, row: Tensor) -> Tensor:
        """`[B, L, W]`, `[B, W]` -> `[B, L]`."""
        query = query[:, None].expand_as(behaviours)
        pairs = torch.cat([behaviours, query, behaviours * query, behaviours - query], dim=2)
        scores: Tensor = self.last(self.mlp(pairs, row))
        return scores.squeeze(2)


class Interest(nn.Module):
    """Behaviours pooled by what they mean for the target and for the scenario."""

    def __init__(self, scenarios: int, width: int, config: Config) -> None:
        super().__init__()
        self.scenario = nn.Embedding(scenarios, width)
        self.item_affinity = Affinity(width, config.attention_widths, config.dropout)
        self.scenario_affinity = Affinity(width, config.attention_widths, config.dropout)

    def forward(self, behaviours: Behaviours, scenario: Tensor, row: Tensor) -> Tensor:
        """`[B, W]`; 0 for an empty list."""
        scores = self.item_affinity(behaviours.vectors, behaviours.target, row)
        scores = scores + self.scenario_affinity(behaviours.vectors, self.scenario(scenario), row)
        # Not minus infinity, whose softmax over an empty list would have no value.
        scores = scores.masked_fill(~behaviours.present, torch.finfo(scores.dtype).min)
        share = torch.softmax(scores, dim=1) * behaviours.present
        return (share[:, :, None] * behaviours.vectors).sum(dim=1)


class Fairness(WholeBatch):
    """The coefficient of each row, and the loss of the classifier that it is read from."""

    seen: Tensor
    """`[S, 2]` fp64: rows and sum of their coefficients, fading; both start as if one row of weight 1 had been seen."""

    def __init__(self, scenarios: int, width: int, bound: float, fading: float = 0.999) -> None:
        super().__init__()
        self.bound, self.fading = bound, fading
        self.weight = nn.Parameter(torch.zeros(width, scenarios))
        self.register_buffer("seen", torch.ones(scenarios, 2, dtype=torch.float64))

    def forward(self, item: Tensor, row: Tensor, groups: ScenarioGroups) -> tuple[Tensor, Tensor]:
        """Weights and penalties, `[B]` each and grouped, as are `item` `[B, D]` and `row`; counts the batch."""
        # The little more keeps the logarithm of a scenario that has long been absent.
        rows, coefficients = (self.seen + 1e-6).to(item.dtype).unbind(1)
        prior = torch.log_softmax(rows.log(), dim=0)
        posterior = torch.log_softmax(item.detach() @ self.weight + prior, dim=1)
        penalty = nll_loss(posterior, groups.scenario, reduction="none")
        limit = math.log(self.bound)
        coefficient = (prior[groups.scenario] + penalty.detach()).clamp(-limit, limit).exp()
        weight = coefficient * (rows / coefficients)[groups.scenario]
        real = (row >= 0).to(item.dtype)
        batch = sum_over_ranks(groups.sums(torch.stack([real, real * coefficient], dim=1)))
        self.seen.mul_(self.fading).add_(batch)
        return weight, penalty


@final
class Sarnet(Backbone):
    """Attention over behaviours, a transformation per scenario, and experts, fairly weighed in training."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        self.scenarios, labels = len(schema.scenarios), len(schema.labels)
        group_widths = schema.group_widths()
        lists = {f.name: schema.table(f.table).width for f in schema.features if f.pooling == "attention"}
        width = sum(group_widths.values()) + sum(lists.values())
        experts = config.shared_experts, config.own_experts
        self.lists = list(lists)
        self.interests = nn.ModuleList(Interest(self.scenarios, width, config) for width in lists.values())
        self.scale = nn.Parameter(torch.ones(self.scenarios, width))
        self.shift = nn.Parameter(torch.zeros(self.scenarios, width))
        self.shared = Experts(experts[0], width, config.widths, config.dropout)
        self.own = ScenarioExperts(self.scenarios, experts[1], width, config.widths, config.dropout)
        self.gate = ScenarioLinear(self.scenarios, width, sum(experts))
        # One layer over all experts' gated units is the gated sum of one last layer each.
        self.shared_last = nn.Linear(experts[0] * config.widths[-1], labels)
        self.own_last = ScenarioLinear(self.scenarios, experts[1] * config.widths[-1], labels)
        self.item = next(feature.group for feature in schema.features if feature.name == schema.item)
        self.fairness = Fairness(self.scenarios, group_widths[self.item], config.fairness)

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        return self.objective(inputs).logits

    def objective(self, inputs: Inputs) -> Objective:
        """Logits and, in training, the rows' weights and the classifier's losses."""
        groups = ScenarioGroups.of(inputs.scenario, self.scenarios)
        row = groups.group(inputs.row)
        interests = [
            interest(inputs.behaviours[name], inputs.scenario, inputs.row)
            for name, interest in zip(self.lists, self.interests, strict=True)
        ]
        x = groups.group(torch.cat([inputs.joined(), *interests], dim=1))
        logits = groups.restore(self._logits(x, row, groups))
        if not self.training:
            return Objective(logits)
        weight, penalty = self.fairness(groups.group(inputs.groups[self.item]), row, groups)
        # The classifier's gradient without its value, so that the loss that is shown is that of the labels.
        return Objective(logits, groups.restore(weight), groups.restore(penalty - penalty.detach()))

    def _logits(self, x: Tensor, row: Tensor, groups: ScenarioGroups) -> Tensor:
        """`[B, D']` -> `[B, T]`, both grouped."""
        e = x * groups.spread(self.scale) + groups.spread(self.shift)
        shared, own = self.shared(e, row), self.own(e, row, groups)
        share = torch.softmax(self.gate(e, groups), dim=1)[:, :, None]
        gated_shared, gated_own = torch.tensor_split(share * torch.cat([shared, own], dim=1), [shared.shape[1]], dim=1)
        logits: Tensor = self.shared_last(gated_shared.flatten(1)) + self.own_last(gated_own.flatten(1), groups)
        return logits
