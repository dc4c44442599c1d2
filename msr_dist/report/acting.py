"""How strongly the meta layers of a trained run act, read off the model while it predicts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from msr_dist.batch import ScenarioBatch
from msr_dist.distributed import open_world
from msr_dist.evaluate import evaluation_loader, trained
from msr_dist.models.llm4msr import Llm4msr, ScenarioCodes
from msr_dist.run import RunConfig
from msr_dist.schema import FeatureSchema

SPLIT = "valid"
ROWS = 20_000
"""Rows that are read, about; all of a smaller split."""
BATCH_ROWS = 1_000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Acting:
    """What the parts do in one scenario."""

    rows: int
    known: float | None
    """Share of the rows whose user has a vector."""
    scenario_level: float | None
    """Mean size of what it adds to the logits, over that of what the backbone brings; None where there is none, or
    nothing has taught it, or the backbone brings nothing."""
    user_level: float | None
    """Mean of how far it moves the input, over the input's length, of rows whose input has a length; None where there
    is none."""


@dataclass(frozen=True)
class Reading:
    """What was read off a model."""

    scenarios: dict[str, Acting]
    """Those with rows, in the schema's order."""
    given: Floats | None
    """`[S, d]`: the scenarios' vectors as the model gets them; None where no part of it reads them."""
    made: Floats | None
    """`[S, k]`: the codes that the model has learned to make of them."""

    @property
    def acts(self) -> bool:
        """Whether the model has meta layers."""
        return any(each.user_level is not None or each.scenario_level is not None for each in self.scenarios.values())


def read(run: RunConfig) -> Reading:
    """Load the newest checkpoint of `run`, in this process alone, and watch it predict rows of the valid split.

    Raises:
        ValueError: there is no complete checkpoint, or the data or vectors are not what they were.
    """
    # Small batches, so that few rows can be spread over the whole split.
    sparing = run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"batch_size": BATCH_ROWS})})
    with open_world() as world:
        schema = run.read_schema()
        model = trained(run, schema, world).model.eval()
        wrapper = next(module for module in model.modules() if isinstance(module, Llm4msr))
        sums = _Sums(len(schema.scenarios))
        with torch.no_grad():
            for batch in _spread(sparing, schema):
                batch = batch.to(world.device)
                with _watched(wrapper) as seen:
                    _, predictions = model(batch)
                sums.add(batch.scenario, seen, predictions.logits, wrapper.share)
            given, made = _scenarios(wrapper)
    return Reading(sums.by_scenario(schema), given, made)


@dataclass
class _Seen:
    """What the levels were given and gave, the first time they were called."""

    before: Tensor | None = None
    after: Tensor | None = None
    known: Tensor | None = None
    scenario: Tensor | None = None


@contextmanager
def _watched(wrapper: Llm4msr) -> Iterator[_Seen]:
    """Look at what passes the levels; a model that stands in for an untaught scenario calls them again, unseen."""
    seen, handles = _Seen(), []

    def user(_module: nn.Module, given: tuple[Any, ...], gave: Tensor) -> None:
        if seen.before is None:
            seen.before, seen.after, seen.known = given[0], gave, given[2][:, -1]

    def scenario(_module: nn.Module, _given: tuple[Any, ...], gave: Tensor) -> None:
        if seen.scenario is None:
            seen.scenario = gave

    if wrapper.user_level is not None:
        handles.append(wrapper.user_level.register_forward_hook(user))
    if wrapper.scenario_level is not None:
        handles.append(wrapper.scenario_level.register_forward_hook(scenario))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _Sums:
    """Sums over rows, by scenario."""

    def __init__(self, scenarios: int) -> None:
        self._sums: dict[str, Floats] = {"rows": np.zeros(scenarios)}

    def add(self, scenario: Tensor, seen: _Seen, logits: Tensor, share: Tensor | None) -> None:
        place = scenario.cpu().numpy()
        scenarios = len(self._sums["rows"])
        values = {"rows": torch.ones_like(scenario)}
        if seen.before is not None and seen.after is not None and seen.known is not None:
            length = seen.before.norm(dim=1)
            moved = torch.where(length > 0, (seen.after - seen.before).norm(dim=1) / length, 0)
            values |= {"moved": moved, "movable": length > 0, "known": seen.known}
        if seen.scenario is not None:
            added = seen.scenario if share is None else share * seen.scenario
            values |= {"added": added.abs().mean(dim=1), "backbone": (logits - added).abs().mean(dim=1)}
        for name, value in values.items():
            per_scenario = np.bincount(place, value.double().cpu().numpy(), minlength=scenarios)
            self._sums[name] = self._sums.get(name, np.zeros(scenarios)) + per_scenario

    def by_scenario(self, schema: FeatureSchema) -> dict[str, Acting]:
        def ratio(over: str, under: str, place: int) -> float | None:
            if over not in self._sums or not self._sums[under][place]:
                return None
            return float(self._sums[over][place] / self._sums[under][place])

        return {
            scenario.name: Acting(
                rows=int(self._sums["rows"][place]),
                known=ratio("known", "rows", place),
                scenario_level=ratio("added", "backbone", place) if scenario.taught else None,
                user_level=ratio("moved", "movable", place),
            )
            for place, scenario in enumerate(schema.scenarios)
            if self._sums["rows"][place]
        }


def _spread(run: RunConfig, schema: FeatureSchema) -> Iterator[ScenarioBatch]:
    """Batches at equal distances over the whole split."""
    loader = evaluation_loader(run, schema, SPLIT, 0, 1)
    steps, wanted = loader.order.steps, ROWS // BATCH_ROWS
    for step in sorted({place * steps // wanted for place in range(wanted)}):
        yield from islice(loader.batches(step, step + 1), 1)


def _scenarios(wrapper: Llm4msr) -> tuple[Floats | None, Floats | None]:
    """The scenarios' vectors that the model reads, and the codes that it makes of them."""
    codes = next((module for module in wrapper.modules() if isinstance(module, ScenarioCodes)), None)
    if codes is None:
        return None, None
    return codes.vectors.double().cpu().numpy(), codes().double().cpu().numpy()
