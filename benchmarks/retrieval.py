"""Compares models that retrieve: the same data, the same search budget, several seeds, and two that learn nothing.

python benchmarks/retrieval.py run benchmarks/grids/retrieval.toml
python benchmarks/retrieval.py report benchmarks/grids/retrieval.toml
"""

import copy
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import click

# A run has one core wherever it stands; libraries read this when they are loaded.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

import numpy as np
import pyarrow.parquet as pq
import torch
from pydantic import Field
from quality_grid import DataConfig, SearchConfig, Value, commit_of_code, settings_of
from scipy import sparse, stats

from msr_dist.config import Config, dump, kind_config, load, merge, parse
from msr_dist.data.derived import ANSWERS_FILE, ROWS, read_summary
from msr_dist.distributed import open_world
from msr_dist.evaluate import metrics_file
from msr_dist.files import write_whole
from msr_dist.launch import call_and_leave, log_to_stderr
from msr_dist.progress import Progress
from msr_dist.recall import RetrievalReport, sums
from msr_dist.retrieval import catalogue_rows, query_rows
from msr_dist.run import RunConfig
from msr_dist.schema import FeatureSchema
from msr_dist.train import train
from msr_dist.workers import Lost, Workers

RESULTS = Path(__file__).parent / "results"
_PATH = click.Path(path_type=Path)
_METRICS = ("recall", "ndcg", "hit_rate")


class ModelConfig(Config):
    """What a model of the grid changes in the run that all share."""

    set: tuple[str, ...] = ()
    """Overrides such as "model.kind='two_tower'"; a stage is called by its name: "stages.finetune.epochs=4"."""
    stages: tuple[str, ...] | None = None
    """The stages that it goes through; by default all."""
    untrained: Literal["popularity", "item_item"] | None = None
    """It learns nothing: a scenario's most chosen items, or those that go with what the user chose anywhere."""

    @property
    def set_of_model(self) -> list[str]:
        """The overrides of the model's own section."""
        return [each for each in self.set if each.strip().startswith("model.")]


class GridConfig(Config):
    """Models x data sets x seeds."""

    seeds: tuple[int, ...] = Field(default=(0, 1, 2, 3, 4), min_length=1)
    judge: str = "recall_at_20"
    """What trials are chosen and models compared by: its mean over scenarios."""
    against: tuple[tuple[str, str], ...] = ()
    """Pairs of models, of which the first should be better."""
    run: dict[str, Any] = {}
    """Keys of a run's configuration that all runs share."""
    search: SearchConfig = SearchConfig()
    """Its keys, as those of `data.set`, call a stage by its name; what a model does not have is left out for it."""
    data: tuple[DataConfig, ...] = Field(min_length=1)
    models: dict[str, ModelConfig] = Field(min_length=1)


@dataclass(frozen=True)
class Piece:
    """A run to do."""

    key: str
    model: str
    data: str
    seed: int
    split: str
    chosen: str
    """JSON."""
    run: str
    """TOML."""
    untrained: str | None

    def __str__(self) -> str:
        return f"{self.data}-{self.model}-{self.split}-{self.seed}"


