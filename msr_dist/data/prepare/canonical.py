"""Prepares a data set: raw rows of any source to canonical parquet, whole or not at all.

    config = kind_config("msr_dist.data.prepare", "movielens")(raw=Path("ml-1m.zip"))
    report = prepare(config, Path("data/movielens"))

Order of the work: stage and check the raw rows, assign the splits, fit vocabularies and statistics on the training
rows, encode, write. Equal input and settings give equal bytes, whatever the number of threads.
"""

import json
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import duckdb
from pydantic import Field, ValidationInfo, field_validator

from msr_dist.config import Kinded, dump, parse
from msr_dist.data.places import here
from msr_dist.data.prepare.database import Database, first_line
from msr_dist.data.prepare.encode import encode, stream_split
from msr_dist.data.prepare.mapping import History, Raw, Split
from msr_dist.data.prepare.nulls import null_warnings
from msr_dist.data.prepare.plan import Plan, make_plan
from msr_dist.data.prepare.report import PrepareReport, Tally, in_split_order
from msr_dist.data.prepare.split import assign_splits
from msr_dist.data.prepare.stage import stage
from msr_dist.data.prepare.vocabulary import count_known, fit_vocabularies, write_vocabularies
from msr_dist.data.prepare.write import Compression, write_split
from msr_dist.schema import SCHEMA_FILE, SPLITS, FeatureSchema, Numeric

Progress = Callable[[str], None]


class PrepareConfig(Kinded, ABC):
    """Settings that every kind of source shares; each file here has one final subclass called `Config`."""

    split: Split = Split()
    history: History | None = None
    """A feature with the user's last positive items; absent unless the section is there."""
    min_count: int = Field(default=1, ge=1)
    """Ids with fewer training rows share the reserved row 0, in tables whose vocabulary is not open."""
    open_tables: dict[str, Annotated[int, Field(ge=32, multiple_of=32)]] | None = None
    """Tables with an open vocabulary, and the rows that schema.toml proposes for each, a multiple of 32: their ids are
    not listed but hashed, those of all splits alike, and training decides which of them have rows."""
    width: int = Field(default=16, ge=4, multiple_of=4)
    """Length of the embedding vectors that schema.toml proposes for every table."""
    row_group_rows: int = Field(default=65536, ge=1)
    """Greatest number of rows of a row group; smaller where a split would have fewer than 96 of them."""
    rows_per_file: int = Field(default=4_000_000, ge=1)
    """About how many rows a file holds."""
    compression: Compression = "lz4"
    """Of the parquet files: lz4 is read about twice as fast; zstd takes an eighth less room, for far stores."""
    memory_limit: str = "2GB"
    """What DuckDB may use; beyond it, it spills to disk beside the output."""
    threads: int | None = Field(default=None, ge=1)
    """DuckDB's threads; by default one per core."""
    overwrite: bool = False
    """Replace an output folder that holds a prepared data set, once the new one is complete."""

    @field_validator("split", "history", mode="before")
    @classmethod
    def _over_defaults(cls, given: Any, info: ValidationInfo) -> Any:
        """A given section changes only what it names of the source's own; another kind of split starts anew."""
        if not isinstance(given, Mapping):
            return given
        default = cls.model_fields[str(info.field_name)].default
        own = default.model_dump(mode="json", exclude_unset=True) if default else {}
        if isinstance(default, Split):
            if given.get("kind", default.kind) != default.kind:
                own = {}
            elif "fractions" in given:  # They take the place of moments.
                own = {name: value for name, value in own.items() if not name.endswith("_from")}
        section = Split if info.field_name == "split" else History
        # As in `parse`, JSON mode takes lists for tuples.
        return section.model_validate_json(json.dumps(own | dict(given), default=str), strict=True)

    @abstractmethod
    def open(self, database: Database) -> Raw:
        """Make views of the raw rows in `database`; `database.folder` is there for intermediate files."""

    def finish(self, database: Database, raw: Raw, out: Path) -> None:
        """Write what else belongs into `out`, when `events` holds all rows with their splits."""


