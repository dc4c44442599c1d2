"""M2M: weights generated from what is known of the scenario.

Zhang et al., 2022, "Leaving no one behind: a multi-scenario multi-task meta learning approach for advertiser modeling":

    p_s     = lrelu(K c_s + k)                                 scenario knowledge, c_s the scenario's embedding
    W_s     = W_0 + sum_j p_sj V_j,  b_s = b_0 + p_s U         meta unit: the paper's reshape(V p_s), written out
    v_i     = expert_i(x)                                      views [B, E, W]
    a_it    = r . lrelu([v_i ; q_t] W_s + b_s)                 meta attention; q_t view of label t
    h_t     = sum_i softmax_i(a_it) v_i                        [B, W]
    h_t     = lrelu(h_t W_st + b_st + h_t)                     meta tower, some layers deep
    logit_t = Linear_t(h_t)                                    [B, T]

Shapes: x `[B, D]` joined groups; p_s `[P]`; W_s `[in, out]`, so V `[P, in, out]`.

A meta unit makes its weights once per scenario and step, `[S, in, out]`, and rows then pass in groups.

The paper leaves open, and this does:
- Start: W_0 as `nn.Linear` draws it, V so that its sum is of that scale too, all biases 0.
- The meta attention's unit is one layer, shared by all labels, which q_t tells apart; towers are per label.

Deviations:
- p_s is made from the scenario alone; the paper also feeds it the advertiser's profile, which asks for weights per row.
- The experts read the joined groups. The paper has a transformer over an advertiser's sequences below them: here lists
  come pooled. Nothing attends across the rows of a batch.
- q_t is a vector that is learned, with no network above it.
- Log loss, where the paper predicts counts by Poisson regression.
- The experts are ReLU networks. Dropout, off by default.
- The algebra is checked against summaries and public code, not against the paper's print.
"""

from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Rate, Width, Widths
from msr_dist.models.layers import Dropout, Experts, ScenarioGroups, grouped_linear, stacked_weight
from msr_dist.schema import FeatureSchema


class Config(BackboneConfig):
    """Settings of M2M."""

    kind: Literal["m2m"] = "m2m"
    experts: Width = 4
    """Number of experts, shared by all scenarios and labels."""
    widths: Widths = (128, 64)
    """Units of each layer of an expert; the last is the width of the towers too."""
    attention_width: Width = 32
    """Units of the meta attention."""
    tower_layers: Width = 1
    """Residual layers of a meta tower."""
    scenario_width: Width = 16
    """Length of the scenario's embedding, and of the knowledge made from it."""
    label_width: Width = 16
    """Length of a label's view."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training, in experts and towers."""

    def build(self, schema: FeatureSchema) -> "M2m":
        """The network for this schema."""
        return M2m(self, schema)


class MetaUnit(nn.Module):
    """A linear layer per scenario whose weights are generated from the scenario's knowledge."""

    def __init__(self, knowledge_width: int, in_width: int, out_width: int) -> None:
        super().__init__()
        bound = (knowledge_width * in_width) ** -0.5
        self.weight = stacked_weight(1, in_width, out_width)
        self.bias = nn.Parameter(torch.zeros(out_width))
        self.weight_basis = nn.Parameter(torch.empty(knowledge_width, in_width, out_width).uniform_(-bound, bound))
        self.bias_basis = nn.Parameter(torch.zeros(knowledge_width, out_width))

    def forward(self, x: Tensor, knowledge: Tensor, groups: ScenarioGroups) -> Tensor:
        """`[B, in]` -> `[B, out]`, both grouped; `knowledge` is `[S, P]`."""
        weight = self.weight + torch.tensordot(knowledge.float(), self.weight_basis, dims=1)
        return grouped_linear(x, weight, self.bias + knowledge @ self.bias_basis, groups)


class MetaTower(nn.Module):
    """Residual layers that the scenario generates, and a last layer that it does not."""

    def __init__(self, knowledge_width: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.units = nn.ModuleList(MetaUnit(knowledge_width, width, width) for _ in range(layers))
        self.dropouts = nn.ModuleList(Dropout(dropout) for _ in range(layers))
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor, knowledge: Tensor, row: Tensor, groups: ScenarioGroups) -> Tensor:
        """`[B, W]` -> `[B, 1]`, both grouped, as is `row`; `knowledge` is `[S, P]`."""
        for unit, dropout in zip(self.units, self.dropouts, strict=True):
            x = dropout(leaky_relu(unit(x, knowledge, groups) + x), row)
        logit: Tensor = self.last(x)
        return logit


@final
class M2m(Backbone):
    """Shared experts, mixed by an attention and judged by a tower whose weights the scenario generates."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        self.scenarios = len(schema.scenarios)
        known, width = config.scenario_width, config.widths[-1]
        self.scenario = nn.Embedding(self.scenarios, known)
        self.knowledge = nn.Linear(known, known)
        self.experts = Experts(config.experts, schema.input_width, config.widths, config.dropout)
        self.label = nn.Embedding(len(schema.labels), config.label_width)
        self.attention = MetaUnit(known, width + config.label_width, config.attention_width)
        self.score = nn.Linear(config.attention_width, 1, bias=False)
        self.towers = nn.ModuleList(MetaTower(known, width, config.tower_layers, config.dropout) for _ in schema.labels)

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        groups = ScenarioGroups.of(inputs.scenario, self.scenarios)
        row = groups.group(inputs.row)
        views = self.experts(groups.group(inputs.joined()), row)
        knowledge = leaky_relu(self.knowledge(self.scenario.weight))
        mixed = self._share(views, knowledge, groups) @ views
        logits = [
            tower(hidden, knowledge, row, groups) for hidden, tower in zip(mixed.unbind(1), self.towers, strict=True)
        ]
        return groups.restore(torch.cat(logits, dim=1))

    def _share(self, views: Tensor, knowledge: Tensor, groups: ScenarioGroups) -> Tensor:
        """Each expert's share in each label's mixture, `[B, T, E]`."""
        label = self.label.weight
        shape = (len(views), len(label), views.shape[1])
        pairs = torch.cat([views[:, None].expand(*shape, -1), label[:, None].expand(*shape, -1)], dim=3)
        pairs_of_rows = groups.repeated(shape[1] * shape[2])
        hidden = leaky_relu(self.attention(pairs.flatten(0, 2), knowledge, pairs_of_rows))
        return torch.softmax(self.score(hidden).view(shape), dim=2)
