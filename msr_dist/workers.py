"""Hands pieces of work to workers: this process, other local ones, or Ray's actors. Says nothing about what they do.

    with Workers(make, "ray", count=2) as workers:
        for piece, result in workers.spread(range(100)):
            ...

`make` is called once in each worker's process, where a model is loaded, say; what it returns is called with one piece
after another. A worker that dies is replaced, and its piece handed out again. Pieces are claimed in the order in which
they are given, by workers that have been made: one that a cluster has no room for holds nothing up; results come as
they are done.

Imports neither torch nor ray before it must: thread settings have to stand in the environment when torch is loaded.
"""

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import Any, Generic, Literal, Protocol, Self, TypeVar

from msr_dist.launch import Launcher, LaunchError, connect, loaded, log_to_stderr, set_threads

log = logging.getLogger(__name__)

P = TypeVar("P")
R = TypeVar("R")
Device = Literal["auto", "cpu", "cuda"]

_SPAWN = multiprocessing.get_context("spawn")
_PATIENCE = 60.0
"""Seconds until people are told that a worker has not started."""


@dataclass(frozen=True)
class Lost:
    """The outcome of a piece that too many workers have died of, or failed at with something other than ValueError."""

    how: str
    """How the last of them ended, in one line."""


class Workers(Generic[P, R]):
    """Workers that live as long as the context; started when pieces want them, at most `count` at a time.

    One local worker is this process. On CPU each has one thread, so that a result does not depend on how many workers
    there are, and because one-thread workers do more together than one worker with their threads; OMP_NUM_THREADS in
    the environment says otherwise. With GPUs each has one of its own.

    Args:
        make: picklable; called without arguments in the worker's process.
        launcher: "local" processes of this machine, or actors on "ray".
        count: number of workers.
        device: "cpu" leaves GPUs alone, "cuda" wants one for each worker, "auto" takes them where there are any.
        retries: how often a piece is handed out again after a worker has died of it, and how often in a row another is
            started for a worker that died before it had been made.
    """

    def __init__(
        self, make: Callable[[], Callable[[P], R]], launcher: Launcher, count: int, device: Device, retries: int = 3
    ) -> None:
        environment = set_threads(os.cpu_count() or 1)
        self._retries = retries
        self._threads: Executor = ThreadPoolExecutor(count, thread_name_prefix="worker")
        self._open: Callable[[int], _Seat]
        if launcher == "ray":
            connect(count, environment)
            gpus = _ray_gpus(count, device)
            self._open = lambda _: _Actor(make, gpus)
        elif count == 1:
            self._threads = _ThisThread()
            self._open = lambda _: _Here(make)
        else:
            visible = _visible_gpus(count, device)
            self._open = lambda place: _Process(make, visible[place] if visible else None)
        self._seats: dict[int, _Seat] = {}
        self._making: dict[Future[None], int] = {}
        self._free: set[int] = set()
        self._places = list(range(count))
        self._unmade = Counter[int]()
        self._any_made = self._told = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # The threads end when what they wait for is gone.
        for seat in self._seats.values():
            seat.close()
        self._threads.shutdown()

    def spread(self, pieces: Iterable[P]) -> Iterator[tuple[P, R]]:
        """Yield each piece with its result.

        Raises:
            ValueError: what a worker raised; the user's to mend.
            LaunchError: a piece was lost, or no worker could be made.
        """
        for piece, result in self.attempt(pieces):
            if isinstance(result, Lost):
                raise LaunchError(f"{piece}: its worker was lost {self._retries + 1} times, at last so: {result.how}")
            yield piece, result

    def attempt(self, pieces: Iterable[P], retries: int | None = None) -> Iterator[tuple[P, R | Lost]]:
        """Like `spread`, but a piece that is lost has `Lost` for its result; `retries` in place of the usual number."""
        allowed = self._retries if retries is None else retries
        waiting, deaths = deque(pieces), Counter[P]()
        running: dict[Future[R], tuple[int, P]] = {}
        try:
            while waiting or running:
                self._hire(len(waiting) + len(running))
                while waiting and self._free:
                    place, piece = min(self._free), waiting.popleft()
                    self._free.remove(place)
                    running[self._threads.submit(self._seats[place].call, piece)] = place, piece
                for future in self._wait(running):
                    place, piece = running.pop(future)
                    try:
                        result = future.result()
                    except _WorkerLostError as lost:
                        self._seats.pop(place).close()
                        deaths[piece] += 1
                        if deaths[piece] > allowed:
                            yield piece, Lost(lost.how)
                        else:
                            log.warning("a worker was lost at %s (%s); handing it out again", piece, lost.how)
                            waiting.appendleft(piece)
                    else:
                        self._free.add(place)
                        yield piece, result
        finally:
            # Where the caller has had enough, or a piece was refused: nobody waits for the others' answers.
            for place, _ in running.values():
                self._seats.pop(place).close()

    def _hire(self, wanted: int) -> None:
        """Have workers started until there is one for each of `wanted` pieces, as far as there are places."""
        for place in self._places:
            if place not in self._seats and len(self._seats) < wanted:
                self._seats[place] = self._open(place)
                self._making[self._threads.submit(self._seats[place].prepare)] = place

    def _wait(self, running: Mapping[Future[R], object]) -> list[Future[R]]:
        """Those of `running` that are done, none where instead a worker has been made, or could not be."""
        patience = _PATIENCE if self._making and not self._told else None
        awaited: list[Future[Any]] = [*running, *self._making]
        done = wait(awaited, patience, FIRST_COMPLETED).done
        if not done:
            self._told = True
            what = "the others do their work" if running else "waiting; look at what else holds the machine or cluster"
            log.warning("%d workers have not started in %.0f s: %s", len(self._making), _PATIENCE, what)
        for future in [future for future in self._making if future in done]:
            self._settle(self._making.pop(future), future)
        return [future for future in running if future in done]

    def _settle(self, place: int, made: Future[None]) -> None:
        """Count a worker as free, or as lost before it had been made; a place where that goes on is given up."""
        try:
            made.result()
        except BaseException as error:
            self._seats.pop(place).close()
            if not isinstance(error, _WorkerLostError):
                raise
            self._unmade[place] += 1
            if self._unmade[place] > self._retries:
                log.warning("worker %d could not be started (%s); going on without it", place, error.how)
                self._places.remove(place)
            if not self._places or (not self._any_made and self._unmade.total() > self._retries):
                raise LaunchError(f"no worker could be started, in {self._unmade.total()} tries: {error.how}") from None
        else:
            self._unmade[place] = 0
            self._any_made = True
            self._free.add(place)


