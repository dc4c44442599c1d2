"""The whole extraction of knowledge, top to bottom, the same under every launcher: data in, a store of vectors out.

OUT/
  config.toml       the resolved configuration
  made-with.json    the model and the templates, by digest
  model/            safetensors made from a GGUF file (only then)
  histories/        what each user engaged with, one file per shard
  previous/         the vectors of an older extraction, while those that still hold are taken over
  and the store itself: see `msr_dist.llm.vectors`
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, model_validator
from rich.table import Table

from msr_dist.config import Config, dump, load
from msr_dist.data.places import Folder
from msr_dist.files import held, write_whole
from msr_dist.launch import Launcher, LaunchError
from msr_dist.llm.compress import CompressReport, Precision, compress
from msr_dist.llm.encode import NO_MEMORY, Encoder, EncoderConfig, import_model, token_counter
from msr_dist.llm.history import (
    Histories,
    History,
    HistoryConfig,
    history_of,
    read_histories,
    scenario_statistics,
    shard_file,
    write_histories,
)
from msr_dist.llm.parquet import MANIFEST_FILE
from msr_dist.llm.prompts import Prompt, PromptConfig, PromptError, Templates, scenario_prompts, user_prompt
from msr_dist.llm.vectors import (
    FAILED,
    USERS,
    Manifest,
    PreviousVectors,
    Provenance,
    StoreWriter,
    VectorStore,
    open_store,
    prompt_digest,
    vocabulary_digest,
)
from msr_dist.progress import Progress
from msr_dist.schema import UNSEEN, FeatureSchema, Scenario
from msr_dist.workers import Lost, Workers

log = logging.getLogger(__name__)

CONFIG_FILE = "config.toml"
LOCK_FILE = "lock"
MADE_WITH_FILE = "made-with.json"
MODEL, HISTORIES, PREVIOUS = "model", "histories", "previous"
KILLED = "killed its worker"
"""Why a user has no vector whose prompt no worker survived."""
_MOST_KILLERS = 16
"""More users of one shard than this who kill their workers are no matter of their prompts."""


class CompressConfig(Config):
    """The form of the users' vectors that training reads."""

    width: int = Field(default=64, ge=1)
    """How many principal components are kept; a run's `knowledge.width` has to be the same, a multiple of 4."""
    precision: Precision = "fp16"
    whiten: bool = True
    """Give every component the same variance."""
    sample: int = Field(default=100_000, ge=2)
    """How many users the components are fitted on, at most."""
    seed: int = 0
    """Draws the sample."""


class ExtractConfig(Config):
    """Everything about an extraction."""

    data: Folder
    """A folder that `msr-dist prepare` has made."""
    out: Folder
    """The folder to write; the same again continues, or brings it up to date where the data have changed."""
    model: EncoderConfig
    history: HistoryConfig = HistoryConfig()
    prompts: PromptConfig = PromptConfig()
    users_per_shard: int = Field(default=1024, ge=1)
    """What a worker does at a time, and loses when it dies; progress is told as often."""
    compress: CompressConfig | None = None
    """Makes the vectors ready for training at the end, as `msr-dist compress` would; absent unless the section is
    there."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.prompts.user_tokens > self.model.max_tokens:
            raise ValueError(
                f"prompts.user_tokens {self.prompts.user_tokens} lets prompts become longer than model.max_tokens "
                f"{self.model.max_tokens}: lower the one, or raise the other"
            )
        return self

    def absolute(self) -> Self:
        """The same with paths that hold in any working directory: a worker's is not the driver's."""
        files = {"scenario_template": self.prompts.scenario_template, "user_template": self.prompts.user_template}
        given = {name: file.absolute() for name, file in files.items() if file is not None}
        paths = {"data": self.data.absolute(), "out": self.out.absolute()}
        return self.model_copy(update=paths | {"prompts": self.prompts.model_copy(update=given)})

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep OUT for this process, and the configuration in it.

        Raises:
            ValueError: another process has it, or it holds vectors that were made with other settings.
        """
        self._expect_alike()
        self.out.mkdir(parents=True, exist_ok=True)
        taken = f"{self.out} is being written by another process: wait for it, or choose another out="
        with held(self.out / LOCK_FILE, taken):
            write_whole(self.out / CONFIG_FILE, dump(self))
            yield

    def _expect_alike(self) -> None:
        """ValueError where OUT is something else, or its vectors would all be thrown away."""
        file = self.out / CONFIG_FILE
        if not file.exists():
            if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
                raise ValueError(f"{self.out}: something is there that is no store of vectors; choose another out=")
            return
        before, now = _decisive(load(ExtractConfig, file)), _decisive(self)
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if changed and any((self.out / USERS).glob("part-*")):
            key = changed[0]
            raise ValueError(
                f"{self.out} holds vectors made with {key} = {before.get(key)!r}, not {now.get(key)!r}: "
                "choose another out=, or delete that folder"
            )


