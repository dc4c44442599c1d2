"""Items of a trained run, exported and searched; the command shows what it found."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import choices
import command
from msr_dist.data.derived import write_question
from msr_dist.distributed import open_world
from msr_dist.evaluate import trained
from msr_dist.files import write_whole
from msr_dist.index import FOLDER, IndexConfig, export_index, read_manifest, retrieve
from msr_dist.models.mlp import Config as Mlp
from msr_dist.retrieval import catalogue_rows, encoded, sides_of
from msr_dist.run import read_run
from msr_dist.train import train
from retrieving import run_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run over data with names and titles, and its index."""
    data = choices.write(tmp_path_factory.mktemp("data"))
    (data / "vocabulary").mkdir()
    for table, rows in (("users", choices.USERS), ("items", choices.ITEMS)):
        # In no order, as nothing says that a vocabulary has one.
        known = list(range(rows - 1, 0, -1))
        columns = {"row": known, "id": [f"{table[0]}{row:03}" for row in known], "count": [1] * len(known)}
        pq.write_table(pa.table(columns), data / f"vocabulary/{table}.parquet")
    rows = list(range(1, choices.ITEMS))
    texts = {"row": rows, "id": [f"i{row:03}" for row in rows], "title": [f"Item [new]\n {row}" for row in rows]}
    pq.write_table(pa.table(texts), data / "items.parquet")
    stages = [{"objective": "retrieval", "epochs": 2, "dense": {"lr": 0.01}, "sparse": {"lr": 0.1}}]
    made = run_config(tmp_path_factory.mktemp("index"), data, stages=stages).claim_folder()
    train(made)
    export_index(made, IndexConfig(k=5))
    return made


@pytest.fixture(scope="module")
def items(run):
    """What the run's model makes of every scenario's items."""
    with open_world() as world:
        schema = run.read_schema()
        model = trained(run, schema, world).model
        return encoded(run, catalogue_rows(run, schema, world), model, "item", world).everywhere(world)


def test_every_scenario_has_its_items(run, items):
    manifest = read_manifest(run)
    assert manifest.width == 8
    for scenario, index in zip(run.read_schema().scenarios, manifest.scenarios, strict=True):
        offered = items.of(scenario.id)
        written = pq.read_table(run.folder / FOLDER / f"items-{scenario.id}.parquet")
        assert written["row"].to_pylist() == offered.ids.tolist()
        assert written["id"].to_pylist() == [f"i{row:03}" for row in offered.ids.tolist()]
        np.testing.assert_array_equal(np.stack(written["vector"].to_numpy()), offered.vectors.half().numpy())
        assert (index.scenario, index.items) == (scenario.name, len(offered.ids))
        # So few that the graph misses none.
        assert index.recall == 1.0


@pytest.mark.parametrize(("user", "scenario"), [(7, 0), (7, 3), (21, 1), (21, 4)])
def test_the_nearest_items_that_were_not_chosen_before(tmp_path, run, items, user, scenario):
    names = [each.name for each in run.read_schema().scenarios]
    found = retrieve(run, f"u{user:03}", names[scenario], k=6)
    train_rows = choices.read(run.data / "train")
    had = {row["item"] for row in train_rows if row["user"] == user and row["click"]}
    offered = items.of(scenario)
    assert [each.place for each in found] == list(range(1, len(found) + 1))
    rows = [int(str(each.id)[1:]) for each in found]
    assert not had & set(rows)
    assert set(rows) <= set(offered.ids.tolist())
    assert [each.about for each in found] == [f"Item [new] {row}" for row in rows]
    with open_world() as world:
        schema = run.read_schema()
        write_question(sides_of(run, schema, world), tmp_path / "question", user, scenario)
        asking = encoded(run, tmp_path / "question", trained(run, schema, world).model, "user", world)
    scores = offered.vectors.half().float().numpy() @ asking.vectors.numpy()[0]
    left = {row: score for row, score in zip(offered.ids.tolist(), scores.tolist(), strict=True) if row not in had}
    assert rows == sorted(left, key=lambda row: -left[row])[:6]
    np.testing.assert_allclose([each.score for each in found], [left[row] for row in rows], atol=1e-6)


def test_what_cannot_be_retrieved_is_refused(tmp_path, run):
    with pytest.raises(ValueError, match=r"no scenario 'nowhere'; the data have home, search, feed, tiny, abroad"):
        retrieve(run, "u007", "nowhere", k=3)
    with pytest.raises(ValueError, match=r"users\.parquet: there is no user 'u999'"):
        retrieve(run, "u999", "home", k=3)
    shutil.copytree(run.folder, tmp_path / "copy")
    copy = read_run(tmp_path / "copy")
    manifest = read_manifest(copy).model_copy(update={"checkpoint": "stage-0-step-000000001"})
    write_whole(copy.folder / FOLDER / "manifest.json", manifest.model_dump_json())
    with pytest.raises(
        ValueError, match=r"holds the items of stage-0-step-000000001, the newest checkpoint is stage-0"
    ):
        retrieve(copy, "u007", "home", k=3)
    shutil.rmtree(copy.folder / FOLDER)
    with pytest.raises(ValueError, match=r"no index there; make it with `msr-dist export-index "):
        retrieve(copy, "u007", "home", k=3)
    ranking = run.model_copy(update={"model": Mlp()})
    for wrong in (lambda: retrieve(ranking, "u007", "home", 3), lambda: export_index(ranking, IndexConfig())):
        with pytest.raises(ValueError, match=r"model\.kind 'mlp' predicts labels and retrieves nothing"):
            wrong()


def test_the_commands(run):
    done = command.call("export-index", run.folder, "k=5", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "recall of the exact 5" in done.stdout
    assert "abroad" in done.stdout
    done = command.call("retrieve", run.folder, "--user", "u007", "--scenario", "tiny", "-k", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Item [new] ") == 3
    done = command.call("retrieve", run.folder, "--user", "u007", "--scenario", "tinny")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    done = command.call("export-index", run.folder, "neighbors=5")
    assert done.returncode == 2
    assert "did you mean 'neighbours'?" in done.stderr
