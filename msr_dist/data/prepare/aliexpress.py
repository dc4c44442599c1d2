"""Source `aliexpress`: searches in AliExpress in five countries, which are the scenarios.

    kind = "aliexpress"
    raw = "aliexpress"
    countries = ["NL", "FR", "ES", "US"]

The data are AliExpress' (https://tianchi.aliyun.com/dataset/74690). Below `raw` stand, for each country, either the
publisher's four files, unpacked, at any depth; they have no header, and hold

    nl_user_{train,test}.csv   one line per search: its id, 32 features of user and query
    nl_item_{train,test}.csv   one line per item shown: the search's id, 47 features, and 0, 1 (click) or 2 (purchase)

or AliExpress_NL/{train,test}.csv, which MTReclib (https://github.com/easezyc/Multitask-Recommendation-Library) makes of
them: search_id, categorical_1 to categorical_16, numerical_1 to numerical_63, click, conversion. Its names, and which
columns are categorical, are used for both; both give the same data.

There are neither users nor items: a search id stands for one search and comes never again, so a test search would have
an id that training does not know; it is left out as a feature, and only says which rows are one page. What stands for
the user is the profile of its first seven categorical features (`user_profile`), and for the item that of its seven
(`item_profile`): user-grouped metrics compare the rows of users alike. Whether features of the items count something
over a period that reaches beyond the impression cannot be told: the publisher says that they are the inputs of the
ranker in production, and all of them are kept.

Not verified on the publisher's files: that categorical columns hold integers, and that each search stands once in its
user file.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, final

from pydantic import Field

from msr_dist.data.prepare.database import Database, text
from msr_dist.data.prepare.files import Layout, Part, load
from msr_dist.data.prepare.mapping import ROW, Columns, EachOnce, IdColumn, NumericColumn, Raw, ScenarioValue
from msr_dist.data.prepare.published import GivenTest, expect, expect_one_each

Country = Literal["NL", "FR", "ES", "US", "RU"]
NAMES = {"NL": "the Netherlands", "FR": "France", "ES": "Spain", "US": "the United States", "RU": "Russia"}
# Places of the publisher's columns, from 1 as in MTReclib; the first is the search, the item's last the label.
USER_CATEGORICAL = (*range(2, 9), 32, 33)
USER_NUMERICAL = tuple(range(9, 32))
ITEM_CATEGORICAL = (19, 34, 35, 36, 40, 41, 42)
LABEL = 49
ITEM_NUMERICAL = tuple(place for place in range(2, LABEL) if place not in ITEM_CATEGORICAL)
PROFILE = 7
"""How many categorical features make a user's profile: the first, up to where numbers follow."""
ADVICE = "unpack the publisher's archive or MTReclib's again (raw), or leave the country out (countries)"


def _named(kind: str, begin: int, places: tuple[int, ...]) -> dict[int, str]:
    """Place of a raw column -> the feature's name."""
    return {place: f"{kind}_{number}" for number, place in enumerate(places, begin)}


CATEGORICAL = {
    "user": _named("categorical", 1, USER_CATEGORICAL),
    "item": _named("categorical", 1 + len(USER_CATEGORICAL), ITEM_CATEGORICAL),
}
NUMERICAL = {
    "user": _named("numerical", 1, USER_NUMERICAL),
    "item": _named("numerical", 1 + len(USER_NUMERICAL), ITEM_NUMERICAL),
}
FEATURES = {
    name: kind
    for features, kind in ((CATEGORICAL, "BIGINT"), (NUMERICAL, "FLOAT"))
    for side in features.values()
    for name in side.values()
}
"""Feature -> DuckDB type."""


