"""Checkpoints that are complete or do not exist, and that any world size and any sharding plan can continue.

A checkpoint is a folder `stage-S-step-N` of torch's distributed checkpoint files (tensors by logical name and shape)
and a `state.json` with the position and the sizes of the other files. It is written under another name, then renamed.
"""

import copy
import json
import logging
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.remote_device import _remote_device
from torch.distributed.tensor import DTensor

from msr_dist.config import Config
from msr_dist.distributed import World
from msr_dist.files import PARTIAL, sync, whole
from msr_dist.machine import free_memory

log = logging.getLogger(__name__)

STATE_FILE = "state.json"
_NAME = re.compile(r"stage-(\d+)-step-(\d+)")


class CheckpointConfig(Config):
    """When to save, and how much to keep."""

    every_steps: int | None = Field(default=None, ge=1)
    """Save every so many steps; the end of an epoch and of a stage is saved anyway."""
    keep: int = Field(default=2, ge=1)
    """How many checkpoints stay; the oldest go first."""
    background: bool | None = None
    """Write while training goes on, from a copy in main memory, which stops it for a moment only; without room
    for that, training waits. By default on GPUs; on CPU the copy would take as much again as the tables."""

    def due(self, step: int) -> bool:
        """Whether the end of `step` is to be saved."""
        return self.every_steps is not None and step % self.every_steps == 0

    def in_background(self, device: str) -> bool:
        """Whether it is written while training goes on, on a device of that type."""
        return device == "cuda" if self.background is None else self.background


class TrainState(Config):
    """The position of a run."""

    stage: int = 0
    """Index of the stage."""
    step: int = 0
    """Steps done in this stage."""
    samples: int = 0
    """Rows read so far in all stages, all ranks together."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    state: TrainState

    @classmethod
    def read(cls, folder: Path) -> "Checkpoint":
        """Check that `folder` is complete; ValueError with what is missing where it is not."""
        try:
            record = json.loads((folder / STATE_FILE).read_text())
            state = TrainState(**record["state"])
            sizes: dict[str, int] = record["files"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"checkpoint {folder} is half-written: no readable {STATE_FILE}; {_REMEDY}") from None
        for name, size in sizes.items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size:
                has = "is absent" if found is None else f"has {found} bytes"
                raise ValueError(f"checkpoint {folder} is damaged: {name} {has}, {size} were written; {_REMEDY}")
        return cls(folder, state)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load into `tensors`, in place and whatever their sharding; all ranks together.

        Raises:
            ValueError: the checkpoint holds other tensors or other shapes.
        """
        try:
            stored = FileSystemReader(self.folder).read_metadata().state_dict_metadata
        except Exception as error:  # noqa: BLE001 - whatever damaged bytes lead the reader to
            raise ValueError(f"checkpoint {self.folder} is damaged: {_one_line(error)}; {_REMEDY}") from None
        self._compare(tensors, stored)
        try:
            load(dict(tensors), checkpoint_id=self.folder)
        except (Exception, CheckpointException) as error:  # noqa: BLE001 - and torch's own, which is no Exception
            raise ValueError(f"checkpoint {self.folder} is damaged: {_one_line(error)}; {_REMEDY}") from None

    def _compare(self, tensors: Mapping[str, Tensor], stored: Mapping[str, object]) -> None:
        remedy = "continue it with the configuration that wrote it, or choose another name for this run"
        for name, tensor in tensors.items():
            there = stored.get(name)
            if not isinstance(there, TensorStorageMetadata):
                raise ValueError(f"checkpoint {self.folder} is of another model: it has no {name!r}; {remedy}")
            if there.size != tensor.size():
                raise ValueError(
                    f"checkpoint {self.folder} is of another model: {name!r} has shape {tuple(there.size)} "
                    f"there, {tuple(tensor.size())} here; {remedy}"
                )
        # Optimizer state may be absent here: a rank knows that of its own shards alone.
        surplus = sorted(name for name in stored if name.startswith("model/") and name not in tensors)
        if surplus:
            raise ValueError(f"checkpoint {self.folder} is of another model: this one has no {surplus[0]!r}; {remedy}")


_REMEDY = "remove that folder to go on from the one before it"


