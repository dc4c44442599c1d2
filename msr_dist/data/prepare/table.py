"""Source `table`: your own logs, parquet or CSV, described by a mapping of their columns.

kind = "table"
interactions = ["logs/*.parquet"]
items = ["items.csv"]

[columns]
user = "user_id"
item = "item_id"
scenario = "tab"
time = "timestamp"

[[columns.labels]]
name = "click"
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal, final

import duckdb
from pydantic import Field

from msr_dist.data.prepare.canonical import PrepareConfig
from msr_dist.data.prepare.database import Database, quoted
from msr_dist.data.prepare.files import column_type, explain, open_files, without
from msr_dist.data.prepare.mapping import ROW, Columns, EachOnce, Raw, Relation, ScenarioValue


@final
class Config(PrepareConfig):
    """Your own logs. All paths may be globs; files of one list must have the same columns.

    A column of ids is integers or text for all files and features that share its table. If one of them holds text,
    all are compared as text: `7` and `007` are then different ids. In CSV a column is text where its first 20,000 rows
    or so hold anything but plain integers; already `007` makes it text, so write ids with the same number of digits.
    """

    kind: Literal["table"] = "table"
    interactions: tuple[str, ...] = Field(min_length=1)
    """The log: one row per impression, with user, item, scenario and labels."""
    users: tuple[str, ...] = ()
    """One row per user, with side features and text."""
    items: tuple[str, ...] = ()
    """One row per item, with side features and text."""
    scenarios: tuple[str, ...] = ()
    """One row per scenario, in the order of their ids; without it, the distinct values of the log, sorted."""
    keep: Annotated[tuple[int | str, ...], EachOnce] = ()
    """Values of the scenario column whose rows to keep; without it, all. The others are left out, and counted."""
    delimiter: str = Field(default=",", min_length=1, max_length=4)
    """What separates the fields of CSV files; those called .tsv have tabs all the same."""
    columns: Columns

    def open(self, database: Database) -> Raw:
        """Views of the files, after their footers or headers are checked."""
        interactions = self._open(database, "interactions", self.interactions)
        users = self._open(database, "users", self.users) if self.users else None
        items = self._open(database, "items", self.items) if self.items else None
        for given, texts, name in ((users, self.columns.user_text, "user"), (items, self.columns.item_text, "item")):
            if texts and given is None:
                raise ValueError(f"columns.{name}_text: needs {name}s files, but none are given")
        listed = self._open(database, "scenarios", self.scenarios) if self.scenarios else None
        try:
            scenarios = _from_file(database, listed, self.columns) if listed else self._of_log(database, interactions)
        except duckdb.Error as error:
            raise explain(error, filter(None, (listed, interactions))) from None
        advice = "name it in the scenarios files, or correct these rows" if listed else "fill or remove these rows"
        raw = Raw(self.columns, interactions, scenarios, users, items, scenario_advice=advice)
        return self._kept(database, raw) if self.keep else raw

    def _kept(self, database: Database, raw: Raw) -> Raw:
        known = [scenario.value for scenario in raw.scenarios]
        for value in self.keep:
            if value not in known:
                listed = ", ".join(map(repr, known[:20]))
                raise ValueError(f"keep: there is no scenario {value!r} (columns.scenario); there are {listed}")
        others = {scenario.value: scenario.name for scenario in raw.scenarios if scenario.value not in self.keep}
        column = self.columns.scenario
        interactions, notes = without(database, raw.interactions, "kept", column, others, "keep", "scenario")
        kept = tuple(scenario for scenario in raw.scenarios if scenario.value in self.keep)
        return replace(raw, interactions=interactions, scenarios=kept, notes=notes)

    def _open(self, database: Database, name: str, patterns: Sequence[str]) -> Relation:
        return open_files(database, name, patterns, name, self.delimiter)

    def _of_log(self, database: Database, interactions: Relation) -> tuple[ScenarioValue, ...]:
        column_type(interactions, self.columns.scenario, "columns.scenario")
        name = quoted(self.columns.scenario)
        found = database.rows(f"SELECT DISTINCT {name} FROM interactions WHERE {name} IS NOT NULL ORDER BY 1")
        if ("",) in found:
            (row,) = database.row(f"SELECT min({ROW}) FROM interactions WHERE {name} = ''")
            where = f"{interactions.locate(row)}, column {self.columns.scenario!r}"
            raise ValueError(f"{where}: an empty scenario (columns.scenario); name it, or remove these rows")
        return tuple(ScenarioValue(value, str(value)) for (value,) in found)


def _from_file(database: Database, relation: Relation, columns: Columns) -> tuple[ScenarioValue, ...]:
    keys = {columns.scenario_key: "columns.scenario_key", columns.scenario_name: "columns.scenario_name"}
    for column, key in keys.items():
        column_type(relation, column, key)
    about = "''"
    if columns.scenario_text:
        column_type(relation, columns.scenario_text, "columns.scenario_text")
        about = f"coalesce(CAST({quoted(columns.scenario_text)} AS VARCHAR), '')"
    selected = f"{quoted(columns.scenario_key)}, CAST({quoted(columns.scenario_name)} AS VARCHAR), {about}"
    rows = database.rows(f"SELECT {selected} FROM scenarios ORDER BY {ROW}")
    for place, (value, name, _) in enumerate(rows):
        if value is None or not name:
            raise ValueError(f"{relation.locate(place)}: a scenario without an id or a name; fill it")
        if value in [other for other, *_ in rows[:place]]:
            raise ValueError(f"{relation.locate(place)}: scenario {value!r} stands there a second time; remove one")
        if name in [other for _, other, _ in rows[:place]]:
            where = f"{relation.locate(place)}, column {columns.scenario_name!r}"
            raise ValueError(f"{where}: a second scenario has the name {name!r}; give each a name of its own")
    return tuple(ScenarioValue(*row) for row in rows)
