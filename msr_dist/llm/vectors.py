"""The store: what a frozen language model made of every user and scenario, in parquet files that are whole or absent.

STORE/
  users/part-00000.parquet ...    row, id, prompt (digest of what shaped the vector), vector
  failed/part-00000.parquet ...   row, id, reason: the users of the same shard that have no vector
  scenarios.parquet               scenario, name, prompt, vector
  statistics.parquet              mean and standard deviation of the users' vectors, per dimension
  manifest.json                   written last: the store is complete when it exists
  pca-64/                         the users' vectors in the width that training wants (`msr_dist.llm.compress`)

Vectors are fp16. `StoreWriter` writes a store, shard by shard and from any process; `open_store` reads a complete one.
A `row` is a row of the users' embedding table.
"""

import hashlib
import logging
import shutil
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from msr_dist.config import Config
from msr_dist.files import PARTIAL, digest_of, sync, whole
from msr_dist.llm.parquet import (
    MANIFEST_FILE,
    StoredFile,
    check,
    pack,
    read_manifest,
    read_table,
    reading,
    row_groups,
    stored_file,
    unpack,
    write_json,
    write_table,
)

log = logging.getLogger(__name__)

STATISTICS_FILE = "statistics.parquet"
SCENARIOS_FILE = "scenarios.parquet"
USERS, FAILED, INDEX = "users", "failed", "index"
PROMPT_BYTES = 16
"""Length of the digest that stands beside a vector."""
_LARGEST = float(np.finfo(np.float16).max)

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


