"""Whole runs of two towers: both stages, broken off and gone on with, at two ranks, and judged by hand."""

import json
import math
import shutil
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

import choices
import command
from msr_dist.checkpoint import Checkpoint, CheckpointConfig
from msr_dist.data.derived import read_summary
from msr_dist.distributed import open_world
from msr_dist.evaluate import evaluate, judge, trained
from msr_dist.launch import launch
from msr_dist.models.objectives import Contrastive, Labels, Retrieval
from msr_dist.recall import RetrievalReport
from msr_dist.retrieval import coverage, encoded, told, views_apart
from msr_dist.run import RunConfig, read_run
from msr_dist.train import check, train
from retrieving import FINETUNE, FROZEN, PRETRAIN, Work, run_config, train_and_evaluate

STAGES = ("contrast/loss", "retrieve/loss")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return choices.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    """The folder of a run of one process that is never disturbed."""
    run = run_config(tmp_path_factory.mktemp("alone"), data).claim_folder()
    check(run, 1)
    train(run)
    return run.folder


def tracked(folder):
    """Name -> step -> value, as they were recorded last; without what a machine says of itself."""
    found = defaultdict(dict)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record["metrics"].items():
            if not name.endswith(("_per_second", "_seconds", "_bytes")):
                found[name][record["step"]] = value
    return dict(found)


def saved(folder):
    """The checkpoints in the order of their making."""
    return sorted((folder / "checkpoints").glob("stage-*"))


def steps_of(folder):
    """Steps of each stage."""
    return [len([path for path in saved(folder) if path.name.startswith(f"stage-{stage}-")]) for stage in (0, 1)]


def moved(folder, into, kept):
    """A copy of a run with its first `kept` checkpoints, as if it had been broken off after them."""
    copy = into / "runs/run"
    shutil.copytree(folder, copy)
    for path in saved(copy)[kept:]:
        shutil.rmtree(path)
    (copy / "metrics.jsonl").unlink()
    (copy / "metrics.json").unlink()
    return read_run(copy).model_copy(update={"checkpoint": CheckpointConfig()})


# What is tracked


