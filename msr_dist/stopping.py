"""A wish that the run stop: by a signal, or by its launcher. Training saves after the step that it is in, and leaves.

Knows nothing heavy: launchers ask before torch is loaded.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 75
"""Exit status of a command that was stopped and may go on: EX_TEMPFAIL of sysexits.h."""

LAST_WORDS = "last-words.txt"
"""What a process that ended itself has left in the run's folder: why, in one line."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# No Event: its lock, taken by a signal's handler while another handler has it, would be waited for for ever.
_asked = False


class Stopped(BaseException):
    """The run was asked to stop, and has: no failure, hence no Exception, that anything would try again."""


def ask() -> None:
    """Have this process's run stop."""
    global _asked
    _asked = True


def asked() -> bool:
    """Whether it shall."""
    return _asked


@contextmanager
def on_signals(alone: bool, then: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Take SIGTERM and SIGINT for the wish, as long as the context lasts; in a main thread, others get none.

    `then` is called at each. Where the process is `alone`, a second signal does what it always does; a rank may get
    several for one wish: of its terminal, its job, and its launcher.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def take(number: int, _frame: FrameType | None) -> None:
        ask()
        then()
        if alone:
            signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, take) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = False
