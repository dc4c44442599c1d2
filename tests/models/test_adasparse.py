from dataclasses import replace

import pytest
import torch
from backbones import build, config, mixed, train
from pydantic import ValidationError
from torch import Tensor

FORMS = ["binary", "scaling", "fusion"]
SMALL = {"widths": (9, 7), "scenario_width": 5}


def factors(form: str, *opinions: float, alpha: float = 1.0) -> Tensor:
    model = build("adasparse", form=form, epsilon=0.25, beta=2.0)
    return model.factors(torch.tensor(opinions), torch.tensor(alpha))[0]


@pytest.mark.parametrize("form", FORMS)
def test_follows_its_formula(form):
    model = build("adasparse", labels=2, form=form, epsilon=0.6, alpha_steps=5, sparsity=(0.4, 0.45), **SMALL)
    batch = mixed(30)
    train(model, batch)
    alpha = 1 + 3 / 5 * (5 - 1)
    expected, penalties, pruned = [], [], []
    for x, s in zip(batch.joined(), batch.scenario, strict=True):
        scenario, penalty = model.scenario.weight[s], 0.0
        h = torch.cat([x, scenario])
        for linear, pruner in zip(model.hidden, model.pruners, strict=True):
            h = torch.relu(linear(h))
            for n, v in enumerate(pruner(torch.cat([scenario, h]))):
                u = 2 * v.sigmoid() if form == "scaling" else (alpha * v).sigmoid() * (2 if form == "fusion" else 1)
                kept = form == "scaling" or bool(u > 0.6)
                h = torch.cat([h[:n], h[n : n + 1] * (u if form != "binary" else 1.0) * kept, h[n + 1 :]])
                pruned.append(not kept)
            share = sum(pruned[-len(h) :]) / len(h)
            penalty += 0.0 if 0.4 <= share <= 0.45 else 0.1 / 2 * (share - 0.425) ** 2
        expected.append(model.last(h))
        penalties.append(penalty)
    found = model.eval().objective(batch)
    torch.testing.assert_close(found.logits, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert any(pruned) == (form != "scaling")
    assert not all(pruned)
    if form == "scaling":
        assert found.penalty is None
    else:
        torch.testing.assert_close(found.penalty, torch.tensor(penalties))


def test_pruned_neurons_are_exactly_0_not_minus_1_as_a_sign_makes_them():
    assert factors("binary", -9.0, -1.2, -1.0, 0.0, 9.0).tolist() == [0, 0, 1, 1, 1]
    fused = factors("fusion", -9.0, -2.0, -1.9, 0.0, 9.0)
    assert fused.tolist()[:2] == [0, 0]
    torch.testing.assert_close(fused[2:], 2 * torch.tensor([-1.9, 0.0, 9.0]).sigmoid())
    assert factors("scaling", -9.0).item() > 0


@pytest.mark.parametrize("form", FORMS)
def test_no_pruner_reduces_it_to_the_plain_network(form):
    model, plain, batch = build("adasparse", form=form, beta=2.0, **SMALL), build("mlp", **SMALL), mixed(30)
    for pruner in model.pruners:
        torch.nn.init.zeros_(pruner.weight)
        torch.nn.init.zeros_(pruner.bias)
    plain.scenario, plain.mlp.linears, plain.last = model.scenario, model.hidden, model.last
    torch.testing.assert_close(model(batch), plain(batch))


def test_alpha_grows_with_training_steps_alone_and_is_saved():
    model, batch = build("adasparse", alpha_first=1.0, alpha_last=5.0, alpha_steps=8), mixed(30)
    for _ in range(4):
        model(batch)
    assert model.alpha() == 3
    model.eval()
    first = model(batch)
    assert torch.equal(model(batch), first)
    assert model.alpha() == 3
    restored = build("adasparse", seed=9, alpha_first=1.0, alpha_last=5.0, alpha_steps=8)
    restored.load_state_dict(model.state_dict())
    assert restored.alpha() == 3
    for _ in range(9):
        model.train()(batch)
    assert model.alpha() == 5


def test_greater_alpha_prunes_more_of_the_unwanted():
    opinions = torch.linspace(-2, 2, 9)
    kept = [(factors("fusion", *opinions, alpha=alpha) > 0).sum().item() for alpha in (1.0, 2.0, 5.0)]
    assert kept == [8, 6, 5]


@pytest.mark.parametrize("form", ["binary", "fusion"])
def test_pruned_neurons_keep_a_gradient(form):
    model = build("adasparse", form=form)
    opinions = torch.tensor([-3.0, 3.0], requires_grad=True)
    found, _ = model.factors(opinions, torch.tensor(1.0))
    found.sum().backward()
    slope = torch.tensor(3.0).sigmoid() * torch.tensor(-3.0).sigmoid() * (2 if form == "fusion" else 1)
    torch.testing.assert_close(opinions.grad, slope.expand(2))


@pytest.mark.parametrize(("bias", "direction"), [(9.0, -1), (-9.0, 1)])
@pytest.mark.parametrize("form", ["binary", "fusion"])
def test_the_penalty_pulls_the_sparsity_towards_its_range(form, bias, direction):
    model, batch = build("adasparse", form=form, sparsity=(0.4, 0.6)), mixed(30)
    for pruner in model.pruners:
        torch.nn.init.constant_(pruner.bias, bias)
    model.objective(batch).penalty.sum().backward()
    for pruner in model.pruners:
        assert (-pruner.bias.grad * direction > 0).all()


def test_no_penalty_within_the_range():
    model, batch = build("adasparse", sparsity=(0.0, 1.0)), mixed(30)
    assert not model.objective(batch).penalty.any()


def test_the_penalty_of_a_row_is_its_own():
    model, batch = build("adasparse", epsilon=0.9), mixed(30)
    model.eval()
    together = model.objective(batch).penalty
    assert together.unique().numel() > 1
    alone = [
        model.objective(
            replace(
                batch,
                groups={name: x[i : i + 1] for name, x in batch.groups.items()},
                scenario=batch.scenario[i : i + 1],
                row=batch.row[i : i + 1],
            )
        ).penalty
        for i in range(30)
    ]
    torch.testing.assert_close(torch.cat(alone), together)


def test_refuses_a_range_upside_down():
    with pytest.raises(ValidationError, match=r"sparsity is \[0.3, 0.2\]: give the lower bound first"):
        config("adasparse", sparsity=(0.3, 0.2))
