"""What a run on Ray shows to Prometheus, which reads it from Ray's own metrics ports.

All gauges have the tags `run`, `stage` and `rank`; rank 0 says what holds for all ranks.
"""

import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

from msr_dist.run import RunConfig
from msr_dist.train import train

GAUGES = {
    "loss": "Training loss, mean over the steps since the last value",
    "samples_per_second": "Rows that all ranks together train on in a second",
    "step_seconds": "Time of a training step",
    "loader_wait_seconds": "Time that a training step waits for its batch",
    "memory_bytes": "Main memory of the rank's process",
    "gpu_memory_bytes": "Most memory of the rank's GPU that its tensors have taken",
}
"""By the name of the value, which `msr_dist_` makes that of the gauge."""

_SCENARIO_AUC = re.compile(r"valid/(?P<scenario>[^/]+)/auc")
_TABLE = re.compile(r"tables/(?P<table>.+)/(?P<name>\w+)")


def shown(run: RunConfig) -> Callable[[RunConfig], None]:
    """Training that shows itself, for Ray's workers."""
    return partial(train, show=partial(show, run.name))


def show(run: str, stage: str, rank: int, values: Mapping[str, float]) -> None:
    """Set the gauges of those of `values` that have one."""
    tags = {"run": run, "stage": stage, "rank": str(rank)}
    for name, value in values.items():
        if name in GAUGES:
            _gauge(f"msr_dist_{name}", GAUGES[name], ()).set(value, tags)
        elif match := _SCENARIO_AUC.fullmatch(name):
            gauge = _gauge("msr_dist_scenario_auc", "AUC of a scenario on the valid split", ("scenario",))
            gauge.set(value, tags | match.groupdict())
        elif match := _TABLE.fullmatch(name):
            gauge = _gauge(f"msr_dist_table_{match['name']}", f"{match['name'].capitalize()} of a table", ("table",))
            gauge.set(value, tags | {"table": match["table"]})


@cache
def _gauge(name: str, about: str, tags: tuple[str, ...]) -> Any:
    """Made once in a process, in a worker of Ray's."""
    from ray.util.metrics import Gauge

    return Gauge(name, about, tag_keys=("run", "stage", "rank", *tags))
