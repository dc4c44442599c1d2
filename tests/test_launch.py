import gc
import json
import os
import subprocess
import sys

import pytest

import launched
from msr_dist.launch import LaunchError, launch


@pytest.fixture(params=["local", "ray"])
def launcher(request):
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return request.param


def test_workers_know_each_other(tmp_path, launcher):
    launch(launched.report_world, tmp_path, launcher, 2, tmp_path)
    known = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [entry["rank"] for entry in known] == [0, 1]
    assert all(entry["ranks"] == [0, 1] for entry in known)
    assert all(entry["OMP_WAIT_POLICY"] == "passive" for entry in known)
    # Looked for as usual, but not in what was loaded.
    assert all(entry["garbage"] == [True, *gc.get_threshold(), True] for entry in known)


def test_ranks_see_the_environment_as_it_is_when_they_are_launched(tmp_path, monkeypatch):
    """They are copies of a process that was started with the first of them."""
    for word in ("first", "second"):
        monkeypatch.setenv("OMP_WAIT_POLICY", word)
        launch(launched.report_world, tmp_path, "local", 2, tmp_path)
        assert json.loads((tmp_path / "rank-1.json").read_text())["OMP_WAIT_POLICY"] == word


def test_a_world_does_not_meet_at_the_addresses_of_the_one_before(tmp_path):
    launch(launched.open_worlds_one_after_another, tmp_path, "local", 2, tmp_path)
    assert json.loads((tmp_path / "rank-1.json").read_text())["ranks"] == [0, 1]
    assert not list(tmp_path.glob("meeting*"))


def test_one_local_worker_is_this_process(tmp_path):
    launch(launched.report_world, tmp_path, "local", 1, tmp_path)
    assert json.loads((tmp_path / "rank-0.json").read_text())["world_size"] == 1


def test_a_value_error_of_a_worker_comes_back_at_once(tmp_path, launcher):
    with pytest.raises(ValueError, match=r"^row group 7, column 'user': 3 nulls; prepare the data again$"):
        launch(launched.refuse_on_rank_1, tmp_path, launcher, 2, tmp_path, restarts=5)
    assert not list(tmp_path.glob("refused*"))


def test_a_killed_worker_is_started_again(tmp_path, launcher):
    launch(launched.die_once, tmp_path, launcher, 2, tmp_path, restarts=1)
    assert (tmp_path / "died").exists()
    assert (tmp_path / "rank-1.json").exists()


def test_restarts_are_counted(tmp_path):
    with pytest.raises(LaunchError, match=r"workers failed: rank 1: .*SIGKILL"):
        launch(launched.die_once, tmp_path, "local", 2, tmp_path, restarts=0)
    with pytest.raises(LaunchError, match="a fault of ours"):
        launch(launched.always_fail, tmp_path, "local", 2, tmp_path, restarts=1)
    assert "Traceback" in (tmp_path / "failure.txt").read_text()


def test_garbage_is_not_looked_for_while_libraries_load():
    code = (
        "import gc\n"
        "from msr_dist.launch import begin_worker, loaded, loading\n"
        "usual = gc.get_threshold()\n"
        "try:\n"
        "    with loading():\n"
        "        print(gc.isenabled())\n"
        "        import absent\n"
        "except ImportError:\n"
        "    print(gc.isenabled(), gc.get_threshold() == usual, gc.get_freeze_count() > 0)\n"
        "begin_worker()\n"
        "print(gc.isenabled(), gc.get_threshold()[0] > 10_000)\n"
        "loaded()\n"
        "print(gc.isenabled(), gc.get_threshold() == usual)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["False", "True", "True", "True", "True", "True", "True", "True"], done.stderr


def test_no_library_complains_where_the_interpreter_is_taken_apart():
    code = (
        "from msr_dist.launch import loading\n"
        "with loading():\n"
        "    import duckdb\n"
        "duckdb.sql('select 1').fetchall()\n"
        "raise SystemExit('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "done\n")


LEAVING = """
import atexit, sys
from msr_dist.launch import call_and_leave

class Kept:
    def __del__(self):
        sys.stderr.write("taken apart")

kept = Kept()

def command():
    atexit.register(print, "handler")
    print("said")
    {end}

call_and_leave(command)
"""


@pytest.mark.parametrize(
    ("end", "status", "left"),
    [("sys.exit(3)", 3, True), ("sys.exit()", 0, False), ("sys.exit('why')", 1, False), ("1 / 0", 1, False)],
)
def test_a_process_is_left_once_its_exit_handlers_were_called(end, status, left):
    code = LEAVING.format(end=end)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status
    assert done.stdout == "said\nhandler\n"
    assert ("taken apart" in done.stderr) == (not left)
    assert ("why" in done.stderr or "ZeroDivisionError" in done.stderr) == (status == 1)


def test_what_was_printed_may_be_read_by_nobody():
    code = (
        "import sys\n"
        "from msr_dist.launch import call_and_leave\n"
        "def command():\n"
        "    print('said')\n"
        "    sys.exit(3)\n"
        "call_and_leave(command)\n"
    )
    # What is printed waits for the end.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    with process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 3
