"""Small canonical data for two towers: users and items that scenarios share, and everything that rows can be."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import canonical
from msr_dist.schema import Feature, FeatureSchema, Label, Numeric, Scenario, Table

USERS, ITEMS, TAGS, HOURS = 40, 48, 8, 5
NEVER_ITEM = ITEMS - 1
"""An item that training has in lists alone; held-out rows choose it."""
TAUGHT = 4
"""Scenarios with training rows; held-out splits have one more."""


def schema() -> FeatureSchema:
    names = ("home", "search", "feed", "tiny", "abroad")
    return FeatureSchema(
        user="user",
        item="item",
        time="time",
        labels=(Label(name="click", weight="watch"), Label(name="buy", mask="buy_known")),
        scenarios=tuple(Scenario(id=i, name=name, rows=int(i < TAUGHT)) for i, name in enumerate(names)),
        tables=(
            Table(name="users", rows=USERS, width=8),
            Table(name="items", rows=ITEMS, width=8),
            Table(name="tags", rows=TAGS, width=4),
            Table(name="hours", rows=HOURS, width=4),
        ),
        features=(
            Feature(name="user", table="users", group="user"),
            Feature(name="history", table="items", group="user", pooling="mean"),
            Feature(name="likes", table="tags", group="user", pooling="sum"),
            Feature(name="item", table="items", group="item"),
            Feature(name="place", table="tags", group="item"),
            Feature(name="hour", table="hours", group="context"),
        ),
        numerics=(
            Numeric(name="age", group="user"),
            Numeric(name="price", group="item"),
            Numeric(name="battery", group="context"),
        ),
    )


def table(rows: int, seed: int, begin: int, scenarios: int) -> pa.Table:
    """Rows from `begin` on, out of order, some at one time. The last scenario of training has few of them.

    A third of the items, and a fifth of the users, are in one scenario alone; some of both are unknown.
    """
    rng = np.random.default_rng(seed)
    shares = np.array([4, 3, 2, 0.7, 1.5])[:scenarios]
    scenario = rng.choice(scenarios, rows, p=shares / shares.sum())
    user, item = rng.integers(1, USERS, rows), rng.integers(1, NEVER_ITEM, rows)
    user = np.where((user % 5 == 0) & (user // 5 % TAUGHT != scenario), user - 1, user)
    item = np.where((item % 3 == 0) & (item // 3 % TAUGHT != scenario), item + 1, item)
    item = np.minimum(item, NEVER_ITEM - 1)
    if begin:
        item[rng.random(rows) < 0.05] = NEVER_ITEM
    user[rng.random(rows) < 0.04] = 0
    item[rng.random(rows) < 0.04] = 0
    fits = np.where(user % 4 == item % 4, 0.8, 0.25)
    click = (rng.random(rows) < fits).astype(np.uint8)
    columns: dict[str, Any] = {
        "time": begin + rng.integers(0, rows // 3, rows),
        "user": user,
        "history": [rng.integers(1, ITEMS, n).tolist() for n in rng.integers(0, 4, rows)],
        "likes": [rng.integers(1, TAGS, n).tolist() for n in rng.integers(0, 3, rows)],
        "age": rng.normal(size=rows).astype(np.float32),
        "item": item,
        "place": rng.integers(0, TAGS, rows),
        "price": rng.normal(size=rows).astype(np.float32),
        "hour": rng.integers(0, HOURS, rows),
        "battery": rng.normal(size=rows).astype(np.float32),
        "scenario": scenario.astype(np.int32),
        "click": click,
        "watch": (1 + rng.random(rows)).astype(np.float32),
        "buy": (click * (rng.random(rows) < 0.5)).astype(np.uint8),
        "buy_known": rng.random(rows) < 0.7,
    }
    lists = {name: pa.array(columns[name], pa.list_(pa.int64())) for name in ("history", "likes")}
    return pa.table(columns | lists)


def write(folder: Path, rows: int = 800, groups: int = 12) -> Path:
    """A whole data set: train, and a third of it for valid and test each, with one scenario more."""
    folder.mkdir(parents=True, exist_ok=True)
    schema().save(folder)
    for place, (split, count) in enumerate({"train": rows, "valid": rows // 3, "test": rows // 3}.items()):
        whole = table(count, place, place * 10_000, TAUGHT + (place > 0))
        canonical.write_split(folder / split, whole, canonical.uneven(count, groups, place))
    return folder


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder's files, in their order."""
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
