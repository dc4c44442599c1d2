"""Runs of the real command on data in an object store."""

import pytest

import buckets
import canonical
import command
from msr_dist.cli import main

SHORT = {"stages": [{"epochs": 1}]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return canonical.write(tmp_path_factory.mktemp("data"), rows=1500)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bucket_gives_the_losses_of_a_folder(tmp_path, data, reached, workers):
    uri = reached.upload(data, "ml")
    config = command.write_config(tmp_path, data, **SHORT)
    local = command.call("train", config, "--workers", workers)
    assert local.returncode == 0, local.stderr
    remote = command.call("train", config, f"data={uri}", "name=remote", "--workers", workers)
    assert remote.returncode == 0, remote.stderr
    runs = tmp_path / "runs"
    assert len(command.losses(runs / "run")) == 13
    assert command.losses(runs / "remote") == command.losses(runs / "run")
    metrics = (runs / "run/metrics.json").read_bytes()
    assert (runs / "remote/metrics.json").read_bytes() == metrics

    (runs / "remote/metrics.json").unlink()
    again = command.call("evaluate", runs / "remote", "--workers", workers)
    assert again.returncode == 0, again.stderr
    assert (runs / "remote/metrics.json").read_bytes() == metrics
    written = [file.read_bytes() for file in (runs / "remote").rglob("*") if file.is_file()]
    printed = [text.encode() for done in (remote, again) for text in (done.stdout, done.stderr)]
    assert uri.encode() in b"".join(written)
    assert buckets.SECRET.encode() not in b"".join(written + printed)


def called(capsys, *words) -> tuple[int, str]:
    """The status, and what was said of it."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code, capsys.readouterr().err.strip()


def test_a_plan_needs_the_schema_in_the_bucket_alone(tmp_path, data, reached, capsys):
    uri = reached.upload(data, "planned")
    config = command.write_config(tmp_path, uri, **SHORT)
    assert called(capsys, "plan", config, "--cpus", 2, "--memory", "8GiB") == (0, "")
    assert reached.requests(f"{uri}/schema.toml")
    assert not reached.requests(f"{uri}/train/part-00000.parquet")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data=s3://nowhere/ml", "s3://nowhere/ml: When listing objects"),
        ("data=s3://bucket/absent", "s3://bucket/absent: no schema.toml there; make the data with `msr-dist prepare`"),
        ("data=s3://key:hidden@bucket/ml", "data: expected a folder, or s3://BUCKET/FOLDER"),
        ("model.kind=two_tower", "data: model.kind 'two_tower' needs them in a folder of a file system"),
        ("loader.partitions=100", "/train: 30 row groups cannot feed 100 partitions"),
    ],
)
def test_what_is_wrong_with_remote_data_gets_one_line(tmp_path, data, reached, capsys, override, says):
    model = {} if "two_tower" not in override else {"model": {}}
    config = command.write_config(tmp_path, reached.upload(data, "wrong"), **SHORT, **model)
    status, said = called(capsys, "train", config, override)
    assert status == 2
    assert said.startswith("msr-dist: ")
    assert says in said
    assert "hidden" not in said
    assert "\n" not in said
    assert not (tmp_path / "runs").exists()


def test_a_damaged_object_ends_a_run_before_it_begins(tmp_path, data, reached, capsys):
    uri = reached.upload(data, "cut")
    file = "valid/part-00000.parquet"
    reached.replace(f"{uri}/{file}", (data / file).read_bytes()[:-100])
    status, said = called(capsys, "train", command.write_config(tmp_path, uri))
    assert status == 2
    assert said.startswith(f"msr-dist: {uri}/{file}: not a readable parquet file")
    assert "\n" not in said


def test_nothing_is_prepared_into_a_folder_called_like_a_bucket(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, said = called(capsys, "prepare", "synthetic", "s3://bucket/data", "rows=100")
    assert (status, "expected a folder of a file system, not s3://" in said) == (2, True)
    assert not list(tmp_path.iterdir())
