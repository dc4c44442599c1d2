"""A Ray of several machines on this one: a head with a job server and no cores, and two machines with two cores each.

with Machines.started(folder) as machines:
    machines.lose(machines.running("ray::RayTrainWorker"))
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from nodes import beside_own_ray

PATIENCE = 600.0
"""Seconds that anything may take on a machine that does much besides."""
REPOSITORY = Path(__file__).parents[2]
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # The entrypoint's python is the first that the head finds.
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    # One thread for every rank and actor, on a machine of any size.
    "OMP_NUM_THREADS": "1",
}


class Machines:
    """All of them are real raylets, whose processes are killed to lose one."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """The head, then the others."""
        from ray.cluster_utils import Cluster

        self.port = free_port()
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": True,
                "dashboard_port": self.port,
                # Another Ray of this machine may have the usual one, and without it no job can be submitted.
                "dashboard_agent_listen_port": free_port(),
            },
        )
        for _ in range(2):
            self.add()

    @classmethod
    @contextmanager
    def started(cls) -> Iterator["Machines"]:
        """In a temporary directory of its own: Rays in the usual one take the newest there for theirs."""
        with (
            tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder,
            environment(folder),
            beside_own_ray(),
        ):
            machines = cls()
            try:
                yield machines
            finally:
                machines.end()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self) -> None:
        self._cluster.add_node(num_cpus=2)

    def running(self, title: str) -> Any:
        """The machine that has a process of that title."""
        return wait_for(lambda: next((node for node in self._cluster.worker_nodes if _has(node, title)), None))

    def no_longer_running(self, title: str) -> None:
        """Wait until no machine has a process of that title."""
        wait_for(lambda: not any(_has(node, title) for node in self._cluster.worker_nodes))

    def lose(self, node: Any) -> None:
        """Kill all that runs there, at once."""
        _kill(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def end(self) -> None:
        """Kill everything, the head last."""
        for node in list(self._cluster.worker_nodes):
            self.lose(node)
        self.lose(self._cluster.head_node)


@contextmanager
def environment(folder: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (SETTINGS | {"RAY_TMPDIR": folder}).items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


def submit(machines: Machines, job: str, *arguments: Any) -> subprocess.Popen[str]:
    """The command that submits a job of this repository and follows it."""
    words = ["submit", job, *map(str, arguments), "--address", machines.address, "--follow"]
    return subprocess.Popen(
        [sys.executable, "-m", "msr_dist", *words],
        cwd=REPOSITORY,
        env=os.environ | SETTINGS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(found: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> Any:
    """What `found` returns, once that is something; `process` is not to end before."""
    begun = time.monotonic()
    while not (result := found()):
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() - begun < PATIENCE
        time.sleep(0.02)
    return result


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def _tree(node: Any) -> list[psutil.Process]:
    found = []
    for process in (each.process.pid for started in node.all_processes.values() for each in started):
        try:
            found += [psutil.Process(process), *psutil.Process(process).children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    return found


def _has(node: Any, title: str) -> bool:
    def named(process: psutil.Process) -> bool:
        try:
            return " ".join(process.cmdline()).startswith(title)
        except psutil.NoSuchProcess:
            return False

    return any(map(named, _tree(node)))


def _kill(node: Any) -> None:
    for process in _tree(node):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
