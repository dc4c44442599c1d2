import os
import signal
import subprocess
import sys

import psutil
import pytest
import torch

import canonical
import command
from msr_dist.cli import main


def test_help_teaches_and_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from msr_dist.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'ray', 'mlflow', 'duckdb', 'pyarrow', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Examples:" in done.stdout
    assert "--dry-run" in done.stdout


@pytest.mark.parametrize(
    "command", ["prepare", "extract", "compress", "prompts", "train", "evaluate", "report", "submit"]
)
def test_every_command_shows_an_example(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"msr-dist {command} " in capsys.readouterr().out


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return canonical.write(tmp_path_factory.mktemp("data"), rows=1500)


def refused(capsys, *words) -> str:
    """The one line that a wrong call gets, with status 2."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("msr-dist: ")
    return lines[0]


def test_a_dry_run_prints_configuration_and_plan_and_writes_nothing(tmp_path, data, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", str(command.write_config(tmp_path, data)), "--dry-run", "--workers", "2"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert 'kind = "star"' in printed
    assert "users  | " in printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("loader.batchsize=3", "loader.batchsize: unknown key; did you mean 'batch_size'?"),
        ("model.kind=stra", "model: unknown kind 'stra'; did you mean 'star'?"),
        ("seed=abc", "seed: Input should be a valid integer (got 'abc')"),
        ("stages=[]", "stages: "),
        ("name='a/b'", "name: "),
        ("name='..'", "name: "),
        ("seed=99999999999999999999999", "seed: "),
        ("tracking.uri='http://alice:s3cret@host'", "tracking.uri: http://***@host holds credentials"),
        (
            "parallel.tables.foo.sharding=['row_wise']",
            "parallel.tables: no table 'foo' in the data; it has users, items",
        ),
        ("stages.0.schedule={final=0.5}", "needs a decay"),
        ("loader.partitions=5", "world size 2 does not divide 5 partitions"),
        ("loader.partitions=100", "30 row groups cannot feed 100 partitions"),
        ("dense_rows=0", "dense_rows: Input should be greater than or equal to 1"),
        ("dense_rows=10", "dense_rows: model.kind 'star' sees a batch as a whole (ScenarioNorm)"),
        ("loader.batch_size=2", "train: batch_size 2 leaves a partition without rows"),
        (
            "embeddings.tables.itmes.width=8",
            "embeddings.tables: no table 'itmes' in the data; it has users, items, tags",
        ),
        ("data=/nowhere", "/nowhere: no schema.toml there; make the data with `msr-dist prepare`"),
        ("stages=[{sparse={kind='adam'}}]", "fbgemm has no fused Adam for CPU"),
        ("parallel.tables.users.sharding=['column_wise']", "column_wise does not go with rowwise_adagrad"),
        ("tracking.uri='file:/tmp/x'", "tracking.uri: "),
    ],
)
def test_a_wrong_setting_gets_one_line(tmp_path, data, capsys, override, says):
    assert says in refused(capsys, "train", command.write_config(tmp_path, data), override, "--workers", 2)
    assert not (tmp_path / "runs").exists()


def test_wrong_paths_get_one_line(tmp_path, data, capsys):
    config = command.write_config(tmp_path, data)
    assert "Not a directory" in refused(capsys, "train", config, f"runs={config}")
    assert "no such file" in refused(capsys, "train", tmp_path / "absent.toml")
    assert "no config.toml there" in refused(capsys, "evaluate", tmp_path)
    assert "unknown kind 'nothing'" in refused(capsys, "prepare", "nothing", tmp_path / "out")
    assert "rows" in refused(capsys, "prepare", "synthetic", tmp_path / "out", "rows=-5")
    assert "unknown key" in refused(capsys, "prepare", "synthetic", tmp_path / "out", "rwos=5")
    command.write_config(tmp_path, data)
    (tmp_path / "runs/new").mkdir(parents=True)
    config = (tmp_path / "run.toml").read_text()
    (tmp_path / "runs/new/config.toml").write_text(config)
    assert "no checkpoint there; train the run first" in refused(capsys, "evaluate", tmp_path / "runs/new")


def test_prepare_writes_data_that_train_takes(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["prepare", "synthetic", str(tmp_path / "data"), "rows=3000", "users=100", "items=50", "scenarios=3"])
    assert end.value.code == 0
    assert "rows: train 2," in capsys.readouterr().out
    config = command.write_config(tmp_path, tmp_path / "data", loader={"batch_size": 256}, stages=[{"epochs": 1}])
    done = command.call("train", config)
    assert done.returncode == 0, done.stderr
    assert "best AUC" in done.stdout
    assert "next     msr-dist evaluate" in done.stdout
    assert "Traceback" not in done.stderr
    done = command.call("evaluate", tmp_path / "runs/run", "--split", "valid", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/run/metrics-valid.json").exists()


@pytest.mark.parametrize(
    ("words", "ahead"),
    [
        (["train", "absent.toml", "--workers", "2"], "msr_dist.train"),
        (["train", "absent.toml", "--workers", "2", "--dry-run"], None),
        (["evaluate", "absent", "--workers", "2"], "msr_dist.evaluate"),
        (["export-index", "absent", "--workers", "2"], "msr_dist.index"),
    ],
)
def test_local_ranks_begin_to_load_before_the_run_is_read(capsys, monkeypatch, words, ahead):
    begun = []
    monkeypatch.setattr("msr_dist.cli.load_ahead", lambda *given: begun.append(given))
    refused(capsys, *words)
    assert begun == ([("local", 2, ahead)] if ahead else [])


LAUNCHES = [("local", 2, torch.version.cuda is None), ("local", 1, False), ("ray", 2, False)]


@pytest.mark.parametrize(("launcher", "workers", "begins"), LAUNCHES)
def test_what_local_ranks_are_copies_of_ends_with_the_command(tmp_path, launcher, workers, begins):
    """Before it has loaded all, and without a trace."""
    (tmp_path / "endless.py").write_text("import time\ntime.sleep(200)\n")
    code = (
        "from msr_dist.launch import call_and_leave, load_ahead\n"
        "import psutil, sys\n"
        "def command():\n"
        f"    load_ahead({launcher!r}, {workers}, 'endless')\n"
        "    print(any('forkserver' in ' '.join(child.cmdline()) for child in psutil.Process().children()))\n"
        "    sys.exit(3)\n"
        "call_and_leave(command)\n"
    )
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert (done.returncode, done.stdout) == (3, f"{begins}\n"), done.stderr
    assert not list((tmp_path / "tmp").iterdir())


def test_ctrl_c_while_ranks_load_is_no_traceback(tmp_path, data):
    config = command.write_config(tmp_path, data)
    words = [*command.COMMAND, "train", str(config), "--workers", "2"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not any("forkserver" in " ".join(child.cmdline()) for child in psutil.Process(process.pid).children()):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.strip() == "Aborted!"
