"""What every file in models/ has to keep; a new one is found by itself."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from backbones import (
    ABSENT,
    KINDS,
    SCENARIOS,
    build,
    config,
    given,
    inputs,
    known,
    looked_up,
    mixed,
    schema,
    take,
    train,
)
from pydantic import ValidationError
from torch import Tensor

from msr_dist.config import kind_config
from msr_dist.recommender import Head

pytestmark = pytest.mark.parametrize("kind", KINDS)

EIGHT_ROWS = torch.tensor([0, 2, 0, 1, 2, 2, 0, 2])
"""Scenario 0 has rows on both sides of a cut after 5, scenario 1 has one row in all, the others have none."""
CUTS = (5, 8)
START_AT_ZERO = {"llm4msr"}
"""Their last layers start at 0, so that what lies before these has a gradient from the second step on."""


@pytest.mark.parametrize("labels", [1, 2])
def test_one_logit_per_row_and_label(kind, labels):
    assert build(kind, labels)(mixed(30)).shape == (30, labels)


@pytest.mark.parametrize("labels", [1, 2])
def test_everything_gets_a_gradient_but_lines_of_absent_scenarios(kind, labels):
    model, batch = build(kind, labels), mixed(120)
    if kind in START_AT_ZERO:
        train(model, mixed(120, seed=2), steps=1).zero_grad()
    model.objective(batch).loss(torch.randint(2, (120, labels)).float(), torch.rand(120, labels)).backward()
    for name, x in batch.groups.items():
        assert (x.grad != 0).any(dim=1).all(), name
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith(f"backbones.{ABSENT}."):  # of `single`, which has a whole network for each scenario
            assert not parameter.grad.any(), name
            continue
        assert parameter.grad.any(), name
        if len(parameter) == SCENARIOS:
            touched = (parameter.grad != 0).flatten(1).any(dim=1)
            assert touched.tolist() == [s != ABSENT for s in range(SCENARIOS)], name


def test_a_prediction_depends_on_its_row_alone(kind):
    batch = mixed(30)
    model = train(build(kind, labels=2, dropout=0.3), batch).eval()
    together = model(batch)
    order = torch.randperm(30)
    torch.testing.assert_close(model(take(batch, order)), together[order], atol=1e-6, rtol=0)
    alone = torch.cat([model(take(batch, [i])) for i in range(30)])
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=0)


def test_the_scenario_matters(kind):
    batch = mixed(30)
    model = train(build(kind), batch, steps=20).eval()
    moved = replace(batch, scenario=(batch.scenario + 1) % SCENARIOS)
    assert (model(moved) - model(batch)).abs().min() > 0


def test_learns_64_random_rows_by_heart(kind):
    model, batch = build(kind, labels=2), mixed(64)
    labels = torch.randint(2, (64, 2), generator=torch.Generator().manual_seed(2)).float()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(200):
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(batch), labels)
        (model.objective(batch).loss(labels, torch.ones(64, 2)) / 64).backward()
        optimizer.step()
        if loss < 0.05:
            return
    pytest.fail(f"loss {loss.item():.3f} after 200 steps")


@pytest.mark.parametrize("rows", [0, 1])
def test_hardly_any_rows(kind, rows):
    model, batch = build(kind, dropout=0.3), mixed(rows)
    objective = model.objective(batch)
    objective.loss(torch.ones(rows, 1), torch.ones(rows, 1)).backward()
    assert objective.logits.shape == (rows, 1)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert rows or not parameter.grad.any(), name
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    assert model.eval()(batch).shape == (rows, 1)


def test_a_saved_model_predicts_and_trains_the_same(kind):
    batch = mixed(30)
    model = train(build(kind, dropout=0.3), batch)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    restored = build(kind, seed=9, dropout=0.3)
    restored.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(restored.eval()(batch), model.eval()(batch))
    assert torch.equal(restored.train()(batch), model.train()(batch))


def test_evaluation_changes_nothing(kind):
    model = train(build(kind, dropout=0.3), mixed(30)).eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model(mixed(30, seed=5))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_scenario_without_training_rows_is_served_by_what_the_others_share(kind):
    scenarios = [scenario.model_copy(update={"rows": 100 + scenario.id}) for scenario in schema().scenarios]
    scenarios[ABSENT] = scenarios[ABSENT].model_copy(update={"rows": 0})
    counted = schema().model_copy(update={"scenarios": tuple(scenarios)})
    torch.manual_seed(0)
    backbone = train(config(kind).build(counted), mixed(30))
    head = Head(counted, backbone).eval()
    scenario = torch.tensor([ABSENT, 3, ABSENT])
    batch, pooled = looked_up(scenario)
    logits = head(pooled, None, batch, known(batch))[1].logits
    for name, parameter in backbone.named_parameters():
        if name.startswith(f"backbones.{ABSENT}."):
            parameter.data.normal_()
        elif len(parameter) == SCENARIOS:
            parameter.data[ABSENT].normal_()
    assert torch.equal(head(pooled, None, batch, known(batch))[1].logits, logits)
    largest = [s for s in range(SCENARIOS - 1, -1, -1) if s != ABSENT][:8]
    elsewhere = [backbone(given(batch, pooled, torch.full((3,), s))) for s in largest]
    shares = torch.tensor([100.0 + s for s in largest])
    expected = (torch.sigmoid(torch.stack(elsewhere)) * (shares / shares.sum())[:, None, None]).sum(0)
    torch.testing.assert_close(torch.sigmoid(logits)[[0, 2]], expected[[0, 2]])
    own = backbone(given(batch, pooled, scenario))
    torch.testing.assert_close(logits[1], own[1])


def test_the_seed_decides_the_start(kind):
    first, again, other = (list(build(kind, seed=seed).state_dict().values()) for seed in (3, 3, 4))
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_faulty_settings_are_refused(kind):
    for name in kind_config("msr_dist.models", kind).model_fields:
        faults: list[Any] = [(), (0,), (8, -1)] if name.endswith("widths") else []
        faults += [1.0, -0.1, float("nan")] if name == "dropout" else []
        for fault in faults:
            with pytest.raises(ValidationError):
                config(kind, **{name: fault})


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict[Any, Any]]:
    """What each of two ranks found; one start of the processes serves all models."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_work, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("cut", CUTS)
