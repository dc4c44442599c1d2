"""Per-scenario quality of a trained run on one split."""

import json
import logging
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from msr_dist.checkpoint import Checkpoints
from msr_dist.data.loader import Loader
from msr_dist.data.order import Order
from msr_dist.data.parquet import ParquetSource
from msr_dist.distributed import World, open_world
from msr_dist.files import write_whole
from msr_dist.metrics import Report, ScenarioMetrics
from msr_dist.parallel import Sharded
from msr_dist.progress import Progress
from msr_dist.recall import RetrievalReport
from msr_dist.retrieval import evaluate_retrieval
from msr_dist.run import CHECKPOINTS, METRICS_FILE, RunConfig, say_untaught
from msr_dist.schema import FeatureSchema
from msr_dist.watch import watching

log = logging.getLogger(__name__)


def evaluate(run: RunConfig, split: str) -> None:
    """Evaluate the newest checkpoint of `run` on `split` and write its metrics file; a function for any launcher.

    Raises:
        ValueError: the run has no complete checkpoint, or another model's; the split is absent or damaged.
    """
    with open_world() as world, watching(run.watch, run.folder, world):
        schema = run.read_schema()
        say_untaught(schema, world)
        report = judge(run, schema, trained(run, schema, world).model, split, world)
        if report is not None:
            write_report(report, metrics_file(run.folder, split))


def trained(run: RunConfig, schema: FeatureSchema, world: World) -> Sharded:
    """The model of `run` with the weights of its newest checkpoint; all ranks together.

    Raises:
        ValueError: there is no complete checkpoint, or it is another model's.
    """
    found = Checkpoints(run.folder / CHECKPOINTS, run.checkpoint, world).newest()
    if found is None:
        raise ValueError(f"{run.folder}: no checkpoint there; train the run first")
    sharded = run.build(schema, min(found.state.stage, len(run.stages) - 1), world)
    found.restore({name: tensor for name, tensor in sharded.tensors().items() if name.startswith("model/")})
    return sharded


def judge(
    run: RunConfig, schema: FeatureSchema, model: nn.Module, split: str, world: World
) -> Report | RetrievalReport | None:
    """What the model is worth on `split`, by what it is for; on rank 0 alone, all ranks together."""
    if run.retrieves:
        return evaluate_retrieval(run, schema, model, split, world)
    return evaluate_split(run, schema, model, split, world)


def evaluate_split(run: RunConfig, schema: FeatureSchema, model: nn.Module, split: str, world: World) -> Report | None:
    """Metrics over all rows of `split`, on rank 0; None elsewhere. All ranks together; changes nothing in `model`."""
    loader = evaluation_loader(run, schema, split, world.rank, world.world_size)
    metrics = ScenarioMetrics(schema)
    copies = schema.copies(schema.user_table)
    progress = Progress(f"evaluate {split}", loader.order.steps, shown=world.rank == 0)
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in loader.batches(0, loader.order.steps):
            user = batch.ids[schema.user].values() // copies
            _, predictions = model(batch.to(world.device))
            metrics.update(batch.scenario, user, predictions.logits, batch.labels, batch.weights)
            progress.advance()
    progress.close()
    model.train(training)
    return metrics.compute()


def evaluation_loader(run: RunConfig, schema: FeatureSchema, split: str, rank: int, world_size: int) -> Loader:
    """Batches of `split` in the order of its files; no row is left out, none comes twice."""
    source = ParquetSource(run.data / split, schema)
    try:
        order = Order(
            group_rows=tuple(group.rows for group in source.row_groups),
            num_partitions=world_size,
            batch_size=run.evaluation.batch_size,
            window_rows=None,
        )
    except ValueError as error:
        raise ValueError(f"{run.data / split}: {error} (each worker is one, evaluation.batch_size)") from None
    return Loader(source, schema, order, rank, world_size, run.loader)


def metrics_file(folder: Path, split: str) -> Path:
    """Where the metrics of a split stand; the test split's have the plain name."""
    return folder / (METRICS_FILE if split == "test" else f"metrics-{split}.json")


def report_table(run: RunConfig, split: str) -> Table:
    """The metrics of a split for people, beside the best possible ones where the data were planted."""
    planted = run.data / "oracle.json"
    oracle = json.loads(planted.read_bytes()) if split == "test" and planted.is_file() else None
    raw, title = json.loads(metrics_file(run.folder, split).read_text()), f"{run.name}: {split} split"
    return (RetrievalReport if run.retrieves else Report).from_json(raw).table(oracle, title)


def write_report(report: Report | RetrievalReport, file: Path) -> None:
    """Write `report` as JSON."""
    write_whole(file, json.dumps(report.to_json(), indent=1) + "\n")