@final
class Config(GivenTest):
    """AliExpress; `click`, and `conversion` after a click. The publisher's test rows are the test split."""

    kind: Literal["aliexpress"] = "aliexpress"
    raw: Path
    """The folder with the files of all countries."""
    countries: Annotated[tuple[Country, ...], EachOnce] = Field(default=("NL", "FR", "ES", "US", "RU"), min_length=1)
    """The scenarios, in this order."""

    def open(self, database: Database) -> Raw:
        """The items shown, with the features of their search beside them."""
        published = any(self.raw.rglob("*_item_train.csv"))
        shown, searches = list[Part](), list[Part]()
        for country in self.countries:
            for name in ("train", "test"):
                place = [f"{text(country)} AS country", f"{name == 'test'} AS test"]
                if published:
                    searches.append(self._part(country, "user", name, place))
                    shown.append(self._part(country, "item", name, place))
                else:
                    kinds = {"search_id": "VARCHAR", **FEATURES, "click": "UTINYINT", "conversion": "UTINYINT"}
                    file = self.raw / f"AliExpress_{country}" / f"{name}.csv"
                    shown.append(Part(file, Layout(types=kinds, quotes=False), [*place, *kinds]))
        items = load(database, "shown", shown, ADVICE)
        wrong = "conversion IS NULL AND click IS NOT NULL OR conversion > 1"
        expect(database, items, wrong, "concat('a conversion that is ', conversion)", f"0 or 1: {ADVICE}")
        joined = ""
        if published:
            key = ("country", "test", "search_id")
            expect_one_each(database, items, load(database, "searches", searches, ADVICE), key, ADVICE)
            joined = f"JOIN searches USING ({', '.join(key)})"
        profiles = {"user": list(CATEGORICAL["user"].values())[:PROFILE], "item": CATEGORICAL["item"].values()}
        columns = [
            f"shown.{ROW}",
            "country",
            "click",
            "CASE WHEN click = 0 THEN 0 ELSE conversion END AS conversion",
            *FEATURES,
            *(f"concat_ws('-', {', '.join(names)}) AS {side}_profile" for side, names in profiles.items()),
            f"{self.split_column('test', 'concat(country, search_id)')} AS split",
        ]
        database.execute(f"CREATE VIEW interactions AS SELECT {', '.join(columns)} FROM shown {joined}")
        scenarios = tuple(
            ScenarioValue(country, country, f"People in {NAMES[country]} search for products in AliExpress.")
            for country in self.countries
        )
        return Raw(
            self._columns(), replace(items, view="interactions", types=database.types("interactions")), scenarios
        )

    def _part(self, country: str, side: str, name: str, place: list[str]) -> Part:
        """One of the publisher's files, with the names of the features."""
        wanted = f"{country.lower()}_{side}_{name}.csv"
        found = sorted(self.raw.rglob(wanted))
        if len(found) > 1:
            raise ValueError(f"{' and '.join(map(str, found))} are there (raw); leave one of them")
        named = CATEGORICAL[side] | NUMERICAL[side]
        kinds = {1: "VARCHAR"} | {place: FEATURES[named[place]] for place in sorted(named)}
        selected = ["c1 AS search_id", *(f"c{place} AS {name}" for place, name in named.items())]
        if side == "item":
            kinds[LABEL] = "UTINYINT"
            # What is none of 0, 1 and 2 stays as it is, to be refused as a click.
            selected += [
                f"CASE c{LABEL} WHEN 2 THEN 1 ELSE c{LABEL} END AS click",
                f"CAST(c{LABEL} = 2 AS UTINYINT) AS conversion",
            ]
        types = {f"c{place}": kind for place, kind in kinds.items()}
        file = found[0] if found else self.raw / wanted
        return Part(file, Layout(names=tuple(types), types=types, quotes=False), [*place, *selected])

    def _columns(self) -> Columns:
        return Columns(
            user="user_profile",
            item="item_profile",
            scenario="country",
            labels=self.labels(),
            ids=tuple(IdColumn(name=name, group=side) for side in CATEGORICAL for name in CATEGORICAL[side].values()),
            numerics=tuple(
                NumericColumn(name=name, group=side) for side in NUMERICAL for name in NUMERICAL[side].values()
            ),
        )
