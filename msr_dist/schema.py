"""What a row is. A `FeatureSchema` stands as `schema.toml` beside the parquet, so that the data describe themselves.

    DATA/
      schema.toml
      train/part-00000.parquet ...   one folder per split: train, valid, test
      vocabulary/TABLE.parquet       row, id, count: which raw id became which row of a table; not for open vocabularies
      users.parquet, items.parquet   one line per known id: row, id, and text columns, where the source has any
      oracle.json                    the best possible metrics, where the data were planted

Columns of a split: one int64 per single-valued feature, one list<int64> per multi-valued one, one float32 per numeric
feature, `scenario` (int32), and per label one uint8 plus its optional mask (bool) and weight (float32).
Row 0 of every table is reserved for ids that the training split does not hold. Where a table's vocabulary is open, the
columns hold hashes instead of rows: integers from 1 to 2^62 - 1, and 0 where there is no id.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from msr_dist.config import Config, Readable, dump, load

SCHEMA_FILE = "schema.toml"
SPLITS = ("train", "valid", "test")
UNSEEN = 0
"""The row of every table for ids that training never saw."""
OPEN_IDS = 1 << 62
"""Ids of tables with an open vocabulary are below this: hashes, with 0 for an absent id. A bit is left for sums."""
KNOWLEDGE_TABLE = "knowledge"
"""The table of users' vectors of a language model, in runs that have them."""


class Scenario(Config):
    """One of the scenarios that a model serves."""

    id: int = Field(ge=0)
    """Its value in the scenario column; ids run from 0 without gaps."""
    name: str = Field(min_length=1)
    text: str = ""
    """A sentence that describes it, for people and for language models."""
    rows: int | None = Field(default=None, ge=0)
    """Its training rows, where they were counted; at 0 it is served by what the other scenarios share."""

    @property
    def taught(self) -> bool:
        """Whether training has rows of it, as far as is known."""
        return self.rows != 0


class Table(Config):
    """An embedding table."""

    name: str = Field(min_length=1)
    rows: int = Field(ge=1)
    """Number of embedding vectors, the reserved row 0 included."""
    width: int = Field(default=16, ge=4, multiple_of=4)
    """Length of one vector; fbgemm's kernels want a multiple of 4."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """Of the vectors; optimizer state is fp32. fp16 rounds updates at random on GPUs, so that small ones count on
    average, and to the nearest on CPU, where those below half a step are lost. There is no int8 and no bf16: fbgemm
    trains neither on CPU, and a run may go on on either device."""
    per_scenario: bool = False
    """Every scenario has `rows` vectors of its own, which start at 0: id i of scenario s is looked up at
    i * scenarios + s, or, where s has no training rows, at that of the scenario that has most."""
    vocabulary: Literal["open"] | None = None
    """open: columns hold hashes of ids, and training decides which of them have rows; there is no vocabulary file."""

    @property
    def is_open(self) -> bool:
        """Whether columns hold hashes of ids instead of rows."""
        return self.vocabulary == "open"


class Feature(Config):
    """A column of ids that is looked up in a table; many features may share one table."""

    name: str = Field(min_length=1)
    table: str
    group: str = "context"
    """Which tensor of the backbone's input it becomes part of, such as user, item or context."""
    pooling: Literal["sum", "mean", "attention"] | None = None
    """How the vectors of a list are joined; None says that the column holds one id per row. Attention weighs them by
    how they bear on the row's target: the item, or else the first single-valued feature of the same table."""


class Numeric(Config):
    """A column of numbers, standardised with `mean` and `std` of the training split when the data were prepared."""

    name: str = Field(min_length=1)
    group: str = "context"
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)


class Label(Config):
    """A column of 0 and 1 that the model predicts: one column of its logits `[B, T]`."""

    name: str = Field(min_length=1)
    mask: str | None = None
    """A boolean column: where it is false, the label of the row is unknown."""
    weight: str | None = None
    """A column of non-negative weights of the row in this label's loss and metrics."""


class Knowledge(Config):
    """What a language model says of users and scenarios, where a run asks for it; never part of `schema.toml`."""

    folder: Path
    """Users' vectors by row of the user's table."""
    width: int = Field(ge=1)
    """Length of a user's vector."""
    scenarios: tuple[tuple[float, ...], ...]
    """A vector for each scenario."""
    vectors: Literal["knowledge", "random", "shuffled", "trained"] = "knowledge"
    """Those of the language model; or, as controls, fixed random ones, each user with another user's, or an embedding
    of the user that is trained."""

    @property
    def trained(self) -> bool:
        """Whether the users' vectors are an ordinary table; all others are fixed."""
        return self.vectors == "trained"


