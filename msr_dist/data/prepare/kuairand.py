"""Source `kuairand`: KuaiRand (Pure, 1K or 27K) as its publisher gives it, with tabs of the app as scenarios.

    kind = "kuairand"
    raw = "KuaiRand-1K"
    tabs = [0, 1, 2, 4, 6]

    [split]                                      # days of the app's own time zone; or fractions
    valid_from = 2022-05-01T00:00:00+08:00
    test_from = 2022-05-05T00:00:00+08:00

The data are Kuaishou's (https://kuairand.com): CC BY-SA 4.0.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, final

from pydantic import Field

from msr_dist.data.prepare.canonical import PrepareConfig
from msr_dist.data.prepare.database import Database
from msr_dist.data.prepare.files import Layout, column_type, open_text, without
from msr_dist.data.prepare.mapping import (
    Columns,
    EachOnce,
    History,
    IdColumn,
    LabelColumn,
    ListColumn,
    NumericColumn,
    Raw,
    ScenarioValue,
)

Edition = Literal["pure", "1k", "27k"]
PERIODS = ("4_08_to_4_21", "4_22_to_5_08")
TABS = range(15)
Tab = Annotated[int, Field(ge=TABS[0], le=TABS[-1])]
ADVICE = "unpack the publisher's archive again (raw)"
# The publisher's files have three kinds of columns that hold the label, and that must never be features. Feedback of
# the log (play_time_ms, long_view, is_like and the other is_*, *_stay_time) is known only after the exposure; is_click
# itself is play_time_ms against a threshold where one video fills the screen. The counters of video_features_statistic
# (show_cnt, play_cnt, ...) are means over the whole month, test days included: that file is not even opened. And
# visible_status is what had become of a video when the data were collected. Users were described after the log had
# ended, so user_active_degree and is_lowactive_period tell what they did in the test days; the other columns of users
# are of that date too, but of slower things.
USER_FEATURES = (
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{place}" for place in range(18)),
)
VIDEO_FEATURES = ("author_id", "music_id", "music_type", "video_type", "upload_type")
LOG_TYPES = dict.fromkeys(("user_id", "video_id", "hourmin", "time_ms", "is_click", "tab"), "BIGINT")
# Where some values are missing, the publisher writes integers as floats.
USER_TYPES = {"user_id": "BIGINT"} | {
    name: "VARCHAR" if name.endswith("_range") else "DOUBLE" for name in USER_FEATURES
}
VIDEO_TYPES = {
    "video_id": "BIGINT",
    "author_id": "BIGINT",
    "music_id": "BIGINT",
    "music_type": "DOUBLE",
    "video_type": "VARCHAR",
    "upload_type": "VARCHAR",
    "video_duration": "DOUBLE",
    "tag": "VARCHAR",
}


@final
class Config(PrepareConfig):
    """KuaiRand; `click` is the publisher's is_click. Reads the logs, user_features and video_features_basic."""

    kind: Literal["kuairand"] = "kuairand"
    raw: Path
    """The unpacked folder: KuaiRand-Pure, KuaiRand-1K or KuaiRand-27K, or the folder `data` in it."""
    edition: Edition | None = None
    """Which one, if files of several stand in the folder; otherwise their names say it."""
    tabs: Annotated[tuple[Tab, ...], EachOnce] = Field(default=(0, 1, 2, 4, 6), min_length=1)
    """Tabs of the app (0 to 14) whose rows to keep; the default is the Scenario-Wise-Rec benchmark's."""
    random: bool = False
    """Whether to add the log of videos that were shown at random, in place of what the recommender had chosen."""
    history: History | None = History(label="click")

    def open(self, database: Database) -> Raw:
        """Views of the logs, the users and the videos."""
        folder = _data_folder(self.raw)
        edition = self.edition or _edition(folder)
        logs = [log for period in PERIODS for log in _logs(folder, f"log_standard_{period}_{edition}")]
        if self.random:
            logs += _logs(folder, f"log_random_{PERIODS[1]}_{edition}")
        log = open_text(database, "log", logs, Layout(types=LOG_TYPES, quotes=False), ADVICE)
        users, videos = (
            open_text(database, view, _parts(folder, f"{stem}_{edition}"), Layout(types=types), ADVICE)
            for view, stem, types in (
                ("users", "user_features", USER_TYPES),
                ("items", "video_features_basic", VIDEO_TYPES),
            )
        )
        column_type(log, "tab", "tabs")
        others: dict[int | str, str] = {tab: str(tab) for tab in TABS if tab not in self.tabs}
        interactions, notes = without(database, log, "interactions", "tab", others, "tabs", "tab")
        scenarios = tuple(
            ScenarioValue(tab, f"tab{tab}", f"Short videos in tab {tab} of the app.") for tab in self.tabs
        )
        advice = f"correct these rows: tabs are numbers from 0 to {TABS[-1]}"
        return Raw(_columns(), interactions, scenarios, users, videos, notes=notes, scenario_advice=advice)


def _columns() -> Columns:
    users = [IdColumn(name=name, source="users") for name in USER_FEATURES]
    return Columns(
        user="user_id",
        item="video_id",
        scenario="tab",
        time="time_ms",
        time_unit="ms",
        labels=(LabelColumn(name="click", column="is_click"),),
        ids=(
            IdColumn(name="hour", column="hourmin"),
            *users,
            *(IdColumn(name=name, source="items") for name in VIDEO_FEATURES),
        ),
        lists=(ListColumn(name="tag", source="items", separator=","),),
        numerics=(NumericColumn(name="video_duration", source="items"),),
    )


def _data_folder(raw: Path) -> Path:
    """The folder with the CSV files."""
    if not raw.is_dir():
        what = "is a file" if raw.exists() else "is not there"
        raise ValueError(f"{raw}: {what} (raw); give the unpacked folder of KuaiRand-Pure, KuaiRand-1K or KuaiRand-27K")
    return raw / "data" if (raw / "data").is_dir() else raw


def _edition(folder: Path) -> str:
    names = [re.fullmatch(r"log_standard_.*?_(pure|1k|27k)(_part\d+)?\.csv", file.name) for file in folder.iterdir()]
    found = sorted({name[1] for name in names if name})
    if not found:
        raise ValueError(f"{folder}: no log_standard_{PERIODS[0]}_*.csv there (raw); give the unpacked folder")
    if len(found) > 1:
        raise ValueError(f"{folder}: files of {' and '.join(found)} are there (raw); set edition to one of them")
    return found[0]


def _logs(folder: Path, stem: str) -> list[Path]:
    files = _parts(folder, stem)
    if stem.endswith("_27k") and stem.startswith("log_standard") and len(files) == 1 and files[0].stem != stem:
        raise ValueError(f"{folder}: of {stem} only {files[0].name} is there (raw); add the other part")
    return files


def _parts(folder: Path, stem: str) -> list[Path]:
    """The file called `stem`, or its parts in their order."""
    if (folder / f"{stem}.csv").is_file():
        return [folder / f"{stem}.csv"]
    numbers = sorted(
        int(name[1]) for file in folder.iterdir() if (name := re.fullmatch(rf"{stem}_part(\d+)\.csv", file.name))
    )
    parts = [folder / f"{stem}_part{number}.csv" for number in range(1, max(numbers, default=0) + 1)]
    for part in parts:
        if not part.is_file():
            raise ValueError(f"{folder}: of {stem} there is a part {numbers[-1]}, but no {part.name}; {ADVICE}")
    if not parts:
        raise ValueError(f"{folder}: no {stem}.csv there; {ADVICE}")
    return parts
