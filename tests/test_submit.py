"""The command `submit` against a real job server, which asks for a token."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import psutil
import pytest

import command

TOKEN = "a token of this test's own, of no use anywhere else"
HELLO = """
import os, sys
print("files", sorted(name for name in os.listdir() if name != "__pycache__"))
print("arguments", sys.argv[1:])
print("token", os.environ.get("RAY_AUTH_TOKEN") == "mine")
sys.exit(3 if "fail=true" in sys.argv else 0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkout with one job, and with what is not to be sent."""
    made = tmp_path_factory.mktemp("checkout")
    for file, text in {
        "jobs/hello.py": HELLO,
        "jobs/configs/some.toml": "",
        "data/log.csv": "1",
        "runs/run/metrics.json": "{}",
        "knowledge/store/manifest.json": "{}",
        ".venv/bin/python": "",
        ".git/HEAD": "",
        "package/data/code.py": "",
    }.items():
        (made / file).parent.mkdir(parents=True, exist_ok=True)
        (made / file).write_text(text)
    return made


@pytest.fixture(scope="module")
def address():
    """Of the job server of a head that knows TOKEN."""
    from ray._common.network_utils import find_free_port

    port = find_free_port()
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as place:
        environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_TMPDIR": place,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=1", "--port=0"]
        head = subprocess.Popen(
            [*words, f"--dashboard-port={port}", f"--dashboard-agent-listen-port={find_free_port()}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            found, begun = f"http://127.0.0.1:{port}", time.monotonic()
            while not answers(found):
                assert head.poll() is None, head.communicate()[0]
                assert time.monotonic() - begun < 120
                time.sleep(0.2)
            yield found
        finally:
            for process in [*psutil.Process(head.pid).children(recursive=True), head]:
                process.kill()
            head.communicate()


def answers(address: str) -> bool:
    try:
        urlopen(f"{address}/api/version", timeout=5).close()
    except HTTPError:
        return True
    except (URLError, OSError):
        return False
    return True


def submit(folder: Path, address: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [*command.COMMAND, "submit", *words, "--address", address],
        cwd=folder,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("msr-dist: ")
    return done.stderr


AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


def test_a_job_runs_in_a_copy_of_the_folder_and_is_followed_to_its_end(folder, address):
    done = submit(folder, address, "hello", "jobs/configs/some.toml", "a b=c", "--workers", "3", "--follow", **AUTH)
    assert done.returncode == 0, done.stderr
    assert "files ['jobs', 'package']" in done.stdout
    assert "arguments ['--workers', '3', 'jobs/configs/some.toml', 'a b=c']" in done.stdout
    submission = done.stdout.split()[1]
    assert f"stop     ray job stop --address {address} {submission}" in done.stdout
    assert TOKEN not in done.stdout + done.stderr


def test_a_job_that_fails_is_told_in_status_1(folder, address):
    done = submit(folder, address, "hello", "fail=true", "--follow", **AUTH)
    assert done.returncode == 1, done.stderr
    assert "failed: Job entrypoint command failed with exit code 3" in done.stdout
    # Nobody waits where nobody follows.
    assert submit(folder, address, "hello", "fail=true", **AUTH).returncode == 0


def test_a_token_in_a_file_does_as_well(folder, address, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    # Elsewhere than RAY_ADDRESS says.
    done = submit(folder, address, "hello", "x=1", "--follow", RAY_ADDRESS="http://127.0.0.1:9", **given)
    assert done.returncode == 0, done.stderr


def test_what_is_wrong_is_one_line(folder, address, tmp_path):
    assert "asks for a token: set RAY_AUTH_MODE=token" in refused(
        submit(folder, address, "hello", "x=1", RAY_AUTH_MODE="disabled")
    )
    # Nor is a token made up where there is none.
    home = {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    assert "asks for a token: set RAY_AUTH_MODE=token" in refused(submit(folder, address, "hello", "x=1", **home))
    assert not list(tmp_path.iterdir())
    wrong = AUTH | {"RAY_AUTH_TOKEN": "another"}
    assert "refuses the token: set RAY_AUTH_MODE=token" in refused(submit(folder, address, "hello", "x=1", **wrong))
    # Before anything is asked of a server.
    assert "no job 'helo': jobs/ has hello" in refused(submit(folder, "http://127.0.0.1:1", "helo", "x=1", **AUTH))
    assert "no job '../jobs/hello'" in refused(submit(folder, address, "../jobs/hello", "x=1", **AUTH))
    assert "absent.toml: no such file" in refused(submit(folder, address, "hello", "absent.toml", **AUTH))
    assert "there is no jobs/ here; go to the checkout" in refused(submit(tmp_path, address, "hello", "x=1", **AUTH))
    assert "no job server answers there" in refused(submit(folder, "http://127.0.0.1:9", "hello", "x=1", **AUTH))
    assert "no address of a job server" in refused(submit(folder, "127.0.0.1:9", "hello", "x=1", **AUTH))
