"""What each user engaged with before the cut-off, from the training rows alone, in words: all that a prompt is made of.

    histories = write_histories(data, FeatureSchema.read(data), HistoryConfig(before=1_650_000_000), out, 4096)
    for shard in range(histories.shards):
        for history in read_histories(shard_file(out, shard)):
            ...

OUT/
  part-00000.parquet ...   row, id, about, scenarios (list<int32>), texts (list<string>): users in order of their rows
  histories.json           `Histories`; the folder is complete when it is there

DuckDB does the work out of core: what does not fit into its memory is spilled beside the output.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from msr_dist.config import Config, parse
from msr_dist.files import digest_of, whole
from msr_dist.schema import UNSEEN, FeatureSchema

log = logging.getLogger(__name__)

SUMMARY_FILE = "histories.json"
FORMAT = 1
"""Counts up when the same data and settings give other files."""
EVENTS_PER_BATCH = 65_536


class HistoryConfig(Config):
    """Which training rows enter the prompts, and in which words."""

    per_scenario: int = Field(default=20, ge=0)
    """The newest events of a scenario that are kept of each user; 0, with `earlier`, keeps to what came before the log,
    so that no label of a training row is in any prompt."""
    before: int | None = None
    """The cut-off in unix seconds: only training rows with a smaller time enter. By default all training rows do."""
    label: str | None = None
    """A row is an event where this label is 1; by default the schema's first label."""
    earlier: str | None = None
    """A list feature over the items' table that holds what a user had chosen before the log begins, such as a
    published history: that of the user's oldest row stands in the prompt as well, in a line of its own."""
    earlier_order: Literal["newest_first", "oldest_first"] = "newest_first"
    """How that list is ordered."""
    earlier_events: int = Field(default=20, ge=1)
    """The newest of that list that are kept."""
    item_text: tuple[str, ...] = ()
    """Columns of items.parquet that name an item, the most telling first; by default all of its text columns. The
    first that is not empty is followed by the others in parentheses; an item without any is named by its id."""
    user_text: tuple[str, ...] = ()
    """Columns of users.parquet that introduce a user. By default none: they say when nothing was known, so that no
    cut-off holds for them, and what they say is often a feature of the model already."""
    item_characters: int = Field(default=200, ge=8)
    """Longer names of items are cut, so that one of them cannot fill a prompt."""
    memory_limit: str = "2GB"
    """What DuckDB may use; beyond it, it spills to disk beside the output."""

    @model_validator(mode="after")
    def _holds_something(self) -> Self:
        if not self.per_scenario and self.earlier is None:
            raise ValueError("per_scenario 0 leaves prompts empty: give earlier, a list of what came before the log")
        return self


class ScenarioStatistics(Config):
    """Counts over all training rows of one scenario before the cut-off, whatever their labels."""

    interactions: int = Field(ge=0)
    users: int = Field(ge=0)
    """Different users; those outside the vocabulary do not count."""
    items: int = Field(ge=0)
    """Different items; those outside the vocabulary do not count."""


class Histories(Config):
    """What was found while a folder of histories was written."""

    format: int = FORMAT
    shards: int
    users: int
    """Users of the vocabulary with at least one event before the cut-off, or something earlier: they have a history."""
    cutoff: int | None
    """Every row that was read is older than this (unix seconds); None where the data have no time."""
    item_text: tuple[str, ...]
    """Columns that name the items; empty where their ids do."""
    user_text: tuple[str, ...]
    statistics: tuple[ScenarioStatistics, ...]
    """One for each scenario."""
    notes: tuple[str, ...]
    """What whoever reads the prompts should know, a line each."""
    digest: str
    """Of everything that shapes the files."""


@dataclass(frozen=True)
class History:
    """What one user engaged with: scenarios in order, and the newest first within a scenario."""

    row: int
    """In the user's table."""
    id: int | str
    """As the vocabulary has it."""
    about: str
    """The user's own text, in one line; often empty."""
    scenarios: Sequence[int]
    """The scenario of each event; the number of scenarios for what came before the log."""
    texts: Sequence[str]
    """What the event's item is called, in one line."""


