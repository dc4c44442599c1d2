"""The benchmark of extraction through the real command, with a model of a few thousand weights."""

import json
import sys
from pathlib import Path

import pytest

import command
import tinymodel

EXTRACTION = [sys.executable, str(Path(__file__).parents[2] / "benchmarks" / "extraction.py")]


@pytest.fixture
def words(tmp_path):
    model = tinymodel.llama(tmp_path / "model")
    return ("--model", str(model), "--prompts", "4", "--rounds", "1", "--results", str(tmp_path / "all.jsonl"))


def test_techniques(words, tmp_path):
    done = command.call("techniques", *words, launched_by=EXTRACTION)
    assert done.returncode == 0, done.stderr
    assert "| + shared prefix once | fp32 |" in done.stdout
    line = json.loads((tmp_path / "all.jsonl").read_text())
    assert min(way["least_cosine"] for way in line["ways"]) > 0.999
    assert len({way["tokens_per_second"] > 0 for way in line["ways"]}) == 1


def test_workers(words, tmp_path):
    done = command.call("workers", *words, launched_by=EXTRACTION)
    assert done.returncode == 0, done.stderr
    assert "ratio, median of 1 rounds" in done.stdout
    assert json.loads((tmp_path / "all.jsonl").read_text())["ratio"] > 0
