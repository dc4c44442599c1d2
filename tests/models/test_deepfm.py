from itertools import combinations

import torch
from backbones import build, config, mixed, schema
from torch import nn

from msr_dist.models.base import Inputs
from msr_dist.schema import Feature, Numeric, Table

FIELDS = 5
"""user (width 8), item (12), two numerics, the scenario."""


def test_follows_its_formula():
    model, batch = build("deepfm", labels=2, widths=(9, 7)), mixed(30)
    nn.init.normal_(model.second)
    expected = []
    for i, s in enumerate(batch.scenario):
        numerics = batch.groups["context"][i]
        user, item, age, hour = model.lifts
        v = [user.weight @ batch.groups["user"][i], batch.groups["item"][i]]
        v += [layer.weight[:, 0] * x for layer, x in zip((age, hour), numerics, strict=True)]
        v.append(model.scenario.weight[s])
        assert isinstance(item, nn.Identity)
        pairs = [model.second @ (a * b) for a, b in combinations(v, 2)]
        assert len(pairs) == FIELDS * (FIELDS - 1) / 2
        h = torch.cat(v)
        for linear in model.mlp.linears:
            h = torch.relu(linear(h))
        expected.append(model.first(torch.cat(v)) + sum(pairs) + model.last(h))
    torch.testing.assert_close(model(batch), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_the_second_order_starts_as_the_sum_of_inner_products():
    model, batch = build("deepfm"), mixed(30)
    for layer in (model.first, model.last):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    expected = [sum(a @ b for a, b in combinations(fields, 2)) for fields in model.fields(batch)]
    torch.testing.assert_close(model(batch)[:, 0], torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_fields_are_cut_as_groups_are_joined():
    """Features first and then numerics, each in schema order, also where groups take turns in the schema."""
    tables = (Table(name="wide", rows=9, width=8), Table(name="narrow", rows=9, width=4))
    features = (
        Feature(name="user", table="wide", group="a"),
        Feature(name="item", table="narrow", group="b"),
        Feature(name="genre", table="narrow", group="a"),
    )
    numerics = (Numeric(name="age", group="b"), Numeric(name="hour", group="a"), Numeric(name="year", group="b"))
    mixed_up = schema().model_copy(update={"tables": tables, "features": features, "numerics": numerics})
    model = config("deepfm").build(mixed_up)
    widths = mixed_up.group_widths()
    assert {group: sum(fields) for group, fields in model.field_widths.items()} == widths == {"a": 13, "b": 6}
    groups = {group: torch.randn(6, width) for group, width in widths.items()}
    found = model.fields(Inputs(groups, torch.arange(6), torch.arange(6)))
    a, b = groups["a"], groups["b"]
    parts = [a[:, :8], a[:, 8:12], a[:, 12:], b[:, :4], b[:, 4:5], b[:, 5:]]
    expected = [lift(part) for lift, part in zip(model.lifts, parts, strict=True)]
    assert torch.equal(found, torch.stack([*expected, model.scenario.weight[:6]], dim=1))


def test_fields_of_one_width_are_taken_as_they_are():
    narrow = schema().model_copy(
        update={"tables": tuple(Table(name=name, rows=9, width=8) for name in ("user", "item")), "numerics": ()}
    )
    model = config("deepfm").build(narrow)
    assert not list(model.lifts.parameters())
    groups = {group: torch.randn(6, 8) for group in ("user", "item")}
    fields = model.fields(Inputs(groups, torch.arange(6), torch.arange(6)))
    assert torch.equal(fields[:, :2], torch.stack(list(groups.values()), dim=1))
