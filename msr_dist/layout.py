"""Where the rows and columns of embedding tables go: what a configuration allows, and TorchRec's planner that chooses.

Nothing here allocates a table: modules are planned on the meta device, for machines that need not be there.
"""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward  # type: ignore[attr-defined]
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.perf_models import NoopPerfModel
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    PlannerError,
    PlannerErrorType,
    Shard,
    ShardingOption,
    Stats,
    Storage,
)
from torchrec.distributed.types import CacheParams, ModuleSharder, ShardingPlan
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection

from msr_dist.config import Config, load
from msr_dist.distributed import World
from msr_dist.machine import main_memory
from msr_dist.optim import SparseOptimizer
from msr_dist.vocabulary import WAYS, BagsSharder, vocabulary_tables

ShardingKind = Literal["table_wise", "row_wise", "table_row_wise", "column_wise", "data_parallel"]

GPU_MARGIN = 0.15
"""Share of a GPU's memory that stays free: CUDA's context, NCCL's buffers, and gaps between what is allocated."""

_GLOO = 1e6
"""Bytes per millisecond between processes without GPUs, about: TorchRec would take NVLink for granted, and then sums of
row-wise tables, which are more bytes, look as cheap as whole vectors."""

_FUSED = EmbeddingComputeKernel.FUSED.value
_CACHED = EmbeddingComputeKernel.FUSED_UVM_CACHING.value
_DENSE = EmbeddingComputeKernel.DENSE.value
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
_MOST_COMBINATIONS = 64
_STATE_BYTES = 4  # fused kernels keep optimizer state in fp32, whatever the table's precision


class TableSharding(Config):
    """How one table is laid out."""

    sharding: tuple[ShardingKind, ...] | None = Field(default=None, min_length=1)
    """Layouts that the planner may choose from; by default those of all tables."""
    ranks: tuple[int, ...] | None = Field(default=None, min_length=1)
    """The rank of every shard, in the order of rows or columns; needs one layout. row_wise and data_parallel are on all
    ranks, table_wise on one, table_row_wise on those of one machine, column_wise on as many as columns are cut into."""
    cache: float | None = Field(default=None, gt=0, lt=1)
    """GPU: the table stands in main memory, and this share of its rows, those needed last, in the GPU's as well."""

    @model_validator(mode="after")
    def _one_layout(self) -> Self:
        if self.ranks is not None and len(self.sharding or ()) != 1:
            raise ValueError("ranks need one layout: give sharding as well, such as sharding=['table_wise']")
        return self


class ParallelConfig(Config):
    """Where tables live. The planner takes the layout that it estimates to be fastest among those allowed."""

    sharding: tuple[ShardingKind, ...] = Field(default=("table_wise", "row_wise"), min_length=1)
    """Layouts that the planner may choose from, for every table that is not named below."""
    cache: float | None = Field(default=None, gt=0, lt=1)
    """GPU: tables for which GPU memory does not suffice may stand in main memory, with this share of their rows in the
    GPU's as well. Without it, they have to fit."""
    tables: dict[str, TableSharding] = {}
    """Exceptions, by table name."""
    plan: Path | None = None
    """A file that `msr-dist plan --out` has written, edited since or not: tables are laid out exactly as it says."""

    @model_validator(mode="after")
    def _plan_or_choice(self) -> Self:
        chosen = sorted(self.model_fields_set - {"plan"}) if self.plan else []
        # A dumped configuration has the defaults in it.
        chosen = [name for name in chosen if getattr(self, name) != type(self).model_fields[name].default]
        if chosen:
            raise ValueError(f"plan says where tables go: leave out {', '.join(chosen)}, or edit {self.plan}")
        return self


class PlannedTable(TableSharding):
    """A table of a plan."""

    bytes: tuple[int, ...] = ()
    """What each shard takes with its optimizer state, for people; nothing else reads it."""


