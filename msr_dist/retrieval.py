"""Two towers from the run's side: the rows that each stage trains on, and how well they retrieve.

RUN/rows/
  stage-S/             rows of choices, or pairs of views: see `msr_dist.data.derived`
  catalogue/           the items of every scenario
  queries-SPLIT/       who asks, and the answers
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from msr_dist.batch import ScenarioBatch
from msr_dist.data.derived import (
    ANSWERS_FILE,
    ROWS,
    Sides,
    read_summary,
    write_catalogue,
    write_choices,
    write_pairs,
    write_queries,
)
from msr_dist.data.loader import Loader
from msr_dist.data.order import Order
from msr_dist.data.parquet import ParquetSource
from msr_dist.distributed import World
from msr_dist.models.objectives import Contrastive, Retrieval
from msr_dist.models.towers import TowersConfig
from msr_dist.progress import Progress
from msr_dist.recall import RetrievalReport, ranked, sums
from msr_dist.recommender import Side
from msr_dist.run import RunConfig
from msr_dist.schema import FeatureSchema

log = logging.getLogger(__name__)

FOLDER = "rows"
CATALOGUE = "catalogue"
_PROBED_STEPS = 8


def stage_rows(run: RunConfig, schema: FeatureSchema, index: int, world: World) -> Path:
    """The folder of the rows of a stage, made where it is not there; all ranks together."""
    objective = run.objective(index)
    folder = _place(run, f"stage-{index}")
    sides, name = sides_of(run, schema, world), run.stages[index].name
    if world.rank == 0:
        log.info("stage %s: its rows are made, unless they are there", name)
    if isinstance(objective, Retrieval):
        sides = replace(sides, label=objective.label)
        summary = write_choices(sides, folder, objective.shown_negatives, objective.uniform_negatives)
    else:
        assert isinstance(objective, Contrastive)
        summary = write_pairs(
            sides,
            folder,
            space=objective.space,
            most=objective.pairs,
            balance=objective.balance,
            users=objective.sides in ("both", "user"),
            items=objective.sides in ("both", "item"),
        )
    for line in told(summary) if world.rank == 0 else ():
        log.info("stage %s: %s", name, line)
    return folder


def told(summary: Mapping[str, Any]) -> list[str]:
    """What a summary of a stage's rows says, in lines for people."""
    if "choices" in summary:
        return [
            f"{sum(summary['choices'].values()):,} choices, {summary['shown']:,} shown rows and {summary['drawn']:,} "
            "drawn items as negatives beside the batch's own"
        ]
    return [
        f"{part['paired']:,} of {part['entities']:,} {side}s ({_share(part['paired'], part['entities'])}) with "
        f"{_share(part['paired_rows'], part['rows'])} of the traffic give {part['pairs']:,} pairs of scenarios"
        for side, part in summary.items()
    ]


def coverage(summary: Mapping[str, Any]) -> dict[str, float]:
    """Shares of users, items and their training rows that give pairs, as values to track."""
    shares = {}
    for side, part in summary.items():
        shares[f"coverage/{side}s"] = part["paired"] / max(1, part["entities"])
        shares[f"coverage/{side}_traffic"] = part["paired_rows"] / max(1, part["rows"])
    return shares


def evaluate_retrieval(
    run: RunConfig, schema: FeatureSchema, model: nn.Module, split: str, world: World
) -> RetrievalReport | None:
    """Metrics of `split` on rank 0; None elsewhere. All ranks together; changes nothing in `model`."""
    queries = query_rows(run, schema, split, world)
    items = encoded(run, catalogue_rows(run, schema, world), model, "item", world).everywhere(world)
    asking = encoded(run, queries, model, "user", world)
    answers = _Answers.read(queries / ANSWERS_FILE)
    top_k = sorted(set(run.evaluation.top_k))
    names = [f"{metric}_at_{k}" for k in top_k for metric in ("recall", "ndcg", "hit_rate")]
    totals = torch.zeros(len(schema.scenarios), len(names) + 1, dtype=torch.float64)
    counts = {}
    for scenario in schema.scenarios:
        offered, here = items.of(scenario.id), asking.of(scenario.id)
        counts[scenario.name] = len(offered.ids)
        if not len(here.ids):
            continue
        truth, consumed = answers.of(scenario.id, here.ids)
        places = ranked(here.vectors, offered.vectors, top_k[-1], [offered.places(each) for each in consumed])
        found = sums(places, [offered.places(each) for each in truth], top_k)
        totals[scenario.id] = torch.tensor([len(here.ids), *(found[name] for name in names)], dtype=torch.float64)
    world.sum(totals)
    if world.rank:
        return None
    summary = read_summary(queries)
    return RetrievalReport(
        scenarios={
            scenario.name: dict(zip(names, (line[1:] / line[0]).tolist(), strict=True)) if line[0] else {}
            for scenario, line in zip(schema.scenarios, totals, strict=True)
        },
        queries={each.name: int(totals[each.id, 0]) for each in schema.scenarios},
        items=counts,
        left_out={reason: summary[reason] for reason in ("of_unknown_users", "of_unknown_items", "repeated")},
    )


