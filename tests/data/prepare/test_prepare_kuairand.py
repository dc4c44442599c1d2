from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msr_dist.config import parse
from msr_dist.data.prepare.canonical import prepare
from msr_dist.data.prepare.kuairand import Config
from msr_dist.data.prepare.mapping import History
from msr_dist.data.prepare.report import PrepareReport
from msr_dist.schema import SPLITS, FeatureSchema

LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
USERS = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,"
    "follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,register_days,"
    "register_days_range," + ",".join(f"onehot_feat{place}" for place in range(18))
)
VIDEOS = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
    "music_id,music_type,tag"
)
LEAKS = {"date", "play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time", "is_profile_enter", "is_rand"}
LEAKS |= {"is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view", "visible_status"}
LEAKS |= {"counts", "show_cnt", "play_cnt", "user_active_degree", "is_lowactive_period"}
FIRST, SECOND = 1649347200, 1650556800  # 8 and 22 April, midnight in China.


def log(rows: int, start: int, days: int, seed: int, tabs: tuple[int, ...] = (0, 1, 2, 3, 4, 6)) -> str:
    rng = np.random.default_rng(seed)
    lines = []
    for second in start + np.sort(rng.integers(0, days * 86400, rows)):
        moment = datetime.fromtimestamp(int(second) + 8 * 3600, UTC)
        user, video, click = rng.integers(0, 30), rng.integers(0, 20), rng.integers(0, 2)
        play = rng.integers(7000, 90000) if click else 0
        lines.append(
            f"{user},{video},{moment:%Y%m%d},{moment.hour}00,{second}123,{click},0,0,0,0,0,{click},{play},"
            f"91000,0,0,0,0,{rng.choice(tabs)}"
        )
    return text(LOG, lines)


def text(header: str, lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in [header, *lines])


def raw_files(edition: str = "pure") -> dict[str, str]:
    onehot = "1,1,29,949,1.0,0,0,14,135,6,3,0,0.0,1.0,0.0,0.0,0.0,0.0"
    absent = "1,1,29,949,,0,0,14,135,6,3,0,,,,,,"
    users = [
        f'{n},full_active,0,{-124 if n % 2 else 0},1,5,"(0,10]",0,0,34,"[30,60)",799,730+,'
        + (absent if n == 7 else onehot)
        for n in range(30)
    ]
    videos = [
        f"{n},{7349781 + n},NORMAL,2022-04-10,LongImport,0.0,{91000 + n}.0,720.0,1280.0,9155697141,"
        + ("9.0,39" if n % 3 else ',"20,43"')
        for n in range(20)
    ]
    statistics = [f"{n},102,2579.6,816.8" for n in range(20)]
    return {
        f"log_standard_4_08_to_4_21_{edition}.csv": log(1500, FIRST, 14, 0),
        f"log_standard_4_22_to_5_08_{edition}.csv": log(1500, SECOND, 17, 1),
        f"log_random_4_22_to_5_08_{edition}.csv": log(200, SECOND, 17, 2, (1,)),
        f"user_features_{edition}.csv": text(USERS, users),
        f"video_features_basic_{edition}.csv": text(VIDEOS, videos),
        f"video_features_statistic_{edition}.csv": text("video_id,counts,show_cnt,play_cnt", statistics),
    }


def write(folder: Path, files: dict[str, str]) -> Path:
    data = folder / "KuaiRand" / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (data / name).write_text(content)
    return folder / "KuaiRand"


def run(raw: Path, out: Path, **settings: object) -> PrepareReport:
    return prepare(parse(Config, {"kind": "kuairand", "raw": str(raw), **settings}, "test"), out)


def read(out: Path, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in sorted((out / split).glob("*.parquet")))


def rows_of(files: dict[str, str], start: str) -> list[list[str]]:
    """The fields of the lines of the logs whose name begins with `start`."""
    logs = [content for name, content in files.items() if name.startswith(start)]
    return [line.split(",") for content in logs for line in content.splitlines()[1:]]


