import pytest
import torch
from backbones import build, mixed
from torch import nn

SETTINGS = {"cross_layers": 2, "widths": (9, 7), "scenario_width": 5}


@pytest.mark.parametrize("structure", ["stacked", "parallel"])
@pytest.mark.parametrize("rank", [None, 3])
def test_follows_its_formula(structure, rank):
    model, batch = build("dcnv2", labels=2, structure=structure, rank=rank, **SETTINGS), mixed(30)
    expected = []
    for joined, s in zip(batch.joined(), batch.scenario, strict=True):
        x0 = torch.cat([joined, model.scenario.weight[s]])
        x = x0
        for cross in model.crosses:
            nn.init.constant_(cross.up.bias, 0.3)
            w = cross.up.weight if rank is None else cross.up.weight @ cross.down.weight
            x = x0 * (w @ x + cross.up.bias) + x
        h = x if structure == "stacked" else x0
        for linear in model.mlp.linears:
            h = torch.relu(linear(h))
        expected.append(model.last(h if structure == "stacked" else torch.cat([x, h])))
    torch.testing.assert_close(model(batch), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_low_rank_equals_the_full_matrix_that_it_factors():
    low, full, batch = build("dcnv2", rank=3, **SETTINGS), build("dcnv2", **SETTINGS), mixed(30)
    state = low.state_dict()
    for name in [name for name in state if "down" in name]:
        up = name.replace("down", "up")
        state[up] = state[up] @ state.pop(name)
        assert torch.linalg.matrix_rank(state[up]) == 3
    full.load_state_dict(state)
    torch.testing.assert_close(full(batch), low(batch))


def test_without_crosses_it_is_the_plain_network():
    model, plain, batch = build("dcnv2", **SETTINGS), build("mlp", widths=(9, 7), scenario_width=5), mixed(30)
    for cross in model.crosses:
        nn.init.zeros_(cross.up.weight)
    plain.load_state_dict({name: x for name, x in model.state_dict().items() if "cross" not in name})
    torch.testing.assert_close(model(batch), plain(batch))


@pytest.mark.parametrize("layers", [1, 3])
def test_layers_hold_products_of_one_more_input_than_there_are(layers):
    """Along a line through the origin, the crosses are a polynomial of that degree and no other."""
    model = build("dcnv2", cross_layers=layers).double()
    t = torch.linspace(-1, 1, 12, dtype=torch.float64)[:, None]
    x0 = t * torch.randn(model.mlp.linears[0].in_features, dtype=torch.float64)
    x = x0
    for cross in model.crosses:
        x = cross(x0, x)
    for degree, fits in ((layers, False), (layers + 1, True)):
        powers = t ** torch.arange(degree + 1)
        residual = x - powers @ torch.linalg.lstsq(powers, x).solution
        assert (residual.abs().max() < 1e-9) == fits, degree
