"""What a grid of runs is, what one of its runs leaves, and where its results stand.

A grid (TOML) crosses models, data sets and seeds. Its results are JSON lines that are only ever added to:

    results/GRID/DATA-search.jsonl     a line per trial, judged on the valid split
    results/GRID/DATA.jsonl            a line per final run, judged on the test split

A line holds all settings that decide the result. It stands for a run as long as these, read by today's code, are the
run's own: a setting that is new since, with a default, repeats nothing; a default that has changed repeats all.
"""

import hashlib
import json
import os
import random
import shutil
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, Self

import pyarrow.parquet as pq
from pydantic import Field, model_validator

from msr_dist.config import Config, dump, load, merge, parse
from msr_dist.evaluate import metrics_file
from msr_dist.models.base import BackboneConfig
from msr_dist.recommender import Recommender
from msr_dist.run import RunConfig
from msr_dist.schema import FeatureSchema
from msr_dist.tracking import VALUES_FILE
from msr_dist.train import train

RESULTS = Path(__file__).parent / "results"
Split = Literal["valid", "test"]
Line = dict[str, Any]
Value = bool | int | float | str


class DataConfig(Config):
    """One data set, and what it changes in every run."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    """Names the files of its results."""
    folder: Path
    """What `msr-dist prepare` has made, from the working directory."""
    prepare: str
    """The command that makes the folder, shown where it is missing."""
    set: tuple[str, ...] = ()
    """Overrides such as "stages.0.epochs=5"."""
    trials: int | None = Field(default=None, ge=0)
    """Instead of the search's number of trials."""
    space: dict[str, tuple[Value, ...]] = {}
    """What the search tries on these data besides."""

    def require(self) -> None:
        """ValueError where the data are not there."""
        if not (self.folder / "schema.toml").is_file():
            raise ValueError(f"data set {self.name}: no data in {self.folder}; make them: {self.prepare}")

    def digest(self) -> str:
        """What tells these data from others: rows, tables, columns and scenarios. The test split is not looked at."""
        schema = FeatureSchema.read(self.folder)
        parts: list[Any] = [
            [pq.read_metadata(file).num_rows for file in sorted((self.folder / split).glob("*.parquet"))]
            for split in ("train", "valid")
        ]
        parts += [[table.name, table.rows] for table in schema.tables]
        for named in (schema.labels, schema.scenarios, schema.features, schema.numerics):
            parts.append([each.name for each in named])
        return _digest(parts)


class SearchConfig(Config):
    """The hyper-parameters' search: the same trials for every model, one seed, judged on the valid split."""

    trials: int = Field(default=0, ge=0)
    """Runs per model and data set; 0 leaves every setting as the grid has it."""
    seed: int = 0
    """Draws the trials, and is the seed of their runs."""
    tracked: bool = False
    """Track trials too."""
    space: dict[str, tuple[Value, ...]] = {}
    """Dotted keys and the values to choose from. A `model.` key that a model does not have is left out for it."""

    def draw(self, data: DataConfig) -> list[dict[str, Value]]:
        """The trials: by a Latin design, so that few of them still see every value of a setting about equally often."""
        count = self.trials if data.trials is None else data.trials
        trials: list[dict[str, Value]] = [{} for _ in range(count)]
        for key, values in (self.space | data.space).items():
            # Each setting has a generator of its own: another one in the space changes no other's draw.
            generator = random.Random(f"{self.seed} {key}")
            column: list[Value] = []
            while len(column) < count:
                column += generator.sample(values, len(values))
            for trial, value in zip(trials, column, strict=False):
                trial[key] = value
        return trials


