"""Raw rows into typed tables of the database, and every check on what they hold.

Tables: `staged` (row, user, item, scenario, time, label:i, mask:i, weight:i, features, carried columns, and split where
it does not follow from the time), `side_users` and `side_items` (id, features, text).
"""

from collections.abc import Sequence

import duckdb
import pyarrow as pa

from msr_dist.data.prepare.database import Database, is_integer, is_number, quoted, text
from msr_dist.data.prepare.files import column_type, explain
from msr_dist.data.prepare.mapping import ROW, LabelColumn, Relation, SourceName, Split
from msr_dist.data.prepare.plan import Plan, PlannedFeature
from msr_dist.schema import SPLITS

TIME_UNITS = {"s": 1, "ms": 1000, "us": 1_000_000}


def stage(database: Database, plan: Plan, split: Split) -> None:
    """Make the staged tables. Raises ValueError for rows that cannot be used: none is ever dropped."""
    raw = plan.raw
    sides: list[SourceName] = [source for source in ("users", "items") if raw.relation(source)]
    columns = _interaction_columns(plan, split)
    try:
        _expect_whole(database, plan)
        _scenario_table(database, plan)
        database.execute(
            f"CREATE TABLE staged AS SELECT {', '.join(columns)} FROM {quoted(raw.interactions.view)} r "
            f"LEFT JOIN scenario_values s ON s.value = r.{quoted(raw.columns.scenario)}"
        )
        for source in sides:
            _stage_side(database, plan, source)
    except duckdb.Error as error:
        raise explain(error, filter(None, (raw.interactions, raw.users, raw.items))) from None
    _check_interactions(database, plan, split)
    for source in sides:
        _check_side(database, plan, source)


def _expect_whole(database: Database, plan: Plan) -> None:
    """Checked on the raw rows: a cast to integers would round."""
    for source in ("interactions", "users", "items"):
        relation = plan.raw.relation(source)
        floats = [each for each in plan.features if each.source == source and each.whole]
        if relation and floats:
            wrong = "{0} <> floor({0}) AND NOT isnan({0}) OR isinf({0})"
            what, advice = "an id that is no whole number", "round it, or list the column under columns.numerics"
            checks = [
                (wrong.format(quoted(each.column)), each.column, f"{what} ({each.key})", advice) for each in floats
            ]
            _check(database, relation.view, relation, checks, ROW)


def _interaction_columns(plan: Plan, split: Split) -> list[str]:
    raw, columns = plan.raw, plan.raw.columns
    named = [(ROW, "row"), (_id(columns.user, plan.user.type), "user"), (_id(columns.item, plan.item.type), "item")]
    named += [("s.id", "scenario"), (_time(plan), "time")]
    for place, label in enumerate(columns.labels):
        named += _label(raw.interactions, label, place)
    named += [(_feature(each), each.staged) for each in plan.side("interactions")]
    named += [(_number(each.column), each.staged) for each in plan.numerics if each.source == "interactions"]
    named += [(quoted(column), f"carry:{column}") for column in raw.carry]
    named += _given_split(raw.interactions, split)
    return [f"{sql} AS {quoted(name)}" for sql, name in named]


def _id(column: str, kind: str) -> str:
    return f"CAST(r.{quoted(column)} AS {kind})"


def _feature(feature: PlannedFeature) -> str:
    column = f"r.{quoted(feature.column)}"
    if feature.separator is not None:
        return f"list_filter(string_split({column}, {text(feature.separator)}), lambda x: x <> '')"
    if feature.whole:
        return f"CAST(CAST({_known(column)} AS BIGINT) AS {feature.type})"
    return f"CAST({column} AS {feature.type}{'[]' if feature.pooling else ''})"


def _number(column: str) -> str:
    return _known(f"CAST(r.{quoted(column)} AS DOUBLE)")


def _known(value: str) -> str:
    """A missing number often comes as NaN."""
    return f"CASE WHEN isnan({value}) THEN NULL ELSE {value} END"


def _time(plan: Plan) -> str:
    """SQL of the time in whole seconds, or of the place in the files where the data have no time."""
    columns, relation = plan.raw.columns, plan.raw.interactions
    if columns.time is None:
        return ROW
    kind, column = column_type(relation, columns.time, "columns.time"), f"r.{quoted(columns.time)}"
    if is_integer(kind):
        return f"CAST({column} // {TIME_UNITS[columns.time_unit]} AS BIGINT)"
    if kind.startswith(("TIMESTAMP", "DATE")):
        return f"CAST(floor(epoch({column})) AS BIGINT)"
    raise ValueError(
        f"{relation.where}: column {columns.time!r} is {kind} (columns.time); a time is an integer or a timestamp"
    )


