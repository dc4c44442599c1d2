"""How fast rows are read and trained on, beside an ordinary PyTorch trainer and beside what bounds each.

python benchmarks/throughput.py loader
python benchmarks/throughput.py loader --wide
python benchmarks/throughput.py step --model mmoe-small --workers 1 --workers 2
python benchmarks/throughput.py end-to-end --data data/workload --model mmoe-full --workers 2 precision=bf16
python benchmarks/throughput.py plain --data data/workload --model mmoe-small
python benchmarks/throughput.py checkpoint --model mlp --times 10
python benchmarks/throughput.py start --model mlp --workers 1 --workers 2
python benchmarks/throughput.py lookup --rows 1_000_000 --rows 50_000_000 --precision fp16

The unit is CPU-seconds per million rows, of all processes and threads together, each process with one thread for
computing: other work on the machine hardly changes it. What happens before the loop is not part of it. Ways alternate
within one run; figures are medians over rounds. `start` and `checkpoint` give seconds of the wall: users wait for them.
"""

import functools
import itertools
import json
import math
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TextIO, TypeVar

import click

# Before torch is loaded: see msr_dist.launch.set_threads. A thread per process, as with a rank per core.
from msr_dist.launch import call_and_leave, launch, set_threads, silence

silence()
set_threads(multiprocessing.cpu_count())

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from quality_grid import commit_of_code  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import embedding_bag  # noqa: E402
from torch.utils.data import DataLoader, Dataset, IterableDataset  # noqa: E402
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor  # noqa: E402

from msr_dist.batch import ScenarioBatch  # noqa: E402
from msr_dist.checkpoint import CheckpointConfig, Checkpoints, TrainState, not_finite  # noqa: E402
from msr_dist.config import dump, merge, parse  # noqa: E402
from msr_dist.data.loader import Loader  # noqa: E402
from msr_dist.data.order import Order  # noqa: E402
from msr_dist.data.parquet import ParquetSource  # noqa: E402
from msr_dist.data.prepare.canonical import prepare  # noqa: E402
from msr_dist.data.prepare.synthetic import Config as Synthetic  # noqa: E402
from msr_dist.data.prepare.write import write_split  # noqa: E402
from msr_dist.distributed import World, open_world  # noqa: E402
from msr_dist.evaluate import evaluate_split  # noqa: E402
from msr_dist.metrics import ScenarioMetrics  # noqa: E402
from msr_dist.models.base import Inputs  # noqa: E402
from msr_dist.parallel import Sharded  # noqa: E402
from msr_dist.recommender import PRECISIONS  # noqa: E402
from msr_dist.run import RunConfig  # noqa: E402
from msr_dist.schema import Feature, FeatureSchema, Label, Scenario, Table  # noqa: E402
from msr_dist.stopping import STATUS  # noqa: E402
from msr_dist.tracking import VALUES_FILE  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "throughput"
DATA = Path(__file__).parents[1] / "data"
WARM_UP = 3
"""Steps before the clock starts: the first allocates, and traces the model."""
IN_MEMORY = 8
"""Batches that the step takes in turn where nothing is read."""
WIDE_IDS, WIDE_LISTS, WIDE_MEAN, WIDE_ROWS = 100, 4, 30, 200_000

MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp"},
    "mmoe": {"kind": "mmoe"},
    "star": {"kind": "star"},
    "mmoe-small": {"kind": "mmoe", "experts": 3, "widths": [64, 32], "tower_widths": [32]},
    "mmoe-full": {"kind": "mmoe", "experts": 3, "widths": [512, 256, 128], "tower_widths": [256, 128, 64]},
    "pepnet-full": {"kind": "pepnet", "widths": [512, 256], "gate_width": 128, "scenario_towers": [256, 128, 64]},
}

SMALL_TABLES = (100_000, 50_000, 10_000, 5_000, 1_000, 500, 100, 50, 20)
"""Rows of the tables beside users' and items' where lookups are measured, which are as large as is asked for."""
COPIED_BYTES = 1 << 28
"""Of a tensor that no cache holds."""