class GridConfig(Config):
    """Models x data sets x seeds."""

    seeds: tuple[int, ...] = Field(default=(0, 1, 2, 3, 4), min_length=1)
    """Of the final runs."""
    judge: Literal["scenarios", "overall"] = "scenarios"
    """The AUC that chooses a trial and that models are compared by. `scenarios` is the mean of the scenarios' AUCs by
    their rows: where base rates differ, the overall AUC mostly says how well a model tells scenarios apart."""
    run: dict[str, Any] = {}
    """Keys of a run's configuration that all runs share."""
    search: SearchConfig = SearchConfig()
    data: tuple[DataConfig, ...] = Field(min_length=1)
    models: dict[str, dict[str, Any]] = Field(min_length=1)
    """Name and settings of each model; the name is its kind unless the settings say another."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for space in (self.search.space, *(data.space for data in self.data)):
            if empty := [key for key, values in space.items() if not values]:
                raise ValueError(f"space.{empty[0]} has no values to choose from")
        names = [data.name for data in self.data]
        for what, given in (("data", names), ("seeds", self.seeds)):
            if len(set(given)) < len(given):
                raise ValueError(f"{what}: {list(given)} names one twice")
        if managed := sorted({"name", "runs", "seed", "data", "model"} & self.run.keys()):
            raise ValueError(f"run.{managed[0]}: the grid sets it; leave it out")
        return self


@dataclass(frozen=True)
class Case:
    """One run of a grid."""

    model: str
    data: str
    data_digest: str
    run: RunConfig
    chosen: dict[str, Value]
    """What the search set, as far as the model has it."""

    @property
    def key(self) -> str:
        """Names everything that decides the result."""
        return _key(self.model, self.data_digest, _settings(self.run))

    def line(self, outcome: Line) -> Line:
        """The result line for what `execute` has returned."""
        named = {"model": self.model, "data": self.data, "seed": self.run.seed, "chosen": self.chosen}
        return named | outcome | {"data_digest": self.data_digest, "settings": _settings(self.run), "key": self.key}


class Grid:
    """A grid file with its results."""

    def __init__(self, file: Path, results: Path = RESULTS) -> None:
        """Raises ValueError where the file, or any run that it describes, is not valid."""
        self.file, self.config = file, load(GridConfig, file)
        self.results = results / file.stem
        for data in self.config.data:
            plain = {model: self._run(data, model, 0, "test", {}) for model in self.config.models}
            for key, values in (self.config.search.space | data.space).items():
                if not any(_place(run, key) for run in plain.values()):
                    raise ValueError(f"{file}: space.{key}: no model of this grid has that setting")
                for model, run in plain.items():
                    if place := _place(run, key):
                        for value in values:
                            self._run(data, model, 0, "valid", {place: value})

    def trials(self, data: DataConfig, model: str) -> list[Case]:
        """The runs of a model's search."""
        seed, digest = self.config.search.seed, data.digest()
        cases = []
        for trial in self.config.search.draw(data):
            run = self._run(data, model, seed, "valid", {})
            chosen = {place: value for key, value in trial.items() if (place := _place(run, key))}
            cases.append(Case(model, data.name, digest, self._run(data, model, seed, "valid", chosen), chosen))
        # Trials that differ in a setting which the model lacks are one.
        return list({case.key: case for case in cases}.values())

    def finals(self, data: DataConfig, models: Sequence[str], seed: int) -> list[Case]:
        """The final runs with the settings of each model's best trial; without those of which no trial stands."""
        digest, lines = data.digest(), self.lines(data.name, "valid")
        cases = []
        for model in models:
            chosen: dict[str, Value] = {}
            if trials := self.trials(data, model):
                judged = [line for case in trials if (line := lines.get(case.key))]
                if not judged:
                    continue
                chosen = max(judged, key=self.judged)["chosen"]
            cases.append(Case(model, data.name, digest, self._run(data, model, seed, "test", chosen), chosen))
        return cases

    def judged(self, line: Line) -> float:
        """The AUC by which this grid compares."""
        overall: float | None = line["overall"]["auc"]
        if self.config.judge == "overall":
            return overall or 0.0
        return scenario_auc(line)

    def file_of(self, data: str, split: Split) -> Path:
        """Where the results stand that were judged on `split`."""
        return self.results / f"{data}{'-search' if split == 'valid' else ''}.jsonl"

    def lines(self, data: str, split: Split) -> dict[str, Line]:
        """Results by the keys that they have under today's code; a line whose settings are no longer known is none."""
        return {key: line for line in read_lines(self.file_of(data, split)) if (key := _key_of_line(line))}

    def record(self, case: Case, outcome: Line) -> None:
        """Add a result; it is on the disk when this returns."""
        file = self.file_of(case.data, case.run.evaluation.final)
        file.parent.mkdir(parents=True, exist_ok=True)
        torn = file.exists() and not file.read_bytes().endswith(b"\n")
        text = ("\n" if torn and file.stat().st_size else "") + json.dumps(case.line(outcome)) + "\n"
        # One write to a file opened for appending: lines of two grids that run at once do not mix.
        with open(file, "ab", buffering=0) as out:
            out.write(text.encode())
            os.fsync(out.fileno())

    def _run(self, data: DataConfig, model: str, seed: int, final: Split, chosen: Mapping[str, Value]) -> RunConfig:
        own = {"kind": model} | self.config.models[model]
        shared = {"stages": [{}]} | self.config.run
        raw = merge(shared | {"data": str(data.folder.absolute()), "model": own}, data.set)
        name = f"{data.name}-{model}-{'seed' if final == 'test' else 'trial'}-"
        name += str(seed) if final == "test" else _digest(dict(chosen))
        given = {"name": name, "seed": seed, "evaluation.final": final, "evaluation.validate_epochs": 0}
        # Nobody goes on with a run of a grid: what counts is its result.
        given |= {"checkpoint.keep": 1, **chosen}
        if final == "valid" and not self.config.search.tracked:
            given["tracking.enabled"] = False
        raw = merge(raw, [f"{key}={json.dumps(value)}" for key, value in given.items()])
        return parse(RunConfig, raw, where=f"{self.file}: {model} on {data.name}")


