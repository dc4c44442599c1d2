"""Data whose users and items are hashes that come and go, and what tests launch on them in other processes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

import canonical
from msr_dist.checkpoint import CheckpointConfig, Checkpoints, TrainState
from msr_dist.data.loader import Loader, LoaderConfig
from msr_dist.data.order import Order
from msr_dist.data.parquet import ParquetSource
from msr_dist.distributed import World, open_world
from msr_dist.models.mmoe import Config as Mmoe
from msr_dist.optim import DenseOptimizer, SparseOptimizer
from msr_dist.parallel import ParallelConfig, Sharded, shard
from msr_dist.recommender import EmbeddingsConfig, Recommender
from msr_dist.schema import OPEN_IDS, FeatureSchema
from msr_dist.vocabulary import usage

SPREAD = (0x9E3779B97F4A7C15 >> 1) | 1
"""Times an odd number as large as this, small numbers are spread evenly over all ids."""


def schema(rows: int = 192) -> FeatureSchema:
    found = canonical.schema()
    opened = [found.table(name).model_copy(update={"rows": rows, "vocabulary": "open"}) for name in ("users", "items")]
    return found.with_tables({table.name: table for table in opened})


def write(folder: Path, rows: int = 3000) -> Path:
    """Canonical data, but users and items are hashed, and change in the course of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    schema().save(folder)
    for seed, (split, count) in enumerate({"train": rows, "valid": rows // 4, "test": rows // 4}.items()):
        whole = canonical.table(count, seed)
        drift = np.arange(count) * 300 // count
        for place, name in enumerate(whole.column_names):
            if name in ("user", "item"):
                small = whole[name].to_numpy() + drift * (2 if name == "user" else 1)
                whole = whole.set_column(place, name, pa.array([hashed(each) for each in small.tolist()]))
            if name == "history":
                lists = [[hashed(each) for each in line] for line in whole[name].to_pylist()]
                whole = whole.set_column(place, name, pa.array(lists, pa.list_(pa.int64())))
        canonical.write_split(folder / split, whole, canonical.uneven(count, 30, seed))
    return folder


def hashed(number: int) -> int:
    return number * SPREAD % OPEN_IDS


@dataclass(frozen=True)
class Training:
    """Some steps of a small model on such data."""

    data: Path
    folder: Path
    embeddings: EmbeddingsConfig
    optimizer: str = "rowwise_adagrad"
    precision: str = "fp32"
    first: int = 0
    last: int = 30
    save: bool = False
    evaluate: bool = False


def train(jobs: tuple[Training, ...]) -> None:
    """Leave what was seen of each in seen-WORLD_SIZE.json."""
    with open_world() as world:
        seen = [_train(job, world) for job in jobs]
        if world.rank == 0:
            (jobs[0].folder / f"seen-{world.world_size}.json").write_text(json.dumps(seen))


def lend_marked_rows(job: Training) -> None:
    """After some steps, mark all of a table; in one more step, which leaves tables as they are, rows start anew.

    Leave in marked.json, by table: the rows, weights and optimizer states, those of the start and those after it.
    """
    with open_world() as world:
        sharded, loader = _build(job, world)
        weights = {name: shard for name, shard, _, _ in sharded.table_shards() if name in ("users", "items_")}
        started = {name: shard.tolist() for name, shard in weights.items()}
        pipeline, batches = sharded.pipeline(world.device), loader.batches(0, job.last + 1)
        for _ in range(job.last):
            pipeline.progress(batches)
        before = _state(sharded, world)
        for name in weights:
            weights[name].fill_(7.0)
            for state, tensor in sharded.tensors().items():
                if state.endswith(f"{name}.weight/momentum1"):
                    tensor.local_shards()[0].tensor.fill_(5.0)
        sharded.scale_learning_rates(1.0, tables=0.0)
        pipeline.progress(batches)
        after = _state(sharded, world)
        (job.folder / "marked.json").write_text(json.dumps({"started": started, "before": before, "after": after}))


def _build(job: Training, world: World) -> tuple[Sharded, Loader]:
    embeddings = job.embeddings.model_copy(update={"precision": job.precision})
    schema = embeddings.apply(FeatureSchema.read(job.data))
    source = ParquetSource(job.data / "train", schema)
    order = Order(tuple(group.rows for group in source.row_groups), 6, 120, seed=1, window_rows=600)
    torch.manual_seed(0)
    model = Recommender(schema, Mmoe(experts=2, widths=(8,), tower_widths=(4,)).build(schema), embeddings)
    sparse, reserved = SparseOptimizer(kind=job.optimizer), model.reserved_rows(schema)
    sharded = shard(model, ParallelConfig(), sparse, DenseOptimizer(), world, 60, seed=1, reserved=reserved)
    loader = Loader(source, schema, order, world.rank, world.world_size, LoaderConfig())
    return sharded, loader


def _train(job: Training, world: World) -> dict[str, Any]:
    sharded, loader = _build(job, world)
    checkpoints = Checkpoints(job.folder / "checkpoints", CheckpointConfig(), world)
    if job.first:
        found = checkpoints.newest()
        assert found is not None
        assert found.state.step == job.first
        sharded.allocate_state()
        found.restore(sharded.tensors())
    batches = loader.batches(job.first, job.last)
    pipeline = sharded.pipeline(world.device)
    losses = []
    for step in range(job.first, job.last):
        losses.append(world.sum(pipeline.progress(batches).loss.double()).item() / world.world_size)
        if job.evaluate and step % 7 == 0:
            pipeline.detach()
            before = _state(sharded, world)
            sharded.model.eval()
            with torch.no_grad():
                for batch in loader.batches(60, 64):
                    sharded.model(batch)
            sharded.model.train()
            assert _state(sharded, world) == before
    if job.save:
        checkpoints.save(sharded.tensors(), TrainState(step=job.last))
    return {"losses": losses, "usage": usage(sharded.model, world), "state": _state(sharded, world)}


def _state(sharded: Sharded, world: World) -> dict[str, list[Any]]:
    """Everything of the tables that an open vocabulary has, from all ranks, by name."""
    found = {}
    for name, tensor in sharded.tensors().items():
        if "hashed" in name:
            shards = [each.tensor for each in tensor.local_shards()] if hasattr(tensor, "local_shards") else [tensor]
            local = torch.cat(shards).double() if "ids" not in name else torch.cat(shards)
            whole = world.gather(local.contiguous()) if hasattr(tensor, "local_shards") else local
            found[name] = whole.tolist()
    return found
