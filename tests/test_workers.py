import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

import working
from msr_dist.launch import LaunchError
from msr_dist.workers import Lost, Workers, _visible_gpus


@pytest.fixture(params=[("local", 1), ("local", 2), ("ray", 2)], ids=["here", "processes", "ray"])
def place(request):
    """A launcher and a number of workers."""
    if request.param[0] == "ray":
        request.getfixturevalue("ray_cluster")
    return request.param


@pytest.fixture(params=[("local", 2), ("ray", 2)], ids=["processes", "ray"])
def elsewhere(request):
    """The same, where workers have processes of their own."""
    if request.param[0] == "ray":
        request.getfixturevalue("ray_cluster")
    return request.param


def calls(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "calls").read_text().split()]


def wait_for_the_end_of(processes: Iterable[int]) -> None:
    begun, others = time.monotonic(), [pid for pid in processes if pid != os.getpid()]
    while any(psutil.pid_exists(pid) for pid in others):
        assert time.monotonic() - begun < 20
        time.sleep(0.05)


def test_every_piece_is_answered_by_a_few_workers_made_once(tmp_path, place):
    with Workers(working.Squares(tmp_path), *place, device="cpu") as workers:
        assert dict(workers.spread(range(20))) == {piece: piece**2 for piece in range(20)}
        # The same workers take what comes later.
        assert dict(workers.spread([7])) == {7: 49}
    made = list(tmp_path.glob("made-*"))
    assert 1 <= len(made) <= place[1]
    assert {file.read_text() for file in made} == {"1"}
    assert sorted(calls(tmp_path)) == sorted([*range(20), 7])
    assert (tmp_path / f"made-{os.getpid()}").exists() == (place == ("local", 1))
    wait_for_the_end_of(int(file.name[5:]) for file in made)


def test_pieces_are_claimed_in_order(tmp_path):
    with Workers(working.Squares(tmp_path), "local", 1, device="cpu") as workers:
        assert [piece for piece, _ in workers.spread([3, 1, 2])] == [3, 1, 2]
    assert calls(tmp_path) == [3, 1, 2]


def test_a_piece_whose_worker_was_killed_is_handed_out_again(tmp_path, elsewhere):
    with Workers(working.DiesAt(tmp_path, deadly=2, times=2), *elsewhere, device="cpu") as workers:
        assert dict(workers.spread(range(5))) == {piece: piece**2 for piece in range(5)}
    # No other piece paid for it.
    assert sorted(calls(tmp_path)) == [0, 1, 2, 2, 2, 3, 4]


def test_a_piece_that_kills_every_worker_is_named(tmp_path, elsewhere):
    with (
        Workers(working.DiesAt(tmp_path, deadly=2, times=99), *elsewhere, device="cpu", retries=1) as workers,
        pytest.raises(LaunchError, match=r"^2: its worker was lost 2 times, at last so: "),
    ):
        list(workers.spread(range(3)))
    assert calls(tmp_path).count(2) == 2


def test_lost_pieces_keep_nobody_from_the_others(tmp_path, elsewhere):
    with Workers(working.DiesAt(tmp_path, deadly=2, times=99), *elsewhere, device="cpu") as workers:
        found = dict(workers.attempt(range(6), retries=1))
        assert isinstance(found.pop(2), Lost)
        assert found == {piece: piece**2 for piece in (0, 1, 3, 4, 5)}
        assert dict(workers.attempt([3])) == {3: 9}


def test_a_local_worker_s_end_is_told(tmp_path, caplog):
    with Workers(working.DiesAt(tmp_path, deadly=0, times=1), "local", 2, device="cpu") as workers:
        assert dict(workers.spread([0])) == {0: 0}
    assert "a worker was lost at 0 (killed by SIGKILL); handing it out again" in caplog.text


def test_other_exceptions_are_tried_again_as_well(tmp_path, place):
    with Workers(working.FailsAt(tmp_path, deadly=2, times=2), *place, device="cpu") as workers:
        assert dict(workers.attempt([2], retries=2)) == {2: 4}
    (tmp_path / "calls").unlink()
    with (
        Workers(working.FailsAt(tmp_path, deadly=2, times=9), *place, device="cpu", retries=1) as workers,
        pytest.raises(LaunchError, match=r"at last so: KeyError: 'a fault"),
    ):
        list(workers.spread(range(3)))


def test_a_value_error_comes_back_at_once(tmp_path, place):
    with (
        Workers(working.RefusesAt(tmp_path, wrong=1), *place, device="cpu") as workers,
        pytest.raises(ValueError, match=r"^part 1: column 'id' is absent; prepare the data again$"),
    ):
        list(workers.spread(range(3)))
    assert calls(tmp_path).count(1) == 1


def test_a_worker_that_cannot_be_made_is_not_a_piece_s_fault(tmp_path, elsewhere):
    with (
        Workers(working.NeverMade(tmp_path), *elsewhere, device="cpu", retries=1) as workers,
        pytest.raises(LaunchError, match=r"^no worker could be started, in 2 tries: "),
    ):
        list(workers.attempt(range(3)))