class FeatureSchema(Config):
    """Tables, features, scenarios and labels of one prepared data set."""

    format: Literal[1] = 1
    user: str
    """The feature that identifies the user: groups the user-grouped AUC."""
    item: str
    """The feature that identifies the item."""
    time: str | None = None
    """The column that orders the rows in time (unix seconds, int64), if there is one."""
    scenario: str = "scenario"
    """The column of scenario ids."""
    labels: tuple[Label, ...] = Field(min_length=1)
    scenarios: tuple[Scenario, ...] = Field(min_length=1)
    tables: tuple[Table, ...] = Field(min_length=1)
    features: tuple[Feature, ...] = Field(min_length=1)
    numerics: tuple[Numeric, ...] = ()
    knowledge: Knowledge | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _unique("tables", (table.name for table in self.tables))
        _unique("columns", self.columns())
        _unique("scenario names", (scenario.name for scenario in self.scenarios))
        if [scenario.id for scenario in self.scenarios] != list(range(len(self.scenarios))):
            raise ValueError("scenarios: ids must run 0, 1, 2, ... in the order of the list")
        for feature in self.features:
            if feature.table not in {table.name for table in self.tables}:
                raise ValueError(f"features.{feature.name}: there is no table {feature.table!r}")
            if feature.pooling == "attention" and not self._targets(feature):
                raise ValueError(
                    f"features.{feature.name}: pooling 'attention' needs a single-valued feature of table "
                    f"{feature.table!r} to ask about, and there is none; choose 'mean' or 'sum'"
                )
            if feature.pooling == "attention" and self.table(feature.table).is_open:
                raise ValueError(
                    f"features.{feature.name}: pooling 'attention' needs a list of the ids of table {feature.table!r}, "
                    "whose vocabulary is open; choose 'mean' or 'sum'"
                )
        for table in self.tables:
            if table.is_open and table.per_scenario:
                raise ValueError(f"tables.{table.name}: per_scenario does not go with an open vocabulary; leave it out")
        for role in (self.user, self.item):
            if not any(feature.name == role and feature.pooling is None for feature in self.features):
                raise ValueError(f"{role!r} stands as user or item, but is no single-valued feature")
        return self

    def columns(self) -> list[str]:
        """Every column that a model or its loss reads, in a fixed order."""
        names = [feature.name for feature in self.features] + [numeric.name for numeric in self.numerics]
        for label in self.labels:
            names += [column for column in (label.name, label.mask, label.weight) if column]
        return [*names, self.scenario]

    def table(self, name: str) -> Table:
        """The table called `name`."""
        return next(table for table in self.tables if table.name == name)

    @property
    def user_table(self) -> Table:
        """The table of the user."""
        return self.table(next(feature.table for feature in self.features if feature.name == self.user))

    @property
    def item_table(self) -> Table:
        """The table of the item."""
        return self.table(next(feature.table for feature in self.features if feature.name == self.item))

    def expect_listed(self, tables: Iterable[Table], reader: str) -> None:
        """Raise ValueError where the vocabulary of a table is open, for a `reader` that needs a list of the ids."""
        for table in tables:
            if table.is_open:
                raise ValueError(
                    f"tables.{table.name}: {reader} needs a list of its ids, and its vocabulary is open; prepare the "
                    f"data without open_tables.{table.name}"
                )

    def copies(self, table: Table) -> int:
        """Vectors per id: one, or one per scenario."""
        return len(self.scenarios) if table.per_scenario else 1

    def owners(self) -> list[int]:
        """The scenario whose vectors each scenario's rows look up, in tables with vectors for every scenario."""
        largest = max(self.scenarios, key=lambda each: each.rows or 0).id
        return [each.id if each.taught else largest for each in self.scenarios]

    def target(self, feature: Feature) -> Feature:
        """What attention asks about when it reads the list `feature`."""
        return self._targets(feature)[0]

    def _targets(self, feature: Feature) -> list[Feature]:
        alike = [each for each in self.features if each.table == feature.table and each.pooling is None]
        return sorted(alike, key=lambda each: each.name != self.item)

    def group_widths(self) -> dict[str, int]:
        """Width of each feature group's tensor: its features' table widths and one per numeric, in schema order."""
        widths: dict[str, int] = {}
        for feature in self.features:
            widths[feature.group] = widths.get(feature.group, 0) + self.table(feature.table).width
        for numeric in self.numerics:
            widths[numeric.group] = widths.get(numeric.group, 0) + 1
        return widths

    @property
    def input_width(self) -> int:
        """Width of all groups side by side."""
        return sum(self.group_widths().values())

    def with_tables(self, tables: Mapping[str, Table]) -> "FeatureSchema":
        """The same schema with some tables replaced."""
        return self.model_copy(update={"tables": tuple(tables.get(table.name, table) for table in self.tables)})

    def save(self, folder: Path) -> None:
        """Write `schema.toml` into `folder`."""
        (folder / SCHEMA_FILE).write_text(dump(self))

    @classmethod
    def read(cls, folder: Readable) -> "FeatureSchema":
        """Read `schema.toml` of `folder`; ValueError where it is absent or wrong."""
        if not (folder / SCHEMA_FILE).is_file():
            raise ValueError(f"{folder}: no {SCHEMA_FILE} there; make the data with `msr-dist prepare`")
        found = load(cls, folder / SCHEMA_FILE)
        if found.knowledge is not None:
            raise ValueError(f"{folder / SCHEMA_FILE}: knowledge: belongs to a run, as its [knowledge]; remove it here")
        return found


def _unique(what: str, names: Iterable[str]) -> None:
    listed = list(names)
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if twice:
        raise ValueError(f"{what}: {', '.join(twice)} occurs twice")
