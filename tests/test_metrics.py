"""The metrics against scikit-learn and torchmetrics, at their edges, and over ranks."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from sklearn.metrics import log_loss, roc_auc_score

from msr_dist.metrics import LabelMetrics, Report, ScenarioMetrics, grouped_auc, metric_names
from msr_dist.schema import Feature, FeatureSchema, Label, Scenario, Table

SCENARIOS = ("young", "middle aged", "old", "nobody")


def schema(labels=("click",), scenarios=SCENARIOS):
    return FeatureSchema(
        user="user",
        item="item",
        labels=tuple(Label(name=name) for name in labels),
        scenarios=tuple(Scenario(id=number, name=name) for number, name in enumerate(scenarios)),
        tables=(Table(name="id", rows=2),),
        features=(Feature(name="user", table="id"), Feature(name="item", table="id")),
    )


def rows(count=3000, labels=1, seed=0, weighted=False):
    """scenario, user, logits, labels, weights: many ties, few users, scenario 3 without rows."""
    generator = torch.Generator().manual_seed(seed)
    scenario = torch.randint(0, 3, (count,), generator=generator)
    user = torch.randint(-20, 20, (count,), generator=generator) * 2**40
    logits = torch.randn(count, labels, generator=generator).mul(4).round() / 4
    chance = torch.sigmoid(logits + 0.5 * scenario[:, None])
    truth = (torch.rand(count, labels, generator=generator) < chance).float()
    weights = torch.rand(count, labels, generator=generator) if weighted else torch.ones(count, labels)
    return scenario, user, logits, truth, weights


def report(data, labels=("click",), batch=256):
    metrics = ScenarioMetrics(schema(labels))
    for part in zip(*(tensor.split(batch) for tensor in data), strict=True):
        metrics.update(*part)
    return metrics.compute()


def reference(user, logits, truth, weights):
    """The same metrics of one label, by scikit-learn and a loop over users."""
    known = weights > 0
    user, logit, truth, weight = (x[known].double().numpy() for x in (user, logits, truth, weights))
    chance = 1 / (1 + np.exp(-logit))
    rate = np.average(truth, weights=weight)
    loss = log_loss(truth, chance, sample_weight=weight)
    by_user = []
    for one in np.unique(user[user != 0]):  # 0 stands for all whom training never saw
        mine = user == one
        if 0 < truth[mine].sum() < mine.sum():
            by_user.append((roc_auc_score(truth[mine], logit[mine], sample_weight=weight[mine]), mine.sum()))
    return LabelMetrics(
        rows=int(known.sum()),
        positives=int(truth.sum()),
        auc=roc_auc_score(truth, logit, sample_weight=weight),
        log_loss=loss,
        normalised_entropy=loss / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)),
        calibration=(weight * chance).sum() / (weight * truth).sum(),
        user_auc=np.average([auc for auc, _ in by_user], weights=[count for _, count in by_user]),
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_equals_sklearn_per_scenario_and_overall(weighted):
    data = rows(labels=2, weighted=weighted)
    data[4][torch.rand(data[4].shape, generator=torch.Generator().manual_seed(1)) < 0.2] = 0
    found = report(data, labels=("click", "conversion"))
    scenario, user, logits, truth, weights = data
    for t, label in enumerate(("click", "conversion")):
        whole = (user, logits[:, t], truth[:, t], weights[:, t])
        assert asdict(found.overall[label]) == pytest.approx(asdict(reference(*whole)), rel=1e-9)
        for number, name in enumerate(SCENARIOS[:3]):
            part = [tensor[scenario == number] for tensor in whole]
            assert asdict(found.scenarios[name][label]) == pytest.approx(asdict(reference(*part)), rel=1e-9)


# torchmetrics 1.0.3, the version that torchrec pins, compares versions through distutils when it is imported.
@pytest.mark.filterwarnings("ignore:distutils Version classes:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:pkg_resources is deprecated")
def test_auc_equals_torchmetrics():
    from torchmetrics.functional.classification import binary_auroc

    data = rows(seed=3)
    # Probabilities, as torchmetrics would take the sigmoid itself only of some inputs.
    expected = binary_auroc(torch.sigmoid(data[2][:, 0].double()), data[3][:, 0].long())
    assert report(data).overall["click"].auc == pytest.approx(float(expected), abs=1e-6)


def test_auc_needs_no_bins():
    # Rare positives above nearly all negatives, in a sliver of the range of scores.
    score = np.concatenate([np.linspace(0, 1e-4, 10_000), np.linspace(0.9e-4, 2e-4, 30), [30.0]]).astype(np.float32)
    label = np.concatenate([np.zeros(10_000, bool), np.ones(30, bool), np.zeros(1, bool)])
    found = grouped_auc(np.zeros(len(score), np.int64), score, label, np.ones(len(score)))
    assert found.auc[0] == pytest.approx(roc_auc_score(label, score), rel=1e-12)


def test_whole_weights_are_repeated_rows():
    data = rows(count=500)
    repeat = torch.randint(0, 4, (500,), generator=torch.Generator().manual_seed(2))
    repeated = report([tensor.repeat_interleave(repeat, 0) for tensor in data]).overall["click"]
    weighted = report([*data[:4], repeat[:, None].float()]).overall["click"]
    for name in ("auc", "log_loss", "normalised_entropy", "calibration"):
        assert getattr(weighted, name) == pytest.approx(getattr(repeated, name), rel=1e-12)
    assert weighted.rows == (repeat > 0).sum()


def test_zero_has_no_sign_and_order_is_that_of_numbers():
    score = np.array([-0.0, 0.0, -1.0, 1.0, -np.inf, np.inf, -1e-40], dtype=np.float32)
    label = np.array([True, False, False, True, False, True, False])
    found = grouped_auc(np.zeros(7, np.int64), score, label, np.ones(7))
    assert found.auc[0] == (3.5 + 4 + 4) / 12


def test_groups_may_have_any_value():
    group = np.array([-5, 2**40, -5, 2**40, 7])
    found = grouped_auc(
        group, np.array([0, 1, 1, 0, 0], np.float32), np.array([False, False, True, True, True]), np.ones(5)
    )
    assert found.group.tolist() == [-5, 7, 2**40]
    np.testing.assert_array_equal(found.auc, [1.0, np.nan, 0.0])
    assert found.rows.tolist() == [2, 1, 2]


def test_scenario_without_rows_is_absent():
    found = report(rows()).scenarios["nobody"]["click"]
    assert found == LabelMetrics(0, 0, None, None, None, None, None)


def test_no_rows_at_all():
    found = ScenarioMetrics(schema()).compute()
    assert found.overall["click"] == found.scenarios["old"]["click"] == LabelMetrics(0, 0, *[None] * 5)


@pytest.mark.parametrize("positive", [False, True])
def test_one_class_has_a_loss_but_no_auc(positive):
    scenario, user, logits, truth, weights = rows()
    found = report((scenario, user, logits, torch.full_like(truth, positive), weights)).overall["click"]
    assert (found.auc, found.normalised_entropy, found.user_auc) == (None, None, None)
    assert found.log_loss > 0
    assert (found.calibration is not None) == positive


def test_unknown_labels_count_nowhere_whatever_stands_there():
    scenario, user, logits, truth, weights = rows()
    weights[::3] = 0
    truth[::3], logits[::3] = 7.0, float("nan")
    known = weights[:, 0] > 0
    assert report((scenario, user, logits, truth, weights)) == report(
        [tensor[known] for tensor in (scenario, user, logits, truth, weights)]
    )


def test_predictions_that_are_not_numbers_make_their_scenario_absent(caplog):
    scenario, user, logits, truth, weights = rows()
    healthy = report((scenario, user, logits, truth, weights))
    logits = logits.clone()
    logits[torch.nonzero(scenario == 1)[0]] = float("nan")
    found = report((scenario, user, logits, truth, weights))
    metrics = found.scenarios["middle aged"]["click"]
    assert metrics.rows == healthy.scenarios["middle aged"]["click"].rows
    assert (metrics.auc, metrics.log_loss, metrics.calibration, metrics.user_auc) == (None, None, None, None)
    assert found.overall["click"].auc is None
    assert found.scenarios["old"] == healthy.scenarios["old"]
    assert "1 predictions of label 'click' are not numbers" in caplog.text


def test_log_loss_of_large_logits_does_not_overflow():
    logits = torch.tensor([[1000.0], [-1000.0], [200.0]])
    truth = torch.tensor([[1.0], [0.0], [0.0]])
    data = (torch.zeros(3).long(), torch.zeros(3).long(), logits, truth, torch.ones(3, 1))
    assert report(data).overall["click"].log_loss == pytest.approx(200 / 3)


def test_batches_are_copied_and_compute_empties():
    metrics = ScenarioMetrics(schema())
    data = rows()
    metrics.update(*data)
    expected = report(data)
    for tensor in data:
        tensor.zero_()
    assert metrics.compute() == expected
    assert metrics.compute().overall["click"].rows == 0


def test_update_refuses_what_does_not_fit():
    scenario, user, logits, truth, weights = rows(8)
    metrics = ScenarioMetrics(schema())
    with pytest.raises(ValueError, match=r"logits has shape \[8\], expected \[8, 1\]"):
        metrics.update(scenario, user, logits[:, 0], truth, weights)
    with pytest.raises(ValueError, match=r"scenario ids must lie in \[0, 4\)"):
        metrics.update(scenario + 3, user, logits, truth, weights)


def test_a_million_rows_and_users_take_seconds():
    count = 1_000_000
    rng = np.random.default_rng(0)
    user = rng.integers(0, count // 3, count)
    score = rng.standard_normal(count).astype(np.float32)
    start = time.perf_counter()
    grouped_auc(user, score, rng.random(count) < 0.1, np.ones(count))
    assert time.perf_counter() - start < 3


def test_json_has_plain_keys_and_labels_and_comes_back():
    found = report(rows(labels=2), labels=("click", "conversion"))
    raw = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert raw["overall"]["auc"] == raw["overall"]["labels"]["click"]["auc"] == found.overall["click"].auc
    assert raw["scenarios"]["old"]["labels"]["conversion"]["rows"] == found.scenarios["old"]["conversion"].rows
    assert raw["scenarios"]["nobody"]["auc"] is None
    assert Report.from_json(raw) == found


def test_flat_names_leave_out_what_is_absent():
    flat = report(rows(labels=2), labels=("click", "conversion")).flat("test")
    assert flat["test/overall/auc"] > 0.5
    assert "test/middle aged/conversion/user_auc" in flat
    assert flat["test/nobody/rows"] == 0
    assert "test/nobody/auc" not in flat


def test_metric_names_are_distinct_and_stable():
    names = ["a_b", "a/b", "a:b", "overall", "..", "x" * 300, "x" * 301, "日本"]
    clean = metric_names(names, reserved=("overall",))
    assert clean["a_b"] == "a_b"
    assert clean["日本"] == "日本"
    assert len(set(clean.values())) == len(names)
    assert "overall" not in clean.values()
    assert clean == metric_names(names, reserved=("overall",))
    assert metric_names(["a/b"]) == {"a/b": "a_b"}


def test_table_shows_the_oracle_beside():
    metrics = LabelMetrics(1200, 60, 0.75, 0.19, 0.95, 1.01, None)
    empty = replace(metrics, rows=0, positives=0, auc=None)
    found = Report(overall={"click": metrics}, scenarios={"old": {"click": metrics}, "nobody": {"click": empty}})
    oracle = {"split": "test", "overall": {"click": {"auc": 0.8123}}, "scenarios": {"old": {"click": {"auc": 0.7999}}}}
    console = Console(width=160)
    with console.capture() as capture:
        console.print(found.table(oracle, title="test"))
    text = capture.get()
    assert "best AUC" in text
    assert "0.7999" in next(line for line in text.splitlines() if "old" in line)
    assert "1,200" in text
    assert "0.8123" in next(line for line in text.splitlines() if "overall" in line)
    with console.capture() as capture:
        console.print(found.table())
    assert "best" not in capture.get()


def _rank(rank, world_size, folder):
    """Rank 1 has no rows; the others share them unevenly."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    data = rows(labels=2, weighted=True)
    metrics = ScenarioMetrics(schema(("click", "conversion")))
    mine = {0: slice(0, 700), 2: slice(700, None)}.get(rank)
    if mine is not None:
        metrics.update(*(tensor[mine] for tensor in data))
    found = metrics.compute()
    empty = ScenarioMetrics(schema()).compute()
    dist.destroy_process_group()

    # A group that moves only CUDA tensors, as NCCL alone would be.
    store = dist.FileStore(str(folder / "other"), world_size)
    dist.init_process_group("cuda:gloo", store=store, rank=rank, world_size=world_size)
    # One that leaves at once would break the connections that others are still making.
    store.set(f"rank {rank} is there", "")
    store.wait([f"rank {other} is there" for other in range(world_size)])
    try:
        ScenarioMetrics(schema()).compute()
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    dist.destroy_process_group()
    answer = {"found": found and found.to_json(), "empty": empty and empty.to_json(), "refused": refused}
    (folder / f"{rank}.json").write_text(json.dumps(answer))


def test_ranks_together_equal_one(tmp_path: Path):
    mp.spawn(_rank, args=(3, tmp_path), nprocs=3)
    answers = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    expected = report(rows(labels=2, weighted=True), labels=("click", "conversion"))
    assert Report.from_json(answers[0]["found"]) == expected
    assert answers[0]["empty"]["overall"]["rows"] == 0
    assert [answer["found"] for answer in answers[1:]] == [None, None]
    assert all("cpu:gloo,cuda:nccl" in answer["refused"] for answer in answers)