Way = Literal["memory", "parquet"]
_PATH = click.Path(path_type=Path)
_More = ParamSpec("_More")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure reading and training. Every command adds a line of JSON per case to benchmarks/results/throughput."""


@dataclass(frozen=True)
class Given:
    """What commands have in common; `_shared` says which of it a command takes from its words."""

    batch_size: int
    rounds: int
    results: Path
    data: Path | None = None
    models: Sequence[str] = ()
    settings: Sequence[str] = ()

    def run(self, model: str, workers: int = 1) -> RunConfig:
        """The run to measure."""
        return configured(self.data or planted_data(), MODELS[model], self.batch_size * workers, self.settings)

    def keep(self, measured: str, model: str, figures: dict[str, Any]) -> None:
        """Add a line, with every setting that was given: two lines that differ in one must not look alike."""
        add(self.results, {"measured": measured, "model": model, "given": list(self.settings), **figures})


_Command = Callable[Concatenate[Given, _More], None]


def _shared(*, reads: bool = True, trains: bool = False) -> Callable[[_Command[_More]], Callable[..., None]]:
    """Options of a command, which gets them as its first argument: of those that read data, and of those that train."""
    options = [
        click.option("--batch-size", type=click.IntRange(1), default=8192, show_default=True, help="Of a process."),
        click.option("--rounds", type=click.IntRange(1), default=3, show_default=True),
        click.option("--results", type=_PATH, default=RESULTS, help="The folder of results."),
    ]
    if reads:
        options += [click.option("--data", type=_PATH, help="A prepared folder; by default, planted data in data/.")]
    if trains:
        options += [
            click.option("--model", "models", type=click.Choice(list(MODELS)), multiple=True, default=["mmoe-small"]),
            click.argument("settings", nargs=-1, metavar="[KEY=VALUE]..."),
        ]

    def decorate(command: _Command[_More]) -> Callable[..., None]:
        @functools.wraps(command)
        def taking(**words: Any) -> None:
            common = {field.name: words.pop(field.name) for field in fields(Given) if field.name in words}
            try:
                command(Given(**common), **words)  # type: ignore[call-arg]
            except ValueError as error:
                raise click.UsageError(str(error)) from None

        decorated: Callable[..., None] = taking
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


_workers = click.option("--workers", type=click.IntRange(1), multiple=True, default=[1], help="May be repeated.")
_profile = click.option("--profile", type=_PATH, help="Also write rank 0's trace of some steps, for ui.perfetto.dev.")


@main.command()
@_shared()
@click.option("--wide", is_flag=True, help=f"{WIDE_IDS} ids and {WIDE_LISTS} lists of mean length {WIDE_MEAN}.")
@click.option("--workers", type=click.IntRange(1), default=1, help="Of whose batches the first one's are made.")
def loader(given: Given, wide: bool, workers: int) -> None:
    """Rows per CPU-second of the loader alone, and of pyarrow that only decodes the same columns."""
    # As in training: what a step has freed is kept for the next one.
    set_threads(1)
    folder = given.data or (wide_data() if wide else planted_data())
    schema = FeatureSchema.read(folder)
    run = configured(folder, MODELS["mlp"], given.batch_size * workers, [])
    source = ParquetSource(folder / "train", schema)
    order = order_of(run, source)
    ways: dict[str, Callable[[], None]] = {
        "pyarrow": lambda: decode(source, 1),
        # Two threads at a time slow each other down, whatever they do.
        f"pyarrow in {run.loader.threads} threads": lambda: decode(source, run.loader.threads),
        "loader": lambda: read_all(
            Loader(source, schema, order, rank, workers, run.loader).batches(0, order.steps) for rank in range(workers)
        ),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            speeds[name].append(order.rows / (time.process_time() - start))
    medians = {name: statistics.median(each[1:]) for name, each in speeds.items()}
    line = {
        "measured": "loader",
        "data": folder.name,
        "columns": len(source.columns),
        "batch_size": given.batch_size,
        "rounds": given.rounds,
        "rows_per_cpu_second": {name: round(speed) for name, speed in medians.items()},
        "shares": {
            name: round(statistics.median(map(_ratio, speeds["loader"][1:], each[1:])), 3)
            for name, each in speeds.items()
            if name != "loader"
        },
    }
    add(given.results, line)


def read_all(loaders: Iterator[Iterator[ScenarioBatch]]) -> None:
    """Take all batches, and throw them away."""
    for batches in loaders:
        for _ in batches:
            pass


def decode(source: ParquetSource, threads: int) -> None:
    """All rows of the columns that training reads, decoded and thrown away."""

    def every(first: int) -> None:
        for path in sorted({group.file for group in source.row_groups}):
            with pq.ParquetFile(path) as file:
                for index in range(first, file.num_row_groups, threads):
                    file.read_row_group(index, columns=source.columns, use_threads=False)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(every, range(threads)))


@main.command()
@_shared(trains=True)
@_workers
@_profile
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True, help="Of each round.")
@click.option(
    "--times", type=click.IntRange(1), multiple=True, default=[1], help="Tables with so many times the rows; repeats."
)
def step(given: Given, workers: Sequence[int], profile: Path | None, steps: int, times: Sequence[int]) -> None:
    """A training step on batches that are in memory."""
    for model, count, factor in itertools.product(given.models, workers, times):
        case = Case(given.run(model, count), ("memory",), given.rounds, steps, factor, profile=profile)
        given.keep("step", model, apart(measure, case, count))


@main.command()
@_shared(trains=True)
@_workers
@_profile
@click.option("--judge", is_flag=True, help="Also the AUC of the valid split after the first epoch.")
def end_to_end(given: Given, workers: Sequence[int], profile: Path | None, judge: bool) -> None:
    """Epochs over parquet files, and as many steps on batches that are in memory."""
    for model, count in itertools.product(given.models, workers):
        case = Case(given.run(model, count), ("parquet", "memory"), given.rounds, judge=judge, profile=profile)
        given.keep("end-to-end", model, apart(measure, case, count))


@main.command()
@_shared(trains=True)
@_workers
@click.option("--launcher", type=click.Choice(["local", "ray"]), default="local", show_default=True)
def start(given: Given, workers: Sequence[int], launcher: str) -> None:
    """Wall seconds from the command `msr-dist train` to its first step, and from Ctrl-C to its end, all saved."""
    if fixed := [word for word in given.settings if word.startswith(("runs=", "log_every="))]:
        raise ValueError(f"{fixed[0]}: the command sets it itself, leave it out")
    for model, count in itertools.product(given.models, workers):
        run = given.run(model, count)
        with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
            runs = [begin_and_stop(run, count, launcher, Path(folder) / str(n)) for n in range(given.rounds + 1)]
        # The first finds files that are not in memory yet.
        first_step, stop = (round(statistics.median(each), 1) for each in zip(*runs[1:], strict=True))
        given.keep(
            "start",
            model,
            {
                "data": run.data.name,
                "launcher": launcher,
                "workers": count,
                "rounds": given.rounds,
                "first_step_seconds": first_step,
                "stop_seconds": stop,
            },
        )


def begin_and_stop(run: RunConfig, workers: int, launcher: str, folder: Path) -> tuple[float, float]:
    """Seconds until the run's first step is recorded, and from an interrupt until the command has ended."""
    folder.mkdir()
    run = run.absolute().model_copy(update={"runs": folder, "log_every": 1})
    config = folder / "run.toml"
    config.write_text(dump(run))
    words = ["train", str(config), "--workers", str(workers), "--launcher", launcher]
    begun = time.perf_counter()
    with open(folder / "said.txt", "w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "msr_dist", *words], cwd=Path(__file__).parents[1], stdout=said, stderr=said
        )
        try:
            values = run.folder / VALUES_FILE
            while process.poll() is None and not (values.exists() and "train/loss" in values.read_text()):
                time.sleep(0.02)
            first_step = time.perf_counter() - begun
            process.send_signal(signal.SIGINT)
            if process.wait() == 0:
                raise ValueError("the run was over before it was stopped: give it more epochs, stages.0.epochs=100")
            if process.returncode != STATUS:
                raise ValueError(f"msr-dist {' '.join(words)} ended with {process.returncode}: {_end_of(said)}")
        finally:
            process.kill()
            process.wait()
    return first_step, time.perf_counter() - begun - first_step


