"""Shard a module over all ranks: sparse optimizer, plan, DistributedModelParallel, dense optimizer, in that order.

Takes any module that holds EmbeddingBagCollections and EmbeddingCollections. Which optimizer trains a table does not
depend on the plan:

- sharded tables always use fbgemm's fused kernel, never the dense one that the planner might prefer for small tables;
- a replicated (data_parallel) table has no fused kernel; it gets the same algorithm as an ordinary optimizer. fbgemm's
  Adam skips rows that a batch does not touch, an ordinary one does not: that pair is refused;
- row-wise Adagrad keeps one statistic per row, a column-wise shard would keep its own: that pair is refused too.

A fixed table is not trained at all: its values are given, by row, and no optimizer changes them. Any layout goes.
"""

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import psutil
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor  # type: ignore[attr-defined]
from torch.distributed.optim import _apply_optimizer_in_backward  # type: ignore[attr-defined]
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from msr_dist import noise
from msr_dist.config import Config
from msr_dist.distributed import World
from msr_dist.optim import DenseOptimizer, SparseOptimizer

ShardingKind = Literal["table_wise", "row_wise", "table_row_wise", "column_wise", "data_parallel"]

Values = Callable[[int, int], Tensor]
"""First row and number of rows -> what they hold, `[rows, columns]`."""

_DRAWN_ROWS = 1 << 16
_KERNELS = {"data_parallel": EmbeddingComputeKernel.DENSE}
_REFUSED = {
    "rowwise_adagrad": {
        "column_wise": "each shard would keep its own statistic of a row; use adagrad or other layouts"
    },
    "adam": {"data_parallel": "an ordinary Adam also moves rows that a batch does not touch; use another layout"},
}
_REFUSED_LISTS = {
    "table_row_wise": "TorchRec has no table_row_wise layout for such tables; use row_wise or another layout",
    # The dense kernel of fbgemm's CPU build sums each list, whatever it was asked for.
    "data_parallel": "data_parallel has no kernel for such tables on CPU; use row_wise or another layout",
}


class TableSharding(Config):
    """How one table may be laid out."""

    sharding: tuple[ShardingKind, ...] = Field(min_length=1)


class ParallelConfig(Config):
    """Where tables live. The planner takes the layout that it estimates to be fastest among those allowed."""

    sharding: tuple[ShardingKind, ...] = Field(default=("table_wise", "row_wise"), min_length=1)
    """Layouts that the planner may choose from, for every table that is not named below."""
    tables: dict[str, TableSharding] = {}
    """Exceptions, by table name."""


@dataclass
class Sharded:
    """A module that is spread over all ranks, and what trains it."""

    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    """All optimizers; its step is the pipeline's."""
    dense: KeyedOptimizer
    """That of everything but tables."""
    plan: ShardingPlan
    tables: dict[str, str]
    """Name of a table's parameter -> name of the table."""

    def scale_learning_rates(self, factor: float, tables: float = 1.0) -> None:
        """Set every learning rate to `factor` times what the configuration says, and those of tables to `tables` of it.

        This holds from the next step on.
        """
        for _, optimizer in self.optimizer.optimizers:
            scaled = factor if optimizer is self.dense else factor * tables
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * scaled

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, under names and in logical shapes that do not depend on the plan."""
        named = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for parameter, states in self.optimizer.state_dict()["state"].items():
            for key, tensor in states.items():
                name = _state_name(parameter in self.tables, key)
                if name:
                    named[f"optimizer/{parameter}/{name}"] = _flat_if_rowwise(name, tensor)
        return named

    def allocate_state(self) -> None:
        """Create the optimizer state that is otherwise born in the first step, so that a checkpoint has where to go."""
        for _, optimizer in self.optimizer.optimizers:
            if isinstance(optimizer, KeyedOptimizerWrapper):
                optimizer.init_state()

    def set_step(self, step: int) -> None:
        """Tell fused optimizers that correct a bias (adam) how many steps they have done; no tensor holds it."""
        self.optimizer.set_optimizer_step(step)

    def table_shards(self) -> Iterator[tuple[str, Tensor, int, int]]:
        """Table name, weights in this rank's memory, and the first row and column of the table that they hold."""
        for name, weight in self.model.state_dict().items():
            if name in self.tables:
                if isinstance(weight, ShardedTensor):
                    for local in weight.local_shards():
                        first_row, first_column = local.metadata.shard_offsets
                        yield self.tables[name], local.tensor, first_row, first_column
                else:
                    yield self.tables[name], weight, 0, 0

    def describe(self) -> str:
        """The plan as text."""
        return str(self.plan)


class _BagSharder(EmbeddingBagCollectionSharder):
    """The stock sharder offers no row-wise layouts on CPU, though they run there."""

    def sharding_types(self, compute_device_type: str) -> list[str]:  # noqa: ARG002 - the base class has it
        return ["data_parallel", "table_wise", "column_wise", "row_wise", "table_row_wise"]