class _WorkerLostError(Exception):
    """A worker died, or raised something other than ValueError."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


class _Seat(Protocol):
    """A place for one worker."""

    def prepare(self) -> None:
        """Wait until the worker has been made; ValueError that this raised; _WorkerLostError."""

    def call(self, piece: Any) -> Any:
        """The worker's result; ValueError of the worker; _WorkerLostError."""

    def close(self) -> None:
        """End the worker at once; a call that waits for it ends with _WorkerLostError."""


@dataclass(frozen=True)
class _Answer:
    """What goes back from a worker's process: exceptions stay there, not all of them can travel."""

    result: Any = None
    refusal: str | None = None
    failure: str | None = None

    def open(self) -> Any:
        """The result, or the exception that stands for what happened."""
        if self.refusal is not None:
            raise ValueError(self.refusal)
        if self.failure is not None:
            raise _WorkerLostError(self.failure)
        return self.result


class _Served:
    """The worker, in the process where it lives."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._make = make
        self._worker: Callable[[Any], Any] | None = None

    def prepare(self) -> _Answer:
        """Make the worker."""
        return self._answer(self._prepare)

    def call(self, piece: Any) -> _Answer:
        """The worker's answer to `piece`."""
        assert self._worker is not None
        worker = self._worker
        return self._answer(lambda: worker(piece))

    def _prepare(self) -> None:
        loaded()
        self._worker = self._make()

    def _answer(self, function: Callable[[], Any]) -> _Answer:
        try:
            return _Answer(result=function())
        except ValueError as error:
            return _Answer(refusal=str(error))
        except Exception as error:  # noqa: BLE001  whatever it is, the driver decides what becomes of the piece
            log.warning("a worker failed:\n%s", traceback.format_exc())
            return _Answer(failure=f"{type(error).__name__}: {error}".strip().splitlines()[0])


