"""Finds out that a run hangs, and because of which rank; ends it, so that its launcher can start it again.

Every rank has a thread that looks at the rank's own progress, and leaves a file that says how far it is. A rank that
has seen no progress for too long writes down the stacks of its threads, compares the files of all ranks, and leaves.
"""

import faulthandler
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field

from msr_dist.config import Config
from msr_dist.distributed import World
from msr_dist.files import whole, write_whole
from msr_dist.progress import Position, position
from msr_dist.stopping import LAST_WORDS

log = logging.getLogger(__name__)

HEARTBEATS, STACKS = "heartbeats", "stacks"


class WatchConfig(Config):
    """When a run counts as hung."""

    stalled_after: float = Field(default=900.0, gt=0, le=1500)
    """Seconds in which no step, of training or evaluation, is done: the ranks that are behind are named, and the run
    ends, to be started again where its launcher has restarts left. More than saving a checkpoint takes, and less than
    the half hour after which torch itself gives up, without a name."""


@contextmanager
def watching(config: WatchConfig, folder: Path, world: World) -> Iterator[None]:
    """Watch this process, as long as the context lasts."""
    for name in (HEARTBEATS, STACKS):
        (folder / name).mkdir(exist_ok=True)
    ended = threading.Event()
    watch = _Watch(config.stalled_after, folder, world, ended)
    threading.Thread(target=watch.run, daemon=True, name="watch").start()
    try:
        yield
    finally:
        ended.set()


class _Watch:
    def __init__(self, stalled_after: float, folder: Path, world: World, ended: threading.Event) -> None:
        self._stalled_after, self._folder, self._world, self._ended = stalled_after, folder, world, ended
        self._every = min(30.0, stalled_after / 10)
        self._beats = 0
        self._seen, self._since = position(), time.monotonic()

    def run(self) -> None:
        """Look now and then, until the end."""
        told = False
        while True:
            try:
                self._look()
            except (OSError, ValueError) as error:
                # A network file system may fail for a moment; what it is to find out may come later.
                if not told:
                    log.warning("rank %d: the watch for hung ranks could not look: %s", self._world.rank, error)
                told = True
            if self._ended.wait(self._every):
                return

    def _look(self) -> None:
        self._beat()
        if (newest := position()) != self._seen:
            self._seen, self._since = newest, time.monotonic()
        elif time.monotonic() - self._since > self._stalled_after:
            self._leave_if_hung()

    def _leave_if_hung(self) -> None:
        stacks = self._folder / STACKS / f"rank-{self._world.rank}.txt"
        with open(stacks, "w") as opened:
            faulthandler.dump_traceback(opened, all_threads=True)
        before = self._read()
        # Clocks of machines differ: a rank that lives is one that writes.
        for _ in range(3):
            if self._ended.wait(self._every):
                return
            self._beat()
        if position() != self._seen:
            return
        after = self._read()
        silent = [rank for rank in range(self._world.world_size) if after.get(rank) == before.get(rank)]
        words = (
            f"nothing was done in {time.monotonic() - self._since:.0f} s (watch.stalled_after): "
            f"{_blame(after, silent, self._world.world_size)}; stacks of the ranks that live are in {stacks.parent}"
        )
        log.error("rank %d: %s", self._world.rank, words)
        with whole(self._folder / LAST_WORDS) as file:
            file.write(words.encode())
        # The main thread waits in native code for ranks that never come: nothing else would end it.
        os._exit(1)

    def _beat(self) -> None:
        self._beats += 1
        now = position()
        beat = {"at": now.what, "done": now.done, "beat": self._beats, "host": socket.gethostname(), "pid": os.getpid()}
        write_whole(self._folder / HEARTBEATS / f"rank-{self._world.rank}.json", json.dumps(beat))

    def _read(self) -> dict[int, dict[str, object]]:
        found = {}
        for rank in range(self._world.world_size):
            file = self._folder / HEARTBEATS / f"rank-{rank}.json"
            if file.exists():
                found[rank] = json.loads(file.read_text())
        return found


def _blame(beats: dict[int, dict[str, object]], silent: list[int], world_size: int) -> str:
    def places(ranks: list[int]) -> str:
        told = [(rank, beats[rank]) if rank in beats else (rank, None) for rank in ranks]
        return ", ".join(
            f"rank {rank} ({beat['at']} {beat['done']}, process {beat['pid']} on {beat['host']})"
            if beat
            else f"rank {rank}"
            for rank, beat in told
        )

    if silent:
        return f"no sign of life from {places(silent)}"
    at = {rank: Position(str(beat["at"]), int(str(beat["done"]))) for rank, beat in beats.items()}
    if len({place.what for place in at.values()}) > 1:
        # Which of two works comes first, counts do not say.
        return f"ranks are at different works: {places(sorted(at))}"
    least = min(place.done for place in at.values())
    behind = [rank for rank, place in at.items() if place.done == least]
    if len(set(at.values())) > 1 and len(behind) < world_size:
        return f"the others wait for {places(behind)}"
    return f"no rank gets beyond {places([0])}"
