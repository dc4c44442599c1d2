"""Settles, from the columns that the raw files really have, which features come from where and in which type."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from msr_dist.data.prepare.database import is_float, is_integer, is_number
from msr_dist.data.prepare.files import column_type
from msr_dist.data.prepare.mapping import GROUPS, Columns, History, IdColumn, ListColumn, Raw, Relation, SourceName
from msr_dist.schema import Label

TAKEN = ("scenario", "time")
"""Columns of the output that have these names always."""


@dataclass(frozen=True)
class PlannedFeature:
    """A categorical feature with everything that was left to defaults filled in."""

    name: str
    column: str
    source: SourceName
    table: str
    group: str
    key: str
    """Where the configuration says so, for messages."""
    pooling: Literal["sum", "mean"] | None = None
    separator: str | None = None
    whole: bool = False
    """Whether the raw column holds floats, which have to be whole numbers."""
    type: str = "BIGINT"
    """DuckDB type of one id: BIGINT or VARCHAR, the same for all features of a table."""

    @property
    def staged(self) -> str:
        """Its column in the staged tables."""
        return f"f:{self.name}"


@dataclass(frozen=True)
class PlannedNumeric:
    """A numeric feature with everything that was left to defaults filled in."""

    name: str
    column: str
    source: SourceName
    group: str
    key: str

    @property
    def staged(self) -> str:
        """Its column in the staged tables."""
        return f"n:{self.name}"


@dataclass(frozen=True)
class Plan:
    """Features in the order of the schema: the user and the item first, the history last (not among `features`)."""

    raw: Raw
    user: PlannedFeature
    item: PlannedFeature
    features: tuple[PlannedFeature, ...]
    numerics: tuple[PlannedNumeric, ...]
    labels: tuple[Label, ...]
    """The labels in their order, with the names that their masks and weights have in the output."""
    history: History | None
    open: Mapping[str, int]
    """Tables with an open vocabulary, and the rows proposed for each."""

    def tables(self) -> dict[str, list[PlannedFeature]]:
        """Table -> the features whose ids it holds."""
        tables: dict[str, list[PlannedFeature]] = defaultdict(list)
        for feature in self.features:
            tables[feature.table].append(feature)
        return dict(tables)

    def side(self, source: SourceName) -> list[PlannedFeature]:
        """The features that stand in `source`, the user and the item apart."""
        return [each for each in self.features if each.source == source and each not in (self.user, self.item)]

    def entity(self, source: SourceName) -> PlannedFeature:
        """The feature that `source` (users or items) describes."""
        return self.user if source == "users" else self.item

    def key_column(self, source: SourceName) -> str:
        """The id column of the users or items."""
        columns = self.raw.columns
        return (columns.users_key or columns.user) if source == "users" else (columns.items_key or columns.item)

    @property
    def positive(self) -> int:
        """The place of the label that fills the history."""
        names = [label.name for label in self.raw.columns.labels]
        return names.index(self.history.label) if self.history and self.history.label else 0


def make_plan(raw: Raw, history: History | None, opened: Mapping[str, int]) -> Plan:
    """Check every column that the configuration names, and settle types. Raises ValueError."""
    columns = raw.columns
    _expect_scenario_names(raw)
    user = PlannedFeature(columns.user, columns.user, "interactions", columns.user, "user", "columns.user")
    item = PlannedFeature(columns.item, columns.item, "interactions", columns.item, "item", "columns.item")
    others = [_planned(each, f"columns.ids.{place}") for place, each in enumerate(columns.ids)]
    others += [_planned(each, f"columns.lists.{place}") for place, each in enumerate(columns.lists)]
    features = tuple(_typed(raw, [user, item, *others]))
    numerics = tuple(_numerics(raw, columns))
    for feature in features:
        _expect_file_name(feature)
    names = [each.name for each in features] + [each.name for each in numerics]
    names += ([history.name] if history else []) + [each.name for each in columns.labels]
    labels = _labels(columns, names)
    _expect_distinct([*names, *(name for label in labels for name in (label.mask, label.weight) if name)])
    plan = Plan(raw, features[0], features[1], features, numerics, labels, history, opened)
    unknown = sorted(set(opened) - set(plan.tables()))
    if unknown:
        raise ValueError(f"open_tables: there is no table {unknown[0]!r}; there are {', '.join(plan.tables())}")
    if history and columns.time is None:
        raise ValueError("history: needs columns.time, which is not set")
    if history and history.label and history.label not in [label.name for label in columns.labels]:
        raise ValueError(f"history.label: there is no label {history.label!r}")
    return plan


def _expect_scenario_names(raw: Raw) -> None:
    """Any source's scenarios have names of their own; those that read them from files say more about where."""
    names = [scenario.name for scenario in raw.scenarios]
    for place, name in enumerate(names):
        if not name or name in names[:place]:
            what = f"has the name {name!r} of another" if name else "has an empty name"
            where = f"{raw.interactions.where}: scenario {place} ({raw.scenarios[place].value!r})"
            raise ValueError(f"{where} {what}; give each a name of its own")


