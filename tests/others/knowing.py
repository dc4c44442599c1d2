"""A model from outside of the package that reads what a language model says of the user."""

from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from msr_dist.models.base import Backbone, BackboneConfig, Inputs
from msr_dist.schema import FeatureSchema


class Config(BackboneConfig):
    kind: Literal["others.knowing"] = "others.knowing"
    vectors: Literal["knowledge", "random", "shuffled", "trained"] = "knowledge"
    reads_knowledge: ClassVar[bool] = True

    def adapt(self, schema: FeatureSchema) -> FeatureSchema:
        assert schema.knowledge is not None
        knowledge = schema.knowledge.model_copy(update={"vectors": self.vectors})
        return schema.model_copy(update={"knowledge": knowledge})

    def build(self, schema: FeatureSchema) -> "Knowing":
        return Knowing(schema)


@final
class Knowing(Backbone):
    def __init__(self, schema: FeatureSchema) -> None:
        super().__init__()
        assert schema.knowledge is not None
        labels = len(schema.labels)
        self.features = nn.Linear(schema.input_width, labels)
        self.knowledge = nn.Sequential(nn.Linear(schema.knowledge.width + 1, 8), nn.Tanh(), nn.Linear(8, labels))
        self.scenario = nn.Linear(len(schema.knowledge.scenarios[0]), labels)
        vectors = torch.tensor(schema.knowledge.scenarios)
        self.register_buffer("vectors", vectors, persistent=False)

    def forward(self, inputs: Inputs) -> Tensor:
        assert inputs.knowledge is not None
        scenario = self.scenario(self.vectors[inputs.scenario])
        return self.features(inputs.joined()) + self.knowledge(inputs.knowledge) + scenario
