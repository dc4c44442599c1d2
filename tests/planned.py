"""What tests of plans launch in other processes."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch.distributed._shard.sharded_tensor import ShardedTensor

from msr_dist.distributed import open_world
from msr_dist.run import RunConfig


@dataclass(frozen=True)
class Building:
    """A run whose model `build_model` spreads."""

    run: RunConfig
    folder: Path


def build_model(job: Building) -> None:
    """Leave in rank-N.json the bytes that a rank holds of each table, and of its optimizer state."""
    with open_world() as world:
        sharded = job.run.build(job.run.read_schema(), 0, world)
        sharded.allocate_state()
        held = {"weights": {}, "state": {}}
        for name, tensor in sharded.tensors().items():
            table = next((table for parameter, table in sharded.tables.items() if parameter in name), None)
            if table is not None:
                parts = (
                    [part.tensor for part in tensor.local_shards()] if isinstance(tensor, ShardedTensor) else [tensor]
                )
                kind = held["weights" if name.startswith("model/") else "state"]
                kind[table] = kind.get(table, 0) + sum(part.numel() * part.element_size() for part in parts)
        (job.folder / f"rank-{world.rank}.json").write_text(json.dumps(held))