def shard_file(folder: Path, shard: int) -> Path:
    """The file that holds the histories of one shard."""
    return folder / f"part-{shard:05d}.parquet"


def read_histories(file: Path) -> list[History]:
    """The histories of one shard, by ascending row."""
    return [History(**line) for line in pq.read_table(file).to_pylist()]


def write_histories(
    data: Path, schema: FeatureSchema, config: HistoryConfig, out: Path, users_per_shard: int
) -> Histories:
    """Write the history of every user who has one to `out`, `users_per_shard` to a file; whole or not at all.

    A complete folder that was written from the same data with the same settings is kept. Otherwise it is replaced.

    Raises:
        ValueError: data or settings are wrong, nobody has a history, or something else stands in `out`.
    """
    digest = _digest(data, schema, config, users_per_shard)
    found = _read_summary(out)
    if found is not None and found.digest == digest:
        return found
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        histories = _write(data, schema, config, partial, users_per_shard, digest)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return histories


def history_of(data: Path, schema: FeatureSchema, config: HistoryConfig, user: int | str) -> History:
    """The history of one user by raw id, as `write_histories` would write it.

    Raises:
        ValueError: the vocabulary does not have the id, or the user has no events before the cut-off.
    """
    with tempfile.TemporaryDirectory() as work, _opened(data, schema, config, Path(work)) as rows:
        row = rows.row_of(user)
        tables = [pa.Table.from_batches([batch]) for batch in rows.events(row)]
        if not sum(table.num_rows for table in tables):
            raise ValueError(f"{data}: user {user!r} has no events ({rows.condition}), so there is no history")
        return History(**rows.named(pa.concat_tables(tables)).to_pylist()[0])


def scenario_statistics(data: Path, schema: FeatureSchema, config: HistoryConfig) -> tuple[ScenarioStatistics, ...]:
    """The statistics of every scenario, as `write_histories` returns them."""
    with tempfile.TemporaryDirectory() as work, _opened(data, schema, config, Path(work)) as rows:
        return rows.statistics()


def _write(
    data: Path, schema: FeatureSchema, config: HistoryConfig, out: Path, users_per_shard: int, digest: str
) -> Histories:
    """Write every file to the empty folder `out`."""
    log.info("histories: reading the training rows of %s", data)
    work = out / "work"
    work.mkdir()
    with _opened(data, schema, config, work) as rows:
        shards = users = 0
        for events in _by_users(rows.events(), users_per_shard):
            shard = rows.named(events)
            with whole(shard_file(out, shards)) as opened:
                pq.write_table(shard, opened, compression="zstd")
            shards, users = shards + 1, users + shard.num_rows
        if not users:
            raise ValueError(f"{data}/train: no row is an event ({rows.condition}), so nobody has a history")
        histories = Histories(
            shards=shards,
            users=users,
            cutoff=rows.cutoff(),
            item_text=rows.item_text,
            user_text=config.user_text,
            statistics=rows.statistics(),
            notes=tuple(rows.notes()),
            digest=digest,
        )
    shutil.rmtree(work)
    with whole(out / SUMMARY_FILE) as opened:
        opened.write(f"{histories.model_dump_json(indent=1)}\n".encode())
    return histories


