"""Small pairs of towers, and rows for their objectives."""

from typing import Any

import torch
from backbones import inputs, kinds, schema

from msr_dist.config import kind_config
from msr_dist.models.objectives import Shown
from msr_dist.models.towers import TowersConfig, TwoTower
from msr_dist.schema import FeatureSchema

KINDS = kinds(TowersConfig)
SIZES: dict[str, dict[str, Any]] = {
    "sass": {"widths": (11, 7), "bias_widths": (6,), "scenario_width": 3},
    "two_tower": {"widths": (17, 9), "out_width": 5, "scenario_width": 3},
}


def config(kind: str, **settings: Any) -> TowersConfig:
    """Settings of small towers, and those given."""
    return kind_config("msr_dist.models", kind)(**{"kind": kind} | SIZES[kind] | settings)


def build(kind: str, data: FeatureSchema | None = None, seed: int = 0, **settings: Any) -> TwoTower:
    """Small towers with random parameters, biases included."""
    towers_config = config(kind, **settings)
    torch.manual_seed(seed)
    towers = towers_config.build(towers_config.adapt(schema() if data is None else data))
    for parameter in towers.parameters():
        parameter.data.normal_(0, 0.5)
    return towers


def choices(rows: int, seed: int = 1, scenarios: int = 4) -> Shown:
    """Rows of few scenarios, in which items are chosen or not, and recur; the last two only fill up."""
    generator = torch.Generator().manual_seed(seed)
    weights = 0.2 + 2 * torch.rand(rows, 1, generator=generator)
    weights[-2:] = 0
    return Shown(
        inputs(torch.randint(scenarios, (rows,), generator=generator), seed),
        user=torch.randint(9, (rows,), generator=generator),
        item=torch.randint(6, (rows,), generator=generator),
        labels=(torch.rand(rows, 1, generator=generator) < 0.7).float(),
        weights=weights,
        log_share=-3 * torch.rand(rows, generator=generator),
    )


def views(rows: int, seed: int = 1, scenarios: int = 4) -> Shown:
    """Pairs of views of users and of items that recur, of few scenarios; the last pair only fills up."""
    generator = torch.Generator().manual_seed(seed)
    pairs = rows // 2
    both = torch.stack([torch.randperm(scenarios, generator=generator)[:2] for _ in range(pairs)]).flatten()
    of_user = torch.rand(pairs, 1, generator=generator) < 0.5
    weights = 0.2 + 2 * torch.rand(pairs, 2, generator=generator)
    weights[-1] = 0
    user, item = (torch.randint(4, (pairs,), generator=generator).repeat_interleave(2) for _ in range(2))
    return Shown(
        inputs(both, seed),
        user=user,
        item=item,
        labels=torch.cat([of_user, ~of_user], dim=1).float().repeat_interleave(2, dim=0),
        weights=weights.repeat_interleave(2, dim=0),
        log_share=torch.zeros(rows),
    )