@dataclass(frozen=True)
class Scenarios:
    """The first piece of work: the scenarios' prompts; what comes with it says what the model is."""

    prompts: tuple[Prompt, ...]

    def __str__(self) -> str:
        return "the scenarios' prompts"


@dataclass(frozen=True)
class Shard:
    """A file of histories: makes users/part-NUMBER and failed/part-NUMBER."""

    number: int
    stamp: str
    """`Extractor.stamp`, as the driver knows it."""
    without: tuple[int, ...] = ()
    """Rows of users whose prompts no worker survives."""

    def __str__(self) -> str:
        return f"shard {self.number}"


@dataclass(frozen=True)
class Probe:
    """Some users of a shard, `first` to `stop` - 1 in its order, encoded to see whether the worker survives it."""

    number: int
    first: int
    stop: int

    def __str__(self) -> str:
        return f"users {self.first} to {self.stop - 1} of shard {self.number}"

    def halves(self) -> tuple["Probe", "Probe"]:
        """Both parts of two or more users."""
        middle = (self.first + self.stop) // 2
        return Probe(self.number, self.first, middle), Probe(self.number, middle, self.stop)


@dataclass(frozen=True)
class Described:
    """What a worker says of the scenarios' prompts and of its model."""

    vectors: "np.ndarray[Any, np.dtype[np.float32]]"
    """[S, width]"""
    reasons: tuple[str | None, ...]
    stamp: str
    fingerprint: str
    model: dict[str, Any]
    longest: int
    """Tokens of the longest prompt that the model takes."""
    peak: float
    """Floating-point operations per second that its device does at best, in the model's number format."""


@dataclass(frozen=True)
class Counts:
    """What a worker has done."""

    users: int = 0
    kept: int = 0
    """Users whose prompt had a vector already."""
    tokens: int = 0
    operations: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.users + other.users,
            self.kept + other.kept,
            self.tokens + other.tokens,
            self.operations + other.operations,
        )


Piece = Scenarios | Shard | Probe
Result = Described | Counts


