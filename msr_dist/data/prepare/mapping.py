"""What the raw columns mean: which one is the user, which are labels, ids, lists and numbers.

[columns]
user = "user_id"
item = "video_id"
scenario = "tab"
time = "time_ms"
time_unit = "ms"

[[columns.labels]]
name = "click"

[[columns.ids]]
name = "author"
column = "author_id"
source = "items"
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from msr_dist.config import Config

T = TypeVar("T")

Moment = Annotated[
    datetime,
    # Of pydantic's own, the strict kind takes no dates.
    BeforeValidator(lambda value: datetime.fromisoformat(value) if isinstance(value, str) else value),
    AfterValidator(lambda moment: moment if moment.tzinfo else moment.replace(tzinfo=UTC)),
]
"""A date (its first second) or a date with time, such as 2022-05-01T00:00:00+08:00; without an offset, it is UTC."""


def _each_once(values: tuple[T, ...]) -> tuple[T, ...]:
    for place, value in enumerate(values):
        if value in values[:place]:
            raise ValueError(f"{value!r} stands there a second time; remove one")
    return values


EachOnce = AfterValidator(_each_once)
"""Of a list in which no value may stand twice."""

SourceName = Literal["interactions", "users", "items"]
GROUPS = {"interactions": "context", "users": "user", "items": "item"}
"""The feature group of a column, unless it says otherwise, by where the column stands."""


class LabelColumn(Config):
    """A label: a raw column of 0 and 1, or a number with a threshold."""

    name: str = Field(min_length=1)
    column: str | None = None
    """The raw column; by default the one called `name`."""
    above: float | None = Field(default=None, allow_inf_nan=False)
    """If given, the label is 1 where the column is greater than this."""
    mask: str | None = None
    """A raw boolean column: where it is false, the label is unknown. Keeps its name if no other column of the output
    has it (a label, a feature, the mask of an earlier label); else it is written once more, as LABEL_mask."""
    weight: str | None = None
    """A raw column of weights of at least 0. Keeps its name like a mask, or becomes LABEL_weight."""


class IdColumn(Config):
    """A categorical feature: integers (whole numbers stored as floats as well) or text, each value a row of a table."""

    name: str = Field(min_length=1)
    column: str | None = None
    """The raw column; by default the one called `name`."""
    source: SourceName = "interactions"
    """Which raw files hold the column."""
    table: str | None = None
    """The embedding table; by default one called `name`. Features that name the same table share its vocabulary."""
    group: str | None = None
    """The feature group; by default context, user or item, after `source`."""


class ListColumn(IdColumn):
    """A feature with any number of ids per row, such as genres."""

    separator: str | None = None
    """If given, the raw column is text such as "Drama|War" that is split at this."""
    pooling: Literal["sum", "mean"] = "mean"


class NumericColumn(Config):
    """A number, standardised with the mean and standard deviation of the training rows; null becomes the mean."""

    name: str = Field(min_length=1)
    column: str | None = None
    """The raw column; by default the one called `name`."""
    source: SourceName = "interactions"
    group: str | None = None


class Columns(Config):
    """What the raw columns mean."""

    user: str
    """The column that identifies the user; it becomes a feature of this name."""
    item: str
    """The column that identifies the item; it becomes a feature of this name."""
    scenario: str
    """The column that says in which scenario the interaction happened."""
    time: str | None = None
    """When: integers, or a timestamp or date column. Needed to split by time and for a history."""
    time_unit: Literal["s", "ms", "us"] = "s"
    """What one unit of an integer time is; seconds also serves for a mere order."""
    users_key: str | None = None
    """The id column of the users files, if not called as in the interactions."""
    items_key: str | None = None
    """The id column of the items files, if not called as in the interactions."""
    labels: tuple[LabelColumn, ...] = Field(min_length=1)
    ids: tuple[IdColumn, ...] = ()
    lists: tuple[ListColumn, ...] = ()
    numerics: tuple[NumericColumn, ...] = ()
    user_text: tuple[str, ...] = ()
    """Text columns of the users files, kept in users.parquet for language models and for reading."""
    item_text: tuple[str, ...] = ()
    """Text columns of the items files, kept in items.parquet."""
    scenario_key: str = "scenario_id"
    """The column of the scenarios file with the values of the interactions' scenario column."""
    scenario_name: str = "name"
    """The column of the scenarios file with the names."""
    scenario_text: str | None = None
    """The column of the scenarios file with a sentence that describes each."""