def prepare(config: PrepareConfig, out: Path, progress: Progress | None = None) -> PrepareReport:
    """Write the data set that `config` describes to the folder `out`, and say what is in it.

    Args:
        config: a `Config` of one of the files in this package.
        out: a folder that is absent or empty, or with `config.overwrite` one that holds a prepared data set.
        progress: is called with a few words at the beginning of each step.

    Raises:
        ValueError: one line: what was found, where, what to do. `out` is as it was before.
    """
    try:
        _expect_free(here(out), config.overwrite)
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.preparing-", dir=out.parent))
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({_reason(error)}); give another folder") from None
    try:
        for folder in ("work", "data"):
            (scratch / folder).mkdir()
        report = _build(config, scratch, out, progress or (lambda _: None))
        _put_in_place(scratch, out)
        return report
    except duckdb.Error as error:
        advice = "is the disk full, or memory_limit too small?"
        raise ValueError(f"{config.kind}: the database failed ({first_line(error)}); {advice}") from error
    except OSError as error:
        place = Path(error.filename) if isinstance(error.filename, str) else scratch
        if not place.is_relative_to(scratch):
            raise ValueError(f"{place}: cannot be read or written ({_reason(error)})") from error
        raise ValueError(f"{out}: cannot be written ({_reason(error)}); make room, or give another folder") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _expect_free(out: Path, overwrite: bool) -> None:
    """ValueError where writing to `out` would lose anything but a data set that may be overwritten."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / SCHEMA_FILE).is_file():
        what = f"something is there that is no prepared data set (it has no {SCHEMA_FILE})"
        raise ValueError(f"{out}: {what}; give another folder, or remove it yourself")
    if not overwrite:
        raise ValueError(
            f"{out}: there is a data set already; give another folder, or set overwrite=true to replace it"
        )


def _reason(error: OSError) -> str:
    return error.strerror or first_line(error)


def _build(config: PrepareConfig, scratch: Path, out: Path, progress: Progress) -> PrepareReport:
    """Write everything to `scratch`/data."""
    folder = scratch / "data"
    with Database(scratch / "work", config.memory_limit, config.threads) as database:
        progress("reading and checking the raw rows")
        raw = config.open(database)
        if config.split.kind == "time" and raw.columns.time is None:
            raise ValueError(
                'split.kind "time" needs columns.time, which is not set; name it, or split.kind = "random"'
            )
        plan = make_plan(raw, config.history, config.open_tables or {})
        stage(database, plan, config.split)
        progress("assigning the splits")
        counts = assign_splits(database, config.split, raw.scenarios)
        progress("fitting vocabularies")
        tables = fit_vocabularies(database, plan, config.min_count)
        write_vocabularies(database, plan, folder)
        progress("encoding")
        numerics = encode(database, plan)
        schema = _schema(config, plan, tables, numerics, [of_scenario[0] for of_scenario in counts])
        schema.save(folder)
        users, items = (count_known(database, plan, source) for source in ("users", "items"))
        tallies = {}
        for place, split in enumerate(SPLITS):
            progress(f"writing {split}")
            tallies[split] = tally = Tally(schema)
            batches = map(tally.add, stream_split(database, plan, numerics, config.split, place))
            rows = sum(of_scenario[place] for of_scenario in counts)
            write_split(
                folder / split,
                schema,
                batches,
                rows,
                config.row_group_rows,
                config.rows_per_file,
                compression=config.compression,
            )
        config.finish(database, raw, folder)
        warnings = (
            *raw.notes,
            *null_warnings(database, plan),
            *(w for name, each in tallies.items() for w in each.warnings(name)),
        )
    (folder / "prepare.toml").write_text(dump(config))
    return PrepareReport(
        out=out,
        rows={split: int(tally.rows.sum()) for split, tally in tallies.items()},
        scenarios=in_split_order({split: tally.report(split) for split, tally in tallies.items()}),
        tables=tables,
        users=users,
        items=items,
        warnings=warnings,
    )


def _schema(
    config: PrepareConfig, plan: Plan, tables: dict[str, int], numerics: tuple[Numeric, ...], train_rows: list[int]
) -> FeatureSchema:
    features = [{"name": f.name, "table": f.table, "group": f.group, "pooling": f.pooling} for f in plan.features]
    if plan.history:
        name, group, pooling = plan.history.name, plan.history.group, plan.history.pooling
        features.append({"name": name, "table": plan.item.table, "group": group, "pooling": pooling})
    scenarios = [
        {"id": place, "name": s.name, "text": s.text, "rows": rows}
        for place, (s, rows) in enumerate(zip(plan.raw.scenarios, train_rows, strict=True))
    ]
    found = {
        "user": plan.user.name,
        "item": plan.item.name,
        "time": "time" if plan.raw.columns.time else None,
        "labels": [label.model_dump() for label in plan.labels],
        "scenarios": scenarios,
        "tables": [
            {"name": name, "rows": rows, "width": config.width} | ({"vocabulary": "open"} if name in plan.open else {})
            for name, rows in tables.items()
        ],
        "features": features,
        "numerics": [numeric.model_dump() for numeric in numerics],
    }
    # Parsed, not constructed: its faults are in our words then.
    return parse(FeatureSchema, found, where=f"{config.kind}: the data's {SCHEMA_FILE} would be wrong")


def _put_in_place(scratch: Path, out: Path) -> None:
    """Rename the finished folder to `out`; what was there goes only now."""
    if out.exists():
        out.rename(scratch / "before")
    try:
        (scratch / "data").rename(out)
    except OSError:
        if (scratch / "before").exists():
            (scratch / "before").rename(out)
        raise