def _label(relation: Relation, label: LabelColumn, place: int) -> list[tuple[str, str]]:
    """Columns label:i (0 and 1 if right, null if unknown), mask:i and weight:i."""
    key = f"columns.labels.{place}"
    column = label.column or label.name
    # DuckDB takes NaN as greater than any threshold.
    value = _known(f"CAST({_numeric(relation, column, key)} AS DOUBLE)")
    value = value if label.above is None else f"CAST({value} > {label.above} AS DOUBLE)"
    named = []
    if label.mask:
        mask = f"CAST({_numeric(relation, label.mask, f'{key}.mask')} AS BOOLEAN)"
        named.append((mask, f"mask:{place}"))
        value = f"CASE WHEN {mask} = false THEN 0 ELSE {value} END"
    if label.weight:
        weight = f"CAST({_numeric(relation, label.weight, f'{key}.weight')} AS FLOAT)"
        named.append((weight, f"weight:{place}"))
    return [(value, f"label:{place}"), *named]


def _numeric(relation: Relation, column: str, key: str) -> str:
    kind = column_type(relation, column, key)
    if kind != "BOOLEAN" and not is_number(kind):
        raise ValueError(f"{relation.where}: column {column!r} is {kind} ({key}); expected numbers or booleans")
    return f"r.{quoted(column)}"


def _given_split(relation: Relation, split: Split) -> list[tuple[str, str]]:
    if split.kind == "random":
        # md5, since DuckDB's own hash may change between versions and with it everybody's split.
        place = f"(md5_number_lower(concat({text(f'{split.seed}:')}, CAST({ROW} AS VARCHAR))) % 1000000)"
        first, second = round(split.fractions[0] * 1e6), round(sum(split.fractions[:2]) * 1e6)
        sql = f"CASE WHEN {place} < {first} THEN 0 WHEN {place} < {second} THEN 1 ELSE 2 END"
        return [(f"CAST({sql} AS TINYINT)", "split")]
    if split.kind == "column" and split.column:
        column_type(relation, split.column, "split.column")
        whens = " ".join(f"WHEN {text(name)} THEN {place}" for place, name in enumerate(SPLITS))
        return [(f"CAST(CASE CAST(r.{quoted(split.column)} AS VARCHAR) {whens} END AS TINYINT)", "split")]
    return []


def _scenario_table(database: Database, plan: Plan) -> None:
    columns, relation = plan.raw.columns, plan.raw.interactions
    kind = column_type(relation, columns.scenario, "columns.scenario")
    if not is_integer(kind) and kind != "VARCHAR":
        where = f"{relation.where}: column {columns.scenario!r} is {kind} (columns.scenario)"
        raise ValueError(f"{where}; scenarios are integers or text")
    values = [scenario.value for scenario in plan.raw.scenarios]
    as_kind = pa.int64() if is_integer(kind) else pa.string()
    if is_integer(kind) and not all(isinstance(value, int) for value in values):
        raise ValueError(f"{relation.where}: column {columns.scenario!r} is {kind}, but the scenarios are text")
    cast = values if is_integer(kind) else [str(value) for value in values]
    ids = pa.array(range(len(values)), pa.int32())
    database.add("scenario_values", pa.table({"value": pa.array(cast, as_kind), "id": ids}))


def _stage_side(database: Database, plan: Plan, source: SourceName) -> None:
    relation = plan.raw.relation(source)
    assert relation is not None
    texts = plan.raw.columns.user_text if source == "users" else plan.raw.columns.item_text
    named = [(ROW, "row"), (_id(plan.key_column(source), plan.entity(source).type), "id")]
    named += [(_feature(each), each.staged) for each in plan.side(source)]
    named += [(_number(each.column), each.staged) for each in plan.numerics if each.source == source]
    for name in texts:
        column_type(relation, name, f"columns.{source.removesuffix('s')}_text")
        named.append((f"coalesce({_as_text(relation, name)}, '')", f"text:{name}"))
    select = ", ".join(f"{sql} AS {quoted(name)}" for sql, name in named)
    database.execute(f"CREATE TABLE side_{source} AS SELECT {select} FROM {quoted(relation.view)} r")


