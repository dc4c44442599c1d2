"""From the vectors of a language model to the width that training wants: principal components, streamed.

STORE/pca-WIDTH/
  part-00000.parquet ...   row, vector: all users with a vector, by row
  components.parquet       variance, retained (its share), scale and loadings of each component
  statistics.parquet       mean and standard deviation that come off before
  manifest.json            settings, source and checksums
"""

import logging
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from msr_dist.files import PARTIAL, digest_of, sync
from msr_dist.llm.parquet import (
    MANIFEST_FILE,
    check,
    pack,
    read_manifest,
    read_table,
    stored_file,
    unpack,
    write_json,
    write_table,
    writing,
)
from msr_dist.llm.vectors import (
    STATISTICS_FILE,
    Floats,
    Rows,
    TableFile,
    TableManifest,
    VectorStore,
    normalised,
    open_store,
    table_folder,
)
from msr_dist.noise import uniform

log = logging.getLogger(__name__)

COMPONENTS_FILE = "components.parquet"
_GROUP_ROWS = 8192
_FILE_GROUPS = 32
_FLOOR = 1e-6
"""Whitening adds this share of the mean variance to a component's own."""
_STEPS = 127  # of int8 on either side of 0

Precision = Literal["fp16", "int8"]


@dataclass(frozen=True)
class CompressReport:
    """What a compression kept."""

    folder: Path
    users: int
    sampled: int
    """Users that the components were fitted on."""
    retained: tuple[float, ...]
    """Share of the variance that each component keeps, the largest first."""
    total: float
    """Share of the variance that all of them keep."""
    made: bool
    """False where the same table was there already."""


@dataclass(frozen=True)
class Projection:
    """Takes vectors of a store to the width of a table; of new users too."""

    mean: Floats
    std: Floats
    loadings: npt.NDArray[np.float64]
    """`[width, store's width]`, one component a line, each of length 1."""
    variance: npt.NDArray[np.float64]
    """`[width]`, of the normalised vectors along each component."""
    retained: npt.NDArray[np.float64]
    """`[width]`, its share of all variance."""
    scale: npt.NDArray[np.float64]
    """`[width]`, what a component is multiplied by."""

    def __call__(self, vectors: Floats) -> Floats:
        """`[N, store's width]` to `[N, width]`."""
        projected: Floats = normalised(vectors, self.mean, self.std) @ self._matrix()
        return projected

    def _matrix(self) -> Floats:
        return np.ascontiguousarray((self.loadings * self.scale[:, None]).T.astype(np.float32))

    def write(self, folder: Path) -> None:
        """Write components.parquet and statistics.parquet."""
        columns = {"variance": self.variance, "retained": self.retained, "scale": self.scale}
        write_table(folder / COMPONENTS_FILE, pa.table(columns | {"loadings": pack(self.loadings)}))
        write_table(folder / STATISTICS_FILE, pa.table({"mean": self.mean, "std": self.std}))

    @classmethod
    def read(cls, folder: Path) -> "Projection":
        """That of the table form in `folder`; ValueError where it is damaged."""
        manifest = read_manifest(folder / MANIFEST_FILE, TableManifest)
        for stored in (manifest.components, manifest.statistics):
            check(folder, stored)
        components, statistics = read_table(folder / COMPONENTS_FILE), read_table(folder / STATISTICS_FILE)
        return cls(
            mean=statistics["mean"].to_numpy(),
            std=statistics["std"].to_numpy(),
            loadings=unpack(components["loadings"]),
            variance=components["variance"].to_numpy(),
            retained=components["retained"].to_numpy(),
            scale=components["scale"].to_numpy(),
        )


