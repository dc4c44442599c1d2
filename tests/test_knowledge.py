"""What a language model says, from a store to the losses of a run."""

import json
import shutil
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import canonical
import command
import stores
from msr_dist import knowledge
from msr_dist.config import load, parse
from msr_dist.evaluate import evaluate
from msr_dist.knowledge import KnowledgeConfig, UserVectors
from msr_dist.launch import launch
from msr_dist.llm.vectors import RowVectors, open_store
from msr_dist.recommender import EmbeddingsConfig, TableOverride
from msr_dist.run import RunConfig, read_run
from msr_dist.schema import FeatureSchema, Table
from msr_dist.train import check, train

CONTROLS = ("random", "shuffled", "trained")
ROWS = np.arange(canonical.USERS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = canonical.write(tmp_path_factory.mktemp("data"), rows=3000)
    stores.write_vocabulary(folder)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory, data):
    return stores.write(tmp_path_factory.mktemp("made") / "store", data)


def apply(data, store, schema=None, **settings) -> FeatureSchema:
    config = parse(KnowledgeConfig, {"store": str(store), "width": stores.TABLE_WIDTH} | settings, "run.toml")
    return config.apply(schema or canonical.schema(), data)


def vectors(data, store, kind: str = "knowledge", seed: int = 0, schema=None) -> UserVectors:
    schema = apply(data, store, schema)
    return UserVectors(
        schema.model_copy(update={"knowledge": schema.knowledge.model_copy(update={"vectors": kind})}), seed
    )


def whole(values: UserVectors) -> np.ndarray:
    return values(0, canonical.USERS).numpy()


def test_a_schema_with_what_the_store_says(data, store):
    found = apply(data, store, model="tiny", pooling="mean_own", cutoff=1_500).knowledge
    assert (found.width, found.vectors, found.folder) == (8, "knowledge", store / "pca-8")
    np.testing.assert_array_equal(np.float32(found.scenarios), open_store(store).scenario_vectors())
    assert apply(data, store).model_copy(update={"knowledge": None}) == canonical.schema()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"width": 12}, r"has no vectors of width 12; make them with `msr-dist compress .*store --width 12`"),
        ({"width": 6}, r"run.toml: width: .*multiple of 4 \(got 6\)"),
        ({"model": "large"}, "the store has model 'tiny', the run asks for 'large'"),
        ({"pooling": "mean_all"}, "the store has pooling 'mean_own', the run asks for 'mean_all'"),
        ({"cutoff": 1_400}, "the store has cutoff 1500, the run asks for 1400"),
        (
            {"digest": "d0"},
            r"vectors of width 8 have digest '\w{64}', those of the run 'd0': .* start a run of another",
        ),
    ],
)
def test_a_store_that_is_not_what_the_run_expects(data, store, settings, says):
    with pytest.raises(ValueError, match=says):
        apply(data, store, **settings)


def test_a_store_that_is_not_there(tmp_path, data):
    with pytest.raises(ValueError, match="nowhere: no vectors of a language model there; make them with `msr-dist ext"):
        apply(data, tmp_path / "nowhere")


def test_a_store_of_other_data(tmp_path, data, store):
    other = tmp_path / "other"
    shutil.copytree(data / "vocabulary", other / "vocabulary")
    apply(other, store)
    file = other / "vocabulary/users.parquet"
    pq.write_table(pq.read_table(file).slice(1), file)
    with pytest.raises(ValueError, match=rf"extracted from {data}, .*'users' has digest '\w+'; in {other}, .*'\w+'"):
        apply(other, store)


def test_a_store_of_other_scenarios(data, store):
    with pytest.raises(
        ValueError, match=r"scenarios scenario 0, scenario 1, scenario 2; .* has scenario 0, scenario 1:"
    ):
        apply(data, store, canonical.schema(scenarios=2))


def test_a_table_of_the_data_with_the_name_of_ours(data, store):
    schema = canonical.schema()
    schema = schema.model_copy(update={"tables": (*schema.tables, Table(name="knowledge", rows=3))})
    with pytest.raises(ValueError, match="has a table 'knowledge' of its own"):
        apply(data, store, schema)


def test_rows_are_the_vector_the_flag_and_zeros(data, store):
    found = whole(vectors(data, store))
    stored, known = RowVectors(store / "pca-8").read(0, canonical.USERS)
    assert known.tolist() == stores.known(ROWS).tolist()
    np.testing.assert_array_equal(found[:, :8], stored)
    np.testing.assert_array_equal(found[:, 8], known)
    assert not found[:, 9:].any()
    assert not found[~known].any()
    assert found[known].any(axis=1).all()


@pytest.mark.parametrize("kind", ["knowledge", "random", "shuffled"])
def test_no_row_depends_on_the_range_that_it_is_read_in(monkeypatch, data, store, kind):
    values = vectors(data, store, kind)
    parts = np.concatenate([values(0, 7).numpy(), values(7, 1).numpy(), values(8, canonical.USERS - 8).numpy()])
    np.testing.assert_array_equal(parts, whole(values))
    monkeypatch.setattr(knowledge, "_BLOCK", 16)  # a store of many blocks
    np.testing.assert_array_equal(whole(vectors(data, store, kind)), whole(values))


