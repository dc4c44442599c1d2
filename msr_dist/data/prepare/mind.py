"""Source `mind`: MIND, Microsoft's news log, as its publisher gives it, with news categories as scenarios.

    kind = "mind"
    raw = "MINDsmall"                            # holds train/ and dev/
    categories = ["news", "lifestyle", "sports", "finance"]

A row is an article that was shown to a user, and whether they clicked it. By default the test rows are those of dev/,
all of 15 November 2019, and the validation rows those of the day before. The data are Microsoft's
(https://msnews.github.io): research only.
"""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, final

import duckdb
from pydantic import Field

from msr_dist.data.prepare.canonical import PrepareConfig
from msr_dist.data.prepare.database import Database
from msr_dist.data.prepare.files import Layout, explain, open_text, without
from msr_dist.data.prepare.mapping import (
    ROW,
    Columns,
    EachOnce,
    IdColumn,
    LabelColumn,
    ListColumn,
    Raw,
    Relation,
    ScenarioValue,
    Split,
)

BEHAVIORS = ("impression_id", "user_id", "time", "history", "impressions")
NEWS = (
    "news_id",
    "category",
    "subcategory",
    "title",
    "abstract",
    "url",
    "title_entities",
    "abstract_entities",
)
TEST_DAY = datetime(2019, 11, 15, tzinfo=UTC)
ADVICE = "unpack the publisher's zip again (raw)"
SHOWN = 1 << 16
"""More than the articles that are shown at once: a row's number is its line's times this, plus its place in it."""


@final
class Config(PrepareConfig):
    """MIND; `click` is the click on a shown article.

    The list feature `clicked` is the published history of the user's clicks, which ends before the log begins; a
    [history] section adds one of the clicks within the log.
    """

    kind: Literal["mind"] = "mind"
    raw: Path
    """The folder with the unpacked train and dev folders (also called like MINDsmall_train)."""
    categories: Annotated[tuple[str, ...], EachOnce] = ("news", "lifestyle", "sports", "finance")
    """The news categories whose articles to keep as candidates, each a scenario; empty for all of them."""
    clicked: int = Field(default=50, ge=1)
    """The greatest number of articles of the published history; the last ones are kept, newest first."""
    split: Split = Split(
        valid_from=datetime(2019, 11, 14, tzinfo=UTC),
        test_from=TEST_DAY,
    )

    def open(self, database: Database) -> Raw:
        """Views of the shown articles and of the news."""
        folders = _folders(self.raw)
        if len(folders) == 1 and self.split.test_from and self.split.test_from >= TEST_DAY:
            what = f"no folder dev there (raw), whose rows are those from {TEST_DAY:%d %B} on"
            raise ValueError(f"{self.raw}: {what}; add it, or give earlier moments or fractions (split)")
        news = _open(database, "news", folders, "news.tsv", NEWS)
        behaviors = _open(database, "behaviors", folders, "behaviors.tsv", BEHAVIORS)
        try:
            items = _items(database, news)
            shown = _shown(database, behaviors, self.clicked)
            known = [name for (name,) in database.rows("SELECT DISTINCT category FROM items ORDER BY 1")]
            self._expect_known(known, news)
            _expect_sound(database, behaviors, shown)
            seen = [name for (name,) in database.rows("SELECT DISTINCT category FROM shown ORDER BY 1")]
        except duckdb.Error as error:
            raise explain(error, (news, behaviors)) from None
        chosen = self.categories or tuple(seen)
        others: dict[int | str, str] = {name: name for name in seen if name not in chosen}
        interactions, notes = without(database, shown, "interactions", "category", others, "categories", "category")
        about = "Articles on {}, on the front page of a news site."
        scenarios = tuple(ScenarioValue(name, name, about.format(name)) for name in chosen)
        return Raw(_columns(), interactions, scenarios, items=items, notes=notes)

    def _expect_known(self, known: list[str], news: Relation) -> None:
        for name in self.categories:
            if name not in known:
                raise ValueError(f"categories: no {name!r} in {news.where}; there are {', '.join(known)}")


def _columns() -> Columns:
    return Columns(
        user="user_id",
        item="news_id",
        scenario="category",
        time="time",
        labels=(LabelColumn(name="click"),),
        ids=(IdColumn(name="hour"), IdColumn(name="subcategory", source="items")),
        lists=(ListColumn(name="clicked", table="news_id", group="user"),),
        item_text=("title", "abstract", "category", "subcategory"),
    )


