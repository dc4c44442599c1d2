"""Where each split begins: cuts in time per scenario, at the quantiles, without parting rows of the same moment."""

import math

from msr_dist.data.prepare.database import Database
from msr_dist.data.prepare.mapping import ScenarioValue, Split
from msr_dist.schema import SPLITS


def assign_splits(database: Database, split: Split, scenarios: tuple[ScenarioValue, ...]) -> list[list[int]]:
    """Make the view `events`: the staged rows with `split` (0, 1, 2). Returns rows `[scenario][split]`.

    Raises ValueError where a split would have no rows at all.
    """
    if split.kind == "time":
        _cut(database, *(_given(split, len(scenarios)) or _at_shares(database, split, len(scenarios))))
    else:
        database.execute("CREATE VIEW events AS SELECT * FROM staged")
    rows = [[0] * len(SPLITS) for _ in scenarios]
    for scenario, place, count in database.rows("SELECT scenario, split, count(*) FROM events GROUP BY ALL"):
        rows[scenario][place] = count
    for place, name in enumerate(SPLITS):
        if not sum(counts[place] for counts in rows):
            found = ", ".join(f"{other} {sum(c[i] for c in rows)}" for i, other in enumerate(SPLITS))
            advice = "give more rows or other split.fractions; rows with equal times stay together"
            if split.test_from:
                advice = "give other moments (split.valid_from, split.test_from)"
            raise ValueError(f"no rows left in the {name} split ({found}); {advice}")
    return rows


def _given(split: Split, scenarios: int) -> tuple[list[int], list[int]] | None:
    """The first seconds of validation and of test, per scenario, where the configuration says when."""
    if split.valid_from is None or split.test_from is None:
        return None
    return [math.ceil(split.valid_from.timestamp())] * scenarios, [math.ceil(split.test_from.timestamp())] * scenarios


def _at_shares(database: Database, split: Split, scenarios: int) -> tuple[list[int], list[int]]:
    """The same by shares of the rows.

    All rows of one moment go where their middle row belongs, so the shares are met as nearly as they can be.
    """
    part = "scenario" if split.cutoff == "scenario" else "0"
    first, second = split.fractions[0], split.fractions[0] + split.fractions[1]
    middle = "(2 * sum(n) OVER (PARTITION BY part ORDER BY time) - n) / (2 * sum(n) OVER (PARTITION BY part))"
    moments = f"SELECT {part} AS part, time, count(*) AS n FROM staged GROUP BY ALL"
    cuts = database.rows(
        # The small margin absorbs the rounding of 0.8 + 0.1.
        f"SELECT part, min(time) FILTER (middle > {first} + 1e-12), min(time) FILTER (middle > {second} + 1e-12) "
        f"FROM (SELECT part, time, {middle} AS middle FROM ({moments})) GROUP BY part"
    )
    never = (1 << 63) - 1
    begins = {part: [never if cut is None else cut for cut in both] for part, *both in cuts}
    parts = [scenario if split.cutoff == "scenario" else 0 for scenario in range(scenarios)]
    valid, test = ([begins.get(part, [never, never])[place] for part in parts] for place in (0, 1))
    return valid, test


def _cut(database: Database, valid: list[int], test: list[int]) -> None:
    database.execute(
        "CREATE VIEW events AS SELECT *, CAST(CASE "
        f"WHEN time < ({valid}::BIGINT[])[scenario + 1] THEN 0 WHEN time < ({test}::BIGINT[])[scenario + 1] THEN 1 "
        "ELSE 2 END AS TINYINT) AS split FROM staged"
    )
