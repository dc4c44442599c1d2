"""From raw logs to a judged model, on Ray's workers: prepare, extract, train, evaluate, as one story.

The same configuration again goes on where it stopped: what is complete, and made with the same settings, is not made
again; what was made with others is refused. Raw files themselves are not looked at: give changed ones another name.
"""

import json
import logging
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ValidationInfo, field_validator, model_validator

from msr_dist.checkpoint import newest
from msr_dist.config import C, Config, component, kind_config, parse
from msr_dist.data.places import Folder
from msr_dist.data.prepare.canonical import PrepareConfig, prepare
from msr_dist.evaluate import evaluate, metrics_file
from msr_dist.extract import ExtractConfig, extract
from msr_dist.files import write_whole
from msr_dist.launch import connect, launch, log_to_stderr, set_threads
from msr_dist.models.base import ModelConfig
from msr_dist.ray_metrics import shown
from msr_dist.run import CHECKPOINTS, RunConfig
from msr_dist.train import check
from msr_dist.workers import Workers

log = logging.getLogger(__name__)

SOURCES = "msr_dist.data.prepare"
RECORD_FILE = "pipeline.json"
"""In the run's folder: how its data were prepared, and which splits its model has been judged on."""


class PipelineConfig(Config):
    """Everything about a pipeline: `data` and `store` are where the phases meet, and stand in no section again."""

    data: Folder
    """The folder of the prepared data."""
    store: Path | None = None
    """The folder of what a language model says of the users; only with `extract`."""
    prepare: component(SOURCES)  # type: ignore[valid-type]
    """`kind` names the source; the other keys are that source's. With `overwrite`, the data are prepared anew for every
    run that has not begun, as raw files that grow want it."""
    extract: ExtractConfig | None = None
    """An extraction whose vectors the run reads; without this section, none is made."""
    train: RunConfig
    evaluate: tuple[Literal["train", "valid", "test"], ...] = ("valid", "test")
    """The splits that the trained model is judged on."""

    @field_validator("extract", mode="before")
    @classmethod
    def _wire_extract(cls, given: Any, info: ValidationInfo) -> Any:
        return _wired(ExtractConfig, given, {"data": info.data.get("data"), "out": info.data.get("store")})

    @field_validator("train", mode="before")
    @classmethod
    def _wire_train(cls, given: Any, info: ValidationInfo) -> Any:
        extraction = info.data.get("extract")
        if isinstance(given, Mapping) and extraction is not None and extraction.compress is not None:
            known = {"store": extraction.out, "width": extraction.compress.width}
            given = {**given, "knowledge": _with(known, given.get("knowledge", {}), "knowledge.")}
        return _wired(RunConfig, given, {"data": info.data.get("data")})

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        if (self.extract is None) != (self.store is None):
            raise ValueError("store and the section extract: give both, or neither")
        if self.extract is None:
            return self
        if self.extract.compress is None:
            raise ValueError("extract.compress: training reads the vectors in that form; add the section")
        assert isinstance(self.train.model, ModelConfig)
        if not (self.train.model.reads_knowledge or self.train.model.takes_knowledge):
            raise ValueError(
                f"train.model.kind: {self.train.model.kind!r} does not read what the extraction would make: leave out "
                "store and the section extract, or choose 'llm4msr'"
            )
        return self

    def absolute(self) -> Self:
        """The same with paths that hold in any working directory; those of the raw files stay as they are."""
        changed: dict[str, Any] = {"data": self.data.absolute(), "train": self.train.absolute()}
        if self.extract is not None and self.store is not None:
            changed |= {"store": self.store.absolute(), "extract": self.extract.absolute()}
        return self.model_copy(update=changed)


def _wired(section: type[C], given: Any, shared: Mapping[str, Path | None]) -> Any:
    """The section with the folders that the whole pipeline names."""
    if not isinstance(given, Mapping):
        return given
    named = {key: folder for key, folder in shared.items() if folder is not None}
    return section.model_validate_json(json.dumps(_with(named, given), default=str), strict=True)