def _end_of(said: TextIO) -> str:
    said.seek(0)
    return " ".join(said.read().split()[-50:])


@main.command()
@_shared(trains=True)
@click.option("--by-row", is_flag=True, help="DataLoader puts batches together row by row, which it does unasked.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of the training process.")
def plain(given: Given, by_row: bool, threads: int) -> None:
    """The yardstick: the same model and data as an ordinary PyTorch trainer, in one process with one loading worker.

    Its data set hands out whole batches, cut from row groups that are read and shuffled as arrays: about the best that
    can be had from a DataLoader. With --by-row, it hands out rows of arrays in memory, for DataLoader to shuffle and
    collate.
    """
    torch.set_num_threads(threads)
    for model in given.models:
        given.keep("plain", model, plainly(given.run(model), given.rounds, by_row))


@main.command()
@_shared(trains=True)
@click.option("--times", type=click.IntRange(1), default=1, help="Tables with so many times the rows.")
def checkpoint(given: Given, times: int) -> None:
    """Seconds to save and to restore, how long training stands still for it, and bytes on disk by those of the tensors.

    Training stands still for the time by which steps take longer with a checkpoint that is written in the background.
    """
    for model in given.models:
        run = given.run(model)
        with open_world() as world, tempfile.TemporaryDirectory() as folder:
            figures = saved(run, scaled(run.read_schema(), times), times, world, given.rounds, Path(folder))
        given.keep("checkpoint", model, {"rounds": given.rounds, **figures})