class Grid:
    """A grid's file and what stands in its results."""

    def __init__(self, file: Path, results: Path) -> None:
        self.config = load(GridConfig, file)
        self.file, self.folder = file, results / file.stem
        self._digests = {data.name: data.digest() for data in self.config.data if data.here}

    def lines(self, data: str, split: str) -> dict[str, dict[str, Any]]:
        """Results by key."""
        file = self._file(data, split)
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        # Found anew: a setting that a run has since, with a default, makes no other run of it.
        keys = [key_of(line, split) for line in lines]
        return {key: line for key, line in zip(keys, lines, strict=True) if key}

    def record(self, piece: Piece, outcome: dict[str, Any]) -> None:
        """Add a line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {
            "model": piece.model,
            "data": piece.data,
            "seed": piece.seed,
            "chosen": json.loads(piece.chosen),
            "commit": commit_of_code(),
            "data_digest": self._digests[piece.data],
            "settings": _settings(parse(RunConfig, tomllib.loads(piece.run), where=str(piece))),
            "untrained": piece.untrained,
            **outcome,
        }
        with open(self._file(piece.data, piece.split), "a") as file:
            file.write(json.dumps(line) + "\n")

    def trials(self, data: DataConfig, model: str) -> list[Piece]:
        """The search of a model: pieces that end at the valid split."""
        if self.config.models[model].untrained:
            return []
        draws = self.config.search.draw(data)
        drawn = [{key: value for key, value in draw.items() if self._has(model, key)} for draw in draws]
        once = [trial for place, trial in enumerate(drawn) if trial not in drawn[:place]]
        return [self._piece(data, model, self.config.search.seed, trial, "valid") for trial in once]

    def final(self, data: DataConfig, model: str, seed: int) -> Piece | None:
        """The run of the best trial's settings with `seed`; None as long as trials are missing.

        What learns nothing is run with the first seed alone. None as well where every trial has failed.
        """
        if self.config.models[model].untrained and seed != self.config.seeds[0]:
            return None
        trials, known = self.trials(data, model), self.lines(data.name, "valid")
        if any(trial.key not in known for trial in trials):
            return None
        done = [trial for trial in trials if "failed" not in known[trial.key]]
        if trials and not done:
            return None
        best = max(done, key=lambda trial: self.worth(known[trial.key]), default=None)
        chosen = json.loads(best.chosen) if best else {}
        return self._piece(data, model, seed, chosen, "test")

    def worth(self, line: dict[str, Any]) -> float:
        """What the grid judges by."""
        return RetrievalReport.from_json(line["report"]).mean.get(self.config.judge, 0.0)

    def _file(self, data: str, split: str) -> Path:
        return self.folder / (f"{data}.jsonl" if split == "test" else f"{data}-search.jsonl")

    def _stages(self, model: str) -> list[str]:
        names = [stage["name"] for stage in self.config.run["stages"]]
        kept = self.config.models[model].stages
        return [name for name in names if kept is None or name in kept]

    def _has(self, model: str, key: str) -> bool:
        """Whether a setting is one of this model's."""
        section, name, *_ = key.split(".")
        if section == "stages":
            return name in self._stages(model)
        return section != "model" or name in self._fields(model)

    def _fields(self, model: str) -> Collection[str]:
        raw = merge({"model": self.config.run.get("model", {})}, self.config.models[model].set_of_model)
        return kind_config("msr_dist.models", raw["model"]["kind"]).model_fields

    def _piece(self, data: DataConfig, model: str, seed: int, chosen: dict[str, Value], split: str) -> Piece:
        config, stages = self.config.models[model], self._stages(model)
        raw = copy.deepcopy(self.config.run)
        raw["stages"] = [stage for stage in raw["stages"] if stage["name"] in stages]
        of_data = [each for each in data.set if self._has(model, each.partition("=")[0].strip())]
        given = [*of_data, *config.set, *(f"{key}={json.dumps(value)}" for key, value in chosen.items())]
        for place, name in enumerate(stages):
            given = [each.replace(f"stages.{name}.", f"stages.{place}.", 1) for each in given]
        evaluation = {"validate_epochs": 0, "final": split} | raw.pop("evaluation", {})
        raw |= {"name": "run", "seed": seed, "data": str(data.folder.absolute()), "evaluation": evaluation}
        raw["tracking"] = {"enabled": False}
        run = parse(RunConfig, merge(raw, given), where=f"{self.file}: {model} on {data.name}")
        key = _key(self._digests[data.name], run, config.untrained, split)
        return Piece(key, model, data.name, seed, split, json.dumps(chosen), dump(run), config.untrained)


def key_of(line: dict[str, Any], split: str) -> str | None:
    """The key that a line has under today's code; None where its settings are no longer known."""
    try:
        run = parse(RunConfig, {"name": "stored", "data": "."} | line["settings"], where="stored")
    except ValueError:
        return None
    return _key(line["data_digest"], run, line["untrained"], split)


def _key(data_digest: str, run: RunConfig, untrained: str | None, split: str) -> str:
    parts = [data_digest, _settings(run), untrained, split]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _settings(run: RunConfig) -> dict[str, Any]:
    """What decides a run's losses, and what it is judged by."""
    return settings_of(run) | {"evaluation": run.evaluation.model_dump(mode="json", include={"top_k"})}


