"""AdaSparse: a subnetwork per scenario, cut out of one network by pruning its neurons.

Yang et al., 2022, "AdaSparse: learning adaptively sparse structures for multi-domain click-through rate prediction":

    h_l    = relu(Linear_l(g_{l-1}))                 l = 1 .. L, from g_0 = [x ; p_s], p_s embedding of the scenario
    v_l    = Linear'_l([p_s ; h_l])                  the pruner: it sees the scenario and the neurons that it judges
    g_l    = h_l * pi_l                              pi_l the weighting factors of the neurons, in one of three forms:

    scaling    pi = beta sigmoid(v)                                            nothing is pruned
    binary     pi = 1 where sigmoid(alpha v) > epsilon, else 0                 alpha grows while training goes on
    fusion     pi = u where u = beta sigmoid(alpha v) > epsilon, else 0

    logits  = Linear(g_L)
    penalty = lambda / L  sum_l [r_l outside of r_min .. r_max] (r_l - (r_min + r_max) / 2)^2
              r_l the share of neurons that pi_l prunes; for the forms that prune

Shapes: x `[B, D]`; h_l, v_l, pi_l, g_l `[B, width of layer l]`; r_l `[B]`; logits `[B, T]`.

The paper leaves open, or could not be checked for it, and this does:
- Where to cut: the step from 0 to 1 has no gradient, so backward takes that of sigmoid(alpha v) (of u for fusion) on
  both sides of epsilon. In the penalty as well. So a neuron that is pruned can come back.
- Numbers: the defaults of epsilon, beta, alpha's range and speed, lambda and the range of r are ours.
- Layers: hidden ones are pruned, the input is not.
- With T labels only the last layer has T outputs: they share the subnetwork.

Deviations:
- r_l is taken row by row, not averaged over a batch or a scenario: so the penalty of a row does not depend on the rows
  beside it, nor on how ranks share them.
- lambda is constant; alpha grows linearly with the training steps up to a limit. Steps are saved with the parameters,
  and evaluation leaves them as they are.
- ReLU, without batch normalisation. Dropout, off by default.
- Pruned neurons are multiplied by 0, not skipped: rows of a batch prune differently.
"""

from itertools import pairwise
from typing import Annotated, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Objective, Rate, WholeBatch, Width, Widths
from msr_dist.models.layers import Dropout
from msr_dist.schema import FeatureSchema

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Config(BackboneConfig):
    """Settings of AdaSparse."""

    kind: Literal["adasparse"] = "adasparse"
    form: Literal["binary", "scaling", "fusion"] = "fusion"
    """How the pruner's opinion becomes a factor: see the equations above."""
    widths: Widths = (128, 64)
    """Units of each hidden layer."""
    scenario_width: Width = 16
    """Length of the scenario's embedding, which the network and the pruners read."""
    epsilon: Share = 0.25
    """Factors up to this are cut to 0."""
    beta: Positive = 2.0
    """The largest factor of "scaling" and "fusion"."""
    alpha_first: Positive = 1.0
    """Steepness of the factors at the start of training."""
    alpha_last: Positive = 5.0
    """Steepness of the factors after `alpha_steps`."""
    alpha_steps: Width = 1000
    """Training steps until the steepness stays."""
    sparsity: tuple[Share, Share] = (0.15, 0.25)
    """Least and largest share of a layer's neurons to be pruned in a row without a penalty."""
    sparsity_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """Factor of the penalty."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sparsity[0] > self.sparsity[1]:
            raise ValueError(f"sparsity is {list(self.sparsity)}: give the lower bound first")
        return self

    def build(self, schema: FeatureSchema) -> "AdaSparse":
        """The network for this schema."""
        return AdaSparse(self, schema)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of `hard`, exactly, with the gradient of `soft`."""
    return hard.detach() + (soft - soft.detach())


@final
class AdaSparse(Backbone, WholeBatch):
    """An MLP whose neurons are weighed, and pruned, by scenario and row."""

    steps: Tensor

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        self.config = config
        width = schema.input_width + config.scenario_width
        self.scenario = nn.Embedding(len(schema.scenarios), config.scenario_width)
        shapes = pairwise([width, *config.widths])
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in shapes)
        self.pruners = nn.ModuleList(nn.Linear(config.scenario_width + o, o) for o in config.widths)
        self.dropouts = nn.ModuleList(Dropout(config.dropout) for _ in config.widths)
        self.last = nn.Linear(config.widths[-1], len(schema.labels))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        return self.objective(inputs).logits

    def objective(self, inputs: Inputs) -> Objective:
        """Logits, and for the forms that prune the penalty of missing the wanted sparsity."""
        alpha = self.alpha()
        if self.training:
            self.steps += 1
        scenario = self.scenario(inputs.scenario)
        hidden, penalties = torch.cat([inputs.joined(), scenario], dim=1), []
        for linear, pruner, dropout in zip(self.hidden, self.pruners, self.dropouts, strict=True):
            hidden = torch.relu(linear(hidden))
            factors, pruned = self.factors(pruner(torch.cat([scenario, hidden], dim=1)), alpha)
            hidden = dropout(hidden * factors, inputs.row)
            penalties.append(self._penalty(pruned.mean(dim=1)))
        penalty = None if self.config.form == "scaling" else torch.stack(penalties).mean(dim=0)
        return Objective(self.last(hidden), penalty=penalty)

    def alpha(self) -> Tensor:
        """Steepness of the factors after the training steps so far."""
        grown = (self.steps / self.config.alpha_steps).clamp(max=1.0)
        return self.config.alpha_first + grown * (self.config.alpha_last - self.config.alpha_first)

    def factors(self, opinion: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """The neurons' factors, and where they are pruned (1, else 0), both shaped as `opinion` `[B, width]`."""
        config = self.config
        if config.form == "scaling":
            return config.beta * torch.sigmoid(opinion), torch.zeros_like(opinion)
        soft = torch.sigmoid(alpha * opinion)
        if config.form == "binary":
            kept = straight_through((soft > config.epsilon).to(soft.dtype), soft)
            return kept, 1 - kept
        scaled = config.beta * soft
        kept = (scaled > config.epsilon).to(soft.dtype)
        return straight_through(scaled * kept, scaled), 1 - straight_through(kept, soft)

    def _penalty(self, sparsity: Tensor) -> Tensor:
        """Of one layer, from the share of its neurons that is pruned in each row, `[B]`."""
        least, most = self.config.sparsity
        outside = (sparsity < least) | (sparsity > most)
        return self.config.sparsity_weight * outside * (sparsity - (least + most) / 2).square()
