"""What a language model says of users and scenarios, from the store that `msr-dist extract` has made to a run's tables.

Users' vectors are a fixed table of the model, `KNOWLEDGE_TABLE`: sharded, looked up with the user's id and written into
checkpoints as any table is, and trained by nothing. A row of it is the vector, 1 where the user has one (else both are
0, the mean vector's), and three columns that only make the width a multiple of 4. Scenarios' vectors are few: they
stand in the schema, where the model finds them.
"""

import zlib
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from msr_dist import noise
from msr_dist.config import Config
from msr_dist.data.places import Folder
from msr_dist.files import digest_of
from msr_dist.llm.parquet import MANIFEST_FILE
from msr_dist.llm.vectors import RowVectors, VectorStore, open_store, open_table, vocabulary_digest
from msr_dist.schema import KNOWLEDGE_TABLE, FeatureSchema, Knowledge

_BLOCK = 1 << 16  # rows that are read at a time where single rows are wanted


class KnowledgeConfig(Config):
    """Which vectors of a language model a run reads, and what they are expected to be."""

    store: Folder
    """A folder that `msr-dist extract` has made from the run's data."""
    width: int = Field(default=64, ge=4, multiple_of=4)
    """Of the users' vectors, as `msr-dist compress STORE --width N` has made them."""
    model: str | None = None
    """The language model that the store must be of, as its extraction named it; None takes any."""
    pooling: str | None = None
    """The pooling that the store must be of; None takes any."""
    cutoff: int | None = None
    """The time (unix seconds) before which lie all rows that entered the store's prompts; None takes any."""
    digest: str | None = None
    """Of the vectors' manifest. A run writes down here what it starts with, and never goes on with other vectors."""

    def pinned(self) -> Self:
        """The same with a digest: of what the store holds now, where none is asked for.

        Raises:
            ValueError: the store holds no vectors of this width.
        """
        return self if self.digest else self.model_copy(update={"digest": _digest(self._open()[1])})

    def apply(self, schema: FeatureSchema, data: Path) -> FeatureSchema:
        """The schema of a run on `data`, with what the store says.

        Raises:
            ValueError: there is no complete store, it is not what the run expects, or it is about other data.
        """
        store, users = self._open()
        where, table = f"knowledge.store: {store.folder}", schema.user_table.name
        store.manifest.require({"model": self.model, "pooling": self.pooling, "cutoff": self.cutoff}, where)
        if self.digest not in (None, _digest(users)):
            raise ValueError(
                f"{where}: the store's vectors of width {self.width} have digest {_digest(users)!r}, those of the run "
                f"{self.digest!r}: they have been made again since; start a run of another name"
            )
        vocabulary = vocabulary_digest(data, table)
        if (store.manifest.table, store.manifest.vocabulary) != (table, vocabulary):
            raise ValueError(
                f"{where}: was extracted from {store.manifest.data}, whose vocabulary of {store.manifest.table!r} has "
                f"digest {store.manifest.vocabulary!r}; in {data}, that of {table!r} has {vocabulary!r}: extract from "
                "the run's data"
            )
        here, there = [scenario.name for scenario in schema.scenarios], store.scenario_names()
        if here != there:
            raise ValueError(
                f"{where}: has vectors of scenarios {', '.join(there)}; {data} has {', '.join(here)}: extract again"
            )
        if KNOWLEDGE_TABLE in {each.name for each in schema.tables}:
            raise ValueError(
                f"knowledge: {data} has a table {KNOWLEDGE_TABLE!r} of its own, which is the name of the users' "
                "vectors: give it another name where the data are prepared"
            )
        scenarios = tuple(tuple(vector) for vector in store.scenario_vectors().tolist())
        knowledge = Knowledge(folder=users.folder, width=self.width, scenarios=scenarios)
        return schema.model_copy(update={"knowledge": knowledge})

    def _open(self) -> tuple[VectorStore, RowVectors]:
        store = open_store(self.store)
        return store, open_table(store, self.width)


class UserVectors:
    """The values of the fixed table, a range of rows at a time; opened by each process that fills its part of it."""

    def __init__(self, schema: FeatureSchema, seed: int) -> None:
        """Values for a schema with knowledge that is not trained; random and shuffled vectors depend on `seed`."""
        assert schema.knowledge is not None
        self._kind = schema.knowledge.vectors
        self._seed = seed ^ zlib.crc32(KNOWLEDGE_TABLE.encode())
        self._stored = RowVectors(schema.knowledge.folder)
        # With users' vectors for every scenario, an id looks up as many rows: each holds what is known of the user.
        self._copies = schema.copies(schema.user_table)
        if self._kind == "shuffled":
            self._rows, self._partners = _partners(self._stored, self._seed)

    def __call__(self, first: int, count: int) -> Tensor:
        """`[count, width + 4]` fp32 of the rows from `first` on."""
        start, stop = first // self._copies, -(-(first + count) // self._copies)
        vectors, known = self._stored.read(start, stop - start)
        if self._kind == "random":
            vectors[known] = self._random(np.flatnonzero(known) + start)
        if self._kind == "shuffled":
            begin, end = np.searchsorted(self._rows, [start, stop])
            vectors[known] = self._gathered(self._partners[begin:end])
        values = torch.zeros(stop - start, self._stored.width + 4)
        values[:, : self._stored.width] = torch.from_numpy(vectors)
        values[:, self._stored.width] = torch.from_numpy(known)
        return values[torch.arange(first, first + count) // self._copies - start]

    def _random(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """`[N, width]`, independent standard normal: as those of a language model are, once they are whitened."""
        uniform = noise.uniform(self._seed, torch.from_numpy(rows), torch.arange(self._stored.width))
        # By half a step, so that 0 has a place on the curve; in double, so that the last step does not become 1.
        drawn: npt.NDArray[np.float32] = torch.special.ndtri(uniform.double() + 2.0**-25).float().numpy()
        return drawn

    def _gathered(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The vectors of single rows; reads the blocks that hold them, which is most of the store if they are many."""
        vectors = np.empty((len(rows), self._stored.width), np.float32)
        blocks = rows // _BLOCK
        for block in np.unique(blocks):
            found, _ = self._stored.read(int(block) * _BLOCK, _BLOCK)
            vectors[blocks == block] = found[rows[blocks == block] % _BLOCK]
        return vectors


def _digest(users: RowVectors) -> str:
    # It names the store's own manifest, which names the content of every file.
    return digest_of(users.folder / MANIFEST_FILE)


def _partners(stored: RowVectors, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows that have a vector, ascending, and for each of them another one, all of them once: 16 bytes per user.

    Users without a vector stay without one, so that nothing differs from the store but who has which vector.
    """
    known = [np.flatnonzero(stored.read(start, _BLOCK)[1]) + start for start in range(0, stored.rows, _BLOCK)]
    rows = np.concatenate(known)
    # One circle through all users in random order: nobody is followed by himself.
    drawn = noise.uniform(seed, torch.from_numpy(rows), torch.zeros(1, dtype=torch.int64))[:, 0].numpy()
    circle = np.argsort(drawn, kind="stable")
    partners = np.empty_like(rows)
    partners[circle] = rows[np.roll(circle, -1)]
    return rows, partners
