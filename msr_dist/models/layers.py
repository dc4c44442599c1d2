"""Layers that the models share.

Shapes: `B` rows of this rank, `D` and `W` widths, `S` scenarios, `E` experts.

Every layer takes any number of rows, none included, and builds the same graph whichever scenarios are present: ranks
that see different scenarios still run the same collectives in the same order.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from msr_dist.models.base import Behaviours, WholeBatch
from msr_dist.noise import uniform


@final
class Dropout(nn.Module):
    """Inverted dropout (Srivastava et al., 2014) whose mask belongs to the row: a function of salt, row and unit.

    The salt is drawn at construction and kept with the parameters, so a row meets the same mask at any world size and
    after a restart. It costs nothing in evaluation or at rate 0.
    """

    salt: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("salt", torch.randint(2**62, ()))

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        """`x` `[B, ...]` of the rows `row` `[B]`, with a share of `rate` of its units at 0 and the others scaled up."""
        if not self.training or self.rate == 0.0:
            return x
        units = torch.arange(math.prod(x.shape[1:]), device=x.device)
        # The salt shifts the units instead of being the seed: so it never has to be read back from the device.
        keep = uniform(0, row, units + self.salt) >= self.rate
        return x * keep.view(x.shape).to(x.dtype).mul_(1.0 / (1.0 - self.rate))


@final
class MLP(nn.Module):
    """Linear, ReLU and dropout, once per width; drawn as `nn.Linear` draws it."""

    def __init__(self, in_width: int, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.out_width = widths[-1]
        self.linears = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise([in_width, *widths]))
        self.dropouts = nn.ModuleList(Dropout(dropout) for _ in widths)

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        """`[B, in_width]` -> `[B, widths[-1]]`."""
        for linear, dropout in zip(self.linears, self.dropouts, strict=True):
            x = dropout(torch.relu(linear(x)), row)
        return x


@final
class TargetAttention(nn.Module):
    """DIN's local activation unit (Zhou et al., 2018, "Deep interest network", section 4.3).

        a_l = last(MLP([v_l ; t ; v_l - t ; v_l * t]))          v_l [B, W] one behaviour, t [B, W] the target
        out = sum_l a_l v_l                                     not normalised, so that strong interest is a long vector

    Deviations: ReLU in place of Dice, whose statistics are of the batch; the difference beside the product, as in the
    authors' code.
    """

    def __init__(self, width: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.mlp = MLP(4 * width, widths, dropout=0.0)
        self.last = nn.Linear(self.mlp.out_width, 1)

    def forward(self, behaviours: Behaviours, row: Tensor) -> Tensor:
        """`[B, W]`; 0 where there is no behaviour."""
        vectors = behaviours.vectors
        target = behaviours.target[:, None, :].expand_as(vectors)
        asked = torch.cat([vectors, target, vectors - target, vectors * target], dim=2)
        weight = self.last(self.mlp(asked, row)) * behaviours.present[:, :, None]
        pooled: Tensor = (weight * vectors).sum(dim=1)
        return pooled


@final
class Experts(nn.Module):
    """`E` MLPs over the same input, their weights stacked `[E, in, out]`."""

    def __init__(self, experts: int, in_width: int, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.out_width = widths[-1]
        shapes = pairwise([in_width, *widths])
        self.weights = nn.ParameterList(stacked_weight(experts, i, o) for i, o in shapes)
        self.biases = nn.ParameterList(torch.zeros(experts, width) for width in widths)
        self.dropouts = nn.ModuleList(Dropout(dropout) for _ in widths)

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        """`[B, in_width]` -> `[B, E, widths[-1]]`."""
        hidden = x
        for weight, bias, dropout in zip(self.weights, self.biases, self.dropouts, strict=True):
            hidden = dropout(torch.relu(banked_linear(hidden, weight, bias)), row)
        return hidden


def banked_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`[B, E, in]`, `[E, in, out]` and `[E, out]` -> `[B, E, out]`: each slice through a layer of its own.

    `x` may also be `[B, in]`, for all layers alike: it is read once. A product per slice is what CPUs' libraries do
    best: as one batched product, forward and backward take up to twice as long, in bf16 more so.
    """
    if x.dim() == 2:
        whole = F.linear(x, weight.transpose(1, 2).flatten(0, 1), bias.flatten())
        return whole.view(len(x), *bias.shape)
    parts = zip(x.unbind(1), weight.unbind(), bias.unbind(), strict=True)
    return torch.stack([torch.addmm(b, part, w) for part, w, b in parts], dim=1)


