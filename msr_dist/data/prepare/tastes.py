"""Source `tastes`: planted choices that can be transferred, for models that retrieve.

    kind = "tastes"
    users = 2000

A user has one taste for all scenarios, and every scenario has items of its own: what is learned of a user in one is all
that another can have from it. The last scenario was launched late, so that training has few of its rows, and the other
splits as many as of any. Every row is a choice: user u takes item v of scenario s with probability

    softmax over the items of s of  strength * <taste of u, kind of v> / sqrt(width)

`oracle.json` holds recall, NDCG and hit rate of the true probabilities for the users who ask in the test split.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from msr_dist.data.prepare.canonical import PrepareConfig
from msr_dist.data.prepare.database import Database
from msr_dist.data.prepare.files import open_files
from msr_dist.data.prepare.mapping import Columns, LabelColumn, Raw, ScenarioValue, Split
from msr_dist.data.prepare.planted import normal

START = 1_700_000_000
"""Unix time of the first row."""
PLACES = ("home", "search", "cart", "messages", "video", "deals", "profile", "stories")
_CHUNK_ROWS = 1 << 14

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@final
class Config(PrepareConfig):
    """Planted choices; the defaults make a log that a laptop learns within a minute."""

    kind: Literal["tastes"] = "tastes"
    split: Split = Split(cutoff="global")
    rows: int = Field(default=100_000, ge=100)
    users: int = Field(default=2000, ge=2, le=100_000)
    items: int = Field(default=200, ge=2, le=100_000)
    """Items of each scenario."""
    scenarios: int = Field(default=3, ge=2)
    launch: float = Field(default=0.78, ge=0, lt=1)
    """When the last scenario begins, as a share of the log's time."""
    taste_width: int = Field(default=6, ge=1)
    """Dimensions of a taste."""
    strength: float = Field(default=3.0, gt=0)
    """Scale of the planted log odds."""
    days: int = Field(default=30, ge=1)
    """How long the log is."""
    top_k: tuple[int, ...] = (10, 20, 50)
    """Cut-offs of the best possible metrics."""
    seed: int = Field(default=0, ge=0, lt=1 << 31)

    def open(self, database: Database) -> Raw:
        """Write the log as parquet, then view it like anybody's."""
        _write(database.folder / "items.parquet", [self._items()])
        _write(database.folder / "log.parquet", self._log())
        log, items = (
            open_files(database, view, [str(database.folder / f"{name}.parquet")], name)
            for view, name in (("interactions", "log"), ("items", "items"))
        )
        columns = Columns(
            user="user_id",
            item="item_id",
            scenario="scenario",
            time="timestamp",
            labels=(LabelColumn(name="chosen"),),
            item_text=("title",),
        )
        scenarios = tuple(ScenarioValue(place, self._name(place)) for place in range(self.scenarios))
        return Raw(columns, log, scenarios, items=items)

    def finish(self, database: Database, raw: Raw, out: Path) -> None:
        """Write oracle.json."""
        chosen = [
            database.rows(f'SELECT scenario, "user", item FROM events WHERE split {which} ORDER BY ALL')
            for which in ("< 2", "= 2")
        ]
        before, asked = ({place: _by_user(rows, place) for place in range(self.scenarios)} for rows in chosen)
        known = {item for (item,) in database.rows("SELECT DISTINCT item FROM events WHERE split = 0")}
        found = {
            scenario.name: self._best(place, known, before[place], asked[place])
            for place, scenario in enumerate(raw.scenarios)
        }
        (out / "oracle.json").write_text(json.dumps({"split": "test", "scenarios": found}, indent=2) + "\n")

    def _best(
        self, scenario: int, known: set[int], before: dict[int, set[int]], asked: dict[int, set[int]]
    ) -> dict[str, float]:
        """Over items that training has, as any model is judged."""
        first = scenario * self.items
        unknown = [item - first for item in range(first, first + self.items) if item not in known]
        totals: dict[str, float] = {}
        queries = 0
        for user, items in asked.items():
            truth = (items & known) - before.get(user, set())
            if not truth:
                continue
            queries += 1
            scores = self._odds(scenario, np.array([user]))[0]
            scores[[item - first for item in before.get(user, ())] + unknown] = -np.inf
            order = np.argsort(-scores, kind="stable") + first
            for k in self.top_k:
                hits = np.array([item in truth for item in order[:k].tolist()])
                worth = 1 / np.log2(np.arange(2, k + 2))
                values = {
                    "recall": hits.sum() / len(truth),
                    "ndcg": hits @ worth[: len(hits)] / worth[: min(k, len(truth))].sum(),
                    "hit_rate": float(hits.any()),
                }
                for name, value in values.items():
                    totals[f"{name}_at_{k}"] = totals.get(f"{name}_at_{k}", 0.0) + float(value)
        return {name: value / queries for name, value in totals.items()} | {"queries": queries}

    def _odds(self, scenario: int, users: Ints) -> Floats:
        """`[users, items]`: log odds of the scenario's items, up to a constant of the user."""
        items = scenario * self.items + np.arange(self.items)
        taste, kind = (self._vectors(what, ids) for what, ids in (("taste", users), ("kind", items)))
        return np.asarray(self.strength * taste @ kind.T / np.sqrt(self.taste_width))

    def _vectors(self, what: str, ids: Ints) -> Floats:
        """`[ids, taste_width]`."""
        return np.stack(
            [normal(self.seed, what, ids, np.full_like(ids, place)) for place in range(self.taste_width)], 1
        )

    def _log(self) -> Iterator[pa.Table]:
        for number, begin in enumerate(range(0, self.rows, _CHUNK_ROWS)):
            generator = np.random.default_rng([self.seed, number])
            count = min(_CHUNK_ROWS, self.rows - begin)
            moment = (begin + np.arange(count) + generator.random(count)) / self.rows
            active = np.where(moment < self.launch, self.scenarios - 1, self.scenarios)
            scenario = (generator.random(count) * active).astype(np.int64)
            user, drawn = generator.integers(0, self.users, count), generator.random(count)
            item = np.empty(count, np.int64)
            for place in range(self.scenarios):
                here = np.flatnonzero(scenario == place)
                who, whose = np.unique(user[here], return_inverse=True)
                odds = self._odds(place, who)
                reached = np.exp(odds - odds.max(1, keepdims=True)).cumsum(1)
                reached /= reached[:, -1:]
                picked = (reached[whose] < drawn[here, None]).sum(1)
                item[here] = place * self.items + np.minimum(picked, self.items - 1)
            time = START + (moment * self.days * 86_400).astype(np.int64)
            columns = {"user_id": user, "item_id": item, "scenario": scenario, "timestamp": time}
            yield pa.table(columns | {"chosen": np.ones(count, np.int8)})

    def _items(self) -> pa.Table:
        ids = np.arange(self.scenarios * self.items)
        titles = [f"{self._name(item // self.items)} no. {item % self.items}" for item in ids.tolist()]
        return pa.table({"item_id": ids, "title": titles})

    def _name(self, place: int) -> str:
        return PLACES[place] if place < len(PLACES) else f"place {place + 1}"


def _by_user(rows: list[tuple[int, int, int]], scenario: int) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for place, user, item in rows:
        if place == scenario:
            found.setdefault(int(user), set()).add(int(item))
    return found


def _write(file: Path, tables: "list[pa.Table] | Iterator[pa.Table]") -> None:
    writer = None
    for table in tables:
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()
