"""Run a function in this process, in several local ones, or on Ray's workers. Says nothing about training.

Imports neither torch nor ray before it must: thread settings have to stand in the environment when torch is loaded.
"""

import atexit
import ctypes
import gc
import logging
import os
import shutil
import signal
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from msr_dist import stopping
from msr_dist.stopping import Stopped

log = logging.getLogger(__name__)

A = TypeVar("A")
Launcher = Literal["local", "ray"]

_GRACE = 1.0
"""Seconds that ranks have to end by themselves after one of them has failed, and again after they were told to."""
_LOOK = 0.5
"""Seconds between two looks at whether workers are done, or shall stop."""
_PATIENCE = 30
"""Whole seconds that a cluster has to make room for all workers before fewer are taken."""
_MOMENT = 5
"""Whole seconds in which a cluster reserves room that it has."""
_WISHES, _BEGUN = b"msr_dist stop", b"msr_dist begun"
"""Where workers are told to stop, and say that they have begun, among Ray's own notes: that a file is absent may be
remembered by a worker's machine."""


_KEPT = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}
"""glibc keeps freed memory for the next step, instead of having the system clear the same pages again and again: a step
on CPUs takes about a tenth less. Is read where a process starts, so it holds for those that are started from now on."""
_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
"""oneDNN keeps a kernel, with what it works in, for each of the last 1,024 shapes; but scenarios have other numbers of
rows in every batch. In bf16 that took half a GiB for nothing."""

_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Torch asks for pages of 2 MiB for tensors of that size and more, where the system leaves that to programs: a lookup
in a large table then seldom waits for the page's address. Steps on CPUs take up to an eighth less."""


def set_threads(workers: int) -> dict[str, str]:
    """Thread settings for one of `workers` processes on this host; what the user has set stays.

    With two or more OpenMP threads, libgomp's long spinning beside autograd's own pool makes a CPU step many times
    slower; none at all, as passive would have it, wakes threads for every small product and takes up to twice as long.
    """
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    settings = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}
    settings |= _KEPT | _KERNELS | _PAGES
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    _keep_memory()
    return {name: os.environ[name] for name in settings}


def _keep_memory() -> None:
    """What `_KEPT` does, in this process; nothing where there is no glibc."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, name in ((-3, "MALLOC_MMAP_THRESHOLD_"), (-1, "MALLOC_TRIM_THRESHOLD_")):
            mallopt(parameter, int(os.environ[name]))


_ENDED: list[int] = []
"""The status with which this process is to end; empty while it is to end as others do."""


def call_and_leave(command: Callable[[], object]) -> None:
    """Call what a process is for, and end the process with its status as soon as exit handlers were called.

    Otherwise the interpreter takes all objects apart that libraries have made, which takes two seconds where torch and
    TorchRec are loaded, and changes nothing.
    """
    try:
        command()
    except SystemExit as ended:
        if isinstance(ended.code, int):
            _ENDED.append(ended.code)
        raise


def _leave() -> None:
    if _ENDED:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            # Whoever read it may be gone, which must not undo what was done.
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(_ENDED[0])


# Exit handlers are called last one first: this one after those of all that is loaded from here on.
atexit.register(_leave)
# Where the interpreter takes all apart after all, then what `loaded` has set aside as well: libraries complain of what
# remains.
atexit.register(gc.unfreeze)


def world_size() -> int:
    """Number of processes, where something like torchrun started this one as one of several; else 0."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def launch(
    function: Callable[[A], None],
    argument: A,
    launcher: Launcher,
    workers: int,
    folder: Path,
    restarts: int = 0,
    fewer: Sequence[int] = (),
) -> None:
    """Call `function(argument)` in every one of `workers` processes that know each other, and wait.

    When a worker is lost, all start again, at most `restarts` times. A ValueError is the user's to mend and is raised
    at once. SIGTERM and SIGINT are passed on to the workers. `folder`, which all workers share, takes what the launcher
    writes. On Ray, a cluster that has lost machines is used with one of `fewer` workers, until it has room for more:
    then `function` is asked to stop, and called again.

    Raises:
        ValueError: what a worker raised.
        LaunchError: workers failed for another reason, more often than `restarts`.
        Stopped: the workers were asked to stop, and did.
    """
    environment = set_threads(workers)
    if launcher == "local" and workers == 1:
        return function(argument)
    attempt = _Ray(workers, fewer, folder, environment) if launcher == "ray" else _Processes(workers, folder)
    for left in range(restarts, -1, -1):
        call = _Call(function, argument, folder, uuid.uuid4().hex)
        (folder / stopping.LAST_WORDS).unlink(missing_ok=True)
        try:
            attempt(call)
        except Stopped:
            if (refusal := call.noted(_REFUSED)) is not None:
                raise ValueError(refusal) from None
            if (stopped := call.noted(_STOPPED)) is not None:
                raise Stopped(stopped) from None
            raise
        except _WorkersLostError as lost:
            if (refusal := call.noted(_REFUSED)) is not None:
                raise ValueError(refusal) from None
            failure, last_words = folder / "failure.txt", folder / stopping.LAST_WORDS
            failure.write_text(lost.details)
            how = last_words.read_text() if last_words.exists() else str(lost)
            if not left:
                raise LaunchError(f"workers failed: {how}; the whole of it is in {failure}") from None
            log.warning("workers failed (%s); starting all again, %d tries left", how, left)
        else:
            if (stopped := call.noted(_STOPPED)) is not None:
                raise Stopped(stopped)
            return None
    raise AssertionError


