"""The whole pipeline on MovieLens-1M, with a machine lost in each of its phases: what comes of it is what would have.

MSR_DIST_LONG=1 pytest tests/jobs/test_movielens_on_machines.py
"""

import json
import os
import sys

import pytest
from machines import PATIENCE, REPOSITORY, Machines, submit, wait_for

import command
from msr_dist.pipeline import RECORD_FILE

ARCHIVE = REPOSITORY.parent / "shared/data/movielens-1m/ml-1m.zip"
# Of every user the newest few likes alone: many users are done quickly, none is left out.
SHORT = [
    "extract.history.per_scenario=3",
    "extract.prompts.user_tokens=128",
    "train.stages.0.epochs=1",
    "train.checkpoint.every_steps=10",
    "train.tracking.enabled=false",
]


def arguments(folder):
    config = REPOSITORY / "jobs/configs/pipeline-movielens.toml"
    places = [f"data={folder}/data", f"store={folder}/store", f"train.runs={folder}/runs"]
    return [config, "--workers", 2, f"prepare.raw={ARCHIVE}", *places, *SHORT]


@pytest.mark.timeout(3600)
@pytest.mark.skipif(os.environ.get("MSR_DIST_LONG") != "1", reason="takes many minutes: set MSR_DIST_LONG=1")
@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"no {ARCHIVE}")
def test_a_machine_lost_in_every_phase(tmp_path):
    folder, run = tmp_path / "disturbed", tmp_path / "disturbed/runs/pipeline-movielens"

    def judged(split):
        record = run / RECORD_FILE
        return record.exists() and split in json.loads(record.read_text())["judged"]

    with Machines.started() as machines:

        def lose(title):
            machines.lose(machines.running(title))
            machines.add()

        job = submit(machines, "pipeline", *arguments(folder))
        wait_for(lambda: list(folder.glob(".data.preparing-*")), job)
        lose("ray::_Served")
        assert not (folder / "data").exists()
        wait_for(lambda: len(list(folder.glob("store/users/part-?????.parquet"))) > 1, job)
        lose("ray::_Served")
        assert not (folder / "store/manifest.json").exists()
        wait_for(lambda: list(run.glob("checkpoints/stage-0-step-*[0-9]")), job)
        lose("ray::RayTrainWorker")
        assert not judged("test")
        wait_for(lambda: judged("test"), job)
        # Those of the training take a while to end.
        machines.no_longer_running("ray::RayTrainWorker")
        lose("ray::RayTrainWorker")
        assert not judged("valid")
        said, _ = job.communicate(timeout=PATIENCE)
        assert job.returncode == 0, said
    # Who noticed differs: a worker that is lost before it has work, or while it starts, Ray replaces by itself.

    alone = [sys.executable, str(REPOSITORY / "jobs/pipeline.py")]
    done = command.call(*arguments(tmp_path / "alone"), launched_by=alone, timeout=2400)
    assert done.returncode == 0, done.stderr
    undisturbed = tmp_path / "alone/runs/pipeline-movielens"
    assert vectors(folder) == vectors(tmp_path / "alone")
    assert command.losses(run) == command.losses(undisturbed)
    for file in ("metrics.json", "metrics-valid.json"):
        found = json.loads((run / file).read_text())
        print(file, found["overall"])
        assert found == json.loads((undisturbed / file).read_text())


def vectors(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("store/*/*.parquet")}
