"""Tracking against a real MLflow on sqlite, and against one that is not there."""

import json
import logging
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from msr_dist.config import parse
from msr_dist.tracking import STATE_FILE, VALUES_FILE, TrackingConfig, flatten, git_commit, open_tracker, public

pytestmark = [
    # mlflow's own use of SQLAlchemy, when its tables are mapped.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
    # mlflow's pool leaves connections to sqlite to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
]
QUIET = {"every": 0.1, "system_every": 0}


def config(**settings):
    return parse(TrackingConfig, QUIET | settings, "tracking")


def client(folder):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder}/mlflow.db")


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / VALUES_FILE).read_text().splitlines()]


def runs(folder):
    found = client(folder)
    return found.search_runs([found.get_experiment_by_name("msr-dist").experiment_id])


def history(folder, run_id, name):
    return [(point.step, point.value) for point in client(folder).get_metric_history(run_id, name)]


@pytest.fixture
def closed_port():
    """A URI where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_values_params_tags_and_files_reach_mlflow(tmp_path, capfd):
    run_dir = tmp_path / "first run"
    nested = {"seed": 1, "model": {"kind": "star", "widths": [8, 4]}, "stages": [{"epochs": 2}], "text": "x" * 9000}
    nested |= {f"many{index}": index for index in range(250)}
    with open_tracker(config(), 0, run_dir, nested, {"who": "me"}) as tracker:
        (run_dir / "plan.txt").write_text("table-wise")
        tracker.artifact(run_dir / "plan.txt")
        for step in range(3):
            tracker.log({"train/loss": 1 / (step + 1), "a: 100%/../b": step}, step)
        tracker.log({"bad": math.nan, "up": math.inf, "down": -math.inf}, 3)
    (run,) = runs(tmp_path)
    assert run.info.run_id == tracker.run_id
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first run")
    params = run.data.params
    assert (params["model.widths"], params["stages.0.epochs"], params["many249"]) == ("[8, 4]", "2", "249")
    assert len(params["text"]) == 6000
    assert run.data.tags["who"] == "me"
    assert run.data.tags["mlflow.source.git.commit"] == git_commit(Path.cwd())
    assert history(tmp_path, tracker.run_id, "train/loss") == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert run.data.metrics["a_ 100_/__/b"] == 2
    assert math.isnan(run.data.metrics["bad"])
    assert run.data.metrics["up"] == -run.data.metrics["down"] > 1e300
    assert lines(run_dir)[-1]["metrics"] == {"bad": "NaN", "up": "Infinity", "down": "-Infinity"}
    file = client(tmp_path).download_artifacts(tracker.run_id, "plan.txt", str(tmp_path))
    assert Path(file).read_text() == "table-wise"
    assert (tmp_path / "mlartifacts").is_dir()
    assert capfd.readouterr().out == ""


def test_thousands_of_values_in_one_call(tmp_path):
    with open_tracker(config(), 0, tmp_path / "run", {}) as tracker:
        tracker.log({f"test/s{index}/auc": index / 3000 for index in range(3000)}, 1)
    (run,) = runs(tmp_path)
    assert len(run.data.metrics) == 3000


def test_a_resumed_run_is_the_same_run_and_repeats_nothing(tmp_path):
    run_dir = tmp_path / "run"
    with open_tracker(config(), 0, run_dir, "steps = 10\nseed = 1\n") as first:
        first.log({"loss": 0.5}, 1)
    state = json.loads((run_dir / STATE_FILE).read_text())
    (record,) = state["stores"].values()
    # As if the process had died after the delivery, before it was written down.
    record["offset"] = 0
    (run_dir / STATE_FILE).write_text(json.dumps(state))
    # And within a line.
    with open(run_dir / VALUES_FILE, "a") as file:
        file.write('{"step": 2, "time": 17')
    with open_tracker(config(), 0, run_dir, "steps = 20\nseed = 1\nnew = 3\n") as second:
        second.log({"loss": 0.25}, 2)
    assert first.run_id == second.run_id
    (run,) = runs(tmp_path)
    assert history(tmp_path, run.info.run_id, "loss") == [(1, 0.5), (2, 0.25)]
    assert (run.data.params["steps"], run.data.params["new"]) == ("10", "3")
    assert run.data.tags["resumed.steps"] == "20"
    assert "resumed.seed" not in run.data.tags


def test_a_failed_run_says_so(tmp_path):
    with pytest.raises(ValueError, match="diverged"), open_tracker(config(), 0, tmp_path / "run", {}):
        raise ValueError("diverged")
    assert runs(tmp_path)[0].info.status == "FAILED"


def test_a_run_that_was_deleted_in_mlflow_starts_anew_with_everything(tmp_path, caplog):
    with open_tracker(config(), 0, tmp_path / "run", {}) as first:
        first.log({"loss": 0.5}, 1)
    client(tmp_path).delete_run(first.run_id)
    with open_tracker(config(), 0, tmp_path / "run", {}) as second:
        second.log({"loss": 0.25}, 2)
    assert second.run_id != first.run_id
    assert "no longer in MLflow" in caplog.text
    assert history(tmp_path, second.run_id, "loss") == [(1, 0.5), (2, 0.25)]


def test_a_server_that_is_down_costs_nothing_and_is_told_once(tmp_path, caplog, closed_port):
    caplog.set_level(logging.WARNING)
    run_dir = tmp_path / "run"
    (run_dir).mkdir()
    (run_dir / "plan.txt").write_text("plan")
    tracker = open_tracker(config(uri=closed_port), 0, run_dir, {})
    tracker.artifact(run_dir / "plan.txt")
    deadline = time.monotonic() + 30
    while "does not take values" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.05)
    took = []
    for step in range(200):
        start = time.perf_counter()
        tracker.log({"loss": 1.0, "auc": 0.5}, step)
        took.append(time.perf_counter() - start)
    time.sleep(1)
    start = time.monotonic()
    tracker.close(timeout=10)
    assert time.monotonic() - start < 10
    assert sorted(took)[100] < 1e-3
    assert [line["step"] for line in lines(run_dir)] == list(range(200))
    told = [record.getMessage() for record in caplog.records if record.name == "msr_dist.tracking"]
    assert len(told) == 1
    assert "secret" not in told[0]
    assert str(run_dir / VALUES_FILE) in told[0]

    # Tracked elsewhere, the run brings along all that it has.
    with open_tracker(config(), 0, run_dir, {}) as tracker:
        tracker.log({"loss": 2.0}, 200)
    assert len(history(tmp_path, tracker.run_id, "loss")) == 201
    assert [file.path for file in client(tmp_path).list_artifacts(tracker.run_id)] == ["plan.txt"]
    assert "secret" not in (run_dir / STATE_FILE).read_text()


def test_an_outage_in_the_middle_loses_nothing(tmp_path, caplog):
    run_dir = tmp_path / "run"
    with open_tracker(config(), 0, run_dir, {}) as tracker:
        tracker.log({"loss": 1.0}, 1)
        database = tmp_path / "mlflow.db"
        deadline = time.monotonic() + 30
        while not ((run_dir / STATE_FILE).exists() and '"offset": 0' not in (run_dir / STATE_FILE).read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with sqlite3.connect(database) as lock:
            lock.execute("ALTER TABLE metrics RENAME TO gone")
        lock.close()
        tracker.log({"loss": 2.0}, 2)
        while "does not take values" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with sqlite3.connect(database) as lock:
            lock.execute("ALTER TABLE gone RENAME TO metrics")
        lock.close()
        tracker.log({"loss": 3.0}, 3)
    assert history(tmp_path, tracker.run_id, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


@contextmanager
def served(folder, port):
    """A real server on sqlite, until it is killed."""
    words = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/server.db"]
    words += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--artifacts-destination", str(folder)]
    with open(folder / "server.log", "a") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + 200
        while True:
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                assert process.poll() is None, (folder / "server.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_that_is_killed_and_started_again_has_every_value(tmp_path, caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_dir, took = tmp_path / "run", []

    def log(first, last):
        for step in range(first, last):
            start = time.perf_counter()
            tracker.log({"loss": float(step), "auc": 0.5}, step)
            took.append(time.perf_counter() - start)

    tracker = open_tracker(config(uri=f"http://127.0.0.1:{port}", close_timeout=100), 0, run_dir, {"seed": 1})
    with served(tmp_path, port):
        log(0, 100)
        deadline = time.monotonic() + 100
        while '"offset": 0' in (
            state := (run_dir / STATE_FILE).read_text() if (run_dir / STATE_FILE).exists() else '"offset": 0'
        ):
            assert time.monotonic() < deadline, state
            time.sleep(0.1)
    log(100, 200)
    while "does not take values" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    log(200, 300)
    with served(tmp_path, port):
        log(300, 400)
        tracker.close()
        from mlflow import MlflowClient

        found = MlflowClient(f"http://127.0.0.1:{port}")
        for name in ("loss", "auc"):
            points = found.get_metric_history(tracker.run_id, name)
            assert sorted(point.step for point in points) == list(range(400))
        assert found.get_run(tracker.run_id).info.status == "FINISHED"
    assert sorted(took)[200] < 1e-3


def test_close_does_not_wait_for_a_server_that_never_answers(tmp_path, caplog, monkeypatch):
    # What the user sets in the environment goes before the configuration.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracker = open_tracker(config(uri=uri), 0, tmp_path / "run", {})
        tracker.log({"loss": 1.0}, 1)
        start = time.monotonic()
        tracker.close(timeout=0.5)
        assert time.monotonic() - start < 1.5
        assert "next start of the run delivers them" in caplog.text
        tracker.log({"loss": 2.0}, 2)
        tracker.close()
        assert [line["step"] for line in lines(tmp_path / "run")] == [1]
        # The thread's warning, if any, belongs to this test.
        tracker._courier.join(20)


def test_a_killed_process_leaves_every_value(tmp_path):
    script = (
        "import os, pathlib, sys\n"
        "from msr_dist.tracking import TrackingConfig, open_tracker\n"
        "tracker = open_tracker(TrackingConfig(), 0, pathlib.Path(sys.argv[1]), {})\n"
        "for step in range(500): tracker.log({'loss': step}, step)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], check=False)
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(500))


def test_without_mlflow_the_values_are_kept_all_the_same(tmp_path):
    with open_tracker(config(enabled=False), 0, tmp_path / "run", {}) as tracker:
        tracker.log({"loss": 1.0}, 1)
        tracker.artifact(tmp_path / "none")
    assert tracker.run_id is None
    assert [line["metrics"] for line in lines(tmp_path / "run")] == [{"loss": 1.0}]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_nothing_elsewhere(tmp_path):
    with open_tracker(config(), 1, tmp_path / "run", {}) as tracker:
        tracker.log({"loss": 1.0}, 1)
        tracker.artifact(tmp_path / "none")
    assert tracker.run_id is None
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_number_is_told_and_does_not_raise(tmp_path, caplog):
    with open_tracker(config(), 0, tmp_path / "run", {}) as tracker:
        tracker.log({"loss": "high"}, 1)
        tracker.log({"loss": 1.0}, 2)
    assert "values cannot be written" in caplog.text
    assert history(tmp_path, tracker.run_id, "loss") == [(2, 1.0)]


def test_the_load_of_the_machine_is_sampled(tmp_path):
    with open_tracker(config(system_every=0.2), 0, tmp_path / "run", {}) as tracker:
        tracker.log({"loss": 1.0}, 7)
        deadline = time.monotonic() + 30
        while len(lines(tmp_path / "run")) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
    sampled = lines(tmp_path / "run")[-1]
    assert sampled["step"] == 7
    assert 0 <= sampled["metrics"]["system/cpu_percent"] <= 100
    assert 0 < runs(tmp_path)[0].data.metrics["system/process_memory_gib"] < 100


@pytest.mark.parametrize(
    "uri", ["http://me:s3cret@host:5000", "postgresql://me:s3cret@host/db", "sqlite:////a?password=s3cret"]
)
def test_credentials_do_not_belong_in_a_configuration(uri):
    with pytest.raises(ValueError, match="holds credentials") as caught:
        config(uri=uri)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "file:mlruns", "./mlruns", "ftp://x", "sqlite://", "sqlite:///"])
def test_stores_that_mlflow_does_not_have_are_refused(uri):
    with pytest.raises(ValueError, match=r"tracking: uri: .*(sqlite:////ABSOLUTE|known: )"):
        config(uri=uri)


def test_uris_hold_in_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    default = f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert config().resolved_uri(Path("runs")) == default
    assert config(uri="sqlite:///mlflow.db").resolved_uri(Path("runs")) == default
    assert config(uri="sqlite:////data/m.db?timeout=9").resolved_uri(Path("runs")) == "sqlite:////data/m.db?timeout=9"
    assert config(uri="http://host:5000").resolved_uri(Path("runs")) == "http://host:5000"
    assert config().how_to_open(Path("runs")) == f"mlflow ui --backend-store-uri {default}"
    assert config(uri="http://host:5000").how_to_open(Path("runs")) == "http://host:5000"


def test_credentials_are_struck_out():
    assert public("postgresql://me:p%40ss@host/db") == "postgresql://***@host/db"
    assert (
        public("s3 at https://host/a?x=1&X-Amz-Signature=abc&y=2") == "s3 at https://host/a?x=1&X-Amz-Signature=***&y=2"
    )
    assert flatten({"a": {"uris": ["http://u:p@h/x"]}, "n": None}) == {"a.uris": '["http://***@h/x"]', "n": "None"}


def test_git_commit(tmp_path):
    assert git_commit(tmp_path / "absent") is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    assert len(git_commit(tmp_path)) == 40