class Runner:
    """Does pieces, in a worker's process."""

    def __call__(self) -> "Callable[[Piece], dict[str, Any]]":
        """Nothing has to be made."""
        logging.getLogger("msr_dist").setLevel(logging.WARNING)
        return self.outcome

    def outcome(self, piece: Piece) -> dict[str, Any]:
        """The report of a run and how long it took, or why it failed; its folder is deleted."""
        with tempfile.TemporaryDirectory(prefix="retrieval-") as folder:
            run = parse(RunConfig, merge(tomllib.loads(piece.run), [f"runs={folder}"]), where=str(piece)).claim_folder()
            begun = time.monotonic()
            try:
                if piece.untrained:
                    report = untrained(run, piece.untrained, piece.split).to_json()
                else:
                    train(run)
                    report = json.loads(metrics_file(run.folder, piece.split).read_text())
            except ValueError as error:
                # Such as pairs that these data do not have: no setting to choose, and no reason to end the search.
                return {"failed": " ".join(str(error).split())}
            return {"report": report, "seconds": round(time.monotonic() - begun, 1)}


def untrained(run: RunConfig, kind: str, split: str) -> RetrievalReport:
    """What a scenario's most chosen items, or items that go with the user's own, are worth.

    popularity: choices in the scenario's training rows. item_item (Sarwar et al., 2001): the sum, over all that the
    user chose before in any scenario, of the cosine between the items' users in the training rows.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with open_world() as world:
        schema = run.read_schema()
        catalogue, queries = catalogue_rows(run, schema, world), query_rows(run, schema, split, world)
    users, items, scenarios = _choices(run.data_here / "train", schema)
    together = _cosines(users, items, schema) if kind == "item_item" else None
    offered = pq.read_table(catalogue / ROWS, columns=[schema.item, schema.scenario])
    of_item, of_scenario = (offered[name].to_numpy() for name in (schema.item, schema.scenario))
    asked = pq.read_table(queries / ANSWERS_FILE).to_pylist()
    top_k = sorted(set(run.evaluation.top_k))
    found: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    for scenario in schema.scenarios:
        rows = np.sort(of_item[of_scenario == scenario.id])
        here = [line for line in asked if line["scenario"] == scenario.id]
        counts[scenario.name] = len(here)
        popular = np.bincount(items[scenarios == scenario.id], minlength=schema.item_table.rows)[rows].astype(float)
        places, answers = [], []
        for line in here:
            scores = popular.copy()
            if together is not None:
                near = np.asarray(together[line["consumed"]].sum(axis=0)).ravel()[rows] if line["consumed"] else 0.0
                # Where nothing goes with it, the popular ones.
                scores = near + 1e-9 * popular / max(1.0, popular.max(initial=0.0))
            scores[np.isin(rows, line["consumed"])] = -np.inf
            places.append(np.argsort(-scores, kind="stable")[: top_k[-1]])
            answers.append(torch.from_numpy(np.searchsorted(rows, line["truth"])))
        totals = sums(torch.from_numpy(np.stack(places)), answers, top_k) if here else {}
        found[scenario.name] = {name: total / len(here) for name, total in totals.items()}
    summary = read_summary(queries)
    left_out = {reason: summary[reason] for reason in ("of_unknown_users", "of_unknown_items", "repeated")}
    offered_counts = {each.name: int((of_scenario == each.id).sum()) for each in schema.scenarios}
    return RetrievalReport(found, counts, offered_counts, left_out)


def _choices(folder: Path, schema: FeatureSchema) -> "tuple[np.ndarray[Any, Any], ...]":
    label = schema.labels[0]
    columns = [schema.user, schema.item, schema.scenario, label.name, *([label.mask] if label.mask else [])]
    table = pq.read_table(folder, columns=columns)
    user, item, scenario, chosen, *known = (table[name].to_numpy() for name in columns)
    kept = (chosen == 1) & (item != 0)
    if known:
        kept &= known[0]
    return user[kept], item[kept], scenario[kept]


def _cosines(users: Any, items: Any, schema: FeatureSchema) -> Any:
    """`[items, items]`, sparse: how often two items have the same users; an item and itself do not count."""
    known = users != 0
    shape = schema.user_table.rows, schema.item_table.rows
    chosen = sparse.csr_matrix((np.ones(known.sum()), (users[known], items[known])), shape=shape)
    chosen.data[:] = 1.0
    lengths = np.sqrt(np.asarray(chosen.sum(axis=0)).ravel())
    scaled = chosen @ sparse.diags(1 / np.maximum(lengths, 1e-12))
    together = (scaled.T @ scaled).tolil()
    together.setdiag(0)
    return together.tocsr()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Compare models that retrieve, over data sets and seeds, as a grid (TOML) says.

    The search tries the same few settings for every model and judges them on the valid split alone; the best run again
    with several seeds, judged on the test split. Results are lines under benchmarks/results/GRID/; what stands there is
    not run again. A line stands for settings and data, not for the code.
    """


