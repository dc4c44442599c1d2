"""Functions that tests launch in other processes."""

import gc
import json
import os
import random
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

import canonical
from msr_dist import noise
from msr_dist.checkpoint import CheckpointConfig, Checkpoints, TrainState
from msr_dist.data.loader import Loader, LoaderConfig
from msr_dist.data.order import Order
from msr_dist.data.parquet import ParquetSource
from msr_dist.distributed import World, open_world
from msr_dist.layout import Communication, ParallelConfig, TableSharding
from msr_dist.models.base import BackboneConfig
from msr_dist.models.mmoe import Config as Mmoe
from msr_dist.optim import DenseOptimizer, Schedule, SparseOptimizer
from msr_dist.parallel import shard
from msr_dist.ray_metrics import show
from msr_dist.recommender import EmbeddingsConfig, FeatureOverride, Recommender
from msr_dist.run import RunConfig
from msr_dist.schema import Knowledge
from msr_dist.stopping import Stopped
from msr_dist.train import train
from others.knowing import Config as Knowing


def report_world(folder: Path) -> None:
    """Leave in `folder` what each rank knows of its world."""
    with open_world() as world:
        ranks = [None] * world.world_size
        dist.all_gather_object(ranks, world.rank)
        known = {"rank": world.rank, "world_size": world.world_size, "ranks": ranks, "local": world.local_rank}
        settings = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
        settings["garbage"] = [gc.isenabled(), *gc.get_threshold(), gc.get_freeze_count() > 100_000]
        (folder / f"rank-{world.rank}.json").write_text(json.dumps(known | settings))


def open_worlds_one_after_another(folder: Path) -> None:
    """Rank 0 stays behind in each world while rank 1 opens the next."""
    kept = []
    for _ in range(6):
        with open_world() as world:
            # As long as one rank holds the store, it keeps what the ranks wrote into it.
            kept = [dist.distributed_c10d._get_default_store()]
        if world.rank == 0:
            time.sleep(0.2)
    del kept
    report_world(folder)


def refuse_on_rank_1(_folder: Path) -> None:
    with open_world() as world:
        if world.rank == 1:
            raise ValueError("row group 7, column 'user': 3 nulls; prepare the data again")
        dist.barrier()


def die_once(folder: Path) -> None:
    """Rank 1 kills itself the first time."""
    with open_world() as world:
        marker = folder / "died"
        if world.rank == 1 and not marker.exists():
            marker.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()
    report_world(folder)


def always_fail(_folder: Path) -> None:
    raise KeyError("a fault of ours")


@dataclass(frozen=True)
class Training:
    """Some steps of a small model, as `train_steps` does them."""

    data: Path
    folder: Path
    layouts: tuple[str, str, str]
    optimizer: str = "rowwise_adagrad"
    precision: str = "fp32"
    communication: Communication = "fp32"
    attention: bool = False
    per_scenario: bool = False
    decay: str = "constant"
    scale: float = 1.0
    first: int = 0
    last: int = 30
    save: bool = False


def train_steps(job: Training) -> None:
    """Leave the losses of steps `first` to `last - 1` in losses.json and one table's first row in weights.json."""
    with open_world() as world:
        pooling = {"history": FeatureOverride(pooling="attention")} if job.attention else {}
        embeddings = EmbeddingsConfig(precision=job.precision, features=pooling, per_scenario=job.per_scenario)
        schema = embeddings.apply(canonical.schema())
        source = ParquetSource(job.data / "train", schema)
        order = Order(tuple(group.rows for group in source.row_groups), 6, 120, seed=1, window_rows=600)
        torch.manual_seed(0)
        model = Recommender(
            schema, Mmoe(kind="mmoe", experts=2, widths=(8,), tower_widths=(4,)).build(schema), embeddings
        )
        names = ("users", "items_", "tags")
        parallel = ParallelConfig(
            tables={name: TableSharding(sharding=(kind,)) for name, kind in zip(names, job.layouts, strict=True)}
        )
        sparse = SparseOptimizer(kind=job.optimizer)
        reserved = model.reserved_rows(schema)
        sharded = shard(
            model,
            parallel,
            sparse,
            DenseOptimizer(),
            world,
            60,
            seed=1,
            reserved=reserved,
            communication=job.communication,
        )
        checkpoints = Checkpoints(job.folder / "checkpoints", CheckpointConfig(), world)
        if job.first:
            found = checkpoints.newest()
            assert found is not None
            assert found.state == TrainState(step=job.first)
            sharded.allocate_state()
            found.restore(sharded.tensors())
        batches = Loader(source, schema, order, world.rank, world.world_size, LoaderConfig()).batches(
            job.first, job.last
        )
        pipeline = TrainPipelineSparseDist(sharded.model, sharded.optimizer, world.device, execute_all_batches=True)
        schedule = Schedule(decay=job.decay)
        losses = []
        for step in range(job.first, job.last):
            sharded.scale_learning_rates(job.scale * schedule.factor(step, 30))
            losses.append(world.sum(pipeline.progress(batches).loss.double()).item() / world.world_size)
        if job.save:
            checkpoints.save(sharded.tensors(), TrainState(step=job.last))
        if world.rank == 0:
            (job.folder / "losses.json").write_text(json.dumps(losses))
            rows = {name: weights[0].float().tolist() for name, weights, _, _ in sharded.table_shards()}
            (job.folder / "weights.json").write_text(json.dumps(rows))


