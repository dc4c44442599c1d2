"""Jobs of a Ray of several machines, some of which are lost: what comes of them is what would have come without."""

import json
import os
import re
import signal
import subprocess

import pytest
import yaml
from machines import PATIENCE, REPOSITORY, SETTINGS, Machines, submit, wait_for

import canonical
import command
import texts
import tinymodel
from msr_dist.config import dump
from msr_dist.extract import CompressConfig, ExtractConfig, extract
from msr_dist.llm.encode import EncoderConfig
from msr_dist.llm.history import HistoryConfig
from msr_dist.llm.prompts import PromptConfig

# Of a machine that does much besides.
pytestmark = pytest.mark.timeout(3 * PATIENCE)

LONG = {"stages": [{"epochs": 16, "schedule": {"decay": "linear"}}], "checkpoint": {"every_steps": 7}}


@pytest.fixture(scope="module")
def machines():
    with Machines.started() as started:
        yield started


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return canonical.write(tmp_path_factory.mktemp("data"), rows=3000)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    """The folder of a run of two processes that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = command.call("train", command.write_config(folder, data, **LONG), "--workers", 2, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return folder / "runs/run"


def expect_the_same(run, undisturbed):
    assert command.losses(run) == command.losses(undisturbed)
    assert json.loads((run / "metrics.json").read_text()) == json.loads((undisturbed / "metrics.json").read_text())


def saved(run):
    """The step of the newest checkpoint, or 0."""
    return max((int(path.name[-9:]) for path in (run / "checkpoints").glob("stage-0-step-*[0-9]")), default=0)


def test_a_machine_lost_in_training(tmp_path, machines, data, undisturbed):
    run = tmp_path / "runs/run"
    job = submit(machines, "train", command.write_config(tmp_path, data, **LONG), "--workers", 2)
    wait_for(lambda: saved(run), job)
    machines.lose(machines.running("ray::RayTrainWorker"))
    assert not (run / "metrics.json").exists()
    said, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, said
    assert "starting all again" in said
    assert "run: test split" in said
    machines.add()
    expect_the_same(run, undisturbed)


def test_a_machine_lost_in_extraction(tmp_path, machines):
    data = texts.write(tmp_path / "data", users=200, train_rows=4000)
    alone = ExtractConfig(
        data=data,
        out=tmp_path / "alone",
        model=EncoderConfig(name=str(tinymodel.llama(tmp_path / "model")), dtype="fp32", device="cpu", max_tokens=2000),
        history=HistoryConfig(per_scenario=3),
        prompts=PromptConfig(user_tokens=2000),
        users_per_shard=2,
        compress=CompressConfig(width=4),
    )
    extract(alone)
    config, out = tmp_path / "extract.toml", tmp_path / "disturbed"
    config.write_text(dump(alone.model_copy(update={"out": out})))
    job = submit(machines, "extract", config, "--workers", 2)
    wait_for(lambda: len(list((out / "users").glob("part-?????.parquet"))) > 3, job)
    machines.lose(machines.running("ray::_Served"))
    assert not (out / "manifest.json").exists()
    said, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, said
    machines.add()
    assert contents(out) == contents(alone.out)


def before_stop(group: str) -> list[str]:
    """The command that the manifests have the first container of these pods run before it is ended."""
    cluster = next(iter(yaml.safe_load_all((REPOSITORY / "k8s/base/cluster.yaml").read_text())))
    spec = cluster["spec"][group]
    (container,) = (spec if isinstance(spec, dict) else spec[0])["template"]["spec"]["containers"]
    return container["lifecycle"]["preStop"]["exec"]["command"]


def contents(store):
    files = [*store.rglob("*.parquet"), *store.rglob("*.json")]
    return {str(file.relative_to(store)): file.read_bytes() for file in files}


def test_a_job_that_is_stopped_or_whose_head_is_lost_goes_on_when_it_is_submitted_again(
    tmp_path, machines, data, undisturbed
):
    from ray.job_submission import JobSubmissionClient

    run, config = tmp_path / "runs/run", command.write_config(tmp_path, data, **LONG)
    job = submit(machines, "train", config, "--workers", 2)
    wait_for(lambda: saved(run), job)
    # Ctrl-C ends the following alone.
    job.send_signal(signal.SIGINT)
    said, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 130, said
    submission = said.split()[1]
    assert said.count(f"ray job stop --address {machines.address} {submission}") == 2
    client = JobSubmissionClient(machines.address)
    assert client.get_job_status(submission) == "RUNNING"
    # What Kubernetes runs in the pods of a cluster that it takes away.
    staying = subprocess.Popen(before_stop("workerGroupSpecs"), env=os.environ | SETTINGS)
    leaving = [word.replace("http://127.0.0.1:8265", machines.address) for word in before_stop("headGroupSpec")]
    assert staying.poll() is None
    subprocess.run(leaving, env=os.environ | SETTINGS, timeout=PATIENCE, check=True)
    assert client.get_job_status(submission) == "STOPPED"
    stopped = re.search(r"stopped after step (\d+) of \d+ .* which is saved", client.get_job_logs(submission))
    assert stopped, client.get_job_logs(submission)
    assert saved(run) == int(stopped[1])
    assert staying.wait(timeout=PATIENCE) == 0

    before = saved(run)
    job = submit(machines, "train", config, "--workers", 2)
    wait_for(lambda: saved(run) > before, job)
    machines.end()
    said, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 2, said
    assert "no job server answers there" in said
    assert not (run / "metrics.json").exists()

    machines.start()
    job = submit(machines, "train", config, "--workers", 2)
    said, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, said
    assert "resuming from" in said
    expect_the_same(run, undisturbed)
