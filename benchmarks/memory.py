"""Whether ranks need the memory that `msr-dist plan` says: tables and their optimizer state, and whole processes.

python benchmarks/memory.py
python benchmarks/memory.py --rows 200_000_000 --workers 1
python benchmarks/memory.py --rows 20_000_000 --precision fp32 --workers 2 stages.0.sparse.kind=adagrad

Ids are uniform over a user table of so many rows, an item table of a tenth, and nine small ones, so that every page of
the tables is touched. Prints one JSON line and a row of the Markdown table.
"""

import json
import resource
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Before torch is loaded: see msr_dist.launch.set_threads.
import click

from msr_dist.launch import call_and_leave, launch, set_threads, silence

silence()
set_threads(1)

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from torch.distributed._shard.sharded_tensor import ShardedTensor  # type: ignore[attr-defined]  # noqa: E402

from msr_dist.config import merge, parse  # noqa: E402
from msr_dist.data.loader import Loader  # noqa: E402
from msr_dist.data.order import Order  # noqa: E402
from msr_dist.data.parquet import ParquetSource  # noqa: E402
from msr_dist.distributed import open_world  # noqa: E402
from msr_dist.parallel import Sharded  # noqa: E402
from msr_dist.plan import Machines, Planner  # noqa: E402
from msr_dist.run import RunConfig  # noqa: E402
from msr_dist.schema import Feature, FeatureSchema, Label, Scenario, Table  # noqa: E402

SMALL, GROUPS, ROWS_PER_GROUP = 9, 24, 8192


@dataclass(frozen=True)
class Job:
    """A run of some steps, and where each rank leaves what it needed."""

    run: RunConfig
    steps: int
    folder: Path


def schema(rows: int, width: int, precision: str) -> FeatureSchema:
    """Eleven single-valued features, each with a table of its own."""
    sizes = {"user": rows, "item": max(2, rows // 10)} | {f"feature_{n}": 1000 for n in range(SMALL)}
    tables = [{"name": name, "rows": size, "width": width, "precision": precision} for name, size in sizes.items()]
    return FeatureSchema(
        user="user",
        item="item",
        labels=(Label(name="click"),),
        scenarios=tuple(Scenario(id=n, name=f"scenario {n}", rows=GROUPS * ROWS_PER_GROUP // 4) for n in range(4)),
        tables=tuple(parse(Table, table, "benchmark") for table in tables),
        features=tuple(Feature(name=name, table=name) for name in sizes),
    )


def write_rows(folder: Path, known: FeatureSchema) -> None:
    """Training rows with uniform ids."""
    random, count = np.random.default_rng(0), GROUPS * ROWS_PER_GROUP
    columns = {each.name: random.integers(1, known.table(each.table).rows, count) for each in known.features}
    columns["scenario"] = random.integers(0, 4, count).astype(np.int32)
    columns["click"] = random.integers(0, 2, count).astype(np.uint8)
    (folder / "train").mkdir(parents=True)
    known.save(folder)
    pq.write_table(pa.table(columns), folder / "train" / "part-00000.parquet", row_group_size=ROWS_PER_GROUP)


def train(job: Job) -> None:
    """Train some steps, and leave in rank-N.json what this rank holds in tables and in all."""
    run = job.run
    with open_world() as world:
        known = run.read_schema()
        sharded = run.build(known, 0, world)
        source = ParquetSource(run.data / "train", known)
        groups = tuple(group.rows for group in source.row_groups)
        loader = run.loader
        order = Order(groups, loader.partitions, loader.batch_size, run.seed, loader.window_rows)
        batches = Loader(source, known, order, world.rank, world.world_size, loader).batches(0, job.steps)
        pipeline = sharded.pipeline(world.device)
        for _ in range(job.steps):
            pipeline.progress(batches)
        found = {
            "tables": held(sharded),
            "process": psutil.Process().memory_info().rss,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        (job.folder / f"rank-{world.rank}.json").write_text(json.dumps(found))


def held(sharded: Sharded) -> int:
    """Bytes of this rank's tables and of their optimizer state."""
    total = 0
    for name, tensor in sharded.tensors().items():
        if any(parameter in name for parameter in sharded.tables):
            whole = tensor.local_shards() if isinstance(tensor, ShardedTensor) else None
            parts = [tensor] if whole is None else [part.tensor for part in whole]
            total += sum(part.numel() * part.element_size() for part in parts)
    return total


@click.command()
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--rows", default="20_000_000", show_default=True, type=int, help="Of the largest table.")
@click.option("--width", default=16, show_default=True)
@click.option("--precision", default="fp16", show_default=True, type=click.Choice(["fp16", "fp32"]))
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1))
@click.option("--steps", default=60, show_default=True, type=click.IntRange(1))
def main(settings: tuple[str, ...], rows: int, width: int, precision: str, workers: int, steps: int) -> None:
    """Compare what a plan foresees with what ranks need."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder / "data", schema(rows, width, precision))
        raw = {"name": "memory", "runs": str(folder), "data": str(folder / "data"), "model": {"kind": "mmoe"}}
        run = parse(RunConfig, merge(raw, settings), "benchmark")
        memory = psutil.virtual_memory().total // workers
        plan = Planner(run, run.read_schema(), list_length=1).plan(Machines("cpu", workers, memory))
        launch(train, Job(run, steps, folder), "local", workers, folder)
        found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(workers)]
    foreseen = [plan.rank_bytes(rank) for rank in range(workers)]
    tables = [each["tables"] + each["optimizer state of tables"] for each in foreseen]
    largest = max(range(workers), key=lambda rank: found[rank]["peak"])
    whole = sum(foreseen[largest].values())
    line = {
        "rows": rows,
        "width": width,
        "precision": precision,
        "workers": workers,
        "settings": settings,
        "tables_foreseen": tables,
        "tables": [each["tables"] for each in found],
        "process_foreseen": whole,
        "process": found[largest]["process"],
        "peak": found[largest]["peak"],
        "peak_to_foreseen": found[largest]["peak"] / whole,
    }
    click.echo(json.dumps(line))
    gib = [f"{size / 2**30:.3f}" for size in (tables[largest], found[largest]["tables"], whole, found[largest]["peak"])]
    click.echo("| rows | width | precision | ranks | tables foreseen, GiB | held | process foreseen | peak | ratio |")
    click.echo("|---|---|---|---|---|---|---|---|---|")
    click.echo(f"| {rows:,} | {width} | {precision} | {workers} | {' | '.join(gib)} | {line['peak_to_foreseen']:.3f} |")


if __name__ == "__main__":
    call_and_leave(main)
