"""The objectives of two towers against their formulas, written as loops, and on two ranks against one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from backbones import take
from pydantic import ValidationError
from towers import build, choices, views

from msr_dist.models.layers import gather_over_ranks
from msr_dist.models.objectives import Contrastive, Retrieval, Shown

ROWS = 24


def arrays(shown, towers):
    """Both sides' vectors and what the rows say, as NumPy has them."""
    vectors = [tower(shown.inputs).detach().double().numpy() for tower in (towers.user, towers.item)]
    rows = {name: getattr(shown, name).numpy() for name in ("user", "item", "labels", "weights", "log_share")}
    return *vectors, rows | {"scenario": shown.inputs.scenario.numpy()}


def softmax_by_hand(shown, towers, temperature, correct):
    users, items, x = arrays(shown, towers)
    total = weights = 0.0
    for r in range(len(users)):
        weight = x["weights"][r, 0] * x["labels"][r, 0]
        if weight == 0:
            continue
        scores = {}
        for c in range(len(users)):
            rival = x["weights"][c, 0] > 0 and x["scenario"][c] == x["scenario"][r] and x["item"][c] != x["item"][r]
            if c == r or rival:
                scores[c] = users[r] @ items[c] / temperature - (x["log_share"][c] if correct else 0)
        total -= weight * np.log(np.exp(scores[r]) / sum(np.exp(score) for score in scores.values()))
        weights += weight
    return total / weights


def bce_by_hand(shown, towers, temperature):
    users, items, x = arrays(shown, towers)
    total = 0.0
    for r in range(len(users)):
        chance = 1 / (1 + np.exp(-users[r] @ items[r] / temperature))
        total -= x["weights"][r, 0] * np.log(chance if x["labels"][r, 0] else 1 - chance)
    return total / x["weights"].sum()


def infonce_by_hand(shown, towers, side, temperature):
    users, items, x = arrays(shown, towers)
    vectors, entity, column = (users, x["user"], 0) if side == "user" else (items, x["item"], 1)
    of_side = (x["labels"][:, column] > 0) & (x["weights"][:, column] > 0)
    total = weights = 0.0
    for p in range(0, len(users), 2):
        if not of_side[p]:
            continue
        losses = []
        for a, b in ((p, p + 1), (p + 1, p)):
            others = [
                c
                for c in range(len(users))
                if of_side[c] and x["scenario"][c] == x["scenario"][b] and entity[c] != entity[a]
            ]
            near = np.exp(vectors[a] @ vectors[b] / temperature)
            losses.append(-np.log(near / (near + sum(np.exp(vectors[a] @ vectors[c] / temperature) for c in others))))
        total += x["weights"][p, column] * sum(losses) / 2
        weights += x["weights"][p, column]
    return total / weights


def gradients(towers):
    return {name: torch.zeros(1) if p.grad is None else p.grad for name, p in towers.named_parameters()}


