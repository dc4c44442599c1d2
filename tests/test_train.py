"""Whole runs through the command, under every launcher, broken off and gone on with."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

import canonical
import command
import vocabularies
from msr_dist.config import load
from msr_dist.layout import TableSharding
from msr_dist.run import RunConfig
from msr_dist.schema import FeatureSchema, Scenario
from msr_dist.train import fewer_workers

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return canonical.write(tmp_path_factory.mktemp("data"), rows=3000)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    """The losses of one process that is never disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    done = command.call("train", command.write_config(folder, data))
    assert done.returncode == 0, done.stderr
    found = command.losses(folder / "runs/run")
    assert list(found) == list(range(1, 51))
    return found


def agree(found: dict[int, float], expected: dict[int, float], exact: int = 30) -> None:
    """To 6 digits in the first `exact` steps; later ones have amplified rounding, but a lost step would show."""
    assert found == {step: pytest.approx(expected[step], rel=1e-6 if step <= exact else 1e-3) for step in expected}


@pytest.mark.parametrize(
    ("launcher", "workers"), [("local", 2), ("local", 3), ("torchrun", 2), ("torchrun", 3), ("ray", 2), ("ray", 3)]
)
def test_every_launcher_and_world_size_gives_the_same_losses(tmp_path, data, alone, launcher, workers):
    config = command.write_config(tmp_path, data)
    if launcher == "torchrun":
        torchrun = [*TORCHRUN, "--nproc-per-node", str(workers), "-m", "msr_dist"]
        done = command.call("train", config, launched_by=torchrun)
    else:
        done = command.call("train", config, "--launcher", launcher, "--workers", workers)
    assert done.returncode == 0, done.stderr
    agree(command.losses(tmp_path / "runs/run"), alone)
    assert done.stdout.count("run: test split") == 1
    assert "core_worker" not in done.stderr, "Ray's own complaints"


