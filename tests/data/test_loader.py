import numpy as np
import pytest
import torch

import canonical
from msr_dist.data.loader import PADDING, Loader, LoaderConfig
from msr_dist.data.order import Order
from msr_dist.data.parquet import ParquetSource

ROWS = 1500


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return canonical.write(tmp_path_factory.mktemp("data"), rows=ROWS)


class Recording(ParquetSource):
    """Remembers which row groups were read."""

    def __init__(self, folder, schema):
        super().__init__(folder, schema)
        self.groups: list[int] = []

    def read(self, group):
        self.groups.append(group)
        return super().read(group)


def loader(folder, rank=0, world_size=1, source=None, **config) -> Loader:
    source = source or ParquetSource(folder / "train", canonical.schema())
    order = Order(tuple(g.rows for g in source.row_groups), num_partitions=6, batch_size=100, seed=1, window_rows=600)
    return Loader(source, canonical.schema(), order, rank, world_size, LoaderConfig(**config))


def contents(batches) -> list[tuple]:
    """Every real row as a tuple of all its values, in the order of the batches."""
    rows = []
    for batch in batches:
        ids = batch.ids.to_dict()
        lists = {key: torch.split(ids[key].values(), ids[key].lengths().tolist()) for key in ids}
        rows += [
            (
                *(tuple(lists[key][place].tolist()) for key in ("user", "history", "item", "tags")),
                *batch.numeric[place].tolist(),
                int(batch.scenario[place]),
                *batch.labels[place].tolist(),
                *batch.weights[place].tolist(),
            )
            for place in range(len(batch.row))
            if batch.row[place] != PADDING
        ]
    return rows


