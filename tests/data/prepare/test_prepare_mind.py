import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msr_dist.config import dump, parse
from msr_dist.data.prepare.canonical import prepare
from msr_dist.data.prepare.mapping import Split
from msr_dist.data.prepare.mind import Config
from msr_dist.data.prepare.report import PrepareReport
from msr_dist.schema import FeatureSchema

CATEGORIES = ("news", "sports", "finance", "lifestyle", "weather")
ENTITIES = '[{"Label": "Paris", "Type": "G", "WikidataId": "Q90", "Confidence": 1.0, "SurfaceForms": ["Paris"]}]'


def category(article: int) -> str:
    return CATEGORIES[article % 5]


def news(articles: range) -> str:
    return "".join(
        f'N{n}\t{category(n)}\t{category(n)}{n % 3}\tThe "best" of \'{n}, so far\tAn abstract; no. {n}\t'
        f"https://assets.msn.com/labs/mind/A{n}.html\t{ENTITIES}\t[]\n"
        for n in articles
    )


def behaviors(days: range, seed: int, lines: int = 400) -> str:
    rng = np.random.default_rng(seed)
    written = []
    for n in range(lines):
        hour = int(rng.integers(0, 24))
        clock = f"{(hour - 1) % 12 + 1}:{rng.integers(0, 60):02}:{rng.integers(0, 60):02} {'AM' if hour < 12 else 'PM'}"
        user = int(rng.integers(0, 40))
        history = " ".join(f"N{(user + each) % 30}" for each in range(user % 4))
        shown = " ".join(f"N{each}-{rng.integers(0, 2)}" for each in rng.permutation(30)[: rng.integers(1, 12)])
        written.append(f"{n + 1}\tU{user}\t11/{days[n % len(days)]}/2019 {clock}\t{history}\t{shown}\n")
    return "".join(written)


def raw_files() -> dict[str, str]:
    return {
        "train/news.tsv": news(range(30)),
        "train/behaviors.tsv": behaviors(range(9, 15), 0),
        "dev/news.tsv": news(range(5, 30)),
        "dev/behaviors.tsv": behaviors(range(15, 16), 1, 100),
    }


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / "mind" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "mind" / name).write_text(content)
    return folder / "mind"


def run(raw: Path, out: Path, **settings: object) -> PrepareReport:
    return prepare(parse(Config, {"kind": "mind", "raw": str(raw), **settings}, "test"), out)


def read(out: Path, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in sorted((out / split).glob("*.parquet")))


def candidates(content: str, day: str = "") -> list[tuple[str, int]]:
    """Category and click of every article that the lines of a day show."""
    shown = [each for line in content.splitlines() if f"/{day}" in line for each in line.split("\t")[4].split(" ")]
    return [(category(int(each[1:-2])), int(each[-1])) for each in shown]


def test_scenarios_labels_and_splits(tmp_path: Path) -> None:
    files = raw_files()
    report = run(write(tmp_path, files), tmp_path / "out")
    schema = FeatureSchema.read(tmp_path / "out")
    names = ["news", "lifestyle", "sports", "finance"]
    assert [scenario.name for scenario in schema.scenarios] == names
    log, test = files["train/behaviors.tsv"], files["dev/behaviors.tsv"]
    expected = {"valid": candidates(log, "14/2019"), "test": candidates(test)}
    for split, rows in expected.items():
        table = read(tmp_path / "out", split).to_pydict()
        for place, name in enumerate(names):
            clicks = [c for c, s in zip(table["click"], table["scenario"], strict=True) if s == place]
            assert sorted(clicks) == sorted(click for of, click in rows if of == name)
    every = candidates(log) + candidates(test)
    assert sum(report.rows.values()) == sum(of != "weather" for of, _ in every)
    assert report.warnings[0].startswith(f"{sum(of == 'weather' for of, _ in every)} rows left out")


def test_the_published_history_is_a_list_over_the_items_newest_first(tmp_path: Path) -> None:
    run(write(tmp_path, raw_files()), tmp_path / "out", clicked=2)
    schema = FeatureSchema.read(tmp_path / "out")
    assert {feature.name: (feature.table, feature.group) for feature in schema.features}["clicked"] == (
        "news_id",
        "user",
    )
    names = ["user_id", "news_id", "hour", "subcategory", "clicked"]
    assert [feature.name for feature in schema.features] == names
    listed = {name: pq.read_table(tmp_path / f"out/vocabulary/{name}.parquet").to_pydict() for name in names[:2]}
    users, articles = ({0: None} | dict(zip(each["row"], each["id"], strict=True)) for each in listed.values())
    table = read(tmp_path / "out", "train").to_pydict()
    for row, clicked in zip(table["user_id"], table["clicked"], strict=True):
        user = int(users[row][1:])
        history = [f"N{(user + each) % 30}" for each in range(user % 4)]
        assert [articles[each] for each in clicked] == history[::-1][:2]


def test_texts_stand_with_the_items_quotes_and_all(tmp_path: Path) -> None:
    run(write(tmp_path, raw_files()), tmp_path / "out")
    items = pq.read_table(tmp_path / "out/items.parquet").to_pydict()
    titles = dict(zip(items["id"], items["title"], strict=True))
    assert titles["N7"] == 'The "best" of \'7, so far'
    assert dict(zip(items["id"], items["abstract"], strict=True))["N7"] == "An abstract; no. 7"


