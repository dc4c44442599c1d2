import pytest
import torch

from msr_dist.noise import uniform

MASK = (1 << 64) - 1


def splitmix64(x: int) -> int:
    """The reference (https://prng.di.unimi.it/splitmix64.c) in Python's own integers: output from the state x."""
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def test_depends_on_its_coordinates_alone():
    rows, columns = torch.arange(100) * 1000, torch.arange(40) * 3
    whole = uniform(5, rows, columns)
    assert whole.shape == (100, 40)
    assert whole.dtype == torch.float32
    some, few = torch.randperm(100)[:7], torch.randperm(40)[:5]
    assert torch.equal(uniform(5, rows[some], columns[few]), whole[some][:, few])


def test_is_uniform():
    x = uniform(5, torch.arange(1000), torch.arange(1000))
    assert x.min() >= 0
    assert x.max() < 1
    share = torch.histc(x, bins=100, min=0, max=1) / x.numel()
    torch.testing.assert_close(share, torch.full((100,), 0.01), atol=6e-4, rtol=0)


@pytest.mark.parametrize(
    "other",
    [
        lambda: uniform(6, torch.arange(1000), torch.arange(100)),
        lambda: uniform(5, torch.arange(1, 1001), torch.arange(100)),
        lambda: uniform(5, torch.arange(1000), torch.arange(1, 101)),
        lambda: uniform(5, torch.arange(1000) + 2**40, torch.arange(100)),
    ],
    ids=["seed", "row", "column", "far row"],
)
def test_neighbours_are_independent(other):
    x = uniform(5, torch.arange(1000), torch.arange(100))
    assert abs(torch.corrcoef(torch.stack([x.flatten(), other().flatten()]))[0, 1]) < 0.015


def test_seeds_differ_even_when_they_are_large():
    drawn = [uniform(seed, torch.arange(3), torch.arange(3)) for seed in (0, 1, 2**31, 2**32, 2**62, 2**63 - 1)]
    assert len(torch.stack(drawn).unique(dim=0)) == 6


def test_has_no_values_twice_beyond_chance():
    x = uniform(5, torch.arange(64), torch.arange(64)).flatten()
    assert len(x.unique()) > len(x) - 5


@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_draw(rows, columns):
    assert uniform(5, torch.arange(rows), torch.arange(columns)).shape == (rows, columns)


def test_stays_the_same_in_every_release():
    assert splitmix64(1234567) == 6457827717110365317
    rows, columns = [0, 3, 10**12], [0, 7]
    expected = [[_uniform(5, row, column) for column in columns] for row in rows]
    assert uniform(5, torch.tensor(rows), torch.tensor(columns)).tolist() == expected


def _uniform(seed: int, row: int, column: int) -> float:
    return (_hash(_hash(row + _hash(seed)) + column) >> 40) * 2**-24


def _hash(x: int) -> int:
    """The output after x + 1 steps from the state 0."""
    return splitmix64(x * 0x9E3779B97F4A7C15 & MASK)
