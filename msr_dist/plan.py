"""What a run needs on machines that need not be there: where its tables go, and the memory of every rank.

Nothing is read but the configuration and a schema, no process group is opened, and no table is allocated. The largest
parts are exact: weights, optimizer state, dense parameters. The others are estimates:

- buffers: ids and vectors of a batch between ranks, as TorchRec's planner counts them;
- activations: the most that forward and backward pass of the dense part hold, measured on random rows, in this process;
- data: the rows that the loader has decoded, and the batches that stand ready;
- process: interpreter and libraries, as large as this very process was before, and what training loads later.
"""

import json
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from msr_dist.batch import ScenarioBatch
from msr_dist.config import load
from msr_dist.data.loader import feature_names, has_weights, id_type
from msr_dist.distributed import World
from msr_dist.files import write_whole
from msr_dist.layout import GPU_MARGIN, Capacity, DoesNotFitError, Estimate
from msr_dist.models.objectives import Contrastive
from msr_dist.recommender import module_name
from msr_dist.run import RunConfig
from msr_dist.schema import FeatureSchema

_MEASURED_ROWS = 4096
_MEASURED_TABLE_ROWS = 64
_BATCHES_ON_THE_WAY = 3
_LOADED_LATER = 64 << 20
"""What training loads when it starts (tracing, threads, connections), as measured with the smallest model."""
_NUMBERS_PER_DENSE = {"adam": 2, "adamw": 2, "adagrad": 1, "sgd": 0}
_STATE_ORDER = ("sgd", "rowwise_adagrad", "adagrad", "adam")
_LEAST, _MOST, _MORE = 1 << 30, 1 << 60, 1.25


@dataclass(frozen=True)
class Machines:
    """What is planned for: so many ranks, each with so many bytes."""

    device: Literal["cpu", "cuda"]
    ranks: int
    memory: int
    """Main memory of a rank; on GPUs for cached tables alone."""
    hbm: int = 0
    """Memory of a GPU."""
    per_machine: int = 8
    """GPUs of one machine."""

    @classmethod
    def of(
        cls, gpus: int | None, hbm: int | None, cpus: int | None, memory: int | None, per_machine: int
    ) -> "Machines":
        """What the command line says; ValueError where it does not say it all, or too much."""
        if (gpus is None) == (cpus is None):
            raise ValueError("give either --gpus N --hbm SIZE, or --cpus N --memory SIZE")
        if gpus is not None:
            if hbm is None:
                raise ValueError(f"--gpus {gpus}: give the memory of one as well, such as --hbm 80GiB")
            return cls("cuda", gpus, memory or 0, hbm, per_machine)
        if memory is None or hbm is not None:
            raise ValueError(
                f"--cpus {cpus}: give the main memory of one process, such as --memory 24GiB, and no --hbm"
            )
        assert cpus is not None
        return cls("cpu", cpus, memory)

    @property
    def possible(self) -> bool:
        """Whether so many GPUs make whole machines, or a part of one."""
        return self.device == "cpu" or self.ranks <= self.per_machine or self.ranks % self.per_machine == 0

    @property
    def world(self) -> World:
        """Rank 0 of them."""
        if not self.possible:
            raise ValueError(
                f"{self.ranks} GPUs do not make machines of {self.per_machine}: give another --per-machine"
            )
        local = min(self.ranks, self.per_machine) if self.device == "cuda" else self.ranks
        return World(0, self.ranks, 0, local, torch.device(self.device))

    @property
    def usable(self) -> int:
        """Bytes of a rank, or of its GPU, that a run may fill."""
        return int(self.hbm * (1 - GPU_MARGIN)) if self.device == "cuda" else self.memory


@dataclass(frozen=True)
class Shared:
    """What every rank needs beside its tables, in bytes."""

    parameters: int
    """Of the dense part."""
    gradients: int
    optimizer: int
    activations: int
    data: int
    """On GPUs, batches on their way alone."""
    process: int
    """0 on GPUs, of which a margin stays free."""

    @cached_property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.data + self.process