def test_tabs_are_scenarios_and_nothing_leaks(tmp_path: Path) -> None:
    files = raw_files()
    report = run(write(tmp_path, files), tmp_path / "out")
    schema = FeatureSchema.read(tmp_path / "out")
    assert [scenario.name for scenario in schema.scenarios] == ["tab0", "tab1", "tab2", "tab4", "tab6"]
    lines = rows_of(files, "log_standard")
    kept = [line for line in lines if line[-1] != "3"]
    assert sum(report.rows.values()) == len(kept)
    assert report.warnings[0].startswith(f"{len(lines) - len(kept)} rows left out (tabs): those of tab 3")
    table = pa.concat_tables(read(tmp_path / "out", split) for split in SPLITS).to_pydict()
    for scenario, tab in enumerate("01246"):
        of_tab = [line for line in kept if line[-1] == tab]
        assert table["scenario"].count(scenario) == len(of_tab)
        clicks = sum(click for click, each in zip(table["click"], table["scenario"], strict=True) if each == scenario)
        assert clicks == sum(line[5] == "1" for line in of_tab)
    assert not LEAKS & {*schema.columns(), *table}
    assert [label.name for label in schema.labels] == ["click"]
    assert {"hour", "register_days_range", "onehot_feat17", "author_id", "tag", "video_duration"} <= set(table)


def test_floats_of_the_publisher_are_ids_and_gaps_are_row_0(tmp_path: Path) -> None:
    run(write(tmp_path, raw_files()), tmp_path / "out")
    assert pq.read_table(tmp_path / "out/vocabulary/music_type.parquet")["id"].to_pylist() == [9]
    assert set(pq.read_table(tmp_path / "out/vocabulary/tag.parquet")["id"].to_pylist()) == {"20", "39", "43"}
    users = pq.read_table(tmp_path / "out/vocabulary/user_id.parquet").to_pydict()
    row = dict(zip(users["id"], users["row"], strict=True))[7]
    table = read(tmp_path / "out", "train").to_pydict()
    for user, feature in zip(table["user_id"], table["onehot_feat4"], strict=True):
        assert feature == (0 if user == row else 1)


def test_split_by_days(tmp_path: Path) -> None:
    split = {"valid_from": "2022-04-30T00:00:00+08:00", "test_from": "2022-05-01T00:00:00+08:00"}
    files = raw_files()
    report = run(write(tmp_path, files), tmp_path / "out", split=split)
    dates = [int(line[2]) for line in rows_of(files, "log_standard") if line[-1] != "3"]
    assert report.rows == {
        "train": sum(date < 20220430 for date in dates),
        "valid": dates.count(20220430),
        "test": sum(date > 20220430 for date in dates),
    }


def test_27k_comes_in_parts(tmp_path: Path) -> None:
    files, whole = {}, raw_files("27k")
    for name, content in whole.items():
        header, *lines = content.splitlines()
        if name.startswith(("log_standard", "video")):
            half = len(lines) // 2
            stem = name.removesuffix(".csv")
            files[f"{stem}_part1.csv"] = text(header, lines[:half])
            files[f"{stem}_part2.csv"] = text(header, lines[half:])
        else:
            files[name] = content
    run(write(tmp_path / "a", files), tmp_path / "parts")
    run(write(tmp_path / "b", whole), tmp_path / "whole")
    for split in SPLITS:
        assert read(tmp_path / "parts", split).equals(read(tmp_path / "whole", split))
    (tmp_path / "a/KuaiRand/data/log_standard_4_22_to_5_08_27k_part2.csv").unlink()
    with pytest.raises(ValueError, match=r"only log_standard_4_22_to_5_08_27k_part1\.csv is there"):
        run(tmp_path / "a/KuaiRand", tmp_path / "out")


def test_editions_and_the_random_log(tmp_path: Path) -> None:
    raw = write(tmp_path, raw_files("1k") | raw_files("pure"))
    with pytest.raises(ValueError, match="files of 1k and pure are there"):
        run(raw, tmp_path / "out")
    without = run(raw / "data", tmp_path / "out", edition="1k", tabs=[1])
    more = run(raw / "data", tmp_path / "more", edition="1k", tabs=[1], random=True)
    assert sum(more.rows.values()) == sum(without.rows.values()) + 200


@pytest.mark.parametrize("tabs", [[15], [1, 1], [-1], []])
def test_tabs_that_are_none(tmp_path: Path, tabs: list[int]) -> None:
    with pytest.raises(ValueError, match="tabs"):
        run(tmp_path, tmp_path / "out", tabs=tabs)


