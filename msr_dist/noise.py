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
_BLOCK = 1 << 15  # entries of which a working copy stays in a core's cache: seven times as fast as all at once


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
    drawn = torch.empty((rows.numel(), columns.numel()), device=rows.device)
    # On other devices a block is a handful of kernel launches, and there is no cache to stay in.
    block = _BLOCK if rows.device.type == "cpu" else rows.numel() * columns.numel()
    step = max(1, block // max(1, columns.numel()))
    for start in range(0, rows.numel(), step):
        bits = _hash(by_row[start : start + step, None] + columns)
        # The upper 24 bits are all that fp32 can tell apart in [0, 1).
        drawn[start : start + step] = bits.bitwise_right_shift_(40).bitwise_and_(0xFFFFFF)
    return drawn.mul_(2.0**-24)


def _hash(x: Tensor) -> Tensor:
    """Splitmix64 of `x`, which it overwrites."""
    x.add_(1).mul_(_GOLDEN)
    scratch = torch.empty_like(x)
    for bits, factor in ((30, _MIX_1), (27, _MIX_2)):
        x.bitwise_xor_(_shift(x, bits, scratch)).mul_(factor)
    return x.bitwise_xor_(_shift(x, 31, scratch))


def _shift(x: Tensor, bits: int, scratch: Tensor) -> Tensor:
    """Logical shift to the right, into `scratch`: torch's own keeps the sign of an int64."""
    return torch.bitwise_right_shift(x, bits, out=scratch).bitwise_and_((1 << (64 - bits)) - 1)
