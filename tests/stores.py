"""Small stores of a language model's vectors, which no language model has made, beside the data of `canonical`."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import canonical
from msr_dist.llm.compress import compress
from msr_dist.llm.vectors import PROMPT_BYTES, Provenance, StoreWriter, vocabulary_digest

WIDTH, TABLE_WIDTH = 12, 8


def write_vocabulary(data: Path) -> None:
    rows = np.arange(1, canonical.USERS)
    (data / "vocabulary").mkdir(exist_ok=True)
    table = pa.table({"row": rows, "id": [f"u{row}" for row in rows], "count": np.ones_like(rows)})
    pq.write_table(table, data / "vocabulary/users.parquet")


def known(rows: np.ndarray) -> np.ndarray:
    """Users with a vector: not every third one, nor those that training never saw."""
    return (rows > 0) & (rows % 3 > 0)


def write(folder: Path, data: Path, seed: int = 0, scenarios: int = 3) -> Path:
    """A store of two shards about `data`, and its table form; the vocabulary must stand."""
    writer = StoreWriter(folder, "stamp", WIDTH)
    generator = np.random.default_rng(seed)
    for number, rows in enumerate(np.split(np.arange(1, canonical.USERS), [25])):
        digests = [hashlib.blake2b(str(row).encode(), digest_size=PROMPT_BYTES).digest() for row in rows]
        reasons = [None if know else "too long" for know in known(rows)]
        vectors = generator.normal(3, 1, (len(rows), WIDTH)).astype(np.float32)
        writer.write_shard(number, rows, pa.array([f"u{row}" for row in rows]), digests, vectors, reasons)
    names = [f"scenario {i}" for i in range(scenarios)]
    writer.write_scenarios(names, names, generator.normal(3, 1, (scenarios, WIDTH)).astype(np.float32))
    provenance = Provenance(
        model={"name": "tiny"},
        fingerprint="f0",
        templates="t0",
        pooling="mean_own",
        layer=-1,
        cutoff=1_500,
        item_text=(),
        data=str(data),
        table="users",
        vocabulary=vocabulary_digest(data, "users"),
    )
    writer.finish(provenance, 2)
    compress(folder, TABLE_WIDTH)
    return folder
