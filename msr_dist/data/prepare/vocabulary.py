"""Which raw id becomes which row of a table: fitted on the training rows alone, row 0 left for everything else.

Or, where a table's vocabulary is open, which hash, whatever the training rows hold, and 0 for no id.
"""

from pathlib import Path

from msr_dist.data.prepare.database import Database, quoted, text
from msr_dist.data.prepare.mapping import SourceName
from msr_dist.data.prepare.plan import Plan, PlannedFeature
from msr_dist.schema import OPEN_IDS


def fit_vocabularies(database: Database, plan: Plan, least: int) -> dict[str, int]:
    """Make a table `vocabulary:TABLE` (row, id, count) per embedding table. Returns table -> rows, row 0 included.

    Rows are numbered from 1 by descending count, then id; ids with fewer than `least` training rows are left out.
    Ids of users and items files count once for every training row that refers to them.
    """
    for source, entity in (("users", "user"), ("items", "item")):
        database.execute(
            f"CREATE TABLE train_{source} AS "
            f"SELECT {entity} AS id, count(*) AS n FROM events WHERE split = 0 GROUP BY {entity}"
        )
    rows = {}
    for table, features in plan.tables().items():
        if table in plan.open:
            rows[table] = plan.open[table]
            continue
        union = " UNION ALL ".join(_counts(plan, feature) for feature in features)
        database.execute(
            f"CREATE TABLE {vocabulary(table)} AS "
            "SELECT CAST(row_number() OVER (ORDER BY count DESC, id) AS INTEGER) AS row, id, CAST(count AS BIGINT) "
            f"AS count FROM (SELECT id, sum(n) AS count FROM ({union}) WHERE id IS NOT NULL GROUP BY id "
            f"HAVING sum(n) >= {least}) ORDER BY row"
        )
        rows[table] = 1 + int(database.row(f"SELECT count(*) FROM {vocabulary(table)}")[0])
    return rows


def vocabulary(table: str) -> str:
    """The database's table with the vocabulary of embedding table `table`, as an SQL identifier."""
    return quoted(f"vocabulary:{table}")


def hashed(value: str) -> str:
    """SQL of an id of an open vocabulary.

    It is 1 + h modulo 2^62 - 1, where h is the last 8 bytes, little-endian, of the MD5 of the id's text. Anybody can
    compute that; DuckDB's own hash may change between versions.
    """
    return f"CAST(1 + md5_number_lower(CAST({value} AS VARCHAR)) % {OPEN_IDS - 1} AS BIGINT)"


def count_known(database: Database, plan: Plan, source: SourceName) -> int:
    """Users or items that training knows."""
    table = plan.entity(source).table
    known = f"train_{source}" if table in plan.open else vocabulary(table)
    return int(database.row(f"SELECT count(*) FROM {known}")[0])


def _counts(plan: Plan, feature: PlannedFeature) -> str:
    """SQL of (id, n): in how many training rows each id of `feature` stands."""
    if feature in (plan.user, plan.item):
        return f"SELECT id, n FROM train_{'users' if feature == plan.user else 'items'}"
    column = f"x.{quoted(feature.staged)}"
    if feature.source == "interactions":
        value = f"unnest({column})" if feature.pooling else column
        return f"SELECT id, count(*) AS n FROM (SELECT {value} AS id FROM events x WHERE split = 0) GROUP BY id"
    joined = f"side_{feature.source} x JOIN train_{feature.source} t ON t.id = x.id"
    return f"SELECT {f'unnest({column})' if feature.pooling else column} AS id, t.n AS n FROM {joined}"


def write_vocabularies(database: Database, plan: Plan, out: Path) -> None:
    """Write vocabulary/TABLE.parquet of every table that has one, and users.parquet and items.parquet with the texts.

    These are of the ids that training knows or, where the vocabulary is open, of all in the side files.
    """
    (out / "vocabulary").mkdir()
    for table in [table for table in plan.tables() if table not in plan.open]:
        file = text(str(out / "vocabulary" / f"{table}.parquet"))
        database.execute(f"COPY (SELECT row, id, count FROM {vocabulary(table)} ORDER BY row) TO {file} {FORMAT}")
    for source, names in (("users", plan.raw.columns.user_text), ("items", plan.raw.columns.item_text)):
        if not names:
            continue
        entity = plan.user if source == "users" else plan.item
        opened = f"(SELECT {hashed('id')} AS row, id FROM side_{source})"
        known = opened if entity.table in plan.open else vocabulary(entity.table)
        texts = "".join(f", coalesce(s.{quoted(f'text:{name}')}, '') AS {quoted(name)}" for name in names)
        database.execute(
            f"COPY (SELECT v.row, v.id{texts} FROM {known} v LEFT JOIN side_{source} s "
            f"ON s.id = v.id ORDER BY v.row) TO {text(str(out / f'{source}.parquet'))} {FORMAT}"
        )


FORMAT = "(FORMAT parquet, COMPRESSION zstd)"
