import torch
from backbones import build, mixed
from torch import nn


def test_follows_its_formula():
    model, batch = build("shared_bottom", labels=2, widths=(9, 7), tower_widths=(6,)), mixed(30)
    first, last = model.tower.hidden[0], model.tower.last
    for layer in (first, last):
        nn.init.normal_(layer.bias)
    x = batch.joined()
    for linear in model.bottom.linears:
        x = torch.relu(linear(x))
    expected = []
    for h, s in zip(x, batch.scenario, strict=True):
        h = torch.relu(h @ first.weight[s] + first.bias[s])
        expected.append(h @ last.weight[s] + last.bias[s])
    torch.testing.assert_close(model(batch), torch.stack(expected))


def test_two_labels_share_the_hidden_layers_of_their_tower():
    model = build("shared_bottom", labels=2)
    model(mixed(30))[:, 0].sum().backward()
    assert model.tower.last.bias.grad.any(dim=0).tolist() == [True, False]
    assert model.tower.hidden[0].weight.grad.any()