class PlanFile(Config):
    """A plan that stands in a file: `ranks` of every table, as `TableSharding` has them."""

    format: Literal[1] = 1
    world_size: int = Field(ge=1)
    tables: dict[str, PlannedTable]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        missing = [name for name, table in self.tables.items() if table.ranks is None]
        if missing:
            raise ValueError(f"tables.{missing[0]}: a plan says the ranks of every table: give sharding and ranks")
        return self


def read_plan(file: Path, world_size: int) -> ParallelConfig:
    """The plan in `file`; ValueError where it is none for a world of that size."""
    found = load(PlanFile, file)
    if found.world_size != world_size:
        raise ValueError(
            f"{file}: a plan for {found.world_size} ranks, and this run has {world_size}: make another with "
            "`msr-dist plan`, or choose that number of workers"
        )
    return ParallelConfig(tables=dict(found.tables))


@dataclass(frozen=True)
class Capacity:
    """Bytes that tables may take on one rank."""

    main: int
    gpu: int = 0

    @classmethod
    def here(cls, world: World) -> "Capacity":
        """What machines like this one have: all main memory on CPU, all but a margin of the GPU's."""
        main = main_memory() // world.local_world_size
        if world.device.type == "cpu":
            return cls(main)
        return cls(main, int((1 - GPU_MARGIN) * torch.cuda.get_device_properties(world.device).total_memory))


@dataclass(frozen=True)
class ShardEstimate:
    """What one shard of a table takes on its rank, in bytes."""

    rank: int
    weights: int
    state: int
    """Of the optimizer; of replicated tables also gradients of all rows, of open vocabularies what is known of ids."""
    buffers: int
    """Ids and vectors of a batch on their way between ranks; of a cached table also the cache."""


@dataclass(frozen=True)
class TableEstimate:
    """Where a table goes."""

    name: str
    sharding: ShardingKind
    cache: float | None
    """Weights and state stand in main memory, `buffers` in the GPU's."""
    shards: tuple[ShardEstimate, ...]


@dataclass(frozen=True)
class Estimate:
    """A plan and what TorchRec's planner, with its errors corrected, expects of it."""

    tables: tuple[TableEstimate, ...]
    milliseconds: float
    """Per step, for lookups and their communication on the slowest rank: TorchRec's model of bandwidths."""


class DoesNotFitError(ValueError):
    """No layout that is allowed fits into the memory."""


class _BagSharder(EmbeddingBagCollectionSharder):
    """The stock sharder offers no row-wise layouts on CPU, though they run there."""

    def sharding_types(self, compute_device_type: str) -> list[str]:  # noqa: ARG002 - the base class has it
        return ["data_parallel", "table_wise", "column_wise", "row_wise", "table_row_wise"]


Communication = Literal["fp32", "bf16", "fp16"]

_CODECS = {
    "bf16": QCommsConfig(CommType.BF16, CommType.BF16),
    # Gradients of single rows are too small for fp16.
    "fp16": QCommsConfig(CommType.FP16, CommType.BF16),
}


def sharders(communication: Communication = "fp32") -> list[ModuleSharder[nn.Module]]:
    """What lays out tables of every kind, whose vectors and gradients go between ranks as `communication` says."""
    codecs = get_qcomm_codecs_registry(_CODECS[communication]) if communication in _CODECS else None
    bags = _BagSharder(qcomm_codecs_registry=codecs)
    return [bags, EmbeddingCollectionSharder(qcomm_codecs_registry=codecs), BagsSharder(bags)]


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

    Raises:
        ValueError: the allowed layouts do not fit the optimizer, the device or the memory.
    """
    capacity = Capacity.here(world)
    planner = _planner(module, config, sparse, world, batch_size, fixed, capacity, {}, [])
    try:
        if dist.is_initialized():
            return planner.collective_plan(module, sharders(), dist.group.WORLD)
        return planner.plan(module, sharders())
    except PlannerError as error:
        raise _does_not_fit(module, world, capacity, error) from None


def estimate(
    module: nn.Module,
    config: ParallelConfig,
    sparse: SparseOptimizer,
    world: World,
    batch_size: int,
    fixed: Collection[str],
    capacity: Capacity,
    lengths: Mapping[str, float],
) -> Estimate:
    """What `make_plan` would choose on machines of that capacity, and what it takes there.

    `lengths` are mean numbers of ids per row, by feature; 1 where it says nothing.

    Raises:
        DoesNotFitError: no layout that is allowed fits.
        ValueError: the allowed layouts do not fit the optimizer or the device.
    """
    kept = _Kept()
    planner = _planner(module, config, sparse, world, batch_size, fixed, capacity, lengths, [kept])
    try:
        planner.plan(module, sharders())
    except PlannerError as error:
        raise _does_not_fit(module, world, capacity, error) from None
    options = sorted(kept.options, key=lambda option: option.name)
    sizes = _Sizes(sparse, fixed, _vocabulary_bytes(module))
    tables = tuple(_table_estimate(option, sizes, world) for option in options)
    return Estimate(tables, NoopPerfModel(kept.topology).rate(options))


def is_cached(plan: ShardingPlan) -> bool:
    """Whether a table stands in main memory, cached in a GPU's."""
    return any(table.compute_kernel == _CACHED for tables in plan.plan.values() for table in tables.values())