def _labels(columns: Columns, names: Sequence[str]) -> tuple[Label, ...]:
    """The labels; `names` are those of the other columns of the output, which masks and weights do not take."""
    taken = {*names, *TAKEN}

    def own(column: str | None, other: str) -> str | None:
        name = other if column in taken else column
        taken.add(name or "")
        return name or None

    return tuple(
        Label(name=each.name, mask=own(each.mask, f"{each.name}_mask"), weight=own(each.weight, f"{each.name}_weight"))
        for each in columns.labels
    )


def _expect_file_name(feature: PlannedFeature) -> None:
    """A table's vocabulary is a file that is called after it."""
    if "/" in feature.table:
        what = "a slash cannot stand in the name of a file, and its ids go to vocabulary/TABLE.parquet"
        plain = feature.key in ("columns.user", "columns.item")
        advice = "rename the raw column" if plain else f"set {feature.key}.table to a name without one"
        raise ValueError(f"{feature.key}: the table {feature.table!r} has a slash; {what}: {advice}")


def _expect_distinct(names: list[str]) -> None:
    """Every written column needs a name of its own."""
    twice = [name for place, name in enumerate(names) if name in [*names[:place], *TAKEN]]
    if twice:
        advice = "give one another name (`scenario` and `time` are taken)"
        raise ValueError(f"columns: two columns of the output would be called {twice[0]!r}; {advice}")


def _planned(column: IdColumn, key: str) -> PlannedFeature:
    group = column.group or GROUPS[column.source]
    feature = PlannedFeature(
        column.name, column.column or column.name, column.source, column.table or column.name, group, key
    )
    if isinstance(column, ListColumn):
        return replace(feature, pooling=column.pooling, separator=column.separator)
    return feature


def _numerics(raw: Raw, columns: Columns) -> list[PlannedNumeric]:
    planned = []
    for place, each in enumerate(columns.numerics):
        key, column = f"columns.numerics.{place}", each.column or each.name
        relation = relation_of(raw, each.source, key)
        kind = column_type(relation, column, key)
        if not is_number(kind) and kind != "BOOLEAN":
            raise ValueError(f"{relation.where}: column {column!r} is {kind} ({key}); a numeric feature is a number")
        planned.append(PlannedNumeric(each.name, column, each.source, each.group or GROUPS[each.source], key))
    return planned


def relation_of(raw: Raw, source: SourceName, key: str) -> Relation:
    """The relation called `source`; ValueError where the configuration gives no files for it."""
    relation = raw.relation(source)
    if relation is None:
        raise ValueError(f"{key}: source is {source!r}, but no {source} files are given")
    return relation


def _typed(raw: Raw, features: Sequence[PlannedFeature]) -> list[PlannedFeature]:
    """With one type per table: integers if all its columns hold integers, else text."""
    kinds: dict[PlannedFeature, str] = {}
    integers: dict[str, bool] = defaultdict(lambda: True)
    for feature in features:
        kinds[feature] = _id_type(raw, feature)
        integers[feature.table] &= is_integer(kinds[feature]) or is_float(kinds[feature])
    for source, entity in (("users", features[0]), ("items", features[1])):
        integers[entity.table] &= _key_is_integer(raw, "users" if source == "users" else "items")
    types = {True: "BIGINT", False: "VARCHAR"}
    return [replace(each, type=types[integers[each.table]], whole=is_float(kinds[each])) for each in features]


def _key_is_integer(raw: Raw, source: SourceName) -> bool:
    relation, columns = raw.relation(source), raw.columns
    if relation is None:
        return True
    own, key = (columns.users_key, columns.user) if source == "users" else (columns.items_key, columns.item)
    kind = column_type(relation, own or key, f"columns.{source}_key")
    _expect_id(relation, own or key, kind, f"columns.{source}_key")
    return is_integer(kind)


def _id_type(raw: Raw, feature: PlannedFeature) -> str:
    """The raw type of one id of `feature`."""
    relation = relation_of(raw, feature.source, feature.key)
    kind = column_type(relation, feature.column, feature.key)
    if feature.pooling is None:
        # Where some are null, pandas writes integers as floats.
        if is_float(kind) and feature.key not in ("columns.user", "columns.item"):
            return kind
        _expect_id(relation, feature.column, kind, feature.key)
        return kind
    where = f"{relation.where}: column {feature.column!r} is {kind} ({feature.key})"
    if feature.separator is not None:
        if kind != "VARCHAR":
            raise ValueError(f"{where}; a separator needs text: leave it out for a list column")
        return kind
    if not kind.endswith("[]"):
        raise ValueError(f"{where}; a list feature needs a list column, or text with a separator")
    _expect_id(relation, feature.column, kind.removesuffix("[]"), feature.key)
    return kind.removesuffix("[]")


def _expect_id(relation: Relation, column: str, kind: str, key: str) -> None:
    if not is_integer(kind) and kind not in ("VARCHAR", "BOOLEAN", "DATE") and not kind.startswith("ENUM"):
        where = f"{relation.where}: column {column!r} is {kind} ({key})"
        raise ValueError(f"{where}; ids are integers or text: cast it, or list it under columns.numerics")