def wait_for_checkpoint(folder, process, seconds: float = 60) -> None:
    begun = time.monotonic()
    while not list((folder / "checkpoints").glob("stage-0-step-*[0-9]")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - begun < seconds
        time.sleep(0.02)


def test_a_killed_worker_and_another_world_size_change_no_loss(tmp_path, data):
    long = {
        "stages": [{"epochs": 12, "schedule": {"decay": "linear"}}],
        "checkpoint": {"every_steps": 7, "background": True},
    }
    (tmp_path / "whole").mkdir()
    done = command.call("train", command.write_config(tmp_path / "whole", data, **long))
    assert done.returncode == 0, done.stderr
    whole = command.losses(tmp_path / "whole/runs/run")

    config = command.write_config(tmp_path, data, **long)
    words = [*command.COMMAND, "train", str(config), "--workers", "2", "--restarts", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_checkpoint(tmp_path / "runs/run", process)
    command.ranks_of(process)[-1].send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "workers failed" in errors
    broken = command.losses(tmp_path / "runs/run")
    assert 7 <= max(broken) < 300

    done = command.call("train", config, "--workers", 3)
    assert done.returncode == 0, done.stderr
    agree(command.losses(tmp_path / "runs/run"), whole, exact=max(broken) + 30)


def test_a_killed_worker_is_replaced_without_losing_a_step(tmp_path, data):
    changes = {"stages": [{"epochs": 12}], "checkpoint": {"every_steps": 7}}
    (tmp_path / "whole").mkdir()
    assert command.call("train", command.write_config(tmp_path / "whole", data, **changes)).returncode == 0
    config = command.write_config(tmp_path, data, **changes)
    words = [*command.COMMAND, "train", str(config), "--workers", "2", "--restarts", "1"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_checkpoint(tmp_path / "runs/run", process)
    command.ranks_of(process)[0].send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "starting all again" in errors
    agree(command.losses(tmp_path / "runs/run"), command.losses(tmp_path / "whole/runs/run"))


def test_a_finished_run_is_evaluated_again_not_trained(tmp_path, data):
    config = command.write_config(tmp_path, data, evaluation={"validate_epochs": 0})
    assert command.call("train", config).returncode == 0
    lines = (tmp_path / "runs/run/metrics.jsonl").read_text().count("train/loss")
    report = (tmp_path / "runs/run/metrics.json").read_text()
    (tmp_path / "runs/run/metrics.json").unlink()
    assert command.call("train", config).returncode == 0
    assert (tmp_path / "runs/run/metrics.jsonl").read_text().count("train/loss") == lines
    assert (tmp_path / "runs/run/metrics.json").read_text() == report


def test_a_second_stage_starts_from_the_weights_of_the_first(tmp_path, data):
    first = {"name": "first", "epochs": 2}
    second = {"name": "second", "epochs": 1, "sparse": {"kind": "adagrad"}, "dense": {"kind": "sgd", "lr": 0.01}}
    (tmp_path / "one").mkdir()
    assert command.call("train", command.write_config(tmp_path / "one", data, stages=[first])).returncode == 0
    both = command.write_config(tmp_path, data, stages=[first, second], checkpoint={"background": True})
    assert command.call("train", both, "--workers", 2).returncode == 0
    folder = tmp_path / "runs/run"
    agree(command.losses(folder, "first/loss"), command.losses(tmp_path / "one/runs/run", "first/loss"))
    after = command.losses(folder, "second/loss")
    assert len(after) == 25
    assert sum(after.values()) / 25 < sum(list(command.losses(folder, "first/loss").values())[:25]) / 25


def test_the_same_name_with_other_losses_is_refused(tmp_path, data):
    config = command.write_config(tmp_path, data)
    assert command.call("train", config).returncode == 0
    before = (tmp_path / "runs/run/config.toml").read_text()
    done = command.call("train", config, "seed=5")
    assert done.returncode == 2
    assert "holds a run with seed = 0, not 5: choose another name=, or delete that folder" in done.stderr
    assert (tmp_path / "runs/run/config.toml").read_text() == before
    # What changes no loss may change.
    done = command.call("train", config, "loader.threads=1", "parallel.sharding=['row_wise']", "--workers", 2)
    assert done.returncode == 0, done.stderr


def test_data_that_have_changed_since_the_checkpoint(tmp_path, data):
    config = command.write_config(tmp_path, data)
    assert command.call("train", config).returncode == 0
    other = canonical.write(tmp_path / "other", rows=2990)
    text = (tmp_path / "runs/run/config.toml").read_text().replace(str(data), str(other))
    (tmp_path / "runs/run/config.toml").write_text(text)
    done = command.call("train", config, f"data={other}")
    assert done.returncode == 2
    assert "the data have changed since" in done.stderr


def test_a_loss_that_explodes_names_the_step(tmp_path, data):
    stages = [{"epochs": 1, "dense": {"kind": "sgd", "lr": 1e30}}]
    done = command.call("train", command.write_config(tmp_path, data, stages=stages))
    assert done.returncode == 2
    assert "the loss is nan at step" in done.stderr
    assert "with lower learning rates" in done.stderr


def test_a_loss_that_is_no_number_is_never_saved(tmp_path, data):
    stages = [{"epochs": 2, "dense": {"kind": "sgd", "lr": 1e30}}]
    config = command.write_config(tmp_path, data, stages=stages, log_every=20, checkpoint={"every_steps": 1})
    done = command.call("train", config)
    assert done.returncode == 2
    assert "the loss is nan at step 2" in done.stderr or "the loss is inf at step 2" in done.stderr
    saved = [path.name for path in (tmp_path / "runs/run/checkpoints").iterdir()]
    assert saved == ["stage-0-step-000000001"]


def test_a_run_that_never_saved_may_be_started_otherwise(tmp_path, data):
    config = command.write_config(tmp_path, data, stages=[{"epochs": 1, "dense": {"kind": "sgd", "lr": 1e30}}])
    assert command.call("train", config).returncode == 2
    done = command.call("train", config, "stages.0.dense.lr=0.01")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs").glob("run.abandoned-*"))) == 1


def test_two_processes_do_not_train_one_run(tmp_path, data):
    config = command.write_config(tmp_path, data, stages=[{"epochs": 40}])
    words = [*command.COMMAND, "train", str(config)]
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_checkpoint(tmp_path / "runs/run", first)
    done = command.call("train", config)
    assert done.returncode == 2
    assert "is being trained by another process" in done.stderr
    first.kill()
    first.communicate(timeout=30)
    assert command.call("train", config, "--workers", 2).returncode == 0


def test_a_run_that_is_judged_on_the_valid_split_never_opens_the_test_split(tmp_path):
    data = canonical.write(tmp_path / "data", rows=3000)
    shutil.rmtree(data / "test")
    done = command.call("train", command.write_config(tmp_path, data), "evaluation.final=valid")
    assert done.returncode == 0, done.stderr
    assert "run: valid split" in done.stdout
    report = json.loads((tmp_path / "runs/run/metrics-valid.json").read_text())
    assert report["overall"]["rows"] == 750
    assert not (tmp_path / "runs/run/metrics.json").exists()


def test_evaluate_under_torchrun_shows_one_table(tmp_path, data):
    assert command.call("train", command.write_config(tmp_path, data)).returncode == 0
    torchrun = [*TORCHRUN, "--nproc-per-node", "2", "-m", "msr_dist"]
    done = command.call("evaluate", tmp_path / "runs/run", launched_by=torchrun)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run: test split") == 1


def test_bad_data_deep_in_a_file_end_a_run_of_several_workers(tmp_path):
    data = canonical.write(tmp_path / "data", rows=1500)
    whole = canonical.table(1500, seed=0)
    users = whole["user"].to_pylist()
    users[-1] = -4
    whole = whole.set_column(0, "user", [users])
    for file in (data / "train").iterdir():
        file.unlink()
    (data / "train").rmdir()
    canonical.write_split(data / "train", whole, canonical.uneven(1500, 30))
    done = command.call("train", command.write_config(tmp_path, data), "--workers", 2)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("msr-dist: ")
    assert "part-00001.parquet, row group 23, column 'user': value -4" in last


def test_metrics_cover_every_row_of_the_test_split(tmp_path, data):
    config = command.write_config(tmp_path, data)
    assert command.call("train", config, "--workers", 3).returncode == 0
    report = json.loads((tmp_path / "runs/run/metrics.json").read_text())
    assert report["overall"]["rows"] == 750
    assert sum(block["rows"] for block in report["scenarios"].values()) == 750
    assert set(report["scenarios"]) == {"scenario 0", "scenario 1", "scenario 2"}
    done = command.call("evaluate", tmp_path / "runs/run", "--split", "test")
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "runs/run/metrics.json").read_text())
    assert again["overall"]["auc"] == pytest.approx(report["overall"]["auc"], abs=1e-6)
    assert (tmp_path / "runs/run/plan.txt").stat().st_size > 0


def test_lists_that_attention_reads_through_the_command(tmp_path, data):
    words = ["embeddings.features.history.pooling=attention", "model={kind='mlp',widths=[4]}"]
    found = []
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        config = command.write_config(tmp_path / str(workers), data)
        done = command.call("train", config, *words, "--workers", workers)
        assert done.returncode == 0, done.stderr
        found.append(command.losses(tmp_path / str(workers) / "runs/run"))
    agree(found[1], found[0])


def test_single_learns_a_scenario_from_its_own_rows_alone(tmp_path):
    """What the other scenarios' labels say changes nothing, not even a bit."""
    blocks = []
    for flipped in (False, True):
        data = canonical.write(tmp_path / str(flipped), rows=3000)
        if flipped:
            for file in sorted((data / "train").glob("*.parquet")):
                groups = pq.ParquetFile(file)
                tables = [groups.read_row_group(index) for index in range(groups.num_row_groups)]
                with pq.ParquetWriter(file, groups.schema_arrow) as writer:
                    for table in tables:
                        click, scenario = table["click"].to_numpy(), table["scenario"].to_numpy()
                        click = np.where(scenario == 0, click, 1 - click).astype(np.uint8)
                        writer.write_table(table.set_column(table.column_names.index("click"), "click", [click]))
        config = command.write_config(data, data, model={"kind": "single", "backbone": {"kind": "mlp", "widths": [4]}})
        done = command.call("train", config)
        assert done.returncode == 0, done.stderr
        blocks.append(json.loads((data / "runs/run/metrics.json").read_text())["scenarios"])
    plain, changed = blocks
    assert changed["scenario 0"] == plain["scenario 0"]
    assert plain["scenario 0"]["auc"] > 0.55
    for name in ("scenario 1", "scenario 2"):
        assert changed[name]["auc"] < 0.5 < plain[name]["auc"]


def test_a_scenario_without_training_rows_is_told_once(tmp_path):
    data = canonical.write(tmp_path / "data", rows=3000)
    schema = FeatureSchema.read(data)
    unseen = Scenario(id=3, name="abroad", rows=0)
    counted = [scenario.model_copy(update={"rows": 1000}) for scenario in schema.scenarios]
    schema.model_copy(update={"scenarios": (*counted, unseen)}).save(data)
    (file,) = (data / "test").glob("part-00000.parquet")
    table = pq.read_table(file)
    abroad = table.set_column(
        table.column_names.index("scenario"), "scenario", [np.full(table.num_rows, 3, dtype=np.int32)]
    )
    pq.write_table(abroad, data / "test" / "part-00002.parquet", row_group_size=5)
    done = command.call("train", command.write_config(tmp_path, data), "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no training rows of scenario 'abroad'") == 1
    report = json.loads((tmp_path / "runs/run/metrics.json").read_text())
    assert report["scenarios"]["abroad"]["rows"] == table.num_rows
    assert report["scenarios"]["abroad"]["auc"] > 0.5


def test_fewer_workers_are_those_that_the_run_can_go_on_with(tmp_path, data):
    run = load(RunConfig, command.write_config(tmp_path, data, loader={"batch_size": 120, "partitions": 12}))
    assert fewer_workers(run, None, 8) == ()
    assert fewer_workers(run, 2, 8) == (2, 3, 4, 6)
    with pytest.raises(ValueError, match="--min-workers 9 is more than --workers 8"):
        fewer_workers(run, 9, 8)
    with pytest.raises(ValueError, match=r"--min-workers 7: no number from 7 to 7 divides loader.partitions = 12"):
        fewer_workers(run, 7, 8)
    given = run.parallel.model_copy(update={"tables": {"users": TableSharding(sharding=("table_wise",), ranks=(5,))}})
    with pytest.raises(ValueError, match=r"parallel.tables.users.ranks is for one number of workers"):
        fewer_workers(run.model_copy(update={"parallel": given}), 2, 8)


def test_open_tables_need_rows_for_every_number_of_workers(tmp_path):
    vocabularies.schema(rows=32 * 4).save(tmp_path)
    run = load(RunConfig, command.write_config(tmp_path, tmp_path, loader={"batch_size": 120, "partitions": 12}))
    assert fewer_workers(run, 1, 6) == (1, 2, 4)
    with pytest.raises(ValueError, match=r"no number from 3 to 3 divides loader.partitions = 12 and rows of open"):
        fewer_workers(run, 3, 4)