def execute(text: str) -> Line:
    """Train the run that `text` configures, here and now, and return what it was worth; its folder is deleted."""
    run = parse(RunConfig, tomllib.loads(text), where="the grid's run")
    run.claim_folder()
    begun = time.monotonic()
    try:
        train(run)
        seconds = time.monotonic() - begun
        report = json.loads(metrics_file(run.folder, run.evaluation.final).read_text())
        speeds = _speeds(run.folder / VALUES_FILE)
    finally:
        shutil.rmtree(run.folder, ignore_errors=True)
    schema = run.read_schema()
    assert isinstance(run.model, BackboneConfig)
    head = Recommender(schema, run.model.build(schema), run.embeddings).head
    return {
        "overall": _block(report["overall"]),
        "scenarios": {name: _block(block) for name, block in report["scenarios"].items()},
        "dense_parameters": sum(weights.numel() for weights in head.parameters()),
        "table_parameters": sum(table.rows * table.width * schema.copies(table) for table in schema.tables),
        # The first reading pays for warming up.
        "samples_per_second": round(median(speeds[1:] or speeds)),
        "seconds": round(seconds, 1),
    }


def text_of(case: Case, runs: Path, tracking_uri: str) -> str:
    """The configuration of a case for `execute`: in the folder `runs`, which is nobody's, so the store is elsewhere."""
    tracking = case.run.tracking.model_copy(update={"uri": tracking_uri})
    return dump(case.run.model_copy(update={"runs": runs, "tracking": tracking}))


def scenario_auc(line: Line) -> float:
    """Mean of the scenarios' AUCs by their rows; those whose rows define none are left out."""
    known = [block for block in line["scenarios"].values() if block["auc"] is not None]
    rows = sum(block["rows"] for block in known)
    return sum(block["auc"] * block["rows"] for block in known) / rows if rows else 0.0


def read_lines(file: Path) -> Iterator[Line]:
    """The whole lines of a file of results; the rest of one that was cut off is skipped."""
    for text in file.read_text().splitlines() if file.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        yield line


def _place(run: RunConfig, key: str) -> str | None:
    """Where a key of the search space stands in the run: a model that wraps another takes its settings there."""
    section, _, name = key.partition(".")
    if section != "model":
        return key
    model, place = run.model, "model"
    while name.partition(".")[0] not in type(model).model_fields:
        model, place = getattr(model, "backbone", None), f"{place}.backbone"
        if model is None:
            return None
    return f"{place}.{name}"


def _settings(run: RunConfig) -> dict[str, Any]:
    """What decides a run's losses; the data are told by their digest."""
    settings = run.model_dump(mode="json", include={"seed", "loader", "embeddings", "model", "stages"})
    for unimportant in ("threads", "prefetch"):
        settings["loader"].pop(unimportant, None)
    return settings


def _key_of_line(line: Line) -> str | None:
    try:
        run = parse(RunConfig, {"name": "stored", "data": "."} | line["settings"], where="stored")
        return _key(line["model"], line["data_digest"], _settings(run))
    except (ValueError, KeyError, TypeError):
        return None


def _key(model: str, data_digest: str, settings: Mapping[str, Any]) -> str:
    return _digest([model, data_digest, settings])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _block(report: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of the first label, which is the one that a grid judges by."""
    return {name: _short(value) for name, value in report.items() if name != "labels"}


def _short(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def _speeds(values: Path) -> list[float]:
    """Rows per second as they were tracked."""
    found: Sequence[Any] = [json.loads(line)["metrics"] for line in values.read_text().splitlines()]
    names = "samples_per_second"
    return [speed for metrics in found for name, speed in metrics.items() if name.endswith(names)]