@dataclass(frozen=True)
class Extractor:
    """Makes a worker, in the worker's process."""

    out: Path
    model: EncoderConfig
    prompts: PromptConfig
    templates: Templates
    scenarios: tuple[Scenario, ...]
    histories: str
    """The digest of the histories."""
    encoder: Callable[[EncoderConfig], Encoder] = Encoder

    def __call__(self) -> Callable[[Piece], Result]:
        """Load the model."""
        return _Worker(self, self.encoder(self.model)).answer

    def stamp(self, fingerprint: str) -> str:
        """Digest of everything that shapes a shard, with the model's fingerprint."""
        parts = (fingerprint, self.templates.digest, str(self.prompts.user_tokens), self.histories)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class _Worker:
    def __init__(self, task: Extractor, encoder: Encoder) -> None:
        self._task, self._encoder = task, encoder
        self._stamp = task.stamp(encoder.fingerprint)

    def answer(self, piece: Piece) -> Result:
        if isinstance(piece, Scenarios):
            return self._scenarios(piece)
        if isinstance(piece, Probe):
            histories = self._histories(piece.number)[piece.first : piece.stop]
            _, prompts, _ = self._prompts(histories, ())
            self._encoder.encode([prompt for prompt in prompts if prompt is not None])
            return Counts()
        return self._shard(piece)

    def _scenarios(self, piece: Scenarios) -> Described:
        encoded = self._encoder.encode(piece.prompts)
        return Described(
            vectors=encoded.vectors,
            reasons=tuple(encoded.reasons),
            stamp=self._stamp,
            fingerprint=self._encoder.fingerprint,
            model=self._encoder.describe(),
            longest=self._encoder.longest,
            peak=self._encoder.peak(),
        )

    def _shard(self, piece: Shard) -> Counts:
        if piece.stamp != self._stamp:
            raise ValueError(
                "workers disagree about the model: they have another model.dtype by default, or other files; give "
                "model.dtype, and the same files to all machines"
            )
        histories = self._histories(piece.number)
        reasons, prompts, digests = self._prompts(histories, piece.without)
        vectors = np.zeros((len(histories), self._encoder.width), dtype=np.float32)
        known = np.zeros(len(histories), dtype=bool)
        if (self._task.out / PREVIOUS).exists():
            known, vectors = PreviousVectors(self._task.out / PREVIOUS).take(digests)
        new = [place for place, prompt in enumerate(prompts) if prompt is not None and not known[place]]
        encoded = self._encoder.encode([prompt for place in new if (prompt := prompts[place]) is not None])
        vectors[new] = encoded.vectors
        for place, reason in zip(new, encoded.reasons, strict=True):
            reasons[place] = reason
        StoreWriter(self._task.out, self._stamp, self._encoder.width).write_shard(
            piece.number,
            np.array([history.row for history in histories], dtype=np.int64),
            pa.array([history.id for history in histories]),
            digests,
            vectors,
            reasons,
        )
        return Counts(len(histories), int(known.sum()), encoded.tokens, encoded.operations)

    def _histories(self, number: int) -> list[History]:
        return read_histories(shard_file(self._task.out / HISTORIES, number))

    def _prompts(
        self, histories: Sequence[History], without: Sequence[int]
    ) -> tuple[list[str | None], list[Prompt | None], list[bytes]]:
        """For each user the reason why there is no prompt, or the prompt, and the digest of what shapes its vector."""
        reasons: list[str | None] = []
        prompts: list[Prompt | None] = []
        task = self._task
        for history in histories:
            try:
                if history.row in without:
                    raise PromptError(KILLED)
                prompts.append(user_prompt(history, task.scenarios, task.templates, task.prompts, self._encoder.count))
                reasons.append(None)
            except PromptError as error:
                prompts.append(None)
                reasons.append(str(error))
        nothing = Prompt("", 0)
        shown = [nothing if prompt is None else prompt for prompt in prompts]
        digests = [prompt_digest(self._encoder.fingerprint, prompt.text, prompt.own_start) for prompt in shown]
        return reasons, prompts, digests