class LaunchError(Exception):
    """Workers failed, and were not to be started again."""


class _WorkersLostError(Exception):
    """A worker died, or raised something: one line, and all that is known."""

    def __init__(self, line: str, details: str) -> None:
        super().__init__(line)
        self.details = details


_REFUSED, _STOPPED = "refused", "stopped"
_KILLED = "stopped by a signal; the same command goes on from the last checkpoint, where there is one"


@dataclass(frozen=True)
class _Call(Generic[A]):
    """What every worker does. How it ended is left in files: launchers hand back tracebacks, each in its own form."""

    function: Callable[[A], None]
    argument: A
    folder: Path
    name: str

    def __call__(self) -> None:
        loaded()
        log_to_stderr()
        try:
            self.function(self.argument)
        except ValueError as error:
            self._note(_REFUSED, error)
            raise
        except Stopped as stopped:
            self._note(_STOPPED, stopped)

    def noted(self, how: str) -> str | None:
        """What a worker that ended that way said, once."""
        note = self.folder / f"{how}-{self.name}"
        if not note.exists():
            return None
        message = note.read_text()
        note.unlink()
        return message

    def _note(self, how: str, error: BaseException) -> None:
        note = self.folder / f"{how}-{self.name}"
        partial = note.with_name(f"{note.name}.{os.getpid()}")
        partial.write_text(str(error))
        partial.replace(note)


def log_to_stderr() -> None:
    """Show our own log lines, and of the libraries' only what went wrong."""
    warnings.simplefilter("ignore")
    logging.disable(logging.NOTSET)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.ERROR, force=True)
    logging.getLogger("msr_dist").setLevel(logging.INFO)
    # Has a handler of torch's own, and tells torch's developers what to rename.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


def silence() -> None:
    """Say nothing of what a process loads before `log_to_stderr` is called in it."""
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)


_USUAL = gc.get_threshold()


@contextmanager
def loading() -> Iterator[None]:
    """Load libraries: what they make is no garbage, and to look for it meanwhile takes a third of the time."""
    gc.disable()
    try:
        yield
    finally:
        loaded()


def loaded() -> None:
    """Look for garbage as Python does, but never again among what is there by now."""
    gc.freeze()
    gc.set_threshold(*_USUAL)
    gc.enable()


def begin_worker() -> None:
    """What workers of Ray's do first, which load much before they call anything of ours: that calls `loaded`."""
    silence()
    # Not never: Ray's own helpers, which begin in the same way, live as long as a run.
    gc.set_threshold(100 * _USUAL[0], *_USUAL[1:])


class _Processes:
    """Processes of this machine."""

    def __init__(self, workers: int, folder: Path) -> None:
        self._workers, self._folder = workers, folder

    def __call__(self, call: _Call[Any]) -> None:
        from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

        # They meet in a folder and talk over the loopback interface: no port that another machine could reach.
        meeting = self._folder / f"meeting-{uuid.uuid4().hex}"
        meeting.mkdir(parents=True)
        os.environ.update(dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), _loopback()))
        pids: list[int] = []

        def pass_on() -> None:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)

        with stopping.on_signals(alone=True, then=pass_on):
            context = start_processes(  # type: ignore[no-untyped-call]
                _rank,
                (self._workers, meeting, dict(os.environ), call),
                self._workers,
                join=False,
                start_method=_start_method(getattr(call.function, "func", call.function).__module__),
            )
            pids += context.pids()
            if stopping.asked():
                pass_on()
            try:
                while not context.join(grace_period=_GRACE):
                    pass
            except (ProcessExitedException, ProcessRaisedException) as error:
                if stopping.asked():
                    raise Stopped(_KILLED) from None
                raised = isinstance(error, ProcessRaisedException)
                line = f"rank {error.error_index}: {_last_line(error) if raised else error}"
                raise _WorkersLostError(line, str(error)) from None
            finally:
                for process in context.processes:
                    process.kill()
                shutil.rmtree(meeting, ignore_errors=True)


