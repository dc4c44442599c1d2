"""Runs that one row, or a learning rate, breaks."""

import re

import numpy as np
import pyarrow.parquet as pq
import pytest

import canonical
import command
from msr_dist.config import load
from msr_dist.data.loader import PADDING, Loader, LoaderConfig
from msr_dist.data.order import Order
from msr_dist.data.parquet import ParquetSource
from msr_dist.guard import find
from msr_dist.run import RunConfig
from msr_dist.train import train


def poison(data, value: float) -> list[str]:
    """Write `value` as the price of two rows of scenario 1, one for each label: a model is wrong about one of them."""
    file = sorted((data / "train").glob("*.parquet"))[1]
    groups = pq.ParquetFile(file)
    tables = [groups.read_row_group(index) for index in range(groups.num_row_groups)]
    group = len(tables) // 2
    scenario, click = tables[group]["scenario"].to_numpy(), tables[group]["click"].to_numpy()
    rows = [int(np.flatnonzero((scenario == 1) & (click == label))[0]) for label in (0, 1)]
    price = tables[group]["price"].to_numpy().copy()
    price[rows] = value
    place = tables[group].column_names.index("price")
    tables[group] = tables[group].set_column(place, groups.schema_arrow.field("price"), [price])
    with pq.ParquetWriter(file, groups.schema_arrow) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=table.num_rows)
    return [f"{file}, row group {group}, row {row}" for row in rows]


def test_every_row_is_found_in_its_file(tmp_path):
    data = canonical.write(tmp_path, rows=900)
    source = ParquetSource(data / "train", canonical.schema())
    order = Order(tuple(group.rows for group in source.row_groups), 6, 120, seed=3, window_rows=400)
    loader = Loader(source, source.schema, order, 1, 2, LoaderConfig())
    for batch in loader.batches(order.steps - 2, order.steps + 3):
        for number, user, price in zip(
            batch.row.tolist(), batch.ids["user"].values(), batch.numeric[:, 0], strict=True
        ):
            if number != PADDING:
                place = find(order, number)
                rows = source.read(place.group)
                assert (rows["user"][place.row], rows["price"][place.row]) == (int(user), float(price))


# STAR normalises its inputs: what breaks there may be the variance that it remembers alone.
@pytest.mark.parametrize(
    ("value", "workers", "model"),
    [(3e38, 1, {"kind": "mlp", "widths": [32]}), (1e25, 2, {"kind": "star", "widths": [4]})],
)
def test_a_row_that_breaks_a_run_is_named(tmp_path, value, workers, model):
    data = canonical.write(tmp_path / "data", rows=3000)
    where = poison(data, value)
    config = command.write_config(
        tmp_path, data, checkpoint={"every_steps": 1, "keep": 30}, log_every=7, model=model, stages=[{"epochs": 2}]
    )
    done = command.call("train", config, "--workers", workers)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("msr-dist: ")]
    assert any(f"{row} (scenario 'scenario 1', loss " in line for row in where)
    assert f"price = {value:.4g})" in line
    assert re.match(r"msr-dist: stage train: (the loss is|\S+ holds NaN or infinity after) ", line)
    step = int(re.search(r"In step (\d+), ", line)[1])
    saved = sorted(int(path.name[-9:]) for path in (tmp_path / "runs/run/checkpoints").iterdir())
    assert saved == list(range(1, step))


def test_an_exploding_loss_ends_the_run_after_some_steps(tmp_path):
    data = canonical.write(tmp_path / "data", rows=3000)
    # Every loss is that large; the first is what is usual.
    config = command.write_config(tmp_path, data, guard={"explodes_at": 0.1}, checkpoint={"every_steps": 1})
    with pytest.raises(
        ValueError, match=r"^stage train: the loss is 1\.\d+ at step 11, after 1\.\d+ at step 2, and 1\.\d+ usually. In"
    ):
        train(load(RunConfig, config).claim_folder())
    assert [path.name[-3:] for path in (tmp_path / "runs/run/checkpoints").iterdir()] == ["001"]
    train(load(RunConfig, config, ["guard.explodes_at=0"]).claim_folder())
    assert max(command.losses(tmp_path / "runs/run")) == 50
