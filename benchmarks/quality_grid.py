"""What a grid of runs is, what one of its runs leaves, and where its results stand.

A grid (TOML) crosses models, data sets and seeds. Its results are JSON lines that are only ever added to:

    results/GRID/DATA-search.jsonl     a line per trial, judged on the valid split
    results/GRID/DATA.jsonl            a line per final run, judged on the test split

A line holds all settings that decide the result, and a digest of the data. It stands for a run as long as these, read
by today's code, are the run's own: a setting that is new since, with a default, repeats nothing; a default that has
changed repeats all. The code is no part of it: after a change of a model its lines stand until someone deletes them,
and the report says of which commits they are. A run that has failed leaves a line with the reason instead.
"""

import fcntl
import hashlib
import json
import os
import random
import shutil
import subprocess
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from msr_dist.config import Config, dump, kind_config, load, merge, parse
from msr_dist.data.parquet import ParquetSource
from msr_dist.evaluate import metrics_file
from msr_dist.files import digest_of
from msr_dist.knowledge import KnowledgeConfig
from msr_dist.llm.parquet import MANIFEST_FILE
from msr_dist.llm.vectors import table_folder
from msr_dist.models.base import BackboneConfig
from msr_dist.recommender import Recommender
from msr_dist.run import RunConfig
from msr_dist.schema import SCHEMA_FILE, FeatureSchema
from msr_dist.tracking import VALUES_FILE
from msr_dist.train import train

RESULTS = Path(__file__).parent / "results"
Split = Literal["valid", "test"]
SPLITS: tuple[Split, ...] = ("valid", "test")
SEARCHABLE = ("loader", "embeddings", "model", "stages")
Outcome = dict[str, Any]
Value = bool | int | float | str