class TestRetrieval:
    @pytest.mark.parametrize("temperature", [0.1, 0.7])
    @pytest.mark.parametrize("correct", [True, False])
    def test_softmax_follows_its_formula(self, correct, temperature):
        shown, towers = choices(ROWS), build("sass")
        loss = Retrieval(temperature=temperature, correct_popularity=correct).value(towers, shown)
        assert loss.item() == pytest.approx(softmax_by_hand(shown, towers, temperature, correct), abs=1e-5)

    @pytest.mark.parametrize("temperature", [0.1, 0.7])
    def test_bce_follows_its_formula(self, temperature):
        shown, towers = choices(ROWS), build("sass")
        loss = Retrieval(loss="bce", shown_negatives=True, temperature=temperature).value(towers, shown)
        assert loss.item() == pytest.approx(bce_by_hand(shown, towers, temperature), abs=1e-5)

    def test_who_competes(self):
        """Row 0 chose item 1. Of the others, only those of its scenario with other items and a weight matter."""
        towers, shown = build("two_tower"), choices(6)
        labels, weights = torch.tensor([1.0, 0, 0, 0, 0, 0])[:, None], torch.tensor([1.0, 1, 1, 1, 1, 0])[:, None]
        scenario, item = torch.tensor([0, 0, 0, 0, 1, 0]), torch.tensor([1, 2, 3, 1, 2, 2])
        shown = replace(
            shown, inputs=replace(shown.inputs, scenario=scenario), item=item, labels=labels, weights=weights
        )
        loss = Retrieval().value(towers, shown)
        loss.backward()
        assert loss.item() == pytest.approx(softmax_by_hand(shown, towers, 0.1, correct=True), abs=1e-5)
        item_gradient, user_gradient = (shown.inputs.groups[side].grad for side in ("item", "user"))
        assert item_gradient.any(dim=1).tolist() == [True, True, True, False, False, False]
        assert user_gradient.any(dim=1).tolist() == [True] + [False] * 5

    @pytest.mark.parametrize("settings", [{}, {"loss": "bce", "shown_negatives": True}])
    def test_rows_that_fill_up_have_no_influence(self, settings):
        """Whatever they hold, and whether they are there at all."""
        objective, shown = Retrieval(**settings), choices(ROWS)
        found = []
        for change in ("none", "values", "gone"):
            towers = build("sass")
            rows = ROWS - 2 if change == "gone" else ROWS
            part = replace_rows(shown, slice(0, rows))
            if change == "values":
                for x in part.inputs.groups.values():
                    x.data[-2:] = 50.0
                part.labels[-2:] = 1
                part.item[-2:] = 99
                part.log_share[-2:] = -40.0
            loss = objective.value(towers, part)
            loss.backward()
            found.append((loss, gradients(towers)))
        for loss, of_parameters in found[1:]:
            torch.testing.assert_close(loss, found[0][0], atol=1e-6, rtol=0)
            torch.testing.assert_close(of_parameters, found[0][1], atol=1e-6, rtol=1e-5)

    def test_a_choice_without_rivals_costs_nothing(self):
        shown = replace(choices(ROWS), item=torch.full((ROWS,), 3))
        assert Retrieval().value(build("sass"), shown).item() == 0

    def test_a_batch_without_choices_is_0(self):
        shown, towers = choices(ROWS), build("sass")
        loss = Retrieval().value(towers, replace(shown, labels=torch.zeros(ROWS, 1)))
        loss.backward()
        assert loss.item() == 0
        assert not any(gradient.any() for gradient in gradients(towers).values())

    @pytest.mark.parametrize("settings", [{}, {"loss": "bce", "shown_negatives": True}])
    def test_a_batch_of_nothing_but_filling_is_0(self, settings):
        shown, towers = choices(ROWS), build("sass")
        loss = Retrieval(**settings).value(towers, replace(shown, weights=torch.zeros(ROWS, 1)))
        loss.backward()
        assert loss.item() == 0
        assert not any(gradient.any() for gradient in gradients(towers).values())

    def test_settings_that_make_no_sense_are_refused(self):
        with pytest.raises(ValidationError, match="loss 'bce' needs rows with label 0: set shown_negatives=true"):
            Retrieval(loss="bce")
        for name, value in (("temperature", 0.0), ("uniform_negatives", -1.0)):
            with pytest.raises(ValidationError, match=name):
                Retrieval(**{name: value})


