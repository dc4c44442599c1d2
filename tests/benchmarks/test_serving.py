"""The benchmark of serving through the real command."""

import json
import sys
from pathlib import Path

import pytest

import command

SERVING = [sys.executable, str(Path(__file__).parents[2] / "benchmarks" / "serving.py")]


def test_a_request_beside_the_backbones(tmp_path):
    out = tmp_path / "serving.jsonl"
    words = ("--backbones", "mlp", "--threads", "1", "--rounds", "2", "--candidates", "20", "--out", str(out))
    done = command.call(*words, launched_by=SERVING)
    assert done.returncode == 0, done.stderr
    assert "20 candidates of one user, 5 scenarios, dense part alone, cpu:" in done.stdout
    assert "| request | mlp, threads 1, wall | mlp, threads 1, CPU |" in done.stdout
    (line,) = map(json.loads, out.read_text().splitlines())
    assert line["ratio"]["backbone"] == line["cpu_ratio"]["backbone"] == 1
    assert min(line["milliseconds"].values()) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--backbones", "foo"), "argument --backbones: unknown kind 'foo'"),
        (("--rounds", "0"), "argument --rounds: 0 is no whole number from 1 on"),
    ],
)
def test_wrong_words_end_in_one_line(words, message):
    done = command.call(*words, launched_by=SERVING)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