@dataclass(frozen=True)
class Summary:
    """What became of an extraction."""

    config: ExtractConfig
    manifest: Manifest
    without_history: int
    """Users of the table with no event before the cut-off."""
    reasons: dict[str, int]
    """Reason -> users that failed for it."""
    done: Counts
    """What this process had its workers do; shards of an earlier one are not in it."""
    seconds: float
    peak: float
    """Floating-point operations per second of all workers at best."""
    compressed: CompressReport | None
    size: int
    """Bytes of the vectors on disk, in all forms."""

    def table(self) -> Table:
        """The summary for people, a line for each thing to know."""
        manifest = self.manifest
        table = Table(title=f"{self.config.out}: vectors of users", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        table.add_row("users with a vector", f"{manifest.users:,}", style="bold")
        for reason, count in self.reasons.items():
            hint = "; --retry-failed tries them again" if _of_the_machine(reason) else ""
            table.add_row("default vector", f"{count:,} failed: {reason}{hint}", style="yellow")
        if self.without_history:
            table.add_row("default vector", f"{self.without_history:,} without events")
        table.add_section()
        table.add_row("this time", f"{self.done.kept:,} users kept, {self.done.users - self.done.kept:,} encoded")
        if self.done.tokens:
            rates = speeds(self.done, self.seconds, self.peak)
            table.add_row("tokens", f"{self.done.tokens:,} in {self.seconds:,.1f} s")
            table.add_row("speed", ", ".join(f"{name} {value}" for name, value in rates.items()))
        table.add_section()
        table.add_row("model", f"{manifest.model['name']}, {manifest.model['dtype']}")
        table.add_row("vectors", f"width {manifest.width}, pooling {manifest.pooling}, layer {manifest.layer}")
        if manifest.cutoff is not None:
            table.add_row("events before", f"{manifest.cutoff} (unix seconds)")
        if self.compressed is not None:
            kept = f"{self.compressed.total:.1%} of the variance"
            table.add_row("for training", f"width {len(self.compressed.retained)} keeps {kept}")
        table.add_row("size on disk", f"{self.size / 1e6:,.1f} MB")
        return table


def check(config: ExtractConfig) -> FeatureSchema:
    """The data's schema; raises what `extract` would raise about the configuration before any model is loaded."""
    schema = FeatureSchema.read(config.data)
    Templates.load(config.prompts)
    schema.expect_listed((schema.user_table, schema.item_table), "extraction")
    vocabulary_digest(config.data, schema.user_table.name)
    return schema


def extract(
    config: ExtractConfig,
    launcher: Launcher = "local",
    workers: int = 1,
    retries: int = 3,
    retry_failed: bool = False,
    encoder: Callable[[EncoderConfig], Encoder] = Encoder,
) -> Summary:
    """Make the store that `config` describes, or what is left to do of it.

    Args:
        config: what to make, and where.
        launcher: where workers run; on several machines, `config.out` is a folder that they share.
        workers: how many models are loaded; on CPU each has one core, else a GPU.
        retries: how often a shard is handed out again after its worker was lost, before the user is looked for who
            brings this about.
        retry_failed: make those finished shards again in which users failed for reasons of the machine: want of memory,
            or a dead worker.
        encoder: makes the model in a worker's process.

    Raises:
        ValueError: the data, the configuration or the model do not fit together, or OUT holds something else.
        LaunchError: no worker could be started, or they are lost for another reason than single prompts.
    """
    schema = check(config)
    place = config.absolute()
    with place.claimed():
        model = import_model(place.model, place.out / MODEL)
        histories = write_histories(place.data, schema, place.history, place.out / HISTORIES, place.users_per_shard)
        for note in histories.notes:
            log.warning("%s", note)
        templates = Templates.load(place.prompts)
        prompts = scenario_prompts(schema, histories.statistics, templates)
        make = Extractor(place.out, model, place.prompts, templates, schema.scenarios, histories.digest, encoder)
        with Workers(make, launcher, workers, model.device, retries) as crew:
            described = _describe(crew, prompts, schema)
            writer = StoreWriter(place.out, described.stamp, described.vectors.shape[1])
            if place.prompts.user_tokens > described.longest:
                raise ValueError(
                    f"prompts.user_tokens is {place.prompts.user_tokens}, but the model takes {described.longest} "
                    "tokens at most: lower it, so that longer prompts are cut and not refused"
                )
            _expect_same_model(place.out, described, templates)
            _set_aside(writer)
            writer.write_scenarios(
                [scenario.name for scenario in schema.scenarios],
                [prompt.text for prompt in prompts],
                described.vectors,
            )
            begun = time.monotonic()
            users = [place.users_per_shard] * (histories.shards - 1)
            users.append(histories.users - sum(users))
            done = _encode(crew, writer, users, retry_failed, workers, described.peak)
            seconds = time.monotonic() - begun
        manifest = writer.finish(_provenance(config, described, schema, templates, histories), histories.shards)
        shutil.rmtree(place.out / PREVIOUS, ignore_errors=True)
        compressed = None if place.compress is None else compress(place.out, **place.compress.model_dump())
    store = open_store(place.out)
    return Summary(
        config=config,
        manifest=manifest,
        without_history=schema.table(manifest.table).rows - 1 - histories.users,
        reasons=_reasons(store),
        done=done,
        seconds=seconds,
        peak=described.peak * workers,
        compressed=compressed,
        size=sum(file.stat().st_size for file in place.out.rglob("*.parquet") if HISTORIES not in file.parts),
    )


@dataclass(frozen=True)
class Shown:
    """A prompt to look at."""

    title: str
    prompt: Prompt
    tokens: int
    own_tokens: int
    """Those of its own part."""


def show_prompts(config: ExtractConfig, user: str | None = None, scenario: str | None = None) -> Iterator[Shown]:
    """The prompt of one user (a raw id) or scenario (a name) as an extraction makes it; or of all scenarios and a user.

    Raises:
        ValueError: there is no such user or scenario, or the user has no prompt; the message says why.
    """
    schema = check(config)
    names = [each.name for each in schema.scenarios]
    if scenario is not None and scenario not in names:
        raise ValueError(f"{config.data}: no scenario {scenario!r}; the data have {', '.join(names)}")
    templates = Templates.load(config.prompts)
    count = token_counter(config.model)
    if user is None:
        statistics = scenario_statistics(config.data, schema, config.history)
        for name, prompt in zip(names, scenario_prompts(schema, statistics, templates), strict=True):
            if scenario in (None, name):
                yield _shown(f"scenario {name}", prompt, count)
    if scenario is None:
        history = history_of(config.data, schema, config.history, _somebody(config, schema) if user is None else user)
        title = f"user {history.id} (row {history.row})"
        try:
            yield _shown(title, user_prompt(history, schema.scenarios, templates, config.prompts, count), count)
        except PromptError as error:
            raise ValueError(f"{title} has no prompt, and gets the default vector: {error}") from None


def _shown(title: str, prompt: Prompt, count: Callable[[str], int]) -> Shown:
    tokens = count(prompt.text)
    return Shown(title, prompt, tokens, tokens - count(prompt.text[: prompt.own_start]))


def _somebody(config: ExtractConfig, schema: FeatureSchema) -> int | str:
    """The id of a user with an event, from the first rows that have one."""
    # Loads pandas.
    from pyarrow.dataset import dataset

    label = config.history.label or schema.labels[0].name
    chosen = (pc.field(label) == 1) & (pc.field(schema.user) != UNSEEN) & (pc.field(schema.item) != UNSEEN)
    if config.history.before is not None and schema.time is not None:
        chosen &= pc.field(schema.time) < config.history.before
    found = dataset(config.data / "train", format="parquet").head(1, columns=[schema.user], filter=chosen)
    if not found.num_rows:
        raise ValueError(f"{config.data}/train: no row has {label} = 1 before the cut-off, so nobody has a prompt")
    vocabulary = config.data / "vocabulary" / f"{schema.user_table.name}.parquet"
    known = pq.read_table(vocabulary, columns=["id"], filters=[("row", "==", found[schema.user][0].as_py())])
    user: int | str = known["id"][0].as_py()
    return user


def _describe(crew: Workers[Piece, Result], prompts: Sequence[Prompt], schema: FeatureSchema) -> Described:
    ((_, described),) = crew.spread([Scenarios(tuple(prompts))])
    assert isinstance(described, Described)
    for scenario, reason in zip(schema.scenarios, described.reasons, strict=True):
        if reason:
            raise ValueError(f"scenario {scenario.name!r}: its prompt cannot be encoded: {reason}")
    return described


def _expect_same_model(out: Path, described: Described, templates: Templates) -> None:
    """ValueError where the vectors in OUT would all be thrown away: a name or a file may stand for something else now.

    `auto` in the configuration may be another number format on this machine than where they were made.
    """
    file = out / MADE_WITH_FILE
    now = {
        "model.dtype": described.model["dtype"],
        "model": described.fingerprint,
        "prompts": templates.digest,
    }
    before = json.loads(file.read_text()) if file.exists() else now
    changed = [key for key, value in now.items() if before[key] != value]
    if changed and any((out / USERS).glob("part-*")):
        key = changed[0]
        what = {"model": "other files of the model, or another version of this package", "prompts": "other templates"}
        raise ValueError(
            f"{out} holds vectors made with {what.get(key, f'{key} = {before[key]!r}, not {now[key]!r}')}: "
            "choose another out=, or delete that folder"
        )
    write_whole(file, json.dumps(now, indent=1) + "\n")


def _set_aside(writer: StoreWriter) -> None:
    """Move vectors that were made from other data to previous/, where those that still hold are taken from."""
    users, previous = writer.folder / USERS, writer.folder / PREVIOUS
    parts = sorted(users.glob("part-*.parquet"))
    if parts and not previous.exists() and _stamp(parts[0]) != writer.stamp:
        users.rename(previous)
        # Reasons are found anew; left alone, each would stand for a shard that has lost its vectors.
        shutil.rmtree(writer.folder / FAILED, ignore_errors=True)
    if previous.exists():
        (writer.folder / MANIFEST_FILE).unlink(missing_ok=True)
        found = PreviousVectors.build(previous, writer.width)
        log.info("the data have changed since; of %d vectors, those of unchanged prompts are kept", len(found))


def _stamp(part: Path) -> str | None:
    try:
        metadata = pq.read_schema(part).metadata or {}
    except (OSError, pa.ArrowException):
        return None
    return str(metadata.get(b"stamp", b"").decode())


def _encode(
    crew: Workers[Piece, Result],
    writer: StoreWriter,
    users: Sequence[int],
    retry_failed: bool,
    workers: int,
    peak: float,
) -> Counts:
    """Have every shard written that is not there; `users` are those of each shard, `peak` is one worker's."""

    def done(number: int) -> bool:
        return writer.shard_done(number, users[number]) and not (
            retry_failed and any(map(_of_the_machine, writer.reasons(number)))
        )

    left = [number for number in range(len(users)) if not done(number)]
    if left:
        (writer.folder / MANIFEST_FILE).unlink(missing_ok=True)
    finished = sum(users) - sum(users[number] for number in left)
    log.info("%d of %d shards are left, with %d users", len(left), len(users), sum(users) - finished)
    if not finished and 0 < len(left) < workers:
        log.info(
            "fewer shards than workers: with a smaller users_per_shard, all %d would have something to do", workers
        )
    meter = _Meter(Progress("extract", sum(users), done=finished, unit="user"), peak * workers)
    lost = {}
    for piece, result in crew.attempt(Shard(number, writer.stamp) for number in left):
        assert isinstance(piece, Shard)
        if isinstance(result, Lost):
            lost[piece.number] = result.how
        else:
            meter.add(result)
    for number, how in lost.items():
        without = _killers(crew, Probe(number, 0, users[number]), writer, how)
        for _, result in crew.spread([Shard(number, writer.stamp, without)]):
            meter.add(result)
    meter.close()
    return meter.counts


def _killers(crew: Workers[Piece, Result], shard: Probe, writer: StoreWriter, how: str) -> tuple[int, ...]:
    """Rows of the users of `shard` whose prompts no worker survives, found by halves; `how` its last worker ended."""
    log.warning("shard %d: looking for the user whose prompt kills its workers", shard.number)
    rows = [history.row for history in read_histories(shard_file(writer.folder / HISTORIES, shard.number))]
    suspects, killers = [shard], list[int]()
    while suspects:
        alone = [probe for probe in suspects if probe.stop - probe.first == 1]
        together = [probe for probe in suspects if probe.stop - probe.first > 1]
        suspects = []
        # Of many, one death is enough to look closer; a single one has to be beyond doubt.
        for probe, result in crew.attempt([half for whole in together for half in whole.halves()], retries=0):
            assert isinstance(probe, Probe)
            if isinstance(result, Lost):
                suspects.append(probe)
        for probe, result in crew.attempt(alone):
            assert isinstance(probe, Probe)
            if isinstance(result, Lost):
                log.warning("user row %d: %s (%s)", rows[probe.first], KILLED, result.how)
                killers.append(rows[probe.first])
        if len(killers) + len(suspects) > _MOST_KILLERS:
            break
    if not 0 < len(killers) <= _MOST_KILLERS:
        raise LaunchError(
            f"shard {shard.number} was lost with its workers, at last so: {how}; no single users' prompts do that. If "
            "memory is too small, give fewer --workers, or less to do at a time (model.batch_tokens)"
        )
    return tuple(sorted(killers))


class _Meter:
    """Adds up what workers have done, and shows it."""

    def __init__(self, progress: Progress, peak: float) -> None:
        self._progress, self._peak, self._begun = progress, peak, time.monotonic()
        self.counts = Counts()

    def add(self, result: Result) -> None:
        assert isinstance(result, Counts)
        self.counts += result
        self._progress.advance(result.users, speeds(self.counts, time.monotonic() - self._begun, self._peak))

    def close(self) -> None:
        self._progress.close()


def speeds(done: Counts, seconds: float, peak: float) -> dict[str, str]:
    """Users and tokens per second, and the share of the devices' best that went into the model; for people."""
    encoded = done.users - done.kept
    return {
        "users/s": f"{encoded / seconds:,.1f}",
        "tokens/s": f"{done.tokens / seconds:,.0f}",
        "MFU": f"{done.operations / seconds / peak:.1%}",
    }


def _provenance(
    config: ExtractConfig, described: Described, schema: FeatureSchema, templates: Templates, histories: Histories
) -> Provenance:
    table = schema.user_table.name
    return Provenance(
        # The name that was asked for: where it was found differs from one machine, and one store, to another.
        model=described.model | {"name": config.model.name},
        fingerprint=described.fingerprint,
        templates=templates.digest,
        pooling=config.model.pooling,
        layer=config.model.layer,
        cutoff=histories.cutoff,
        item_text=histories.item_text,
        data=str(config.data),
        table=table,
        vocabulary=vocabulary_digest(config.data, table),
        notes=histories.notes,
    )


def _of_the_machine(reason: str) -> bool:
    """Whether a prompt that failed so may well be encoded elsewhere."""
    return reason == KILLED or reason.endswith(NO_MEMORY)


def _reasons(store: VectorStore) -> dict[str, int]:
    """Users per reason; reasons that differ in their numbers alone count as one, which the first stands for."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for reason in store.failures()["reason"].to_pylist():
        kind = re.sub(r"\d[\d,.]*", "N", reason)
        counts[first.setdefault(kind, reason)] += 1
    return dict(counts.most_common())


def _decisive(config: ExtractConfig) -> dict[str, Any]:
    """What decides all vectors, by dotted key; not what a store is brought up to date with."""
    templates = {"scenario_template", "user_template"}
    whole = config.model_dump(
        mode="json",
        # Of templates the digest counts, wherever they lie.
        exclude={
            "data": True,
            "out": True,
            "compress": True,
            "history": {"before", "memory_limit"},
            "prompts": templates,
        },
    )
    # Both may have moved together, to another machine say.
    whole["data, from out,"] = os.path.relpath(config.data, config.out)
    for key in ("device", "batch_tokens"):
        del whole["model"][key]
    flat: dict[str, Any] = {}
    for key, value in whole.items():
        flat |= {f"{key}.{name}": below for name, below in value.items()} if isinstance(value, dict) else {key: value}
    return flat