class Provenance(Config):
    """What a store's vectors were made of, and how: what an extraction knows and a training run may ask for."""

    model: dict[str, str | int | float | bool | None]
    """The encoder's own description: at least its `name`, as the configuration gives it."""
    fingerprint: str
    """Digest of everything of the model that shapes a vector."""
    templates: str
    """Digest of the prompts' templates."""
    pooling: str
    layer: int
    cutoff: int | None
    """Only training rows before this time (unix seconds) entered a prompt; None where the data have no time."""
    item_text: tuple[str, ...]
    """The text columns that name an item."""
    data: str
    """The prepared data, as the extraction was given them."""
    table: str
    """The users' embedding table."""
    vocabulary: str
    """`vocabulary_digest` of that table."""
    notes: tuple[str, ...] = ()
    """What a reader of results should know of the histories: what has no text, what is newer than held-out rows."""

    @field_validator("model")
    @classmethod
    def _named(cls, model: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(model.get("name"), str):
            raise ValueError("the description of a model needs its name")
        return model


class Manifest(Provenance):
    """What a complete store holds. Nothing in it depends on when, by whom or in how many attempts it was made."""

    format: Literal[1] = 1
    package: str
    """The version of msr-dist that wrote it."""
    stamp: str
    """Digest of everything that shapes a shard: the model, the templates, the histories."""
    width: int = Field(ge=1)
    """Length of a vector."""
    users: int = Field(ge=0)
    """Users with a vector."""
    failed: int = Field(ge=0)
    """Users without one."""
    scenarios: StoredFile
    statistics: StoredFile
    shards: tuple[StoredFile, ...]
    failures: tuple[StoredFile, ...]

    def files(self) -> tuple[StoredFile, ...]:
        """Every file of the store but the manifest."""
        return (self.scenarios, self.statistics, *self.shards, *self.failures)

    def require(self, asked: Mapping[str, str | int | None], where: str) -> None:
        """Compare with what a training run asks for; None asks for nothing.

        Args:
            asked: such as {"model": "...", "pooling": "mean_own", "dtype": "bf16"}: names of this manifest or of the
                model's description; `model` is the model's name.
            where: names the store.

        Raises:
            ValueError: one line per difference, with both sides.
        """
        has: dict[str, object] = self.model | self.model_dump(exclude={"model"}) | {"model": self.model["name"]}
        unknown = sorted(asked.keys() - has.keys())
        if unknown:
            raise ValueError(f"{where}: a store tells nothing of {unknown[0]!r}; it knows {', '.join(sorted(has))}")
        differences = [
            f"{where}: the store has {name} {has[name]!r}, the run asks for {value!r}; extract again, or ask for what "
            "the store has"
            for name, value in asked.items()
            if value is not None and has[name] != value
        ]
        if differences:
            raise ValueError("\n".join(differences))


@dataclass(frozen=True)
class Written:
    """What became of the users of a shard."""

    users: int
    failed: int


@dataclass(frozen=True)
class StoreWriter:
    """Writes the store in `folder`; light enough to be sent to every worker."""

    folder: Path
    stamp: str
    """Digest of everything that shapes a shard; one with another stamp is not done."""
    width: int

    def write_shard(
        self,
        number: int,
        rows: Rows,
        ids: pa.Array,
        prompts: Sequence[bytes],
        vectors: Floats,
        reasons: Sequence[str | None],
    ) -> Written:
        """Write users/part-NUMBER and failed/part-NUMBER; whichever of two writers is last, the files are whole.

        Args:
            number: of the shard, from 0.
            rows: `[N]`, ascending; rows of a later shard are larger.
            ids: `[N]`, as the vocabulary has them.
            prompts: N digests of `PROMPT_BYTES` bytes.
            vectors: `[N, width]`.
            reasons: why a user has no vector, or None. A vector that is not finite in fp16 is a reason as well.
        """
        assert len(rows) == len(ids) == len(prompts) == len(vectors) == len(reasons)
        assert np.all(np.diff(rows) > 0), "rows of a shard ascend"
        half, faults = _halved(vectors)
        told = [reason or fault for reason, fault in zip(reasons, faults, strict=True)]
        good = np.array([reason is None for reason in told], dtype=bool)
        failed = pa.table(
            {
                "row": pa.array(rows[~good], pa.int64()),
                "id": ids.filter(pa.array(~good)),
                "reason": pa.array([reason for reason in told if reason is not None], pa.string()),
            }
        )
        users = pa.table(
            {
                "row": pa.array(rows[good], pa.int64()),
                "id": ids.filter(pa.array(good)),
                "prompt": pa.array(prompts, pa.binary(PROMPT_BYTES)).filter(pa.array(good)),
                "vector": pack(half[good]),
            }
        )
        # The users' file comes second: where it stands, its other half does.
        for kind, table in ((FAILED, failed), (USERS, users)):
            (self.folder / kind).mkdir(parents=True, exist_ok=True)
            metadata = {"stamp": self.stamp, "shard": str(number)}
            write_table(self._part(kind, number), table.replace_schema_metadata(metadata))
        return Written(users.num_rows, failed.num_rows)

    def shard_done(self, number: int, users: int) -> bool:
        """Whether both files of a shard are readable, of this stamp, and account for `users` users.

        A shard that is there and does not count is named in the log.
        """
        files = [self._part(kind, number) for kind in (USERS, FAILED)]
        if not any(file.exists() for file in files):
            return False
        try:
            found: int = sum(batch.num_rows for file in files for batch in self._batches(file, number))
        except ValueError as error:
            log.warning("%s; the shard is made again", error)
            return False
        if found != users:
            log.warning("%s: accounts for %d users, the shard has %d; it is made again", files[0], found, users)
        return found == users

    def reasons(self, number: int) -> list[str]:
        """Why users of a finished shard have no vector."""
        file = self._part(FAILED, number)
        return [reason for batch in self._batches(file, number) for reason in batch["reason"].to_pylist()]

    def write_scenarios(self, names: Sequence[str], prompts: Sequence[str], vectors: Floats) -> None:
        """Write scenarios.parquet, scenario 0 first; ValueError where a vector is not finite in fp16."""
        assert len(names) == len(prompts) == len(vectors)
        half, faults = _halved(vectors)
        for name, fault in zip(names, faults, strict=True):
            if fault:
                raise ValueError(f"scenario {name!r}: {fault}; choose another model, layer or dtype")
        columns = {
            "scenario": pa.array(range(len(names)), pa.int32()),
            "name": pa.array(names, pa.string()),
            "prompt": pa.array(prompts, pa.string()),
            "vector": pack(half),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_table(self.folder / SCENARIOS_FILE, pa.table(columns).replace_schema_metadata({"stamp": self.stamp}))

    def finish(self, provenance: Provenance, shards: int) -> Manifest:
        """Check that every user stands once, compute the users' mean and standard deviation, and write the manifest.

        Shards are read in their order, so that no figure depends on who wrote them. What is left of attempts that were
        cut off goes.

        Raises:
            ValueError: a shard is absent, damaged or of another stamp, or a row occurs twice.
        """
        self._clear(shards)
        stored: dict[str, list[StoredFile]] = {USERS: [], FAILED: []}
        moments, last = _Moments(self.width), -1
        for number in range(shards):
            rows = [np.empty(0, dtype=np.int64)]
            for kind in (USERS, FAILED):
                file, count = self._part(kind, number), 0
                for batch in self._batches(file, number):
                    rows.append(batch["row"].to_numpy())
                    count += batch.num_rows
                    if kind == USERS:
                        moments.add(unpack(batch["vector"]))
                stored[kind].append(stored_file(self.folder, file, count))
            last = _ascending(np.sort(np.concatenate(rows)), last, self._part(USERS, number))
        mean, std = moments.result()
        write_table(self.folder / STATISTICS_FILE, pa.table({"mean": mean, "std": std}))
        scenarios = sum(batch.num_rows for batch in self._batches(self.folder / SCENARIOS_FILE, None))
        manifest = Manifest(
            **provenance.model_dump(),
            package=version("msr-dist"),
            stamp=self.stamp,
            width=self.width,
            users=sum(file.rows for file in stored[USERS]),
            failed=sum(file.rows for file in stored[FAILED]),
            scenarios=stored_file(self.folder, self.folder / SCENARIOS_FILE, scenarios),
            statistics=stored_file(self.folder, self.folder / STATISTICS_FILE, self.width),
            shards=tuple(stored[USERS]),
            failures=tuple(stored[FAILED]),
        )
        write_json(self.folder / MANIFEST_FILE, manifest)
        return manifest

    def _part(self, kind: str, number: int) -> Path:
        return self.folder / kind / f"part-{number:05d}.parquet"

    def _batches(self, file: Path, number: int | None) -> Iterator[pa.Table]:
        """`file` by row groups; ValueError where it is damaged, or not of this stamp and the shard `number`."""
        with reading(file, []) as parquet:
            found, metadata = parquet.schema_arrow, parquet.schema_arrow.metadata or {}
            if metadata.get(b"stamp") != self.stamp.encode():
                raise ValueError(f"{file}: was made with other settings or from other data")
            if number is not None and metadata.get(b"shard") != str(number).encode():
                raise ValueError(f"{file}: holds another shard than its name says")
            if not found.equals(self._schema(file, found.types[1:2])):
                raise ValueError(f"{file}: is damaged, its columns are {', '.join(found.names)}")
            for group in range(parquet.num_row_groups):
                yield parquet.read_row_group(group, use_threads=False)

    def _schema(self, file: Path, ids: list[pa.DataType]) -> pa.Schema:
        """The columns of `file`, whose ids are of one of the types of a vocabulary."""
        vector = pa.list_(pa.float16(), self.width)
        if file.name == SCENARIOS_FILE:
            return pa.schema({"scenario": pa.int32(), "name": pa.string(), "prompt": pa.string(), "vector": vector})
        known = ids[0] if ids and (pa.types.is_integer(ids[0]) or pa.types.is_string(ids[0])) else pa.string()
        if file.parent.name == FAILED:
            return pa.schema({"row": pa.int64(), "id": known, "reason": pa.string()})
        return pa.schema({"row": pa.int64(), "id": known, "prompt": pa.binary(PROMPT_BYTES), "vector": vector})

    def _clear(self, shards: int) -> None:
        """Remove half-written files, and shards that a finer division of the users has left."""
        for kind in (USERS, FAILED):
            expected = {self._part(kind, number) for number in range(shards)}
            for file in sorted(set((self.folder / kind).glob("part-*")) - expected):
                log.info("%s: left from an earlier attempt, removed", file)
                file.unlink()


class VectorStore:
    """A complete store, read."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """ValueError where the users' mean and standard deviation are not those that the manifest knows."""
        self.folder, self.manifest = folder, manifest
        check(folder, manifest.statistics)
        table = read_table(folder / STATISTICS_FILE)
        self.mean: Floats = table["mean"].to_numpy().astype(np.float32)
        """Of the users' vectors, `[width]`."""
        self.std: Floats = table["std"].to_numpy().astype(np.float32)
        """Of the users' vectors (population), `[width]`; 0 where a dimension is constant."""

    def verify(self) -> None:
        """Compare the checksum of every file; ValueError names the first that differs."""
        for stored in self.manifest.files():
            check(self.folder, stored)

    def batches(self) -> Iterator[tuple[Rows, Floats]]:
        """Rows `[N]`, ascending, and vectors `[N, width]` of all users, a row group at a time."""
        for stored in self.manifest.shards:
            for table in row_groups(self.folder / stored.file, ["row", "vector"]):
                yield table["row"].to_numpy(), unpack(table["vector"]).astype(np.float32)

    def failures(self) -> pa.Table:
        """The users without a vector: row, id and reason."""
        return pa.concat_tables(read_table(self.folder / stored.file) for stored in self.manifest.failures)

    def normalise(self, vectors: Floats) -> Floats:
        """`[N, width]` of users with mean 0 and standard deviation 1 per dimension; 0 where a dimension is constant."""
        return normalised(vectors, self.mean, self.std)

    def scenario_names(self) -> list[str]:
        """Scenario 0 first."""
        names: list[str] = self._scenarios()["name"].to_pylist()
        return names

    def scenario_prompts(self) -> list[str]:
        """Scenario 0 first."""
        prompts: list[str] = self._scenarios()["prompt"].to_pylist()
        return prompts

    def scenario_vectors(self, normalised: bool = True) -> Floats:
        """`[S, width]`, finite.

        Prompts of scenarios are other prompts than those of users: less the users' mean, all of them would be one large
        offset. Normalised, they are centred on their own mean; a dimension is divided by its standard deviation over
        users and scenarios together (the root of the two variances' sum), so that neither a dimension that is large in
        this model nor one that no user moves speaks for all; one factor then makes the mean square 1. A single scenario
        differs from nothing: zeros.
        """
        vectors = unpack(self._scenarios()["vector"]).astype(np.float64)
        if normalised:
            # Shifted by the first: equal vectors leave exact zeros.
            vectors -= vectors[:1].copy()
            vectors -= vectors.mean(axis=0)
            spread = np.sqrt(self.std.astype(np.float64) ** 2 + vectors.var(axis=0))
            vectors /= np.where(spread == 0, 1, spread)
            size = np.sqrt(np.mean(vectors**2))
            vectors /= size if size > 0 else 1
        return vectors.astype(np.float32)

    def _scenarios(self) -> pa.Table:
        check(self.folder, self.manifest.scenarios)
        return read_table(self.folder / SCENARIOS_FILE)


def open_store(folder: Path) -> VectorStore:
    """The complete store in `folder`.

    Raises:
        ValueError: there is none, the extraction is not finished, or it is of another format.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        planned = len(list((folder / "histories").glob("part-*.parquet")))
        done = len(list((folder / USERS).glob("part-*.parquet")))
        if not planned and not done:
            raise ValueError(f"{folder}: no vectors of a language model there; make them with `msr-dist extract`")
        raise ValueError(
            f"{folder}: the extraction is not finished: {done} of {planned or 'an unknown number of'} shards; run the "
            "same `msr-dist extract` again, it continues"
        )
    return VectorStore(folder, read_manifest(file, Manifest))


class PreviousVectors:
    """Vectors of an older extraction, found by the digest of their prompt.

    FOLDER/index/ holds the digests in their order, the place of each, and the vectors in the order of the older files;
    all are mapped into memory and not read, so that finding costs a worker no more than what it takes.
    """

    def __init__(self, folder: Path) -> None:
        """Map the index that `build` has made in `folder`."""
        index = folder / INDEX
        self._digests, self._places, self._vectors = (
            np.load(index / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("digests", "places", "vectors")
        )

    @classmethod
    def build(cls, folder: Path, width: int) -> "PreviousVectors":
        """Index the shards `folder`/part-*.parquet, once; it takes the size of the vectors on disk.

        Files of another width are of another model and left out; damaged ones are left out and named in the log, so
        that their users are encoded again.
        """
        index = folder / INDEX
        if not index.exists():
            partial = folder / f"{INDEX}{PARTIAL}"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _index(sorted(folder.glob("part-*.parquet")), partial, width)
            partial.replace(index)
            sync(folder)
        return cls(folder)

    def __len__(self) -> int:
        return len(self._digests)

    def take(self, prompts: Sequence[bytes]) -> tuple[npt.NDArray[np.bool_], Floats]:
        """Which of `prompts` are known, `[N]`, and their vectors, `[N, width]`: 0 where they are not."""
        wanted = np.array(prompts, dtype=self._digests.dtype)
        vectors = np.zeros((len(wanted), self._vectors.shape[1]), dtype=np.float32)
        if not len(self._digests):
            return np.zeros(len(wanted), dtype=bool), vectors
        at = np.minimum(np.searchsorted(self._digests, wanted), len(self._digests) - 1)
        found = self._digests[at] == wanted
        vectors[found] = self._vectors[self._places[at[found]]]
        return found, vectors


class TableFile(StoredFile):
    """A file of the table form, whose rows ascend."""

    first: int
    """Its first row."""
    last: int
    """Its last row."""


class TableManifest(Config):
    """The users' vectors in the form that a table is filled with, and how they got it."""

    format: Literal[1] = 1
    package: str
    source: str
    """Digest of the store's manifest."""
    fingerprint: str
    """Of the model that made the vectors."""
    width: int = Field(ge=1)
    """Length of a vector in this form."""
    users: int = Field(ge=1)
    precision: Literal["fp16", "int8"]
    whiten: bool
    seed: int
    sample: int
    """How many users the components were to be fitted on, at most."""
    sampled: int
    """How many they were fitted on."""
    retained: tuple[float, ...]
    """Share of the variance of the normalised vectors that each component keeps."""
    scales: tuple[float, ...] | None
    """What one step of int8 is worth, per component; None with fp16."""
    components: StoredFile
    statistics: StoredFile
    files: tuple[TableFile, ...]


class RowVectors:
    """The table form of the users' vectors, read by ranges of rows; opened by each process that fills a table.

    Users' vectors have mean 0, so the zeros of a row without a vector are the mean vector.
    """

    def __init__(self, folder: Path) -> None:
        """Read the manifest of STORE/pca-WIDTH; ValueError where it is absent or unreadable."""
        if not (folder / MANIFEST_FILE).is_file():
            raise ValueError(f"{folder}: no table of vectors there; make it with `msr-dist compress`")
        self.folder = folder
        self.manifest = read_manifest(folder / MANIFEST_FILE, TableManifest)
        self.width = self.manifest.width
        self.rows = 1 + self.manifest.files[-1].last
        """One more than the last row that has a vector."""
        self._scales = np.array(self.manifest.scales or 1, dtype=np.float32)

    def read(self, first: int, count: int) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Vectors `[count, width]` of the rows from `first` on, zeros where a row has none, and which have one.

        Opens the files and reads the row groups that hold such rows, and no others.
        """
        vectors = np.zeros((count, self.width), dtype=np.float32)
        known = np.zeros(count, dtype=bool)
        files = self.manifest.files
        for place in range(bisect_left(files, first, key=lambda file: file.last), len(files)):
            if files[place].first >= first + count:
                break
            for rows, found in self._row_groups(files[place], first, first + count - 1):
                within = (rows >= first) & (rows < first + count)
                vectors[rows[within] - first] = found[within]
                known[rows[within] - first] = True
        return vectors, known

    def nearest(self, row: int, count: int) -> list[tuple[int, float]]:
        """The `count` other rows whose vectors are most like that of `row`, with their cosine; the nearest first."""
        (query,), (known,) = self.read(row, 1)
        if not known:
            raise ValueError(f"{self.folder}: row {row} has no vector")
        best: list[tuple[int, float]] = []
        for file in self.manifest.files:
            for rows, vectors in self._row_groups(file, file.first, file.last):
                sizes = np.linalg.norm(vectors, axis=1) * np.linalg.norm(query)
                cosines = vectors @ query / np.where(sizes == 0, 1, sizes)
                cosines[rows == row] = -np.inf
                top = np.argsort(-cosines, kind="stable")[:count]
                best += zip(rows[top].tolist(), cosines[top].tolist(), strict=True)
            best = sorted(best, key=lambda pair: -pair[1])[:count]
        return [pair for pair in best if pair[0] != row]

    def _row_groups(self, file: TableFile, first: int, last: int) -> Iterator[tuple[Rows, Floats]]:
        """The row groups of `file` that hold rows from `first` to `last`."""
        path = self.folder / file.file
        with reading(path, ["row", "vector"]) as parquet:
            for group in range(parquet.num_row_groups):
                bounds = parquet.metadata.row_group(group).column(0).statistics
                if bounds.max < first or bounds.min > last:
                    continue
                table = parquet.read_row_group(group, columns=["row", "vector"], use_threads=False)
                yield table["row"].to_numpy(), unpack(table["vector"]).astype(np.float32) * self._scales


def table_folder(store: Path, width: int) -> Path:
    """Where the table form of `width` stands within a store."""
    return store / f"pca-{width}"


def open_table(store: VectorStore, width: int) -> RowVectors:
    """The table form of a store in `width`; ValueError where there is none, or it was made from other vectors."""
    folder = table_folder(store.folder, width)
    command = f"`msr-dist compress {store.folder} --width {width}`"
    if not (folder / MANIFEST_FILE).is_file():
        raise ValueError(f"{store.folder}: has no vectors of width {width}; make them with {command}")
    table = RowVectors(folder)
    if table.manifest.source != digest_of(store.folder / MANIFEST_FILE):
        raise ValueError(f"{folder}: was made from other vectors than {store.folder} now holds; run {command}")
    return table


def prompt_digest(fingerprint: str, text: str, own_start: int) -> bytes:
    """What tells whether a vector still holds: digest of the model and of the prompt that it read."""
    shaping = f"{fingerprint}\n{own_start}\n{text}"
    return hashlib.blake2b(shaping.encode(), digest_size=PROMPT_BYTES).digest()


def vocabulary_digest(data: Path, table: str) -> str:
    """Digest of which id has which row in DATA/vocabulary/TABLE.parquet: of the content, however it is laid out."""
    file = data / "vocabulary" / f"{table}.parquet"
    if not file.is_file():
        raise ValueError(f"{file}: no such file; make the data with `msr-dist prepare`")
    # One stream for each part, so that the bounds of row groups show nowhere.
    rows, lengths, ids = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    textual = False
    for batch in row_groups(file, ["row", "id"]):
        if batch["row"].null_count or batch["id"].null_count:
            raise ValueError(f"{file}: has nulls; prepare the data again")
        column = batch["id"].combine_chunks()
        textual = not pa.types.is_integer(column.type)
        rows.update(batch["row"].cast(pa.int64()).to_numpy().tobytes())
        if textual:
            column = column.cast(pa.binary())
            lengths.update(pc.binary_length(column).to_numpy().astype(np.int64).tobytes())
            ids.update(b"".join(column.to_pylist()))
        else:
            ids.update(column.cast(pa.int64()).to_numpy().tobytes())
    parts = ["text" if textual else "integer", rows.hexdigest(), lengths.hexdigest(), ids.hexdigest()]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def normalised(vectors: Floats, mean: Floats, std: Floats) -> Floats:
    """`[N, width]` less the mean, by the standard deviation; 0 where that is 0."""
    scale = np.where(std == 0, 1, std).astype(np.float32)
    return np.asarray((vectors - mean) / scale, dtype=np.float32)


def _halved(vectors: Floats) -> tuple[npt.NDArray[np.float16], list[str | None]]:
    """The vectors in fp16, and for each what is wrong with it, if anything."""
    with np.errstate(over="ignore"):
        half = vectors.astype(np.float16)
    faults: list[str | None] = [None] * len(vectors)
    for place in np.flatnonzero(~np.isfinite(half).all(axis=1)):
        largest = float(np.abs(vectors[place]).max())
        faults[place] = (
            f"a value of {largest:.3g} is beyond fp16, which ends at {_LARGEST:.0f}"
            if np.isfinite(largest)
            else "the vector is not finite"
        )
    return half, faults


def _ascending(rows: Rows, after: int, file: Path) -> int:
    """The last of `rows`; ValueError where one occurs twice or is not larger than `after`."""
    twice = rows[1:][np.diff(rows) == 0]
    if len(twice):
        raise ValueError(f"{file}: row {twice[0]} occurs twice, among the users or those that failed")
    if len(rows) and rows[0] <= after:
        raise ValueError(f"{file}: row {rows[0]} belongs to an earlier shard, which ended with row {after}")
    return int(rows[-1]) if len(rows) else after


class _Moments:
    """Mean and spread per dimension of batches in a given order.

    Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance", equation 2.1, in fp64.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self._origin, self._mean, self._squares = np.zeros(width), np.zeros(width), np.zeros(width)

    def add(self, batch: npt.NDArray[np.float16]) -> None:
        if not len(batch):
            return
        values = batch.astype(np.float64)
        if not self.count:
            self._origin = values[0].copy()
        # Shifted by the first vector: the spread of a constant dimension is 0, not a rounding error.
        values -= self._origin
        mean = values.mean(axis=0)
        apart, total = mean - self._mean, self.count + len(values)
        self._squares += ((values - mean) ** 2).sum(axis=0) + apart**2 * (self.count * len(values) / total)
        self._mean += apart * (len(values) / total)
        self.count = total

    def result(self) -> tuple[Floats, Floats]:
        """Mean and standard deviation (population), `[width]` each; zeros of no vectors at all."""
        std = np.sqrt(self._squares / max(1, self.count))
        return (self._origin + self._mean).astype(np.float32), std.astype(np.float32)


def _index(files: Sequence[Path], out: Path, width: int) -> None:
    """Write digests, places and vectors of `files` as arrays into `out`; holds some 60 bytes per user in memory."""
    sizes = [_rows_of(file, width) for file in files]
    vectors = np.lib.format.open_memmap(
        out / "vectors.npy", mode="w+", dtype=np.float16, shape=(max(1, sum(sizes)), width)
    )
    digests, place = [np.empty(0, f"S{PROMPT_BYTES}")], 0
    for file, size in zip(files, sizes, strict=True):
        if not size:
            continue
        try:
            table = read_table(file, ["prompt", "vector"])
        except ValueError as error:
            log.warning("%s; its users are encoded again", error)
            continue
        vectors[place : place + size] = unpack(table["vector"])
        packed = b"".join(table["prompt"].to_pylist())
        digests.append(np.frombuffer(packed, f"S{PROMPT_BYTES}"))
        place += size
    vectors.flush()
    joined = np.concatenate(digests)
    order = np.argsort(joined, kind="stable")
    for name, array in (("digests", joined[order]), ("places", order)):
        with whole(out / f"{name}.npy") as opened:
            np.save(opened, array, allow_pickle=False)


def _rows_of(file: Path, width: int) -> int:
    """Rows of a shard; 0 where it has another width or is damaged, which is said."""
    try:
        with reading(file, ["prompt", "vector"]) as parquet:
            found = parquet.schema_arrow
            return int(parquet.metadata.num_rows) if found.field("vector").type.list_size == width else 0
    except ValueError as error:
        log.warning("%s; its users are encoded again", error)
        return 0
