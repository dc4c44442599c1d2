"""One model per scenario: nothing is shared, neither a network nor an embedding.

The baseline that says what a scenario would have on its own, hence what sharing gives or takes (the seesaw).

    logits = backbone_s(x)                   s the row's scenario; x from tables of scenario s alone

All of them train in one run on the same batches: scenario s sees its own rows in the order in which any model sees
them, in batches of its share of the batch size, as often.

- Each backbone is built for a schema with one scenario.
- `adapt` gives every table a vector per id and scenario, so the tables are as many times larger.
- A row costs one backbone, whatever the number of scenarios.
- What differs from S runs of their own: gradients are divided by the rows of all scenarios, which Adam and Adagrad do
  not notice, and a batch without rows of a scenario still is a step of its optimizer (moments and weight decay go on).
"""

from dataclasses import replace
from typing import Annotated, Literal, final

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from msr_dist.config import component
from msr_dist.models.base import Backbone, BackboneConfig, Inputs, Objective, predicting
from msr_dist.models.layers import ScenarioGroups
from msr_dist.models.mlp import Config as Mlp
from msr_dist.schema import FeatureSchema


class Config(BackboneConfig):
    """Settings of the models of single scenarios."""

    kind: Literal["single"] = "single"
    backbone: Annotated[component("msr_dist.models"), AfterValidator(predicting)] = Mlp()  # type: ignore[valid-type]
    """The model of each scenario; by default the plain network."""

    def adapt(self, schema: FeatureSchema) -> FeatureSchema:
        """The schema with vectors of their own for every scenario, in every table."""
        schema = self.backbone.adapt(schema)
        return schema.with_tables(
            {table.name: table.model_copy(update={"per_scenario": True}) for table in schema.tables}
        )

    def build(self, schema: FeatureSchema) -> "Single":
        """The networks for this schema."""
        return Single(self, schema)


@final
class Single(Backbone):
    """As many backbones as scenarios."""

    def __init__(self, config: Config, schema: FeatureSchema) -> None:
        super().__init__()
        alone = [
            schema.model_copy(update={"scenarios": (each.model_copy(update={"id": 0}),)}) for each in schema.scenarios
        ]
        self.backbones = nn.ModuleList(config.backbone.build(each) for each in alone)

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits `[B, T]`."""
        return self.objective(inputs).logits

    def objective(self, inputs: Inputs) -> Objective:
        """Each row's objective under its own scenario's backbone."""
        groups = ScenarioGroups.of(inputs.scenario, len(self.backbones))
        # Grouped once: rows picked for each scenario would each have a gradient of the whole batch's size.
        grouped = inputs.take(groups.order).split(groups.sizes)
        parts = []
        for backbone, own in zip(self.backbones, grouped, strict=True):
            assert isinstance(backbone, Backbone)
            parts.append(backbone.objective(replace(own, scenario=torch.zeros_like(own.scenario))))

        def together(pieces: list[Tensor | None]) -> Tensor | None:
            known = [piece for piece in pieces if piece is not None]
            return groups.restore(torch.cat(known)) if known else None

        return Objective(
            groups.restore(torch.cat([part.logits for part in parts])),
            together([part.weight for part in parts]),
            together([part.penalty for part in parts]),
        )