def saved(run: RunConfig, schema: FeatureSchema, times: int, world: World, rounds: int, folder: Path) -> dict[str, Any]:
    """The figures of checkpoints of `run`, in a world of one process."""
    sharded, pipeline, reader = trainer(run, schema, world)
    kept = [spread(batch, times) for batch in reader.batches(0, min(IN_MEMORY, reader.order.steps))]

    def timed(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def go(count: int) -> None:
        steps(pipeline, map(fresh, itertools.islice(itertools.cycle(kept), count)))

    go(WARM_UP)
    stopped = Checkpoints(folder / "stopped", CheckpointConfig(background=False), world)
    seconds: dict[str, list[float]] = {"save": [], "restore": [], "alone": [], "beside": [], "call": []}
    with Checkpoints(folder / "background", CheckpointConfig(background=True), world) as background:
        for number in range(rounds + 1):
            state = TrainState(step=number)
            seconds["save"].append(timed(lambda: stopped.save(sharded.tensors(), state)))  # noqa: B023 - called at once
            # Steps that last longer than the writing beside them.
            count = max(10, math.ceil(2 * max(seconds["save"]) / (timed(partial(go, 10)) / 10)))
            seconds["alone"].append(timed(partial(go, count)))
            start = time.perf_counter()
            assert not_finite(sharded.tensors(), world) is None
            background.save(sharded.tensors(), state)
            seconds["call"].append(time.perf_counter() - start)
            go(count)
            seconds["beside"].append(time.perf_counter() - start)
            background.finish()
            written = stopped.newest()
            assert written is not None
            seconds["restore"].append(timed(partial(written.restore, sharded.tensors())))
    on_disk = sum(file.stat().st_size for file in (folder / "background").glob("*/*")) / CheckpointConfig().keep
    # The first of each allocates what later ones use again.
    median = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    stalls = [beside - alone for beside, alone in zip(seconds["beside"][1:], seconds["alone"][1:], strict=True)]
    return {
        "table_rows": sum(table.rows for table in schema.tables),
        "bytes": round(on_disk),
        "bytes_by_tensors": round(on_disk / tensor_bytes(sharded.tensors().values()), 4),
        "save_seconds": round(median["save"], 3),
        "restore_seconds": round(median["restore"], 3),
        "call_by_save": round(statistics.median(map(_ratio, seconds["call"][1:], seconds["save"][1:])), 3),
        "stall_by_save": round(statistics.median(map(_ratio, stalls, seconds["save"][1:])), 3),
    }


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors as a checkpoint holds them, in a world of one process."""
    parts = [getattr(tensor, "local_tensor", lambda t=tensor: t)() for tensor in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


@main.command()
@_shared(reads=False)
@click.option("--rows", type=click.IntRange(1), multiple=True, default=[1_000_000], help="Of two tables; repeats.")
@click.option("--width", type=int, default=16, show_default=True, help="Numbers in a row of a table.")
@click.option("--precision", type=click.Choice(list(PRECISIONS)), default="fp32", show_default=True)
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True, help="Of each round.")
def lookup(given: Given, rows: Sequence[int], width: int, precision: str, steps: int) -> None:
    """Tables alone: 11 single-valued features, uniform ids, all that is between ids and vectors in one process.

    Forward is lookup and pooling, backward the fused optimizer. Bytes are those of tables: forward, each looked-up row
    is read; backward, each distinct one and its optimizer state are read and written. The limits: the same rows of the
    same tables through torch's own embedding_bag, and a copy of a large tensor, whose bytes are read and written.
    """
    for count in rows:
        settings = [f"embeddings.width={width}", f"embeddings.precision={precision}"]
        case = Lookups(configured(DATA, MODELS["mlp"], given.batch_size, settings), count, given.rounds, steps)
        add(given.results, {"measured": "lookup", **apart(look_up, case, 1)})


@dataclass(frozen=True)
class Lookups:
    """What the process of a measurement of lookups does."""

    run: RunConfig
    rows: int
    rounds: int
    steps: int
    """Of each round."""
    out: Path = Path()


def look_up(case: Lookups) -> None:
    """Look rows up and update them for the rounds of `case`."""
    silence()
    with open_world() as world:
        schema = case.run.read_schema(uniform_schema(case.rows))
        sharded = case.run.build(schema, 0, world)
        collection, size = sharded.model.module.embeddings, case.run.loader.batch_size
        table_rows = sum(table.rows for table in schema.tables)
        weights = {table: weight for table, weight, _, _ in sharded.table_shards()}
        states = tuple(f"optimizer/{parameter}/" for parameter in sharded.tables)
        # Bytes of a row, the same in all tables, and of the optimizer's state of it.
        row = tensor_bytes(weights.values()) / table_rows
        state = tensor_bytes(x for name, x in sharded.tensors().items() if name.startswith(states)) / table_rows
        generator, offsets = torch.Generator().manual_seed(0), torch.arange(size)
        gradient = torch.randn(size, schema.input_width, generator=generator) / size
        large = torch.zeros(COPIED_BYTES, dtype=torch.uint8)
        copy = torch.empty_like(large)
        clocks = [Moved(defaultdict(float), defaultdict(float)) for _ in range(case.rounds + 1)]
        for clock in clocks:
            clock.take("copied", 2 * COPIED_BYTES, lambda: copy.copy_(large))
            for _ in range(case.steps):
                # Drawn anew for each way: a cache may hold what was looked up last.
                ids, others = (uniform_ids(schema, size, generator) for _ in range(2))
                distinct = sum(len(each.unique()) for each in ids.values().split(size))
                looked_up = clock.take("forward", len(ids.values()) * row, lambda: collection(ids).values())  # noqa: B023
                clock.take("backward", 2 * distinct * (row + state), lambda: looked_up.backward(gradient))  # noqa: B023
                bags = [
                    (each, weights[name]) for name, each in zip(others.keys(), others.values().split(size), strict=True)
                ]
                clock.take(
                    "gathered",
                    len(others.values()) * row,
                    lambda: [embedding_bag(each, weight, offsets, mode="sum") for each, weight in bags],  # noqa: B023
                )
    rates = {way: [clock.bytes[way] / clock.seconds[way] for clock in clocks[1:]] for way in clocks[0].seconds}
    seconds = {way: statistics.median(clock.seconds[way] for clock in clocks[1:]) for way in ("forward", "backward")}
    seconds["both"] = sum(seconds.values())
    line = {
        "table_rows": table_rows,
        "width": schema.tables[0].width,
        "precision": schema.tables[0].precision,
        "threads": torch.get_num_threads(),
        "batch_size": size,
        "rounds": case.rounds,
        "rows_per_cpu_second": {way: round(case.steps * size / each) for way, each in seconds.items()},
        "gb_per_cpu_second": {way: round(statistics.median(each) / 1e9, 2) for way, each in rates.items()},
        **{
            f"share_of_{limit}": {
                way: round(statistics.median(map(_ratio, rates[way], rates[limit])), 3)
                for way in ("forward", "backward")
            }
            for limit in ("gathered", "copied")
        },
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    case.out.write_text(json.dumps(line))


@dataclass
class Moved:
    """What each way has moved within a round."""

    bytes: dict[str, float]
    seconds: dict[str, float]
    """Of the CPU."""

    def take(self, way: str, size: float, work: Callable[[], Any]) -> Any:
        """Do `work`, which moves `size` bytes, and return what it returns."""
        start = time.process_time()
        done = work()
        self.seconds[way] += time.process_time() - start
        self.bytes[way] += size
        return done


def uniform_schema(rows: int) -> FeatureSchema:
    """A user's and an item's table of `rows` rows, and the small ones, each with a feature of its name."""
    tables = {"user": rows, "item": rows, **{f"c{number}": each for number, each in enumerate(SMALL_TABLES)}}
    return FeatureSchema(
        user="user",
        item="item",
        labels=(Label(name="click"),),
        scenarios=(Scenario(id=0, name="scenario"),),
        tables=tuple(Table(name=name, rows=each) for name, each in tables.items()),
        features=tuple(Feature(name=name, table=name) for name in tables),
    )


def uniform_ids(schema: FeatureSchema, size: int, generator: torch.Generator) -> KeyedJaggedTensor:
    """Ids of a batch of `size` rows, each as likely as any other of its table."""
    names = [feature.name for feature in schema.features]
    ids = [torch.randint(schema.table(name).rows, (size,), generator=generator) for name in names]
    return KeyedJaggedTensor(
        keys=names, values=torch.cat(ids), lengths=torch.ones(len(names) * size, dtype=torch.int64)
    )


@dataclass(frozen=True)
class Case:
    """What a process of a training measurement does."""

    run: RunConfig
    ways: tuple[Way, ...]
    rounds: int
    steps: int | None = None
    """Of each way and round; by default an epoch's."""
    times: int = 1
    """Factor of the number of rows of all tables; ids are spread over them."""
    judge: bool = False
    profile: Path | None = None
    out: Path = Path()
    """Where rank 0 leaves the figures."""


_Job = TypeVar("_Job", Case, Lookups)


def apart(work: Callable[[_Job], None], case: _Job, workers: int) -> dict[str, Any]:
    """The figures that `work` leaves in `case.out`, of all `workers` processes together."""
    folder = Path(tempfile.mkdtemp(prefix="throughput-"))
    try:
        # A child even where one would do: its start-up and memory are then its own.
        case = replace(case, out=folder / "figures.json")
        if workers == 1:
            child = multiprocessing.get_context("spawn").Process(target=work, args=(case,))
            child.start()
            child.join()
            if child.exitcode:
                raise SystemExit(f"the measuring process ended with {child.exitcode}")
        else:
            launch(work, case, "local", workers, folder)
        figures: dict[str, Any] = json.loads(case.out.read_text())
        return figures
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(case: Case) -> None:
    """Train for the rounds of `case`; every process of a world calls it."""
    silence()
    run = case.run
    with open_world() as world:
        schema = scaled(run.read_schema(), case.times)
        sharded, pipeline, reader = trainer(run, schema, world)
        kept = [spread(batch, case.times) for batch in reader.batches(0, min(IN_MEMORY, reader.order.steps))]
        # Nothing is learned before the measurement: what it learns may be judged.
        sharded.scale_learning_rates(0.0)
        steps(pipeline, map(fresh, itertools.islice(itertools.cycle(kept), WARM_UP)))
        first = {"wall": time.time() - psutil.Process().create_time(), "cpu": time.process_time()}
        sharded.scale_learning_rates(1.0)
        count, spent = case.steps or reader.order.steps, {way: Spent([], []) for way in case.ways}
        quality = None
        for number in range(case.rounds):
            for way in case.ways:
                first_step = number * reader.order.steps
                batches = (
                    map(fresh, itertools.islice(itertools.cycle(kept), count))
                    if way == "memory"
                    else reader.batches(first_step, first_step + count)
                )
                spent[way].take(world, partial(steps, pipeline, batches))
                # What other ranks get of it is None.
                if case.judge and (number, way) == (0, case.ways[0]):
                    quality = evaluate_split(run, schema, sharded.model, "valid", world)
        if case.profile and world.rank == 0:
            case.profile.parent.mkdir(parents=True, exist_ok=True)
        with torch.profiler.profile() if case.profile else nullcontext() as trace:
            if case.profile:
                steps(pipeline, map(fresh, kept))
        if trace and world.rank == 0:
            trace.export_chrome_trace(str(case.profile))
        peak = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20], dtype=torch.float64)
        peak = world.sum(peak)
        if world.rank:
            return
        rows = count * reader.order.rows / reader.order.steps
        line = {
            "data": run.data.name,
            "settings": {"precision": run.precision, "dense_rows": run.dense_rows},
            "table_rows": sum(table.rows for table in schema.tables),
            "workers": world.world_size,
            "threads": torch.get_num_threads(),
            "batch_size": run.loader.batch_size,
            "rounds": case.rounds,
            "cpu_seconds_per_million_rows": {way: each.cpu_per_million(rows) for way, each in spent.items()},
            "rows_per_second": {way: round(rows / statistics.median(each.wall)) for way, each in spent.items()},
            "start_seconds": {clock: round(seconds, 1) for clock, seconds in first.items()},
            "peak_gib": round(peak.item(), 2),
        }
        if len(case.ways) > 1:
            line["share_of_memory"] = round(
                statistics.median(map(_ratio, spent["memory"].cpu, spent["parquet"].cpu)), 3
            )
        if quality is not None:
            line["auc"] = quality.flat("valid")
        case.out.write_text(json.dumps(line))


