"""Source `synthetic`: a log with planted clicks and conversions, and what the best possible model makes of it.

    kind = "synthetic"
    rows = 600000
    scenarios = 5

The log odds of a click come from scenario x category, segment x category (shared by all scenarios), their combination,
the price (with the scenario's own slope), the item's tags, and effects of frequent users and items. `oracle.json`
holds the AUC and log loss of the true probabilities on the test rows.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from msr_dist.data.prepare.canonical import PrepareConfig
from msr_dist.data.prepare.database import Database
from msr_dist.data.prepare.files import open_files
from msr_dist.data.prepare.mapping import Columns, IdColumn, LabelColumn, ListColumn, NumericColumn, Raw, ScenarioValue
from msr_dist.data.prepare.oracle import best_possible
from msr_dist.data.prepare.planted import Floats, Ints, Planted, Popularity

CHUNK_ROWS = 1 << 18
START = 1_700_000_000
"""Unix time of the first row."""
CATEGORIES = (
    "books", "shoes", "lamps", "coffee", "garden tools", "toys", "bicycles", "headphones",
    "kitchen knives", "posters", "tents", "watches", "tea", "puzzles", "jackets", "cameras",
)  # fmt: skip
ADJECTIVES = ("Plain", "Bright", "Quiet", "Sturdy", "Small", "Northern", "Classic", "Light", "Clever", "Warm")
PLACES = ("home", "search", "cart", "messages", "video", "deals", "profile", "stories")


@final
class Config(PrepareConfig):
    """A planted log; the defaults make one that a laptop learns within a minute."""

    kind: Literal["synthetic"] = "synthetic"
    rows: int = Field(default=600_000, ge=100)
    users: int = Field(default=3000, ge=2)
    items: int = Field(default=1000, ge=2)
    scenarios: int = Field(default=5, ge=1)
    """Scenario k has about 1/(k+1) as many rows as the first."""
    segments: int = Field(default=5, ge=1)
    """Kinds of users."""
    categories: int = Field(default=6, ge=1)
    """Kinds of items."""
    tags: int = Field(default=30, ge=1)
    """Different tags; an item has one to three."""
    days: int = Field(default=30, ge=1)
    """How long the log is."""
    popularity: float = Field(default=0.6, ge=0, lt=1)
    """Skew of users and items: the frequency of the r-th falls as r to this power."""
    strength: float = Field(default=1.2, gt=0)
    """Scale of the planted effects."""
    seed: int = Field(default=0, ge=0, lt=1 << 31)

    def open(self, database: Database) -> Raw:
        """Write the log as parquet, then view it like anybody's."""
        planted = self._planted()
        _write(database.folder / "users.parquet", _users(planted))
        _write(database.folder / "items.parquet", _items(planted))
        _write(database.folder / "log.parquet", self._log(planted))
        opened = [
            open_files(database, view, [str(database.folder / f"{name}.parquet")], name)
            for view, name in (("interactions", "log"), ("users", "users"), ("items", "items"))
        ]
        scenarios = tuple(_scenario(planted, place) for place in range(self.scenarios))
        return Raw(_columns(), opened[0], scenarios, opened[1], opened[2], carry=("p_click", "p_conversion"))

    def finish(self, database: Database, raw: Raw, out: Path) -> None:
        """Write oracle.json."""
        columns = 'scenario, "label:0", "label:1", "mask:1", "carry:p_click", "carry:p_conversion"'
        batches = list(database.stream(f"SELECT {columns} FROM events WHERE split = 2 ORDER BY row", CHUNK_ROWS))
        table = pa.Table.from_batches(batches)
        scenario, click, conversion, clicked, p_click, p_conversion = (column.to_numpy() for column in table.columns)

        def of(rows: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> dict[str, dict[str, float]]:
            bought = rows & clicked
            return {
                "click": best_possible(p_click[rows], click[rows] == 1),
                "conversion": best_possible(p_conversion[bought], conversion[bought] == 1),
            }

        scenarios = {each.name: of(scenario == place) for place, each in enumerate(raw.scenarios)}
        found = {"split": "test", "overall": of(np.ones(len(scenario), bool)), "scenarios": scenarios}
        (out / "oracle.json").write_text(json.dumps(found, indent=2) + "\n")

    def _planted(self) -> Planted:
        users, items = Popularity(self.users, self.popularity), Popularity(self.items, self.popularity)
        return Planted(self.seed, self.rows, users, items, self.segments, self.categories, self.tags, self.strength)

    def _log(self, planted: Planted) -> Iterator[pa.Table]:
        shares = 1 / np.arange(1.0, self.scenarios + 1)
        for number, begin in enumerate(range(0, self.rows, CHUNK_ROWS)):
            generator = np.random.default_rng([self.seed, number])
            count = min(CHUNK_ROWS, self.rows - begin)
            scenario = generator.choice(self.scenarios, count, p=shares / shares.sum())
            moments = (begin + np.arange(count) + generator.random(count)) / self.rows * self.days * 86_400
            yield _chunk(planted, generator, scenario, START + moments.astype(np.int64))


def _chunk(planted: Planted, generator: np.random.Generator, scenario: Ints, time: Ints) -> pa.Table:
    """Rows of the log at the given scenarios and times `[N]`."""
    count = len(scenario)
    user, item = planted.users.draw(generator.random(count)), planted.items.draw(generator.random(count))
    price = generator.standard_normal(count)
    p_click = _sigmoid(planted.click(scenario, user, item, price))
    p_conversion = _sigmoid(planted.conversion(scenario, user, item, price))
    click = generator.random(count) < p_click
    conversion = click & (generator.random(count) < p_conversion)
    return pa.table(
        {
            "user_id": user,
            "item_id": item,
            "scenario": scenario,
            "timestamp": time,
            "log_price": 3 + 0.5 * price,
            "click": click,
            "clicked": click,
            "conversion": conversion,
            "p_click": p_click,
            "p_conversion": p_conversion,
        }
    )


def _columns() -> Columns:
    return Columns(
        user="user_id",
        item="item_id",
        scenario="scenario",
        time="timestamp",
        labels=(LabelColumn(name="click"), LabelColumn(name="conversion", mask="clicked")),
        ids=(IdColumn(name="segment", source="users"), IdColumn(name="category", source="items")),
        lists=(ListColumn(name="tags", source="items"),),
        numerics=(NumericColumn(name="log_price"),),
        user_text=("segment_text",),
        item_text=("title", "category_text"),
    )


def _users(planted: Planted) -> Iterator[pa.Table]:
    for ids in _id_chunks(planted.users.ids):
        segment = planted.segment(ids)
        about = [f"user of segment {_letter(int(number))}" for number in segment]
        yield pa.table({"user_id": ids, "segment": segment, "segment_text": about})


def _items(planted: Planted) -> Iterator[pa.Table]:
    for ids in _id_chunks(planted.items.ids):
        names = [_category(int(number)) for number in planted.category(ids)]
        columns = [planted.tag(ids, place).tolist() for place in range(3)]
        titles = [_title(item, name) for item, name in zip(ids.tolist(), names, strict=True)]
        tags = [[f"tag-{tag}" for tag in each if tag >= 0] for each in zip(*columns, strict=True)]
        category = planted.category(ids)
        yield pa.table({"item_id": ids, "category": category, "tags": tags, "title": titles, "category_text": names})


def _id_chunks(count: int) -> Iterator[Ints]:
    return (np.arange(begin, min(begin + CHUNK_ROWS, count)) for begin in range(0, count, CHUNK_ROWS))


def _write(file: Path, tables: Iterator[pa.Table]) -> None:
    first = next(tables)
    with pq.ParquetWriter(file, first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def _scenario(planted: Planted, place: int) -> ScenarioValue:
    name = PLACES[place] if place < len(PLACES) else f"place {place + 1}"
    liked = " and ".join(_category(number) for number in planted.favourites(place, 2))
    return ScenarioValue(place, name, f"The {name} page of a shop, where people like to look at {liked}.")


def _category(number: int) -> str:
    return CATEGORIES[number] if number < len(CATEGORIES) else f"goods of kind {number + 1}"


def _title(item: int, category: str) -> str:
    return f"{ADJECTIVES[item % len(ADJECTIVES)]} {category} no. {item}"


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else str(number + 1)


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-x)))