class History(Config):
    """The last positive items of the row's user at strictly earlier times, newest first, over the item's table.

    Items that the training split does not hold are left out, unless their vocabulary is open. With a split by time, a
    training row sees only training rows, a validation row also validation rows, and a test row any earlier row, as in
    production: where each scenario has cuts of its own, one's training rows may be later than another's test rows. With
    any other split only training rows are seen, since a test row may then be earlier than a training row that would
    show its label.
    """

    name: str = Field(default="history", min_length=1)
    length: int = Field(default=20, ge=1, le=1000)
    """The greatest number of items."""
    label: str | None = None
    """The label that makes an item positive; by default the first."""
    pooling: Literal["sum", "mean"] = "mean"
    group: str = "user"


class Split(Config):
    """Which rows are for training, validation and test."""

    kind: Literal["time", "random", "column"] = "time"
    """By time; by a hash of row number and seed; or as a raw column says, with train, valid and test in it."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of train, valid and test."""
    valid_from: Moment | None = None
    """With kind "time", where validation begins, in place of a share; belongs with `test_from`."""
    test_from: Moment | None = None
    """Where the test rows begin. Both moments are the same for all scenarios."""
    cutoff: Literal["scenario", "global"] = "scenario"
    """Where the cuts in time are: per scenario, so that each has its share of rows in each split, or the same moment
    for all. Per-scenario cuts let training rows of one scenario be later than test rows of another: right for models
    that are judged within each scenario, but no simulation of a launch at one moment; that is `global`."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random split."""
    column: str | None = None
    """The raw column of kind "column"."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if min(self.fractions) <= 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions must be positive and sum to 1 (got {list(self.fractions)})")
        if (self.kind == "column") != (self.column is not None):
            raise ValueError('column belongs to kind = "column", and is needed there')
        if (self.valid_from is None) != (self.test_from is None):
            raise ValueError("valid_from and test_from belong together; give both, or fractions alone")
        if self.valid_from and self.test_from:
            if self.kind != "time":
                raise ValueError('valid_from and test_from belong to kind = "time"')
            if self.valid_from >= self.test_from:
                raise ValueError(f"valid_from ({self.valid_from}) must be earlier than test_from ({self.test_from})")
        return self


@dataclass(frozen=True)
class ScenarioValue:
    """A scenario as the raw data have it; its place in the list is its id."""

    value: int | str
    """What the raw scenario column holds."""
    name: str
    text: str = ""


@dataclass(frozen=True)
class Relation:
    """One kind of raw rows: a view of the database, and how to speak about it."""

    view: str
    where: str
    """The files, for messages."""
    types: dict[str, str]
    """Column -> DuckDB type."""
    locate: Callable[[int], str]
    """`ROW` (a row number of the view) -> "FILE, row 17", for messages."""
    fault: Callable[[], str | None] = lambda: None
    """Where the files behind the view are damaged, for messages; called when reading has failed."""


@dataclass(frozen=True)
class Raw:
    """All that a source hands over. Every view has a column `ROW`: 0, 1, ... in the order of the files."""

    columns: Columns
    interactions: Relation
    scenarios: tuple[ScenarioValue, ...]
    users: Relation | None = None
    items: Relation | None = None
    carry: tuple[str, ...] = ()
    """Raw columns of the interactions that the source wants to see again when the splits are known."""
    notes: tuple[str, ...] = ()
    """What the user should know, such as how many rows were left out at their wish."""
    scenario_advice: str = "correct these rows"
    """What to do about a row whose scenario is none of `scenarios`."""

    def relation(self, source: SourceName) -> Relation | None:
        """The relation called `source`, if the data have it."""
        return {"interactions": self.interactions, "users": self.users, "items": self.items}[source]


ROW = "__row"
"""The column of raw row numbers."""
