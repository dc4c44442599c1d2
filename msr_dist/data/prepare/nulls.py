"""What was filled in or left out while encoding, said once."""

from msr_dist.data.prepare.database import Database, quoted
from msr_dist.data.prepare.mapping import SourceName
from msr_dist.data.prepare.plan import Plan


def null_warnings(database: Database, plan: Plan) -> list[str]:
    """One line per kind of gap in the raw data."""
    sources: list[SourceName] = ["interactions", "users", "items"]
    return [line for source in sources if plan.raw.relation(source) for line in _of_source(database, plan, source)]


def _of_source(database: Database, plan: Plan, source: SourceName) -> list[str]:
    table = "staged" if source == "interactions" else f"side_{source}"
    filled = {
        each.staged: f"{each.name}: null in {{}}, row 0 instead" for each in plan.side(source) if not each.pooling
    }
    filled |= {
        each.staged: f"{each.name}: null in {{}}, the training mean instead"
        for each in plan.numerics
        if each.source == source
    }
    lines = _null_lines(database, table, filled, "rows" if source == "interactions" else source)
    if source != "interactions":
        lines += _absent_lines(database, plan, source)
    for feature in plan.side(source):
        if feature.pooling:
            lines += _left_out_lines(database, table, feature.name)
    return lines


def _null_lines(database: Database, table: str, filled: dict[str, str], unit: str) -> list[str]:
    if not filled:
        return []
    counts = database.row(f"SELECT {', '.join(f'count(*) - count({quoted(name)})' for name in filled)} FROM {table}")
    return [line.format(f"{count:,} {unit}") for line, count in zip(filled.values(), counts, strict=True) if count]


def _absent_lines(database: Database, plan: Plan, source: SourceName) -> list[str]:
    """Training users or items that the files about them do not hold; and texts that are empty."""
    joined = f"train_{source} t LEFT JOIN side_{source} s ON s.id = t.id"
    absent = database.row(f"SELECT count(*) FROM {joined} WHERE s.id IS NULL")[0]
    lines = [f"{source}: {absent:,} in training are not in the files; their features are empty"] if absent else []
    texts = plan.raw.columns.user_text if source == "users" else plan.raw.columns.item_text
    for name in texts:
        empty = database.row(f"SELECT count(*) FROM {joined} WHERE coalesce(s.{quoted(f'text:{name}')}, '') = ''")[0]
        lines += [f"{source}: no text in {name} for {empty:,} of those in training"] if empty else []
    return lines


def _left_out_lines(database: Database, table: str, name: str) -> list[str]:
    given = database.row(f"SELECT coalesce(sum(len({quoted(f'f:{name}')})), 0) FROM {table}")[0]
    kept = database.row(f"SELECT coalesce(sum(len(list)), 0) FROM {quoted(f'list:{name}')}")[0]
    return [f"{name}: {given - kept:,} of {given:,} list entries left out, unknown to training"] if given > kept else []
