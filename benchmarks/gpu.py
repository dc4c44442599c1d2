"""The training step on one GPU or several, batches in memory: what share of the hardware's limits it reaches.

python benchmarks/gpu.py --model mmoe-full precision=bf16
python benchmarks/gpu.py --model mmoe-full --workers 8 --batch-size 65536 precision=bf16

Bytes are those that the tables' lookups and updates must move; operations those of the dense part's products. Both are
held against what a plain copy and a plain matrix product reach in the same run. Without a GPU it runs on the CPU, and
says so.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

# Before torch is loaded: see msr_dist.launch.set_threads.
from msr_dist.launch import call_and_leave, launch, set_threads, silence

silence()
set_threads(1)

import torch  # noqa: E402
from throughput import (  # noqa: E402
    IN_MEMORY,
    MODELS,
    RESULTS,
    add,
    configured,
    fresh,
    planted_data,
    steps,
    trainer,
)
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from msr_dist.distributed import World, open_world  # noqa: E402
from msr_dist.run import RunConfig  # noqa: E402

ROUNDS = 5


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--data", type=click.Path(path_type=Path), help="A prepared folder; without it, planted data.")
@click.option("--model", type=click.Choice(list(MODELS)), default="mmoe-full", show_default=True)
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="One per GPU.")
@click.option("--batch-size", type=click.IntRange(1), default=8192, show_default=True, help="Of a GPU.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
def main(
    data: Path | None, model: str, workers: int, batch_size: int, results: Path, settings: tuple[str, ...]
) -> None:
    """Rows per second, and the shares of memory bandwidth and matrix peak that they are."""
    run = configured(data or planted_data(), MODELS[model], batch_size * workers, settings)
    folder = Path(tempfile.mkdtemp(prefix="gpu-"))
    try:
        launch(measure, (run, folder / "figures.json"), "local", workers, folder)
        add(results, {"measured": "gpu", "model": model, **json.loads((folder / "figures.json").read_text())})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(job: tuple[RunConfig, Path]) -> None:
    """Every process of a world calls it; rank 0 leaves the figures."""
    run, out = job
    with open_world() as world:
        schema = run.read_schema()
        _, pipeline, reader = trainer(run, schema, world)
        kept = [batch.to(world.device) for batch in reader.batches(0, min(IN_MEMORY, reader.order.steps))]
        steps(pipeline, map(fresh, kept))
        counter = FlopCounterMode(display=False)
        with counter:
            steps(pipeline, map(fresh, kept))
        seconds = best(world, lambda: steps(pipeline, map(fresh, kept)))
        # Read forward; backward the gradient is read, which is fp32, and the vector read and written.
        moved = sum(
            len(batch.ids[feature.name].values()) * table.width * (4 + 3 * (2 if table.precision == "fp16" else 4))
            for batch in kept
            for feature in schema.features
            for table in [schema.table(feature.table)]
        )
        operations = counter.get_total_flops()
        limits = limits_of(world, torch.bfloat16 if run.precision == "bf16" else torch.float32)
        if world.rank:
            return
        figures: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu: no GPU here",
            "workers": world.world_size,
            "precision": run.precision,
            "batch_size": run.loader.batch_size,
            "rows_per_second": round(sum(len(batch.scenario) for batch in kept) * world.world_size / seconds),
            "share_of_bandwidth": round(moved / seconds / limits["bytes_per_second"], 4),
            "share_of_matrix_peak": round(operations / seconds / limits["operations_per_second"], 4),
            "limits": {name: float(f"{limit:.3g}") for name, limit in limits.items()},
        }
        out.write_text(json.dumps(figures))


def limits_of(world: World, dtype: torch.dtype) -> dict[str, float]:
    """What a copy (bytes read and written) and a matrix product reach on this rank's device."""
    size, width = (1 << 28, 8192) if world.device.type == "cuda" else (1 << 25, 1024)
    source = torch.zeros(size, device=world.device)
    target = torch.empty_like(source)
    left = torch.ones(width, width, dtype=dtype, device=world.device)
    return {
        "bytes_per_second": 2 * 4 * size / best(world, lambda: target.copy_(source)),
        "operations_per_second": 2 * width**3 / best(world, lambda: torch.mm(left, left)),
    }


def best(world: World, work: Callable[[], object]) -> float:
    """The fewest seconds of some rounds."""
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)


if __name__ == "__main__":
    call_and_leave(main)