def catalogue_rows(run: RunConfig, schema: FeatureSchema, world: World) -> Path:
    """The folder of the items of every scenario, made where it is not there; all ranks together."""
    folder = _place(run, CATALOGUE)
    write_catalogue(sides_of(run, schema, world), folder)
    return folder


def query_rows(run: RunConfig, schema: FeatureSchema, split: str, world: World) -> Path:
    """The folder of who asks in `split`, made where it is not there; all ranks together."""
    folder = _place(run, f"queries-{split}")
    write_queries(sides_of(run, schema, world), folder, split)
    return folder


def _place(run: RunConfig, name: str) -> Path:
    (run.folder / FOLDER).mkdir(exist_ok=True)
    return run.folder / FOLDER / name


def views_apart(run: RunConfig, folder: Path, model: nn.Module, world: World) -> dict[str, float]:
    """How near two scenarios' views of one user, or item, are, and how well a view tells its scenario, by side.

    Where contrast has collapsed the views, all are alike: the cosine of any two users' is near 1 as well, and a linear
    probe (ridge regression on one half of the views, judged on the other) finds the scenario no more often than by
    always guessing the most frequent.
    """
    loader = rows_loader(run, folder, world, run.loader.batch_size, together=2)
    measured: dict[str, float] = {}
    sides: tuple[Side, Side] = ("user", "item")
    for label, side in enumerate(sides):
        vectors, scenarios = [], []
        for batch in loader.batches(0, min(_PROBED_STEPS, loader.order.steps)):
            mine = (batch.weights[:, label] * batch.labels[:, label] > 0).nonzero().squeeze(1)
            vectors.append(_vectors(model, batch.to(world.device), side).cpu()[mine])
            scenarios.append(batch.scenario[mine])
        views, scenario = world.gather(torch.cat(vectors)), world.gather(torch.cat(scenarios))
        if len(views) < 4:
            continue
        first, second = views[0::2], views[1::2]
        # Others of the same two scenarios, which is all that their cosine shall not depend on.
        kind = scenario[0::2] * (int(scenario.max()) + 1) + scenario[1::2]
        order = torch.argsort(kind, stable=True)
        alike = kind[order] == kind[order.roll(1)]
        others = (first[order] * second[order.roll(1)]).sum(1)[alike]
        measured[f"{side}_cosine"] = (first * second).sum(1).mean().item()
        measured[f"{side}_cosine_of_others"] = others.mean().item() if len(others) else 0.0
        measured[f"{side}_scenario_probe"], measured[f"{side}_scenario_guess"] = _probe(views, scenario)
    return measured


@dataclass(frozen=True)
class Vectors:
    """Vectors of users or items in scenarios."""

    scenario: Tensor
    """`[N]` int64."""
    ids: Tensor
    """`[N]` int64: rows of the table."""
    vectors: Tensor
    """`[N, d]` fp32."""

    def everywhere(self, world: World) -> "Vectors":
        """Those of all ranks, on every rank, by scenario and id."""
        scenario, ids = world.gather(self.scenario), world.gather(self.ids)
        order = torch.argsort(ids, stable=True)
        order = order[torch.argsort(scenario[order], stable=True)]
        return Vectors(scenario[order], ids[order], world.gather(self.vectors)[order])

    def of(self, scenario: int) -> "Vectors":
        """Those of one scenario."""
        here = self.scenario == scenario
        return Vectors(self.scenario[here], self.ids[here], self.vectors[here])

    def places(self, ids: Tensor) -> Tensor:
        """Where `ids` stand, of those that do; the ids of these vectors ascend."""
        place = torch.searchsorted(self.ids, ids)
        there = (place < len(self.ids)) & (self.ids[place.clamp(max=len(self.ids) - 1)] == ids)
        return place[there]