def test_random_vectors(data, store):
    found, known = whole(vectors(data, store, "random")), stores.known(ROWS)
    np.testing.assert_array_equal(found[:, 8:], whole(vectors(data, store))[:, 8:])
    assert not found[~known].any()
    assert abs(found[known, :8].mean()) < 0.2
    assert found[known, :8].std() == pytest.approx(1, abs=0.15)
    assert not np.isclose(found, whole(vectors(data, store, "random", seed=1)))[known, :8].any()


def test_shuffled_vectors(data, store):
    given, found, known = whole(vectors(data, store)), whole(vectors(data, store, "shuffled")), stores.known(ROWS)
    np.testing.assert_array_equal(found[:, 8:], given[:, 8:])
    assert not found[~known].any()
    assert not (found == given).all(axis=1)[known].any()
    np.testing.assert_array_equal(np.sort(found[known, 0]), np.sort(given[known, 0]))
    assert not np.array_equal(found, whole(vectors(data, store, "shuffled", seed=1)))


def test_users_with_vectors_for_every_scenario_are_looked_up_as_themselves(data, store):
    schema = EmbeddingsConfig(tables={"users": TableOverride(per_scenario=True)}).apply(canonical.schema())
    values = vectors(data, store, schema=schema)
    assert torch.equal(values(5, 8), vectors(data, store)(0, 9)[torch.arange(5, 13) // 3])


def run(folder, data, store, *settings) -> RunConfig:
    """A run of 25 steps."""
    config = command.write_config(
        folder,
        data,
        model={"kind": "others.knowing"},
        knowledge={"store": str(store), "width": stores.TABLE_WIDTH},
        stages=[{"epochs": 1, "dense": {"lr": 0.01}}],
        checkpoint={"every_steps": 10},
        evaluation={"validate_epochs": 0},
    )
    return load(RunConfig, config, settings).absolute()


def trained(chosen: RunConfig, workers: int = 1) -> dict[int, float]:
    check(chosen, workers)
    chosen.claim_folder()
    launch(train, chosen, "local", workers, chosen.folder)
    return command.losses(chosen.folder)


def test_a_run_reads_what_is_known_at_any_world_size(tmp_path, data, store):
    alone = trained(run(tmp_path, data, store, "name=alone"))
    row_wise = run(tmp_path, data, store, "parallel.tables.knowledge.sharding=['row_wise']")
    assert "knowledge | row_wise" in row_wise.dry_plan(2)
    assert trained(row_wise, 2) == {step: pytest.approx(loss, rel=1e-6) for step, loss in alone.items()}
    others = [trained(run(tmp_path, data, store, f"name={kind}", f"model.vectors={kind}")) for kind in CONTROLS]
    last = [sum(list(losses.values())[-5:]) for losses in (alone, *others)]
    assert len({round(loss, 6) for loss in last}) == 4


def test_a_run_goes_on_with_the_vectors_that_it_began_with(tmp_path, data):
    store = stores.write(tmp_path / "store", data)
    chosen = run(tmp_path, data, store)
    losses = trained(chosen)
    report = (chosen.folder / "metrics.json").read_text()
    assert read_run(chosen.folder).knowledge == chosen.knowledge.pinned()

    shutil.rmtree(max((chosen.folder / "checkpoints").iterdir()))
    assert trained(chosen) == losses
    (chosen.folder / "metrics.json").unlink()
    evaluate_here(chosen)
    assert json.loads((chosen.folder / "metrics.json").read_text()) == json.loads(report)

    shutil.rmtree(store)
    with pytest.raises(ValueError, match=r"store: no vectors of a language model there"):
        evaluate_here(chosen)
    stores.write(store, data, seed=1)
    with pytest.raises(ValueError, match=r"made again since"):
        evaluate_here(chosen)
    with pytest.raises(ValueError, match=r"holds a run with knowledge.digest = '\w+', not '\w+': choose another name="):
        trained(chosen)
    # The same vectors, wherever they come from.
    shutil.rmtree(store)
    stores.write(store, data)
    assert trained(chosen) == losses


def evaluate_here(chosen: RunConfig) -> None:
    launch(partial(evaluate, split="test"), read_run(chosen.folder), "local", 1, chosen.folder)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["model={kind='star'}"], "knowledge: kind 'star' does not read it: .*model.kind='llm4msr' and .*kind='star'"),
        (["model={kind='single',backbone={kind='others.knowing'}}"], "knowledge: kind 'single' does not read it"),
        (["parallel.tables.wisdom.sharding=['row_wise']"], "no table 'wisdom' in the data; it has .*, knowledge"),
    ],
)
def test_settings_that_would_do_nothing(tmp_path, data, store, settings, says):
    with pytest.raises(ValueError, match=says):
        check(run(tmp_path, data, store, *settings), 1)


def test_a_model_that_needs_what_the_run_does_not_name(tmp_path, data):
    config = command.write_config(tmp_path, data, model={"kind": "others.knowing"})
    with pytest.raises(ValueError, match=r"'others.knowing' reads .*`msr-dist extract`, and .*knowledge.store=STORE"):
        load(RunConfig, config).read_schema()


def test_a_store_is_found_from_any_working_directory(tmp_path, monkeypatch, data, store):
    monkeypatch.chdir(store.parent)
    chosen = run(tmp_path, data, "store")
    assert chosen.knowledge.store == store