def test_both_stages_learn_and_are_told(alone):
    found, (first, second) = tracked(alone), steps_of(alone)
    assert first % PRETRAIN == second % FINETUNE == 0
    assert list(found["contrast/loss"]) == list(range(1, first + 1))
    assert list(found["retrieve/loss"]) == list(range(first + 1, first + second + 1))
    for name in STAGES:
        losses = list(found[name].values())
        assert np.mean(losses[-3:]) < np.mean(losses[:3])
    # The valid split is for what retrieves, the views for what contrasts.
    epochs = [first + second // FINETUNE * epoch for epoch in range(1, FINETUNE + 1)]
    assert list(found["valid/mean/recall_at_10"]) == epochs
    assert list(found["test/worst/ndcg_at_3"]) == [first + second]


def test_how_far_views_are_apart_is_tracked(alone):
    found, (first, _) = tracked(alone), steps_of(alone)
    ends = [first // PRETRAIN * epoch for epoch in range(1, PRETRAIN + 1)]
    for side in ("user", "item"):
        values = {}
        for name in ("cosine", "cosine_of_others", "scenario_probe", "scenario_guess"):
            values[name] = found[f"contrast/{side}_{name}"]
            assert list(values[name]) == ends
        for end in ends:
            assert -1 <= values["cosine_of_others"][end] < 1
            assert -1 <= values["cosine"][end] <= 1
            assert 0 < values["scenario_guess"][end] < 0.6
            assert values["scenario_guess"][end] - 0.15 < values["scenario_probe"][end] <= 1
        # What contrast is for: views of one come nearer to each other than to those of others.
        apart = [values["cosine"][end] - values["cosine_of_others"][end] for end in ends]
        assert apart[-1] > max(apart[0], 0)


def test_rows_of_the_stages_stay_with_the_run(alone, data):
    summary = read_summary(alone / "rows/stage-0")
    assert {path.name for path in (alone / "rows").iterdir()} == {
        "stage-0", "stage-1", "catalogue", "queries-valid", "queries-test"
    }  # fmt: skip
    users, items = told(summary)
    paired, entities = summary["user"]["paired"], summary["user"]["entities"]
    assert users.startswith(f"{paired} of {entities} users ({paired / entities:.1%}) with ")
    assert "items" in items
    shares = coverage(summary)
    assert shares["coverage/users"] == paired / entities
    assert 0 < shares["coverage/users"] < shares["coverage/user_traffic"] < 1
    assert shares["coverage/items"] == shares["coverage/item_traffic"] == 1
    (line,) = told(read_summary(alone / "rows/stage-1"))
    rows = choices.read(data / "train")
    chosen = Counter(row["scenario"] for row in rows if row["click"] and row["item"])
    drawn = sum(int(count / 2 + 0.5) for count in chosen.values())
    assert line == f"{chosen.total()} choices, 0 shown rows and {drawn} drawn items as negatives beside the batch's own"


def test_tables_are_frozen_for_some_steps(alone):
    run, checkpoints = read_run(alone), saved(alone)
    first, _ = steps_of(alone)
    with open_world() as world:
        sharded = run.build(run.read_schema(), 1, world)
        states = []
        for place in (first - 1, first, first + FROZEN - 1, first + FROZEN):
            model = {name: x for name, x in sharded.tensors().items() if name.startswith("model/")}
            Checkpoint.read(checkpoints[place]).restore(model)
            tables = {name: weights.clone() for name, weights, _, _ in sharded.table_shards()}
            dense = [x.detach().clone() for x in sharded.model.module.head.parameters()]
            states.append((tables, dense))
    (before, _), (one, dense_one), (last, dense_last), (thawed, _) = states
    assert set(before) == {"users", "items_", "tags"}
    for name in before:
        assert torch.equal(before[name], one[name])
        assert torch.equal(before[name], last[name])
        assert not torch.equal(before[name], thawed[name])
    assert any(not torch.equal(x, y) for x, y in zip(dense_one, dense_last, strict=True))


# Metrics


def by_hand(data, split, items, users, label="click", top_k=(3, 10)):
    """Scenario -> metric -> value, queries and items, in Python from what was chosen and from vectors.

    `items` and `users` are {(scenario, id): vector}.
    """
    train_rows = choices.read(data / "train")
    splits = {name: choices.read(data / name) for name in ("train", "valid", "test")}
    known = {row["item"] for row in train_rows if row["item"]}
    earlier = ["train"] if split == "valid" else ["train", "valid"]
    had = {(row["user"], row["item"]) for name in earlier for row in splits[name] if row[label]}
    offered, answers = defaultdict(set), defaultdict(set)
    for rows in splits.values():
        for row in rows:
            if row["item"] in known:
                offered[row["scenario"]].add(row["item"])
    for row in splits[split]:
        pair = row["user"], row["item"]
        if row[label] and row["user"] and row["item"] in known and pair not in had:
            answers[row["scenario"], row["user"]].add(row["item"])
    assert set(users) == set(answers)
    assert set(items) == {(scenario, item) for scenario, every in offered.items() for item in every}
    found = defaultdict(lambda: defaultdict(list))
    for (scenario, user), right in answers.items():
        candidates = sorted(item for item in offered[scenario] if (user, item) not in had)
        scores = {item: float(np.dot(users[scenario, user], items[scenario, item])) for item in candidates}
        order = sorted(candidates, key=lambda item: -scores[item])
        for k in top_k:
            gains = [1 / math.log2(place + 2) for place, item in enumerate(order[:k]) if item in right]
            best = sum(1 / math.log2(place + 2) for place in range(min(k, len(right))))
            metrics = found[scenario]
            metrics[f"recall_at_{k}"].append(len(gains) / len(right))
            metrics[f"ndcg_at_{k}"].append(sum(gains) / best)
            metrics[f"hit_rate_at_{k}"].append(float(bool(gains)))
    values = {scenario: {name: np.mean(x) for name, x in metrics.items()} for scenario, metrics in found.items()}
    counts = Counter(scenario for scenario, _ in answers)
    return values, counts, {scenario: len(each) for scenario, each in offered.items()}


def vectors_of(run, model, folder, side, world):
    found = encoded(run, run.folder / "rows" / folder, model, side, world)
    keys = zip(found.scenario.tolist(), found.ids.tolist(), strict=True)
    assert found.vectors.norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)
    return dict(zip(keys, found.vectors.double().numpy(), strict=True))


def agrees_with_hand(run, split="test", **settings):
    """Whether the metrics that the run left are those that its vectors give; the report."""
    name = "metrics.json" if split == "test" else f"metrics-{split}.json"
    report = RetrievalReport.from_json(json.loads((run.folder / name).read_text()))
    with open_world() as world:
        model = trained(run, run.read_schema(), world).model
        items = vectors_of(run, model, "catalogue", "item", world)
        users = vectors_of(run, model, f"queries-{split}", "user", world)
    values, queries, offered = by_hand(run.data, split, items, users, **settings)
    for scenario, shown in enumerate(run.read_schema().scenarios):
        assert report.scenarios[shown.name] == pytest.approx(values[scenario], rel=1e-9)
        assert report.queries[shown.name] == queries[scenario] > 0
        assert report.items[shown.name] == offered[scenario]
    return report


def test_metrics_equal_those_by_hand(alone):
    report = agrees_with_hand(read_run(alone))
    assert min(report.left_out.values()) > 0
    assert report.worst["recall_at_10"] < report.mean["recall_at_10"] < 1
    assert report.mean["recall_at_3"] < report.mean["recall_at_10"]


def test_evaluation_of_another_split_and_what_is_no_question(alone, tmp_path):
    run = moved(alone, tmp_path, kept=sum(steps_of(alone)))
    evaluate(run, "valid")
    report = agrees_with_hand(run, "valid")
    # As the run itself found at its end.
    last = {name: list(values.values())[-1] for name, values in tracked(alone).items() if name.startswith("valid/")}
    assert report.flat("valid") == last
    assert not (run.folder / "metrics.json").exists()
    with pytest.raises(ValueError, match="choose valid or test"):
        evaluate(run, "train")


def values_of(sharded):
    """Copies of all that a checkpoint holds."""
    tensors = sharded.tensors()
    return {
        name: (x.local_shards()[0].tensor if isinstance(x, ShardedTensor) else x).clone() for name, x in tensors.items()
    }


def test_judging_changes_nothing(alone):
    run = read_run(alone)
    schema = run.read_schema()
    with open_world() as world:
        sharded = trained(run, schema, world)
        sharded.model.train()
        before = values_of(sharded)
        generator = torch.get_rng_state()
        first = judge(run, schema, sharded.model, "test", world)
        apart = views_apart(run, alone / "rows/stage-0", sharded.model, world)
        assert sharded.model.training
        assert all(module.training for module in sharded.model.modules())
        assert torch.equal(generator, torch.get_rng_state())
        after = values_of(sharded)
        assert before.keys() == after.keys()
        assert all(torch.equal(x, after[name]) for name, x in before.items())
        sharded.model.eval()
        assert judge(run, schema, sharded.model, "test", world) == first
        assert views_apart(run, alone / "rows/stage-0", sharded.model, world) == apart
        assert not sharded.model.training


# Going on, and ranks


@pytest.mark.parametrize("where", ["within the first stage", "between the stages", "within the second stage"])
def test_a_run_that_was_broken_off_goes_on_exactly(alone, tmp_path, where):
    first, _ = steps_of(alone)
    kept = {
        "within the first stage": first // 2 + 1,
        "between the stages": first,
        # While its tables are frozen.
        "within the second stage": first + FROZEN // 2,
    }[where]
    run = moved(alone, tmp_path, kept)
    times = {file: file.stat().st_mtime_ns for file in (run.folder / "rows").rglob("*")}
    train(run)
    whole = tracked(alone)
    rest = {name: {step: x for step, x in values.items() if step > kept} for name, values in whole.items()}
    assert tracked(run.folder) == {name: values for name, values in rest.items() if values}
    assert (run.folder / "metrics.json").read_text() == (alone / "metrics.json").read_text()
    assert {file: file.stat().st_mtime_ns for file in (run.folder / "rows").rglob("*")} == times


def test_two_ranks_give_the_losses_and_metrics_of_one(alone, tmp_path, data):
    run = run_config(tmp_path / "two", data, checkpoint={}).claim_folder()
    again = moved(alone, tmp_path / "again", kept=sum(steps_of(alone)))
    launch(train_and_evaluate, Work(run, again.folder, "test"), "local", 2, tmp_path)
    first, second = steps_of(alone)
    for name in STAGES:
        expected, found = command.losses(alone, name), command.losses(run.folder, name)
        # Later steps have amplified rounding, but a lost row would show.
        assert found == {step: pytest.approx(loss, rel=1e-6 if step <= 20 else 1e-3) for step, loss in expected.items()}
    assert len(command.losses(run.folder, STAGES[1])) == second
    # Of equal weights, two ranks have the same metrics as one.
    one, two = (RetrievalReport.from_json(json.loads((f / "metrics.json").read_text())) for f in (alone, again.folder))
    for name, metrics in one.scenarios.items():
        assert two.scenarios[name] == pytest.approx(metrics, rel=1e-12)
    assert (two.queries, two.items, two.left_out) == (one.queries, one.items, one.left_out)
    apart = tracked(run.folder)
    for side in ("user", "item"):
        name, step = f"contrast/{side}_cosine", first
        assert apart[name][step] == pytest.approx(tracked(alone)[name][step], rel=1e-3)


# Other runs


def test_tables_per_scenario_lists_of_unknown_labels_and_log_loss(tmp_path, data):
    """A plain two tower of one stage, by a label that is not always known."""
    objective = {"kind": "retrieval", "label": "buy", "loss": "bce", "shown_negatives": True}
    run = run_config(
        tmp_path,
        data,
        model={"kind": "two_tower", "widths": [8], "out_width": 8},
        embeddings={"per_scenario": True},
        stages=[{"name": "only", "objective": objective, "epochs": 2}],
        checkpoint={},
        evaluation={"top_k": [100], "batch_size": 30, "validate_epochs": 0},
    ).claim_folder()
    train(run)
    assert all(0 < loss < 10 for loss in command.losses(run.folder, "only/loss").values())
    report = RetrievalReport.from_json(json.loads((run.folder / "metrics.json").read_text()))
    # There are fewer items than are retrieved.
    for name, metrics in report.scenarios.items():
        if metrics:
            assert metrics["recall_at_100"] == metrics["hit_rate_at_100"] == 1, name
            assert 0 < metrics["ndcg_at_100"] < 1
    rows = choices.read(run.folder / "rows/stage-0/rows")
    assert len(rows) == sum(row["buy_known"] and row["item"] > 0 for row in choices.read(data / "train"))


def test_a_run_that_ranks_is_as_it_was(tmp_path, data):
    run = run_config(
        tmp_path,
        data,
        model={"kind": "star", "widths": [4], "auxiliary_widths": [4]},
        stages=[{"frozen_tables": 2}],
        checkpoint={},
        evaluation={},
        loader={"batch_size": 100, "partitions": 2},
    ).claim_folder()
    assert not run.retrieves
    assert run.objective(0) == Labels()
    train(run)
    assert len(command.losses(run.folder)) == 8
    assert "overall" in json.loads((run.folder / "metrics.json").read_text())
    assert not (run.folder / "rows").exists()


# Configurations


def test_what_stages_minimise(tmp_path, data):
    run = run_config(tmp_path, data)
    assert run.retrieves
    assert isinstance(run.objective(0), Contrastive)
    assert run.objective(1) == Retrieval(uniform_negatives=0.5)
    assert run_config(tmp_path, data, stages=[{}]).objective(0) == Retrieval()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": {"kind": "star", "widths": [4], "auxiliary_widths": [4]}},
            r"stages\.0\.objective: 'contrastive' is for two towers, and model\.kind 'star' predicts labels; leave it "
            r"out, or choose model\.kind 'sass' or 'two_tower'",
        ),
        (
            {"model": {"kind": "star"}, "stages": [{}, {"objective": "retrieval"}]},
            r"stages\.1\.objective: 'retrieval' is for two towers",
        ),
        (
            {"stages": [{"objective": "labels"}, {}]},
            r"stages\.0\.objective: 'labels' is for models that predict labels, and model\.kind 'sass' retrieves; "
            r"choose 'retrieval' or 'contrastive'",
        ),
        (
            {"stages": [{}, {"objective": "contrastive"}]},
            r"the last objective has to be 'retrieval', on which the run is judged",
        ),
        ({"stages": [{"objective": {"kind": "retrieval", "loss": "bce"}}]}, r"loss 'bce' needs rows with label 0"),
        ({"dense_rows": 8}, r"dense_rows: model\.kind 'sass' compares the rows of a batch with each other"),
        ({"stages": [{"objective": "recall"}]}, r"'labels', 'retrieval', 'contrastive'"),
        ({"evaluation": {"top_k": []}}, "top_k"),
        (
            {"model": {"kind": "star"}, "stages": [{}], "evaluation": {"top_k": [7]}},
            r"evaluation\.top_k: model\.kind 'star' retrieves nothing; leave it out",
        ),
    ],
)
def test_objectives_that_do_not_fit(tmp_path, data, changes, words):
    with pytest.raises(ValueError, match=words):
        run_config(tmp_path, data, **changes)


def test_a_label_that_is_not_there(tmp_path, data):
    objective = {"kind": "retrieval", "label": "like"}
    run: RunConfig = run_config(tmp_path, data, stages=[{"objective": objective}]).claim_folder()
    for told_by in (train, lambda run: check(run, 1)):
        with pytest.raises(
            ValueError, match=r"^stages\.0\.objective\.label: there is no label 'like'; .* has click, buy"
        ):
            told_by(run)


def test_towers_that_read_no_knowledge(tmp_path, data):
    model, knowledge = {"kind": "two_tower"}, {"store": "nothing", "width": 8}
    with pytest.raises(ValueError, match=r"'two_tower' does not read it: .*, or choose model\.kind='sass'$"):
        run_config(tmp_path, data, model=model, stages=[{}], knowledge=knowledge).read_schema()
