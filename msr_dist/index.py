"""The items of every scenario as vectors to search among, and who finds what there.

RUN/index/
  manifest.json            which checkpoint, and what is there; it is written last
  items-SCENARIO.parquet   row, id, vector (fp16), by row
  items-SCENARIO.faiss     the same vectors as a graph for approximate search (HNSW; Malkov and Yashunin, 2018)
"""

import json
import logging
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pydantic import Field
from rich.table import Table
from rich.text import Text

from msr_dist.checkpoint import Checkpoints
from msr_dist.config import Config, parse
from msr_dist.data.derived import ANSWERS_FILE, write_question
from msr_dist.distributed import World, open_world
from msr_dist.evaluate import trained
from msr_dist.files import PARTIAL, write_whole
from msr_dist.recall import ranked
from msr_dist.retrieval import Vectors, catalogue_rows, encoded, query_rows, sides_of
from msr_dist.run import CHECKPOINTS, RunConfig
from msr_dist.schema import FeatureSchema, Scenario

log = logging.getLogger(__name__)

FOLDER, MANIFEST_FILE = "index", "manifest.json"
_MOST_ASKED = 1000
"""Users of each scenario by whom the graph is compared with exact search."""

Floats = npt.NDArray[np.float32]


class IndexConfig(Config):
    """How the graph is built and searched."""

    neighbours: int = Field(default=32, ge=2)
    """Edges of an item: more find better, and take more memory."""
    build_width: int = Field(default=200, ge=1)
    """Candidates that are looked at when an item is added."""
    search_width: int = Field(default=128, ge=1)
    """Candidates that are looked at in a search, or as many as are asked for."""
    k: int = Field(default=50, ge=1)
    """How many items a search is judged by."""


class ScenarioIndex(Config):
    """One scenario's items."""

    scenario: str
    items: int
    recall: float | None = None
    """Share of the exact k nearest that the graph finds; None where nobody asks."""
    exact_ms: float | None = None
    """Milliseconds of an exact search for one user, on one core."""
    graph_ms: float | None = None


class Manifest(Config):
    """What an index is."""

    format: Literal[1] = 1
    checkpoint: str
    width: int
    settings: IndexConfig
    scenarios: tuple[ScenarioIndex, ...]

    def table(self, title: str) -> Table:
        """The manifest for people."""
        table = Table(title=title)
        table.add_column("scenario")
        for heading in ("items", f"recall of the exact {self.settings.k}", "exact ms", "graph ms"):
            table.add_column(heading, justify="right")
        for each in self.scenarios:
            measured = (each.recall, each.exact_ms, each.graph_ms)
            cells = ["-" if value is None else f"{value:.4f}" for value in measured]
            # A name in brackets is no markup.
            table.add_row(Text(each.scenario), f"{each.items:,}", *cells)
        return table


@dataclass(frozen=True)
class Found:
    """An item that was retrieved."""

    place: int
    id: int | str
    about: str
    """Its text columns, where the data have any."""
    score: float
    """Cosine of the item's and the user's vector."""


def export_index(run: RunConfig, settings: IndexConfig) -> None:
    """Write the index of the newest checkpoint of `run`; a function for any launcher.

    Raises:
        ValueError: the model predicts labels, or the run has no complete checkpoint.
    """
    _require_towers(run)
    with open_world() as world:
        schema = run.read_schema()
        checkpoint = _newest(run, world)
        model = trained(run, schema, world).model
        items = encoded(run, catalogue_rows(run, schema, world), model, "item", world).everywhere(world)
        asking = encoded(run, query_rows(run, schema, run.evaluation.final, world), model, "user", world)
        users = asking.everywhere(world)
        if world.rank == 0:
            _write(run, schema, settings, checkpoint, items, users)


def read_manifest(run: RunConfig) -> Manifest:
    """What the index of `run` is; ValueError where there is none."""
    file = run.folder / FOLDER / MANIFEST_FILE
    if not file.is_file():
        raise ValueError(f"{run.folder}: no index there; make it with `msr-dist export-index {run.folder}`")
    return parse(Manifest, json.loads(file.read_text()), where=str(file))


def retrieve(run: RunConfig, user: str, scenario: str, k: int) -> list[Found]:
    """The `k` items of `scenario` that are nearest to `user` (a raw id) and that the user has not chosen before.

    The user is as in the scenario's newest training row, or where it has none in that of any. Of the networks, the
    scenario's own branch alone is computed.

    Raises:
        ValueError: there is no index of the newest checkpoint, no such scenario, or no such user in the training data.
    """
    _require_towers(run)
    with open_world() as world:
        schema = run.read_schema()
        wanted = next((each for each in schema.scenarios if each.name == scenario), None)
        if wanted is None:
            known = ", ".join(each.name for each in schema.scenarios)
            raise ValueError(f"{run.data}: no scenario {scenario!r}; the data have {known}")
        manifest, checkpoint = read_manifest(run), _newest(run, world)
        if manifest.checkpoint != checkpoint:
            raise ValueError(
                f"{run.folder / FOLDER}: holds the items of {manifest.checkpoint}, the newest checkpoint is "
                f"{checkpoint}; make it again with `msr-dist export-index {run.folder}`"
            )
        row = _row_of(run.data_here, schema, user)
        with tempfile.TemporaryDirectory(prefix="question-") as folder:
            question = Path(folder) / "question"
            write_question(sides_of(run, schema, world), question, row, wanted.id)
            asking = encoded(run, question, trained(run, schema, world).model, "user", world)
            consumed = pq.read_table(question / ANSWERS_FILE)["consumed"][0].as_py()
        return _search(run, wanted, asking.vectors.numpy(), consumed, k, manifest.settings)