class Checkpoints:
    """The checkpoints of one run. As a context: what is being written when it ends is written to its end."""

    def __init__(self, folder: Path, config: CheckpointConfig, world: World) -> None:
        self._folder, self._keep, self._world = folder, config.keep, world
        self._background = config.in_background(world.device.type)
        self._group: dist.ProcessGroup | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._copies: dict[str, Tensor] = {}
        self._stage = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Its group must not be taken away from under it; what it raises now is not the first fault.
        self._thread.shutdown()

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, the same on every rank; None where there is none at all.

        Raises:
            ValueError: there are checkpoints, and none of them is complete.
        """
        answer: list[Checkpoint | str | None] = [None]
        if self._world.rank == 0:
            try:
                answer = [newest(self._folder)]
            except ValueError as error:
                answer = [str(error)]
        dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], str):
            raise ValueError(answer[0])
        return answer[0]

    def save(self, tensors: Mapping[str, Tensor], state: TrainState) -> Path:
        """Write a checkpoint; all ranks together. `tensors` may change from now on.

        It exists once `finish` returns, or not at all; in the background or not, the one before it does already.

        Raises:
            CheckpointException, OSError: this one, or in the background the one before it, could not be written.
        """
        self.finish()
        target = self._folder / f"stage-{state.stage}-step-{state.step:09d}"
        if self._background and state.stage != self._stage:
            self._stage, self._copies = state.stage, {}
            self._background = self._has_room(tensors)
        if not self._background:
            self._write(tensors, target, state)
            return target
        if self._group is None:
            # Collectives of two threads on one group would meet each other's.
            self._group = dist.new_group(backend="gloo")
        copies = self._copy(tensors)
        self._writing = self._thread.submit(self._write, copies, target, state)
        return target

    def finish(self) -> None:
        """Wait for what is being written; raises, as `save` does, where it could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, tensors: Mapping[str, Tensor], target: Path, state: TrainState) -> None:
        partial = target.with_name(target.name + PARTIAL)
        if self._world.rank == 0:
            for left in self._folder.glob(f"*{PARTIAL}"):
                shutil.rmtree(left)
            partial.mkdir(parents=True)
        dist.barrier(self._group)
        save(dict(tensors), checkpoint_id=partial, process_group=self._group)
        if self._world.rank == 0:
            _commit(partial, target, state)
            self._prune(target)
        dist.barrier(self._group)

    def _has_room(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the copies of all ranks fit into the main memory of their machines; all ranks together."""
        parts = (part for tensor in tensors.values() for part in _own_parts(tensor))
        size = sum(part.numel() * part.element_size() for part in parts) * self._world.local_world_size
        short = size > free_memory()
        if short:
            log.warning(
                "rank %d: no room for a copy of %.1f GiB in main memory: training waits while checkpoints are written",
                self._world.rank,
                size / 2**30,
            )
        return self._world.sum(torch.tensor([int(short)])).item() == 0

    def _copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` as they are now, in memory that was used for the checkpoint before."""
        for name, tensor in tensors.items():
            if name not in self._copies:
                self._copies[name] = _empty_like(tensor)
            for into, part in zip(_own_parts(self._copies[name]), _own_parts(tensor), strict=True):
                into.copy_(part, non_blocking=True)
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        return {name: self._copies[name] for name in tensors}

    def _prune(self, committed: Path) -> None:
        folders = _folders(self._folder)
        place = folders.index(committed)
        # What claims to be newer was damaged: the run went on from before it.
        for folder in folders[:place] + folders[place + self._keep :]:
            shutil.rmtree(folder)


def newest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint in `folder`, read on this process alone; damaged ones are named in the log."""
    folders = _folders(folder)
    faults: list[str] = []
    for candidate in folders:
        try:
            found = Checkpoint.read(candidate)
        except ValueError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            log.warning("%s; going on from %s", fault.split(";")[0], candidate.name)
        return found
    if faults:
        raise ValueError(f"{faults[0].split(';')[0]}, and no older one is complete; remove {folder} to start afresh")
    return None


def not_finite(tensors: Mapping[str, Tensor], world: World) -> str | None:
    """The name of one of `tensors` that holds NaN or infinity on some rank, or None; all ranks together."""
    found = [name for name, tensor in tensors.items() if not all(map(_is_finite, _own_parts(tensor)))]
    everywhere: list[list[str]] = [[] for _ in range(world.world_size)]
    dist.all_gather_object(everywhere, found[:1])
    return next((name for names in everywhere for name in names), None)


def _own_parts(tensor: Tensor) -> list[Tensor]:
    """What this rank has of a tensor that may be sharded."""
    if isinstance(tensor, ShardedTensor):
        return [shard.tensor for shard in tensor.local_shards()]
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor]


def _empty_like(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and sharding in main memory."""

    def empty(part: Tensor) -> Tensor:
        # Not pinned: torch would take up to twice the memory.
        return torch.empty_like(part, device="cpu")

    def in_main_memory(shard: ShardMetadata) -> ShardMetadata:
        moved = copy.copy(shard)
        if shard.placement is not None:
            moved.placement = _remote_device(f"rank:{shard.placement.rank()}/cpu")
        return moved

    if isinstance(tensor, ShardedTensor):
        metadata = copy.copy(tensor.metadata())
        metadata.shards_metadata = [in_main_memory(shard) for shard in metadata.shards_metadata]
        shards = [Shard(empty(shard.tensor), in_main_memory(shard.metadata)) for shard in tensor.local_shards()]
        group: Any = tensor._process_group
        return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, process_group=group)
    assert not isinstance(tensor, DTensor)
    return empty(tensor.detach())


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.numel() and tensor.is_floating_point()):
        return True
    # Extremes need no second table's worth of memory; they are NaN where there is one.
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def _folders(folder: Path) -> list[Path]:
    """Newest first; those that were never completed have another name."""
    named = [(_NAME.fullmatch(path.name), path) for path in folder.glob("stage-*-step-*")]
    positions = [(int(match[1]), int(match[2]), path) for match, path in named if match and path.is_dir()]
    return [path for *_, path in sorted(positions, reverse=True)]


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _commit(partial: Path, target: Path, state: TrainState) -> None:
    sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    with whole(partial / STATE_FILE) as file:
        file.write(json.dumps({"state": state.model_dump(), "files": sizes}, indent=1).encode())
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    sync(target.parent)