class TestContrastive:
    @pytest.mark.parametrize("temperature", [0.1, 0.7])
    def test_follows_its_formula(self, temperature):
        shown, towers = views(ROWS), build("sass")
        user, item = (infonce_by_hand(shown, towers, side, temperature) for side in ("user", "item"))
        expected = {"user": user, "item": 1.7 * item, "both": user + 1.7 * item}
        for sides, value in expected.items():
            loss = Contrastive(temperature=temperature, sides=sides, item_weight=1.7).value(towers, shown)
            assert loss.item() == pytest.approx(value, abs=1e-5), sides

    def test_who_competes(self):
        """User 7 in scenarios 0 and 1. Negatives of a view are others' views of the partner's scenario."""
        towers, shown = build("two_tower"), views(10)
        scenario = torch.tensor([0, 1, 1, 2, 2, 3, 1, 2, 1, 0])
        user = torch.tensor([7, 7, 8, 8, 9, 9, 7, 7, 5, 5])
        labels = torch.tensor([[1.0, 0]] * 8 + [[0, 1.0]] * 2)
        # All but the first pair are there as negatives; their own losses are next to nothing.
        weights = torch.tensor([[1.0, 1.0]] * 2 + [[1e-30, 1.0]] * 6 + [[1.0, 1.0]] * 2)
        shown = replace(
            shown, inputs=replace(shown.inputs, scenario=scenario), user=user, labels=labels, weights=weights
        )
        Contrastive(sides="user").value(towers, shown).backward()
        gradient = shown.inputs.groups["user"].grad.abs().amax(dim=1)
        # Nobody else is in scenario 0; in 1 there are user 8, the same user 7 again, and an item's view.
        assert (gradient > 1e-20).tolist() == [True, True, True] + [False] * 7

    @pytest.mark.parametrize("missing", ["user", "item"])
    def test_a_side_without_pairs_has_no_part(self, missing):
        place = ("user", "item").index(missing)
        shown, towers = views(ROWS), build("sass")
        labels = torch.zeros(ROWS, 2)
        labels[:, 1 - place] = 1
        shown = replace(shown, labels=labels)
        both, other = (Contrastive(sides=sides).value(towers, shown) for sides in ("both", "user" if place else "item"))
        assert both.item() == other.item() > 0
        both.backward()
        for name, gradient in gradients(towers).items():
            assert gradient.isfinite().all(), name
            assert gradient.any() != name.startswith(missing), name

    def test_a_batch_without_pairs_is_0(self):
        shown, towers = views(ROWS), build("sass")
        for empty in (replace(shown, labels=torch.zeros(ROWS, 2)), replace(shown, weights=torch.zeros(ROWS, 2))):
            loss = Contrastive().value(towers, empty)
            loss.backward()
            assert loss.item() == 0
            assert not any(gradient.any() for gradient in gradients(towers).values())

    def test_rows_that_fill_up_have_no_influence(self):
        shown, found = views(ROWS), []
        for change in ("none", "values", "gone"):
            towers = build("sass")
            part = replace_rows(shown, slice(0, ROWS - 2 if change == "gone" else ROWS))
            if change == "values":
                for x in part.inputs.groups.values():
                    x.data[-2:] = 50.0
                part.labels[-2:] = 1
                part.user[-2:] = part.item[-2:] = 99
            loss = Contrastive().value(towers, part)
            loss.backward()
            found.append((loss, gradients(towers)))
        for loss, of_parameters in found[1:]:
            torch.testing.assert_close(loss, found[0][0], atol=1e-6, rtol=0)
            torch.testing.assert_close(of_parameters, found[0][1], atol=1e-6, rtol=1e-5)

    def test_training_brings_views_of_one_user_together(self):
        shown, towers = views(40), build("sass")
        optimizer = torch.optim.Adam(towers.parameters(), 0.02)
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            loss = Contrastive().value(towers, shown)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2


def replace_rows(shown: Shown, rows: Any) -> Shown:
    """Those rows, as leaves and copies of their own."""
    names = ("user", "item", "labels", "weights", "log_share")
    return Shown(take(shown.inputs, rows), **{name: getattr(shown, name)[rows].clone() for name in names})