@dataclass(frozen=True)
class EveryModel:
    """A few steps of every model, as `train_every_model` does them."""

    data: Path
    folder: Path
    configs: tuple[BackboneConfig, ...]
    dense_rows: int | None = None


def train_every_model(job: EveryModel) -> None:
    """Leave the losses of each model's steps in losses-WORLD_SIZE.json."""
    embeddings = EmbeddingsConfig(features={"history": FeatureOverride(pooling="attention")})
    losses: list[list[float]] = []
    with open_world() as world:
        for config in job.configs:
            schema = embeddings.apply(canonical.schema(scenarios=5))
            if config.reads_knowledge:
                vectors = tuple((float(scenario), 1.0) for scenario in range(5))
                knowledge = Knowledge(folder=job.folder, width=8, scenarios=vectors)
                schema = schema.model_copy(update={"knowledge": knowledge})
            schema = config.adapt(schema)
            source = ParquetSource(job.data / "train", schema)
            order = Order(tuple(group.rows for group in source.row_groups), 6, 30, seed=1, window_rows=600)
            torch.manual_seed(0)
            model = Recommender(schema, config.build(schema), embeddings, dense_rows=job.dense_rows)
            layouts = ParallelConfig(sharding=("row_wise",))
            reserved = model.reserved_rows(schema)
            fixed = {"knowledge": said} if schema.knowledge and not schema.knowledge.trained else {}
            sharded = shard(
                model, layouts, SparseOptimizer(), DenseOptimizer(), world, 15, seed=1, reserved=reserved, fixed=fixed
            )
            batches = Loader(source, schema, order, world.rank, world.world_size, LoaderConfig()).batches(0, 8)
            pipeline = TrainPipelineSparseDist(sharded.model, sharded.optimizer, world.device, execute_all_batches=True)
            found = [world.sum(pipeline.progress(batches).loss.double()).item() for _ in range(8)]
            losses.append([loss / world.world_size for loss in found])
        if world.rank == 0:
            (job.folder / f"losses-{world.world_size}.json").write_text(json.dumps(losses))


@dataclass(frozen=True)
class Lookup:
    """Some steps of a model that looks up a table in a layout, which is fixed if not `trained`."""

    layout: str
    trained: bool = False
    first: int = 0
    last: int = 12
    save: bool = False


@dataclass(frozen=True)
class Lookups:
    """One run after the other, as `train_lookups` does them."""

    data: Path
    folder: Path
    runs: tuple[Lookup, ...]


def said(first: int, count: int) -> torch.Tensor:
    """Vectors of 8 numbers, a flag and 3 columns that only fill up, of users in turn; of every third one, nothing."""
    rows = torch.arange(first, first + count)
    values = torch.zeros(count, 12)
    values[:, :8] = noise.uniform(7, rows, torch.arange(8)) * 4 - 2
    values[:, 8] = 1
    values[rows % 3 == 0] = 0
    return values.half().float()


def train_lookups(job: Lookups) -> None:
    """Leave what each rank saw of each run in lookups-WORLD_SIZE-RANK.json."""
    with open_world() as world:
        reports = [_look_up(job, run, world) for run in job.runs]
        (job.folder / f"lookups-{world.world_size}-{world.rank}.json").write_text(json.dumps(reports))