def test_two_ranks_equal_one(kind, cut, two_ranks):
    alone = _two_steps(kind, slice(None))
    left, right = (rank[kind, cut] for rank in two_ranks)
    close = {"atol": 1e-5, "rtol": 1e-5}
    for name in ("logits", "group gradients", "evaluation"):
        torch.testing.assert_close(torch.cat([left[name], right[name]], dim=1), alone[name], **close)
    for name in ("gradients", "state"):
        for part in (left, right):
            torch.testing.assert_close(part[name], alone[name], **close)


def _work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    cuts = {cut: slice(cut, None) if rank else slice(cut) for cut in CUTS}
    torch.save({(kind, cut): _two_steps(kind, cuts[cut]) for kind in KINDS for cut in CUTS}, folder / f"{rank}.pt")
    # gloo may abort in a rank whose peer is gone already.
    dist.barrier()
    dist.destroy_process_group()


def _two_steps(kind: str, rows: slice) -> dict[str, Any]:
    """Two steps on this rank's `rows` of the eight, gradients summed over the ranks if there are any."""
    model = build(kind, labels=2, dropout=0.3)
    labels = torch.randint(2, (8, 2), generator=torch.Generator().manual_seed(2)).float()[rows]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    logits: list[Tensor] = []
    group_gradients: list[Tensor] = []
    for step in range(2):
        batch = take(inputs(EIGHT_ROWS, seed=step), rows)
        optimizer.zero_grad()
        objective = model.objective(batch)
        logits.append(objective.logits)
        (objective.loss(labels, torch.ones_like(labels)) / len(EIGHT_ROWS)).backward()
        group_gradients.append(torch.cat([x.grad for x in batch.groups.values()], dim=1))
        if dist.is_initialized():
            for parameter in model.parameters():
                # A gradient that is missing fails its own model's test, not this run for all of them.
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad)
        optimizer.step()
    with torch.no_grad():
        evaluation = model.eval()(take(inputs(EIGHT_ROWS, seed=7), rows))
    return {
        "logits": torch.stack(logits).detach(),
        "group gradients": torch.stack(group_gradients),
        "evaluation": evaluation[None],
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "state": model.state_dict(),
    }


def test_products_in_bf16_say_nearly_the_same_and_leave_gradients_in_fp32(kind):
    model, batch = train(build(kind, labels=2), mixed(120), steps=5), mixed(120)
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.objective(batch).float()
    torch.testing.assert_close(rough.logits, exact, atol=0.1, rtol=0.05)
    assert not torch.equal(rough.logits, exact)
    model.zero_grad()
    rough.loss(torch.randint(2, (120, 2)).float(), torch.ones(120, 2)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
