"""Retrieval's metrics against the same said in NumPy, a user at a time."""

import math

import numpy as np
import pytest
import torch
from rich.console import Console

from msr_dist import recall
from msr_dist.recall import RetrievalReport, ranked, sums


def by_hand(users, items, answers, consumed, top_k):
    """Metric -> its value for each user."""
    found = {}
    for user, right, had in zip(users, answers, consumed, strict=True):
        offered = [item for item in range(len(items)) if item not in had]
        order = sorted(offered, key=lambda item: -float(np.dot(user, items[item])))
        for k in top_k:
            gains = [1 / math.log2(place + 2) for place, item in enumerate(order[:k]) if item in right]
            best = sum(1 / math.log2(place + 2) for place in range(min(k, len(right))))
            found.setdefault(f"recall_at_{k}", []).append(len(gains) / len(right))
            found.setdefault(f"ndcg_at_{k}", []).append(sum(gains) / best)
            found.setdefault(f"hit_rate_at_{k}", []).append(float(bool(gains)))
    return found


def drawn(users, items, seed):
    """Vectors, answers (one to five) and what was consumed (often nothing) of each user."""
    rng = np.random.default_rng(seed)
    vectors = [rng.normal(size=(count, 6)).astype(np.float32) for count in (users, items)]
    answers, consumed = [], []
    for _ in range(users):
        mixed = rng.permutation(items)
        several = rng.integers(1, min(5, items) + 1)
        answers.append(mixed[:several])
        consumed.append(mixed[several : several + rng.integers(0, items // 2 + 1) * rng.integers(0, 2)])
    return *vectors, answers, consumed


@pytest.mark.parametrize("most_scores", [1, 70, 1 << 24])
@pytest.mark.parametrize(("users", "items"), [(40, 30), (7, 8), (1, 1), (25, 3)])
def test_metrics_equal_a_count_by_hand(monkeypatch, users, items, most_scores):
    monkeypatch.setattr(recall, "_MOST_SCORES", most_scores)
    asking, offered, answers, consumed = drawn(users, items, seed=users)
    top_k = (1, 5, 20)
    places = ranked(
        torch.from_numpy(asking), torch.from_numpy(offered), top_k[-1], [torch.from_numpy(each) for each in consumed]
    )
    assert places.shape == (users, min(20, items))
    found = sums(places, [torch.from_numpy(each) for each in answers], top_k)
    expected = by_hand(asking, offered, answers, consumed, top_k)
    assert found == {name: pytest.approx(sum(values), rel=1e-12) for name, values in expected.items()}


def test_ranked_places(monkeypatch):
    items = torch.tensor([[1.0], [3.0], [2.0], [4.0]])
    users = torch.tensor([[1.0], [-1.0], [1.0]])
    nothing = torch.tensor([], dtype=torch.int64)
    without = [nothing, torch.tensor([0]), torch.tensor([3, 1, 0, 2])]
    assert ranked(users, items, 3, without).tolist() == [[3, 1, 2], [2, 1, 3], [-1, -1, -1]]
    monkeypatch.setattr(recall, "_MOST_SCORES", 1)
    assert ranked(users, items, 3, without).tolist() == [[3, 1, 2], [2, 1, 3], [-1, -1, -1]]
    assert ranked(users[:0], items, 3, []).shape == (0, 3)


def test_nothing_left_is_no_hit():
    places = torch.tensor([[0, -1], [-1, -1]])
    found = sums(places, [torch.tensor([1]), torch.tensor([0])], (2,))
    assert found == {"recall_at_2": 0.0, "ndcg_at_2": 0.0, "hit_rate_at_2": 0.0}


@pytest.fixture
def report():
    return RetrievalReport(
        scenarios={
            "home": {"recall_at_20": 0.5, "ndcg_at_20": 0.2},
            "a/b [c]": {"recall_at_20": 0.25, "ndcg_at_20": 0.4},
            "empty": {},
        },
        queries={"home": 1200, "a/b [c]": 3, "empty": 0},
        items={"home": 50, "a/b [c]": 7, "empty": 9},
        left_out={"of_unknown_users": 1, "of_unknown_items": 2, "repeated": 3},
    )


def test_report_sums_up(report):
    assert report.mean == {"recall_at_20": 0.375, "ndcg_at_20": pytest.approx(0.3)}
    assert report.worst == {"recall_at_20": 0.25, "ndcg_at_20": 0.2}
    assert RetrievalReport({"empty": {}}, {"empty": 0}, {"empty": 0}, {}).mean == {}


def test_report_survives_its_file(report):
    raw = report.to_json()
    assert raw["mean"] == report.mean
    assert raw["worst"] == report.worst
    assert RetrievalReport.from_json(raw) == report


def test_report_under_names_that_mlflow_takes(report):
    flat = report.flat("test")
    assert flat["test/mean/recall_at_20"] == 0.375
    assert flat["test/worst/ndcg_at_20"] == 0.2
    assert flat["test/home/recall_at_20"] == 0.5
    assert len(flat) == 8
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-. /") for name in flat)


def test_report_for_people(report):
    console = Console(width=120, record=True)
    with console.capture() as capture:
        console.print(report.table(title="run: test split"))
    lines = {line.split()[1]: line.split() for line in capture.get().splitlines() if len(line.split()) > 3}
    assert "recall@20" in capture.get().replace("recall @20", "recall@20")
    assert [cell for cell in lines["home"] if cell != "│"] == ["home", "1,200", "50", "0.5000", "0.2000"]
    assert [cell for cell in lines["empty"] if cell != "│"] == ["empty", "0", "9", "-", "-"]
    assert [cell for cell in lines["mean"] if cell != "│"] == ["mean", "0.3750", "0.3000"]
    assert [cell for cell in lines["worst"] if cell != "│"] == ["worst", "0.2500", "0.2000"]
    assert "a/b [c]" in capture.get()
