"""Embedding tables and a model as one module: a batch goes in, a loss and logits, or vectors, come out."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from msr_dist.batch import ScenarioBatch
from msr_dist.config import Config, parse
from msr_dist.models.base import Backbone, Behaviours, Inputs, Widths, cut
from msr_dist.models.layers import TargetAttention
from msr_dist.models.objectives import Contrastive, Retrieval, Shown
from msr_dist.models.towers import TwoTower
from msr_dist.schema import KNOWLEDGE_TABLE, OPEN_IDS, UNSEEN, Feature, FeatureSchema, Table
from msr_dist.vocabulary import WAYS, VocabularyConfig, managed_bags

PRECISIONS = {"fp32": DataType.FP32, "fp16": DataType.FP16}
_MOST_STAND_INS = 8
_OF_OPEN = ("rows", *VocabularyConfig.model_fields)
"""Settings of tables with an open vocabulary."""


class TableOverride(Config):
    """What a run changes about one table of the schema."""

    width: int | None = Field(default=None, ge=4, multiple_of=4)
    precision: Literal["fp32", "fp16"] | None = None
    per_scenario: bool | None = None
    """Every scenario has vectors of its own."""
    rows: int | None = Field(default=None, ge=WAYS, multiple_of=WAYS)
    """Open vocabularies: number of vectors. In each 32, one is shared by the ids that have none of their own."""
    collisions: Literal["managed", "shared"] | None = None
    """Open vocabularies: managed lends vectors to ids that are frequent by now, which is the default; shared is plain
    hashing."""
    min_count: int | None = Field(default=None, ge=1)
    """Open vocabularies: occurrences in training before an id gets a vector of its own; by default 2."""
    half_life: int | None = Field(default=None, ge=1)
    """Open vocabularies: steps after which an occurrence counts half, by default 10,000."""

    @model_validator(mode="after")
    def _counts(self) -> Self:
        for key in ("min_count", "half_life"):
            if self.collisions == "shared" and getattr(self, key) is not None:
                raise ValueError(f"{key}: collisions 'shared' counts nothing; leave it out, or choose 'managed'")
        return self


class FeatureOverride(Config):
    """What a run changes about one list feature of the schema."""

    pooling: Literal["sum", "mean", "attention"]


class EmbeddingsConfig(TableOverride):
    """Widths and precisions of the tables, pooling of the lists; what is not said stays as the schema has it."""

    init_scale: float = Field(default=0.3, gt=0)
    """Vectors start uniform in ± init_scale / sqrt(width)."""
    tables: dict[str, TableOverride] = {}
    """Exceptions, by table name."""
    features: dict[str, FeatureOverride] = {}
    """Pooling of lists, by feature name: `attention` weighs a user's behaviours by the row's item (DIN)."""
    attention_widths: Widths = (32,)
    """Units of each hidden layer of the attention's activation unit."""

    def apply(self, schema: FeatureSchema) -> FeatureSchema:
        """The schema with this run's tables."""
        known = [table.name for table in schema.tables]
        unknown = sorted(set(self.tables) - set(known))
        if unknown:
            raise ValueError(f"embeddings.tables: no table {unknown[0]!r} in the data; it has {', '.join(known)}")
        lists = [feature.name for feature in schema.features if feature.pooling]
        unknown = sorted(set(self.features) - set(lists))
        if unknown:
            raise ValueError(
                f"embeddings.features: no list {unknown[0]!r} in the data; it has {', '.join(lists) or 'none'}"
            )
        self._expect_open(schema)
        features = tuple(self._feature(feature) for feature in schema.features)
        tables = tuple(self._table(table) for table in schema.tables)
        # Parsed again, for a pooling may not fit the other features.
        changed = schema.model_dump() | {
            "features": [feature.model_dump() for feature in features],
            "tables": [table.model_dump() for table in tables],
        }
        return parse(FeatureSchema, changed, where="embeddings")

    def _feature(self, feature: Feature) -> Feature:
        override = self.features.get(feature.name)
        return feature if override is None else feature.model_copy(update={"pooling": override.pooling})

    def vocabulary(self, table: Table) -> VocabularyConfig:
        """How ids share the rows of a table with an open vocabulary."""
        return VocabularyConfig(**self._settings(table, set(VocabularyConfig.model_fields)))

    def _expect_open(self, schema: FeatureSchema) -> None:
        """Raise ValueError for settings of open vocabularies where there is none, and for odd numbers of rows."""
        closed = {f"tables.{table.name}.": table.name for table in schema.tables if not table.is_open}
        given = {place: self.tables[name] for place, name in closed.items() if name in self.tables}
        if len(closed) == len(schema.tables):
            given[""] = self
        for place, override in given.items():
            for key in _OF_OPEN:
                if getattr(override, key) is not None:
                    raise ValueError(
                        f"embeddings.{place}{key}: is for tables with an open vocabulary, and the data have a list of "
                        "the ids: leave it out, or prepare the data with open_tables.TABLE=ROWS"
                    )
        for table in schema.tables:
            rows = self._table(table).rows
            if table.is_open and rows % WAYS:
                raise ValueError(f"embeddings.tables.{table.name}.rows: {rows} is no multiple of {WAYS}; round it")
            own = self.tables.get(table.name, TableOverride())
            counts = [key for key in ("min_count", "half_life") if getattr(own, key) is not None]
            if table.is_open and counts and self.vocabulary(table).collisions == "shared":
                raise ValueError(
                    f"embeddings.tables.{table.name}.{counts[0]}: collisions 'shared' counts nothing; leave it out, or "
                    "choose 'managed' for that table"
                )

    def _table(self, table: Table) -> Table:
        names = {"width", "precision", "per_scenario"} | ({"rows"} if table.is_open else set())
        return table.model_copy(update=self._settings(table, names))

    def _settings(self, table: Table, names: set[str]) -> dict[str, Any]:
        """Those of `names` that are given, for this table or else for all."""
        settings = self.model_dump(include=names, exclude_none=True)
        if table.name in self.tables:
            settings |= self.tables[table.name].model_dump(include=names, exclude_none=True)
        return settings