def module_tables(module: nn.Module) -> dict[str, BaseEmbeddingConfig]:
    """The tables of all collections in `module`, by name."""
    return {table.name: table for child in module.modules() for table in _configs(child)}


def table_places(module: nn.Module) -> dict[str, list[str]]:
    """Where the parameters of tables stand: prefix of their names -> the tables there."""
    return {
        f"{name}.{'embedding_bags' if isinstance(child, EmbeddingBagCollection) else 'embeddings'}.": [
            table.name for table in _configs(child)
        ]
        for name, child in module.named_modules()
        if _configs(child)
    }


def _planner(
    module: nn.Module,
    config: ParallelConfig,
    sparse: SparseOptimizer,
    world: World,
    batch_size: int,
    fixed: Collection[str],
    capacity: Capacity,
    lengths: Mapping[str, float],
    stats: "list[Stats]",
) -> EmbeddingShardingPlanner:
    tables = module_tables(module)
    layouts = _layouts(config, sparse, tables, world, fixed) | _open_layouts(module, config, world)
    trained = [parameter for name, parameter in _table_parameters(module) if name not in fixed]
    kept = [parameter for name, parameter in _table_parameters(module) if name in fixed]
    _apply_optimizer_in_backward(sparse.torch_class(), trained, sparse.arguments())
    # A fused kernel cannot be without an optimizer on CPU; this one has no state, and at this rate moves nothing.
    _apply_optimizer_in_backward(torch.optim.SGD, kept, {"lr": 0.0})
    topology = Topology(
        world_size=world.world_size,
        compute_device=world.device.type,
        local_world_size=world.local_world_size,
        hbm_cap=capacity.gpu,
        ddr_cap=capacity.main,
        **(dict.fromkeys(("intra_host_bw", "inter_host_bw"), _GLOO) if world.device.type == "cpu" else {}),
    )
    sizes = _Sizes(sparse, fixed, _vocabulary_bytes(module))
    constraints = {name: _constraints(layout, tables[name], config, world, lengths) for name, layout in layouts.items()}
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        constraints=constraints,
        enumerator=EmbeddingEnumerator(
            topology,
            batch_size,
            constraints,
            [EmbeddingPerfEstimator(topology, constraints), _StorageEstimator(topology, constraints, sizes)],
        ),
        # The capacity is what tables may take.
        storage_reservation=FixedPercentageStorageReservation(0.0),
        # All combinations where they are few: a greedy search tries about as many as there are tables.
        proposer=[
            GridSearchProposer(_MOST_COMBINATIONS),
            GreedyProposer(),
            GreedyProposer(use_depth=False),
            UniformProposer(),
        ],
        partitioner=_Partitioner({name: layout.ranks for name, layout in layouts.items() if layout.ranks}),
        callbacks=[_only_where_cached],
        stats=stats,
        debug=False,
    )