def _look_up(job: Lookups, run: Lookup, world: World) -> dict[str, Any]:
    """The losses, the ranges of rows that the rank asked for, whether the table was as given at the end, and the names
    of the tensors that a checkpoint has of it."""
    knowledge = Knowledge(folder=job.folder, width=8, scenarios=((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)))
    config = Knowing(vectors="trained" if run.trained else "knowledge")
    schema = config.adapt(canonical.schema().model_copy(update={"knowledge": knowledge}))
    source = ParquetSource(job.data / "train", schema)
    order = Order(tuple(group.rows for group in source.row_groups), 6, 120, seed=1, window_rows=600)
    asked: list[tuple[int, int]] = []

    def values(first: int, count: int) -> torch.Tensor:
        asked.append((first, count))
        return said(first, count)

    torch.manual_seed(0)
    model = Recommender(schema, config.build(schema), EmbeddingsConfig())
    layouts = ParallelConfig(sharding=("table_wise",), tables={"knowledge": TableSharding(sharding=(run.layout,))})
    dense, schedule = DenseOptimizer(kind="adamw", lr=0.01, weight_decay=0.1), Schedule(warmup_steps=3, decay="linear")
    fixed = {} if run.trained else {"knowledge": values}
    reserved = model.reserved_rows(schema)
    sharded = shard(model, layouts, SparseOptimizer(), dense, world, 60, seed=1, reserved=reserved, fixed=fixed)
    checkpoints = Checkpoints(job.folder / "checkpoints", CheckpointConfig(), world)
    if run.first:
        found = checkpoints.newest()
        assert found is not None
        sharded.allocate_state()
        found.restore(sharded.tensors())
    batches = Loader(source, schema, order, world.rank, world.world_size, LoaderConfig()).batches(run.first, run.last)
    pipeline = TrainPipelineSparseDist(sharded.model, sharded.optimizer, world.device, execute_all_batches=True)
    losses = []
    for step in range(run.first, run.last):
        sharded.scale_learning_rates(schedule.factor(step, 12))
        losses.append(world.sum(pipeline.progress(batches).loss.double()).item() / world.world_size)
    if run.save:
        checkpoints.save(sharded.tensors(), TrainState(step=run.last))
    kept = [
        torch.equal(weights, said(row, len(weights))[:, column : column + weights.size(1)].half())
        for name, weights, row, column in sharded.table_shards()
        if name == "knowledge"
    ]
    tensors = sorted(name for name in sharded.tensors() if "knowledge.embedding_bags" in name)
    return {"losses": losses, "asked": asked, "kept": all(kept), "tensors": tensors}


@dataclass(frozen=True)
class Stops:
    """A run that is stopped `times` times, and gone on with, as `train_with_stops` does it."""

    run: RunConfig
    times: int


def train_with_stops(job: Stops) -> None:
    """Each time one rank gets a SIGTERM within the next 15 steps; rank 0 leaves what was said of it in stops.json."""
    draw, rank = random.Random(5), int(os.environ["RANK"])
    stops: list[str] = []
    for _ in range(job.times):
        steps, chosen = draw.randint(1, 15), draw.randrange(2)
        if rank == chosen:
            threading.Thread(
                target=_terminate_after, args=(job.run.folder / "metrics.jsonl", steps), daemon=True
            ).start()
        try:
            train(job.run)
        except Stopped as stopped:
            stops.append(str(stopped))
    if rank == 0:
        (job.run.folder / "stops.json").write_text(json.dumps(stops))
    train(job.run)


def _terminate_after(values: Path, steps: int) -> None:
    """A SIGTERM to this process when so many more lines stand in `values`."""

    def lines() -> int:
        return len(values.read_bytes().splitlines()) if values.exists() else 0

    wanted = lines() + steps
    while lines() < wanted:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGTERM)


def hold(folder: Path, epochs: int, _report: object) -> None:
    """For `train`'s `validated`: wait, after some epochs, until a file says that it shall go on."""
    (folder / f"reached-{epochs}").write_text("")
    while epochs in (4, 8) and not (folder / f"release-{epochs}").exists():
        time.sleep(0.05)


def show_and_hold(folder: Path, run: str, stage: str, rank: int, values: Mapping[str, float]) -> None:
    """For `train`'s `show`: set the gauges, and once there are all kinds of them, wait until a file says that they were
    seen."""
    show(run, stage, rank, values)
    while "valid/overall/auc" in values and not (folder / "seen").exists():
        time.sleep(0.1)
