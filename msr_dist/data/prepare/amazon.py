"""Source `amazon`: Amazon reviews of 2014, 2018 or 2023 as their publisher gives them, with categories as scenarios.

    kind = "amazon"
    raw = "amazon"                               # holds reviews_Beauty_5.json.gz, meta_Beauty.json.gz, ...
    categories = ["Beauty", "Clothing_Shoes_and_Jewelry", "Health_and_Personal_Care"]

A row is a review. The data are the McAuley lab's (https://amazon-reviews-2023.github.io): research only.
"""

import ast
import gzip
import html
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Annotated, Any, Literal, final

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from msr_dist.data.prepare.canonical import PrepareConfig
from msr_dist.data.prepare.database import Database, first_line, text
from msr_dist.data.prepare.files import opened, where, within
from msr_dist.data.prepare.mapping import (
    ROW,
    Columns,
    EachOnce,
    History,
    IdColumn,
    LabelColumn,
    ListColumn,
    Raw,
    Relation,
    ScenarioValue,
)

REVIEWS = ("reviews_{}_5.json", "reviews_{}.json", "{}_5.json", "{}.json", "{}.jsonl")
META = ("meta_{}.json", "meta_{}.jsonl")
CHUNK_ROWS = 1 << 16


@dataclass(frozen=True)
class Edition:
    """What the publisher calls the fields of a review."""

    user: str
    item: str
    rating: str
    time: str
    ticks: int
    """Units of `time` in a second."""

    @property
    def columns(self) -> dict[str, str]:
        """Field of a review -> DuckDB type."""
        return {self.user: "VARCHAR", self.item: "VARCHAR", self.rating: "DOUBLE", self.time: "BIGINT"}


EDITIONS = {
    "2014 and 2018": Edition("reviewerID", "asin", "overall", "unixReviewTime", 1),
    # A product of 2023 is what has one page: its `asin` would be one of the colours or sizes.
    "2023": Edition("user_id", "parent_asin", "rating", "timestamp", 1000),
}
ITEMS = pa.schema(
    [
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("brand", pa.string()),
        ("categories", pa.list_(pa.string())),
        (ROW, pa.int64()),
    ]
)


@final
class Config(PrepareConfig):
    """Amazon reviews; `like` is a rating above 3.

    Of the metadata, only what a product is: its rank, its mean rating, and what else was bought or viewed come from the
    whole period, test rows included.
    """

    kind: Literal["amazon"] = "amazon"
    raw: Path
    """The folder with the reviews and the metadata of each category: JSON lines, also packed (.gz)."""
    categories: Annotated[tuple[str, ...], EachOnce] = Field(
        default=("Beauty", "Clothing_Shoes_and_Jewelry", "Health_and_Personal_Care"), min_length=1
    )
    """As in the names of the files, each a scenario; the default is Scenario-Wise-Rec's (5-core, 2014)."""
    above: float = Field(default=3, allow_inf_nan=False)
    """Ratings greater than this are likes."""
    metadata: bool = True
    """Whether to read the metadata: brand and categories as features, titles as text."""
    history: History | None = History(label="like")

    def open(self, database: Database) -> Raw:
        """Views of the reviews and, unless told otherwise, of the products."""
        files = [_find(self.raw, category, REVIEWS) for category in self.categories]
        edition = _edition(files)
        reviews = _open_reviews(database, dict(zip(files, self.categories, strict=True)), edition)
        items = None
        if self.metadata:
            items = _open_items(database, [_find(self.raw, category, META) for category in self.categories], edition)
        scenarios = tuple(ScenarioValue(name, _words(name), _about(name)) for name in self.categories)
        return Raw(_columns(self.above, self.metadata), reviews, scenarios, items=items)


def _columns(above: float, metadata: bool) -> Columns:
    return Columns(
        user="user_id",
        item="item_id",
        scenario="category",
        time="time",
        labels=(LabelColumn(name="like", column="rating", above=above),),
        ids=(IdColumn(name="brand", source="items"),) if metadata else (),
        lists=(ListColumn(name="categories", source="items"),) if metadata else (),
        item_text=("title", "brand", "categories") if metadata else (),
    )


def _words(category: str) -> str:
    return category.replace("_", " ")


def _about(category: str) -> str:
    return f"Customers of an online shop rate products of the department {_words(category)}."


