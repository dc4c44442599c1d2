"""Every model on real process groups: tables sharded, the rest under DistributedDataParallel, lists under attention."""

import json

import pytest
from backbones import KINDS, config

import canonical
import launched
from msr_dist.launch import launch

INNER = ("star", "sarnet", "adaptdhm")
"""Models within `single` that run collectives of their own."""


def test_two_ranks_train_every_model_as_one_does(tmp_path):
    """Batches of 30 rows over 5 scenarios: many a rank has no row of some scenario."""
    data = canonical.write(tmp_path / "data", rows=1000, scenarios=5)
    configs = {kind: config(kind, dropout=0.2) for kind in KINDS}
    trained = {"vectors": "trained", "fusion": "weighted", "rank": "full"}
    configs |= {"llm4msr sarnet": config("llm4msr", backbone=config("sarnet", dropout=0.2), **trained)}
    configs |= {f"single {kind}": config("single", backbone=config(kind, dropout=0.2)) for kind in INNER}
    for workers in (1, 2):
        job = launched.EveryModel(data, tmp_path, tuple(configs.values()))
        launch(launched.train_every_model, job, "local", workers, tmp_path)
    alone, spread = (json.loads((tmp_path / f"losses-{workers}.json").read_text()) for workers in (1, 2))
    for name, one, two in zip(configs, alone, spread, strict=True):
        # Default sizes have many a ReLU whose edge a row may cross by the last bit.
        assert two[:4] == pytest.approx(one[:4], rel=2e-6), name
        assert two == pytest.approx(one, rel=2e-3), name
        assert one[0] != one[-1], name


def test_a_dense_part_that_is_computed_in_parts_makes_the_same_steps(tmp_path):
    """A table that is updated once for each part, or a gradient that is summed twice over ranks, would show."""
    data = canonical.write(tmp_path / "data", rows=1000, scenarios=5)
    small = {"widths": (8,), "tower_widths": (4,)}
    configs = config("mlp", **small), config("mmoe", **small), config("mmoe", **small, dropout=0.3)
    losses = {}
    # 30 and 15 rows of a rank: the last part of either has fewer than the others.
    for workers, dense_rows in ((1, None), (1, 7), (2, 7)):
        job = launched.EveryModel(data, tmp_path, configs, dense_rows)
        launch(launched.train_every_model, job, "local", workers, tmp_path)
        losses[workers, dense_rows] = json.loads((tmp_path / f"losses-{workers}.json").read_text())
    for found in losses.values():
        for one, expected in zip(found, losses[1, None], strict=True):
            assert one == pytest.approx(expected, rel=1e-6)
    assert losses[1, 7] != losses[1, None]