def load_ahead(launcher: Launcher, workers: int, module: str) -> None:
    """Begin to load what local ranks that call a function of `module` need, beside what this process loads itself."""
    if launcher == "local" and workers > 1 and _start_method(module) == "forkserver":
        from multiprocessing import forkserver

        atexit.register(_load_no_more)
        # Ctrl-C is this process's to answer; ranks hear of it again.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _load_no_more() -> None:
    """What loads for ranks would go on with it, and keep the output open, where this process has ended before."""
    from multiprocessing import forkserver

    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None:
        with suppress(ProcessLookupError):
            os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()


def _start_method(module: str) -> str:
    """How ranks are started, which call a function of that module.

    What takes long to load is loaded once, by a process that does nothing else, of which ranks are copies: most of what
    it takes to start one is saved, and in a process that launches again, for all of them. On GPUs every rank starts
    from nothing, for CUDA does not outlive such a copy.
    """
    import multiprocessing

    import torch

    if torch.version.cuda is not None:
        return "spawn"
    multiprocessing.set_forkserver_preload(["msr_dist.copied", "torchrec", module])
    return "forkserver"


def _rank(rank: int, workers: int, meeting: Path, environment: dict[str, str], call: _Call[Any]) -> None:
    from msr_dist.distributed import MEETING

    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    # That of the process which launches, as it is now.
    os.environ.clear()
    os.environ |= environment
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(workers) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ[MEETING] = str(meeting)
    call()
    # All is done and on disk: what native threads do while the interpreter is taken apart must not fail the run.
    _ENDED.append(0)
    _leave()


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _loopback() -> str:
    import psutil

    addresses: dict[str, str] = {
        address.address: name for name, listed in psutil.net_if_addrs().items() for address in listed
    }
    return addresses.get("127.0.0.1", "lo")