LOG_FILE = "log_standard_4_22_to_5_08_pure.csv"


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        (LOG_FILE, "is_click", "is_clicked", [LOG_FILE, "no column 'is_click'"]),
        ("user_features_pure.csv", "onehot_feat3,", "other,", ["user_features_pure.csv", "no column 'onehot_feat3'"]),
        ("video_features_basic_pure.csv", ",tag", ",tags", ["no column 'tag'", "tags"]),
        (LOG_FILE, ",is_rand,tab\n", ",is_rand,tab\n1,2\n", [LOG_FILE, "line 2: no field for column"]),
        (LOG_FILE, ",is_rand,tab\n", ",is_rand,tab\n1,2,x\n", [LOG_FILE, "line 2"]),
        (
            LOG_FILE,
            "tab\n",
            "tab\nx,2,20220422,100,1650556800123,1,0,0,0,0,0,1,2,3,0,0,0,0,1\n",
            ["line 2", "x", "user_id"],
        ),
        (LOG_FILE, "tab\n", "tab\n1,2,20220422,100,1650556800123,7,0,0,0,0,0,1,2,3,0,0,0,0,1\n", ["line 2", "label"]),
        (
            LOG_FILE,
            "tab\n",
            "tab\n1,2,20220422,100,1650556800123,1,0,0,0,0,0,1,2,3,0,0,0,0,77\n",
            ["line 2", "77", "tabs are numbers from 0 to 14"],
        ),
        (
            LOG_FILE,
            "tab\n",
            "tab\n3.7,2,20220422,100,1650556800123,1,0,0,0,0,0,1,2,3,0,0,0,0,1\n",
            ["line 2", "'3.7' is no whole"],
        ),
        (
            LOG_FILE,
            "tab\n",
            "tab\n\n-3,2,20220422,100,1650556800123,1,0,0,0,0,0,1,2,3,0,0,0,0,1\n",
            ["line 3", "a negative id"],
        ),
        (
            LOG_FILE,
            ",is_rand,tab\n",
            ",is_rand,tab\n" + "1," * 19 + "1\n",
            ["line 2: more fields", "correct or remove it"],
        ),
        (
            "user_features_pure.csv",
            "\n0,",
            "\n0.4,",
            ["user_features_pure.csv, line 2, column 'user_id': '0.4' is no whole"],
        ),
        (LOG_FILE, "tab\n", "tab\n1,2,20220422,100,,1,0,0,0,0,0,1,2,3,0,0,0,0,1\n", ["line 2", "null time"]),
    ],
)
def test_bad_files(tmp_path: Path, file: str, old: str, new: str, words: list[str]) -> None:
    files = raw_files()
    files[file] = files[file].replace(old, new, 1)
    with pytest.raises(ValueError, match=r"\S") as error:
        run(write(tmp_path, files), tmp_path / "out")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("lacking", [LOG_FILE, "user_features_pure.csv", "video_features_basic_pure.csv"])
def test_missing_files(tmp_path: Path, lacking: str) -> None:
    raw = write(tmp_path, {name: content for name, content in raw_files().items() if name != lacking})
    with pytest.raises(ValueError, match=f"no {lacking.removesuffix('.csv')}"):
        run(raw, tmp_path / "out")


def test_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not there"):
        run(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ValueError, match=r"no log_standard_4_08_to_4_21_\*\.csv there"):
        run(tmp_path, tmp_path / "out")


def test_a_setting_of_the_history_leaves_the_others_as_they_are() -> None:
    history = parse(Config, {"kind": "kuairand", "raw": "x", "history": {"length": 5}}, "test").history
    assert history == History(label="click", length=5)


def test_tabs_without_rows_and_parts_with_a_gap(tmp_path: Path) -> None:
    raw = write(tmp_path, raw_files())
    with pytest.raises(ValueError, match=r"all rows are those of tab 0, 1, 2, .*; keep others \(tabs\)"):
        run(raw, tmp_path / "out", tabs=[7])
    log = raw / "data" / LOG_FILE
    for part in (1, 3):
        log.with_name(LOG_FILE.replace(".csv", f"_part{part}.csv")).write_text(log.read_text())
    log.unlink()
    with pytest.raises(ValueError, match=r"there is a part 3, but no log_standard_4_22_to_5_08_pure_part2\.csv"):
        run(raw, tmp_path / "out")


def test_a_period_without_rows(tmp_path: Path) -> None:
    files = raw_files() | {LOG_FILE: f"{LOG}\n"}
    with pytest.raises(ValueError, match=rf"{LOG_FILE}: no rows in there; .*\(raw\)"):
        run(write(tmp_path, files), tmp_path / "out")