class _Rows:
    """The training rows before the cut-off, and the words for their users and items, as views of a database."""

    def __init__(self, database: Any, data: Path, schema: FeatureSchema, config: HistoryConfig) -> None:
        self._database, self._data, self._schema, self._config = database, data, schema, config
        if config.before is not None and schema.time is None:
            raise ValueError(f"history.before: {data} has no column of time; leave it out to use all training rows")
        tables = {feature.name: feature.table for feature in schema.features}
        self._users_file = data / "vocabulary" / f"{tables[schema.user]}.parquet"
        self._items_file = data / "vocabulary" / f"{tables[schema.item]}.parquet"
        self.condition = self._view_rows()
        self._newest = self._checked()
        self.item_text = self._view_names()
        self._view_people()

    def cutoff(self) -> int | None:
        """Every row that is read is older."""
        if self._newest is None or self._config.before is not None:
            return self._config.before
        return self._newest + 1

    def statistics(self) -> tuple[ScenarioStatistics, ...]:
        """Of every scenario; one without rows has zeros."""
        counts = {
            column: {
                scenario: (int(interactions), different)
                for scenario, interactions, different in self._rows(
                    f"SELECT scenario, sum(n), count(*) FILTER (id <> {UNSEEN}) FROM "
                    f"(SELECT scenario, {column} AS id, count(*) AS n FROM train GROUP BY ALL) GROUP BY scenario"
                )
            }
            for column in ("user_row", "item_row")
        }
        return tuple(
            ScenarioStatistics(
                interactions=counts["user_row"].get(scenario.id, (0, 0))[0],
                users=counts["user_row"].get(scenario.id, (0, 0))[1],
                items=counts["item_row"].get(scenario.id, (0, 0))[1],
            )
            for scenario in self._schema.scenarios
        )

    def events(self, user_row: int | None = None) -> Iterator[pa.RecordBatch]:
        """(row, scenario, text) of the events of all users or of one: by user, by scenario, the newest first."""
        of_whom = f"user_row <> {UNSEEN}" if user_row is None else f"user_row = {user_row}"
        chosen = (
            "SELECT user_row, scenario, item_row, "
            "row_number() OVER (PARTITION BY user_row, scenario ORDER BY time DESC, position DESC) AS place "
            f"FROM train WHERE event AND {of_whom} AND item_row <> {UNSEEN} "
            f"QUALIFY place <= {self._config.per_scenario}"
        )
        if self._config.earlier is not None:
            most = self._config.earlier_events
            chosen += (
                f" UNION ALL SELECT user_row, {len(self._schema.scenarios)}, unnest(items[:{most}]), "
                f"unnest(range(least({most}, len(items)))) FROM (SELECT user_row, "
                f"arg_min(earlier, (time, position)) AS items FROM train WHERE {of_whom} GROUP BY user_row)"
            )
        result = self._database.sql(
            f"SELECT n.user_row AS row, n.scenario, names.text FROM ({chosen}) n "
            "LEFT JOIN names ON names.row = n.item_row ORDER BY n.user_row, n.scenario, n.place"
        )
        yield from result.to_arrow_reader(EVENTS_PER_BATCH)

    def named(self, events: pa.Table) -> pa.Table:
        """One line per user: the `events` of some users in order become lists, beside the users' ids and texts."""
        rows = events["row"].to_numpy()
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        users = rows[starts]
        # Another cursor, since the events are still arriving through this one.
        people = (
            self._database.cursor()
            .sql(f"SELECT row, id, about FROM people WHERE row BETWEEN {users[0]} AND {users[-1]} ORDER BY row")
            .to_arrow_table()
        )
        known = people["row"].to_numpy()
        places = np.searchsorted(known, users).clip(max=max(0, len(known) - 1))
        unknown = users[known[places] != users] if len(known) else users
        if len(unknown):
            raise ValueError(f"{self._users_file}: row {unknown[0]} of the training split is not there; {_AGAIN}")
        if events["text"].null_count:
            whose = rows[events["text"].is_null().to_numpy()][0]
            raise ValueError(f"{self._items_file}: items that user row {whose} engaged with are not there; {_AGAIN}")
        offsets = pa.array(np.append(starts, len(rows)), pa.int32())
        of_users = people.take(places)
        return pa.table(
            {
                "row": users,
                "id": of_users["id"],
                "about": of_users["about"],
                "scenarios": pa.ListArray.from_arrays(offsets, events["scenario"].combine_chunks()),
                "texts": pa.ListArray.from_arrays(offsets, events["text"].combine_chunks()),
            }
        )

    def row_of(self, user: int | str) -> int:
        """The row of a raw id; ValueError where the vocabulary does not have it."""
        found = self._rows("SELECT row FROM people WHERE CAST(id AS VARCHAR) = ?", [str(user)])
        if not found:
            raise ValueError(f"{self._users_file}: there is no user {user!r}; training has no rows of that id")
        return int(found[0][0])

    def notes(self) -> Iterator[str]:
        """What is said once instead of at every item, user or row."""
        items, without_first, without_any = self._rows(
            "SELECT count(*), count(*) FILTER (NOT has_first AND has_any), count(*) FILTER (NOT has_any) FROM names"
        )[0]
        if not (self._data / "items.parquet").is_file():
            yield "no items.parquet: items are named by their ids"
        elif not self.item_text:
            yield "items.parquet has no columns of text: items are named by their ids"
        else:
            if without_first:
                others = " and ".join(self.item_text[1:])
                yield f"{without_first:,} of {items:,} items have no {self.item_text[0]}: named by {others}"
            if without_any:
                yield f"{without_any:,} of {items:,} items have no text: named by their ids"
        for column, what in (("user_row", "users"), ("item_row", "items")):
            ((outside,),) = self._rows(f"SELECT count(*) FROM train WHERE event AND {column} = {UNSEEN}")
            if outside:
                yield f"{outside:,} events of {what} outside the vocabulary are in no history"
        untexted = [scenario.name for scenario in self._schema.scenarios if not scenario.text]
        if untexted:
            yield f"scenarios without a text are described by their names alone: {', '.join(untexted)}"
        cutoff = self.cutoff()
        for split in ("valid", "test"):
            files = sorted((self._data / split).glob("*.parquet"))
            if cutoff is not None and files:
                time = _identifier(str(self._schema.time))
                held_out = self._database.read_parquet([str(file) for file in files])
                ((first,),) = held_out.aggregate(f"min({time})").fetchall()
                if first is not None and first < cutoff:
                    yield (
                        f"the {split} split begins at {first}, before the cut-off {cutoff}: histories hold events "
                        "that are newer than some of its rows"
                    )

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return list(self._database.execute(sql, list(values)).fetchall())

    def _view_rows(self) -> str:
        """Views of all training rows (`whole`) and of those before the cut-off (`train`); returns what an event is."""
        schema, before = self._schema, self._config.before
        label = next((each for each in schema.labels if each.name == (self._config.label or each.name)), None)
        if label is None:
            known = ", ".join(each.name for each in schema.labels)
            raise ValueError(f"history.label: there is no label {self._config.label!r}; {self._data} has {known}")
        event = f"CAST({_identifier(label.name)} AS INTEGER) = 1"
        columns = {
            "user_row": _identifier(schema.user),
            "item_row": _identifier(schema.item),
            "scenario": f"CAST({_identifier(schema.scenario)} AS INTEGER)",
            "event": f"{event} AND {_identifier(label.mask)}" if label.mask else event,
            "time": _identifier(schema.time) if schema.time else "0",
            "position": "file_index * 1099511627776 + file_row_number",
        }
        earlier = self._earlier()
        if earlier is not None:
            known = f"list_filter({_identifier(earlier)}, lambda item: item <> {UNSEEN})"
            oldest_first = self._config.earlier_order == "oldest_first"
            columns["earlier"] = f"list_reverse({known})" if oldest_first else known
        folder = self._data / "train"
        files = sorted(folder.glob("*.parquet"))
        if not files:
            raise ValueError(f"{folder}: no parquet files there; make the data with `msr-dist prepare`")
        found = self._database.read_parquet([str(file) for file in files])
        wanted = [schema.user, schema.item, schema.scenario, label.name, label.mask, schema.time, earlier]
        for column in wanted:
            if column is not None and column not in found.columns:
                raise ValueError(f"{folder}: column {column!r} of the schema is absent; {_AGAIN}")
        found.project(", ".join(f"{source} AS {name}" for name, source in columns.items())).create_view("whole")
        self._database.execute(
            f"CREATE VIEW train AS SELECT * FROM whole {'' if before is None else f'WHERE time < {before}'}"
        )
        return f"{label.name} = 1" + ("" if before is None else f" and {schema.time} < {before}")

    def _earlier(self) -> str | None:
        """The list of `history.earlier`; ValueError where it is none over the items."""
        item = next(feature for feature in self._schema.features if feature.name == self._schema.item)
        lists = [each.name for each in self._schema.features if each.pooling and each.table == item.table]
        if self._config.earlier is not None and self._config.earlier not in lists:
            has = f"they have {', '.join(lists)}" if lists else "they have none"
            raise ValueError(f"history.earlier: no list of items {self._config.earlier!r} in {self._data}; {has}")
        return self._config.earlier

    def _checked(self) -> int | None:
        """The time of the newest row; ValueError where values are absent, or scenarios unknown."""
        columns = ("user_row", "item_row", "scenario", "event", "time")
        nulls = ", ".join(f"count(*) - count({column})" for column in columns)
        found = self._rows(f"SELECT min(scenario), max(scenario), max(time), {nulls} FROM whole")
        least, most, newest, *absent = found[0]
        for column, count in zip(columns, absent, strict=True):
            if count:
                raise ValueError(f"{self._data}/train: {count:,} rows without a value for {column}; {_AGAIN}")
        last = len(self._schema.scenarios) - 1
        if least is not None and (least < 0 or most > last):
            raise ValueError(f"{self._data}/train: scenarios from {least} to {most}, but the schema has 0 to {last}")
        return None if self._schema.time is None else newest

    def _view_names(self) -> tuple[str, ...]:
        """A view `names` of the items' names by row; returns the columns that they are made of."""
        columns = self._view_texts("items", self._items_file, self._config.item_text or None, "history.item_text")
        texts = ", ".join(map(_line, columns))
        longest = self._config.item_characters
        self._database.execute(
            "CREATE VIEW names AS SELECT row, has_first, len(parts) > 0 AS has_any, "
            f"CASE WHEN length(name) > {longest} THEN rtrim(left(name, {longest - 1})) || '…' ELSE name END AS text "
            "FROM (SELECT row, parts, has_first, CASE len(parts) WHEN 0 THEN 'item ' || id WHEN 1 THEN parts[1] "
            "ELSE parts[1] || ' (' || array_to_string(parts[2:], '; ') || ')' END AS name "
            "FROM (SELECT row, id, coalesce(texts[1], '') <> '' AS has_first, "
            "list_filter(texts, lambda text: text <> '') AS parts "
            f"FROM (SELECT row, id, [{texts}]::VARCHAR[] AS texts FROM items)))"
        )
        return columns

    def _view_people(self) -> None:
        """A view `people` of the users' ids and texts by row."""
        columns = self._view_texts("users", self._users_file, self._config.user_text, "history.user_text")
        parts = [f"nullif({_said(column)} || {_line(column)}, {_said(column)})" for column in columns]
        about = f"concat_ws(', ', {', '.join(parts)})" if parts else "''"
        self._database.execute(
            f"CREATE VIEW people AS SELECT CAST(row AS BIGINT) AS row, id, {about} AS about FROM users"
        )

    def _view_texts(self, name: str, vocabulary: Path, asked: Sequence[str] | None, key: str) -> tuple[str, ...]:
        """A view `name`: rows and ids of `vocabulary`, and columns of the file `name`.parquet beside it.

        Returns the columns: those that were `asked` for, with None all that hold text. ValueError where one of them
        is not there.
        """
        file = self._data / f"{name}.parquet"
        if not vocabulary.is_file():
            raise ValueError(f"{vocabulary}: no such file; {_AGAIN}")
        self._database.read_parquet(str(vocabulary)).create_view(f"known_{name}")
        present: list[str] = []
        textual: list[str] = []
        if file.is_file():
            texts = self._database.read_parquet(str(file))
            texts.create_view(f"texts_{name}")
            kinds = zip(texts.columns, texts.types, strict=True)
            present, textual = texts.columns, [each for each, kind in kinds if str(kind) == "VARCHAR" and each != "id"]
        for column in asked or ():
            if column not in present:
                has = f"it has {', '.join(textual) or 'no text'}" if present else "there is no such file"
                raise ValueError(f"{key}: no column {column!r} in {file}; {has}")
        columns = tuple(textual if asked is None else asked)
        selected = "".join(f", texts.{_identifier(column)}" for column in columns)
        joined = f"LEFT JOIN texts_{name} texts ON texts.row = known.row" if columns else ""
        self._database.execute(
            f"CREATE VIEW {name} AS SELECT known.row, known.id{selected} FROM known_{name} known {joined}"
        )
        return columns