@dataclass
class Predictions:
    """What a forward pass says about its rows. `B` rows, `T` labels."""

    logits: Tensor
    """`[B, T]`, detached; T is 0 where two towers train."""
    loss: Tensor
    """Scalar, detached: this rank's part of the loss, whose average over ranks is the loss of the global batch. It is
    of the backbone's own logits, also where others stand in for a scenario without training rows."""


Side = Literal["user", "item"]
Precision = Literal["fp32", "bf16"]


class Recommender(nn.Module):
    """The whole model: sharded tables below, everything dense in `head`."""

    def __init__(
        self,
        schema: FeatureSchema,
        model: Backbone | TwoTower,
        config: EmbeddingsConfig,
        objective: Retrieval | Contrastive | None = None,
        precision: Precision = "fp32",
        dense_rows: int | None = None,
    ) -> None:
        """`schema` must be the one that `config` was applied to. Tables take no memory before they are sharded.

        Two towers train on `objective`, a backbone on its own; without one, towers make vectors alone. A backbone's
        products are made in `precision`, and in training those of `dense_rows` rows at once; by default, of all.
        """
        super().__init__()
        listed = {feature.table for feature in schema.features if feature.pooling == "attention"}
        used = [table for table in _in_order(schema) if _features(table, schema)]
        closed = [table for table in used if not table.is_open]
        bags = [_bag(table, schema, config.init_scale) for table in closed if table.name not in listed]
        lists = [_list(table, schema, config.init_scale) for table in used if table.name in listed]
        # Where they are trained, they start at the scale of what they stand for: variance 1.
        known = [_bag(table, schema, math.sqrt(3 * table.width)) for table in _knowledge(schema)]
        meta = torch.device("meta")
        self.embeddings = EmbeddingBagCollection(tables=bags, device=meta) if bags else None
        self.sequences = EmbeddingCollection(tables=lists, device=meta) if lists else None
        # Apart: a feature that one collection looks up in two tables has two names in its result.
        self.knowledge = EmbeddingBagCollection(tables=known, device=meta) if known else None
        opened = [table for table in used if table.is_open]
        sharing = {module_name(table.name): config.vocabulary(table) for table in opened}
        hashed = [_bag(table, schema, config.init_scale) for table in opened]
        self.hashed = managed_bags(hashed, sharing, OPEN_IDS) if hashed else None
        self.head = (
            TowersHead(schema, model, objective)
            if isinstance(model, TwoTower)
            else Head(schema, model, config.attention_widths, precision, dense_rows)
        )

    def forward(self, batch: ScenarioBatch, side: Side | None = None) -> tuple[Tensor, Predictions] | Tensor:
        """The loss to minimise and the predictions of this rank's rows; or, of two towers, the vectors of a `side`."""
        pooled = None if self.embeddings is None else self.embeddings(batch.ids)
        lists = None if self.sequences is None else self.sequences(batch.ids)
        known = None if self.knowledge is None else self.knowledge(batch.ids)
        hashed = None if self.hashed is None else self.hashed(batch.ids)[0]
        # Which it is, the head decides: TorchRec's tracer runs through here once, for all batches to come.
        result: tuple[Tensor, Predictions] | Tensor = self.head(pooled, lists, batch, known, side, hashed)
        return result

    def reserved_rows(self, schema: FeatureSchema) -> dict[str, int]:
        """By the name of a table's submodule: how many of its first vectors start at 0.

        The first stands for ids that training never saw. With vectors for every scenario it is all of them, since
        which ids a scenario's training rows hold is not known: those that they do not must say nothing. Not so for two
        towers: where all users and all items are alike, nothing tells them apart, and no gradient ever does.
        """
        apart = isinstance(self.head, TowersHead)
        return {
            module_name(table.name): schema.copies(table) * (1 if apart or not table.per_scenario else table.rows)
            for table in (*schema.tables, *_knowledge(schema))
            if not table.is_open
        }


