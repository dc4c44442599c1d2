from dataclasses import replace

import pytest
import torch
from torch import nn

from msr_dist.models.base import Behaviours, Inputs, Objective, of_whole_batch


def inputs() -> Inputs:
    lists = Behaviours(torch.randn(5, 2, 3), torch.rand(5, 2) < 0.5, torch.randn(5, 3))
    groups = {"user": torch.randn(5, 4), "item": torch.randn(5, 2)}
    user, knowledge = torch.tensor([7, 7, 3, 9, 3]), torch.randn(5, 4)
    return Inputs(groups, torch.tensor([2, 0, 1, 0, 2]), torch.arange(5) + 10, {"clicks": lists}, user, knowledge)


def assert_rows(part: Inputs, whole: Inputs, rows: list[int]) -> None:
    for name in ("scenario", "row", "user", "knowledge"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[rows])
    assert torch.equal(part.joined(), whole.joined()[rows])
    for name in ("vectors", "present", "target"):
        assert torch.equal(getattr(part.behaviours["clicks"], name), getattr(whole.behaviours["clicks"], name)[rows])


def test_parts_of_inputs_are_their_rows():
    whole = inputs()
    some = whole.take(torch.tensor([4, 0, 3, 1]))
    assert_rows(some, whole, [4, 0, 3, 1])
    for part, rows in zip(some.split([1, 0, 3]), ([4], [], [0, 3, 1]), strict=True):
        assert_rows(part, whole, rows)


def test_what_is_not_known_stays_unknown_in_parts():
    whole = replace(inputs(), user=None, knowledge=None)
    for part in (whole.take(torch.tensor([4, 0])), *whole.split([2, 3])):
        assert part.user is None
        assert part.knowledge is None


def test_groups_of_a_whole_are_its_parts():
    whole = torch.randn(5, 6)
    subject = inputs().with_whole(whole)
    assert subject.joined() is whole
    assert torch.equal(subject.groups["item"], whole[:, 4:])
    for part, rows in zip(subject.split([2, 3]), (slice(0, 2), slice(2, 5)), strict=True):
        assert torch.equal(part.joined(), whole[rows])
    with pytest.raises(AssertionError):
        replace(subject, groups={"user": torch.randn(5, 4), "item": torch.randn(5, 2)})


def test_an_objective_weighs_rows_and_adds_penalties_where_a_row_counts():
    logits, labels = torch.tensor([[0.0], [2.0], [-1.0]]), torch.tensor([[1.0], [0.0], [1.0]])
    weights = torch.tensor([[1.0], [3.0], [0.0]])
    entropy = [0.6931472, 2.1269280]
    assert Objective(logits).loss(labels, weights).item() == pytest.approx(entropy[0] + 3 * entropy[1])
    whole = Objective(logits, weight=torch.tensor([2.0, 0.5, 9.0]), penalty=torch.tensor([0.25, 0.5, 100.0]))
    expected = 2 * entropy[0] + 0.5 * 3 * entropy[1] + 0.75
    assert whole.loss(labels, weights).item() == pytest.approx(expected)


def test_normalisation_of_torch_needs_the_whole_batch():
    assert of_whole_batch(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))) == ["BatchNorm1d"]
    assert of_whole_batch(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))) == []
