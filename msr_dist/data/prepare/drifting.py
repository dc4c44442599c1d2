"""Source `drifting`: planted clicks of users and items that come and go, for vocabularies that have to keep up.

    kind = "drifting"
    turnover = 4.0

At any time there are as many users and items as `users` and `items` say. Each has a place, of which some are popular
and some are not, and keeps it for the time of the log divided by `turnover`; then somebody new has it. What is clicked
follows from who they are alone: nothing but their ids tells them apart. `oracle.json` holds the AUC and log loss of
the true probabilities on the test rows, the last ones.
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
from msr_dist.data.prepare.mapping import Columns, LabelColumn, Raw, ScenarioValue, Split
from msr_dist.data.prepare.oracle import best_possible
from msr_dist.data.prepare.planted import Floats, Ints, Popularity, normal, uniform

START = 1_700_000_000
"""Unix time of the first row."""
_CHUNK_ROWS = 1 << 18


@final
class Config(PrepareConfig):
    """A planted log whose users and items change."""

    kind: Literal["drifting"] = "drifting"
    split: Split = Split(cutoff="global", fractions=(0.96, 0.02, 0.02))
    rows: int = Field(default=1_000_000, ge=100)
    users: int = Field(default=4000, ge=2)
    """Users at any one time."""
    items: int = Field(default=2000, ge=2)
    """Items at any one time."""
    turnover: float = Field(default=4.0, ge=0)
    """How often all of them are replaced in the course of the log."""
    scenarios: int = Field(default=3, ge=1)
    days: int = Field(default=30, ge=1)
    """How long the log is."""
    popularity: float = Field(default=0.7, ge=0, lt=1)
    """Skew of users and items: the frequency of the r-th falls as r to this power."""
    strength: float = Field(default=1.2, gt=0)
    """Scale of the planted effects: the standard deviation of the log odds is about 1.2 times this."""
    seed: int = Field(default=0, ge=0, lt=1 << 31)

    def open(self, database: Database) -> Raw:
        """Write the log as parquet, then view it like anybody's."""
        file = database.folder / "log.parquet"
        writer = None
        for table in self._log():
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()
        columns = Columns(
            user="user_id", item="item_id", scenario="scenario", time="timestamp", labels=(LabelColumn(name="click"),)
        )
        scenarios = tuple(ScenarioValue(place, f"place {place + 1}") for place in range(self.scenarios))
        return Raw(columns, open_files(database, "interactions", [str(file)], "log"), scenarios, carry=("p_click",))

    def finish(self, database: Database, raw: Raw, out: Path) -> None:
        """Write oracle.json."""
        columns = 'scenario, "label:0", "carry:p_click"'
        batches = list(database.stream(f"SELECT {columns} FROM events WHERE split = 2 ORDER BY row", _CHUNK_ROWS))
        scenario, click, chance = (column.to_numpy() for column in pa.Table.from_batches(batches).columns)

        def of(rows: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> dict[str, dict[str, float]]:
            return {"click": best_possible(chance[rows], click[rows] == 1)}

        scenarios = {each.name: of(scenario == place) for place, each in enumerate(raw.scenarios)}
        found = {"split": "test", "overall": of(np.ones(len(scenario), bool)), "scenarios": scenarios}
        (out / "oracle.json").write_text(json.dumps(found, indent=2) + "\n")

    def _log(self) -> Iterator[pa.Table]:
        for number, begin in enumerate(range(0, self.rows, _CHUNK_ROWS)):
            generator = np.random.default_rng([self.seed, number])
            count = min(_CHUNK_ROWS, self.rows - begin)
            moment = (begin + np.arange(count) + generator.random(count)) / self.rows
            scenario = generator.integers(0, self.scenarios, count)
            user = self._holders("user", self.users, generator.random(count), moment)
            item = self._holders("item", self.items, generator.random(count), moment)
            chance = 1 / (1 + np.exp(-self._odds(scenario, user, item)))
            yield pa.table(
                {
                    "user_id": user,
                    "item_id": item,
                    "scenario": scenario,
                    "timestamp": START + (moment * self.days * 86_400).astype(np.int64),
                    "click": generator.random(count) < chance,
                    "p_click": chance,
                }
            )

    def _holders(self, kind: str, places: int, drawn: Floats, moment: Floats) -> Ints:
        """Who has the drawn places at these moments, as shares of the log's time."""
        place = Popularity(places, self.popularity).draw(drawn)
        # Not all at once: every place changes hands at a time of its own.
        generation = (moment * self.turnover + uniform(self.seed, f"{kind}-phase", place)).astype(np.int64)
        return generation * places + place

    def _odds(self, scenario: Ints, user: Ints, item: Ints) -> Floats:
        own = 0.7 * normal(self.seed, "user", user) + 0.8 * normal(self.seed, "item", item)
        return -1.0 + self.strength * (own + 0.5 * normal(self.seed, "item-sc", scenario, item))