_SHARDERS = [_BagSharder(), EmbeddingCollectionSharder()]


def shard(
    module: nn.Module,
    config: ParallelConfig,
    sparse: SparseOptimizer,
    dense: DenseOptimizer,
    world: World,
    batch_size: int,
    seed: int,
    reserved: Mapping[str, int],
    fixed: Mapping[str, Values] | None = None,
) -> Sharded:
    """Spread `module` over the world and build its optimizers.

    Tables are drawn from `seed` by row, so they start the same under any plan; the first rows of each, as many as
    `reserved` says by table name, stand for ids that training never sees and start at zero, which says nothing.
    Tables in `fixed` hold the values that it gives by table name, and keep them: nothing trains them. A rank asks for
    rows of its own shards alone, a part at a time. The module must not let a gradient reach a fixed table.
    `batch_size` is that of one rank; the planner's estimate alone depends on it.

    Raises:
        ValueError: the allowed layouts do not fit the optimizer, the device or the memory.
    """
    fixed = fixed or {}
    # Before the sharder replaces the collections.
    tables = _tables(module)
    names = {f"{place}{table}.weight": table for place, listed in _places(module).items() for table in listed}
    plan = make_plan(module, config, sparse, world, batch_size, fixed)
    model = DistributedModelParallel(
        module,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=world.device,
        plan=plan,
        sharders=list(_SHARDERS),
        # Alone, it would only copy every gradient into its buckets and back.
        init_data_parallel=world.world_size > 1,
    )
    others, of_tables = _optimizers(model, sparse, dense, names, fixed)
    sharded = Sharded(model, CombinedOptimizer([*of_tables, others]), others, plan, names)
    for name, weights, first_row, first_column in sharded.table_shards():
        if name in fixed:
            _fill(weights, first_row, first_column, fixed[name])
        else:
            _draw(weights, first_row, first_column, tables[name], seed)
            weights[: max(0, reserved[name] - first_row)].zero_()
    return sharded


def make_plan(
    module: nn.Module,
    config: ParallelConfig,
    sparse: SparseOptimizer,
    world: World,
    batch_size: int,
    fixed: Collection[str] = (),
) -> ShardingPlan:
    """Mark the tables with their optimizer and lay them out; all ranks together, or alone where none is connected.

    Nothing trains the tables named in `fixed`.
    """
    allowed = _allowed(config, sparse, _tables(module), world, fixed)
    trained = [parameter for name, parameter in _table_parameters(module) if name not in fixed]
    kept = [parameter for name, parameter in _table_parameters(module) if name in fixed]
    _apply_optimizer_in_backward(sparse.torch_class(), trained, sparse.arguments())
    # A fused kernel cannot be without an optimizer on CPU; this one has no state, and at this rate moves nothing.
    _apply_optimizer_in_backward(torch.optim.SGD, kept, {"lr": 0.0})
    return _plan(module, allowed, _tables(module), world, batch_size)


def _configs(child: nn.Module) -> list[BaseEmbeddingConfig]:
    """The tables of a collection; none where `child` is something else."""
    if isinstance(child, EmbeddingBagCollection):
        return list(child.embedding_bag_configs())
    return list(child.embedding_configs()) if isinstance(child, EmbeddingCollection) else []


def _tables(module: nn.Module) -> dict[str, BaseEmbeddingConfig]:
    return {table.name: table for child in module.modules() for table in _configs(child)}


def _places(module: nn.Module) -> dict[str, list[str]]:
    """Where the parameters of tables stand: prefix of their names -> the tables there."""
    return {
        f"{name}.{'embedding_bags' if isinstance(child, EmbeddingBagCollection) else 'embeddings'}.": [
            table.name for table in _configs(child)
        ]
        for name, child in module.named_modules()
        if _configs(child)
    }


def _allowed(
    config: ParallelConfig,
    sparse: SparseOptimizer,
    tables: Mapping[str, BaseEmbeddingConfig],
    world: World,
    fixed: Collection[str],
) -> dict[str, tuple[str, ...]]:
    """Layouts that each table may have, by table name."""
    unknown = sorted(set(config.tables) - set(tables))
    if unknown:
        raise ValueError(f"parallel.tables: no table {unknown[0]!r} in the model; it has {', '.join(tables)}")
    if sparse.kind == "adam" and world.device.type == "cpu":
        raise ValueError(
            "sparse.kind 'adam': fbgemm has no fused Adam for CPU; choose rowwise_adagrad, adagrad or sgd, "
            "or train on GPUs"
        )
    refused = _REFUSED.get(sparse.kind, {})
    lists = {name for name, table in tables.items() if isinstance(table, EmbeddingConfig)}
    allowed: dict[str, tuple[str, ...]] = {}
    for name in tables:
        wanted = config.tables[name].sharding if name in config.tables else config.sharding
        for kind in wanted:
            if kind in _REFUSED_LISTS and name in lists:
                raise ValueError(f"parallel: table {name!r} has a list that attention reads: {_REFUSED_LISTS[kind]}")
            if kind in refused and name not in fixed:
                raise ValueError(f"parallel: table {name!r}: {kind} does not go with {sparse.kind}: {refused[kind]}")
        # One rank holds whole tables, whatever was asked for; TorchRec knows that layout by one name.
        allowed[name] = tuple(wanted) if world.world_size > 1 else ("table_wise",)
    return allowed