def _folders(raw: Path) -> list[Path]:
    """The folders of the training log and, if it is there, of the dev log."""
    if not raw.is_dir():
        raise ValueError(f"{raw}: no such folder (raw); give the one that holds MIND's unpacked train and dev folders")
    folders: list[Path] = []
    for part in ("train", "dev"):
        named = [each for each in sorted(raw.iterdir()) if each.is_dir() and f"_{each.name}".endswith(f"_{part}")]
        if len(named) > 1:
            raise ValueError(f"{raw}: {' and '.join(each.name for each in named)} are there (raw); leave one of them")
        if not named and part == "train":
            raise ValueError(
                f"{raw}: no folder train there (raw); give the one that holds MIND's train and dev folders"
            )
        folders += named
    for folder in folders:
        for name in ("behaviors.tsv", "news.tsv"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: no {name} there; {ADVICE}")
    return folders


def _open(database: Database, view: str, folders: list[Path], name: str, columns: tuple[str, ...]) -> Relation:
    # Titles hold quotes that mean nothing.
    layout = Layout("\t", names=columns, types=dict.fromkeys(columns, "VARCHAR"), quotes=False)
    return open_text(database, view, [each / name for each in folders], layout, ADVICE)


def _items(database: Database, news: Relation) -> Relation:
    """The table `items`: train/ and dev/ share most of their articles, here each stands once."""
    database.execute(
        f"CREATE TABLE items AS SELECT DISTINCT ON (news_id) * FROM news WHERE news_id IS NOT NULL ORDER BY {ROW}"
    )
    return replace(news, view="items", types=database.types("items"))


def _shown(database: Database, behaviors: Relation, clicked: int) -> Relation:
    """The view `shown`: one row per article that was shown."""
    flat = (
        f"SELECT {ROW} AS line, user_id, time, list_reverse(list_slice(string_split(history, ' '), -{clicked}, -1)) "
        "AS clicked, unnest(string_split(trim(impressions), ' ')) AS shown, "
        "generate_subscripts(string_split(trim(impressions), ' '), 1) - 1 AS place FROM behaviors"
    )
    parsed = (
        f"SELECT line * {SHOWN} + place AS {ROW}, user_id, shown, clicked, "
        # DuckDB would take the year 9 for one.
        "CASE WHEN regexp_matches(time, '/[0-9]{4} ') THEN try_strptime(time, '%m/%d/%Y %I:%M:%S %p') END AS time, "
        "time AS written, regexp_extract(shown, '^(.*)-[01]$', 1) AS news_id, "
        f"CAST(right(shown, 1) = '1' AS TINYINT) AS click FROM ({flat})"
    )
    database.execute(
        f"CREATE VIEW shown AS SELECT s.*, hour(time) AS hour, i.category FROM ({parsed}) s "
        "LEFT JOIN (SELECT news_id, category FROM items) i USING (news_id)"
    )
    return Relation(
        "shown",
        behaviors.where,
        database.types("shown"),
        lambda row: f"{behaviors.locate(row // SHOWN)}, shown article {row % SHOWN + 1}",
        behaviors.fault,
    )


def _expect_sound(database: Database, behaviors: Relation, shown: Relation) -> None:
    """ValueError for the first line of the log that cannot be used."""
    (empty,) = database.row(f"SELECT min({ROW}) FROM behaviors WHERE impressions IS NULL OR trim(impressions) = ''")
    if empty is not None:
        raise ValueError(f"{behaviors.locate(empty)}: no shown articles; remove the line")
    faults = {
        "news_id = ''": (
            "shown",
            "is no article-0 or article-1",
            "the publisher's test folder has no labels: leave it",
        ),
        "time IS NULL": ("written", "is the time of the line", "write it like 11/15/2019 8:30:00 AM"),
        "category IS NULL": ("news_id", "is not in news.tsv", "unpack the publisher's zip again"),
    }
    firsts = database.row(f"SELECT {', '.join(f'min({ROW}) FILTER ({wrong})' for wrong in faults)} FROM shown")
    for first, (column, what, advice) in zip(firsts, faults.values(), strict=True):
        if first is not None:
            (value,) = database.row(f"SELECT {column} FROM shown WHERE {ROW} = {first}")
            raise ValueError(f"{shown.locate(first)}: {value!r} {what}; {advice}")
