"""Canonical rows: ids as rows of their tables, numbers standardised, histories looked up; streamed in time order."""

from collections.abc import Iterator, Sequence

import pyarrow as pa

from msr_dist.data.prepare.database import Database, quoted
from msr_dist.data.prepare.mapping import SourceName, Split
from msr_dist.data.prepare.plan import Plan, PlannedFeature, PlannedNumeric
from msr_dist.data.prepare.vocabulary import hashed, vocabulary
from msr_dist.schema import SPLITS, Numeric

BATCH_ROWS = 1 << 17
"""Rows per Arrow batch between DuckDB and the parquet writer."""


def encode(database: Database, plan: Plan) -> tuple[Numeric, ...]:
    """Make the tables that `stream_split` joins. Returns the numeric features with their statistics."""
    for feature in plan.features:
        if feature.pooling:
            _encode_list(database, plan, feature)
    for source in ("users", "items"):
        _encode_entity(database, plan, source)
    with database.single_threaded():
        return tuple(_statistics(database, numeric) for numeric in plan.numerics)


def stream_split(
    database: Database, plan: Plan, numerics: Sequence[Numeric], split: Split, place: int
) -> Iterator[pa.RecordBatch]:
    """The rows of the split SPLITS[place] in the order of time, then of the raw files; columns of the schema.

    Histories hold positives at strictly earlier times: with a split by time those of the row's own split and of the
    splits before it (training rows see only training, test rows everything), otherwise those of training rows only.
    """
    if plan.history:
        _trail(database, plan, place if split.kind == "time" else SPLITS.index("train"))
    features = ", ".join(f"{sql} AS {quoted(name)}" for name, sql in _selected(plan, numerics).items())
    return database.stream(
        f"SELECT {features} FROM events e {' '.join(_joins(plan))} WHERE e.split = {place} ORDER BY e.time, e.row",
        BATCH_ROWS,
    )


def _selected(plan: Plan, numerics: Sequence[Numeric]) -> dict[str, str]:
    """Output column -> SQL."""
    selected = {feature.name: _selected_feature(plan, feature) for feature in plan.features}
    if plan.history:
        selected[plan.history.name] = "coalesce(h.items, [])"
    for planned, numeric in zip(plan.numerics, numerics, strict=True):
        value = f"{_alias(planned.source)}.{quoted(planned.staged)}"
        standard = f"(coalesce({value}, {numeric.mean!r}) - {numeric.mean!r}) / {numeric.std!r}"
        selected[planned.name] = f"CAST({standard} AS FLOAT)"
    for place, label in enumerate(plan.labels):
        selected[label.name] = f"CAST(e.{quoted(f'label:{place}')} AS UTINYINT)"
        selected |= {label.mask: f"e.{quoted(f'mask:{place}')}"} if label.mask else {}
        selected |= {label.weight: f"e.{quoted(f'weight:{place}')}"} if label.weight else {}
    selected["scenario"] = "e.scenario"
    return selected | ({"time": "e.time"} if plan.raw.columns.time else {})


def _selected_feature(plan: Plan, feature: PlannedFeature) -> str:
    if feature in (plan.user, plan.item):
        column, alias = ("e.user", "u") if feature == plan.user else ("e.item", "i")
        return hashed(column) if feature.table in plan.open else f"coalesce({alias}.row, 0)"
    if feature.source != "interactions":
        absent = "[]" if feature.pooling else "0"
        return f"coalesce({_alias(feature.source)}.{quoted(feature.staged)}, {absent})"
    if feature.table in plan.open and not feature.pooling:
        return f"coalesce({hashed(f'e.{quoted(feature.staged)}')}, 0)"
    column, absent = ("list", "[]") if feature.pooling else ("row", "0")
    return f"coalesce({quoted(feature.staged)}.{column}, {absent})"


def _joins(plan: Plan) -> list[str]:
    joins = ["LEFT JOIN user_rows u ON u.id = e.user", "LEFT JOIN item_rows i ON i.id = e.item"]
    for feature in plan.side("interactions"):
        alias = quoted(feature.staged)
        if feature.pooling:
            joins.append(f"LEFT JOIN {quoted(f'list:{feature.name}')} {alias} ON {alias}.key = e.row")
        elif feature.table not in plan.open:
            joins.append(f"LEFT JOIN {vocabulary(feature.table)} {alias} ON {alias}.id = e.{alias}")
    # The last trail that ended before the row's own moment.
    return [*joins, "ASOF LEFT JOIN trail h ON h.user = e.user AND e.time > h.time"] if plan.history else joins


def _alias(source: SourceName) -> str:
    return {"interactions": "e", "users": "u", "items": "i"}[source]