def trainer(run: RunConfig, schema: FeatureSchema, world: World) -> tuple[Sharded, Any, Loader]:
    """A model, what trains it, and the batches of this rank."""
    sharded = run.build(schema, 0, world)
    sharded.model.train()
    source = ParquetSource(run.data / "train", schema)
    reader = Loader(source, schema, order_of(run, source), world.rank, world.world_size, run.loader)
    return sharded, sharded.pipeline(world.device), reader


@dataclass
class Spent:
    """Seconds of each round: of the CPUs, all processes together, and of the wall."""

    cpu: list[float]
    wall: list[float]

    def take(self, world: World, work: Callable[[], None]) -> None:
        """One round."""
        world.sum(torch.zeros(1))
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        total = torch.tensor([time.process_time() - cpu], dtype=torch.float64)
        self.cpu.append(world.sum(total).item())
        self.wall.append(time.perf_counter() - wall)

    def cpu_per_million(self, rows: float) -> float:
        """The median."""
        return round(statistics.median(self.cpu) / rows * 1e6, 2)


def steps(pipeline: Any, batches: Iterator[ScenarioBatch]) -> None:
    """Train on all of `batches`."""
    try:
        while True:
            pipeline.progress(batches)
    except StopIteration:
        # The pipeline has replaced the lookup's forward by one that waits for batches of its own.
        pipeline.detach()


