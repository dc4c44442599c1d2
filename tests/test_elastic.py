"""A run on a Ray cluster of several nodes, of which one is lost and another comes."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import canonical
import command
import nodes

DRIVER = """
import sys
from functools import partial
from pathlib import Path
import launched
from msr_dist import launch
from msr_dist.config import load
from msr_dist.run import RunConfig
from msr_dist.train import fewer_workers, train
launch.log_to_stderr()
launch._PATIENCE = 3
run = load(RunConfig, Path(sys.argv[1])).claim_folder()
held = partial(train, validated=partial(launched.hold, run.folder))
launch.launch(held, run, "ray", 2, run.folder, 3, fewer_workers(run, 1, 2))
"""


@pytest.fixture
def cluster(monkeypatch):
    """A head without workers, and two nodes that have room for one each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    with nodes.beside_own_ray():
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        yield made
        made.shutdown()


@pytest.mark.timeout(600)
def test_a_lost_node_is_done_without_and_its_successor_taken(tmp_path, cluster):
    data = canonical.write(tmp_path / "data", rows=3000)
    settings = {"stages": [{"epochs": 12}], "checkpoint": {"every_steps": 7}}
    (tmp_path / "whole").mkdir()
    whole = command.call("train", command.write_config(tmp_path / "whole", data, **settings), timeout=240)
    assert whole.returncode == 0, whole.stderr
    config = command.write_config(tmp_path, data, **settings)
    folder = tmp_path / "runs/run"

    lost, _ = (cluster.add_node(num_cpus=1) for _ in range(2))
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(config)],
        env=os.environ | {"RAY_ADDRESS": cluster.address},
        stderr=subprocess.PIPE,
        text=True,
    )
    told: list[str] = []
    reader = threading.Thread(target=lambda: told.extend(process.stderr))
    reader.start()

    def wait_until(true) -> None:
        begun = time.monotonic()
        while not true():
            assert process.poll() is None, "".join(told)
            assert time.monotonic() - begun < 200, "".join(told)
            time.sleep(0.05)

    def said(words: str) -> bool:
        return any(words in line for line in told)

    wait_until((folder / "reached-4").exists)
    cluster.remove_node(lost, allow_graceful=False)
    (folder / "release-4").write_text("")
    wait_until((folder / "reached-8").exists)
    assert said("workers failed")
    assert said("the cluster has room for 1 of 2 workers: going on")
    cluster.add_node(num_cpus=1)
    wait_until(lambda: said("the cluster has room for more than 1 workers"))
    (folder / "release-8").write_text("")
    assert process.wait(timeout=200) == 0, "".join(told)
    reader.join()
    process.stderr.close()
    assert len([line for line in told if "resuming from" in line]) >= 2
    found, expected = command.losses(folder), command.losses(tmp_path / "whole/runs/run")
    # Steps after the world size has changed agree as those of other world sizes do.
    assert found == {step: pytest.approx(expected[step], rel=1e-6 if step <= 30 else 1e-3) for step in range(1, 301)}
