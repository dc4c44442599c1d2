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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor  # type: ignore[attr-defined]
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from msr_dist import noise
from msr_dist.distributed import World
from msr_dist.layout import (
    Communication,
    ParallelConfig,
    is_cached,
    make_plan,
    module_tables,
    sharders,
    table_places,
)
from msr_dist.optim import DenseOptimizer, SparseOptimizer
from msr_dist.vocabulary import ShardedBags

Values = Callable[[int, int], Tensor]
"""First row and number of rows -> what they hold, `[rows, columns]`."""

_DRAWN_ROWS = 1 << 16


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

    def pipeline(self, device: torch.device) -> TrainPipelineSparseDist[Any, Any]:
        """Takes batches through the model and its optimizers, and the next ones to where they are needed meanwhile.

        Where tables are cached on a GPU, the rows of the next batch as well.
        """
        kind = PrefetchTrainPipelineSparseDist if is_cached(self.plan) else TrainPipelineSparseDist
        return kind(self.model, self.optimizer, device, execute_all_batches=True)

    def describe(self) -> str:
        """The plan as text."""
        return str(self.plan)


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
    communication: Communication = "fp32",
) -> Sharded:
    """Spread `module` over the world and build its optimizers.

    Tables are drawn from `seed` by row, so they start the same under any plan; the first rows of each, as many as
    `reserved` says by table name, stand for ids that training never sees and start at zero, which says nothing; those
    that ids without a row of their own share do as well.
    Tables in `fixed` hold the values that it gives by table name, and keep them: nothing trains them. A rank asks for
    rows of its own shards alone, a part at a time. The module must not let a gradient reach a fixed table.
    `batch_size` is that of one rank; the planner's estimate alone depends on it. Vectors and their gradients go between
    ranks in the precision of `communication`.

    Raises:
        ValueError: the allowed layouts do not fit the optimizer, the device or the memory.
    """
    fixed = fixed or {}
    # Before the sharder replaces the collections.
    tables = module_tables(module)
    names = {f"{place}{table}.weight": table for place, listed in table_places(module).items() for table in listed}
    plan = make_plan(module, config, sparse, world, batch_size, fixed)
    model = DistributedModelParallel(
        module,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=world.device,
        plan=plan,
        sharders=sharders(communication),
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
            weights[: max(0, reserved.get(name, 0) - first_row)].zero_()

    def start(name: str, rows: Tensor) -> Tensor:
        return _drawn(rows, torch.arange(tables[name].embedding_dim, device=rows.device), tables[name], seed)

    for child in model.modules():
        if isinstance(child, ShardedBags):
            child.begin(start)
    return sharded


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
    columns = torch.arange(first_column, first_column + weights.size(1), device=weights.device)
    for start in range(0, weights.size(0), _DRAWN_ROWS):
        part = weights[start : start + _DRAWN_ROWS]
        rows = torch.arange(first_row + start, first_row + start + part.size(0), device=weights.device)
        part.copy_(_drawn(rows, columns, table, seed))


def _drawn(rows: Tensor, columns: Tensor, table: BaseEmbeddingConfig, seed: int) -> Tensor:
    """What those rows and columns of a table start with."""
    low, high = table.weight_init_min, table.weight_init_max
    drawn: Tensor = low + (high - low) * noise.uniform(seed ^ zlib.crc32(table.name.encode()), rows, columns)
    return drawn


def _fill(weights: Tensor, first_row: int, first_column: int, values: Values) -> None:
    for start in range(0, weights.size(0), _DRAWN_ROWS):
        part = weights[start : start + _DRAWN_ROWS]
        part.copy_(values(first_row + start, part.size(0))[:, first_column : first_column + part.size(1)])