def _layouts(
    config: ParallelConfig,
    sparse: SparseOptimizer,
    tables: Mapping[str, BaseEmbeddingConfig],
    world: World,
    fixed: Collection[str],
) -> dict[str, TableSharding]:
    """What each table may be like, by table name, with nothing left open but what the planner is to choose."""
    unknown = sorted(set(config.tables) - set(tables))
    if unknown:
        raise ValueError(f"parallel.tables: no table {unknown[0]!r} in the model; it has {', '.join(tables)}")
    on_cpu = world.device.type == "cpu"
    if sparse.kind == "adam" and on_cpu:
        raise ValueError(
            "sparse.kind 'adam': fbgemm has no fused Adam for CPU; choose rowwise_adagrad, adagrad or sgd, "
            "or train on GPUs"
        )
    if on_cpu and config.cache is not None:
        raise ValueError("parallel.cache: tables stand in main memory on CPU, where nothing is cached; leave it out")
    refused = _REFUSED.get(sparse.kind, {})
    layouts: dict[str, TableSharding] = {}
    for name, table in tables.items():
        given = config.tables.get(name, TableSharding())
        wanted = given.sharding or config.sharding
        for kind in wanted:
            if kind in _REFUSED_LISTS and isinstance(table, EmbeddingConfig):
                raise ValueError(f"parallel: table {name!r} has a list that attention reads: {_REFUSED_LISTS[kind]}")
            if kind in refused and name not in fixed:
                raise ValueError(f"parallel: table {name!r}: {kind} does not go with {sparse.kind}: {refused[kind]}")
        if given.cache is not None and on_cpu:
            raise ValueError(
                f"parallel.tables.{name}.cache: tables stand in main memory on CPU, where nothing is cached; "
                "leave it out"
            )
        if given.cache is not None and "data_parallel" in wanted:
            raise ValueError(f"parallel.tables.{name}: a data_parallel table stands in GPU memory; leave out cache")
        if given.ranks is not None:
            _check_ranks(name, wanted[0], given.ranks, table, world)
        # One rank holds whole tables, whatever was asked for; TorchRec knows that layout by one name.
        kinds: tuple[ShardingKind, ...] = wanted if world.world_size > 1 else ("table_wise",)
        layouts[name] = given.model_copy(update={"sharding": kinds})
    return layouts


def _open_layouts(module: nn.Module, config: ParallelConfig, world: World) -> dict[str, TableSharding]:
    """The layout of tables without a list of their ids: TorchRec brings ids to their ranks row-wise, or not at all."""
    layouts = {}
    for name, rows in vocabulary_tables(module).items():
        given = config.tables.get(name, TableSharding())
        if given.sharding not in (None, ("row_wise",)) or given.cache is not None or config.cache is not None:
            raise ValueError(
                f"parallel: table {name!r} has no list of its ids: it is row_wise and never cached; "
                "leave out what says otherwise"
            )
        if rows % (WAYS * world.world_size):
            raise ValueError(
                f"embeddings: table {name!r} has {rows} rows, no multiple of {WAYS} for each of {world.world_size} "
                "ranks; round its rows, or choose another number of workers"
            )
        layouts[name] = TableSharding(sharding=("row_wise",))
    return layouts


def _check_ranks(name: str, kind: ShardingKind, ranks: Sequence[int], table: BaseEmbeddingConfig, world: World) -> None:
    """Raise ValueError where a table cannot be laid out on these ranks."""
    everywhere, size = range(world.world_size), world.local_world_size
    given = f"parallel: table {name!r}: {kind} on ranks {', '.join(map(str, ranks))}"
    outside = [rank for rank in ranks if rank not in everywhere]
    if outside:
        raise ValueError(f"{given}: there is no rank {outside[0]}, the world has {world.world_size}")
    if kind == "table_wise" and len(ranks) != 1:
        raise ValueError(f"{given}: a table_wise table is on one rank")
    if kind in ("row_wise", "data_parallel") and list(ranks) != list(everywhere):
        raise ValueError(f"{given}: it has to be on all {world.world_size} ranks, in their order")
    if kind == "table_row_wise" and (list(ranks) != list(range(ranks[0], ranks[0] + size)) or ranks[0] % size):
        raise ValueError(f"{given}: it has to be on the {size} ranks of one machine, in their order")
    if kind == "column_wise" and table.embedding_dim % (4 * len(ranks)):
        raise ValueError(
            f"{given}: {table.embedding_dim} columns cannot be cut into {len(ranks)} equal parts, multiples of 4"
        )


