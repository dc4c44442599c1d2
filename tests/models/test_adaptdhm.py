from dataclasses import replace

import torch
from backbones import build, config, mixed, take, train
from torch import nn
from torch.nn.functional import normalize

from msr_dist.models.adaptdhm import Router

ROW = torch.arange(60)


def router(**settings) -> Router:
    torch.manual_seed(0)
    return Router(config("adaptdhm", **settings), 6)


def test_follows_its_formula():
    batch = mixed(60)
    model = train(build("adaptdhm", labels=2, widths=(9, 7), scenario_width=5), batch).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    expected, chosen = [], set()
    for x, s in zip(batch.joined(), batch.scenario, strict=True):
        h = torch.cat([x, model.scenario.weight[s]])
        u = (h - model.router.mean) / (model.router.var + 1e-5).sqrt()
        scores = [u @ centre for centre in model.router.centres]
        a = scores.index(max(scores))
        chosen.add(a)
        for i, layer in enumerate([*model.hidden, model.last]):
            h = h if i == 0 else torch.relu(h)
            h = h @ (layer.weight[0] * layer.scenario_weight[a]) + layer.bias + layer.scenario_bias[a]
        expected.append(h)
    torch.testing.assert_close(model(batch), torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert chosen == {0, 1, 2}


def test_centres_follow_their_rows():
    found = router(clusters=2, iterations=2, beta=0.7, temperature=0.5)
    centres, z = found.centres.clone(), torch.randn(60, 6) + 1
    mean, var = 0.3 * z.mean(0), 0.7 + 0.3 * z.var(0, correction=0)
    u = [normalize((x - mean) / (var + 1e-5).sqrt(), dim=0) for x in z]
    for _ in range(2):
        claimed = [torch.zeros(6), torch.zeros(6)]
        for x in u:
            scores = torch.stack([x @ c / 0.5 for c in centres]).exp()
            for k in range(2):
                claimed[k] = claimed[k] + scores[k] / scores.sum() * x
        moved = [0.7 * c + 0.3 * normalize(s, dim=0) for c, s in zip(centres, claimed, strict=True)]
        centres = [normalize(c, dim=0) for c in moved]
    cluster = found(z, ROW)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.var, var)
    torch.testing.assert_close(found.centres, torch.stack(centres))
    assert cluster.tolist() == [int(x @ centres[1] > x @ centres[0]) for x in u]


def test_finds_clusters_far_from_the_origin():
    truth = torch.arange(60) % 3
    apart, found = 4 * torch.eye(3, 6), router()
    for _ in range(60):
        cluster = found(torch.randn(60, 6) * 0.5 + apart[truth] + 20, ROW)
    pairs = set(zip(truth.tolist(), cluster.tolist(), strict=True))
    assert len(pairs) == 3
    assert len({k for _, k in pairs}) == 3


def test_short_embeddings_are_told_apart_as_well():
    truth = torch.arange(60) % 3
    apart, found = 4e-3 * torch.eye(3, 6), router()
    for _ in range(60):
        cluster = found(torch.randn(60, 6) * 5e-4 + apart[truth], ROW)
    assert len(set(zip(truth.tolist(), cluster.tolist(), strict=True))) == 3


def test_a_long_feature_does_not_decide_alone():
    truth, loud = torch.arange(60) % 3, torch.arange(60) % 2
    apart, found = 4 * torch.eye(3, 6), router()
    for _ in range(60):
        z = torch.randn(60, 6) * 0.5 + apart[truth]
        z[:, 5] += 100.0 * loud
        cluster = found(z, ROW)
    assert len(set(zip(truth.tolist(), cluster.tolist(), strict=True))) == 3


def test_centres_are_saved_not_lost_with_the_process():
    batch = mixed(60)
    model = train(build("adaptdhm"), batch).eval()
    state = model.state_dict()
    assert {"router.centres", "router.mean", "router.var"} <= set(state)
    restored = build("adaptdhm", seed=9)
    assert not torch.equal(restored.router.centres, model.router.centres)
    restored.load_state_dict(state)
    assert torch.equal(restored.eval()(batch), model(batch))


def test_every_bias_is_applied():
    batch = mixed(60)
    for name in dict(build("adaptdhm").named_parameters()):
        if "bias" in name:
            model = build("adaptdhm").eval()
            before = model(batch)
            nn.init.normal_(model.get_parameter(name))
            assert not torch.isclose(model(batch), before).any(), name


def test_one_row_is_routed_like_many():
    model, batch = build("adaptdhm").eval(), mixed(20)
    z = torch.cat([batch.joined(), model.scenario(batch.scenario)], dim=1)
    alone = [model.router(z[i : i + 1], batch.row[i : i + 1]) for i in range(20)]
    assert torch.equal(torch.cat(alone), model.router(z, batch.row))


def test_rows_of_other_clusters_leave_a_cluster_alone():
    model, batch = build("adaptdhm").eval(), mixed(60)
    z = torch.cat([batch.joined(), model.scenario(batch.scenario)], dim=1)
    own = take(batch, model.router(z, batch.row) == 1)
    model(own).sum().backward()
    for layer in [*model.hidden, model.last]:
        for parameter in (layer.scenario_weight, layer.scenario_bias):
            assert parameter.grad.flatten(1).any(dim=1).tolist() == [False, True, False]


def test_padding_moves_nothing():
    plain, filled = build("adaptdhm"), build("adaptdhm")
    batch = mixed(60)
    first = take(batch, slice(40))
    plain(first)
    filled(replace(batch, row=torch.where(torch.arange(60) < 40, batch.row, -1)))
    for name, buffer in plain.router.named_buffers():
        torch.testing.assert_close(filled.router.get_buffer(name), buffer)
    before = {name: x.clone() for name, x in plain.router.named_buffers()}
    plain(take(batch, slice(0)))
    for name, buffer in plain.router.named_buffers():
        torch.testing.assert_close(buffer, before[name])
