"""Small canonical data, written without `msr-dist prepare`: uneven files and row groups, all kinds of columns."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from msr_dist.schema import Feature, FeatureSchema, Label, Numeric, Scenario, Table

USERS, ITEMS, TAGS = 60, 40, 12


def schema(scenarios: int = 3) -> FeatureSchema:
    return FeatureSchema(
        user="user",
        item="item",
        labels=(Label(name="click"), Label(name="buy", mask="buy_known", weight="buy_weight")),
        scenarios=tuple(Scenario(id=i, name=f"scenario {i}") for i in range(scenarios)),
        tables=(
            Table(name="users", rows=USERS, width=8),
            Table(name="items", rows=ITEMS, width=8),
            Table(name="tags", rows=TAGS, width=4),
        ),
        features=(
            Feature(name="user", table="users", group="user"),
            Feature(name="history", table="items", group="user", pooling="mean"),
            Feature(name="item", table="items", group="item"),
            Feature(name="tags", table="tags", group="item", pooling="sum"),
        ),
        numerics=(Numeric(name="price", group="item"),),
    )


def table(rows: int, seed: int = 0, scenarios: int = 3) -> pa.Table:
    rng = np.random.default_rng(seed)
    user, item = rng.integers(1, USERS, rows), rng.integers(1, ITEMS, rows)
    scenario = rng.integers(0, scenarios, rows)
    logit = (user % 7 - 3) * 0.5 + (item % 5 - 2) * 0.5 + (scenario - 1) * ((item % 3) - 1)
    click = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.uint8)
    return pa.table(
        {
            "user": user,
            "history": [rng.integers(1, ITEMS, n).tolist() for n in rng.integers(0, 5, rows)],
            "item": item,
            "tags": [rng.integers(1, TAGS, n).tolist() for n in rng.integers(1, 4, rows)],
            "price": rng.normal(size=rows).astype(np.float32),
            "scenario": scenario.astype(np.int32),
            "click": click,
            "buy": (click * (rng.random(rows) < 0.3)).astype(np.uint8),
            "buy_known": click.astype(bool),
            "buy_weight": (1 + rng.random(rows)).astype(np.float32),
        },
        schema=pa.schema(
            [
                ("user", pa.int64()),
                ("history", pa.list_(pa.int64())),
                ("item", pa.int64()),
                ("tags", pa.list_(pa.int64())),
                ("price", pa.float32()),
                ("scenario", pa.int32()),
                ("click", pa.uint8()),
                ("buy", pa.uint8()),
                ("buy_known", pa.bool_()),
                ("buy_weight", pa.float32()),
            ]
        ),
    )


def write_split(folder: Path, whole: pa.Table, group_rows: list[int]) -> None:
    """`group_rows` are dealt to two files, the first of them short."""
    folder.mkdir(parents=True)
    cut = max(1, len(group_rows) // 5)
    start = 0
    for number, sizes in enumerate((group_rows[:cut], group_rows[cut:])):
        if sizes:
            with pq.ParquetWriter(folder / f"part-{number:05d}.parquet", whole.schema) as writer:
                for size in sizes:
                    writer.write_table(whole.slice(start, size), row_group_size=size)
                    start += size
    assert start == whole.num_rows


def uneven(rows: int, groups: int, seed: int = 0) -> list[int]:
    """Sizes of `groups` row groups that add up to `rows`, the largest about three times the smallest."""
    shares = np.random.default_rng(seed).uniform(1, 3, groups)
    bounds = np.round(np.cumsum(shares) / shares.sum() * rows).astype(int)
    return np.diff([0, *bounds]).tolist()


def write(folder: Path, rows: int = 1500, groups: int = 30, scenarios: int = 3) -> Path:
    """A whole data set: train, and a quarter of it for valid and test each."""
    folder.mkdir(parents=True, exist_ok=True)
    schema(scenarios).save(folder)
    for seed, (split, count) in enumerate({"train": rows, "valid": rows // 4, "test": rows // 4}.items()):
        write_split(folder / split, table(count, seed, scenarios), uneven(count, groups, seed))
    return folder