def fresh(batch: ScenarioBatch) -> ScenarioBatch:
    """The batch as a loader hands it out: what a KeyedJaggedTensor has once computed, it keeps."""
    ids = KeyedJaggedTensor(keys=batch.ids.keys(), values=batch.ids.values(), lengths=batch.ids.lengths())
    return replace(batch, ids=ids)


def spread(batch: ScenarioBatch, times: int) -> ScenarioBatch:
    """The batch with ids for tables of so many times the rows: as many distinct ones, further apart."""
    ids = KeyedJaggedTensor(keys=batch.ids.keys(), values=batch.ids.values() * times, lengths=batch.ids.lengths())
    return replace(batch, ids=ids)


def scaled(schema: FeatureSchema, times: int) -> FeatureSchema:
    """The schema with tables of so many times the rows."""
    return schema.with_tables({t.name: t.model_copy(update={"rows": t.rows * times}) for t in schema.tables})


def order_of(run: RunConfig, source: ParquetSource) -> Order:
    """The order in which `run` reads the rows of `source`."""
    return Order(
        tuple(group.rows for group in source.row_groups),
        run.loader.partitions,
        run.loader.batch_size,
        run.seed,
        run.loader.window_rows if run.loader.shuffle else None,
    )


def configured(data: Path, model: dict[str, Any], batch_size: int, settings: Sequence[str]) -> RunConfig:
    """A run of the workload's optimizers; `batch_size` is of all processes together."""
    raw = {
        "name": "throughput",
        "data": str(data.absolute()),
        "model": model,
        "loader": {"batch_size": batch_size},
        "stages": [{"sparse": {"lr": 0.02}, "dense": {"lr": 1e-3}}],
        "tracking": {"enabled": False},
    }
    return parse(RunConfig, merge(raw, settings), "throughput")