def _find(raw: Path, category: str, patterns: Iterable[str]) -> Path:
    """The one file of a category, packed or not."""
    names = [pattern.format(category) + packed for pattern in patterns for packed in ("", ".gz")]
    found = [raw / name for name in names if (raw / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{raw}: {' and '.join(file.name for file in found)} are there (raw); leave one of them")
    if not found:
        if not raw.is_dir():
            raise ValueError(f"{raw}: no such folder (raw); give the one that holds the publisher's JSON files")
        there = sorted(file.name for file in raw.glob("*.json*"))
        listed = f"there are {', '.join(there[:20])}" if there else "there is no JSON at all"
        hint = "; or set metadata=false" if names[0].startswith("meta_") else " (categories)"
        raise ValueError(
            f"{raw}: none of {', '.join(names[::2])} (or packed, .gz) for {category!r}; {listed}; download it{hint}"
        )
    return found[0]


def _edition(files: list[Path]) -> Edition:
    """The edition of the reviews, from the fields of each file's first line."""
    found: dict[str, Path] = {}
    for file in files:
        line, first = next(_records(file), (0, None))
        if first is None:
            raise ValueError(f"{file}: no reviews in there; download it again")
        name = next((name for name, edition in EDITIONS.items() if edition.columns.keys() <= first.keys()), None)
        if name is None:
            known = ", or ".join(f"{', '.join(each.columns)} ({name})" for name, each in EDITIONS.items())
            raise ValueError(f"{file}, line {line}: its fields are {', '.join(first)}; a review has {known}")
        found.setdefault(name, file)
    if len(found) > 1:
        listed = " and ".join(f"{file.name} of {name}" for name, file in found.items())
        raise ValueError(f"{files[0].parent}: {listed}; give one edition, since users have other ids in each")
    return EDITIONS[next(iter(found))]


def _open_reviews(database: Database, categories: dict[Path, str], edition: Edition) -> Relation:
    """The table `interactions`: user_id, item_id, rating, time, category."""
    files = list(categories)
    columns = ", ".join(f"{name}: '{kind}'" for name, kind in edition.columns.items())
    counts: list[int] = []
    database.execute(
        "CREATE TABLE interactions (user_id VARCHAR, item_id VARCHAR, rating DOUBLE, time BIGINT, category VARCHAR, "
        f"{ROW} BIGINT)"
    )
    for file, category in categories.items():
        source = f"read_json({text(str(file))}, format = 'newline_delimited', columns = {{{columns}}})"
        try:
            database.execute(
                f"INSERT INTO interactions SELECT nullif({edition.user}, ''), nullif({edition.item}, ''), "
                f"{edition.rating}, {edition.time} // {edition.ticks}, {text(category)}, "
                f"{sum(counts)} + row_number() OVER () - 1 FROM {source}"
            )
        except duckdb.Error as error:
            raise ValueError(_fault(file, edition) or f"{file}: {first_line(error)}; download it again") from None
        counts.append(database.row("SELECT count(*) FROM interactions")[0] - sum(counts))
    starts = dict(zip(files, accumulate([0, *counts]), strict=False))
    return Relation("interactions", where(files), database.types("interactions"), lambda row: _locate(starts, row))


def _fault(file: Path, edition: Edition) -> str | None:
    """The first line of a file that is no review."""
    numbers = {edition.rating: float, edition.time: int}
    try:
        for line, record in _records(file):
            for name, kind in numbers.items():
                try:
                    kind(record.get(name) or 0)
                except (TypeError, ValueError):
                    return f"{file}, line {line}: {name} is {record[name]!r}, not a number; correct it"
    except ValueError as error:
        return str(error)
    return None


def _locate(starts: dict[Path, int], row: int) -> str:
    """A review's file and line; lines without text do not count."""
    file, wanted = within(starts, row)
    line = next((line for place, (line, _) in enumerate(_lines(file)) if place == wanted), None)
    return f"{file}, line {line}"


def _open_items(database: Database, files: list[Path], edition: Edition) -> Relation:
    """The table `items`: each product once, though the publisher lists some of them several times."""
    target = database.folder / "items.parquet"
    with pq.ParquetWriter(target, ITEMS) as writer:
        products = _items(files, edition)
        while chunk := list(islice(products, CHUNK_ROWS)):
            writer.write_table(pa.Table.from_pylist(chunk, ITEMS))
    database.execute(
        f"CREATE TABLE items AS SELECT DISTINCT ON (item_id) * FROM read_parquet({text(str(target))}) ORDER BY {ROW}"
    )
    return Relation("items", where(files), database.types("items"), lambda row: f"{where(files)}, product {row}")


def _items(files: list[Path], edition: Edition) -> Iterator[dict[str, Any]]:
    row = 0
    for file in files:
        for line, record in _records(file, literals=True):
            item = record.get(edition.item)
            if not isinstance(item, str) or not item:
                raise ValueError(f"{file}, line {line}: {edition.item} is {item!r}; it must name the product")
            title = html.unescape(str(record.get("title") or ""))
            yield {
                "item_id": item,
                # Some titles of 2018 are the page's script instead.
                "title": "" if "getTime" in title else title,
                "brand": html.unescape(str(record.get("brand") or record.get("store") or "")) or None,
                "categories": list(dict.fromkeys(_flat(record.get("categories") or record.get("category")))),
                ROW: row,
            }
            row += 1


def _flat(categories: object) -> Iterator[str]:
    """The names in a list or, in 2014, in a list of paths from the department down."""
    if isinstance(categories, str):
        yield html.unescape(categories)
    elif isinstance(categories, list):
        for each in categories:
            yield from _flat(each)


def _records(file: Path, literals: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line: JSON or, if `literals`, Python as in the metadata of 2014."""
    for line, content in _lines(file):
        try:
            record = json.loads(content)
        except json.JSONDecodeError:
            record = _literal(content) if literals else None
        if not isinstance(record, dict):
            raise ValueError(f"{file}, line {line}: {content[:80]!r} is no JSON object; download the file again")
        yield line, record


def _literal(content: str) -> object:
    try:
        return ast.literal_eval(content)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not empty."""
    number = 0
    try:
        with opened(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line.decode().strip()
    except UnicodeDecodeError:
        raise ValueError(f"{file}, line {number}: it is not UTF-8; download the file again") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        what = f"cannot be read ({first_line(error)})"
        raise ValueError(f"{file}, after line {number}: {what}; download the file again") from None