def test_a_worker_that_refuses_to_be_made(tmp_path, place):
    with (
        Workers(working.RefusesToBeMade(tmp_path), *place, device="cpu") as workers,
        pytest.raises(ValueError, match=r"^model\.name: no such folder$"),
    ):
        list(workers.spread(range(3)))


def test_a_worker_that_is_never_made_holds_nothing_up(tmp_path, elsewhere):
    with Workers(working.MadeOnce(tmp_path), *elsewhere, device="cpu", retries=1) as workers:
        assert dict(workers.spread(range(9))) == {piece: piece**2 for piece in range(9)}
        # Long enough for the other one to be given up.
        while len(list(tmp_path.glob("made-*"))) < 3:
            assert dict(workers.spread([1, 2])) == {1: 1, 2: 4}
    assert sorted(set(calls(tmp_path))) == list(range(9))


@pytest.fixture
def hog(request):
    """Takes the cluster's free cores but some; call it with how many, and what it returns with nothing to end it."""
    request.getfixturevalue("ray_cluster")
    import ray

    actors = []

    def begin(leaving):
        # Other tests' actors may still be going, and what Ray Train has kept for itself stays taken.
        free = [-1, int(ray.available_resources().get("CPU", 0))]
        while free[-1] != free[-2]:
            time.sleep(1)
            free.append(int(ray.available_resources().get("CPU", 0)))
        actor = ray.remote(num_cpus=free[-1] - leaving)(working.Hog).remote()
        ray.get(actor.here.remote())
        actors.append(actor)
        return lambda: ray.kill(actor)

    yield begin
    for actor in actors:
        ray.kill(actor)


def test_an_actor_that_the_cluster_has_no_room_for_holds_nothing_up(tmp_path, hog):
    hog(leaving=1)
    with Workers(working.Squares(tmp_path), "ray", 2, device="cpu") as workers:
        assert dict(workers.spread(range(50))) == {piece: piece**2 for piece in range(50)}
    assert len(list(tmp_path.glob("made-*"))) == 1


def test_a_full_cluster_is_told_and_waited_for(tmp_path, hog, caplog, monkeypatch):
    monkeypatch.setattr("msr_dist.workers._PATIENCE", 0.2)
    end = hog(leaving=0)
    with Workers(working.Squares(tmp_path), "ray", 2, device="cpu") as workers:
        timer = threading.Timer(1, end)
        timer.start()
        assert dict(workers.spread(range(5))) == {piece: piece**2 for piece in range(5)}
        timer.join()
    assert caplog.text.count("2 workers have not started in 0 s: waiting; look at what else holds") == 1


def test_a_caller_may_stop_early(tmp_path, elsewhere):
    with Workers(working.Squares(tmp_path), *elsewhere, device="cpu") as workers:
        assert len(list(zip(workers.spread(range(100)), range(3), strict=False))) == 3
        assert dict(workers.spread([4])) == {4: 16}


@pytest.mark.usefixtures("ray_cluster")
def test_more_workers_than_the_cluster_can_hold(tmp_path):
    with pytest.raises(ValueError, match="5 workers, but the Ray cluster has 4 CPUs: give fewer, or add machines"):
        Workers(working.Squares(tmp_path), "ray", 5, device="cpu")
    with pytest.raises(ValueError, match="1 workers, but the Ray cluster has 0 GPUs"):
        Workers(working.Squares(tmp_path), "ray", 1, device="cuda")


def test_local_workers_share_no_gpu(monkeypatch):
    import torch

    # The one thing that this machine lacks.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _visible_gpus(2, "auto") == ["0", "1"]
    assert _visible_gpus(2, "cpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert _visible_gpus(2, "cuda") == ["5", "7"]
    with pytest.raises(ValueError, match="3 workers, but this machine has 2 GPUs: give --workers 2"):
        _visible_gpus(3, "auto")


DRIVER = """
import sys
from pathlib import Path
import working
from msr_dist.workers import Workers
if __name__ == "__main__":
    with Workers(working.Sleeper(Path(sys.argv[1])), "local", int(sys.argv[2]), device="cpu") as workers:
        list(workers.spread(range(9)))
"""


@pytest.mark.parametrize(("end", "count"), [(signal.SIGINT, 2), (signal.SIGINT, 1), (signal.SIGKILL, 2)])
def test_no_worker_outlives_its_driver(tmp_path, end, count):
    (tmp_path / "driver.py").write_text(DRIVER)
    words = [sys.executable, tmp_path / "driver.py", tmp_path, str(count)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    driver = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    begun = time.monotonic()
    while not (tmp_path / "calls").exists() or len(calls(tmp_path)) < count:
        assert driver.poll() is None, driver.stderr.read()
        assert time.monotonic() - begun < 60
        time.sleep(0.05)
    workers = [int(file.name[5:]) for file in tmp_path.glob("made-*")]
    driver.send_signal(end)
    _, errors = driver.communicate(timeout=30)
    assert driver.returncode == -end, errors
    assert not errors or errors.strip().endswith("KeyboardInterrupt")
    wait_for_the_end_of(workers)
