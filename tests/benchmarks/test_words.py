"""The control made of words through the real command, on what a real extraction has left."""

import sys
from pathlib import Path

import numpy as np
import pytest

import command
import encoding
import texts
import tinymodel
from msr_dist.extract import ExtractConfig, extract
from msr_dist.llm.encode import EncoderConfig
from msr_dist.llm.history import HistoryConfig, read_histories
from msr_dist.llm.prompts import PromptConfig
from msr_dist.llm.vectors import open_store, open_table

WORDS = [sys.executable, str(Path(__file__).parents[2] / "benchmarks" / "words.py")]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Vectors of most users: the prompts of some do not fit."""
    folder = tmp_path_factory.mktemp("extracted")
    config = ExtractConfig(
        data=texts.write(folder / "data"),
        out=folder / "store",
        model=EncoderConfig(name=str(tinymodel.llama(folder / "model")), dtype="fp32", device="cpu", max_tokens=4000),
        history=HistoryConfig(per_scenario=9),
        prompts=PromptConfig(user_tokens=4000),
        users_per_shard=16,
    )
    extract(config, encoder=LosesSome)
    return config.out


class LosesSome(encoding.Plain):
    """Every seventh prompt of a call has no vector."""

    def encode(self, prompts):
        encoded = super().encode(prompts)
        for place in range(6, len(prompts), 7):
            encoded.reasons[place] = "too long"
        return encoded


def test_users_who_chose_the_same_words_are_near_each_other(tmp_path, store):
    done = command.call(str(store), str(tmp_path / "words"), "--width", "24", launched_by=WORDS)
    assert done.returncode == 0, done.stderr
    model, words = open_store(store), open_store(tmp_path / "words")
    words.verify()
    assert (words.manifest.users, words.manifest.failed) == (model.manifest.users, model.manifest.failed)
    assert words.manifest.failed > 0
    assert words.failures().equals(model.failures())
    assert words.scenario_names() == model.scenario_names()
    assert words.manifest.vocabulary == model.manifest.vocabulary
    rows = np.concatenate([rows for rows, _ in words.batches()])
    vectors = np.concatenate([vectors for _, vectors in words.batches()])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = np.triu_indices(len(rows), 1)
    likeness = (vectors @ vectors.T)[pairs]
    assert np.corrcoef(likeness, shared_titles(store, rows)[pairs])[0, 1] > 0.8
    found, known = open_table(words, 24).read(0, int(rows[-1]) + 1)
    assert found.shape[1] == 24
    assert sorted(np.flatnonzero(known)) == sorted(rows)


def shared_titles(store: Path, rows: np.ndarray) -> np.ndarray:
    """For each pair of users, the share of their titles that both chose."""
    shards = (read_histories(file) for file in sorted((store / "histories").glob("part-*.parquet")))
    titles = {history.row: set(history.texts) for shard in shards for history in shard}
    mine = [titles[row] for row in rows.tolist()]
    return np.array([[len(one & other) / len(one | other) for other in mine] for one in mine])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "words"], "no vectors of a language model there"),
        (["store", "taken"], "something is there; choose another folder"),
        (["store", "words", "--width", "900"], "users have less than --width 900 directions"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, store, arguments, message):
    (tmp_path / "store").symlink_to(store)
    (tmp_path / "taken").mkdir()
    done = command.call(*(tmp_path / each for each in arguments[:2]), *arguments[2:], launched_by=WORDS)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
