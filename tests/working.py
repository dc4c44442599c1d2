"""Workers that tests hand pieces to; a factory is a dataclass, made here and called in the worker's process."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    # The signal is on its way; nothing may happen before it is there.
    time.sleep(60)


@dataclass(frozen=True)
class Squares:
    """Squares a piece, and leaves in `folder` that its process was started, and what it has been called with."""

    folder: Path

    def __call__(self) -> Callable[[int], int]:
        (self.folder / f"made-{os.getpid()}").write_text(os.environ["OMP_NUM_THREADS"])
        return self.answer

    def answer(self, piece: int) -> int:
        with open(self.folder / "calls", "a") as file:
            file.write(f"{piece}\n")
        return piece**2


@dataclass(frozen=True)
class DiesAt(Squares):
    """Dies `times` times when it is called with `deadly`."""

    deadly: int
    times: int

    def answer(self, piece: int) -> int:
        result = super().answer(piece)
        calls = (self.folder / "calls").read_text().split()
        if piece == self.deadly and calls.count(str(piece)) <= self.times:
            die()
        return result


@dataclass(frozen=True)
class FailsAt(DiesAt):
    """The same with an exception that is nobody's input."""

    def answer(self, piece: int) -> int:
        result = Squares.answer(self, piece)
        calls = (self.folder / "calls").read_text().split()
        if piece == self.deadly and calls.count(str(piece)) <= self.times:
            raise KeyError(f"a fault\nof ours in {piece}")
        return result


@dataclass(frozen=True)
class RefusesAt(Squares):
    """Finds something wrong with what the user gave."""

    wrong: int

    def answer(self, piece: int) -> int:
        result = super().answer(piece)
        if piece == self.wrong:
            raise ValueError(f"part {piece}: column 'id' is absent; prepare the data again")
        return result


@dataclass(frozen=True)
class NeverMade(Squares):
    def __call__(self) -> Callable[[int], int]:
        super().__call__()
        die()
        raise AssertionError


@dataclass(frozen=True)
class MadeOnce(Squares):
    """The first that is made lives; every other dies before."""

    def __call__(self) -> Callable[[int], int]:
        answer = super().__call__()
        try:
            (self.folder / "first").touch(exist_ok=False)
        except FileExistsError:
            die()
        return answer


class Hog:
    """An actor that takes room in a cluster."""

    def here(self) -> None:
        """Answers once it has it."""


@dataclass(frozen=True)
class RefusesToBeMade(Squares):
    def __call__(self) -> Callable[[int], int]:
        raise ValueError("model.name: no such folder")


@dataclass(frozen=True)
class Sleeper(Squares):
    """Takes much longer than any test waits."""

    def answer(self, piece: int) -> int:
        super().answer(piece)
        time.sleep(600)
        return piece