def encoded(run: RunConfig, folder: Path, model: nn.Module, side: Side, world: World) -> Vectors:
    """Vectors of a side, of those rows in `folder` that are this rank's to read."""
    schema = FeatureSchema.read(folder)
    loader = rows_loader(run, folder, world, run.evaluation.batch_size)
    name, table = (schema.user, schema.user_table) if side == "user" else (schema.item, schema.item_table)
    progress = Progress(f"vectors of {folder.name}", loader.order.steps, shown=world.rank == 0)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in loader.batches(0, loader.order.steps):
        real = batch.row >= 0
        ids = batch.ids[name].values() // schema.copies(table)
        vectors = _vectors(model, batch.to(world.device), side).cpu()
        parts.append((batch.scenario[real], ids[real], vectors[real]))
        progress.advance()
    progress.close()
    scenario, ids, vectors = (torch.cat(each) for each in zip(*parts, strict=True))
    return Vectors(scenario, ids, vectors.float())


def rows_loader(run: RunConfig, folder: Path, world: World, batch_size: int, together: int = 1) -> Loader:
    """Batches of all rows in `folder`, in the order of its files."""
    schema = FeatureSchema.read(folder)
    source = ParquetSource(folder / ROWS, schema)
    order = Order(
        group_rows=tuple(group.rows // together for group in source.row_groups),
        num_partitions=world.world_size,
        batch_size=batch_size,
        window_rows=None,
    )
    return Loader(source, schema, order, world.rank, world.world_size, run.loader, together)


def _vectors(model: nn.Module, batch: ScenarioBatch, side: Side) -> Tensor:
    training = model.training
    model.eval()
    with torch.no_grad():
        vectors: Tensor = model(batch, side)
    model.train(training)
    return vectors


def sides_of(run: RunConfig, schema: FeatureSchema, world: World) -> Sides:
    """The data of `run`, by side; its last stage says what a choice is, and rank 0 is the one that writes."""
    objective = run.objective(len(run.stages) - 1)
    assert isinstance(run.model, TowersConfig)
    assert isinstance(objective, Retrieval)
    limit, writes = run.loader.memory_limit, world.rank == 0
    return Sides(run.data_here, schema, run.model.user_groups, objective.label, run.seed, limit, writes)


def _share(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.1%}"


def _probe(views: Tensor, scenario: Tensor) -> tuple[float, float]:
    """Accuracy of the linear probe, and of always guessing the most frequent scenario."""
    x = torch.cat([views, torch.ones(len(views), 1)], dim=1).double()
    half = len(x) // 4 * 2
    wanted = torch.nn.functional.one_hot(scenario).double()
    square = x[:half].T @ x[:half] + 1e-3 * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(square, x[:half].T @ wanted[:half])
    right = (x[half:] @ weights).argmax(1) == scenario[half:]
    return right.double().mean().item(), wanted[half:].mean(0).max().item()


@dataclass(frozen=True)
class _Answers:
    """What was chosen, and what had been before, by scenario and user."""

    scenario: Tensor
    user: Tensor
    truth: Any
    consumed: Any

    @classmethod
    def read(cls, file: Path) -> "_Answers":
        table = pq.read_table(file).combine_chunks()
        scenario, user = (torch.from_numpy(table[name].to_numpy().astype("int64")) for name in ("scenario", "user"))
        return cls(scenario, user, table["truth"], table["consumed"])

    def of(self, scenario: int, users: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """For each of `users` in that scenario, rows of the items."""
        first = int(torch.searchsorted(self.scenario, scenario))
        here = self.user[self.scenario == scenario]
        rows = (first + torch.searchsorted(here, users)).numpy()
        truth, consumed = (
            [torch.tensor(each.values.to_numpy()) for each in column.take(rows)]
            for column in (self.truth, self.consumed)
        )
        return truth, consumed
