"""AdaptDHM: rows are routed to clusters that the model finds itself, each with weights of its own.

Li et al., 2022, "AdaptDHM: adaptive distribution hierarchical model for multi-domain CTR prediction":

    z      = [x ; p_s]                               p_s embedding of the scenario: a feature like any other
    r_k    = softmax_k(u . c_k / tau)                u the direction of z, c_k centre of cluster k, of length 1
    a      = argmax_k r_k                            the row's cluster
    h      = relu(h (W * W_a) + b + b_a)             per hidden layer, from h = z; * is elementwise
    logits = h (W * W_a) + b + b_a                   the last layer

    In training, before the rows are routed, a number of times:
        c_k <- unit(beta c_k + (1 - beta) unit(sum over rows of r_k u))

Shapes: z, u `[B, D]`; c `[K, D]`; r `[B, K]`; logits `[B, T]`; W `[1, in, out]` and b `[out]` are shared; W_k
`[K, in, out]` and b_k `[K, out]` are stacked.

The paper leaves open, or could not be checked for it, and this does:
- The sum over rows is scaled to length 1 before it moves the centre: otherwise beta would mean less in larger batches.
- Start: centres in random directions; W as `nn.Linear` draws it, W_k all 1, b and b_k all 0: clusters start equal.
- With T labels the last layer has T outputs.

Deviations:
- u is the direction of (z - m) / sqrt(q), with m and q the running mean and variance of z, column by column; and the
  softmax has a temperature tau. Without m all rows lean to the centre nearest to their mean. Without q the features
  with the longest embeddings decide alone: if p_s is one of them, the clusters are the scenarios again. Without the
  length 1 and tau, r is flat while embeddings are short, and all centres become one.
- Centres, m and q move by sums over the rows of all ranks in fp64, padding left out, one reduction for each time:
  routing in training depends on the global batch, not on the world size. No gradient flows through routing.
- In evaluation a row is routed by the saved centres, m and q alone.
- A row is computed by its own cluster's weights, once; a cluster without rows keeps its centre.
- Dropout, off by default.
"""

from itertools import pairwise
from typing import Annotated, Literal, final

import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import Field
from torch import Tensor, nn

from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Rate, WholeBatch, Width, Widths
from msr_dist.models.layers import Dropout, ScenarioGroups, StarLinear, sum_over_ranks
from msr_dist.schema import FeatureSchema

_EPS = 1e-5
"""Added to variances: a column that is constant has no say, rather than an endless one."""


class Config(BackboneConfig):
    """Settings of AdaptDHM."""

    kind: Literal["adaptdhm"] = "adaptdhm"
    clusters: Width = 3
    """Number of clusters, each with weights of its own."""
    widths: Widths = (128, 64)
    """Units of each hidden layer."""
    scenario_width: Width = 16
    """Length of the scenario's embedding, which is routed and read like the other features."""
    iterations: Width = 3
    """Updates of the centres in each training step."""
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share of the centres, the mean and the variance that an update keeps."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """What the softmax over clusters divides the cosines by: the smaller, the harder a row is claimed by one."""
    dropout: Rate = 0.0
    """Share of hidden units silenced in training."""

    def build(self, schema: FeatureSchema) -> "AdaptDhm":
        """The network for this schema."""
        return AdaptDhm(self, schema)


@final
class Router(WholeBatch):
    """Gives every row a cluster; in training its centres follow the rows of all ranks."""

    centres: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("centres", F.normalize(torch.randn(config.clusters, width), dim=1))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    @torch.no_grad()
    def forward(self, z: Tensor, row: Tensor) -> Tensor:
        """`z` `[B, D]` of the rows `row` `[B]` -> the clusters `[B]`."""
        if self.training:
            real = (row >= 0)[:, None].to(z.dtype)
            self._follow(z, real)
            direction = self._direction(z)
            for _ in range(self.config.iterations):
                share = torch.softmax(direction @ self.centres.T / self.config.temperature, dim=1) * real
                claimed = sum_over_ranks(share.T.double() @ direction.double())
                # What nobody claims has length 0, so that its centre keeps its direction.
                moved = self.config.beta * self.centres + (1 - self.config.beta) * F.normalize(claimed, dim=1)
                self.centres.copy_(F.normalize(moved, dim=1))
        return (self._direction(z) @ self.centres.T).argmax(dim=1)

    def _follow(self, z: Tensor, real: Tensor) -> None:
        """Moves mean and variance towards those of the global batch; without rows they stay."""
        distance = real * (z - self.mean)
        sums = torch.cat([real, distance, distance.square()], dim=1).sum(dim=0, dtype=torch.float64)
        count, first, second = sum_over_ranks(sums).split_with_sizes([1, z.shape[1], z.shape[1]])
        offset = first / count.clamp(min=1)
        weight = (1 - self.config.beta) * (count > 0)
        self.mean += weight * offset
        self.var += weight * (second / count.clamp(min=1) - offset.square() - self.var)

    def _direction(self, z: Tensor) -> Tensor:
        return F.normalize((z - self.mean) * torch.rsqrt(self.var + _EPS), dim=1)


@final
class AdaptDhm(Backbone):
    """A router and, beneath it, a star-shaped network over clusters instead of scenarios."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        self.clusters = config.clusters
        width = schema.input_width + config.scenario_width
        self.scenario = nn.Embedding(len(schema.scenarios), config.scenario_width)
        self.router = Router(config, width)
        shapes = pairwise([width, *config.widths])
        self.hidden = nn.ModuleList(StarLinear(self.clusters, i, o) for i, o in shapes)
        self.dropouts = nn.ModuleList(Dropout(config.dropout) for _ in config.widths)
        self.last = StarLinear(self.clusters, config.widths[-1], len(schema.labels))

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        z = torch.cat([inputs.joined(), self.scenario(inputs.scenario)], dim=1)
        groups = ScenarioGroups.of(self.router(z, inputs.row), self.clusters)
        row, hidden = groups.group(inputs.row), groups.group(z)
        for linear, dropout in zip(self.hidden, self.dropouts, strict=True):
            hidden = dropout(torch.relu(linear(hidden, groups)), row)
        return groups.restore(self.last(hidden, groups))