def _constraints(
    layout: TableSharding,
    table: BaseEmbeddingConfig,
    config: ParallelConfig,
    world: World,
    lengths: Mapping[str, float],
) -> ParameterConstraints:
    assert layout.sharding is not None
    kernels = [_CACHED] if layout.cache else [_FUSED, _CACHED] if config.cache else [_FUSED]
    share = layout.cache or config.cache
    on_gpu = world.device.type == "cuda"
    return ParameterConstraints(
        sharding_types=list(layout.sharding),
        compute_kernels=[*kernels, _DENSE] if "data_parallel" in layout.sharding else kernels,
        # The kernels want multiples of 4; TorchRec takes the least that divides the columns evenly.
        min_partition=max(4, table.embedding_dim // len(layout.ranks or range(world.world_size)) // 4 * 4),
        pooling_factors=[lengths.get(feature, 1.0) for feature in table.feature_names],
        cache_params=CacheParams(load_factor=share) if share else None,
        # The CPU's kernels round to the nearest, whatever they are asked for.
        stochastic_rounding=True if on_gpu and table.data_type is DataType.FP16 else None,
    )


@dataclass(frozen=True)
class _Sizes:
    """What shards of tables take, in bytes."""

    sparse: SparseOptimizer
    fixed: Collection[str]
    vocabularies: Mapping[str, int]
    """Per row, what is known of the ids of an open vocabulary, by table."""

    def weights(self, option: ShardingOption, shard: Shard) -> int:
        """Of the vectors."""
        return int(shard.size[0] * shard.size[1] * option.tensor.element_size())

    def state(self, option: ShardingOption, shard: Shard) -> int:
        """Of what training keeps beside them."""
        numbers, vocabulary = self._numbers(option, shard), self.vocabularies.get(option.name, 0) * shard.size[0]
        if option.sharding_type != "data_parallel":
            return int(numbers * _STATE_BYTES + vocabulary)
        gradients = 0 if option.name in self.fixed else self.weights(option, shard)
        return int(numbers * option.tensor.element_size() + gradients)

    def forgotten(self, option: ShardingOption, shard: Shard) -> int:
        """Of `state`, what TorchRec does not count: it takes numbers to have the table's precision, and no more."""
        return self.state(option, shard) - self._numbers(option, shard) * int(option.tensor.element_size())

    def _numbers(self, option: ShardingOption, shard: Shard) -> int:
        """That the optimizer keeps."""
        rows, columns = shard.size
        per_row = {"rowwise_adagrad": 1, "adagrad": columns, "adam": 2 * columns, "sgd": 0}
        return 0 if option.name in self.fixed else int(rows * per_row[self.sparse.kind])


class _StorageEstimator(EmbeddingStorageEstimator):
    """TorchRec's, with what it gets wrong set right.

    It takes optimizer state to have the table's precision, where fused kernels keep fp32; it forgets the gradients of
    replicated tables, which are of all rows, and what vocabularies know; and it takes vectors on their way between
    ranks to have the table's precision, where they are fp32.
    """

    def __init__(self, topology: Topology, constraints: dict[str, ParameterConstraints], sizes: _Sizes) -> None:
        super().__init__(topology, constraints)
        self._sizes, self._on_gpu = sizes, topology.compute_device == "cuda"

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: Any) -> None:
        """Give every shard its storage."""
        for option in sharding_options:
            option.output_dtype = DataType.FP32
        super().estimate(sharding_options, sharder_data_map)
        for option in sharding_options:
            option.output_dtype = None
            in_gpu = self._on_gpu and option.compute_kernel != _CACHED
            for shard in option.shards:
                missing = self._sizes.forgotten(option, shard)
                shard.storage += Storage(hbm=missing if in_gpu else 0, ddr=0 if in_gpu else missing)