@dataclass(frozen=True)
class _LookedUp:
    """The rows of a batch and what tables hold of them, before anything is computed."""

    pooled: dict[str, Tensor]
    """Feature -> `[B, W]`."""
    whole: Tensor | None
    """`[B, sum of widths]`: all inputs of the model side by side, where that is how they have been looked up."""
    lists: dict[str, JaggedTensor]
    """Feature -> vectors one by one, where attention reads any of the table."""
    lengths: dict[str, Tensor]
    """List whose mean is asked for -> `[B]`."""
    numeric: Tensor
    scenario: Tensor
    row: Tensor
    user: Tensor | None
    """`[B]`, and `known` `[B, W]`, where the schema has knowledge."""
    known: Tensor | None

    def split(self, sizes: list[int]) -> "list[_LookedUp]":
        """Consecutive parts of those sizes. Their gradients are put together once, where those of slices are added."""
        pooled = {name: x.split_with_sizes(sizes) for name, x in self.pooled.items()}
        whole = None if self.whole is None else self.whole.split_with_sizes(sizes)
        lists = {name: _split(x, sizes) for name, x in self.lists.items()}
        lengths = {name: x.split_with_sizes(sizes) for name, x in self.lengths.items()}
        numeric, scenario, row = (x.split_with_sizes(sizes) for x in (self.numeric, self.scenario, self.row))
        user, known = (None if x is None else x.split_with_sizes(sizes) for x in (self.user, self.known))
        return [
            _LookedUp(
                {name: parts[i] for name, parts in pooled.items()},
                None if whole is None else whole[i],
                {name: parts[i] for name, parts in lists.items()},
                {name: parts[i] for name, parts in lengths.items()},
                numeric[i],
                scenario[i],
                row[i],
                None if user is None else user[i],
                None if known is None else known[i],
            )
            for i in range(len(sizes))
        ]


