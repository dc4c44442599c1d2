"""The benchmark of steps through the real command."""

import sys
from pathlib import Path

import pytest

import command

SCENARIOS = [sys.executable, str(Path(__file__).parents[2] / "benchmarks" / "scenarios.py")]


def test_steps_by_number_of_scenarios():
    words = ("--models", "mlp", "--scenarios", "2", "3", "--steps", "1", "--batch-size", "64", "--shares", "even")
    done = command.call(*words, launched_by=SCENARIOS)
    assert done.returncode == 0, done.stderr
    assert "64 rows a step, shares even, cpu, threads 1:" in done.stdout
    assert "| model | 2 scenarios | 3 scenarios |" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--models", "foo"), "argument --models: unknown kind 'foo'"),
        (("--steps", "0"), "argument --steps: 0 is no whole number from 1 on"),
    ],
)
def test_wrong_words_end_in_one_line(words, message):
    done = command.call(*words, launched_by=SCENARIOS)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