def _vocabulary_bytes(module: nn.Module) -> dict[str, int]:
    """Bytes per row that open vocabularies need beside vectors, by table."""
    return {
        name: sum(buffer.nbytes for buffer in rows.buffers() if buffer.dim() and len(buffer) == rows.output_size())
        // rows.output_size()
        for child in module.modules()
        if isinstance(child, ManagedCollisionEmbeddingBagCollection)
        for name, rows in child._managed_collision_collection._managed_collision_modules.items()
    }


def _table_estimate(option: ShardingOption, sizes: _Sizes, world: World) -> TableEstimate:
    cached, shards = option.compute_kernel == _CACHED, []
    for shard in option.shards:
        weights, state = sizes.weights(option, shard), sizes.state(option, shard)
        stored = shard.storage.hbm if world.device.type == "cuda" else shard.storage.ddr
        shards.append(ShardEstimate(shard.rank, weights, state, stored if cached else stored - weights - state))
    return TableEstimate(option.name, option.sharding_type, option.cache_load_factor, tuple(shards))


class _Kept(Stats):
    """Keeps the plan that the planner has chosen."""

    options: list[ShardingOption]
    topology: Topology

    def log(self, **told: Any) -> None:
        """What the planner says at its end."""
        self.options, self.topology = told["best_plan"], told["topology"]


class _Partitioner(GreedyPerfPartitioner):
    """TorchRec's, but some tables have been given their ranks."""

    def __init__(self, ranks: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self._ranks = ranks

    def partition(self, proposal: list[ShardingOption], storage_constraint: Topology) -> list[ShardingOption]:
        """Give every shard its rank; PlannerError where that does not fit."""
        left = copy.deepcopy(storage_constraint)
        given = [option for option in proposal if option.name in self._ranks]
        for option in given:
            for shard, rank in zip(option.shards, self._ranks[option.name], strict=True):
                device = left.devices[rank]
                if not shard.storage.fits_in(device.storage):
                    raise PlannerError(f"table {option.name!r} does not fit on rank {rank}", PlannerErrorType.PARTITION)
                shard.rank = rank
                device.storage -= shard.storage
                device.perf += shard.perf
        others = [option for option in proposal if option.name not in self._ranks]
        return [*given, *super().partition(others, left)] if others else given


def _only_where_cached(options: list[ShardingOption]) -> list[ShardingOption]:
    """The planner gives a cache to every table that may have one, and the kernels read ahead only where told to."""
    for option in options:
        share = option.cache_load_factor
        cached = option.compute_kernel == _CACHED
        option.cache_params = CacheParams(load_factor=share, prefetch_pipeline=True) if cached else None
    return options


def _does_not_fit(module: nn.Module, world: World, capacity: Capacity, error: PlannerError) -> DoesNotFitError:
    tables = module_tables(module).values()
    size = sum(t.num_embeddings * t.embedding_dim * (2 if t.data_type == DataType.FP16 else 4) for t in tables)
    return DoesNotFitError(
        f"parallel: no layout fits: {size / 2**30:.2f} GiB of tables, without optimizer state, on {world.world_size} "
        f"ranks with {(capacity.gpu or capacity.main) / 2**30:.2f} GiB each; allow more kinds of "
        f"sharding, use more ranks, or make tables narrower ({' '.join(str(error).split())[:300]})"
    )


def _configs(child: nn.Module) -> list[BaseEmbeddingConfig]:
    """The tables of a collection; none where `child` is something else."""
    if isinstance(child, EmbeddingBagCollection):
        return list(child.embedding_bag_configs())
    return list(child.embedding_configs()) if isinstance(child, EmbeddingCollection) else []


def _table_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Table name and parameter."""
    for child in module.modules():
        if _configs(child):
            for name, parameter in child.named_parameters():
                yield name.split(".")[-2], parameter
