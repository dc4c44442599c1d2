"""The benchmarks of reading and training through the real command."""

import json
import sys
from pathlib import Path

import pytest

import canonical
import command

THROUGHPUT = [sys.executable, str(Path(__file__).parents[2] / "benchmarks" / "throughput.py")]
LESS = ("loader.partitions=6", "embeddings.init_scale=0.3")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    canonical.write(folder, rows=3000)
    return folder


def measured(tmp_path, *words):
    """The line that the command kept."""
    out = tmp_path / "results"
    done = command.call(*words, "--results", out, launched_by=THROUGHPUT, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "| measured " in done.stdout
    (file,) = out.iterdir()
    line = json.loads(file.read_text().splitlines()[-1])
    assert line["machine"]["torch"]
    assert line["commit"]
    return line


def test_a_loader_beside_bare_decoding(tmp_path, data):
    line = measured(tmp_path, "loader", "--data", data, "--rounds", 1, "--batch-size", 200)
    assert line["rows_per_cpu_second"]["loader"] > 0
    assert line["shares"]["pyarrow"] == pytest.approx(
        line["rows_per_cpu_second"]["loader"] / line["rows_per_cpu_second"]["pyarrow"], rel=0.01
    )
    assert line["shares"]["pyarrow in 2 threads"] > 0


def test_a_step_of_two_processes_and_its_trace(tmp_path, data):
    trace = tmp_path / "trace.json"
    words = ("--rounds", 1, "--steps", 2, "--batch-size", 60, "--workers", 2, "--times", 3, "--profile", trace)
    line = measured(tmp_path, "step", "--data", data, "--model", "mlp", *words, *LESS)
    assert (line["workers"], line["batch_size"], line["settings"]) == (
        2,
        120,
        {"precision": "fp32", "dense_rows": None},
    )
    assert line["table_rows"] == 3 * (canonical.USERS + canonical.ITEMS + canonical.TAGS)
    assert line["cpu_seconds_per_million_rows"]["memory"] > 0
    assert json.loads(trace.read_text())["traceEvents"]


def test_how_long_one_waits_for_the_first_step(tmp_path, data):
    words = ("--data", data, "--model", "mlp", "--workers", 2, "--rounds", 1, "--batch-size", 60)
    line = measured(tmp_path, "start", *words, *LESS, "stages.0.epochs=1000")
    assert (line["workers"], line["launcher"]) == (2, "local")
    assert 1 < line["first_step_seconds"] < 200
    assert 0 <= line["stop_seconds"] < 100


def test_a_run_that_cannot_begin_is_told_in_one_line(tmp_path, data):
    words = ("start", "--data", data, "--model", "mlp", "--rounds", 1, "--batch-size", 60)
    done = command.call(*words, "--results", tmp_path, *LESS, "loader.partitions=1000", launched_by=THROUGHPUT)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert "ended with 2: " in line
    assert "cannot feed 1000 partitions" in line
    done = command.call(*words, "log_every=2", launched_by=THROUGHPUT)
    assert done.returncode == 2
    assert "log_every=2: the command sets it itself" in done.stderr
    assert not list(tmp_path.iterdir())


def test_epochs_beside_steps_in_memory_and_what_they_learn(tmp_path, data):
    words = ("--rounds", 2, "--batch-size", 60, "--workers", 2, "--judge", *LESS, "precision=bf16", "dense_rows=50")
    line = measured(tmp_path, "end-to-end", "--data", data, "--model", "mlp", *words)
    assert set(line["cpu_seconds_per_million_rows"]) == {"parquet", "memory"}
    assert line["auc"]["valid/overall/auc"] > 0.5
    assert line["settings"] == {"precision": "bf16", "dense_rows": 50}
    assert line["given"] == [*LESS, "precision=bf16", "dense_rows=50"]


def test_a_checkpoint(tmp_path, data):
    line = measured(tmp_path, "checkpoint", "--data", data, "--model", "mlp", "--rounds", 1, "--batch-size", 120, *LESS)
    assert line["bytes_by_tensors"] >= 1
    assert line["save_seconds"] > 0
    assert line["call_by_save"] > 0


def test_lookups_of_two_tables_and_small_ones(tmp_path):
    words = ("--rows", 1000, "--width", 8, "--precision", "fp16", "--steps", 2, "--rounds", 1, "--batch-size", 4096)
    line = measured(tmp_path, "lookup", *words)
    assert (line["table_rows"], line["width"], line["precision"]) == (2 * 1000 + 166_670, 8, "fp16")
    rates, rows = line["gb_per_cpu_second"], line["rows_per_cpu_second"]
    # 11 vectors of 8 fp16 numbers are read for a row.
    assert rates["forward"] == pytest.approx(rows["forward"] * 11 * 8 * 2 / 1e9, abs=0.01)
    assert rows["both"] == pytest.approx(1 / (1 / rows["forward"] + 1 / rows["backward"]), rel=0.01)
    assert set(rates) == {"forward", "backward", "gathered", "copied"}
    assert line["share_of_gathered"]["forward"] > line["share_of_copied"]["forward"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("step", "--model", "foo"), "'foo' is not one of"),
        (("step", "precision=fp8"), "precision: Input should be 'fp32' or 'bf16'"),
        (("lookup", "--width", 6), "embeddings.width: Input should be a multiple of 4"),
        (("loader", "--data", "nothing"), "nothing: no schema.toml there"),
        (("plain",), "the plain trainer knows data of single-valued ids alone"),
    ],
)
def test_wrong_words_end_in_one_line(tmp_path, data, words, message):
    read = () if words[0] == "lookup" or "--data" in words else ("--data", data)
    done = command.call(*words, *read, "--results", tmp_path, launched_by=THROUGHPUT)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