def _table_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Table name and parameter."""
    for child in module.modules():
        if _configs(child):
            for name, parameter in child.named_parameters():
                yield name.split(".")[-2], parameter


def _plan(
    module: nn.Module,
    allowed: Mapping[str, tuple[str, ...]],
    tables: Mapping[str, BaseEmbeddingConfig],
    world: World,
    batch_size: int,
) -> ShardingPlan:
    kind = world.device.type
    memory = psutil.virtual_memory().total // world.local_world_size
    topology = Topology(
        world_size=world.world_size,
        compute_device=kind,
        local_world_size=world.local_world_size,
        hbm_cap=torch.cuda.get_device_properties(world.device).total_memory if kind == "cuda" else None,
        ddr_cap=memory,
    )
    constraints = {
        name: ParameterConstraints(
            sharding_types=list(kinds),
            compute_kernels=[_KERNELS.get(choice, EmbeddingComputeKernel.FUSED).value for choice in kinds],
            min_partition=max(4, tables[name].embedding_dim // world.world_size // 4 * 4),
        )
        for name, kinds in allowed.items()
    }
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(0.15),
        debug=False,
    )
    try:
        if dist.is_initialized():
            return planner.collective_plan(module, list(_SHARDERS), dist.group.WORLD)
        return planner.plan(module, list(_SHARDERS))
    except PlannerError as error:
        gib = sum(table.num_embeddings * table.embedding_dim * 4 for table in tables.values()) / 2**30
        raise ValueError(
            f"parallel: no layout fits: {gib:.2f} GiB of fp32 tables, without optimizer state, on {world.world_size} "
            f"ranks with {(topology.devices[0].storage.hbm or memory) / 2**30:.2f} GiB each; allow more kinds of "
            f"sharding, use more ranks, or make tables narrower ({' '.join(str(error).split())[:300]})"
        ) from None


def _optimizers(
    model: DistributedModelParallel,
    sparse: SparseOptimizer,
    dense: DenseOptimizer,
    tables: Mapping[str, str],
    fixed: Collection[str],
) -> tuple[KeyedOptimizer, list[KeyedOptimizer]]:
    """That of everything but tables, and those of tables."""
    rest = dict(in_backward_optimizer_filter(model.named_parameters()))
    replicated = {name: parameter for name, parameter in rest.items() if name in tables and tables[name] not in fixed}
    others = {name: parameter for name, parameter in rest.items() if name not in tables}
    of_tables = [model.fused_optimizer]
    if replicated:
        build = partial(sparse.torch_class(), **sparse.arguments())
        of_tables.append(KeyedOptimizerWrapper(replicated, build))
    return KeyedOptimizerWrapper(others, dense.build), of_tables


def _state_name(table: bool, key: str) -> str | None:
    """One name for one thing: fused kernels say TABLE.momentum1, an ordinary optimizer sum; None is not kept."""
    if not table:
        return key
    return {"sum": "momentum1", "step": None}.get(key, key.rsplit(".", 1)[-1])


def _flat_if_rowwise(name: str, state: Tensor) -> Tensor:
    """One number per row: `[rows]` in fused kernels, `[rows, 1]` in the ordinary optimizer."""
    ordinary = name == "momentum1" and not isinstance(state, ShardedTensor)
    return state.view(-1) if ordinary and state.dim() == 2 and state.size(1) == 1 else state


def _draw(weights: Tensor, first_row: int, first_column: int, table: BaseEmbeddingConfig, seed: int) -> None:
    low, high = table.weight_init_min, table.weight_init_max
    columns = torch.arange(first_column, first_column + weights.size(1), device=weights.device)
    for start in range(0, weights.size(0), _DRAWN_ROWS):
        part = weights[start : start + _DRAWN_ROWS]
        rows = torch.arange(first_row + start, first_row + start + part.size(0), device=weights.device)
        part.copy_(low + (high - low) * noise.uniform(seed ^ zlib.crc32(table.name.encode()), rows, columns))


def _fill(weights: Tensor, first_row: int, first_column: int, values: Values) -> None:
    for start in range(0, weights.size(0), _DRAWN_ROWS):
        part = weights[start : start + _DRAWN_ROWS]
        part.copy_(values(first_row + start, part.size(0))[:, first_column : first_column + part.size(1)])