def _as_text(relation: Relation, column: str) -> str:
    if relation.types[column].endswith("[]"):
        return f"array_to_string(r.{quoted(column)}, ', ')"
    return f"CAST(r.{quoted(column)} AS VARCHAR)"


def _check_interactions(database: Database, plan: Plan, split: Split) -> None:
    columns, relation = plan.raw.columns, plan.raw.interactions
    checks = [*_id_checks("user", columns.user, plan.user.type, "columns.user")]
    checks += _id_checks("item", columns.item, plan.item.type, "columns.item")
    checks.append(("scenario IS NULL", columns.scenario, "an unknown scenario", plan.raw.scenario_advice))
    if columns.time:
        checks.append(("time IS NULL", columns.time, "a null time (columns.time)", "fill or remove these rows"))
    for place, label in enumerate(columns.labels):
        checks += _label_checks(label, place)
    for numeric in plan.numerics:
        if numeric.source == "interactions":
            checks.append(_finite_check(numeric.staged, numeric.column, numeric.key))
    if split.kind == "column" and split.column:
        what = "a value that is none of train, valid, test (split.column)"
        checks.append(("split IS NULL", split.column, what, "correct these rows"))
    _check(database, "staged", relation, checks)


_Check = tuple[str, str, str, str]
"""What is wrong (SQL), the raw column, the fault in words, what to do."""


def _id_checks(staged: str, column: str, kind: str, key: str) -> list[_Check]:
    checks = [(f"{quoted(staged)} IS NULL", column, f"a null id ({key})", "fill or remove these rows")]
    if kind == "BIGINT":
        checks.append((f"{quoted(staged)} < 0", column, f"a negative id ({key})", "ids are 0 or greater, or text"))
    return checks


def _label_checks(label: LabelColumn, place: int) -> list[_Check]:
    key, value = f"columns.labels.{place}", quoted(f"label:{place}")
    advice = "use 0 and 1, set `above` to a threshold, or mask unknown rows"
    if label.above is not None:
        advice = "it is null or no number: fill or remove these rows"
    wrong = f"{value} IS NULL OR {value} NOT IN (0, 1)"
    checks = [(wrong, label.column or label.name, f"a label outside {{0, 1}} ({key})", advice)]
    if label.mask:
        checks.append((f"{quoted(f'mask:{place}')} IS NULL", label.mask, f"a null mask ({key}.mask)", "fill it"))
    if label.weight:
        weight = quoted(f"weight:{place}")
        wrong = f"{weight} IS NULL OR NOT isfinite({weight}) OR {weight} < 0"
        what = f"a weight that is null, negative or infinite ({key}.weight)"
        checks.append((wrong, label.weight, what, "weights are 0 or greater"))
    return checks


def _finite_check(staged: str, column: str, key: str) -> _Check:
    return (f"isinf({quoted(staged)})", column, f"an infinite number ({key})", "clip it, or make it null")


def _check_side(database: Database, plan: Plan, source: SourceName) -> None:
    relation = plan.raw.relation(source)
    assert relation is not None
    key = plan.key_column(source)
    checks = _id_checks("id", key, plan.entity(source).type, f"columns.{source}_key")
    checks += [_finite_check(each.staged, each.column, each.key) for each in plan.numerics if each.source == source]
    _check(database, f"side_{source}", relation, checks)
    twice = database.rows(f"SELECT id, max(row) FROM side_{source} GROUP BY id HAVING count(*) > 1 ORDER BY 2 LIMIT 1")
    if twice:
        where = f"{relation.locate(twice[0][1])}, column {key!r}"
        raise ValueError(f"{where}: {twice[0][0]!r} stands there a second time; give each of the {source} one row")


def _check(database: Database, table: str, relation: Relation, checks: Sequence[_Check], row: str = "row") -> None:
    """One pass over `table`, with row numbers in `row`, for all checks; ValueError for the first that finds rows."""
    parts = [f"count(*) FILTER ({wrong}), min({row}) FILTER ({wrong})" for wrong, *_ in checks]
    found = database.row(f"SELECT {', '.join(parts)} FROM {quoted(table)}")
    for (_, column, what, advice), count, first in zip(checks, found[::2], found[1::2], strict=True):
        if count:
            view = f"SELECT {quoted(column)} FROM {quoted(relation.view)} WHERE {ROW} = {first}"
            value = database.row(view)[0]
            where = f"{relation.locate(first)}, column {column!r}"
            raise ValueError(f"{where}: {what}, {value!r}, here and in {count - 1} more rows; {advice}")
