"""The rows that two towers are trained on and judged by, made from a prepared data set and read like one.

FOLDER/
  schema.toml              what a row is
  rows/part-*.parquet      the rows, in an order that is drawn from the seed
  answers.parquet          (queries only) what was chosen, and what had been before
  summary.json             what is worth knowing of them; it is written last

Every folder is whole or absent, and made anew where the data or the settings are others than it was made from. DuckDB
does the work out of core. Equal data and settings give equal rows. One of several processes writes; the others wait.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from msr_dist.data.prepare.database import Database, DatabaseError, first_line, quoted, text
from msr_dist.data.prepare.write import write_split
from msr_dist.files import PARTIAL, write_whole
from msr_dist.schema import SPLITS, UNSEEN, FeatureSchema, Label, Numeric

FORMAT = 1
"""Counts up when the same data and settings give other rows."""
ROWS, ANSWERS_FILE, SUMMARY_FILE = "rows", "answers.parquet", "summary.json"
LOG_SHARE = "sampling_log_share"
"""Logarithm of the item's share of its scenario's rows."""
SAMPLING = "sampling"
"""The group of the numeric feature LOG_SHARE, which no tower reads."""
PAIR_LABELS = "user_pair", "item_pair"
_ROW_GROUP_ROWS = 65536
_FILE_ROWS = 4_000_000
_BATCH_ROWS = 65536
_LOOK_EVERY = 0.1
_APART = 1 << 64
_OFFSET = 1 << 40


@dataclass(frozen=True)
class Sides:
    """What rows are made of: a prepared data set, and which of its columns belong to the user and to the item."""

    data: Path
    schema: FeatureSchema
    """With the features that the towers read, and no others."""
    user_groups: tuple[str, ...]
    label: str | None
    """What makes a row one of a choice; None: the first label."""
    seed: int
    memory_limit: str
    writes: bool = True
    """Whether this process writes the rows, or waits for another to do it."""

    @property
    def chosen_label(self) -> Label:
        """The label; ValueError where there is no such."""
        if self.label is None:
            return self.schema.labels[0]
        found = next((label for label in self.schema.labels if label.name == self.label), None)
        if found is None:
            known = ", ".join(label.name for label in self.schema.labels)
            raise ValueError(f"there is no label {self.label!r}; {self.data} has {known}")
        return found


def write_choices(sides: Sides, out: Path, shown_negatives: bool, uniform_negatives: float) -> dict[str, Any]:
    """Write the rows of choices, and those that are only there for their items: see `objectives.Retrieval`.

    Returns:
        the summary: rows of choices, shown and drawn items, by scenario.

    Raises:
        ValueError: there is no such label, or no row of a choice.
    """

    def make(work: "_Work") -> tuple[FeatureSchema, str, int, dict[str, Any]]:
        database, schema = work.database, sides.schema
        # A row whose label is unknown says neither that the item was chosen nor that it was not.
        wanted = "labelled" if shown_negatives else "chosen"
        database.execute(
            "CREATE TABLE picked AS SELECT moment, scenario_id, item_row, chosen FROM train "
            f"WHERE item_row <> {UNSEEN} AND {wanted}"
        )
        if not database.row("SELECT count(*) FROM picked WHERE chosen")[0]:
            raise ValueError(
                f"{sides.data}/train: no row has {sides.chosen_label.name} = 1 and a known item: there is nothing to "
                "retrieve"
            )
        work.add_eligible()
        database.execute(
            "CREATE TABLE drawn AS WITH counted AS (SELECT scenario_id, count(*) AS items FROM eligible GROUP BY ALL), "
            "numbered AS (SELECT scenario_id, item_row, "
            "row_number() OVER (PARTITION BY scenario_id ORDER BY item_row) - 1 AS place FROM eligible), "
            "choices AS (SELECT scenario_id, moment, "
            "row_number() OVER (PARTITION BY scenario_id ORDER BY moment) - 1 AS place FROM picked WHERE chosen), "
            "wanted AS (SELECT scenario_id, count(*) AS choices, "
            f"CAST(round(count(*) * {uniform_negatives}) AS BIGINT) AS draws FROM choices GROUP BY ALL), "
            "draws AS (SELECT scenario_id, choices, unnest(range(draws)) AS draw FROM wanted) "
            # One choice after another gives the user, whom log losses set against the item.
            "SELECT d.draw, n.scenario_id, n.item_row, u.moment AS user_moment FROM draws d "
            "JOIN counted c USING (scenario_id) JOIN numbered n ON n.scenario_id = d.scenario_id "
            f"AND n.place = hash(d.scenario_id, d.draw, {sides.seed}) % c.items "
            "JOIN choices u ON u.scenario_id = d.scenario_id AND u.place = d.draw % d.choices"
        )
        database.execute(
            "CREATE TABLE shares AS WITH every AS (SELECT scenario_id, item_row FROM picked UNION ALL "
            "SELECT scenario_id, item_row FROM drawn), counted AS (SELECT *, count(*) AS rows FROM every GROUP BY ALL) "
            "SELECT scenario_id, item_row, ln(rows / sum(rows) OVER (PARTITION BY scenario_id)) AS log_share "
            "FROM counted"
        )
        label = sides.chosen_label
        columns = [*work.both, *([label.weight] if label.weight else [])]
        picked = (
            f"SELECT {', '.join(f't.{_of_data(name)}' for name in columns)}, p.scenario_id, p.chosen, s.log_share, "
            f"hash(p.moment, {sides.seed}) AS place, p.moment "
            "FROM picked p JOIN train t USING (moment) JOIN shares s ON s.scenario_id = p.scenario_id "
            "AND s.item_row = p.item_row"
        )
        one = ", CAST(1 AS FLOAT)" if label.weight else ""
        drawn = (
            f"SELECT {work.of('user', 'u')}, {work.of('item', 't')}{one}, d.scenario_id, FALSE, s.log_share, "
            f"hash(d.scenario_id, d.draw, {sides.seed}, 1), d.draw "
            "FROM drawn d JOIN latest l USING (item_row) JOIN train t ON t.moment = l.moment "
            "JOIN train u ON u.moment = d.user_moment "
            "JOIN shares s ON s.scenario_id = d.scenario_id AND s.item_row = d.item_row"
        )
        sql = (
            f"SELECT {', '.join(f'every.{_of_data(name)} AS {quoted(name)}' for name in columns)}, "
            f"every.scenario_id AS {work.scenario}, CAST(every.chosen AS UTINYINT) AS {quoted(label.name)}, "
            f"CAST(every.log_share AS FLOAT) AS {LOG_SHARE} FROM ({picked} UNION ALL {drawn}) every "
            "ORDER BY every.place, every.moment"
        )
        rows = database.row("SELECT (SELECT count(*) FROM picked) + (SELECT count(*) FROM drawn)")[0]
        names = [scenario.name for scenario in schema.scenarios]
        counts = dict(database.rows("SELECT scenario_id, count(*) FROM picked WHERE chosen GROUP BY ALL ORDER BY 1"))
        made = schema.model_copy(
            update={
                "labels": (Label(name=label.name, weight=label.weight),),
                "numerics": (*schema.numerics, Numeric(name=LOG_SHARE, group=SAMPLING)),
            }
        )
        summary = {
            "choices": {name: counts.get(place, 0) for place, name in enumerate(names)},
            "shown": database.row("SELECT count(*) FROM picked WHERE NOT chosen")[0],
            "drawn": database.row("SELECT count(*) FROM drawn")[0],
        }
        return made, sql, rows, summary

    settings = [shown_negatives, uniform_negatives]
    return _write(sides, out, settings, make)


def write_pairs(
    sides: Sides, out: Path, space: str, most: int, balance: float, items: bool, users: bool
) -> dict[str, Any]:
    """Write pairs of views, two rows each, one after the other: see `objectives.Contrastive`.

    Returns:
        the summary: pairs, and how many users, items and training rows have any (coverage).

    Raises:
        ValueError: nobody was seen in two scenarios.
    """

    def make(work: "_Work") -> tuple[FeatureSchema, str, int, dict[str, Any]]:
        database = work.database
        work.add_eligible()
        database.execute(
            "CREATE TABLE views (kind UTINYINT, entity BIGINT, number BIGINT, view UTINYINT, scenario_id INTEGER, "
            "moment HUGEINT)"
        )
        summary: dict[str, Any] = {}
        where = " AND chosen" if space == "labelled" else ""
        for kind, (name, wanted) in enumerate((("user", users), ("item", items))):
            if not wanted:
                continue
            entity = f"{name}_row"
            database.execute(
                f"CREATE OR REPLACE TABLE visits AS SELECT {entity} AS entity, scenario_id, max(moment) AS moment, "
                f"count(*) AS rows FROM train WHERE {entity} <> {UNSEEN}{where} GROUP BY ALL"
            )
            if name == "item" and space == "entire":
                # An item has the same features wherever it is shown, so every scenario has a view of it.
                everywhere = ", ".join(str(scenario.id) for scenario in sides.schema.scenarios if scenario.taught)
                seen = f"SELECT item_row AS entity, [{everywhere}] AS seen FROM latest"
            else:
                seen = "SELECT entity, list(scenario_id ORDER BY scenario_id) AS seen FROM visits GROUP BY entity"
            database.execute(f"CREATE OR REPLACE TABLE seen AS {seen}")
            # The p-th of the n (n - 1) / 2 pairs, counted (0, 1), (0, 2), ...: all where they are few, else drawn ones.
            database.execute(
                "CREATE OR REPLACE TABLE pairs AS WITH counted AS (SELECT entity, seen, len(seen) AS n, "
                "len(seen) * (len(seen) - 1) // 2 AS all_pairs FROM seen WHERE len(seen) > 1), "
                f"drawn AS (SELECT DISTINCT entity, seen, n, CASE WHEN all_pairs <= {most} THEN draw "
                f"ELSE CAST(hash(entity, draw, {kind}, {sides.seed}) % all_pairs AS BIGINT) END AS p FROM ("
                f"SELECT *, unnest(range(least({most}, all_pairs))) AS draw FROM counted)), "
                "first AS (SELECT *, CAST(floor((2 * n - 1 - sqrt((2 * n - 1) * (2 * n - 1) - 8 * p)) / 2) AS BIGINT) "
                "AS i FROM drawn) "
                "SELECT entity, p, seen[i + 1] AS a, seen[p - i * (2 * n - i - 1) // 2 + i + 2] AS b FROM first"
            )
            for view, side in enumerate("ab"):
                database.execute(
                    f"INSERT INTO views SELECT {kind}, p.entity, p.p, {view}, p.{side}, coalesce(v.moment, l.moment) "
                    f"FROM pairs p LEFT JOIN visits v ON v.entity = p.entity AND v.scenario_id = p.{side} "
                    # A scenario that never showed an item has it as the newest row of any has it.
                    "LEFT JOIN latest l ON l.item_row = p.entity AND v.moment IS NULL"
                )
            entities, rows = database.row("SELECT count(DISTINCT entity), coalesce(sum(rows), 0) FROM visits")
            paired, traffic = database.row(
                "SELECT count(DISTINCT entity), coalesce(sum(rows), 0) FROM visits "
                "WHERE entity IN (SELECT entity FROM pairs)"
            )
            summary[name] = {
                "pairs": database.row("SELECT count(*) FROM pairs")[0],
                "entities": entities,
                "paired": paired,
                "rows": int(rows),
                "paired_rows": int(traffic),
            }
        if not database.row("SELECT count(*) FROM views")[0]:
            raise ValueError(
                f"{sides.data}/train: nobody was seen in two scenarios, so there are no pairs to contrast (space "
                f"{space!r}); leave the contrastive stage out, or set space='entire' and sides='both'"
            )
        database.execute(
            "CREATE TABLE weighed AS WITH each AS (SELECT kind, entity, number, min(scenario_id) AS a, "
            "max(scenario_id) AS b FROM views GROUP BY ALL), counted AS (SELECT *, pow(count(*) OVER "
            f"(PARTITION BY kind, a, b), {balance - 1}) AS weight FROM each) "
            "SELECT kind, entity, number, weight / avg(weight) OVER (PARTITION BY kind) AS weight FROM counted"
        )
        labels = ", ".join(
            f"CAST(v.kind = {place} AS UTINYINT) AS {name}, CAST(w.weight AS FLOAT) AS {name}_weight"
            for place, name in enumerate(PAIR_LABELS)
        )
        sql = (
            f"SELECT {work.of('user', 't')}, {work.of('item', 't')}, v.scenario_id AS {work.scenario}, {labels} "
            "FROM views v JOIN weighed w USING (kind, entity, number) JOIN train t USING (moment) "
            f"ORDER BY hash(v.kind, v.entity, v.number, {sides.seed}), v.kind, v.entity, v.number, v.view"
        )
        made = sides.schema.model_copy(
            update={"labels": tuple(Label(name=name, weight=f"{name}_weight") for name in PAIR_LABELS)}
        )
        return made, sql, database.row("SELECT count(*) FROM views")[0], summary

    settings = [space, most, balance, items, users]
    return _write(sides, out, settings, make, together=2)


def write_catalogue(sides: Sides, out: Path) -> dict[str, Any]:
    """Write the items of every scenario: those that any split's rows show there and training has features of.

    An item has the features of its newest training row. That a row of a held-out split counts says that the item could
    be shown there, not who chose it.

    Returns:
        the summary: items by scenario.
    """

    def make(work: "_Work") -> tuple[FeatureSchema, str, int, dict[str, Any]]:
        work.add_eligible()
        sql = (
            f"SELECT {work.nobody('user')}, {work.of('item', 't')}, e.scenario_id AS {work.scenario}, "
            f"CAST(0 AS UTINYINT) AS {quoted(sides.chosen_label.name)} "
            "FROM eligible e JOIN latest l USING (item_row) JOIN train t USING (moment) "
            "ORDER BY e.scenario_id, e.item_row"
        )
        counts = dict(work.database.rows("SELECT scenario_id, count(*) FROM eligible GROUP BY ALL ORDER BY 1"))
        summary = {"items": {each.name: counts.get(each.id, 0) for each in sides.schema.scenarios}}
        return _plain(sides), sql, sum(counts.values()), summary

    return _write(sides, out, [], make)


def write_queries(sides: Sides, out: Path, split: str) -> dict[str, Any]:
    """Write who asks in a held-out split: each known user once in every scenario with a choice, as of the first one.

    What a user had chosen before, in any scenario of an earlier split, is no answer and is not asked for.

    Returns:
        the summary: queries and answers, and the choices left out: of unknown users or items, and repeated ones.
    """

    def make(work: "_Work") -> tuple[FeatureSchema, str, int, dict[str, Any]]:
        database = work.database
        if split == SPLITS[0]:
            raise ValueError(
                f"split {split!r}: two towers are judged by what users chose later than they were trained on; choose "
                f"{' or '.join(SPLITS[1:])}"
            )
        work.add_eligible()
        work.add_view("held_out", (split,))
        earlier = SPLITS[: SPLITS.index(split)]
        work.add_view("before", earlier)
        database.execute(
            "CREATE TABLE asked AS SELECT user_row, scenario_id, item_row, moment FROM held_out WHERE chosen"
        )
        database.execute(
            "CREATE TABLE consumed AS SELECT DISTINCT user_row, item_row FROM before WHERE chosen "
            f"AND user_row <> {UNSEEN} AND item_row <> {UNSEEN}"
        )
        answers = (
            "SELECT a.* FROM asked a JOIN eligible USING (scenario_id, item_row) ANTI JOIN consumed c "
            f"ON c.user_row = a.user_row AND c.item_row = a.item_row WHERE a.user_row <> {UNSEEN}"
        )
        database.execute(
            "CREATE TABLE queries AS SELECT user_row, scenario_id, min(moment) AS moment, "
            f"list(DISTINCT item_row ORDER BY item_row) AS truth FROM ({answers}) GROUP BY ALL"
        )
        if not database.row("SELECT count(*) FROM queries")[0]:
            raise ValueError(
                f"{sides.data}/{split}: no known user chose anything new that training knows: nothing to retrieve"
            )
        # The largest files of a data set are read once more, but only the rows of those who ask.
        database.execute(
            "CREATE TABLE had AS SELECT user_row, list(item_row ORDER BY item_row) AS consumed FROM consumed "
            "WHERE user_row IN (SELECT user_row FROM queries) GROUP BY ALL"
        )
        table = pa.Table.from_batches(
            database.stream(
                "SELECT CAST(q.scenario_id AS INTEGER) AS scenario, q.user_row AS user, q.truth, "
                "coalesce(h.consumed, CAST([] AS BIGINT[])) AS consumed FROM queries q LEFT JOIN had h "
                "USING (user_row) ORDER BY q.scenario_id, q.user_row",
                _BATCH_ROWS,
            )
        )
        pq.write_table(table, work.out / ANSWERS_FILE, compression="zstd")
        sql = (
            f"SELECT {work.of('user', 't')}, {work.nobody('item')}, q.scenario_id AS {work.scenario}, "
            f"CAST(0 AS UTINYINT) AS {quoted(sides.chosen_label.name)} FROM queries q JOIN held_out t USING (moment) "
            "ORDER BY q.scenario_id, q.user_row"
        )
        queries, answered = database.row("SELECT count(*), coalesce(sum(len(truth)), 0) FROM queries")
        choices, strangers, unknown, repeated = database.row(
            "WITH told AS (SELECT user_row, item_row IN (SELECT item_row FROM latest) AS known, "
            "(user_row, item_row) IN (SELECT (user_row, item_row) FROM consumed) AS again FROM asked) "
            f"SELECT count(*), count(*) FILTER (user_row = {UNSEEN}), count(*) FILTER (user_row <> {UNSEEN} AND NOT "
            "known), count(*) FILTER (known AND again) FROM told"
        )
        summary = {
            "queries": queries,
            "answers": int(answered),
            "choices": choices,
            "of_unknown_users": strangers,
            "of_unknown_items": unknown,
            "repeated": repeated,
        }
        return _plain(sides), sql, queries, summary

    return _write(sides, out, [split], make)


def write_question(sides: Sides, out: Path, user: int, scenario: int) -> dict[str, Any]:
    """Write one query: a user, as in the scenario's newest training row, or else in that of any.

    Args:
        sides: the data.
        out: the folder to write.
        user: a row of the user's table.
        scenario: where the user asks.

    Raises:
        ValueError: training has no row of that user.
    """

    def make(work: "_Work") -> tuple[FeatureSchema, str, int, dict[str, Any]]:
        database = work.database
        database.execute(
            "CREATE TABLE newest AS SELECT moment FROM train WHERE user_row = ? "
            "ORDER BY scenario_id = ? DESC, moment DESC LIMIT 1",
            [user, scenario],
        )
        if not database.row("SELECT count(*) FROM newest")[0]:
            raise ValueError(f"{sides.data}/train: no row of the user in row {user} of the vocabulary")
        had = database.rows(
            f"SELECT DISTINCT item_row FROM train WHERE chosen AND user_row = ? AND item_row <> {UNSEEN} ORDER BY 1",
            [user],
        )
        columns = {"scenario": [scenario], "user": [user], "truth": [[]], "consumed": [[row for (row,) in had]]}
        lists = pa.list_(pa.int64())
        kinds = pa.schema([("scenario", pa.int32()), ("user", pa.int64()), ("truth", lists), ("consumed", lists)])
        pq.write_table(pa.table(columns, schema=kinds), work.out / ANSWERS_FILE)
        sql = (
            f"SELECT {work.of('user', 't')}, {work.nobody('item')}, CAST({scenario} AS INTEGER) AS {work.scenario}, "
            f"CAST(0 AS UTINYINT) AS {quoted(sides.chosen_label.name)} FROM newest JOIN train t USING (moment)"
        )
        return _plain(sides), sql, 1, {"queries": 1}

    return _write(sides, out, [user, scenario], make)


def read_summary(folder: Path) -> dict[str, Any]:
    """What was said when `folder` was written."""
    summary: dict[str, Any] = json.loads((folder / SUMMARY_FILE).read_text())
    del summary["made_from"]
    return summary


def _made_from(sides: Sides, settings: Sequence[Any]) -> str:
    """Digest of what rows are made from: names and sizes stand for the files, as anywhere else that is asked often."""
    schema = sides.schema.model_dump(mode="json", exclude={"tables", "knowledge"})
    files = [
        [split, file.name, file.stat().st_size]
        for split in SPLITS
        for file in sorted((sides.data / split).glob("*.parquet"))
    ]
    parts = [FORMAT, schema, sides.user_groups, sides.label, sides.seed, list(settings), files]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _plain(sides: Sides) -> FeatureSchema:
    """Rows whose label means nothing."""
    return sides.schema.model_copy(update={"labels": (Label(name=sides.chosen_label.name),)})


def _write(
    sides: Sides,
    out: Path,
    settings: Sequence[Any],
    make: "Callable[[_Work], tuple[FeatureSchema, str, int, dict[str, Any]]]",
    together: int = 1,
) -> dict[str, Any]:
    made_from = _made_from(sides, settings)
    # Not a barrier, which gives up after minutes: these may be the rows of days.
    while not _is_made(out, made_from):
        if sides.writes:
            _make(sides, out, made_from, make, together)
        else:
            time.sleep(_LOOK_EVERY)
    return read_summary(out)


def _is_made(folder: Path, made_from: str) -> bool:
    try:
        found: bool = json.loads((folder / SUMMARY_FILE).read_text())["made_from"] == made_from
    except FileNotFoundError:
        return False
    return found


def _make(
    sides: Sides,
    out: Path,
    made_from: str,
    make: "Callable[[_Work], tuple[FeatureSchema, str, int, dict[str, Any]]]",
    together: int,
) -> None:
    partial = out.with_name(out.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "work").mkdir(parents=True)
    try:
        with Database(partial / "work", sides.memory_limit, None) as database:
            schema, sql, rows, summary = make(_Work(sides, database, partial))
            # What is known of users and of the order of rows is the data set's own.
            schema = schema.model_copy(update={"knowledge": None, "time": None})
            batches = database.stream(sql, _BATCH_ROWS)
            write_split(partial / ROWS, schema, batches, rows, _ROW_GROUP_ROWS, _FILE_ROWS, together)
    except DatabaseError as error:
        advice = "is the disk full, or loader.memory_limit too small?"
        raise ValueError(f"{out}: the database failed ({first_line(error)}); {advice}") from error
    shutil.rmtree(partial / "work")
    schema.save(partial)
    write_whole(partial / SUMMARY_FILE, json.dumps({"made_from": made_from} | summary, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


class _Work:
    """Views of the data set in a database.

    `train`, and what `add_view` adds, have the data set's columns, under names that `_of_data` gives, and beside them
    user_row, item_row, scenario_id, labelled, chosen, and moment: its order in time, distinct for every row.
    """

    def __init__(self, sides: Sides, database: Database, out: Path) -> None:
        self.sides, self.database, self.out = sides, database, out
        schema = sides.schema
        self.scenario = quoted(schema.scenario)
        self._sides: dict[str, list[str]] = {"user": [], "item": []}
        groups = [(each.name, each.group) for each in schema.features]
        for name, group in groups + [(each.name, each.group) for each in schema.numerics]:
            self._sides["user" if group in sides.user_groups else "item"].append(name)
        self._lists = {feature.name for feature in schema.features if feature.pooling}
        self._numerics = {numeric.name for numeric in schema.numerics}
        self.both = [*self._sides["user"], *self._sides["item"]]
        self.add_view("train", ("train",))

    def add_view(self, name: str, splits: Sequence[str]) -> None:
        """A view of all rows of `splits`."""
        schema, label = self.sides.schema, self.sides.chosen_label
        files = [file for split in splits for file in sorted((self.sides.data / split).glob("*.parquet"))]
        if not files:
            raise ValueError(f"{self.sides.data}/{splits[0]}: no parquet files there; prepare the data with that split")
        labelled = f"CAST({quoted(label.mask)} AS BOOLEAN)" if label.mask else "TRUE"
        chosen = f"CAST({quoted(label.name)} AS INTEGER) = 1 AND {labelled}"
        columns = [*self.both, *([label.weight] if label.weight else [])]
        time = f"CAST({quoted(schema.time)} AS HUGEINT)" if schema.time else "CAST(0 AS HUGEINT)"
        listed = ", ".join(text(str(file)) for file in files)
        self.database.execute(
            f"CREATE VIEW {name} AS SELECT {', '.join(f'{quoted(each)} AS {_of_data(each)}' for each in columns)}, "
            f"{quoted(schema.user)} AS user_row, {quoted(schema.item)} AS item_row, "
            f"CAST({self.scenario} AS INTEGER) AS scenario_id, {labelled} AS labelled, {chosen} AS chosen, "
            f"{time} * {_APART} + file_index * {_OFFSET} + file_row_number AS moment "
            f"FROM read_parquet([{listed}], file_row_number = true)"
        )

    def add_eligible(self) -> None:
        """Tables `latest` (the newest training row of an item) and `eligible` (items of each scenario)."""
        self.database.execute(
            f"CREATE TABLE latest AS SELECT item_row, max(moment) AS moment FROM train WHERE item_row <> {UNSEEN} "
            "GROUP BY ALL"
        )
        present = [split for split in SPLITS if any((self.sides.data / split).glob("*.parquet"))]
        self.add_view("everything", present)
        self.database.execute(
            "CREATE TABLE eligible AS SELECT DISTINCT scenario_id, item_row FROM everything SEMI JOIN latest "
            "USING (item_row)"
        )

    def of(self, side: str, view: str) -> str:
        """SQL of a side's columns, taken from `view`."""
        return ", ".join(f"{view}.{_of_data(name)} AS {quoted(name)}" for name in self._sides[side])

    def nobody(self, side: str) -> str:
        """SQL of a side's columns that say nothing."""
        return ", ".join(f"{self._nothing(name)} AS {quoted(name)}" for name in self._sides[side])

    def _nothing(self, name: str) -> str:
        if name in self._lists:
            return "CAST([] AS BIGINT[])"
        return "CAST(0 AS FLOAT)" if name in self._numerics else f"CAST({UNSEEN} AS BIGINT)"


def _of_data(column: str) -> str:
    """SQL of a column of the data set, under a name that no column of our own has."""
    return quoted(f"of {column}")