def _with(known: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Both; ValueError where they contradict each other."""
    for key, value in known.items():
        if str(given.get(key, value)) != str(value):
            raise ValueError(f"{prefix}{key}: {given[key]!r}, but the other sections say {value!s}; leave it out here")
    return {**given, **known}


def pipeline(config: PipelineConfig, workers: int, restarts: int = 3) -> RunConfig:
    """Do what is left of all phases with `workers` workers of Ray's, and return the run.

    After a worker is lost, its phase goes on, at most `restarts` times (in an extraction: for each shard).

    Raises:
        ValueError: the configuration and what is there do not fit together.
        LaunchError: workers are lost again and again.
        Stopped: the training was asked to stop; all that was done is saved.
    """
    # Extraction wants one thread in each worker, and all phases share their processes' settings.
    connect(workers, set_threads(os.cpu_count() or 1))
    config = config.absolute()
    record = _Record(config.train, _decisive(config.prepare))
    source = config.prepare.model_copy(update={"overwrite": False}) if record.begun else config.prepare
    prepare_on_ray(source, config.data, restarts)
    if config.extract is not None:
        # Takes shards that are there already for what they are.
        extract(config.extract, "ray", workers, restarts)
    check(config.train, workers)
    run = config.train.claim_folder()
    record.write()
    if record.judged(run.evaluation.final):
        log.info("train: done before, in %s", run.folder)
    else:
        launch(shown(run), run, "ray", workers, run.folder, restarts)
        record.add(run.evaluation.final)
    for split in config.evaluate:
        if not record.judged(split):
            launch(partial(evaluate, split=split), run, "ray", workers, run.folder, restarts)
            record.add(split)
    return run


def prepare_on_ray(source: PrepareConfig, out: Path, restarts: int = 3) -> None:
    """Prepare the data on one of Ray's workers, unless that was done before; `out` is absolute.

    Raises:
        ValueError: the raw data are at fault, or `out` holds something else, such as data of other settings.
        LaunchError: the worker was lost, more often than `restarts`.
    """
    if is_prepared(source, out):
        log.info("prepare: done before, in %s", out)
        return
    with Workers(_Preparation(source, out), "ray", 1, "cpu", restarts) as workers:
        for _, lines in workers.spread([f"the preparation of {out}"]):
            log.info("prepare: done\n%s", "\n".join(lines))


def is_prepared(source: PrepareConfig, out: Path) -> bool:
    """Whether `out` may stay as it is; ValueError where it holds data of other settings that may not be replaced."""
    file = out / "prepare.toml"
    if source.overwrite or not file.is_file():
        return False
    raw = tomllib.loads(file.read_text())
    before = _decisive(parse(kind_config(SOURCES, raw["kind"]), raw, where=str(file)))
    now = _decisive(source)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        key = changed[0]
        raise ValueError(
            f"{out} holds data prepared with {key} = {before.get(key)!r}, not {now.get(key)!r}: choose another folder, "
            "or set overwrite=true"
        )
    return True


def _decisive(source: Config) -> dict[str, Any]:
    """The settings of a preparation that decide what it makes."""
    return source.model_dump(mode="json", exclude={"memory_limit", "threads", "overwrite"})


@dataclass(frozen=True)
class _Preparation:
    """Prepares the data, in a worker's process."""

    source: PrepareConfig
    out: Path

    def __call__(self) -> Callable[[str], list[str]]:
        log_to_stderr()
        return self._lines

    def _lines(self, _piece: str) -> list[str]:
        # A worker that was taken for lost may have come to its end.
        if is_prepared(self.source, self.out):
            return [f"written to {self.out}"]
        return prepare(self.source, self.out, partial(log.info, "prepare: %s")).lines()


class _Record:
    """RECORD_FILE of a run."""

    def __init__(self, run: RunConfig, prepared: Mapping[str, Any]) -> None:
        """ValueError where the run has begun on data that were prepared in another way."""
        self._run, self._file = run, run.folder / RECORD_FILE
        self._known: dict[str, Any] = {"prepare": dict(prepared), "judged": {}}
        self.begun = self._file.is_file()
        if self.begun:
            self._known = json.loads(self._file.read_text())
        if self._known["prepare"] != prepared:
            raise ValueError(
                f"{run.folder} holds a run on data that were prepared with other settings ({self._file.name} has "
                "them): choose another train.name, or delete that folder"
            )

    def judged(self, split: str) -> bool:
        """Whether the newest checkpoint has been judged on `split`, in the way that the run asks for."""
        written = metrics_file(self._run.folder, split).is_file()
        return written and self._known["judged"].get(split) == self._judgement()

    def add(self, split: str) -> None:
        """Write down that the newest checkpoint has been judged on `split`."""
        self._known["judged"][split] = self._judgement()
        self.write()

    def _judgement(self) -> dict[str, Any]:
        found = newest(self._run.folder / CHECKPOINTS)
        return {"checkpoint": found.folder.name if found else None, "top_k": list(self._run.evaluation.top_k)}

    def write(self) -> None:
        """Bring it to the disk."""
        write_whole(self._file, json.dumps(self._known, indent=1) + "\n")