def _encode_list(database: Database, plan: Plan, feature: PlannedFeature) -> None:
    """`list:NAME` (key, list): the known ids of each list, in its order; the key is a row or a user or an item.

    Where the vocabulary is open, all are known.
    """
    table, key = ("events", "row") if feature.source == "interactions" else (f"side_{feature.source}", "id")
    column = quoted(feature.staged)
    flat = f"SELECT {key} AS key, unnest({column}) AS id, generate_subscripts({column}, 1) AS place FROM {table}"
    row, known = "v.row", f"JOIN {vocabulary(feature.table)} v USING (id)"
    if feature.table in plan.open:
        row, known = hashed("id"), "WHERE id IS NOT NULL"
    database.execute(
        f"CREATE TABLE {quoted(f'list:{feature.name}')} AS SELECT key, list({row} ORDER BY place) AS list "
        f"FROM ({flat}) {known} GROUP BY key"
    )


def _encode_entity(database: Database, plan: Plan, source: SourceName) -> None:
    """`user_rows` or `item_rows` (id, row, side features): everyone whom training or the side files know."""
    entity, name = plan.entity(source), f"{source.removesuffix('s')}_rows"
    known = f"SELECT row, id FROM {vocabulary(entity.table)}"
    if entity.table in plan.open:
        # Whoever is known: everybody's row is a hash, which nobody has to look up.
        known = f"SELECT 0 AS row, id FROM train_{source}"
    if plan.raw.relation(source) is None:
        database.execute(f"CREATE TABLE {name} AS {known}")
        return
    columns, joins = ["coalesce(v.row, 0) AS row", "coalesce(v.id, s.id) AS id"], []
    for feature in plan.side(source):
        alias = quoted(feature.staged)
        if feature.pooling:
            columns.append(f"{alias}.list AS {alias}")
            joins.append(f"LEFT JOIN {quoted(f'list:{feature.name}')} {alias} ON {alias}.key = s.id")
        elif feature.table in plan.open:
            columns.append(f"{hashed(f's.{alias}')} AS {alias}")
        else:
            columns.append(f"{alias}.row AS {alias}")
            joins.append(f"LEFT JOIN {vocabulary(feature.table)} {alias} ON {alias}.id = s.{alias}")
    columns += [f"s.{quoted(each.staged)} AS {quoted(each.staged)}" for each in plan.numerics if each.source == source]
    database.execute(
        f"CREATE TABLE {name} AS SELECT {', '.join(columns)} FROM ({known}) v "
        f"FULL JOIN side_{source} s ON s.id = v.id {' '.join(joins)}"
    )


def _trail(database: Database, plan: Plan, last: int) -> None:
    """`trail` (user, time, items): after each moment of a user with positives, the last of them, newest first.

    Only rows up to the split SPLITS[last] count: where each scenario has cuts in time of its own, a training row may be
    later than another scenario's test row, and must not show that row's label. One split's trail at a time, so that
    the database holds no more than one of them.
    """
    assert plan.history is not None
    item, known = "i.row", "JOIN item_rows i ON i.id = e.item"
    if plan.item.table in plan.open:
        item, known = hashed("e.item"), ""
    positives = (
        f"SELECT e.user, e.time, e.row, {item} AS item FROM events e {known} "
        f"WHERE {_positive(plan)} AND {item} > 0 AND e.split <= {last}"
    )
    window = f"PARTITION BY user ORDER BY time, row ROWS BETWEEN {plan.history.length - 1} PRECEDING AND CURRENT ROW"
    database.execute(
        "CREATE OR REPLACE TABLE trail AS SELECT user, time, items FROM ("
        f"SELECT user, time, list_reverse(list(item) OVER ({window})) AS items, "
        "lead(time) OVER (PARTITION BY user ORDER BY time, row) AS next "
        f"FROM ({positives})) WHERE next IS DISTINCT FROM time"
    )


def _positive(plan: Plan) -> str:
    label = plan.raw.columns.labels[plan.positive]
    known = f" AND e.{quoted(f'mask:{plan.positive}')}" if label.mask else ""
    return f"e.{quoted(f'label:{plan.positive}')} = 1{known}"


def _statistics(database: Database, numeric: PlannedNumeric) -> Numeric:
    """Mean and standard deviation over training rows, to 12 digits."""
    value = f"x.{quoted(numeric.staged)}"
    if numeric.source == "interactions":
        source = f"SELECT {value} AS v, 1 AS n FROM events x WHERE split = 0"
    else:
        joined = f"side_{numeric.source} x JOIN train_{numeric.source} t ON t.id = x.id"
        source = f"SELECT {value} AS v, t.n AS n FROM {joined}"
    mean, _ = database.row(f"SELECT sum(v * n) / sum(n), 0 FROM ({source}) WHERE v IS NOT NULL")
    mean = float(f"{mean or 0.0:.12g}")
    variance, _ = database.row(f"SELECT sum((v - {mean!r}) ** 2 * n) / sum(n), 0 FROM ({source}) WHERE v IS NOT NULL")
    std = float(f"{(variance or 0.0) ** 0.5:.12g}")
    return Numeric(name=numeric.name, group=numeric.group, mean=mean, std=std if std > 0 else 1.0)
