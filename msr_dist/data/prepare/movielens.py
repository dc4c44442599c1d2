"""Source `movielens`: MovieLens 1M as its publisher gives it, with three age groups as scenarios.

    kind = "movielens"
    raw = "ml-1m.zip"

The data are GroupLens' (https://grouplens.org/datasets/movielens/1m/): research only, no redistribution.
"""

import re
import zipfile
from pathlib import Path
from typing import Literal, final

import duckdb
import pyarrow as pa

from msr_dist.data.prepare.canonical import PrepareConfig
from msr_dist.data.prepare.database import Database, first_line, text
from msr_dist.data.prepare.mapping import (
    ROW,
    Columns,
    History,
    IdColumn,
    LabelColumn,
    ListColumn,
    Raw,
    Relation,
    ScenarioValue,
)

FILES = ("ratings.dat", "users.dat", "movies.dat")
AGES = {
    1: "under 18",
    18: "18-24",
    25: "25-34",
    35: "35-44",
    45: "45-49",
    50: "50-55",
    56: "56 or older",
}
OCCUPATIONS = (
    "other",
    "academic or educator",
    "artist",
    "clerical or admin",
    "college or graduate student",
    "customer service",
    "doctor or health care",
    "executive or managerial",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales or marketing",
    "scientist",
    "self-employed",
    "technician or engineer",
    "tradesman or craftsman",
    "unemployed",
    "writer",
)
SCENARIOS = (
    ScenarioValue("under-25", "under-25", "Viewers younger than 25, many of them students, choose and rate films."),
    ScenarioValue("25-34", "25-34", "Viewers between 25 and 34 choose and rate films."),
    ScenarioValue("35-and-over", "35-and-over", "Viewers of 35 and older choose and rate films."),
)


@final
class Config(PrepareConfig):
    """MovieLens 1M; `like` is a rating above 3."""

    kind: Literal["movielens"] = "movielens"
    raw: Path
    """The publisher's ml-1m.zip, or the folder with ratings.dat, users.dat and movies.dat."""
    history: History | None = History(label="like")

    def open(self, database: Database) -> Raw:
        """Views of ratings, users and movies."""
        folder = _unpacked(self.raw, database.folder)
        users, movies = _users(folder / "users.dat", self.raw), _movies(folder / "movies.dat", self.raw)
        database.add("users", users)
        database.add("items", movies)
        _open_ratings(database, folder / "ratings.dat", self.raw)

        def relation(view: str, file: str) -> Relation:
            where = f"{self.raw}: {file}"
            return Relation(view, where, database.types(view), lambda row: f"{where}, line {row + 1}")

        interactions = relation("interactions", "ratings.dat")
        return Raw(_columns(), interactions, SCENARIOS, relation("users", "users.dat"), relation("items", "movies.dat"))


def _columns() -> Columns:
    users = [IdColumn(name=name, source="users") for name in ("gender", "age", "occupation", "zip")]
    return Columns(
        user="user_id",
        item="item_id",
        scenario="scenario",
        time="timestamp",
        labels=(LabelColumn(name="like", column="rating", above=3),),
        ids=(*users, IdColumn(name="year", source="items")),
        lists=(ListColumn(name="genres", source="items"),),
        user_text=("gender_text", "age_text", "occupation_text"),
        item_text=("title", "genres_text"),
    )


def _unpacked(raw: Path, folder: Path) -> Path:
    """A folder that holds the three files."""
    if raw.is_dir():
        lacking = [name for name in FILES if not (raw / name).is_file()]
        if lacking:
            raise ValueError(f"{raw}: no {lacking[0]} there; give the publisher's zip or its unpacked folder (raw)")
        return raw
    try:
        with zipfile.ZipFile(raw) as archive:
            for name in FILES:
                _unpack(archive, name, raw, folder)
    except FileNotFoundError:
        raise ValueError(f"{raw}: no such file (raw); download ml-1m.zip from grouplens.org") from None
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError(f"{raw}: not a complete zip ({first_line(error)}); download it again (raw)") from None
    return folder


