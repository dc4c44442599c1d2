import os
from pathlib import Path

import pytest

import buckets
from msr_dist.launch import set_threads

set_threads(os.cpu_count() or 1)

TESTS = str(Path(__file__).parent)
# The process that launched ranks are copies of loads what tests launch.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (TESTS, os.environ.get("PYTHONPATH"))))


LONGEST = (
    "test_train",
    "test_quality",
    "test_machines",
    "test_vocabulary",
    "test_workers",
    "test_launch",
    "test_extract",
)
"""Files that take minutes each."""


def pytest_collection_modifyitems(items):
    """A file's tests run one after the other: the longest begin first, so that none is left to run alone at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def ray_cluster():
    """A Ray of this test session's own, reachable from this machine alone."""
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        # Workers import the functions that tests launch.
        runtime_env={"env_vars": set_threads(2) | {"PYTHONPATH": TESTS}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def object_store(tmp_path_factory):
    """An S3 server of this test session's own; nothing knows of it before `reached` sets the environment."""
    with buckets.object_store(tmp_path_factory.mktemp("object-store")) as store:
        yield store


@pytest.fixture
def reached(object_store, monkeypatch):
    """The same, and an environment in which it is found."""
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    return object_store