@main.command()
@click.argument("grid", type=_PATH)
@click.option("--workers", default=os.cpu_count() or 1, show_default="cores", type=click.IntRange(1))
@click.option("--launcher", default="local", show_default=True, type=click.Choice(["local", "ray"]))
@click.option("--data", "datas", multiple=True, help="Only this data set; may be given several times.")
@click.option("--model", "models", multiple=True, help="Only this model; may be given several times.")
@click.option("--results", type=_PATH, default=RESULTS, help="Where results go.")
def run(
    grid: Path,
    workers: int,
    launcher: Literal["local", "ray"],
    datas: tuple[str, ...],
    models: tuple[str, ...],
    results: Path,
) -> None:
    """Run what is missing of GRID, each run on one core. Broken off, the same command goes on."""
    log_to_stderr()
    try:
        opened = Grid(grid, results)
        chosen = [data for data in opened.config.data if not datas or data.name in datas]
        names = [name for name in opened.config.models if not models or name in models]
        for data in chosen:
            data.require(["train", "valid", "test"])
        failed = []
        with Workers(Runner(), launcher, workers, device="cpu") as crew:
            for phase in _phases(opened, chosen, names):
                known = {piece.key: opened.lines(piece.data, piece.split).get(piece.key) for piece in phase}
                missing = [piece for piece in phase if known[piece.key] is None]
                stands = [(piece, known[piece.key] or {}) for piece in phase]
                failed += [f"{piece}: {found['failed']}" for piece, found in stands if "failed" in found]
                progress = Progress("retrieval", len(missing), unit="run")
                for piece, outcome in crew.attempt(missing, retries=0):
                    if isinstance(outcome, Lost):
                        failed.append(f"{piece}: {outcome.how}")
                    else:
                        opened.record(piece, outcome)
                        if "failed" in outcome:
                            failed.append(f"{piece}: {outcome['failed']}")
                    progress.advance(values={"last": str(piece)})
                progress.close()
    except ValueError as error:
        for line in str(error).splitlines():
            click.echo(f"retrieval: {line}", err=True)
        sys.exit(2)
    for reason in failed:
        click.echo(f"failed: {reason}", err=True)
    click.echo(f"results in {opened.folder}; next: python benchmarks/retrieval.py report {grid}")
    sys.exit(1 if failed else 0)


def _phases(grid: Grid, datas: list[DataConfig], models: list[str]) -> Iterator[list[Piece]]:
    """All searches, then one seed of everything after the other, so that half a grid is a fair table."""
    yield [piece for data in datas for model in models for piece in grid.trials(data, model)]
    for seed in grid.config.seeds:
        pieces = [grid.final(data, model, seed) for data in datas for model in models]
        yield [piece for piece in pieces if piece is not None]


@main.command()
@click.argument("grid", type=_PATH)
@click.option("--results", type=_PATH, default=RESULTS, help="Where the results are.")
def report(grid: Path, results: Path) -> None:
    """Write README.md beside the results of GRID: a table for each data set."""
    opened = Grid(grid, results)
    text = "\n\n".join([_head(opened), *(_section(opened, data) for data in opened.config.data)]) + "\n"
    opened.folder.mkdir(parents=True, exist_ok=True)
    write_whole(opened.folder / "README.md", text)
    click.echo(str(opened.folder / "README.md"))