def _write(
    run: RunConfig, schema: FeatureSchema, settings: IndexConfig, checkpoint: str, items: Vectors, users: Vectors
) -> None:
    target = run.folder / FOLDER
    partial = target.with_name(FOLDER + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    names = _names(run.data_here, schema)
    written = []
    for scenario in schema.scenarios:
        offered = items.of(scenario.id)
        vectors = offered.vectors.half().float().numpy()
        columns = {
            "row": pa.array(offered.ids.numpy()),
            "id": names.take(pa.array(offered.ids.numpy())),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float16).ravel()), vectors.shape[1]),
        }
        pq.write_table(pa.table(columns), partial / _items_file(scenario), compression="zstd")
        graph = _graph(vectors, settings)
        faiss.write_index(graph, str(partial / _graph_file(scenario)))
        asked = users.of(scenario.id).vectors[:_MOST_ASKED].numpy()
        written.append(_compared(scenario, vectors, graph, asked, settings.k))
    manifest = Manifest(
        checkpoint=checkpoint, width=items.vectors.shape[1], settings=settings, scenarios=tuple(written)
    )
    write_whole(partial / MANIFEST_FILE, manifest.model_dump_json(indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _graph(vectors: Floats, settings: IndexConfig) -> Any:
    graph: Any = faiss.IndexHNSWFlat(vectors.shape[1], settings.neighbours, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = settings.build_width
    graph.hnsw.efSearch = max(settings.search_width, settings.k)
    if len(vectors):
        graph.add(vectors)
    return graph


def _compared(scenario: Scenario, vectors: Floats, graph: Any, asked: Floats, k: int) -> ScenarioIndex:
    """How often the graph finds what exact search finds, and how fast; a user after the other, as they come."""
    if not len(asked) or not len(vectors):
        return ScenarioIndex(scenario=scenario.name, items=len(vectors))
    k = min(k, len(vectors))
    begun = time.perf_counter()
    exact = [ranked(torch.from_numpy(each[None]), torch.from_numpy(vectors), k, [])[0].numpy() for each in asked]
    between = time.perf_counter()
    near = [graph.search(each[None], k)[1][0] for each in asked]
    ended = time.perf_counter()
    return ScenarioIndex(
        scenario=scenario.name,
        items=len(vectors),
        recall=float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(exact, near, strict=True)])),
        exact_ms=1000 * (between - begun) / len(asked),
        graph_ms=1000 * (ended - between) / len(asked),
    )


def _search(
    run: RunConfig, scenario: Scenario, user: Floats, consumed: list[int], k: int, settings: IndexConfig
) -> list[Found]:
    folder = run.folder / FOLDER
    items = pq.read_table(folder / _items_file(scenario), columns=["row", "id"])
    rows = items["row"].to_numpy()
    graph: Any = faiss.read_index(str(folder / _graph_file(scenario)))
    had = np.flatnonzero(np.isin(rows, consumed))
    wanted = min(k + len(had), len(rows))
    graph.hnsw.efSearch = max(settings.search_width, wanted)
    scores, places = graph.search(user, max(1, wanted))
    new = [(int(place), float(score)) for place, score in zip(places[0], scores[0], strict=True) if place >= 0]
    new = [pair for pair in new if pair[0] not in set(had.tolist())][:k]
    texts = _texts(run.data_here, [int(rows[place]) for place, _ in new])
    return [
        Found(rank, items["id"][place].as_py(), texts.get(int(rows[place]), ""), score)
        for rank, (place, score) in enumerate(new, start=1)
    ]


def _require_towers(run: RunConfig) -> None:
    if not run.retrieves:
        raise ValueError(
            f"{run.folder}: model.kind {run.model.kind!r} predicts labels and retrieves nothing; train 'sass' or "
            "'two_tower'"
        )


def _newest(run: RunConfig, world: World) -> str:
    found = Checkpoints(run.folder / CHECKPOINTS, run.checkpoint, world).newest()
    if found is None:
        raise ValueError(f"{run.folder}: no checkpoint there; train the run first")
    return found.folder.name


def _row_of(data: Path, schema: FeatureSchema, user: str) -> int:
    """The row of a raw id."""
    file = data / "vocabulary" / f"{schema.user_table.name}.parquet"
    table = pq.read_table(file, columns=["row", "id"])
    found = table.filter(pc.equal(pc.cast(table["id"], pa.string()), user))
    if not found.num_rows:
        raise ValueError(f"{file}: there is no user {user!r}; training has no rows of that id")
    return int(found["row"][0].as_py())


def _names(data: Path, schema: FeatureSchema) -> pa.ChunkedArray:
    """Raw ids of items by row."""
    table = pq.read_table(data / "vocabulary" / f"{schema.item_table.name}.parquet", columns=["row", "id"])
    ids = table["id"].combine_chunks()
    places = np.zeros(schema.item_table.rows, dtype=np.int64)
    places[table["row"].to_numpy()] = np.arange(len(table))
    return pa.chunked_array([ids.take(pa.array(places))])


def _texts(data: Path, rows: list[int]) -> dict[int, str]:
    """What is written about items, by row."""
    file = data / "items.parquet"
    if not file.is_file():
        return {}
    table = pq.read_table(file, filters=[("row", "in", rows)]) if rows else pq.read_table(file).slice(0, 0)
    texts = [name for name in table.column_names if name not in ("row", "id")]
    return {
        line["row"]: next((" ".join(str(line[name]).split()) for name in texts if line[name]), "")
        for line in table.to_pylist()
    }


def _items_file(scenario: Scenario) -> str:
    return f"items-{scenario.id}.parquet"


def _graph_file(scenario: Scenario) -> str:
    return f"items-{scenario.id}.faiss"
