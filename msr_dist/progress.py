"""Progress of long work: a bar on a terminal, plain lines in a log."""

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tqdm import tqdm

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class Position:
    """How far a process is."""

    what: str
    """The work, and what it is counted in."""
    done: int


_newest = Position("beginning", 0)


def position() -> Position:
    """What this process has last counted, in any work."""
    return _newest


class Progress:
    """Counts towards `total`; silent unless `shown`, which is for rank 0."""

    def __init__(self, what: str, total: int, done: int = 0, unit: str = "step", shown: bool = True) -> None:
        self._what, self._total, self._done, self._unit, self._shown = what, total, done, unit, shown
        self._begun = self._last = time.monotonic()
        self._first = done
        on_terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=what, unit=unit) if on_terminal else None
        self._count()

    def advance(self, count: int = 1, values: Mapping[str, str] = MappingProxyType({})) -> None:
        """`count` more are done; `values` are shown beside the position."""
        self._done += count
        self._count()
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(count)
        elif self._shown and (self._done >= self._total or time.monotonic() - self._last > _SECONDS_BETWEEN_LINES):
            self._last = time.monotonic()
            log.info("%s", self._line(values))

    def close(self) -> None:
        """End the bar's line."""
        if self._bar is not None:
            self._bar.close()

    def _count(self) -> None:
        global _newest
        _newest = Position(f"{self._what}: {self._unit}", self._done)

    def _line(self, values: Mapping[str, str]) -> str:
        spent = time.monotonic() - self._begun
        left = spent / max(1, self._done - self._first) * (self._total - self._done)
        shown = "".join(f", {name} {value}" for name, value in values.items())
        percent = 100 * self._done // max(1, self._total)
        return f"{self._what}: {self._unit} {self._done}/{self._total} ({percent}%){shown}, {left:.0f} s left"
