"""Embedding tables and a backbone as one module: a batch goes in, a loss and logits come out."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedTensor

from msr_dist.batch import ScenarioBatch
from msr_dist.config import Config
from msr_dist.models.base import Backbone, Inputs
from msr_dist.schema import FeatureSchema, Table

PRECISIONS = {"fp32": DataType.FP32, "fp16": DataType.FP16}


class TableOverride(Config):
    """What a run changes about one table of the schema."""

    width: int | None = Field(default=None, ge=4, multiple_of=4)
    precision: Literal["fp32", "fp16"] | None = None


class EmbeddingsConfig(TableOverride):
    """Widths and precisions of the tables; what is not said stays as the schema has it."""

    init_scale: float = Field(default=0.3, gt=0)
    """Vectors start uniform in ± init_scale / sqrt(width)."""
    tables: dict[str, TableOverride] = {}
    """Exceptions, by table name."""

    def apply(self, schema: FeatureSchema) -> FeatureSchema:
        """The schema with this run's tables."""
        known = [table.name for table in schema.tables]
        unknown = sorted(set(self.tables) - set(known))
        if unknown:
            raise ValueError(f"embeddings.tables: no table {unknown[0]!r} in the data; it has {', '.join(known)}")
        return schema.with_tables({table.name: self._table(table) for table in schema.tables})

    def _table(self, table: Table) -> Table:
        changes = self.model_dump(include={"width", "precision"}, exclude_none=True)
        if table.name in self.tables:
            changes |= self.tables[table.name].model_dump(exclude_none=True)
        return table.model_copy(update=changes)


@dataclass
class Predictions:
    """What a forward pass says about its rows. `B` rows, `T` labels."""

    logits: Tensor
    """`[B, T]`, detached."""
    loss: Tensor
    """Scalar, detached: this rank's part of the loss, whose average over ranks is the loss of the global batch."""


class Recommender(nn.Module):
    """The whole model: sharded tables below, everything dense in `head`."""

    def __init__(self, schema: FeatureSchema, backbone: Backbone, config: EmbeddingsConfig) -> None:
        """`schema` must be the one that `config` was applied to. Tables take no memory before they are sharded."""
        super().__init__()
        self.embeddings = EmbeddingBagCollection(
            tables=[_bag(table, schema, config.init_scale) for table in schema.tables if _features(table, schema)],
            device=torch.device("meta"),
        )
        self.head = Head(schema, backbone)

    def forward(self, batch: ScenarioBatch) -> tuple[Tensor, Predictions]:
        """The loss to minimise and the predictions of this rank's rows."""
        result: tuple[Tensor, Predictions] = self.head(self.embeddings(batch.ids), batch)
        return result


class Head(nn.Module):
    """Everything after the lookup. It holds no table, so TorchRec's tracer never looks inside: backbones may branch."""

    def __init__(self, schema: FeatureSchema, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self._groups = list(schema.group_widths())
        self._features = [[f.name for f in schema.features if f.group == group] for group in self._groups]
        self._numerics = [[i for i, n in enumerate(schema.numerics) if n.group == group] for group in self._groups]
        self._averaged = {feature.name for feature in schema.features if feature.pooling == "mean"}

    def forward(self, embedded: KeyedTensor, batch: ScenarioBatch) -> tuple[Tensor, Predictions]:
        """The backbone's loss, averaged over the rows of all ranks."""
        objective = self.backbone.objective(Inputs(self._join(embedded, batch), batch.scenario, batch.row))
        loss = objective.loss(batch.labels, batch.weights) / batch.rows_per_rank
        return loss, Predictions(objective.logits.detach(), loss.detach())

    def _join(self, embedded: KeyedTensor, batch: ScenarioBatch) -> dict[str, Tensor]:
        # By name: the order of KeyedTensor.values() changes with the sharding plan.
        columns: dict[str, Tensor] = embedded.to_dict()
        for name in self._averaged:
            columns[name] = columns[name] / batch.ids[name].lengths().clamp(min=1).unsqueeze(1)
        groups = {}
        for group, features, numerics in zip(self._groups, self._features, self._numerics, strict=True):
            parts = [columns[feature].float() for feature in features]
            groups[group] = torch.cat([*parts, batch.numeric[:, numerics]] if numerics else parts, dim=1)
        return groups


def module_name(table: str) -> str:
    """The name of a table's submodule: an nn.ModuleDict takes no dots, and no name of its own methods (items, type)."""
    name = table.replace(".", "__")
    return f"{name}_" if hasattr(nn.ModuleDict, name) or name == "training" else name


def _features(table: Table, schema: FeatureSchema) -> list[str]:
    return [feature.name for feature in schema.features if feature.table == table.name]


def _bag(table: Table, schema: FeatureSchema, init_scale: float) -> EmbeddingBagConfig:
    bound = init_scale / math.sqrt(table.width)
    return EmbeddingBagConfig(
        name=module_name(table.name),
        num_embeddings=table.rows,
        embedding_dim=table.width,
        feature_names=_features(table, schema),
        # The head divides by the lengths: TorchRec 1.8 divides, for a row-wise table, sums over other tables as well.
        pooling=PoolingType.SUM,
        data_type=PRECISIONS[table.precision],
        weight_init_min=-bound,
        weight_init_max=bound,
    )