def expected() -> list[tuple]:
    rows = canonical.table(ROWS, seed=0).to_pylist()
    return [
        (
            (row["user"],), tuple(row["history"]), (row["item"],), tuple(row["tags"]), row["price"], row["scenario"],
            float(row["click"]), float(row["buy"]), 1.0, row["buy_weight"] * row["buy_known"],
        )
        for row in rows
    ]  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_row_of_an_epoch_once_through_an_interruption(folder, world_size):
    steps = loader(folder).order.steps
    rows = []
    for rank in range(world_size):
        first = loader(folder, rank, world_size).batches(0, steps)
        rows += contents(next(first) for _ in range(5))
        first.close()
    for rank in range(3):  # goes on at another world size
        rows += contents(loader(folder, rank, 3).batches(5, steps))
    assert sorted(rows) == sorted(expected())
    assert rows != expected()


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_global_batch_does_not_depend_on_the_world_size(folder, world_size):
    whole = list(loader(folder).batches(0, 20))
    parts = [list(loader(folder, rank, world_size).batches(0, 20)) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        mine = sorted(contents([batch]))
        assert mine == sorted(contents(part[step] for part in parts))
        rows = torch.cat([part[step].row for part in parts])
        assert sorted(rows.tolist()) == sorted(batch.row.tolist())


def test_ranks_read_different_row_groups(folder):
    groups = []
    for rank in range(3):
        source = Recording(folder / "train", canonical.schema())
        list(loader(folder, rank, 3, source).batches(0, 15))
        assert len(source.groups) == len(set(source.groups))
        groups += source.groups
    assert sorted(groups) == list(range(30))


def test_batches_are_equally_large_on_all_ranks(folder):
    parts = [list(loader(folder, rank, 3).batches(0, 15)) for rank in range(3)]
    for step in range(15):
        assert len({len(part[step].row) for part in parts}) == 1
        real = sum(int((part[step].row != PADDING).sum()) for part in parts)
        assert parts[0][step].rows_per_rank * 3 == pytest.approx(real)
    padding = [batch.weights[batch.row == PADDING] for part in parts for batch in part]
    assert sum(len(weights) for weights in padding) > 0
    assert all(not weights.any() for weights in padding)


def test_epochs_come_in_other_orders(folder):
    subject = loader(folder)
    steps = subject.order.steps
    first, second = (contents(subject.batches(epoch * steps, (epoch + 1) * steps)) for epoch in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


def test_threads_and_prefetch_change_nothing(folder):
    slow = contents(loader(folder, threads=1, prefetch=1).batches(0, 30))
    assert slow == contents(loader(folder, threads=4, prefetch=8).batches(0, 30))


def test_a_world_size_that_does_not_divide_the_partitions(folder):
    with pytest.raises(ValueError, match=r"world size 4 does not divide 6 partitions: set loader\.partitions"):
        loader(folder, 0, 4)


def test_an_error_of_the_source_reaches_the_caller(folder):
    class Failing(ParquetSource):
        def read(self, group):
            raise ValueError(f"row group {group} is bad")

    source = Failing(folder / "train", canonical.schema())
    with pytest.raises(ValueError, match="is bad"):
        next(loader(folder, source=source).batches(0, 3))


def test_a_single_partition_keeps_the_order_of_the_files(folder):
    source = ParquetSource(folder / "train", canonical.schema())
    order = Order(tuple(g.rows for g in source.row_groups), num_partitions=1, batch_size=64, window_rows=None)
    batches = Loader(source, canonical.schema(), order, 0, 1, LoaderConfig()).batches(0, order.steps)
    assert contents(batches) == expected()


def test_labels_and_weights_have_the_schemas_types(folder):
    batch = next(loader(folder).batches(0, 1))
    assert batch.labels.dtype == batch.weights.dtype == batch.numeric.dtype == torch.float32
    assert batch.scenario.dtype == batch.row.dtype == torch.int64
    assert batch.ids.lengths().dtype == torch.int64
    assert np.isin(batch.labels.numpy(), [0, 1]).all()


def test_ids_of_tables_with_vectors_for_each_scenario(folder):
    plain = canonical.schema()
    items = plain.table("items").model_copy(update={"per_scenario": True})
    own = plain.with_tables({"items": items})
    source = ParquetSource(folder / "train", own)
    order = loader(folder).order
    batch = next(Loader(source, own, order, 0, 1, LoaderConfig()).batches(0, 1))
    before = next(loader(folder).batches(0, 1))
    for name in ("user", "tags"):
        assert torch.equal(batch.ids[name].values(), before.ids[name].values())
    for name in ("item", "history"):
        of_row = torch.repeat_interleave(batch.scenario, batch.ids[name].lengths())
        assert torch.equal(batch.ids[name].values(), before.ids[name].values() * 3 + of_row)
        assert torch.equal(batch.ids[name].lengths(), before.ids[name].lengths())


# Rows that belong together


def pairs_folder(folder):
    """Row groups of even sizes, and the number of a row in its price."""
    sizes = [2 * size for size in canonical.uneven(ROWS // 2, 30)]
    table = canonical.table(ROWS)
    table = table.set_column(table.column_names.index("price"), "price", [np.arange(ROWS, dtype=np.float32)])
    canonical.write_split(folder / "train", table, sizes)
    return folder


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    return pairs_folder(tmp_path_factory.mktemp("pairs"))


def pair_loader(folder, rank=0, world_size=1, batch_size=50) -> Loader:
    source = ParquetSource(folder / "train", canonical.schema())
    order = Order(tuple(g.rows // 2 for g in source.row_groups), 6, batch_size, seed=1, window_rows=300)
    return Loader(source, canonical.schema(), order, rank, world_size, LoaderConfig(), together=2)


def pairs_in(batch) -> list[int]:
    """The pairs of a batch, by their number in the files; every row is next to its partner, in their order."""
    real = batch.row != PADDING
    assert torch.equal(real[0::2], real[1::2])
    assert not batch.weights[~real].any()
    rows, places = batch.numeric[real, 0].long(), batch.row[real]
    assert torch.equal(rows[0::2] % 2, torch.zeros(len(rows) // 2, dtype=torch.int64))
    assert torch.equal(rows[0::2] + 1, rows[1::2])
    assert torch.equal(places[0::2] + 1, places[1::2])
    return (rows[0::2] // 2).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_pair_of_an_epoch_once_through_an_interruption(paired, world_size):
    steps = pair_loader(paired).order.steps
    assert steps == ROWS // 2 // 50
    found, numbers = [], []
    for rank in range(world_size):
        batches = pair_loader(paired, rank, world_size).batches(steps, steps + 5)
        found += [pair for batch in batches for pair in pairs_in(batch)]
    for rank in range(3):
        for batch in pair_loader(paired, rank, 3).batches(steps + 5, 2 * steps):
            found += pairs_in(batch)
            numbers += batch.row[batch.row != PADDING].tolist()
    assert sorted(found) == list(range(ROWS // 2))
    assert found != sorted(found)
    assert len(set(numbers)) == len(numbers)


def test_the_global_batch_of_pairs_does_not_depend_on_the_world_size(paired):
    whole = list(pair_loader(paired).batches(0, 20))
    parts = [list(pair_loader(paired, rank, 2).batches(0, 20)) for rank in range(2)]
    padded = 0
    for step, batch in enumerate(whole):
        assert sorted(pairs_in(batch)) == sorted(pairs_in(parts[0][step]) + pairs_in(parts[1][step]))
        rows = torch.cat([part[step].row for part in parts])
        assert sorted(rows.tolist()) == sorted(batch.row.tolist())
        assert len(parts[0][step].row) == len(parts[1][step].row)
        padded += int((batch.row == PADDING).sum())
    assert padded > 0
    # Pairs keep all of their rows' values.
    rows = canonical.table(ROWS).to_pylist()
    found = contents(whole[:1])
    for values, number in zip(found, whole[0].numeric[whole[0].row != PADDING, 0].long().tolist(), strict=True):
        row = rows[number]
        assert values[:4] == ((row["user"],), tuple(row["history"]), (row["item"],), tuple(row["tags"]))


def test_pairs_go_on_from_any_step(paired):
    whole = list(pair_loader(paired).batches(0, 20))
    for first in (1, 7, 15, 16):
        rest = list(pair_loader(paired).batches(first, 20))
        for batch, expected in zip(rest, whole[first:], strict=True):
            assert torch.equal(batch.row, expected.row)
            assert torch.equal(batch.numeric, expected.numeric)
            assert torch.equal(batch.ids.values(), expected.ids.values())
