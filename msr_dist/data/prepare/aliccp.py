r"""Source `aliccp`: Alibaba's click and conversion log of Taobao, with the positions of field 301 as scenarios.

    kind = "aliccp"
    raw = "ali-ccp"

The data are Alibaba's (https://tianchi.aliyun.com/dataset/408). Neither file has a header:

    sample_skeleton_{train,test}.csv   sample, click, conversion, common feature index, number of features, features
    common_features_{train,test}.csv   common feature index, number of features, features

with features FIELD\x02ID\x03VALUE joined by \x01: one entry for most fields; up to 1,000 for the user's behaviours
(109_14, 110_14, 127_14, 150_14) and some for 210 and 853.

Kept as features is what the publisher gives as known before the impression: behaviours are the user's history, and the
crosses (508, 509, 702, 853) look the item up in it. Their values, logarithms of counts, are numbers here for the
crosses, and for behaviours say which ones are kept. Field 301 is the scenario and no feature besides, or some models
would have more inputs than others.

Not verified on the publisher's files: that histories end before the impression; the raw ids of the three positions,
except for 9351665, and so which of them has how many rows (published are 32,236,951, 639,897 and 52,439,671); whether
every common line has a user (field 101). Where one has none, it counts as a user of its own; samples without an item
share item 0. A few hundred samples have a conversion without a click, which the publisher rules out: they stay, without
conversion.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, final

from pydantic import Field

from msr_dist.data.prepare.database import Database, quoted, text
from msr_dist.data.prepare.files import Layout, Part, load
from msr_dist.data.prepare.mapping import (
    ROW,
    Columns,
    EachOnce,
    IdColumn,
    ListColumn,
    NumericColumn,
    Raw,
    Relation,
    ScenarioValue,
)
from msr_dist.data.prepare.published import GivenTest, expect, expect_one_each

SCENARIO_FIELD = "301"
SCENARIOS = 3
USER_FIELDS = {
    "user_id": "101",
    "profile": "121",
    "profile_group": "122",
    "gender": "124",
    "age": "125",
    "consumption_1": "126",
    "consumption_2": "127",
    "occupation": "128",
    "geography": "129",
}
BEHAVIOUR_FIELDS = {
    "behaviour_categories": "109_14",
    "behaviour_shops": "110_14",
    "behaviour_brands": "127_14",
    "behaviour_intentions": "150_14",
}
ITEM_FIELDS = {"item_id": "205", "category": "206", "shop": "207", "brand": "216"}
ITEM_LISTS = {"intentions": "210"}
CROSS_FIELDS = {"category_cross": "508", "shop_cross": "509", "brand_cross": "702"}
CROSS_LISTS = {"intention_cross": "853"}
ENTRY = r"[0-9]+(?:_[0-9]+)?\x02[0-9]{1,18}\x03[0-9.eE+-]+"
NAMELESS = 1 << 40
"""Where ids of users begin that the publisher does not name; far above all of the publisher's ids."""
COMMON = {"index": "VARCHAR", "number": "BIGINT", "features": "VARCHAR"}
SAMPLE = {"sample": "BIGINT", "click": "UTINYINT", "buy": "UTINYINT", **COMMON}
"""Column -> DuckDB type of the lines of both kinds of files."""
ADVICE = "unpack the publisher's archives again (raw)"


