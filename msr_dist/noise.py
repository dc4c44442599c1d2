"""Random numbers as pure functions of integer coordinates, so that they do not depend on who draws them, or when.

A generator's stream depends on how many numbers were drawn before, hence on the world size and on restarts. Here the
number at (seed, row, column) is a hash of these: splitmix64 (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom
number generators"), applied to their combination.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def uniform(seed: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Numbers in [0, 1), fp32: entry (i, j) depends on `seed`, `rows[i]` and `columns[j]` alone.

    Args:
        seed: any integer that fits in 63 bits.
        rows: `[R]` int64.
        columns: `[C]` int64.

    Returns:
        `[R, C]`.
    """
    by_row = _hash(rows + _hash(torch.full_like(rows[:1], seed)))
    # The upper 24 bits are all that fp32 can tell apart in [0, 1).
    return (_hash(by_row[:, None] + columns) >> 40 & 0xFFFFFF).float().mul_(2.0**-24)


def _hash(x: Tensor) -> Tensor:
    x = (x + 1) * _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's own keeps the sign of an int64."""
    return x >> bits & ((1 << (64 - bits)) - 1)