def mixture(scores: Tensor, opinions: Tensor) -> Tensor:
    """`[B, E]` and `[B, E, W]` -> `[B, W]`: the opinions' mean, weighted by the scores' softmax."""
    # Over the rows of a transposed matrix, for vectors of E numbers do not fill a register.
    shares = torch.softmax(scores.t(), dim=0).to(opinions.dtype)
    mixed: Tensor = _Mixture.apply(shares, opinions)  # type: ignore[no-untyped-call]
    return mixed


class _Mixture(torch.autograd.Function):
    # `[E, B]` and `[B, E, W]` -> `[B, W]`. As ordinary operations, products as large as the opinions are written and
    # read again to be summed: twice the time.
    @staticmethod
    def forward(ctx: Any, shares: Tensor, opinions: Tensor) -> Tensor:
        ctx.save_for_backward(shares, opinions)
        (share, opinion), *others = zip(shares.unbind(), opinions.unbind(1), strict=True)
        out = opinion * share[:, None]
        for share, opinion in others:
            out.addcmul_(share[:, None], opinion)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        shares, opinions = ctx.saved_tensors
        of_opinions = torch.empty_like(opinions, memory_format=torch.contiguous_format)
        for share, place in zip(shares.unbind(), of_opinions.unbind(1), strict=True):
            torch.mul(gradient, share[:, None], out=place)
        return torch.bmm(opinions, gradient[:, :, None]).squeeze(2).t(), of_opinions