def _head(grid: Grid) -> str:
    return (
        f"# {grid.file.stem}\n\nWritten by `python benchmarks/retrieval.py report {grid.file}`. Mean ± standard "
        "deviation over seeds; every scenario counts once in the mean. p: two-sided paired t-test over the seeds that "
        "both models have, not corrected; it covers the noise of training alone. `popularity` and `item-item` learn "
        "nothing, so they have one seed."
    )


def _section(grid: Grid, data: DataConfig) -> str:
    by_model: dict[str, dict[int, dict[str, Any]]] = {}
    known = grid.lines(data.name, "test")
    for model in grid.config.models:
        for seed in grid.config.seeds:
            piece = grid.final(data, model, seed)
            if piece is not None and "report" in known.get(piece.key, {}):
                by_model.setdefault(model, {})[seed] = known[piece.key]
    if not by_model:
        return f"## {data.name}\n\nNo results yet."
    first = RetrievalReport.from_json(next(iter(next(iter(by_model.values())).values()))["report"])
    rows = {each.name: each.rows or 0 for each in FeatureSchema.read(data.folder).scenarios}
    small = min((name for name in first.queries if first.queries[name]), key=lambda name: rows[name])
    cuts = sorted({int(name.rsplit("_", 1)[1]) for name in first.mean})
    heads = ["model", "seeds", *(f"{metric.replace('_', ' ')}@{k}" for k in cuts for metric in _METRICS[:2])]
    heads += [*(f"{name} {grid.config.judge.replace('_at_', '@')}" for name in first.scenarios), "chosen", "s/run"]
    table = [heads]
    for model, runs in by_model.items():
        reports = [RetrievalReport.from_json(line["report"]) for line in runs.values()]
        cells = [model, str(len(runs))]
        cells += [_spread([each.mean[f"{metric}_at_{k}"] for each in reports]) for k in cuts for metric in _METRICS[:2]]
        cells += [
            _spread([each.scenarios[name][grid.config.judge] for each in reports]) if first.scenarios[name] else "-"
            for name in first.scenarios
        ]
        line = next(iter(runs.values()))
        chosen = ", ".join(f"{key.removeprefix('stages.')} {value}" for key, value in line["chosen"].items())
        table.append([*cells, chosen, f"{mean(each['seconds'] for each in runs.values()):.0f}"])
    claims = [_claim(grid, by_model, small, better, worse) for better, worse in grid.config.against]
    commits = sorted({line["commit"] for runs in by_model.values() for line in runs.values()})
    asked = ", ".join(f"{name} {first.queries[name]:,} users, {first.items[name]:,} items" for name in first.queries)
    return "\n".join(
        [f"## {data.name}", "", f"`{data.prepare}`; {asked}. Commits: {', '.join(commits)}.", "", *_table(table), ""]
        + [f"- {claim}" for claim in claims if claim]
    )


def _claim(grid: Grid, by_model: Any, small: str, better: str, worse: str) -> str:
    """Whether one model is better than another, in the mean over scenarios and in the smallest."""
    shared = sorted(by_model.get(better, {}).keys() & by_model.get(worse, {}).keys())
    if not shared:
        return ""
    told = []
    for name, scenario in (("mean", None), (f"smallest ({small})", small)):
        values = []
        for model in (better, worse):
            reports = [RetrievalReport.from_json(by_model[model][seed]["report"]) for seed in shared]
            blocks = [each.scenarios[scenario] if scenario else each.mean for each in reports]
            values.append([block[grid.config.judge] for block in blocks])
        gains = [ours - theirs for ours, theirs in zip(*values, strict=True)]
        p = f", p {stats.ttest_1samp(gains, 0).pvalue:.3f}" if len(gains) > 1 and stdev(gains) else ""
        told.append(f"{name} {mean(gains):+.4f}{p}")
    return f"{better} over {worse}, {len(shared)} seeds: {'; '.join(told)}"


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4f} ± {stdev(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def _table(rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


if __name__ == "__main__":
    call_and_leave(main)
