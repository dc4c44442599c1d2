import torch
from backbones import build, mixed


def test_follows_its_formula():
    model, batch = build("mlp", labels=2, widths=(9, 7), scenario_width=5), mixed(30)
    x = torch.cat([*batch.groups.values(), model.scenario.weight[batch.scenario]], dim=1)
    for linear in model.mlp.linears:
        x = torch.relu(linear(x))
    torch.testing.assert_close(model(batch), model.last(x))
    assert [linear.out_features for linear in model.mlp.linears] == [9, 7]
    assert model.scenario.weight.shape == (13, 5)


def test_two_labels_share_all_but_the_last_layer():
    model = build("mlp", labels=2)
    model(mixed(30))[:, 0].sum().backward()
    assert model.last.weight.grad.any(dim=1).tolist() == [True, False]
    assert all(linear.weight.grad.any() for linear in model.mlp.linears)