class _Here:
    """The worker is this process."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._served = _Served(make)

    def prepare(self) -> None:
        self._served.prepare().open()

    def call(self, piece: Any) -> Any:
        return self._served.call(piece).open()

    def close(self) -> None:
        pass


class _ThisThread(Executor):
    """Calls at once, so that a Ctrl-C reaches what is called."""

    def submit(self, function: Callable[..., R], /, *arguments: Any, **named: Any) -> Future[R]:
        future: Future[R] = Future()
        try:
            future.set_result(function(*arguments, **named))
        except Exception as error:  # noqa: BLE001  whoever asks for the result gets it
            future.set_exception(error)
        return future


class _Process:
    """The worker is a process of its own, which sees one GPU at most."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], gpu: str | None) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(make, theirs, gpu), daemon=True)
        self._process.start()
        theirs.close()

    def prepare(self) -> None:
        self._exchange(None)

    def call(self, piece: Any) -> Any:
        return self._exchange((piece,))

    def close(self) -> None:
        self._process.kill()
        self._process.join()

    def _exchange(self, message: tuple[Any] | None) -> Any:
        try:
            self._pipe.send(message)
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            status = self._process.exitcode or 0
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            raise _WorkerLostError(how) from None
        return answer.open()


def _serve(make: Callable[[], Callable[[Any], Any]], pipe: Connection, gpu: str | None) -> None:
    """Main function of a worker's process; it lasts until it is killed."""
    # A Ctrl-C reaches all processes of a terminal; the driver ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    log_to_stderr()
    served = _Served(make)
    while True:
        message = pipe.recv()
        pipe.send(served.prepare() if message is None else served.call(*message))


def _end_with_parent() -> None:
    """A driver that is killed cannot end its workers; what they write must not meet what its successor writes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


class _Actor:
    """The worker is an actor of Ray's."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], gpus: int) -> None:
        import ray

        self._actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(_Served).remote(make)

    def prepare(self) -> None:
        self._exchange(self._actor.prepare.remote())

    def call(self, piece: Any) -> Any:
        return self._exchange(self._actor.call.remote(piece))

    def close(self) -> None:
        import ray

        ray.kill(self._actor)

    def _exchange(self, reference: Any) -> Any:
        import ray
        from ray.exceptions import RayError

        try:
            answer = ray.get(reference)
        except RayError as error:
            raise _WorkerLostError(f"{type(error).__name__}: {error}".splitlines()[0]) from None
        return answer.open()


def _ray_gpus(workers: int, device: Device) -> int:
    """GPUs for each actor; ValueError where the cluster could never start them all, which Ray would wait for."""
    import ray

    resources = ray.cluster_resources()
    gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    wanted = 0 if device == "cpu" or (device == "auto" and not gpus) else 1
    for kind, there in (("GPUs", gpus),) * wanted + (("CPUs", cores),):
        if there < workers:
            raise ValueError(f"{workers} workers, but the Ray cluster has {there} {kind}: give fewer, or add machines")
    return wanted


def _visible_gpus(workers: int, device: Device) -> list[str]:
    """The name of a GPU for each of this machine's workers; empty where they take none."""
    if device == "cpu":
        return []
    import torch

    count = torch.cuda.device_count()
    if device == "auto" and not count:
        return []
    if count < workers:
        raise ValueError(f"{workers} workers, but this machine has {count} GPUs: give --workers {max(1, count)}")
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(place) for place in range(count)]
