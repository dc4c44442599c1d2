"""Every model file, small schemas and random inputs for it."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

import msr_dist.models
from msr_dist.batch import ScenarioBatch
from msr_dist.config import kind_config
from msr_dist.models.base import Backbone, BackboneConfig, Inputs, ModelConfig
from msr_dist.schema import Feature, FeatureSchema, Knowledge, Label, Numeric, Scenario, Table

FOLDER = Path(msr_dist.models.__file__).parent


def kinds(settings: type[ModelConfig]) -> list[str]:
    """The files of models whose class of settings is one of those."""
    stems = sorted(file.stem for file in FOLDER.glob("[!_]*.py"))
    found = {stem: getattr(importlib.import_module(f"msr_dist.models.{stem}"), "Config", object) for stem in stems}
    return [stem for stem, cls in found.items() if issubclass(cls, settings)]


KINDS = kinds(BackboneConfig)
AROUND = {"single": "mlp", "llm4msr": "star"}
"""Models around another one, and which one that is here."""
SCENARIOS = 13
"""No layer's width or bank is of this size, so a parameter of this length is one line per scenario."""
ABSENT = 10
KNOWN = 6
"""Width of what is known of a user."""


def schema(labels: int = 1, scenarios: int = SCENARIOS) -> FeatureSchema:
    return FeatureSchema(
        user="user",
        item="item",
        labels=tuple(Label(name=f"label{t}") for t in range(labels)),
        scenarios=tuple(Scenario(id=s, name=f"scenario{s}") for s in range(scenarios)),
        tables=(Table(name="user", rows=9, width=8), Table(name="item", rows=9, width=12)),
        features=(Feature(name="user", table="user", group="user"), Feature(name="item", table="item", group="item")),
        numerics=(Numeric(name="age"), Numeric(name="hour")),
        knowledge=Knowledge(folder=Path("knowledge"), width=KNOWN, scenarios=_vectors(scenarios)),
    )


def _vectors(scenarios: int) -> tuple[tuple[float, ...], ...]:
    drawn = torch.randn(scenarios, 10, generator=torch.Generator().manual_seed(6))
    return tuple(tuple(vector) for vector in drawn.tolist())


def config(kind: str, **settings: Any) -> Any:
    """The default settings of `kind`, and those of `settings` that it knows; models around others hand them on."""
    if kind in AROUND and "backbone" not in settings:
        settings["backbone"] = config(AROUND[kind], **settings)
    cls = kind_config("msr_dist.models", kind)
    return cls(**{"kind": kind} | {name: value for name, value in settings.items() if name in cls.model_fields})


def build(kind: str, labels: int = 1, scenarios: int = SCENARIOS, seed: int = 0, **settings: Any) -> Backbone:
    torch.manual_seed(seed)
    return config(kind, **settings).build(schema(labels, scenarios))


def inputs(scenario: torch.Tensor, seed: int = 1) -> Inputs:
    """Random leaves that want a gradient, one row per entry of `scenario`."""
    generator = torch.Generator().manual_seed(seed)
    groups = {
        name: torch.randn(len(scenario), width, generator=generator).requires_grad_()
        for name, width in schema().group_widths().items()
    }
    user = torch.randint(max(1, len(scenario) // 3), (len(scenario),), generator=generator)
    return Inputs(groups, scenario, torch.arange(len(scenario)) + 1000, user=user, knowledge=said(user))


def said(user: torch.Tensor) -> torch.Tensor:
    """What is known of some users; of every fourth one, nothing."""
    table = torch.randn(100, KNOWN, generator=torch.Generator().manual_seed(7))
    known = (user % 4 != 0)[:, None].float()
    return torch.cat([table[user % 100] * known, known], dim=1)


def mixed(rows: int, seed: int = 1) -> Inputs:
    """Rows of all scenarios but `ABSENT`, in random order."""
    present = torch.tensor([s for s in range(SCENARIOS) if s != ABSENT])
    scenario = present[torch.arange(rows) % len(present)]
    return inputs(scenario[torch.randperm(rows, generator=torch.Generator().manual_seed(seed))], seed)


def take(batch: Inputs, index: Any) -> Inputs:
    """Some rows of `batch`, as leaves of their own."""
    groups = {name: x.detach()[index].requires_grad_() for name, x in batch.groups.items()}
    return replace(batch.take(torch.arange(len(batch.row))[index]), groups=groups)


def listed_schema() -> FeatureSchema:
    """The schema with a list of items that attention reads."""
    clicks = Feature(name="clicks", table="item", group="user", pooling="attention")
    return schema().model_copy(update={"features": (*schema().features, clicks)})


def train(model: Backbone, batch: Inputs, steps: int = 3) -> Backbone:
    """A few steps, so that nothing is as it was at the start."""
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(batch) - batch.row[:, None] % 3).square().mean().backward()
        optimizer.step()
    return model


def looked_up(scenario: torch.Tensor) -> tuple[ScenarioBatch, KeyedTensor]:
    """A batch with one row per entry of `scenario`, and what the tables said about it."""
    rows = len(scenario)
    generator = torch.Generator().manual_seed(4)
    batch = ScenarioBatch(
        ids=KeyedJaggedTensor(["user", "item"], torch.arange(2 * rows), lengths=torch.ones(2 * rows).long()),
        numeric=torch.randn(rows, 2, generator=generator),
        scenario=scenario,
        labels=torch.zeros(rows, 1),
        weights=torch.ones(rows, 1),
        row=torch.arange(rows),
        rows_per_rank=float(rows),
    )
    return batch, KeyedTensor(["user", "item"], [8, 12], torch.randn(rows, 20, generator=generator))


def known(batch: ScenarioBatch) -> KeyedTensor:
    """What the table of knowledge said about the users of a batch: with columns that only fill up."""
    table = torch.cat([said(batch.ids["user"].values()), torch.full((len(batch.row), 3), 9.0)], dim=1)
    return KeyedTensor(["user"], [KNOWN + 4], table)


def given(batch: ScenarioBatch, pooled: KeyedTensor, scenario: torch.Tensor) -> Inputs:
    """What the head makes of them for the backbone, under any scenarios."""
    user = batch.ids["user"].values()
    return Inputs(pooled_groups(batch, pooled), scenario, batch.row, user=user, knowledge=said(user))


def pooled_groups(batch: ScenarioBatch, pooled: KeyedTensor) -> dict[str, torch.Tensor]:
    """The groups that the head makes of them."""
    return {"user": pooled["user"], "item": pooled["item"], "context": batch.numeric}
