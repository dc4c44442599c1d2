"""Source `douban`: Douban's ratings of books, music and films, which are the scenarios.

    kind = "douban"
    raw = "douban_dataset(text information)"

The data are Feng Zhu's (https://www.kaggle.com/datasets/fengzhujoey/douban-datasetratingreviewside-information). Their
fields are separated by tabs, in quotes, below a header:

    bookreviews_cleaned.txt    user_id, book_id, rating, labels, comment, time, ID
    musicreviews_cleaned.txt   user_id, music_id, rating, labels, comment, useful_num, time, ID
    moviereviews_cleaned.txt   user_id, movie_id, rating, comment, time, labels, useful_num, CategoryID, ID
    users_cleaned.txt          UID, user_id, living_place, join_time, self_statement

`user_id` of the reviews is `UID` of the users. Ids of books, music and films overlap; here an item is its scenario and
its id, such as book:17. Users are the same in all scenarios.

Features are the ids, and where the user lives and the month in which they joined. Never features, since they come with
or after the rating that is to be predicted: labels (the user's own tags), comment, useful_num (how many found the
comment useful, by the end) and, in the publisher's files about items, their mean rating, which has the test ratings in
it. Those files are not read.

Not verified on the publisher's files: the order of the columns (only their names are used), and which reviews have no
rating: they stay, with an unknown label. Published are 227,251, 179,847 and 1,278,401 reviews.
"""

from pathlib import Path
from typing import Literal, final

from msr_dist.data.prepare.canonical import PrepareConfig
from msr_dist.data.prepare.database import Database, text
from msr_dist.data.prepare.files import Layout, Part, load
from msr_dist.data.prepare.mapping import Columns, History, IdColumn, LabelColumn, Raw, ScenarioValue

SCENARIOS = (
    ScenarioValue("book", "book", "Readers rate books in Douban."),
    ScenarioValue("music", "music", "Listeners rate music in Douban."),
    ScenarioValue("movie", "movie", "Viewers rate films in Douban."),
)
ADVICE = "give the folder of the publisher's text information, unpacked (raw)"


@final
class Config(PrepareConfig):
    """Douban; `like` is a rating above 3."""

    kind: Literal["douban"] = "douban"
    raw: Path
    """The folder with users_cleaned.txt and {book,music,movie}reviews_cleaned.txt."""
    history: History | None = History(label="like")

    def open(self, database: Database) -> Raw:
        """The reviews of all scenarios, and the users."""
        reviews = []
        for scenario in SCENARIOS:
            name = str(scenario.value)
            item = f"{name}_id"
            layout = _layout({"user_id": "BIGINT", item: "BIGINT", "rating": "DOUBLE", "time": "TIMESTAMP"})
            selected = [f"{text(name)} AS scenario", "user_id", f"{text(f'{name}:')} || {item} AS item_id"]
            selected += ["rating", "rating IS NOT NULL AS rated", "time"]
            reviews.append(Part(self.raw / f"{name}reviews_cleaned.txt", layout, selected))
        types = {"UID": "BIGINT", "living_place": "VARCHAR", "join_time": "TIMESTAMP", "self_statement": "VARCHAR"}
        selected = ["UID AS user_id", "living_place"]
        selected += ["strftime(join_time, '%Y-%m') AS joined", "self_statement"]
        people = [Part(self.raw / "users_cleaned.txt", _layout(types), selected)]
        interactions = load(database, "interactions", reviews, ADVICE)
        return Raw(_columns(), interactions, SCENARIOS, load(database, "users", people, ADVICE))


def _layout(types: dict[str, str]) -> Layout:
    # Published quotes are not always doubled within quotes; NA is what R writes.
    return Layout("\t", types=types, lenient=True, nulls=("NA",))


def _columns() -> Columns:
    return Columns(
        user="user_id",
        item="item_id",
        scenario="scenario",
        time="time",
        labels=(LabelColumn(name="like", column="rating", above=3, mask="rated"),),
        ids=tuple(IdColumn(name=name, source="users") for name in ("living_place", "joined")),
        user_text=("living_place", "self_statement"),
    )