class _Lookups(nn.Module):
    """What was looked up becomes `Inputs`."""

    def __init__(self, schema: FeatureSchema, attention_widths: Widths = (32,)) -> None:
        super().__init__()
        self._widths = schema.group_widths()
        self._features = [[f.name for f in schema.features if f.group == group] for group in self._widths]
        self._numerics = [[i for i, n in enumerate(schema.numerics) if n.group == group] for group in self._widths]
        single = all(feature.pooling in (None, "sum") for feature in schema.features)
        self._side_by_side = (
            [name for each in self._features for name in each] if single and not schema.numerics else None
        )
        """Features in the order of the model's inputs, where those are vectors as they come out of tables."""
        self._pooling = {feature.name: feature.pooling for feature in schema.features}
        self._targets = {f.name: schema.target(f).name for f in schema.features if f.pooling == "attention"}
        self._knowledge, self._user, self._copies = schema.knowledge, schema.user, schema.copies(schema.user_table)
        self.attention = nn.ModuleDict(
            {
                module_name(feature.name): TargetAttention(schema.table(feature.table).width, attention_widths)
                for feature in schema.features
                if feature.pooling == "attention"
            }
        )

    def _looked_up(
        self,
        pooled: KeyedTensor | None,
        lists: dict[str, JaggedTensor] | None,
        batch: ScenarioBatch,
        known: KeyedTensor | None,
        hashed: KeyedTensor | None,
    ) -> _LookedUp:
        # By name: the order of KeyedTensor.values() changes with the sharding plan.
        columns = {name: x for each in (pooled, hashed) if each is not None for name, x in each.to_dict().items()}
        return _LookedUp(
            columns,
            pooled.values() if pooled is not None and pooled.keys() == self._side_by_side else None,
            lists or {},
            {name: batch.ids[name].lengths() for name, pooling in self._pooling.items() if pooling == "mean"},
            batch.numeric,
            batch.scenario,
            batch.row,
            None if known is None else batch.ids[self._user].values() // self._copies,
            None if known is None else known.to_dict()[self._user],
        )

    def _inputs(self, rows: _LookedUp) -> Inputs:
        behaviours: dict[str, Behaviours] = {}
        whole = self._joined(rows, behaviours) if rows.whole is None else rows.whole.float()
        groups = cut(whole, self._widths)
        return Inputs(groups, rows.scenario, rows.row, behaviours, rows.user, self._known(rows), whole)

    def _joined(self, rows: _LookedUp, behaviours: dict[str, Behaviours]) -> Tensor:
        """`[B, sum of widths]`: all groups side by side; the lists that attention has read go to `behaviours`."""
        columns, lists = dict(rows.pooled), rows.lists
        columns |= {
            name: _padded(x, self._pooling[name]).sum(dim=1) for name, x in lists.items() if name not in self._targets
        }
        for name, lengths in rows.lengths.items():
            columns[name] = columns[name] / lengths.clamp(min=1).unsqueeze(1)
        for name, target in self._targets.items():
            lengths = lists[name].lengths()
            vectors = _padded(lists[name], self._pooling[name])
            present = torch.arange(vectors.shape[1], device=lengths.device) < lengths[:, None]
            behaviours[name] = Behaviours(vectors, present, columns[target].float())
            columns[name] = self.attention[module_name(name)](behaviours[name], rows.row)
        parts: list[Tensor] = []
        for features, numerics in zip(self._features, self._numerics, strict=True):
            parts += [columns[feature].float() for feature in features]
            parts += [rows.numeric[:, numerics]] if numerics else []
        return torch.cat(parts, dim=1)

    def _known(self, rows: _LookedUp) -> Tensor | None:
        """`[B, K + 1]` fp32: the user's vector, and whether it is known."""
        if rows.known is None or rows.user is None:
            return None
        assert self._knowledge is not None
        vectors = rows.known.float()
        if self._knowledge.trained:
            return torch.cat([vectors, (rows.user != UNSEEN)[:, None].float()], dim=1)
        # Detached: the table is fixed, so no gradient may go back to it.
        return vectors[:, : self._knowledge.width + 1].detach()


