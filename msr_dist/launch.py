"""Run a function in this process, in several local ones, or on Ray's workers. Says nothing about training.

Imports neither torch nor ray before it must: thread settings have to stand in the environment when torch is loaded.
"""

import logging
import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

log = logging.getLogger(__name__)

A = TypeVar("A")
Launcher = Literal["local", "ray"]


def set_threads(workers: int) -> dict[str, str]:
    """Thread settings for one of `workers` processes on this host; what the user has set stays.

    With two or more OpenMP threads, libgomp's long spinning beside autograd's own pool makes a CPU step many times
    slower; none at all, as passive would have it, wakes threads for every small product and takes up to twice as long.
    """
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    settings = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    return {name: os.environ[name] for name in settings}


def world_size() -> int:
    """Number of processes, where something like torchrun started this one as one of several; else 0."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def launch(
    function: Callable[[A], None], argument: A, launcher: Launcher, workers: int, folder: Path, restarts: int = 0
) -> None:
    """Call `function(argument)` in every one of `workers` processes that know each other, and wait.

    When a worker is lost, all start again, at most `restarts` times. A ValueError is the user's to mend and is raised
    at once. `folder`, which all workers share, takes what the launcher writes.

    Raises:
        ValueError: what a worker raised.
        LaunchError: workers failed for another reason, more often than `restarts`.
    """
    environment = set_threads(workers)
    if launcher == "local" and workers == 1:
        return function(argument)
    attempt = _on_ray if launcher == "ray" else _in_processes
    for left in range(restarts, -1, -1):
        refusal = folder / f"refused-{uuid.uuid4().hex}"
        try:
            return attempt((function, argument, refusal), workers, folder, environment)
        except _WorkersLostError as lost:
            if refusal.exists():
                message = refusal.read_text()
                refusal.unlink()
                raise ValueError(message) from None
            failure = folder / "failure.txt"
            failure.write_text(lost.details)
            if not left:
                raise LaunchError(f"workers failed: {lost}; the whole of it is in {failure}") from None
            log.warning("workers failed (%s); starting all again, %d tries left", lost, left)
    raise AssertionError


class LaunchError(Exception):
    """Workers failed, and were not to be started again."""


class _WorkersLostError(Exception):
    """A worker died, or raised something: one line, and all that is known."""

    def __init__(self, line: str, details: str) -> None:
        super().__init__(line)
        self.details = details


def _guarded(function: Callable[[A], None], argument: A, refusal: Path) -> None:
    """Leave the message of a ValueError in a file: launchers hand back tracebacks, each in a form of its own."""
    log_to_stderr()
    try:
        function(argument)
    except ValueError as error:
        partial = refusal.with_name(f"{refusal.name}.{os.getpid()}")
        partial.write_text(str(error))
        partial.replace(refusal)
        raise


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


def _in_processes(call: tuple[Any, ...], workers: int, folder: Path, _environment: dict[str, str]) -> None:
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

    # They meet in a folder and talk over the loopback interface: no port that another machine could reach.
    meeting = folder / f"meeting-{uuid.uuid4().hex}"
    meeting.mkdir(parents=True)
    os.environ.update(dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), _loopback()))
    try:
        spawn(_rank, (workers, meeting, call), workers)  # type: ignore[no-untyped-call]
    except ProcessExitedException as error:
        raise _WorkersLostError(f"rank {error.error_index}: {error}", str(error)) from None
    except ProcessRaisedException as error:
        raise _WorkersLostError(f"rank {error.error_index}: {_last_line(error)}", str(error)) from None
    finally:
        shutil.rmtree(meeting, ignore_errors=True)


def _rank(rank: int, workers: int, meeting: Path, call: tuple[Any, ...]) -> None:
    from msr_dist.distributed import MEETING

    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(workers) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ[MEETING] = str(meeting)
    _guarded(*call)
    # All is done and on disk: what native threads do while the interpreter is taken apart must not fail the run.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _loopback() -> str:
    import psutil

    addresses: dict[str, str] = {
        address.address: name for name, listed in psutil.net_if_addrs().items() for address in listed
    }
    return addresses.get("127.0.0.1", "lo")


def _on_ray(call: tuple[Any, ...], workers: int, folder: Path, environment: dict[str, str]) -> None:
    # Ray's own printing repeats what the workers log.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    connect(workers, environment)
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    gpus = int(ray.cluster_resources().get("GPU", 0))
    if 0 < gpus < workers:
        raise ValueError(f"{workers} workers, but the Ray cluster has {gpus} GPUs: give --workers {gpus}, or add GPUs")
    on_gpus = gpus > 0
    trainer = TorchTrainer(
        lambda: _guarded(*call),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=on_gpus),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpus else "gloo"),
        # A name that was used before would resume Ray's own record of it; ours is in the checkpoints.
        run_config=RunConfig(name=uuid.uuid4().hex, storage_path=str(folder / "ray")),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _WorkersLostError(_last_line(error), str(error)) from None


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
    runtime_env = {"env_vars": environment, "worker_process_setup_hook": "msr_dist.launch.silence"}
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