def test_all_categories_and_folders_named_like_the_zips(tmp_path: Path) -> None:
    files = {name.replace("train/", "MINDsmall_train/"): content for name, content in raw_files().items()}
    files = {name: content for name, content in files.items() if not name.startswith("dev")}
    split = {"fractions": [0.8, 0.1, 0.1], "cutoff": "global"}
    raw = write(tmp_path, files)
    report = run(raw, tmp_path / "out", categories=[], split=split, history={"length": 5})
    with pytest.raises(ValueError, match=r"no folder dev there \(raw\).* 15 November on; add it, or"):
        run(raw, tmp_path / "out", overwrite=True)
    assert {each.scenario for each in report.scenarios} == set(CATEGORIES)
    assert sum(report.rows.values()) == len(candidates(files["MINDsmall_train/behaviors.tsv"]))
    assert "history" in [feature.name for feature in FeatureSchema.read(tmp_path / "out").features]


LINE = "1\tU1\t11/9/2019 9:05:58 AM\tN1 N2\tN3-1 N4-0\n"


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        ("train/behaviors.tsv", LINE.replace("N4-0", "N4"), ["shown article 2: 'N4' is no article-0 or article-1"]),
        ("train/behaviors.tsv", LINE.replace("N4-0", "N4-2"), ["'N4-2'"]),
        ("train/behaviors.tsv", LINE.replace("N3-1", "N99-1"), ["shown article 1: 'N99' is not in news.tsv"]),
        ("train/behaviors.tsv", LINE.replace("N3-1 N4-0", ""), ["no shown articles"]),
        ("train/behaviors.tsv", LINE.replace("11/9", "13/9"), ["time"]),
        ("train/behaviors.tsv", LINE.replace("/2019", "/9"), ["'11/9/9 9:05:58 AM' is the time of the line"]),
        ("train/behaviors.tsv", LINE.replace("U1", ""), ["null id"]),
        ("train/behaviors.tsv", LINE.replace("\tN1 N2", ""), ["no field for column 'impressions'"]),
        ("train/behaviors.tsv", LINE.replace("\n", "\tmore\n"), ["more fields"]),
        ("dev/news.tsv", "N1\tnews\n", ["no field for column 'subcategory'"]),
    ],
)
def test_bad_lines(tmp_path: Path, file: str, line: str, words: list[str]) -> None:
    files = raw_files()
    first, rest = files[file].split("\n", 1)
    files[file] = f"{first}\n{line}{rest}"
    with pytest.raises(ValueError, match=r"\S") as error:
        run(write(tmp_path, files), tmp_path / "out")
    assert "\n" not in str(error.value)
    for word in [f"{file}, line 2", *words]:
        assert word in str(error.value)
    assert not (tmp_path / "out").exists()


def test_categories_that_are_none(tmp_path: Path) -> None:
    raw = write(tmp_path, raw_files())
    with pytest.raises(ValueError, match=r"no 'sport' in .*; there are finance, lifestyle, news, sports, weather"):
        run(raw, tmp_path / "out", categories=["sport"])
    with pytest.raises(ValueError, match="'news' stands there a second time"):
        run(raw, tmp_path / "out", categories=["news", "news"])


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        run(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ValueError, match="no folder train there"):
        run(tmp_path, tmp_path / "out")
    raw = write(tmp_path, raw_files())
    (raw / "dev/news.tsv").unlink()
    with pytest.raises(ValueError, match=r"dev: no news\.tsv there"):
        run(raw, tmp_path / "out")
    (raw / "MINDlarge_train").mkdir()
    with pytest.raises(ValueError, match="MINDlarge_train and train are there"):
        run(raw, tmp_path / "out")


@pytest.mark.parametrize(
    "split",
    [{"seed": 4}, {"cutoff": "global"}, {"valid_from": "2019-11-13"}, {"kind": "time"}],
)
def test_a_setting_of_the_split_leaves_the_others_as_they_are(split: dict[str, object]) -> None:
    own = parse(Config, {"kind": "mind", "raw": "mind"}, "test").split
    changed = parse(Config, {"kind": "mind", "raw": "mind", "split": split}, "test")
    kept = own.model_dump(exclude=set(split))
    assert changed.split.model_dump(exclude=set(split)) == kept
    assert parse(Config, tomllib.loads(dump(changed)), "test") == changed


@pytest.mark.parametrize("split", [{"fractions": [0.7, 0.2, 0.1]}, {"kind": "random"}])
def test_shares_and_other_kinds_of_split_take_the_place_of_the_days(split: dict[str, object]) -> None:
    config = parse(Config, {"kind": "mind", "raw": "mind", "split": split}, "test")
    assert config.split == Split.model_validate(
        split | ({"fractions": (0.7, 0.2, 0.1)} if "fractions" in split else {})
    )
    assert parse(Config, tomllib.loads(dump(config)), "test") == config


def test_a_misspelt_setting_of_the_split_is_named() -> None:
    with pytest.raises(ValueError, match=r"^test: split\.sed: unknown key; did you mean 'seed'\?$"):
        parse(Config, {"kind": "mind", "raw": "mind", "split": {"sed": 4}}, "test")