class _Ray:
    """Workers of Ray Train's. It starts them once; whether they are started again is for `launch` alone to say."""

    def __init__(self, workers: int, fewer: Sequence[int], folder: Path, environment: dict[str, str]) -> None:
        # Ray's own printing repeats what the workers log.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
        if not _cluster():
            # Nobody takes this machine away, so nothing has to watch for it.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        connect(workers, environment)
        import ray

        gpus = int(ray.cluster_resources().get("GPU", 0))
        if 0 < gpus < min((workers, *fewer)):
            raise ValueError(
                f"{workers} workers, but the Ray cluster has {gpus} GPUs: give --workers {gpus}, or add GPUs"
            )
        # Found once: a run that has begun on GPUs does not go on without them.
        self._on_gpus = gpus > 0
        self._sizes = sorted({workers, *fewer}, reverse=True)
        self._folder = folder

    def __call__(self, call: _Call[Any]) -> None:
        patience = _PATIENCE
        while self._fit(call, self._size(patience)):
            patience = _MOMENT

    def _fit(self, call: _Call[Any], workers: int) -> bool:
        """Whether the workers were stopped because there is room for more of them."""
        from ray.experimental import internal_kv
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError

        # A name that was used before would resume Ray's own record of it; ours is in the checkpoints.
        name = uuid.uuid4().hex
        elastic = len(self._sizes) > 1
        trainer = TorchTrainer(
            lambda: _listening(call, name),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=self._on_gpus),
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if self._on_gpus else "gloo"),
            run_config=RunConfig(
                name=name,
                storage_path=str(self._folder / "ray"),
                # A full cluster is waited for, unless fewer workers would do.
                failure_config=FailureConfig(
                    max_failures=0, max_preemption_failures=0, controller_failure_limit=0 if elastic else -1
                ),
            ),
        )
        grows = told = False
        there_is_room: Callable[[int], bool] | None = None
        with stopping.on_signals(alone=True), ExitStack() as reserved:
            # In a thread: in the main one, Ray Train would take Ctrl-C for itself, and leave its resources reserved.
            fit = _begin(trainer.fit)
            try:
                while not wait([fit], timeout=_LOOK).done:
                    # Asked for before the workers are there, it would be their own room.
                    if there_is_room is None and internal_kv._internal_kv_exists(name, namespace=_BEGUN):
                        there_is_room = reserved.enter_context(self._room_beyond(workers))
                    if not grows and there_is_room is not None and there_is_room(0):
                        grows = True
                        log.info("the cluster has room for more than %d workers: they shall stop, and go on", workers)
                    if stopping.asked() and there_is_room is None:
                        # Nothing has begun that would have to be saved.
                        raise Stopped(_KILLED)
                    if (grows or stopping.asked()) and not told:
                        told = True
                        internal_kv._internal_kv_put(name, b"", namespace=_WISHES)
                fit.result()
            except TrainingFailedError as error:
                if stopping.asked():
                    raise Stopped(_KILLED) from None
                raise _WorkersLostError(_last_line(error), str(error)) from None
            finally:
                if not fit.done():
                    internal_kv._internal_kv_put(name, b"", namespace=_WISHES)
                else:
                    internal_kv._internal_kv_del(name, namespace=_WISHES)
                    internal_kv._internal_kv_del(name, namespace=_BEGUN)
            return grows and not stopping.asked() and call.noted(_STOPPED) is not None

    def _size(self, patience: int) -> int:
        """The largest of the possible numbers of workers that the cluster has room for, after some time."""
        if len(self._sizes) == 1:
            return self._sizes[0]
        told = False
        while True:
            for size in self._sizes:
                with self._reserved(size) as there_is_room:
                    if there_is_room(patience if size == self._sizes[0] else _MOMENT):
                        if size < self._sizes[0]:
                            log.warning("the cluster has room for %d of %d workers: going on", size, self._sizes[0])
                        return size
            if not told:
                log.warning("the cluster has no room for %d workers: waiting for it", self._sizes[-1])
            told = True

    def _room_beyond(self, workers: int) -> AbstractContextManager[Callable[[int], bool]]:
        """Says whether there is room for the next larger number of workers beside `workers`."""
        more = [size for size in self._sizes if size > workers]
        return self._reserved(more[-1] - workers) if more else nullcontext(lambda _: False)

    @contextmanager
    def _reserved(self, workers: int) -> Iterator[Callable[[int], bool]]:
        """Ask the cluster, and what makes it larger, for room; says whether it is there within so many seconds."""
        from ray.util.placement_group import placement_group, remove_placement_group

        group = placement_group([{"GPU" if self._on_gpus else "CPU": 1}] * workers)
        try:
            # Parts of a second count as none.
            yield lambda seconds: bool(group.wait(seconds))
        finally:
            remove_placement_group(group)


def _begin(function: Callable[[], Any]) -> Future[Any]:
    """Call `function` in a thread that the end of the process does not wait for."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="fit").start()
    return future


def _listening(call: _Call[Any], name: str) -> None:
    """The call, in a worker of Ray's; whether it shall stop is asked of the cluster."""

    def listen() -> None:
        from ray.experimental import internal_kv

        internal_kv._internal_kv_put(name, b"", namespace=_BEGUN)
        while not internal_kv._internal_kv_exists(name, namespace=_WISHES):
            time.sleep(_LOOK)
        stopping.ask()

    threading.Thread(target=listen, daemon=True, name="listener").start()
    call()


def _cluster() -> bool:
    """Whether there is a Ray to join: RAY_ADDRESS says where, or this process is the entrypoint of a Ray job."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))


def connect(workers: int, environment: dict[str, str]) -> None:
    """Join the Ray that there is, or start one on this machine, for this process alone; `environment` is the workers'.

    Does nothing where this process has joined one already.
    """
    if not _cluster():
        # Despite its name, for every system: Ray's own servers listen on the loopback interface alone. What remains
        # open while a run lasts is the port where ranks find each other, which torch binds to all interfaces.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    if ray.is_initialized():
        return
    runtime_env = {"env_vars": environment, "worker_process_setup_hook": "msr_dist.launch.begin_worker"}
    if _cluster():
        ray.init(runtime_env=runtime_env, logging_level=logging.ERROR)
        return
    # Workers and Ray's own controller need logical cores, however many the machine has.
    cores = max(workers + 1, os.cpu_count() or 1)
    ray.init(
        address="local",
        num_cpus=cores,
        # On localhost; Ray's own housekeeping asks it about the workers.
        include_dashboard=True,
        runtime_env=runtime_env,
        logging_level=logging.ERROR,
    )