class PlainModel(nn.Module):
    """The same backbone over `nn.EmbeddingBag`s with sparse gradients, one per table."""

    def __init__(self, run: RunConfig, schema: FeatureSchema) -> None:
        super().__init__()
        self.schema = schema
        self.backbone: Any = run.model.build(schema)
        self.bags = nn.ModuleList(
            nn.EmbeddingBag(table.rows, table.width, mode="sum", sparse=True)
            for table in (schema.table(feature.table) for feature in schema.features)
        )
        for bag in self.bags:
            nn.init.uniform_(bag.weight, -0.3 / bag.embedding_dim**0.5, 0.3 / bag.embedding_dim**0.5)  # type: ignore[arg-type,operator]

    def forward(self, ids: Tensor, scenario: Tensor) -> Tensor:
        """`[F, B]` and `[B]` -> logits `[B, T]`."""
        offsets = torch.arange(ids.shape[1])
        groups: dict[str, list[Tensor]] = {}
        for feature, bag, values in zip(self.schema.features, self.bags, ids, strict=True):
            groups.setdefault(feature.group, []).append(bag(values, offsets))
        joined = {group: torch.cat(parts, dim=1) for group, parts in groups.items()}
        logits: Tensor = self.backbone(Inputs(joined, scenario, offsets))
        return logits


class PlainRows(IterableDataset[tuple[Tensor, Tensor, Tensor]]):
    """Batches of one split: row groups in random order, their rows in random order."""

    def __init__(self, folder: Path, schema: FeatureSchema, batch_size: int) -> None:
        self.files, self.schema, self.batch_size = sorted(folder.glob("*.parquet")), schema, batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Ids `[F, B]`, scenarios `[B]` and labels `[B, T]`."""
        features = [feature.name for feature in self.schema.features]
        labels = [label.name for label in self.schema.labels]
        groups = [(file, g) for file in self.files for g in range(pq.read_metadata(file).num_row_groups)]
        rest: list[pa.Table] = []
        for place in torch.randperm(len(groups)).tolist():
            file, group = groups[place]
            rest.append(pq.ParquetFile(file).read_row_group(group, columns=self.schema.columns(), use_threads=False))
            # So many rows that shuffling them mixes several row groups.
            if sum(table.num_rows for table in rest) < 8 * self.batch_size and len(groups) > 1:
                continue
            yield from self._batches(pa.concat_tables(rest), features, labels)
            rest = []
        if rest:
            yield from self._batches(pa.concat_tables(rest), features, labels)

    def _batches(
        self, table: pa.Table, features: list[str], labels: list[str]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = torch.randperm(table.num_rows)
        columns = {name: torch.from_numpy(table[name].to_numpy().astype(np.int64))[order] for name in features}
        truth = torch.stack([torch.from_numpy(table[name].to_numpy().astype(np.float32)) for name in labels], 1)[order]
        scenario = torch.from_numpy(table[self.schema.scenario].to_numpy().astype(np.int64))[order]
        ids = torch.stack(list(columns.values()))
        for start in range(0, table.num_rows, self.batch_size):
            part = slice(start, start + self.batch_size)
            yield ids[:, part], scenario[part], truth[part]


class PlainTable(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """All rows of one split, in memory: ids `[F]`, scenario `[]` and labels `[T]` of each."""

    def __init__(self, folder: Path, schema: FeatureSchema) -> None:
        rows = sum(pq.read_metadata(file).num_rows for file in folder.glob("*.parquet"))
        ids, self.scenario, self.truth = next(iter(PlainRows(folder, schema, rows)))
        self.ids = ids.T.contiguous()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.ids[row], self.scenario[row], self.truth[row]


def plain_batches(run: RunConfig, schema: FeatureSchema, by_row: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """An epoch of ids `[F, B]`, scenarios `[B]` and labels `[B, T]`."""
    folder, size = run.data_here / "train", run.loader.batch_size
    if by_row:
        for ids, scenario, truth in DataLoader(PlainTable(folder, schema), size, shuffle=True, num_workers=1):
            yield ids.T.contiguous(), scenario, truth
    else:
        yield from DataLoader(PlainRows(folder, schema, size), batch_size=None, num_workers=1)


def plainly(run: RunConfig, rounds: int, by_row: bool) -> dict[str, Any]:
    """The figures of the ordinary trainer: epochs, after which the valid split is judged."""
    schema = run.read_schema()
    if any(feature.pooling for feature in schema.features) or schema.numerics:
        raise click.UsageError(f"{run.data}: the plain trainer knows data of single-valued ids alone; choose others")
    torch.manual_seed(0)
    model = PlainModel(run, schema)
    sparse = torch.optim.Adagrad(model.bags.parameters(), lr=0.02)
    dense = torch.optim.Adam(model.backbone.parameters(), lr=1e-3, fused=True)
    cpu, wall, rows, auc = [], [], 0, None
    for _ in range(rounds):
        before, start, rows = _cpu_of_family(), time.perf_counter(), 0
        for ids, scenario, truth in plain_batches(run, schema, by_row):
            sparse.zero_grad()
            dense.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(model(ids, scenario), truth, reduction="sum")
            (loss / len(scenario)).backward()  # type: ignore[no-untyped-call]
            sparse.step()
            dense.step()
            rows += len(scenario)
        cpu.append(_cpu_of_family() - before)
        wall.append(time.perf_counter() - start)
        auc = auc or _plain_quality(model, run, schema)
    return {
        "data": run.data.name,
        "by_row": by_row,
        "workers": 1,
        "threads": torch.get_num_threads(),
        "batch_size": run.loader.batch_size,
        "rounds": rounds,
        "cpu_seconds_per_million_rows": {"parquet": round(statistics.median(cpu) / rows * 1e6, 2)},
        "rows_per_second": {"parquet": round(rows / statistics.median(wall))},
        "auc": auc,
    }


def _plain_quality(model: PlainModel, run: RunConfig, schema: FeatureSchema) -> dict[str, float]:
    metrics, user = ScenarioMetrics(schema), [feature.name for feature in schema.features].index(schema.user)
    model.eval()
    # Alone, for the metrics are summed over ranks.
    with torch.no_grad(), open_world():
        for ids, scenario, truth in PlainRows(run.data_here / "valid", schema, run.loader.batch_size):
            metrics.update(scenario, ids[user], model(ids, scenario), truth, torch.ones_like(truth))
        report = metrics.compute()
    model.train()
    assert report is not None
    return report.flat("valid")


def _cpu_of_family() -> float:
    """CPU-seconds of this process and of children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def planted_data(rows: int = 300_000) -> Path:
    """Planted data of five scenarios, made once."""
    folder = DATA / "throughput"
    if not folder.exists():
        prepare(parse(Synthetic, {"kind": "synthetic", "rows": rows}, "throughput"), folder)
    return folder


