"""What this machine has, or the container that this process is in."""

from contextlib import suppress
from pathlib import Path

import psutil

_CONTAINER = Path("/sys/fs/cgroup")


def main_memory(container: Path = _CONTAINER) -> int:
    """Bytes of main memory, used or not."""
    whole: int = psutil.virtual_memory().total
    # A limit that is not set is not a number.
    with suppress(OSError, ValueError):
        whole = min(whole, int((container / "memory.max").read_text()))
    return whole


def free_memory(container: Path = _CONTAINER) -> int:
    """Bytes of main memory that may still be taken; what caches files counts as free."""
    free: int = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        limit, used = (int((container / name).read_text()) for name in ("memory.max", "memory.current"))
        kinds = dict(line.split() for line in (container / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(kinds["file"]))
    return free