class Head(_Lookups):
    """Everything after the lookup. It holds no table, so TorchRec's tracer never looks inside: backbones may branch.

    A scenario without training rows has parameters that nothing has taught. Its rows are predicted by what the others
    share: the mean of the probabilities that a row would have in each of them, weighted by their training rows (in the
    largest of them, where there are many).

    In training, the rows may be computed in parts, whose activations are made anew for the backward pass (Chen et al.,
    2016, "Training deep nets with sublinear memory cost"). Dropout draws by row, so it is the same again.
    """

    untaught: Tensor

    def __init__(
        self,
        schema: FeatureSchema,
        backbone: Backbone,
        attention_widths: Widths = (32,),
        precision: Precision = "fp32",
        dense_rows: int | None = None,
    ) -> None:
        super().__init__(schema, attention_widths)
        self.backbone = backbone
        self._bf16 = precision == "bf16"
        self._dense_rows = dense_rows
        self._stand_ins = _stand_ins(schema)
        self._has_untaught = bool(self._stand_ins) and not all(scenario.taught for scenario in schema.scenarios)
        untaught = torch.tensor([not scenario.taught for scenario in schema.scenarios])
        self.register_buffer("untaught", untaught, persistent=False)

    def forward(
        self,
        pooled: KeyedTensor | None,
        lists: dict[str, JaggedTensor] | None,
        batch: ScenarioBatch,
        known: KeyedTensor | None = None,
        side: Side | None = None,
        hashed: KeyedTensor | None = None,
    ) -> tuple[Tensor, Predictions]:
        """The backbone's loss, averaged over the rows of all ranks."""
        assert side is None, "a backbone has no sides"
        rows = self._looked_up(pooled, lists, batch, known, hashed)
        most, count = self._dense_rows, len(batch.row)
        if self.training and most is not None and most < count:
            sizes = [min(most, count - start) for start in range(0, count, most)]
            truth = (x.split_with_sizes(sizes) for x in (batch.labels, batch.weights))
            parts = zip(rows.split(sizes), *truth, strict=True)
            losses, each = zip(*(checkpoint(self._part, *part, use_reentrant=False) for part in parts), strict=True)
            total, logits = torch.stack(losses).sum(), torch.cat(each)
        else:
            total, logits = self._part(rows, batch.labels, batch.weights)
        loss = total / batch.rows_per_rank
        return loss, Predictions(logits, loss.detach())

    def _part(self, rows: _LookedUp, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, summed over the rows, and their logits."""
        inputs = self._inputs(rows)
        with self._precision(inputs):
            objective = self.backbone.objective(inputs).float()
        logits = objective.logits.detach()
        if self._has_untaught and not self.training:
            logits = self._stand_in(inputs, logits)
        return objective.loss(labels, weights), logits

    def _precision(self, inputs: Inputs) -> torch.autocast:
        """Products in bf16 where the run wants it; weights, their optimizer, sums over rows and the loss stay fp32."""
        return torch.autocast(inputs.scenario.device.type, torch.bfloat16, enabled=self._bf16)

    def _stand_in(self, inputs: Inputs, logits: Tensor) -> Tensor:
        rows = self.untaught[inputs.scenario].nonzero().squeeze(1)
        if not len(rows):
            return logits
        some = inputs.take(rows)
        scenarios, shares = zip(*self._stand_ins, strict=True)
        with self._precision(inputs):
            each = [self.backbone(replace(some, scenario=torch.full_like(rows, s))).float() for s in scenarios]
        elsewhere = torch.stack(each)
        share = logits.new_tensor(shares).log()[:, None, None]
        # In logarithms, where a probability next to 0 or 1 is still a number.
        yes, no = (torch.logsumexp(share + logsigmoid(side), dim=0) for side in (elsewhere, -elsewhere))
        return logits.index_copy(0, rows, yes - no)


class TowersHead(_Lookups):
    """Everything after the lookup of a retrieval model.

    A scenario without training rows has the branch of the scenario that has most of them, as it has its tables.
    """

    owners: Tensor

    def __init__(
        self, schema: FeatureSchema, towers: TwoTower, objective: Retrieval | Contrastive | None = None
    ) -> None:
        super().__init__(schema)
        self.towers = towers
        self._objective = objective
        self._user_copies = schema.copies(schema.user_table)
        self._item, self._item_copies = schema.item, schema.copies(schema.item_table)
        self._numeric_width = len(schema.numerics)
        self.register_buffer("owners", torch.tensor(schema.owners()), persistent=False)

    def forward(
        self,
        pooled: KeyedTensor | None,
        lists: dict[str, JaggedTensor] | None,
        batch: ScenarioBatch,
        known: KeyedTensor | None = None,
        side: Side | None = None,
        hashed: KeyedTensor | None = None,
    ) -> tuple[Tensor, Predictions] | Tensor:
        """The objective's loss; or the vectors of `side`, `[B, d]`, where one is asked for."""
        inputs = self._inputs(self._looked_up(pooled, lists, batch, known, hashed))
        inputs = replace(inputs, scenario=self.owners[inputs.scenario])
        if side is not None:
            return self.towers.user(inputs) if side == "user" else self.towers.item(inputs)
        assert self._objective is not None
        # Rows of choices have one column more than the model knows of.
        sampled = batch.numeric.shape[1] > self._numeric_width
        shown = Shown(
            inputs=inputs,
            user=batch.ids[self._user].values() // self._user_copies,
            item=batch.ids[self._item].values() // self._item_copies,
            labels=batch.labels,
            weights=batch.weights,
            log_share=batch.numeric[:, self._numeric_width] if sampled else torch.zeros_like(batch.weights[:, 0]),
        )
        loss = self._objective.value(self.towers, shown)
        return loss, Predictions(loss.new_zeros(len(batch.scenario), 0), loss.detach())


def _stand_ins(schema: FeatureSchema) -> list[tuple[int, float]]:
    """Scenarios that predict for those without training rows, and their shares; rows that nobody counted are 1."""
    rows = {scenario.id: scenario.rows or 1 for scenario in schema.scenarios if scenario.taught}
    largest = sorted(rows, key=lambda scenario: -rows[scenario])[:_MOST_STAND_INS]
    total = sum(rows[scenario] for scenario in largest)
    return [(scenario, rows[scenario] / total) for scenario in largest]


def _padded(x: JaggedTensor, pooling: str | None) -> Tensor:
    """`[B, L, W]` fp32: the lists of `x`, 0 behind their ends."""
    longest = 1 if pooling is None else int(x.lengths().max()) if len(x.lengths()) else 0
    padded: Tensor = x.to_padded_dense(longest).float()
    return padded


def _split(x: JaggedTensor, sizes: list[int]) -> list[JaggedTensor]:
    """The lists of consecutive rows, so many in each part."""
    lengths = x.lengths().split_with_sizes(sizes)
    values = x.values().split_with_sizes(torch.stack([each.sum() for each in lengths]).tolist())
    return [JaggedTensor(part, lengths=each) for part, each in zip(values, lengths, strict=True)]


def module_name(table: str) -> str:
    """The name of a table's submodule: an nn.ModuleDict takes no dots, and no name of its own methods (items, type)."""
    name = table.replace(".", "__")
    return f"{name}_" if hasattr(nn.ModuleDict, name) or name == "training" else name


def _knowledge(schema: FeatureSchema) -> list[Table]:
    """The table of what a language model says of users, where there is one: as many rows as the users' own."""
    if schema.knowledge is None:
        return []
    users, width = schema.user_table, schema.knowledge.width
    if schema.knowledge.trained:
        return [users.model_copy(update={"name": KNOWLEDGE_TABLE, "width": width})]
    # One more column says whether the user is known; the kernels want a multiple of 4.
    fixed = {"name": KNOWLEDGE_TABLE, "width": width + 4, "precision": "fp16"}
    return [users.model_copy(update=fixed)]


def _in_order(schema: FeatureSchema) -> list[Table]:
    """The tables in the order of their first features in a model's inputs: on one rank, nothing is rearranged then."""
    groups = list(schema.group_widths())
    seen = [feature.table for group in groups for feature in schema.features if feature.group == group]
    return sorted(schema.tables, key=lambda table: seen.index(table.name) if table.name in seen else len(seen))


def _features(table: Table, schema: FeatureSchema) -> list[str]:
    if table.name == KNOWLEDGE_TABLE and schema.knowledge is not None:
        return [schema.user]
    return [feature.name for feature in schema.features if feature.table == table.name]


def _bag(table: Table, schema: FeatureSchema, init_scale: float) -> EmbeddingBagConfig:
    # The head divides by the lengths: TorchRec 1.8 divides, for a row-wise table, sums over other tables as well.
    return EmbeddingBagConfig(pooling=PoolingType.SUM, **_settings(table, schema, init_scale))


def _list(table: Table, schema: FeatureSchema, init_scale: float) -> EmbeddingConfig:
    return EmbeddingConfig(**_settings(table, schema, init_scale))


def _settings(table: Table, schema: FeatureSchema, init_scale: float) -> dict[str, Any]:
    bound = init_scale / math.sqrt(table.width)
    return {
        "name": module_name(table.name),
        "num_embeddings": table.rows * schema.copies(table),
        "embedding_dim": table.width,
        "feature_names": _features(table, schema),
        "data_type": PRECISIONS[table.precision],
        "weight_init_min": -bound,
        "weight_init_max": bound,
    }