def _unpack(archive: zipfile.ZipFile, name: str, raw: Path, folder: Path) -> None:
    members = [member for member in archive.namelist() if Path(member).name == name]
    if not members:
        raise ValueError(f"{raw}: no {name} in the zip; give the publisher's ml-1m.zip (raw)")
    (folder / name).write_bytes(archive.read(members[0]))


def _lines(file: Path, raw: Path, fields: int) -> list[list[str]]:
    lines = [line.split("::") for line in file.read_text(encoding="latin-1").splitlines()]
    for number, line in enumerate(lines, 1):
        if len(line) != fields or not line[0].isdecimal():
            found = "::".join(line)
            raise ValueError(f"{raw}: {file.name}, line {number}: {found!r} is not {fields} fields joined by ::")
    if not lines:
        raise ValueError(f"{raw}: {file.name} is empty; download the data again (raw)")
    return lines


def _users(file: Path, raw: Path) -> pa.Table:
    """user_id, gender, age (the publisher's code), occupation, zip (its first 3 characters: the region), texts."""
    lines = _lines(file, raw, 5)
    for number, (*_, age, occupation, _zip) in enumerate(lines, 1):
        if age not in map(str, AGES) or occupation not in map(str, range(len(OCCUPATIONS))):
            where = f"{raw}: {file.name}, line {number}"
            raise ValueError(f"{where}: age {age!r} or occupation {occupation!r} is no code of the publisher's")
    return pa.table(
        {
            "user_id": [int(line[0]) for line in lines],
            "gender": [line[1] for line in lines],
            "age": [int(line[2]) for line in lines],
            "occupation": [int(line[3]) for line in lines],
            "zip": [line[4][:3] for line in lines],
            "gender_text": [{"F": "female", "M": "male"}.get(line[1], "") for line in lines],
            "age_text": [AGES[int(line[2])] for line in lines],
            "occupation_text": [OCCUPATIONS[int(line[3])] for line in lines],
            ROW: pa.array(range(len(lines)), pa.int64()),
        }
    )


def _movies(file: Path, raw: Path) -> pa.Table:
    """item_id, title, genres (a list), year (of the release, from the title)."""
    lines = _lines(file, raw, 3)
    years = [re.search(r"\((\d{4})\)\s*$", line[1]) for line in lines]
    return pa.table(
        {
            "item_id": [int(line[0]) for line in lines],
            "title": [line[1] for line in lines],
            "genres": [line[2].split("|") for line in lines],
            "genres_text": [line[2].replace("|", ", ") for line in lines],
            "year": pa.array([int(year[1]) if year else None for year in years], pa.int64()),
            ROW: pa.array(range(len(lines)), pa.int64()),
        }
    )


def _open_ratings(database: Database, file: Path, raw: Path) -> None:
    """The table `interactions`: ratings, each with the scenario of its user's age."""
    if not file.stat().st_size:
        raise ValueError(f"{raw}: ratings.dat is empty; download the data again (raw)")
    columns = "{'user_id': 'BIGINT', 'item_id': 'BIGINT', 'rating': 'DOUBLE', 'timestamp': 'BIGINT'}"
    source = f"read_csv({text(str(file))}, delim = '::', header = false, quote = '', columns = {columns})"
    groups = "CASE WHEN age < 25 THEN 'under-25' WHEN age < 35 THEN '25-34' ELSE '35-and-over' END"
    try:
        database.execute(
            f"CREATE TABLE interactions AS SELECT r.*, {groups} AS scenario FROM "
            f"(SELECT *, row_number() OVER () - 1 AS {ROW} FROM {source}) r LEFT JOIN users u USING (user_id)"
        )
    except duckdb.Error as error:
        found = first_line(error).replace(str(file), "")
        raise ValueError(f"{raw}: ratings.dat: {found}; expected user::item::rating::time (raw)") from None
    unknown = "user_id NOT IN (SELECT user_id FROM users)"
    row, user = database.row(f"SELECT min({ROW}), arg_min(user_id, {ROW}) FROM interactions WHERE {unknown}")
    if row is not None:
        raise ValueError(f"{raw}: ratings.dat, line {row + 1}: user {user} is not in users.dat; download it again")
