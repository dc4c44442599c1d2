"""A control for LLM4MSR: the users' vectors made of the words of their histories, without any language model.

python benchmarks/words.py knowledge/arts-office knowledge/arts-office-words

TF-IDF of all texts in a user's history, of which the prompts are made, in as many singular vectors as training reads.
What LLM4MSR gains with these is owed to the texts; only what it gains beyond them, to the language model. The new
store holds the same users as the old one and stands wherever a store does: give it as `knowledge.store`.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from msr_dist.llm.compress import compress
from msr_dist.llm.history import read_histories, shard_file
from msr_dist.llm.parquet import read_table
from msr_dist.llm.vectors import PROMPT_BYTES, Floats, Provenance, StoreWriter, VectorStore, open_store

STAMP = "words"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--width", type=click.IntRange(1), default=64, show_default=True, help="Of the vectors.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the decomposition.")
def main(store: Path, out: Path, width: int, seed: int) -> None:
    """Write to OUT what a bag of words knows of the users of STORE, which `msr-dist extract` has made."""
    try:
        opened = open_store(store)
        if out.exists():
            raise ValueError(f"{out}: something is there; choose another folder")
        users, scenarios = _texts(opened)
        if width >= len(users):
            raise ValueError(f"{store}: {len(users)} users have less than --width {width} directions")
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    words = TfidfVectorizer(sublinear_tf=True, stop_words="english").fit(users.values())
    svd = TruncatedSVD(width, random_state=seed)
    vectors = dict(zip(users, svd.fit_transform(words.transform(users.values())).astype(np.float32), strict=True))
    _write(opened, out, vectors, svd.transform(words.transform(scenarios)).astype(np.float32))
    compress(out, width)
    share = svd.explained_variance_ratio_.sum()
    click.echo(f"{out}: {len(users):,} users, {len(words.vocabulary_):,} words, {share:.1%} of the variance kept")


def _texts(store: VectorStore) -> tuple[dict[int, str], list[str]]:
    """By row of a user the texts of its history, and all texts of each scenario."""
    users: dict[int, str] = {}
    of_scenario: dict[int, list[str]] = defaultdict(list)
    known = {int(row) for rows, _ in store.batches() for row in rows}
    for number in range(len(store.manifest.shards)):
        for history in read_histories(shard_file(store.folder / "histories", number)):
            if history.row in known:
                users[history.row] = " ".join([history.about, *history.texts])
                for scenario, text in zip(history.scenarios, history.texts, strict=True):
                    of_scenario[scenario].append(text)
    return users, [" ".join(of_scenario[scenario]) for scenario in range(len(store.scenario_names()))]


def _write(store: VectorStore, out: Path, vectors: Mapping[int, Floats], scenarios: Floats) -> None:
    """A store of the same shards; who has no vector there has none here, for the same reason."""
    manifest = store.manifest
    writer = StoreWriter(out, STAMP, scenarios.shape[1])
    nothing = np.zeros(writer.width, np.float32)
    for number, files in enumerate(zip(manifest.shards, manifest.failures, strict=True)):
        tables = [read_table(store.folder / each.file) for each in files]
        users = pa.concat_tables(tables, promote_options="default").sort_by("row").combine_chunks()
        rows = users["row"].to_numpy()
        writer.write_shard(
            number,
            rows,
            users["id"].combine_chunks(),
            users["prompt"].fill_null(bytes(PROMPT_BYTES)).to_pylist(),
            np.stack([vectors.get(row, nothing) for row in rows.tolist()]),
            users["reason"].to_pylist(),
        )
    writer.write_scenarios(store.scenario_names(), store.scenario_prompts(), scenarios)
    provenance = {name: getattr(manifest, name) for name in Provenance.model_fields}
    changed = {"model": {"name": "TF-IDF and singular vectors"}, "fingerprint": STAMP, "pooling": "words", "layer": 0}
    writer.finish(Provenance(**provenance | changed), len(manifest.shards))


if __name__ == "__main__":
    main()