@final
class Config(GivenTest):
    """Ali-CCP; `click`, and `conversion` after a click. The publisher's test rows are the test split."""

    kind: Literal["aliccp"] = "aliccp"
    raw: Path
    """The folder with sample_skeleton_train.csv, common_features_train.csv, and the same for test."""
    behaviours: int = Field(default=5, ge=0)
    """How many ids of each kind of behaviour to keep, those with the greatest values first; 0 leaves them out. Each row
    holds them: with 85 million rows they soon take most of the time and of the disk."""
    positions: Annotated[tuple[int, ...], EachOnce] = ()
    """The scenarios as raw ids of field 301, in this order; by default those of the data, ascending, three at most."""

    def open(self, database: Database) -> Raw:
        """The samples, with what they have in common beside them."""
        files: dict[str, list[Part]] = {"common": [], "samples": []}
        for name in ("train", "test"):
            test = f"{name == 'test'} AS test"
            for view, stem, fields, selected in (
                ("common", "common_features", COMMON, ["index", *self._common()]),
                ("samples", "sample_skeleton", SAMPLE, ["index", "click", "buy", *_sample()]),
            ):
                layout = Layout(names=tuple(fields), types=fields, quotes=False)
                files[view].append(Part(self.raw / f"{stem}_{name}.csv", layout, [test, *selected]))
        common, samples = (load(database, view, parts, ADVICE) for view, parts in files.items())
        for table in (common, samples):
            advice = f"expected FIELD\\x02ID\\x03VALUE joined by \\x01: {ADVICE}"
            expect(database, table, "fault IS NOT NULL", "concat('malformed features ', fault)", advice)
        expect(database, samples, "buy IS NULL OR buy > 1", "concat('a conversion that is ', buy)", f"0 or 1: {ADVICE}")
        expect_one_each(database, samples, common, ("test", "index"), ADVICE)
        columns = [
            "s.* EXCLUDE (test, index, buy, fault, item_id)",
            f"c.* EXCLUDE (test, index, fault, user_id, {ROW})",
            "CASE WHEN s.click = 0 THEN 0 ELSE s.buy END AS conversion",
            f"coalesce(c.user_id, {NAMELESS} + c.{ROW}) AS user_id",
            "coalesce(s.item_id, 0) AS item_id",
            f"{self.split_column('s.test', 's.index')} AS split",
        ]
        joined = "samples s JOIN common c ON c.index = s.index AND c.test = s.test"
        database.execute(f"CREATE VIEW interactions AS SELECT {', '.join(columns)} FROM {joined}")
        relation = replace(samples, view="interactions", types=database.types("interactions"))
        advice = f"correct these rows, or say which are the scenarios (positions): values of field {SCENARIO_FIELD}"
        return Raw(self._columns(), relation, self._scenarios(database, samples), scenario_advice=advice)

    def _common(self) -> list[str]:
        lists = [_list(field, name, self.behaviours) for name, field in BEHAVIOUR_FIELDS.items() if self.behaviours]
        return [_fault(), *(_first(field, name) for name, field in USER_FIELDS.items()), *lists]

    def _scenarios(self, database: Database, samples: Relation) -> tuple[ScenarioValue, ...]:
        expect(database, samples, "position IS NULL", f"'no field {SCENARIO_FIELD}, which says the scenario'", ADVICE)
        found = database.rows(f"SELECT position, min({ROW}) FROM samples GROUP BY position ORDER BY position")
        if not self.positions and len(found) > SCENARIOS:
            listed = ", ".join(str(value) for value, _ in found)
            last = samples.locate(max(row for _, row in found))
            what = f"field {SCENARIO_FIELD} has more than {SCENARIOS} values by then ({listed} in all)"
            raise ValueError(f"{last}: {what}; remove the wrong lines, or say which are the scenarios (positions)")
        values = self.positions or tuple(value for value, _ in found)
        return tuple(
            ScenarioValue(value, f"position {value}", "A place on Taobao's pages where items are recommended.")
            for value in values
        )

    def _columns(self) -> Columns:
        groups = {"user": USER_FIELDS, "item": ITEM_FIELDS, "context": CROSS_FIELDS}
        ids = [
            IdColumn(name=name, group=group)
            for group, fields in groups.items()
            for name in fields
            if name not in ("user_id", "item_id")
        ]
        lists = {"item": ITEM_LISTS, "context": CROSS_LISTS, **({"user": BEHAVIOUR_FIELDS} if self.behaviours else {})}
        return Columns(
            user="user_id",
            item="item_id",
            scenario="position",
            labels=self.labels(),
            ids=tuple(ids),
            lists=tuple(ListColumn(name=name, group=group) for group, fields in lists.items() for name in fields),
            numerics=tuple(NumericColumn(name=f"{name}_value") for name in (*CROSS_FIELDS, *CROSS_LISTS)),
        )


def _sample() -> list[str]:
    crosses = CROSS_FIELDS | CROSS_LISTS
    return [
        _fault(),
        _first(SCENARIO_FIELD, "position"),
        *(_first(field, name) for name, field in (ITEM_FIELDS | CROSS_FIELDS).items()),
        *(_list(field, name) for name, field in (ITEM_LISTS | CROSS_LISTS).items()),
        *(f"CAST({_total(field)} AS FLOAT) AS {name}_value" for name, field in crosses.items()),
    ]


def _fault() -> str:
    """SQL of the beginning of features that are malformed, null for others."""
    well_formed = text(rf"{ENTRY}(?:\x01{ENTRY})*")
    return f"CASE WHEN NOT regexp_full_match(features, {well_formed}) THEN left(features, 80) END AS fault"


def _entries(field: str) -> str:
    """SQL of the entries of `field`, with the greatest value first."""
    entries = f"list_filter(string_split(features, chr(1)), lambda e: starts_with(e, concat({text(field)}, chr(2))))"
    value = "TRY_CAST(split_part(e, chr(3), 2) AS DOUBLE)"
    number = "TRY_CAST(split_part(split_part(e, chr(2), 2), chr(3), 1) AS BIGINT)"
    return f"list_sort(list_transform({entries}, lambda e: {{'value': {value}, 'id': {number}}}), 'DESC')"


def _first(field: str, name: str) -> str:
    return f"({_entries(field)})[1].id AS {quoted(name)}"


def _total(field: str) -> str:
    return f"coalesce(list_sum(list_transform({_entries(field)}, lambda e: e.value)), 0)"


def _list(field: str, name: str, longest: int | None = None) -> str:
    shown = f"({_entries(field)})[1:{longest}]" if longest else _entries(field)
    return f"list_transform({shown}, lambda e: e.id) AS {quoted(name)}"
