from dataclasses import replace

import torch
from backbones import build, mixed, train


def test_follows_its_formula():
    batch = mixed(30)
    model = train(build("star", labels=2, widths=(9, 7), auxiliary_widths=(6,), scenario_width=5), batch).eval()
    norm, expected = model.norm, []
    for x, s in zip(batch.joined(), batch.scenario, strict=True):
        h = (x - norm.running_mean[s]) / (norm.running_var[s] + norm.eps).sqrt()
        h = h * norm.gamma * norm.scenario_gamma[s] + norm.beta + norm.scenario_beta[s]
        for layer in model.hidden:
            h = torch.relu(h @ (layer.weight[0] * layer.scenario_weight[s]) + layer.bias + layer.scenario_bias[s])
        last = model.last
        main = h @ (last.weight[0] * last.scenario_weight[s]) + last.bias + last.scenario_bias[s]
        beside = torch.cat([x, model.scenario.weight[s]])
        for linear in model.auxiliary.linears:
            beside = torch.relu(linear(beside))
        expected.append(main + model.auxiliary_last(beside))
    torch.testing.assert_close(model(batch), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_every_scenario_starts_from_the_shared_network():
    model, batch = build("star").eval(), mixed(30)
    torch.nn.init.zeros_(model.auxiliary_last.weight)
    other = replace(batch, scenario=(batch.scenario + 1) % 13)
    torch.testing.assert_close(model(batch), model(other))


def test_the_main_logit_has_either_sign():
    model, batch = build("star"), mixed(30)
    for parameter in model.auxiliary_last.parameters():
        torch.nn.init.zeros_(parameter)
    logits = model(batch)
    model.last.weight.data.neg_()
    assert logits.any()
    torch.testing.assert_close(model(batch), -logits)


def test_each_scenario_keeps_its_own_statistics():
    model, batch = build("star"), mixed(120)
    shifted = {name: x.detach() + batch.scenario[:, None] for name, x in batch.groups.items()}
    for _ in range(3):
        model(replace(batch, groups=shifted))
    expected = torch.arange(13.0) * (torch.arange(13) != 10)
    torch.testing.assert_close(model.norm.running_mean.mean(1), expected, atol=0.3, rtol=0)
