from itertools import pairwise

import numpy as np
import pytest

import canonical
from msr_dist.data.order import Order


def order(**changes) -> Order:
    settings = {"group_rows": tuple(canonical.uneven(5000, 40)), "num_partitions": 6, "batch_size": 200, "seed": 3}
    return Order(**settings | {"window_rows": 1200} | changes)


def sequence(which: Order, partition: int, epoch: int) -> list[tuple[int, int]]:
    """(row group, row) of a partition's whole sequence."""
    rows: list[tuple[int, int]] = []
    for number, groups in enumerate(which.windows(partition, epoch)):
        window = [(group, row) for group in groups for row in range(which.group_rows[group])]
        permutation = which.permutation(partition, epoch, number, len(window))
        rows += window if permutation is None else [window[place] for place in permutation]
    return rows


def test_an_epoch_holds_every_row_once():
    subject = order()
    rows = [row for p in range(6) for row in sequence(subject, p, epoch=0)]
    assert len(rows) == len(set(rows)) == 5000


def rows_of(subject: Order, step: int) -> int:
    return sum(stop - start for start, stop in subject.shares(step))


def test_the_steps_of_an_epoch_use_up_every_partition():
    subject = order()
    for partition in range(6):
        shares = [subject.shares(step)[partition] for step in range(subject.steps)]
        assert shares[0][0] == 0
        assert shares[-1][1] == subject.partition_rows[partition]
        assert all(before[1] == after[0] for before, after in pairwise(shares))
    sizes = [rows_of(subject, step) for step in range(subject.steps)]
    assert sum(sizes) == 5000
    assert max(sizes) - min(sizes) <= 6


@pytest.mark.parametrize("partition", range(6))
def test_steps_end_where_their_shares_do(partition):
    subject = order()
    stops = [int(subject.shares(step)[partition, 1]) for step in range(subject.steps)]
    for place in (0, 1, stops[0] - 1, stops[0], stops[7] + 1, stops[-1]):
        for step in (0, 7, subject.steps):
            assert subject.ends(partition, step, place).tolist() == [stop for stop in stops[step:] if stop <= place]


def test_epochs_and_seeds_differ_and_repeat():
    assert sequence(order(), 0, 0) == sequence(order(), 0, 0)
    assert sequence(order(), 0, 0) != sequence(order(), 0, 1)
    assert sequence(order(), 0, 0) != sequence(order(seed=4), 0, 0)


def test_rows_are_shuffled_within_windows_of_several_groups():
    rows = sequence(order(window_rows=6000), 0, 0)
    groups = [group for group, _ in rows]
    changes = sum(a != b for a, b in pairwise(groups))
    assert changes > len(set(groups)) * 5


def test_no_window_keeps_the_order_of_the_files():
    rows = sequence(order(window_rows=None), 2, 0)
    assert rows == sorted(rows)


def test_partitions_are_nearly_equal():
    rows = order().partition_rows
    assert max(rows) - min(rows) < max(order().group_rows)


def test_row_numbers_are_distinct_over_epochs():
    subject = order()
    numbers = np.concatenate(
        [subject.first_row(p, epoch) + np.arange(subject.partition_rows[p]) for epoch in range(3) for p in range(6)]
    )
    assert len(np.unique(numbers)) == 15000


def test_samples_count_rows_before_a_step():
    subject = order()
    assert subject.samples(0) == 0
    assert subject.samples(subject.steps) == 5000
    assert subject.samples(subject.steps + 2) == 5000 + rows_of(subject, 0) + rows_of(subject, 1)


def test_too_few_row_groups():
    with pytest.raises(ValueError, match="4 row groups cannot feed 6 partitions"):
        order(group_rows=(10, 10, 10, 10))


def test_a_batch_smaller_than_the_partitions():
    with pytest.raises(ValueError, match="raise batch_size or have fewer partitions"):
        order(batch_size=3)
