"""Which rank this process is, and the process group that joins it to the others.

Every launcher (local processes, torchrun, Ray) says it in the same environment variables; a process group that one has
opened already is used as it is.
"""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import FileStore, HashStore, Store  # type: ignore[attr-defined]

from msr_dist.stopping import Stopped

MEETING = "MSR_DIST_MEETING"
"""Environment variable: the folder by whose files local processes find each other."""

_opened = itertools.count()

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""Process group per device type; gloo stays beside NCCL for what lives in main memory, such as metrics."""


@dataclass(frozen=True)
class World:
    """The place of this process among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @classmethod
    def imagined(cls, world_size: int) -> "World":
        """Rank 0 of a world on one host that does not exist, to plan for."""
        return cls(0, world_size, 0, world_size, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum of a CPU tensor over all ranks."""
        dist.all_reduce(values)
        return values

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, one rank's after the other's: CPU tensors `[N, ...]`, N of each rank's own."""
        counts = [torch.zeros((), dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(counts, torch.tensor(len(rows)))
        longest = int(max(counts))
        padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


class Vote:
    """Whether any rank wants something: all ranks know it at the same step, one step late, so that none has to wait."""

    def __init__(self) -> None:
        self._cast: tuple[torch.Tensor, dist.Work] | None = None

    def passed(self, wanted: bool, now: bool = False) -> bool:
        """Whether any rank wanted it when all were last asked, or wants it `now`; all ranks together."""
        if self._counted():
            return True
        votes = torch.tensor([int(wanted)])
        work = dist.all_reduce(votes, op=dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._cast = votes, work
        return now and self._counted()

    def _counted(self) -> bool:
        if self._cast is None:
            return False
        votes, work = self._cast
        work.wait()
        return bool(votes.item())


@contextmanager
def open_world() -> Iterator[World]:
    """Read the environment and, if no process group is open, open one for as long as the context lasts."""
    rank, world_size = _variable("RANK", 0), _variable("WORLD_SIZE", 1)
    local_rank = _variable("LOCAL_RANK", rank)
    if 0 < torch.cuda.device_count() <= local_rank:
        gpus = torch.cuda.device_count()
        raise ValueError(
            f"local rank {local_rank} has no GPU, this machine has {gpus}: start at most {gpus} workers on it"
        )
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    opened = not dist.is_initialized()
    if opened:
        store = _store(world_size)
        dist.init_process_group(BACKENDS[device.type], store=store, rank=rank, world_size=world_size)
    try:
        stopped = None
        try:
            yield World(rank, world_size, local_rank, _variable("LOCAL_WORLD_SIZE", world_size), device)
        except Stopped as error:
            stopped = error
        # A rank that takes its connections away while another still uses them aborts that one.
        dist.barrier()
        if stopped is not None:
            raise stopped
    finally:
        if opened:
            dist.destroy_process_group()


def _store(world_size: int) -> Store | None:
    """How ranks find each other; None leaves it to MASTER_ADDR and MASTER_PORT, as torchrun sets them."""
    if world_size == 1:
        return HashStore()
    meeting = os.environ.get(MEETING)
    # A file that served before may still hold addresses of a world that is closed.
    return FileStore(str(Path(meeting, str(next(_opened)))), world_size) if meeting else None


def is_first() -> bool:
    """Whether this process is rank 0, asked before any process group is open."""
    return _variable("RANK", 0) == 0


def _variable(name: str, default: int) -> int:
    return int(os.environ.get(name, default))