def batches() -> dict[str, tuple[Retrieval | Contrastive, Shown]]:
    """What two ranks share, half each: also where one of them has nothing of some kind."""
    first_half = (torch.arange(ROWS) < ROWS // 2)[:, None].float()
    chosen, paired = choices(ROWS), views(ROWS)
    one_side = torch.cat([first_half, 1 - first_half], dim=1)
    bce = Retrieval(loss="bce", shown_negatives=True)
    return {
        "softmax": (Retrieval(), chosen),
        "softmax, plain": (Retrieval(correct_popularity=False, temperature=0.5), chosen),
        "softmax, choices on one rank": (Retrieval(), replace(chosen, labels=chosen.labels * first_half)),
        "softmax, no choices": (Retrieval(), replace(chosen, labels=torch.zeros(ROWS, 1))),
        "softmax, filling on one rank": (Retrieval(), replace(chosen, weights=chosen.weights * first_half)),
        "bce": (bce, chosen),
        "bce, filling on one rank": (bce, replace(chosen, weights=chosen.weights * first_half)),
        "contrastive": (Contrastive(item_weight=0.6), paired),
        "contrastive, a side for each rank": (Contrastive(), replace(paired, labels=one_side)),
        "contrastive, users": (Contrastive(sides="user"), paired),
        "contrastive, filling on one rank": (Contrastive(), replace(paired, weights=paired.weights * first_half)),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_work, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", batches())
def test_two_ranks_equal_one(name, two_ranks):
    alone = _step(*batches()[name])
    left, right = (rank[name] for rank in two_ranks)
    close = {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close((left["loss"] + right["loss"]) / 2, alone["loss"], **close)
    # What a rank's mean over two ranks makes half of.
    torch.testing.assert_close(torch.cat([left["rows"], right["rows"]]) / 2, alone["rows"], **close)
    for part in (left, right):
        torch.testing.assert_close(part["parameters"], alone["parameters"], **close)
    assert alone["rows"].any() == (name != "softmax, no choices")


def test_gathering_keeps_order_and_sums_gradients(two_ranks):
    assert [rank["gathered"]["first"] for rank in two_ranks] == [0, 3]
    for rank, found in enumerate(two_ranks):
        assert found["gathered"]["values"].tolist() == [0, 1, 2, 10, 11, 12]
        assert found["gathered"]["flags"].tolist() == [True, False, False, False, False, False]
        # Rank k weighs place i by 100 k + i.
        assert found["gathered"]["gradient"].tolist() == [100.0 + 2 * (3 * rank + i) for i in range(3)]


def test_alone_there_is_nothing_to_gather():
    x = torch.ones(3, requires_grad=True)
    assert gather_over_ranks(x) == (x, 0)


def _work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    half = slice(ROWS // 2, None) if rank else slice(ROWS // 2)
    found = {name: _step(objective, replace_rows(shown, half)) for name, (objective, shown) in batches().items()}
    x = (torch.arange(3.0) + 10 * rank).requires_grad_()
    everybody, first = gather_over_ranks(x)
    (everybody * (100.0 * rank + torch.arange(6))).sum().backward()
    flags, _ = gather_over_ranks(x == 0)
    gathered = {"values": everybody.detach(), "first": first, "flags": flags, "gradient": x.grad}
    torch.save(found | {"gathered": gathered}, folder / f"{rank}.pt")
    # gloo may abort in a rank whose peer is gone already.
    dist.barrier()
    dist.destroy_process_group()


def _step(objective: Retrieval | Contrastive, shown: Shown) -> dict[str, Any]:
    """The loss of this rank's rows, its gradient by row, and by parameter, averaged over the ranks if there are any."""
    towers = build("sass", dropout=0.3)
    shown = replace_rows(shown, slice(None))
    loss = objective.value(towers, shown)
    loss.backward()
    parameters = gradients(towers)
    if dist.is_initialized():
        for gradient in parameters.values():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    groups = [shown.inputs.groups[side] for side in ("user", "item")]
    rows = torch.cat([torch.zeros_like(x) if x.grad is None else x.grad for x in groups], dim=1)
    return {"loss": loss.detach(), "rows": rows, "parameters": parameters}