@dataclass(frozen=True)
class ScenarioGroups:
    """The rows of a batch by scenario: found once per forward pass, then shared by all its layers.

    `sizes` is read back from the device: there the host waits for it.
    """

    order: Tensor
    """`[B]`: grouped row i is row order[i] of the batch."""
    scenario: Tensor
    """`[B]`, ascending: scenario of each grouped row."""
    counts: Tensor
    """`[S]`: rows of each scenario."""
    sizes: list[int]
    """The counts, on the host."""

    @classmethod
    def of(cls, scenario: Tensor, scenarios: int) -> "ScenarioGroups":
        """The groups of `scenario` `[B]`, whose values are below `scenarios`."""
        grouped, order = torch.sort(scenario, stable=True)
        # Not bincount, which reads the largest value back from the device before it counts.
        bounds = torch.searchsorted(grouped, torch.arange(scenarios + 1, device=scenario.device))
        counts = bounds.diff()
        sizes = counts.tolist()
        if sum(sizes) < len(scenario):
            raise ValueError(
                f"the batch holds scenario {int(scenario.max())}, but the schema only {scenarios} scenarios"
            )
        return cls(order, grouped, counts, sizes)

    @classmethod
    def whole(cls, rows: int, device: torch.device) -> "ScenarioGroups":
        """So many rows as one group: there is nothing to find, and nothing to move."""
        order, scenario = torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
        return cls(order, scenario, torch.full((1,), rows, device=device), [rows])

    def repeated(self, times: int) -> "ScenarioGroups":
        """The groups of rows that each come `times` times, one after the other."""
        order = (self.order[:, None] * times + torch.arange(times, device=self.order.device)).flatten()
        scenario = self.scenario.repeat_interleave(times)
        return ScenarioGroups(order, scenario, self.counts * times, [size * times for size in self.sizes])

    def group(self, x: Tensor) -> Tensor:
        """`x` `[B, ...]` in grouped order."""
        return x if len(self.sizes) == 1 else x.index_select(0, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """`x` `[B, ...]`, grouped, in the order of the batch."""
        return x if len(self.sizes) == 1 else torch.empty_like(x).index_copy(0, self.order, x)

    def spread(self, table: Tensor) -> Tensor:
        """`table` `[S, D]` -> `[B, D]`: each grouped row's own line. Its gradient is summed in a fixed order."""
        return F.embedding(self.scenario, table)

    def sums(self, x: Tensor) -> Tensor:
        """`x` `[B, D]`, grouped -> `[S, D]` fp64: the sum over each scenario's rows."""
        sums: Tensor = _GroupedSums.apply(x, self.scenario, self.sizes)  # type: ignore[no-untyped-call]
        return sums


class _GroupedSums(torch.autograd.Function):
    # As ordinary operations, S sums and their stacking cost more than the additions when scenarios are many.
    @staticmethod
    def forward(ctx: Any, x: Tensor, scenario: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(scenario)
        ctx.dtype = x.dtype
        out = x.new_zeros(len(sizes), x.shape[1], dtype=torch.float64)
        for size, rows, place in zip(sizes, x.split_with_sizes(sizes), out.unbind(), strict=True):
            if size:
                torch.sum(rows, 0, dtype=torch.float64, out=place)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (scenario,) = ctx.saved_tensors
        return gradient.to(ctx.dtype).index_select(0, scenario), None, None


def grouped_linear(
    x: Tensor, weight: Tensor, bias: Tensor, groups: ScenarioGroups, shared: Tensor | None = None
) -> Tensor:
    """Each grouped row through its own scenario's layer, and through no other.

    Args:
        x: `[B, in]`, grouped.
        weight: `[S, in, out]`.
        bias: `[S, out]`.
        groups: of the rows of `x`.
        shared: `[in, out]`, by which the weight of every scenario is multiplied elementwise, if given.

    Returns:
        `[B, out]`, grouped. A scenario without rows takes part with an empty product: its gradient is exactly 0.
    """
    if torch.is_autocast_enabled(x.device.type):
        # Autocast knows torch's own products alone.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        shared = None if shared is None else shared.to(dtype)
    out: Tensor = _GroupedLinear.apply(x, weight, bias, shared, groups.sizes)  # type: ignore[no-untyped-call]
    return out


_SLAB = 8
"""Scenarios whose products with the shared weight are made at once: few enough to stay in the cache until used."""


class _GroupedLinear(torch.autograd.Function):
    # One product per scenario, each written where it belongs, and as few other operations as there can be: with many
    # scenarios it is the number of calls that costs. As ordinary operations, S slices, their concatenation, the
    # stacking of S gradients and the products with the shared weight cost more than the layer; torch's grouped_mm is no
    # faster on CPU and takes neither empty batches nor a single output.
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shared: Tensor | None, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight, *([] if shared is None else [shared]))
        ctx.sizes = sizes
        out = x.new_empty(len(x), weight.shape[2])
        layers = (layer for slab in torch.split(weight, _SLAB) for layer in _product(slab, shared).unbind())
        parts = (each.split_with_sizes(sizes) for each in (x, out))
        for size, layer, own, rows, place in zip(sizes, layers, bias.unbind(), *parts, strict=True):
            if size:
                torch.addmm(own, rows, layer, out=place)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *rest = ctx.saved_tensors
        shared: Tensor | None = rest[0] if rest else None
        gradient = gradient.contiguous()
        of_x, of_weight = torch.empty_like(x), torch.empty_like(weight)
        # In fp32, for many rows are summed.
        of_bias = gradient.new_empty(len(weight), weight.shape[2], dtype=torch.float32)
        of_shared = None if shared is None else torch.zeros_like(shared)
        rows = (each.split_with_sizes(ctx.sizes) for each in (x, of_x, gradient))
        parts = zip(ctx.sizes, *rows, of_bias.unbind(), strict=True)
        for slab, of_slab in zip(torch.split(weight, _SLAB), torch.split(of_weight, _SLAB), strict=True):
            layers = zip(_product(slab, shared).unbind(), of_slab.unbind(), strict=True)
            for (layer, of_layer), (size, some, of_some, g, own) in zip(layers, parts, strict=False):
                torch.sum(g, 0, dtype=torch.float32, out=own)
                if size:
                    torch.mm(g, layer.t(), out=of_some)
                    torch.mm(some.t(), g, out=of_layer)
                else:
                    of_layer.zero_()
            if shared is not None and of_shared is not None:
                of_shared += (of_slab * slab).sum(0)
                of_slab *= shared
        return of_x, of_weight, of_bias.to(gradient.dtype), of_shared, None


def _product(slab: Tensor, shared: Tensor | None) -> Tensor:
    return slab if shared is None else slab * shared


def stacked_weight(count: int, in_width: int, out_width: int) -> nn.Parameter:
    """`[count, in, out]`: each as `nn.Linear` would draw it, uniform within 1 / sqrt(in)."""
    bound = in_width**-0.5
    return nn.Parameter(torch.empty(count, in_width, out_width).uniform_(-bound, bound))


@final
class ScenarioLinear(nn.Module):
    """One linear layer per scenario: stacked weights `[S, in, out]`, biases `[S, out]` from 0."""

    def __init__(self, scenarios: int, in_width: int, out_width: int) -> None:
        super().__init__()
        self.weight = stacked_weight(scenarios, in_width, out_width)
        self.bias = nn.Parameter(torch.zeros(scenarios, out_width))

    def forward(self, x: Tensor, groups: ScenarioGroups) -> Tensor:
        """`[B, in]` -> `[B, out]`, both grouped."""
        return grouped_linear(x, self.weight, self.bias, groups)


def side_by_side(linears: Iterable[Any], x: Tensor, groups: ScenarioGroups) -> tuple[Tensor, ...]:
    """What each `ScenarioLinear` makes of the same `x` `[B, in]`, grouped, which is read once for them all."""
    weights, biases = zip(*((linear.weight, linear.bias) for linear in linears), strict=True)
    whole = grouped_linear(x, torch.cat(weights, dim=2), torch.cat(biases, dim=1), groups)
    return whole.split_with_sizes([weight.shape[2] for weight in weights], dim=1)


@final
class StarLinear(nn.Module):
    """STAR's layer (Sheng et al., 2021, section 3.4): shared weights times the scenario's own, sum of both biases."""

    def __init__(self, scenarios: int, in_width: int, out_width: int) -> None:
        super().__init__()
        self.weight = stacked_weight(1, in_width, out_width)
        self.bias = nn.Parameter(torch.zeros(out_width))
        self.scenario_weight = nn.Parameter(torch.ones(scenarios, in_width, out_width))
        self.scenario_bias = nn.Parameter(torch.zeros(scenarios, out_width))

    def forward(self, x: Tensor, groups: ScenarioGroups) -> Tensor:
        """`[B, in]` -> `[B, out]`, both grouped."""
        return grouped_linear(
            x, self.scenario_weight, self.bias + self.scenario_bias, groups, shared=self.weight.squeeze(0)
        )


@final
class ScenarioTower(nn.Module):
    """One MLP with a linear last layer per scenario."""

    def __init__(self, scenarios: int, in_width: int, widths: Sequence[int], out_width: int, dropout: float) -> None:
        super().__init__()
        shapes = pairwise([in_width, *widths])
        self.hidden = nn.ModuleList(ScenarioLinear(scenarios, i, o) for i, o in shapes)
        self.dropouts = nn.ModuleList(Dropout(dropout) for _ in widths)
        self.last = ScenarioLinear(scenarios, [in_width, *widths][-1], out_width)

    def forward(self, x: Tensor, row: Tensor, groups: ScenarioGroups) -> Tensor:
        """`[B, in_width]` -> `[B, out_width]`, both grouped, and so is `row` `[B]`."""
        for linear, dropout in zip(self.hidden, self.dropouts, strict=True):
            x = dropout(torch.relu(linear(x, groups)), row)
        logits: Tensor = self.last(x, groups)
        return logits


@final
class ScenarioExperts(nn.Module):
    """`E` MLPs per scenario: weights `[S, E, in, out]`, biases `[S, E, out]` from 0."""

    def __init__(self, scenarios: int, experts: int, in_width: int, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.out_width = widths[-1]
        shapes = list(pairwise([in_width, *widths]))
        stacks = [stacked_weight(scenarios * experts, i, o) for i, o in shapes]
        self.weights = nn.ParameterList(stack.detach().view(scenarios, experts, *stack.shape[1:]) for stack in stacks)
        self.biases = nn.ParameterList(torch.zeros(scenarios, experts, width) for width in widths)
        self.dropouts = nn.ModuleList(Dropout(dropout) for _ in widths)

    def forward(self, x: Tensor, row: Tensor, groups: ScenarioGroups) -> Tensor:
        """`[B, in_width]` -> `[B, E, widths[-1]]`, both grouped, and so is `row` `[B]`: a row meets its own experts."""
        hidden = x[:, None, :].expand(-1, self.weights[0].shape[1], -1)
        for weight, bias, dropout in zip(self.weights, self.biases, self.dropouts, strict=True):
            layers = zip(hidden.split_with_sizes(groups.sizes), weight.unbind(), bias.unbind(), strict=True)
            product = torch.cat([torch.baddbmm(b[:, None, :], h.transpose(0, 1), w) for h, w, b in layers], dim=1)
            hidden = dropout(torch.relu(product).transpose(0, 1), row)
        return hidden


_ROUNDING = 1e-6
"""Variance, in squared distances to the running mean, that rounding alone may make of equal fp32 numbers."""


@final
class ScenarioNorm(WholeBatch):
    """STAR's partitioned normalisation (Sheng et al., 2021, section 3.3), for batches that mix scenarios.

        train     z' = gamma * gamma_s * (z - mu_s) / sqrt(var_s + eps) + beta + beta_s      statistics of the batch
        evaluate  the same with the running statistics of the scenario                      nothing else is read

    The statistics of a scenario are over its rows on *all* ranks, in one reduction forward and one backward, so that
    training does not depend on the world size. Sums are fp64 and of distances to the running mean, lest they cancel.

    The paper leaves open, and this does:
    - A scenario with fewer than 2 rows in the global batch has no variance: it is normalised by its running
      statistics, as in evaluation, and leaves them as they are.
    - Batch variance is biased, running variance unbiased, as in `nn.BatchNorm1d`.
    - Update k of a scenario weighs max(momentum, 1 / k): the plain average at first, so that a rare scenario does not
      keep the initial statistics for long.
    - A column that is constant within a scenario, such as a category that is the scenario, says nothing there and
      becomes beta + beta_s, in training and in evaluation: its distance to a running mean that lags behind would be
      divided by sqrt(eps), and its gradient is rounding, which adaptive optimizers would blow up to full steps.
    """

    running_mean: Tensor
    running_var: Tensor
    updates: Tensor

    def __init__(self, scenarios: int, width: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))
        self.scenario_gamma = nn.Parameter(torch.ones(scenarios, width))
        self.scenario_beta = nn.Parameter(torch.zeros(scenarios, width))
        self.register_buffer("running_mean", torch.zeros(scenarios, width))
        self.register_buffer("running_var", torch.ones(scenarios, width))
        self.register_buffer("updates", torch.zeros(scenarios, 1, dtype=torch.int64))

    def forward(self, x: Tensor, row: Tensor, groups: ScenarioGroups) -> Tensor:
        """`[B, D]` -> `[B, D]`, both grouped, as is `row`: where it is negative, the row is padding and not counted."""
        mean, var = (
            self._batch_statistics(x, row >= 0, groups) if self.training else (self.running_mean, self.running_var)
        )
        scale = self.gamma * self.scenario_gamma * torch.rsqrt(var + self.eps) * (var > 0)
        return (x - groups.spread(mean)) * groups.spread(scale) + groups.spread(self.beta + self.scenario_beta)

    def _batch_statistics(self, x: Tensor, real: Tensor, groups: ScenarioGroups) -> tuple[Tensor, Tensor]:
        """Mean and variance `[S, D]` of the global batch's `real` rows; updates the running ones."""
        counted = real[:, None].to(x.dtype)
        centred = (x - groups.spread(self.running_mean)) * counted
        moments = sum_over_ranks(groups.sums(torch.cat([counted, centred, centred.square()], dim=1)))
        count, first, second = moments.split_with_sizes([1, x.shape[1], x.shape[1]], dim=1)
        enough = count >= 2
        offset = first / count.clamp(min=1)
        var = second / count.clamp(min=1) - offset.square()
        var = torch.where(var > _ROUNDING * offset.square(), var, 0.0)
        mean = torch.where(enough, self.running_mean + offset, self.running_mean).to(x.dtype)
        used_var = torch.where(enough, var, self.running_var).to(x.dtype)
        with torch.no_grad():
            self.updates += enough
            weight = enough * (1.0 / self.updates.clamp(min=1)).clamp(min=self.momentum)
            self.running_mean += weight * offset
            self.running_var += weight * (var * count / (count - 1).clamp(min=1) - self.running_var)
        return mean, used_var


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def gather_over_ranks(x: Tensor) -> tuple[Tensor, int]:
    """`x` `[B, ...]` of all ranks, one after the other `[R * B, ...]`, and the place of this rank's first row in it.

    `B` is the same on all ranks. The gradient of a row is the sum of those that all ranks have for it.
    """
    if _alone():
        return x, 0
    everybody: Tensor = _Gather.apply(x)  # type: ignore[no-untyped-call]
    return everybody, dist.get_rank() * len(x)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Not reduce_scatter, which gloo does not have for all types.
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.narrow(0, dist.get_rank() * ctx.rows, ctx.rows)


def sum_over_ranks(x: Tensor) -> Tensor:
    """`x` summed over the ranks of the default process group, if there is one; so is its gradient."""
    if _alone():
        return x
    total: Tensor = _SumOverRanks.apply(x)  # type: ignore[no-untyped-call]
    return total


class _SumOverRanks(torch.autograd.Function):
    # torch.distributed.nn.functional.all_reduce does the same, but is deprecated.
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total