@dataclass(frozen=True)
class Plan:
    """Where the tables of a run go, and what each rank needs."""

    machines: Machines
    schema: FeatureSchema
    estimate: Estimate
    shared: Shared
    fits: bool
    """If not, the layout is that of ranks with as much more memory as tables take."""
    copied: bool
    """Whether checkpoints are written from a copy in main memory: it is asked for, and there is room or nothing fits.
    See `CheckpointConfig.background`."""

    def rank_bytes(self, rank: int) -> dict[str, int]:
        """Bytes that a rank needs of its memory, or of its GPU's, by what they are for."""
        mine = [(table, shard) for table in self.estimate.tables for shard in table.shards if shard.rank == rank]
        held = [shard for table, shard in mine if not table.cache]
        shared, on_cpu = self.shared, self.machines.device == "cpu"
        return {
            "tables": sum(shard.weights for shard in held),
            "optimizer state of tables": sum(shard.state for shard in held),
            "buffers": sum(shard.buffers for _, shard in mine),
            "dense parameters": shared.parameters,
            "dense gradients": shared.gradients,
            "dense optimizer": shared.optimizer,
            "activations": shared.activations,
            "data": shared.data,
            **({"copy for checkpoints": self._copy(rank)} if on_cpu and self.copied else {}),
            "process": shared.process,
        }

    def main_bytes(self, rank: int) -> int:
        """Bytes of main memory that a rank on a GPU needs for cached tables, and to write checkpoints from."""
        cached = (table for table in self.estimate.tables if table.cache)
        held = sum(each.weights + each.state for table in cached for each in table.shards if each.rank == rank)
        return held + self.copied * self._copy(rank)

    def _copy(self, rank: int) -> int:
        """Bytes of what a rank saves."""
        mine = (shard for table in self.estimate.tables for shard in table.shards if shard.rank == rank)
        return sum(shard.weights + shard.state for shard in mine) + self.shared.parameters + self.shared.optimizer

    @property
    def has_room(self) -> bool:
        """Whether all that ranks need, with the copy for checkpoints if any, is within the memory that is known."""
        machines = self.machines
        enough = sum(self.rank_bytes(self.fullest).values()) <= machines.usable
        if machines.device == "cuda" and machines.memory:
            enough = enough and max(map(self.main_bytes, range(machines.ranks))) <= machines.memory
        return enough

    @property
    def fullest(self) -> int:
        """The rank that needs most."""
        return max(range(self.machines.ranks), key=lambda rank: sum(self.rank_bytes(rank).values()))

    def tables(self) -> Table:
        """Where every table goes, for people."""
        unit = "processes" if self.machines.device == "cpu" else "GPUs"
        shown = Table(title=f"tables on {self.machines.ranks} {unit}; bytes of the largest shard")
        for heading in ("table", "rows", "width", "precision", "layout", "ranks"):
            shown.add_column(heading, overflow="fold")
        for heading in ("weights", "state", "buffers"):
            shown.add_column(heading, justify="right")
        known = {module_name(table.name): table for table in self.schema.tables}
        for each in self.estimate.tables:
            table = known.get(each.name)
            described = (
                (table.name, f"{table.rows * self.schema.copies(table):,}", str(table.width), table.precision)
                if table
                else (each.name, "", "", "")
            )
            layout = f"{each.sharding}, cache {each.cache:g}" if each.cache else each.sharding
            largest = [max(getattr(shard, part) for shard in each.shards) for part in ("weights", "state", "buffers")]
            cells = (*described, layout, _spans([shard.rank for shard in each.shards]), *map(size_text, largest))
            shown.add_row(*(Text(cell) for cell in cells))
        return shown

    def memory(self) -> Table:
        """What the fullest rank needs, and all ranks on average, for people."""
        shown = Table(title="memory of a rank" if self.machines.device == "cpu" else "memory of a GPU")
        shown.add_column("")
        for heading in (f"rank {self.fullest}, the fullest", "mean"):
            shown.add_column(heading, justify="right")
        every = [self.rank_bytes(rank) for rank in range(self.machines.ranks)]
        for part, needed in every[self.fullest].items():
            mean = sum(each[part] for each in every) // len(every)
            shown.add_row(part, size_text(needed), size_text(mean))
        totals = [sum(each.values()) for each in every]
        shown.add_section()
        shown.add_row("total", size_text(totals[self.fullest]), size_text(sum(totals) // len(totals)))
        return shown

    def write(self, file: Path) -> None:
        """Save the layout, for people to edit and for `parallel.plan` to read."""
        names = {module_name(table.name): table.name for table in self.schema.tables}
        lines = [
            "# Where tables go, by `msr-dist plan`: edit sharding, ranks or cache, and train with parallel.plan=FILE.",
            "# bytes: what each shard takes with its optimizer state; nothing reads it.",
            "format = 1",
            f"world_size = {self.machines.ranks}",
        ]
        for each in self.estimate.tables:
            # Lists of numbers and strings are the same in JSON; a TOML writer would give each rank a line of its own.
            lines += [
                "",
                f"[tables.{json.dumps(names.get(each.name, each.name), ensure_ascii=False)}]",
                f"sharding = {json.dumps([each.sharding])}",
                f"ranks = {[shard.rank for shard in each.shards]}",
                *([f"cache = {each.cache}"] if each.cache else []),
                f"bytes = {[shard.weights + shard.state for shard in each.shards]}",
            ]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, "\n".join([*lines, ""]))


def read_schema(run: RunConfig, file: Path | None, rows: Sequence[str]) -> FeatureSchema:
    """The schema that `run` trains on: of its data, or of `file`, with other numbers of rows, as TABLE=ROWS.

    Raises:
        ValueError: there is no schema, it does not fit the run, or it lacks such a table.
    """
    data = FeatureSchema.read(run.data) if file is None else load(FeatureSchema, file)
    tables = {table.name: table for table in data.tables}
    changed = {}
    for given in rows:
        name, _, number = given.rpartition("=")
        if name not in tables:
            raise ValueError(f"--rows {given}: expected TABLE=ROWS with one of the tables {', '.join(tables)}")
        if not number.replace("_", "").isdecimal() or int(number) < 1:
            raise ValueError(f"--rows {given}: {number!r} is no number of rows; give one such as {name}=10_000_000_000")
        changed[name] = tables[name].model_copy(update={"rows": int(number)})
    return run.read_schema(data.with_tables(changed))


class Planner:
    """Plans a run for data of the adapted `schema` whose lists have `list_length` ids on average.

    A run of several stages is planned for the one whose optimizer of tables keeps most.
    """

    def __init__(self, run: RunConfig, schema: FeatureSchema, list_length: float) -> None:
        self._process = psutil.Process().memory_info().rss
        self._run, self._schema, self._list_length = run, schema, list_length
        self._lengths = {feature.name: list_length for feature in schema.features if feature.pooling}
        self._stage = max(range(len(run.stages)), key=lambda stage: _STATE_ORDER.index(run.stages[stage].sparse.kind))
        self._parameters, self._per_row, self._per_row_beside, self._per_row_of_part = self._measure()

    def plan(self, machines: Machines) -> Plan:
        """The plan for those machines; where they do not suffice, for so many that have as much more as it takes.

        Raises:
            ValueError: the configuration does not fit the number of ranks, the device or the optimizer.
        """
        if self._run.loader.partitions % machines.ranks:
            raise ValueError(
                f"{machines.ranks} ranks do not divide loader.partitions = {self._run.loader.partitions}: set it to a "
                f"multiple, such as loader.partitions={math.lcm(self._run.loader.partitions, machines.ranks)}"
            )
        world, shared = machines.world, self._shared(machines)
        if machines.device == "cuda" and self._may_cache and not machines.memory:
            raise ValueError("parallel.cache: cached tables stand in main memory: give that of a rank, --memory SIZE")
        copied = self._run.checkpoint.in_background(machines.device)
        left, main, fits = machines.usable - shared.total, machines.memory, True
        while left < _MOST:
            capacity = Capacity(main, left) if machines.device == "cuda" else Capacity(left)
            try:
                if left > 0:
                    found = self._run.estimate(self._schema, self._stage, world, capacity, self._lengths)
                    wanted = Plan(machines, self._schema, found, shared, fits, copied)
                    # Without room for the copy a run only writes more slowly.
                    plans = (wanted, replace(wanted, copied=False)) if fits else ()
                    return next((plan for plan in plans if plan.has_room), replace(wanted, fits=False))
            except DoesNotFitError:
                pass
            left, main, fits = int(max(left, _LEAST) * _MORE), int(main * _MORE), False
        raise ValueError("parallel: tables cannot be laid out as this says, however much memory there is")

    def fewest(self, plan: Plan) -> Plan | None:
        """The plan with fewest ranks, of numbers that divide loader.partitions, which fits; None where none does."""
        if self._run.parallel.plan is not None:
            return plan if plan.fits else None
        shards = [
            table.shards[:1] if table.sharding == "data_parallel" else table.shards for table in plan.estimate.tables
        ]
        least = 0 if self._may_cache else sum(shard.weights + shard.state for each in shards for shard in each)
        most = self._run.loader.partitions
        for ranks in (number for number in range(1, most + 1) if most % number == 0):
            machines = replace(plan.machines, ranks=ranks)
            if ranks == plan.machines.ranks:
                tried = plan
            elif not machines.possible or least // ranks + self._shared(machines).total > machines.usable:
                continue
            else:
                try:
                    tried = self.plan(machines)
                except ValueError:
                    # Tables whose ranks are given, or whose rows have to divide, are for other numbers.
                    continue
            if tried.fits:
                return tried
        return None

    def _shared(self, machines: Machines) -> Shared:
        loader, on_cpu = self._run.loader, machines.device == "cpu"
        rows = -(-loader.batch_size // machines.ranks) * self._together
        stage = self._run.stages[self._stage]
        known = [scenario.rows for scenario in self._schema.scenarios]
        window = min(loader.window_rows, sum(row or 0 for row in known)) if all(known) else loader.window_rows
        batches = (loader.prefetch if on_cpu else 0) + _BATCHES_ON_THE_WAY
        return Shared(
            parameters=self._parameters,
            gradients=self._parameters,
            optimizer=_NUMBERS_PER_DENSE[stage.dense.kind] * self._parameters,
            activations=self._activations(rows),
            # The window that is being read, and the one after it.
            data=int(
                batches * rows * self._batch_row + (2 * window / machines.ranks * self._ready_row if on_cpu else 0)
            ),
            process=self._process + _LOADED_LATER if on_cpu else 0,
        )

    @property
    def _may_cache(self) -> bool:
        """Whether tables may stand in main memory."""
        parallel = self._run.parallel
        return parallel.cache is not None or any(table.cache for table in parallel.tables.values())

    @property
    def _together(self) -> int:
        """Rows of what one of a batch is."""
        return 2 if isinstance(self._run.objective(self._stage), Contrastive) else 1

    @property
    def _batch_row(self) -> float:
        """Bytes of a row in a batch: ids, lengths of lists, numbers, scenario, place, labels and their weights."""
        lists = len(self._lengths)
        ids = len(self._schema.features) - lists + lists * self._list_length
        return 8 * (ids + lists + 2) + 4 * (len(self._schema.numerics) + 2 * len(self._schema.labels))

    @property
    def _ready_row(self) -> float:
        """Bytes of a decoded row that stands ready: ids, lists and their offsets, numbers, scenario, and labels."""
        lists, labels = len(self._lengths), len(self._schema.labels)
        single = np.dtype(id_type(self._schema)).itemsize * (len(self._schema.features) - lists + 1 + labels)
        numbers = 4 * (len(self._schema.numerics) + labels * has_weights(self._schema))
        return single + 8 * lists * (self._list_length + 1) + numbers

    def _measure(self) -> tuple[int, float, float, float]:
        """Bytes of the dense parameters, and of what both passes hold at most: see `_activations`."""
        rows, most = min(_MEASURED_ROWS, self._run.loader.batch_size) * self._together, self._run.dense_rows
        dense, peak = self._peak(rows, None)
        if most is None:
            return dense, peak / rows, 0.0, 0.0
        part = min(most, _MEASURED_ROWS // 4)
        (_, two), (_, four) = self._peak(2 * part, part), self._peak(4 * part, part)
        beside = (four - two) / (2 * part)
        return dense, peak / rows, beside, two / part - 2 * beside

    def _activations(self, rows: int) -> int:
        """Bytes of a rank's `rows`; in parts those of one part, and beside it what each row takes all the time."""
        most = self._run.dense_rows
        if most is None or rows <= most:
            return int(self._per_row * rows)
        return int(self._per_row_of_part * most + self._per_row_beside * rows)

    def _peak(self, rows: int, dense_rows: int | None) -> tuple[int, int]:
        """Bytes of the dense parameters, and the most that forward and backward pass of `rows` rows hold at once."""
        tables = {
            table.name: table.model_copy(update={"rows": min(table.rows, _MEASURED_TABLE_ROWS)})
            for table in self._schema.tables
        }
        schema = self._schema.with_tables(tables)
        model = self._run.model_copy(update={"dense_rows": dense_rows}).recommender(schema, self._stage)
        for name, collection in model.named_children():
            if name != "head":
                collection.to_empty(device=torch.device("cpu"))
                for tensor in (*collection.parameters(), *collection.buffers()):
                    tensor.data.zero_()
        batch = _random_batch(schema, rows, round(self._list_length))
        with _Peak() as memory:
            loss, _ = model(batch)
            loss.backward()
        dense = sum(parameter.numel() * parameter.element_size() for parameter in model.head.parameters())
        # Gradients are counted apart.
        return dense, max(0, memory.peak - dense)


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that tensors which are made within this context have at any time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator, and count what it makes."""
        inputs = (each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor))
        given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage not in self._known and storage.data_ptr() not in given:
                self._known.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, size: int) -> None:
        self._now += size
        self.peak = max(self.peak, self._now)


def _random_batch(schema: FeatureSchema, rows: int, list_length: int) -> ScenarioBatch:
    """A batch with ids that every table has."""
    generator = torch.Generator().manual_seed(0)
    features = {feature.name: feature for feature in schema.features}
    names, ids, lengths = feature_names(schema), [], []
    for feature in map(features.__getitem__, names):
        table, length = schema.table(feature.table), list_length if feature.pooling else 1
        ids.append(torch.randint(table.rows * schema.copies(table), (rows * length,), generator=generator))
        lengths.append(length)
    labels = len(schema.labels)
    return ScenarioBatch(
        ids=KeyedJaggedTensor(keys=names, values=torch.cat(ids), lengths=torch.tensor(lengths).repeat_interleave(rows)),
        numeric=torch.randn(rows, len(schema.numerics), generator=generator),
        scenario=torch.arange(rows) % len(schema.scenarios),
        labels=torch.randint(2, (rows, labels), generator=generator).float(),
        weights=torch.ones(rows, labels),
        row=torch.arange(rows),
        rows_per_rank=float(rows),
    )


def size_text(size: int) -> str:
    """Bytes as people read them: 1.50 GiB."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:,.2f} {unit}"
    return f"{size} B"


def _spans(ranks: Sequence[int]) -> str:
    """0, 1, 2, 5 as 0-2, 5."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in spans)
