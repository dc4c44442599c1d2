"""What Prometheus reads of a run on Ray."""

import re
import threading
import time
from functools import partial
from urllib.request import urlopen

import pytest

import canonical
import command
import launched
from msr_dist.config import load
from msr_dist.launch import launch
from msr_dist.run import RunConfig
from msr_dist.train import train


@pytest.mark.usefixtures("ray_cluster")
def test_prometheus_sees_what_each_rank_does(tmp_path):
    import ray

    data = canonical.write(tmp_path / "data", rows=3000)
    config = command.write_config(
        tmp_path, data, stages=[{"epochs": 1}], tracking={"enabled": False, "each_rank": True}
    )
    run = load(RunConfig, config).claim_folder()
    (node,) = ray.nodes()
    wanted = {
        f"ray_msr_dist_{name}"
        for name in (
            "loss",
            "samples_per_second",
            "step_seconds",
            "loader_wait_seconds",
            "memory_bytes",
            "scenario_auc",
        )
    }
    seen: list[str] = []

    def ranks() -> set[str]:
        of_steps = (line for line in seen if line.startswith("ray_msr_dist_step_seconds"))
        return {re.search(r'rank="(\d)"', line)[1] for line in of_steps}

    def all_there() -> bool:
        return wanted <= {line.partition("{")[0] for line in seen} and ranks() == {"0", "1"}

    def watch() -> None:
        begun = time.monotonic()
        while time.monotonic() - begun < 150 and not all_there():
            with urlopen(
                f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30
            ) as page:
                seen[:] = [line for line in page.read().decode().splitlines() if line.startswith("ray_msr_dist")]
            time.sleep(0.5)
        (run.folder / "seen").write_text("")

    watcher = threading.Thread(target=watch)
    watcher.start()
    launch(partial(train, show=partial(launched.show_and_hold, run.folder, "mine")), run, "ray", 2, run.folder)
    watcher.join()
    assert {line.partition("{")[0] for line in seen} == wanted
    assert all('run="mine"' in line and 'stage="train"' in line for line in seen)
    assert ranks() == {"0", "1"}
    scenarios = {re.search(r'scenario="([^"]*)"', line)[1] for line in seen if "scenario_auc" in line}
    assert scenarios == {"overall", "scenario 0", "scenario 1", "scenario 2"}
    # The same stand in the run's folder, of every rank.
    values = command.losses(run.folder, "train/rank-1/memory_bytes")
    assert list(values) == list(range(1, 26))
    most = command.losses(run.folder, "train/memory_bytes")
    assert all(most[step] >= values[step] > 1e7 for step in values)
    assert all(wait >= 0 for wait in command.losses(run.folder, "train/loader_wait_seconds").values())
    loads = [command.losses(run.folder, f"system/rank-{rank}/cpu_percent") for rank in range(2)]
    assert all(list(load) == list(values) and all(0 <= value <= 100 for value in load.values()) for load in loads)