def compress(
    store: Path,
    width: int,
    *,
    whiten: bool = True,
    precision: Precision = "fp16",
    sample: int = 100_000,
    seed: int = 0,
) -> CompressReport:
    """Write STORE/pca-WIDTH, the users' vectors in the `width` principal components of the normalised vectors.

    Two passes over the store, three for int8; memory holds one row group and a matrix of the store's width squared.

    Args:
        store: a complete store.
        width: number of components.
        whiten: every component gets variance 1. One whose variance v is not above a millionth of the mean m of all, as
            beyond the rank of the vectors, is not blown up: it is divided by the root of v + 1e-6 m and stays near 0.
        precision: of the table; int8 has a step per component, 1/127 of its largest value, and errs by half a step.
        sample: fit on about so many users, chosen by a hash of `seed` and their row.
        seed: of the sample.

    Raises:
        ValueError: the store is not complete, or has fewer than `width` components.
    """
    opened = open_store(store)
    settings: dict[str, Any] = {
        "source": digest_of(store / MANIFEST_FILE),
        "width": width,
        "whiten": whiten,
        "precision": precision,
        "sample": sample,
        "seed": seed,
    }
    folder = table_folder(store, width)
    there = _intact(folder, settings)
    if there is not None:
        return _report(folder, there, made=False)
    projection, sampled = _fit(opened, width, whiten, sample, seed)
    scales = _scales(opened, projection) if precision == "int8" else None
    partial = folder.with_name(f"{folder.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    files = _write(partial, _rounded(opened, projection, scales))
    projection.write(partial)
    manifest = TableManifest(
        **settings,
        package=version("msr-dist"),
        fingerprint=opened.manifest.fingerprint,
        users=opened.manifest.users,
        sampled=sampled,
        retained=tuple(projection.retained.tolist()),
        scales=None if scales is None else tuple(scales.tolist()),
        components=stored_file(partial, partial / COMPONENTS_FILE, width),
        statistics=stored_file(partial, partial / STATISTICS_FILE, opened.manifest.width),
        files=tuple(files),
    )
    write_json(partial / MANIFEST_FILE, manifest)
    _put(partial, folder)
    return _report(folder, manifest, made=True)


def _report(folder: Path, manifest: TableManifest, made: bool) -> CompressReport:
    total = sum(manifest.retained)
    return CompressReport(folder, manifest.users, manifest.sampled, manifest.retained, total, made)


def _intact(folder: Path, settings: dict[str, Any]) -> TableManifest | None:
    """The manifest of what stands in `folder`, if that is whole and of these settings; else it says what is not."""
    if not folder.exists():
        return None
    try:
        found = read_manifest(folder / MANIFEST_FILE, TableManifest)
        for stored in (found.components, found.statistics, *found.files):
            check(folder, stored)
    except ValueError as error:
        log.warning("%s; %s is replaced", error, folder)
        return None
    for name, wanted in settings.items():
        if getattr(found, name) != wanted:
            what = "from other vectors" if name == "source" else f"with {name} {getattr(found, name)!r}"
            log.info("%s was made %s; it is replaced", folder, what)
            return None
    return found


def _fit(store: VectorStore, width: int, whiten: bool, sample: int, seed: int) -> tuple[Projection, int]:
    """The components of a sample, and its size."""
    covariance, sampled = np.zeros((store.manifest.width, store.manifest.width)), 0
    share = sample / max(1, store.manifest.users)
    for rows, vectors in store.batches():
        drawn = uniform(seed, torch.tensor(rows), torch.zeros(1, dtype=torch.int64))
        chosen = store.normalise(vectors[drawn[:, 0].numpy() < share]).astype(np.float64)
        covariance += chosen.T @ chosen
        sampled += len(chosen)
    most = min(sampled - 1, int(np.count_nonzero(store.std)))
    if width > most:
        raise ValueError(
            f"{store.folder}: width {width} is more than {sampled} users in a sample of vectors of width "
            f"{store.manifest.width} have components; the largest possible is {max(0, most)}"
        )
    # Of the corpus the mean is 0, and what a sample's own mean differs from it is variance of the sample.
    values, columns = np.linalg.eigh(covariance / sampled)
    variance, loadings = values[::-1][:width].clip(min=0), columns.T[::-1][:width]
    # An eigenvector is as good as its opposite: the largest loading decides.
    largest = np.abs(loadings).argmax(axis=1)
    loadings = loadings * np.sign(loadings[np.arange(width), largest])[:, None]
    total, floor = values.clip(min=0).sum(), _FLOOR * values.clip(min=0).mean()
    empty = int(np.count_nonzero(variance <= floor))
    if empty:
        log.warning("%s: %d of %d components have no variance to speak of", store.folder, empty, width)
    scale = 1 / np.sqrt(variance + floor) if whiten else np.ones(width)
    return Projection(store.mean, store.std, loadings, variance, variance / total, scale), sampled


def _scales(store: VectorStore, projection: Projection) -> Floats:
    """What a step of int8 is worth, per component: the largest value of all users is the last step."""
    largest = np.zeros(len(projection.scale), dtype=np.float32)
    for _, vectors in store.batches():
        largest = np.maximum(largest, np.abs(projection(vectors)).max(axis=0))
    return np.where(largest == 0, 1, largest / _STEPS).astype(np.float32)


def _rounded(
    store: VectorStore, projection: Projection, scales: Floats | None
) -> Iterator[tuple[Rows, npt.NDArray[Any]]]:
    """Rows and vectors of the table, in its precision."""
    for rows, vectors in store.batches():
        projected = projection(vectors)
        if scales is not None:
            yield rows, np.rint(projected / scales).clip(-_STEPS, _STEPS).astype(np.int8)
            continue
        with np.errstate(over="ignore"):
            half = projected.astype(np.float16)
        beyond = np.flatnonzero(~np.isfinite(half).all(axis=1))
        if len(beyond):
            row, largest = rows[beyond[0]], np.abs(projected[beyond[0]]).max()
            raise ValueError(
                f"{store.folder}: the vector of row {row} reaches {largest:.3g}, which is beyond fp16; fit on a larger "
                "sample, or choose a smaller width or int8"
            )
        yield rows, half


def _write(folder: Path, batches: Iterable[tuple[Rows, npt.NDArray[Any]]]) -> list[TableFile]:
    """Write part-*.parquet, in row groups and files of one size however the store's are cut."""
    files: list[TableFile] = []
    groups = _regroup(batches)
    for first in groups:
        file = folder / f"part-{len(files):05d}.parquet"
        lowest, highest, count = first["row"][0].as_py(), 0, 0
        with writing(file, first.schema) as writer:
            for group in chain([first], islice(groups, _FILE_GROUPS - 1)):
                writer.write_table(group)
                highest, count = group["row"][-1].as_py(), count + group.num_rows
        stored = stored_file(folder, file, count)
        files.append(TableFile(**stored.model_dump(), first=lowest, last=highest))
    return files


def _regroup(batches: Iterable[tuple[Rows, npt.NDArray[Any]]]) -> Iterator[pa.Table]:
    """The same rows in tables of `_GROUP_ROWS`, the last one shorter."""
    waiting: list[pa.Table] = []
    for rows, vectors in batches:
        waiting.append(pa.table({"row": rows, "vector": pack(vectors)}))
        while sum(table.num_rows for table in waiting) >= _GROUP_ROWS:
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, _GROUP_ROWS)
            waiting = [joined.slice(_GROUP_ROWS)]
    rest = pa.concat_tables(waiting)
    if rest.num_rows:
        yield rest


def _put(partial: Path, folder: Path) -> None:
    """Rename a whole folder into the place of one that may be there."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
