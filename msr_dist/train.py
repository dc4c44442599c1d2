"""The whole training run, top to bottom, the same under every launcher."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from msr_dist import stopping
from msr_dist.batch import ScenarioBatch
from msr_dist.checkpoint import Checkpoint, Checkpoints, TrainState
from msr_dist.config import dump
from msr_dist.data.derived import ROWS, read_summary
from msr_dist.data.loader import Loader
from msr_dist.data.order import Order
from msr_dist.data.parquet import ParquetSource
from msr_dist.data.places import Place
from msr_dist.distributed import Vote, World, open_world
from msr_dist.evaluate import evaluation_loader, judge, metrics_file, write_report
from msr_dist.files import write_whole
from msr_dist.guard import Guard
from msr_dist.metrics import Report
from msr_dist.models.objectives import Contrastive, Labels
from msr_dist.parallel import Sharded
from msr_dist.progress import Progress
from msr_dist.recall import RetrievalReport
from msr_dist.recommender import module_name
from msr_dist.retrieval import coverage, stage_rows, views_apart
from msr_dist.run import CHECKPOINTS, CONFIG_FILE, PLAN_FILE, RunConfig, say_untaught
from msr_dist.schema import FeatureSchema
from msr_dist.tracking import Load, Tracker, open_tracker
from msr_dist.vocabulary import WAYS, usage
from msr_dist.watch import watching

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """What stays the same through all stages of a run in one process."""

    run: RunConfig
    world: World
    schema: FeatureSchema
    feeds: tuple["Feed", ...]
    """For each stage, what it trains on."""
    checkpoints: Checkpoints
    tracker: Tracker
    validated: Callable[[int, Report | RetrievalReport], None] | None
    show: Callable[[str, int, Mapping[str, float]], None] | None

    def steps_before(self, stage: int) -> int:
        """Steps of all stages before the one of that index."""
        return sum(self.run.stages[index].epochs * self.feeds[index].loader.order.steps for index in range(stage))


@dataclass(frozen=True)
class Feed:
    """The rows of a stage."""

    loader: Loader
    source: ParquetSource
    made: Path | None
    """The folder of rows that were made for the stage, and of what is known of them."""


def train(
    run: RunConfig,
    validated: Callable[[int, Report | RetrievalReport], None] | None = None,
    show: Callable[[str, int, Mapping[str, float]], None] | None = None,
) -> None:
    """Train `run` from its newest checkpoint, or from the start, to its end, and evaluate it on the split `final`.

    Every process calls this with the same `run`, whose folder exists. `validated` is called on rank 0 after each
    evaluation of the valid split, with the epochs done in all stages; what it raises ends the run. `show` is called on
    every rank with the stage, the rank and its values whenever some are tracked.

    Raises:
        ValueError: the data, the configuration or a checkpoint do not fit together; the message says where.
        Stopped: it was asked to stop, by a signal or its launcher; all that was done is saved.
    """
    with open_world() as world, run.locked(world):
        schema = run.read_schema()
        say_untaught(schema, world)
        feeds = tuple(_feed(run, schema, index, world) for index in range(len(run.stages)))
        checkpoints = Checkpoints(run.folder / CHECKPOINTS, run.checkpoint, world)
        found = checkpoints.newest()
        with (
            open_tracker(run.tracking, world.rank, run.folder, dump(run)) as tracker,
            watching(run.watch, run.folder, world),
            checkpoints,
        ):
            session = Session(run, world, schema, feeds, checkpoints, tracker, validated, show)
            # What follows the stages needs no saving: it may be ended at any time, and starts anew.
            with stopping.on_signals(alone=world.world_size == 1):
                for index in range(found.state.stage if found else 0, len(run.stages)):
                    sharded = run.build(schema, index, world)
                    _keep_plan(session, sharded)
                    state = _restore(session, sharded, found, index)
                    found = _train_stage(session, sharded, state) or found
                if Vote().passed(stopping.asked(), now=True):
                    raise stopping.Stopped("stopped before the last evaluation; the same command goes on with it")
            split = run.evaluation.final
            report = judge(run, schema, sharded.model, split, world)
            if report is not None:
                write_report(report, metrics_file(run.folder, split))
                tracker.log(report.flat(split), session.steps_before(len(run.stages)))
                tracker.artifact(metrics_file(run.folder, split))


def check(run: RunConfig, world_size: int) -> None:
    """Raise what `train` would raise about configuration, schema and file footers, before any worker starts."""
    schema = run.read_schema()
    run.check_tables(schema)
    run.recommender(schema, 0)
    source = ParquetSource(run.data / "train", schema)
    Loader(source, schema, _order(run, source, run.data / "train"), 0, world_size, run.loader)
    for split in {"valid", run.evaluation.final}:
        evaluation_loader(run, schema, split, 0, world_size)


def fewer_workers(run: RunConfig, least: int | None, workers: int) -> tuple[int, ...]:
    """Numbers of workers below `workers`, from `least` on, that the run can go on with while a cluster is short.

    Raises:
        ValueError: `least` is more than `workers`, or the run is bound to one number.
    """
    if least is None:
        return ()
    if least > workers:
        raise ValueError(f"--min-workers {least} is more than --workers {workers}: give at most as many")
    fixed = [f"tables.{name}.ranks" for name, table in run.parallel.tables.items() if table.ranks is not None]
    if run.parallel.plan is not None or fixed:
        named = fixed[0] if fixed else "plan"
        raise ValueError(f"parallel.{named} is for one number of workers: leave it out, or --min-workers")
    opened = [table.rows for table in run.read_schema().tables if table.is_open]
    sizes = [
        size
        for size in range(least, workers)
        if run.loader.partitions % size == 0 and not any(rows % (WAYS * size) for rows in opened)
    ]
    if least < workers and not sizes:
        raise ValueError(
            f"--min-workers {least}: no number from {least} to {workers - 1} divides loader.partitions = "
            f"{run.loader.partitions}{' and rows of open tables' if opened else ''}; give a smaller one"
        )
    return tuple(sizes)


def _feed(run: RunConfig, schema: FeatureSchema, index: int, world: World) -> Feed:
    """What the stage of that index trains on."""
    objective = run.objective(index)
    rows, made = run.data / "train", None
    if not isinstance(objective, Labels):
        made = stage_rows(run, schema, index, world)
        schema, rows = FeatureSchema.read(made), made / ROWS
    together = 2 if isinstance(objective, Contrastive) else 1
    source = ParquetSource(rows, schema)
    order = _order(run, source, rows, together)
    return Feed(Loader(source, schema, order, world.rank, world.world_size, run.loader, together), source, made)


def _order(run: RunConfig, source: ParquetSource, folder: Place, together: int = 1) -> Order:
    try:
        return Order(
            group_rows=tuple(group.rows // together for group in source.row_groups),
            num_partitions=run.loader.partitions,
            batch_size=run.loader.batch_size,
            seed=run.seed,
            window_rows=run.loader.window_rows if run.loader.shuffle else None,
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error} (loader.partitions, loader.batch_size)") from None


def _restore(session: Session, sharded: Sharded, found: Checkpoint | None, index: int) -> TrainState:
    """The state to go on from: within stage `index`, or at its start with the weights of the stage before."""
    order = session.feeds[index].loader.order
    first = session.run.epochs_before(index) * order.steps
    if found is None:
        return TrainState()
    if found.state.stage != index:
        found.restore({name: tensor for name, tensor in sharded.tensors().items() if name.startswith("model/")})
        return TrainState(stage=index, samples=order.samples(first))
    expected = order.samples(first + found.state.step)
    if found.state.samples != expected:
        raise ValueError(
            f"checkpoint {found.folder} was written after {found.state.samples} rows, but the training data now make "
            f"{expected} by that step: the data have changed since; restore them, or start a run of another name"
        )
    sharded.allocate_state()
    found.restore(sharded.tensors())
    sharded.set_step(found.state.step)
    log.info("resuming from %s", found.folder)
    return found.state


def _train_stage(session: Session, sharded: Sharded, state: TrainState) -> Checkpoint | None:
    """Run the rest of a stage; the checkpoint of its end, or None where nothing was left to do."""
    run, world, feed = session.run, session.world, session.feeds[state.stage]
    stage, order = run.stages[state.stage], feed.loader.order
    # Epochs, hence orders, are counted through all stages, and so are the steps of tracked values.
    first, steps = run.epochs_before(state.stage) * order.steps, stage.epochs * order.steps
    tracked = session.steps_before(state.stage)
    batches = _Timed(feed.loader.batches(first + state.step, first + steps))
    pipeline = sharded.pipeline(world.device)
    progress = Progress(stage.name, steps, done=state.step, shown=world.rank == 0)
    meter, vote = _Meter(state, batches), Vote()
    guard = Guard(run.guard, stage.name, feed.loader, feed.source, first, world)
    end: Checkpoint | None = None
    shown: dict[str, str] = {}
    pairs = feed.made if isinstance(run.objective(state.stage), Contrastive) else None
    if pairs is not None and state.step == 0:
        shares = coverage(read_summary(pairs))
        session.tracker.log({f"{stage.name}/{name}": value for name, value in shares.items()}, tracked)
    for step in range(state.step, steps):
        sharded.scale_learning_rates(stage.schedule.factor(step, steps), tables=float(step >= stage.frozen_tables))
        # Our models do not draw from this generator; a model from outside that does, resumes with the same numbers.
        torch.manual_seed(hash((run.seed, state.stage, step, world.rank)))
        predictions = pipeline.progress(batches)
        meter.add(predictions.loss)
        state = TrainState(stage=state.stage, step=step + 1, samples=order.samples(first + step + 1))
        epoch_ends = state.step % order.steps == 0
        stops = vote.passed(stopping.asked(), now=state.step == steps)
        saves = epoch_ends or stops or run.checkpoint.due(state.step)
        guard.add(state.step, predictions, look=saves)
        # A few strange rows may pass, but nothing is saved while they do, unless nothing comes after.
        saves = saves and not (guard.doubts and state.step < steps)
        if saves:
            guard.require_sound(state.step, sharded.tensors())
        if saves or state.step % run.log_every == 0:
            overall, ranks = meter.read(state, world)
            values = overall | {"lr_factor": stage.schedule.factor(step, steps)}
            values |= {name: max(taken[name] for taken in ranks) for name in ranks[0]}
            if run.tracking.each_rank:
                values |= {
                    f"rank-{rank}/{name}": used for rank, taken in enumerate(ranks) for name, used in taken.items()
                }
                session.tracker.log(meter.loads(world), tracked + state.step)
            for table, used in usage(sharded.model, world).items():
                values |= {f"tables/{_raw_name(session.schema, table)}/{name}": value for name, value in used.items()}
            session.tracker.log({f"{stage.name}/{name}": value for name, value in values.items()}, tracked + state.step)
            if session.show is not None:
                session.show(stage.name, world.rank, (values if world.rank == 0 else {}) | ranks[world.rank])
            shown = {"loss": f"{overall['loss']:.4f}", "samples/s": f"{overall['samples_per_second']:,.0f}"}
        progress.advance(values=shown)
        if epoch_ends and run.evaluation.validates_after(state.step // order.steps):
            pipeline.detach()
            if pairs is not None:
                apart = views_apart(run, pairs, sharded.model, world)
                session.tracker.log(
                    {f"{stage.name}/{name}": value for name, value in apart.items()}, tracked + state.step
                )
            else:
                report = judge(run, session.schema, sharded.model, "valid", world)
                if report is not None:
                    session.tracker.log(report.flat("valid"), tracked + state.step)
                    if session.show is not None:
                        session.show(stage.name, world.rank, report.flat("valid"))
                    if session.validated is not None:
                        session.validated(run.epochs_before(state.stage) + state.step // order.steps, report)
        if saves:
            end = Checkpoint(session.checkpoints.save(sharded.tensors(), state), state)
            meter.restart()
        if stops:
            session.checkpoints.finish()
            progress.close()
            saved = "is saved: the same command goes on from there"
            if not saves:
                saved = "is not saved, for its loss is far too large: the same command goes on from the save before"
            raise stopping.Stopped(f"stopped after step {state.step} of {steps} of stage {stage.name}, which {saved}")
    session.checkpoints.finish()
    progress.close()
    # The pipeline has replaced the lookup's forward by one that waits for batches of the pipeline's own.
    pipeline.detach()
    return end


def _raw_name(schema: FeatureSchema, module: str) -> str:
    """The table whose submodule is called `module`."""
    return next(table.name for table in schema.tables if module_name(table.name) == module)


def _keep_plan(session: Session, sharded: Sharded) -> None:
    if session.world.rank == 0:
        plan = session.run.folder / PLAN_FILE
        write_whole(plan, sharded.describe() + "\n")
        log.info("plan:\n%s", sharded.describe())
        for file in (session.run.folder / CONFIG_FILE, plan):
            session.tracker.artifact(file)


class _Timed:
    """Batches, and how long they were waited for."""

    def __init__(self, batches: Iterator[ScenarioBatch]) -> None:
        self._batches = batches
        self.waited = 0.0

    def __iter__(self) -> Iterator[ScenarioBatch]:
        return self

    def __next__(self) -> ScenarioBatch:
        begun = time.monotonic()
        try:
            return next(self._batches)
        finally:
            self.waited += time.monotonic() - begun


class _Meter:
    """Mean loss, rows per second, and what a step takes of each rank, since it was last read."""

    def __init__(self, state: TrainState, batches: _Timed) -> None:
        self._losses: list[Tensor] = []
        self._samples, self._batches = state.samples, batches
        self._process, self._load = psutil.Process(), Load()
        self.restart()

    def restart(self) -> None:
        """What has passed since it was read is no part of a step."""
        self._begun, self._waited = time.monotonic(), self._batches.waited

    def add(self, loss: Tensor) -> None:
        self._losses.append(loss)

    def loads(self, world: World) -> dict[str, float]:
        """The load of each rank's machine since it was last asked for; all ranks together."""
        own = self._load.read()
        gathered = world.gather(torch.tensor([list(own.values())], dtype=torch.float64)).tolist()
        return {
            f"system/rank-{rank}/{name}": value
            for rank, values in enumerate(gathered)
            for name, value in zip(own, values, strict=True)
        }

    def read(self, state: TrainState, world: World) -> tuple[dict[str, float], list[dict[str, float]]]:
        """What all ranks do together, and what each of them takes; all ranks together.

        The loss is averaged over steps and ranks.
        """
        # In double: the mean of a few steps shall not depend on how many ranks shared them.
        total = torch.stack(self._losses).double().sum().item()
        steps, seconds = len(self._losses), time.monotonic() - self._begun
        own = {
            "step_seconds": seconds / steps,
            "loader_wait_seconds": (self._batches.waited - self._waited) / steps,
            "memory_bytes": float(self._process.memory_info().rss),
        }
        if world.device.type == "cuda":
            own["gpu_memory_bytes"] = float(torch.cuda.max_memory_allocated())
        gathered = world.gather(torch.tensor([[total, *own.values()]], dtype=torch.float64))
        overall = {
            "loss": gathered[:, 0].sum().item() / world.world_size / steps,
            "samples_per_second": (state.samples - self._samples) / seconds,
        }
        self._losses, self._samples = [], state.samples
        self.restart()
        return overall, [dict(zip(own, values, strict=True)) for values in gathered[:, 1:].tolist()]