class _Stored(BaseModel):
    """Base of what a line of results holds; what is not needed here, such as a metric that is new since, is allowed."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Block(_Stored):
    """Metrics of some rows; None where the rows define none."""

    rows: int
    auc: float | None
    log_loss: float | None
    calibration: float | None
    user_auc: float | None


class Line(_Stored):
    """What a run has left: which run it was, of which settings, data and code."""

    model: str
    data: str
    seed: int
    chosen: dict[str, Value]
    commit: str
    data_digest: str
    settings: dict[str, Any]


class Result(Line):
    """The line of a run that has come to its end."""

    overall: Block
    scenarios: dict[str, Block]
    dense_parameters: int
    samples_per_second: float


class Failure(Line):
    """The line of a run that has failed, and would fail again."""

    failed: str
    """The reason."""


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
    knowledge: KnowledgeConfig | None = None
    """What models read that read a language model's vectors."""
    stores: dict[str, KnowledgeConfig] = {}
    """Other vectors of the same users, by name, for the models that `reads` says."""
    extract: str = ""
    """The command that makes these vectors, shown where they are missing."""

    @property
    def here(self) -> bool:
        """Whether the data are on this machine."""
        return (self.folder / SCHEMA_FILE).is_file()

    @property
    def vectors_here(self) -> bool:
        """Whether the vectors, if there are any to read, are on this machine in the width that models read."""
        return all(map(_stands, self._all_knowledge()))

    def require(self, splits: Sequence[str]) -> None:
        """ValueError where the data are not there, or one of `splits` is absent or has a damaged file."""
        if not self.here:
            raise ValueError(f"data set {self.name}: no data in {self.folder}; make them: {self.prepare}")
        try:
            for knowledge in self._all_knowledge():
                knowledge.apply(FeatureSchema.read(self.folder), self.folder)
        except ValueError as error:
            raise ValueError(f"data set {self.name}: {error}; the command was: {self.extract}") from None
        try:
            schema = FeatureSchema.read(self.folder)
            for split in splits:
                ParquetSource(self.folder / split, schema)
        except ValueError as error:
            raise ValueError(f"data set {self.name}: {error}; the command was: {self.prepare}") from None

    def _all_knowledge(self) -> list[KnowledgeConfig]:
        return [*([] if self.knowledge is None else [self.knowledge]), *self.stores.values()]

    def digest(self) -> str:
        """What tells these data from others: schema, and every byte of the train and valid splits.

        The test split is not opened: trials must not know it. It comes of the same preparation as the others.
        """
        # Without defaults, so that a key that schemas have since, with a default, makes no other data of them.
        schema = FeatureSchema.read(self.folder).model_dump(mode="json", exclude_defaults=True)
        for scenario in schema["scenarios"]:
            # For people: no model of the package reads it.
            scenario.pop("text", None)
        files = [
            [_content(file, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.parquet"))]
            for folder in (self.folder / "train", self.folder / "valid")
        ]
        return _digest([schema, files])


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
    against: dict[str, tuple[str, ...]] = {}
    """By model, the others that it is held against: its backbone, its controls. A gain counts that holds over all."""
    reads: dict[str, str] = {}
    """By model, which of the data sets' `stores` it reads; the other models read their `knowledge`."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for model, others in self.against.items():
            for name in (model, *others):
                if name not in self.models:
                    raise ValueError(f"against.{model}: the grid has no model {name!r}")
        for model, store in self.reads.items():
            if model not in self.models:
                raise ValueError(f"reads.{model}: the grid has no model {model!r}")
            if lacking := [data.name for data in self.data if store not in data.stores]:
                raise ValueError(f"reads.{model}: data set {lacking[0]} has no stores.{store}")
        for space in (self.search.space, *(data.space for data in self.data)):
            if empty := [key for key, values in space.items() if not values]:
                raise ValueError(f"space.{empty[0]} has no values to choose from")
            # Another key would decide nothing that a line keeps, or even have trials judged on the test split.
            if managed := [key for key in space if key.partition(".")[0] not in SEARCHABLE]:
                raise ValueError(f"space.{managed[0]}: the space may hold keys of {', '.join(SEARCHABLE)}")
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
        return _key(self.model, self.data_digest, settings_of(self.run))

    def line(self, outcome: Outcome) -> Outcome:
        """The line for what `execute` has returned, or for {"failed": reason}."""
        named = {"model": self.model, "data": self.data, "seed": self.run.seed, "chosen": self.chosen}
        return named | outcome | {"data_digest": self.data_digest, "settings": settings_of(self.run), "key": self.key}


@dataclass(frozen=True)
class Search:
    """The trials of one model on one data set, and what has come of them."""

    drawn: Sequence[Case]
    """One for each draw: those that differ in a setting which the model lacks are the same run."""
    lines: Mapping[str, Line]
    """By the keys of the cases."""

    @property
    def cases(self) -> list[Case]:
        """Every run once."""
        return list({case.key: case for case in self.drawn}.values())

    @property
    def results(self) -> list[Result]:
        """Of the trials that have come to their end."""
        return [line for case in self.cases if isinstance(line := self.lines.get(case.key), Result)]

    @property
    def failed(self) -> int:
        """The number of trials that failed."""
        return sum(isinstance(self.lines.get(case.key), Failure) for case in self.cases)

    @property
    def over(self) -> bool:
        """Whether no trial is to come."""
        return all(case.key in self.lines for case in self.cases)

    def __str__(self) -> str:
        failed = f" ({self.failed} failed)" if self.failed else ""
        return f"{len(self.results)} of {len(self.cases)}{failed}"


class Grid:
    """A grid file with its results."""

    def __init__(self, file: Path, results: Path = RESULTS) -> None:
        """Raises ValueError where the file, or any run that it describes, is not valid."""
        self.file, self.config = file, load(GridConfig, file)
        self.results = results / file.stem
        for data in self.config.data:
            readers = [model for model in self.config.models if self._reads_knowledge(model)]
            if readers and data.knowledge is None:
                raise ValueError(f"{file}: {readers[0]} reads knowledge, and data set {data.name} names none")
            plain = {model: self._run(data, model, 0, "test", {}) for model in self.config.models}
            for key, values in (self.config.search.space | data.space).items():
                if not any(_place(run, key) for run in plain.values()):
                    raise ValueError(f"{file}: space.{key}: no model of this grid has that setting")
                for model, run in plain.items():
                    if place := _place(run, key):
                        for value in values:
                            self._run(data, model, 0, "valid", {place: value})

    def search(self, data: DataConfig, models: Sequence[str]) -> dict[str, Search]:
        """The trials of each model."""
        seed, digest, lines = self.config.search.seed, self.digest(data), self.lines(data.name, "valid")
        searches = {}
        for model in models:
            cases = []
            for trial in self.config.search.draw(data):
                run = self._run(data, model, seed, "valid", {})
                chosen = {place: value for key, value in trial.items() if (place := _place(run, key))}
                cases.append(Case(model, data.name, digest, self._run(data, model, seed, "valid", chosen), chosen))
            searches[model] = Search(cases, lines)
        return searches

    def finals(self, data: DataConfig, models: Sequence[str], seeds: Sequence[int]) -> list[Case]:
        """The final runs with the settings of each model's best trial, seed by seed.

        A model whose search is not over has none: another best trial could still come. Nor has one without any trial
        that has come to its end.
        """
        digest, cases = self.digest(data), []
        for model, search in self.search(data, models).items():
            chosen: dict[str, Value] = {}
            if search.cases:
                if not search.over or not search.results:
                    continue
                chosen = max(search.results, key=self.judged).chosen
            cases += [
                Case(model, data.name, digest, self._run(data, model, seed, "test", chosen), chosen) for seed in seeds
            ]
        return sorted(cases, key=lambda case: seeds.index(case.run.seed))

    def digest(self, data: DataConfig) -> str:
        """That of the data; where they are not on this machine, of those that its newest line is of."""
        if data.here:
            return data.digest()
        lines = [line for split in SPLITS for line in read_lines(self.file_of(data.name, split))[0]]
        return lines[-1].data_digest if lines else ""

    def judged(self, line: Result) -> float:
        """The AUC by which this grid compares."""
        return line.overall.auc or 0.0 if self.config.judge == "overall" else scenario_auc(line)

    def file_of(self, data: str, split: Split) -> Path:
        """Where the results stand that were judged on `split`."""
        return self.results / f"{data}{'-search' if split == 'valid' else ''}.jsonl"

    def lines(self, data: str, split: Split) -> dict[str, Line]:
        """Results by the keys that they have under today's code; a line whose settings are no longer known is none."""
        return {key: line for line in read_lines(self.file_of(data, split))[0] if (key := key_of(line))}

    def odd(self, data: str) -> list[str]:
        """Places in the files of a data set that hold no line of results."""
        return [place for split in SPLITS for place in read_lines(self.file_of(data, split))[1]]

    @contextmanager
    def locked(self, data: str) -> Iterator[None]:
        """Keep the results of a data set for this process; ValueError where another one has them."""
        file = self.file_of(data, "test")
        file.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with open(file, "ab") as out:
                try:
                    fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ValueError(
                        f"another process runs {self.file} on {data}: wait for it, or choose other data sets by --data"
                    ) from None
                if not file.exists() or os.fstat(out.fileno()).st_ino != file.stat().st_ino:
                    # The process that held it has just taken the empty file away.
                    continue
                try:
                    yield
                finally:
                    if file.exists() and not file.stat().st_size:
                        file.unlink()
                return

    def record(self, case: Case, outcome: Outcome) -> Line:
        """Add what came of a run; it is on the disk when this returns."""
        file = self.file_of(case.data, case.run.evaluation.final)
        file.parent.mkdir(parents=True, exist_ok=True)
        torn = file.exists() and not file.read_bytes().endswith(b"\n")
        line = case.line(outcome)
        text = ("\n" if torn and file.stat().st_size else "") + json.dumps(line) + "\n"
        # One write to a file opened for appending: whatever else writes there, lines do not mix.
        with open(file, "ab", buffering=0) as out:
            out.write(text.encode())
            os.fsync(out.fileno())
        return _line(line)

    def _run(self, data: DataConfig, model: str, seed: int, final: Split, chosen: Mapping[str, Value]) -> RunConfig:
        raw = (
            {"stages": [{}]}
            | self.config.run
            | {"data": str(data.folder.absolute()), "model": self._settings_of(model)}
        )
        if data.knowledge is not None and self._reads_knowledge(model):
            raw["knowledge"] = self._knowledge(data, model).model_dump(mode="json", exclude_none=True)
        raw = merge(raw, data.set)
        name = f"{data.name}-{model}-{'seed' if final == 'test' else 'trial'}-"
        name += str(seed) if final == "test" else _digest(dict(chosen))
        given = {"name": name, "seed": seed, "evaluation.final": final, "evaluation.validate_epochs": 0}
        # Nobody goes on with a run of a grid: what counts is its result.
        given |= {"checkpoint.keep": 1, **chosen}
        if final == "valid" and not self.config.search.tracked:
            given["tracking.enabled"] = False
        raw = merge(raw, [f"{key}={json.dumps(value)}" for key, value in given.items()])
        return parse(RunConfig, raw, where=f"{self.file}: {model} on {data.name}")

    def _settings_of(self, model: str) -> dict[str, Any]:
        return {"kind": model} | self.config.models[model]

    def _reads_knowledge(self, model: str) -> bool:
        try:
            config = kind_config("msr_dist.models", self._settings_of(model)["kind"])
        except ValueError:
            # The model's run is refused with more words.
            return False
        return issubclass(config, BackboneConfig) and config.reads_knowledge

    def _knowledge(self, data: DataConfig, model: str) -> KnowledgeConfig:
        """What a model reads, with its digest: where the vectors are not on this machine, that of its newest line."""
        store = self.config.reads.get(model)
        knowledge = data.knowledge if store is None else data.stores[store]
        assert knowledge is not None
        if _stands(knowledge):
            return knowledge.model_copy(update={"store": knowledge.store.absolute()}).pinned()
        lines = [line for split in SPLITS for line in read_lines(self.file_of(data.name, split))[0]]
        mine = [line.settings for line in lines if self.config.reads.get(line.model) == store]
        digests = [known["digest"] for settings in mine if (known := settings.get("knowledge"))]
        return knowledge.model_copy(update={"digest": digests[-1] if digests else None})


def _stands(knowledge: KnowledgeConfig) -> bool:
    """Whether the vectors are on this machine, in the width that models read."""
    store = knowledge.store
    return all((folder / MANIFEST_FILE).is_file() for folder in (store, table_folder(store, knowledge.width)))


def execute(text: str) -> Outcome:
    """Train the run that `text` configures, here and now, and return what it was worth; its folder is deleted."""
    run = parse(RunConfig, tomllib.loads(text), where="the grid's run")
    run = run.claim_folder()
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
    tables = list(schema.tables)
    if schema.knowledge is not None:
        tables.append(schema.user_table.model_copy(update={"width": schema.knowledge.width}))
    head = Recommender(schema, run.model.build(schema), run.embeddings).head
    return {
        "overall": _block(report["overall"]),
        "scenarios": {name: _block(block) for name, block in report["scenarios"].items()},
        "dense_parameters": sum(weights.numel() for weights in head.parameters()),
        "table_parameters": sum(table.rows * table.width * schema.copies(table) for table in tables),
        # The first reading pays for warming up.
        "samples_per_second": round(median(speeds[1:] or speeds)),
        "seconds": round(seconds, 1),
    }


def text_of(case: Case, runs: Path, tracking_uri: str) -> str:
    """The configuration of a case for `execute`: in the folder `runs`, which is nobody's, so the store is elsewhere."""
    tracking = case.run.tracking.model_copy(update={"uri": tracking_uri})
    return dump(case.run.model_copy(update={"runs": runs, "tracking": tracking}))


def scenario_auc(line: Result) -> float:
    """Mean of the scenarios' AUCs by their rows; those whose rows define none are left out."""
    known = [(block.auc, block.rows) for block in line.scenarios.values() if block.auc is not None]
    rows = sum(count for _, count in known)
    return sum(auc * count for auc, count in known) / rows if rows else 0.0


def read_lines(file: Path) -> tuple[list[Line], list[str]]:
    """The lines of a file of results, and in words the places that hold none, such as one that was cut off."""
    lines: list[Line] = []
    odd = []
    for number, text in enumerate(file.read_bytes().split(b"\n") if file.exists() else (), start=1):
        if not text.strip():
            continue
        try:
            lines.append(_line(json.loads(text)))
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"]))
            odd.append(f"{file}:{number}: no line of results ({': '.join(filter(None, (where, fault['msg'])))})")
        except ValueError:
            odd.append(f"{file}:{number}: no whole line of JSON")
    return lines, odd


def _line(raw: Any) -> Line:
    """The line in what JSON holds; ValidationError where it is none."""
    kind = Failure if isinstance(raw, dict) and "failed" in raw else Result
    return kind.model_validate(raw)


def _place(run: RunConfig, key: str) -> str | None:
    """Where a key of the search space stands in the run: with models that wrap others, in the innermost that has it.

    So a model is tuned alike with and without a wrapper, also where the wrapper has a setting of the same name.
    """
    section, _, name = key.partition(".")
    if section != "model":
        return key
    found, model, place = None, run.model, section
    while model is not None:
        if name.partition(".")[0] in type(model).model_fields:
            found = f"{place}.{name}"
        model, place = getattr(model, "backbone", None), f"{place}.backbone"
    return found


def settings_of(run: RunConfig) -> dict[str, Any]:
    """What decides a run's losses; the data are told by their digest."""
    settings = run.model_dump(mode="json", include={"seed", *SEARCHABLE})
    if run.knowledge is not None:
        settings["knowledge"] = run.knowledge.model_dump(mode="json", include={"width", "digest"})
    for unimportant in ("threads", "prefetch", "memory_limit"):
        settings["loader"].pop(unimportant, None)
    return settings


@cache
def commit_of_code() -> str:
    """The commit that is measured; -dirty where the code is not the commit's, whatever results stand beside it."""

    def git(*words: str) -> str:
        # Without the lock that even reading commands take to refresh the index: others work in the checkout.
        command = ["git", "--no-optional-locks", *words]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", ":/msr_dist", ":/benchmarks/*.py")
    commit = git("describe", "--always")
    return f"{commit}-dirty" if commit and changed else commit or "unknown"


def key_of(line: Line) -> str | None:
    """The key that a line has under today's code; None where its settings are no longer known."""
    try:
        raw = {"name": "stored", "data": "."} | line.settings
        if "knowledge" in raw:
            raw["knowledge"] = {"store": "."} | raw["knowledge"]
        run = parse(RunConfig, raw, where="stored")
    except ValueError:
        return None
    return _key(line.model, line.data_digest, settings_of(run))


def _key(model: str, data_digest: str, settings: Mapping[str, Any]) -> str:
    return _digest([model, data_digest, settings])


@cache
def _content(file: Path, _size: int, _changed: int) -> str:
    """Digest of a file's bytes, read once as long as its size and time stay."""
    return digest_of(file)


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
