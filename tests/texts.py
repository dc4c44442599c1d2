"""A small prepared data set with text: titles of items, descriptions of users and scenarios, times, a cut-off.

    data = texts.write(tmp_path / "data")      # 40 users, 30 items, 3 scenarios, 900 training rows
    schema = FeatureSchema.read(data)

User r likes items of genre (r - 1) % 5 more than others. The last two users have training rows but like nothing, so
they have no events. A user's raw id is `user_id(row)`, an item's `item_id(row)`.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import canonical
from msr_dist.schema import Feature, FeatureSchema, Label, Scenario, Table

GENRES = ("mystery", "cooking", "travel", "science", "sport")
TITLES = {
    "mystery": ("The Locked Study", "A Body in Fog", "Silent Witness", "The Last Clue", "Footprints", "Cold Inquest"),
    "cooking": ("Bread at Home", "Ten Soups", "Knife and Pan", "The Spice Shelf", "Slow Roasts", "Cakes for Two"),
    "travel": ("By Train to Asia", "Island Winter", "Two Maps", "Desert Roads", "The Night Ferry", "High Passes"),
    "science": ("What Is Light", "Small Cells", "Deep Time", "Numbers at Play", "The Cold Planet", "Why Bees Dance"),
    "sport": ("Final Whistle", "The Marathon", "Two Rackets", "Black Diamond", "Corner Kick", "Rowing at Dawn"),
}
SCENARIOS = (
    ("home", "People open the front page and look around."),
    ("search", "People type a query and choose among results."),
    ("tonight", "People pick something for the same evening."),
)
FIRST_TIME = 1_600_000_000
"""Time of the first training row; every later pair of rows is 100 seconds newer."""


def user_id(row: int) -> int:
    return 1 + row * 3571 % 10007


def item_id(row: int) -> int:
    return 1 + row * 5003 % 10009


def genre(item: int) -> str:
    return GENRES[(item - 1) % len(GENRES)]


def title(item: int) -> str:
    """Titles repeat after 30 items, with a number from then on."""
    place, volume = (item - 1) // len(GENRES) % 6, (item - 1) // 30
    return TITLES[genre(item)][place] + (f" {volume + 1}" if volume else "")


def schema(users: int = 40, items: int = 30, timed: bool = True) -> FeatureSchema:
    """The feature and the table of a user (and of an item) have different names, as they may have."""
    return FeatureSchema(
        user="user",
        item="item",
        time="time" if timed else None,
        labels=(Label(name="like"), Label(name="share", mask="share_known")),
        scenarios=tuple(Scenario(id=i, name=name, text=text) for i, (name, text) in enumerate(SCENARIOS)),
        tables=(
            Table(name="users", rows=users + 1, width=8),
            Table(name="items", rows=items + 1, width=8),
            Table(name="genres", rows=len(GENRES) + 1, width=4),
        ),
        features=(
            Feature(name="user", table="users", group="user"),
            Feature(name="item", table="items", group="item"),
            Feature(name="genre", table="genres", group="item"),
        ),
    )


def rows(count: int, begin: int, seed: int, users: int, items: int, least: int, timed: bool) -> pa.Table:
    """`count` rows from time `begin` on; ids are drawn from `least` to the last, and training holds every user."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(least, users + 1, count), rng.integers(least, items + 1, count)
    if least:
        user[:users] = rng.permutation(users) + 1
        item[-items:] = rng.permutation(items) + 1
    alike = (user - item) % len(GENRES) == 0
    like = (rng.random(count) < np.where(alike, 0.9, 0.3)) & (user <= users - 2)
    columns = {
        "user": user,
        "item": item,
        "genre": np.where(item == 0, 0, (item - 1) % len(GENRES) + 1),
        "scenario": rng.integers(0, len(SCENARIOS), count).astype(np.int32),
        "like": like.astype(np.uint8),
        "share": (rng.random(count) < 0.5).astype(np.uint8),
        "share_known": like,
    }
    if timed:
        columns["time"] = begin + np.arange(count) // 2 * 100
    return pa.table(columns)


def write(
    folder: Path, users: int = 40, items: int = 30, train_rows: int = 900, timed: bool = True, seed: int = 0
) -> Path:
    """The whole data set; equal arguments give equal files. `train_rows` are at least as many as users and items."""
    folder.mkdir(parents=True, exist_ok=True)
    schema(users, items, timed).save(folder)
    train = rows(train_rows, FIRST_TIME, seed, users, items, least=1, timed=timed)
    canonical.write_split(folder / "train", train, canonical.uneven(train_rows, 12, seed))
    later = FIRST_TIME + train_rows * 50
    for place, split in enumerate(("valid", "test")):
        held = rows(60, later + place * 10_000, seed + 1 + place, users, items, least=0, timed=timed)
        canonical.write_split(folder / split, held, canonical.uneven(60, 6, seed))
    _write_texts(folder, train, users, items)
    return folder


def _write_texts(folder: Path, train: pa.Table, users: int, items: int) -> None:
    (folder / "vocabulary").mkdir()
    user_rows, item_rows, genre_rows = range(1, users + 1), range(1, items + 1), range(1, len(GENRES) + 1)
    ids = {
        "users": ("user", user_rows, [user_id(row) for row in user_rows]),
        "items": ("item", item_rows, [item_id(row) for row in item_rows]),
        "genres": ("genre", genre_rows, list(GENRES)),
    }
    for table, (column, numbers, raw) in ids.items():
        counts = np.bincount(train[column].to_numpy(), minlength=len(numbers) + 1)[1:]
        known = {"row": pa.array(numbers, pa.int32()), "id": raw, "count": pa.array(counts, pa.int64())}
        pq.write_table(pa.table(known), folder / "vocabulary" / f"{table}.parquet")
    ages, works = ("18-24", "25-44", "45 and older"), ("teacher", "nurse", "farmer", "student")
    pq.write_table(
        pa.table(
            {
                "row": pa.array(user_rows, pa.int32()),
                "id": ids["users"][2],
                "age_text": [ages[row % 3] for row in user_rows],
                "occupation_text": [works[row % 4] for row in user_rows],
            }
        ),
        folder / "users.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "row": pa.array(item_rows, pa.int32()),
                "id": ids["items"][2],
                "title": [title(row) for row in item_rows],
                "genres_text": [genre(row) for row in item_rows],
            }
        ),
        folder / "items.parquet",
    )