@contextmanager
def _opened(data: Path, schema: FeatureSchema, config: HistoryConfig, work: Path) -> Iterator[_Rows]:
    """The rows in a database that spills to `work`; its errors become ValueErrors of one line."""
    try:
        settings = {"memory_limit": config.memory_limit, "temp_directory": str(work / "spill")}
        with duckdb.connect(config=settings) as database:
            database.execute("SET enable_progress_bar = false")  # It would write to the standard output.
            yield _Rows(database, data, schema, config)
    except duckdb.Error as error:
        fault = " ".join(str(error).strip().split("\n\n")[0].split())
        advice = f"is a file damaged, the disk full, or history.memory_limit ({config.memory_limit}) too small?"
        raise ValueError(f"{data}: the histories cannot be read ({fault}); {advice}") from error


def _by_users(batches: Iterable[pa.RecordBatch], users: int) -> Iterator[pa.Table]:
    """The rows of `batches`, which come user by user, in tables of `users` users; the last may have fewer."""
    waiting: pa.Table | None = None
    for batch in batches:
        arrived = pa.Table.from_batches([batch])
        waiting = arrived if waiting is None else pa.concat_tables([waiting, arrived])
        starts = np.flatnonzero(np.diff(waiting["row"].to_numpy(), prepend=-1))
        # A user's last event is only known by the first of the next user.
        for begin, end in zip(starts[::users], starts[users::users], strict=False):
            yield waiting.slice(begin, end - begin)
        waiting = waiting.slice(starts[(len(starts) - 1) // users * users])
    if waiting is not None and waiting.num_rows:
        yield waiting


def _digest(data: Path, schema: FeatureSchema, config: HistoryConfig, users_per_shard: int) -> str:
    """Of the files' bytes that are read and of the settings that shape the histories."""
    tables = {feature.name: feature.table for feature in schema.features}
    names = [f"vocabulary/{tables[name]}.parquet" for name in (schema.user, schema.item)]
    files = [*sorted((data / "train").glob("*.parquet")), *(data / name for name in (*names, "items.parquet"))]
    if config.user_text:
        files.append(data / "users.parquet")
    present = [file for file in files if file.is_file()]
    with ThreadPoolExecutor() as threads:
        digests = threads.map(digest_of, present)
    settings = {
        "format": FORMAT,
        "schema": schema.model_dump(mode="json", include={"user", "item", "time", "scenario", "labels", "scenarios"}),
        "config": config.model_dump(mode="json", exclude={"memory_limit"}),
        "users_per_shard": users_per_shard,
        "files": {str(file.relative_to(data)): digest for file, digest in zip(present, digests, strict=True)},
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _read_summary(out: Path) -> Histories | None:
    """What a complete folder says of itself; ValueError where `out` holds anything else."""
    file = out / SUMMARY_FILE
    if not file.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out}: something is there that is no folder of histories; give another place")
        return None
    return parse(Histories, json.loads(file.read_text()), where=str(file))


def _line(column: str) -> str:
    """SQL of a column's text in one line, without blanks around it; '' where it is null."""
    blanks = r"[\p{Z}\p{Cc}]+"
    return f"trim(regexp_replace(coalesce(CAST({_identifier(column)} AS VARCHAR), ''), '{blanks}', ' ', 'g'))"


def _said(column: str) -> str:
    """SQL of how a column of users.parquet introduces its text."""
    return _literal(column.removesuffix("_text").replace("_", " ") + ": ")


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


_AGAIN = "prepare the data again"