def wide_data() -> Path:
    """Many ids and long lists, made once."""
    folder = DATA / "throughput-wide"
    if folder.exists():
        return folder
    rng, partial = np.random.default_rng(0), folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    ids, lists = [f"id{n}" for n in range(WIDE_IDS)], [f"list{n}" for n in range(WIDE_LISTS)]
    schema = FeatureSchema(
        user=ids[0],
        item=ids[1],
        labels=(Label(name="click"),),
        scenarios=tuple(Scenario(id=s, name=f"scenario {s}") for s in range(5)),
        tables=tuple(Table(name=name, rows=100_000) for name in (*ids, *lists)),
        features=(
            *(Feature(name=name, table=name) for name in ids),
            *(Feature(name=name, table=name, pooling="sum") for name in lists),
        ),
    )
    schema.save(partial)
    columns: dict[str, Any] = {name: (rng.random(WIDE_ROWS) ** 3 * 100_000).astype(np.int64) for name in ids}
    for name in lists:
        lengths = rng.integers(0, 2 * WIDE_MEAN + 1, WIDE_ROWS)
        values = (rng.random(lengths.sum()) ** 3 * 100_000).astype(np.int64)
        columns[name] = pa.ListArray.from_arrays(np.cumsum([0, *lengths]).astype(np.int32), values)
    columns["click"] = rng.integers(0, 2, WIDE_ROWS).astype(np.uint8)
    columns["scenario"] = rng.integers(0, 5, WIDE_ROWS).astype(np.int32)
    write_split(partial / "train", schema, pa.table(columns).to_batches(), WIDE_ROWS, WIDE_ROWS, WIDE_ROWS)
    partial.rename(folder)
    return folder


def add(results: Path, line: dict[str, Any]) -> None:
    """Keep a line, with where and with what it was measured, and show it as a row of a table."""
    results.mkdir(parents=True, exist_ok=True)
    with open(results / f"{line['measured']}.jsonl", "a") as file:
        file.write(json.dumps(line | {"machine": machine(), "commit": commit_of_code()}) + "\n")
    flat = {key: value for key, value in line.items() if key not in ("rounds", "settings", "auc")}
    cells = [f"{key} {_text(value)}" for key, value in flat.items()]
    click.echo("| " + " | ".join(cells) + " |")


def _text(value: Any) -> str:
    return ", ".join(f"{k} {v:,}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def machine() -> dict[str, Any]:
    """What the figures depend on, beside the code."""
    packages = ("torch", "torchrec", "pyarrow")
    return {
        "cpu": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def _ratio(one: float, other: float) -> float:
    return one / other


if __name__ == "__main__":
    call_and_leave(main)
