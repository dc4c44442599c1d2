from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msr_dist.config import parse
from msr_dist.data.prepare.aliexpress import Config
from msr_dist.data.prepare.canonical import prepare
from msr_dist.data.prepare.report import PrepareReport
from msr_dist.schema import FeatureSchema

COUNTRIES = ("NL", "RU")
SEARCHES = {"train": 40, "test": 12}
SHOWN = 8
# MTReclib's reading of the publisher's columns, from 1.
USER_CATEGORICAL = [2, 3, 4, 5, 6, 7, 8, 32, 33]
ITEM_CATEGORICAL = [19, 34, 35, 36, 40, 41, 42]


def raw_lines() -> dict[str, list[list[str]]]:
    """Fields of each line of the publisher's files; search ids begin anew in each file, as in the data."""
    rng = np.random.default_rng(0)
    files: dict[str, list[list[str]]] = {}
    for country in COUNTRIES:
        for split, searches in SEARCHES.items():
            users, items = [], []
            for search in range(3, 3 + searches):
                user = [f"{rng.random():.6f}" for _ in range(33)]
                for place in USER_CATEGORICAL:
                    user[place - 1] = str(rng.integers(0, 2))
                users.append([str(search), *user[1:]])
                for _ in range(SHOWN):
                    item = [f"{rng.random():.6f}" for _ in range(49)]
                    for place in ITEM_CATEGORICAL:
                        item[place - 1] = str(rng.integers(0, 2))
                    items.append([str(search), *item[1:48], str(rng.choice(3, p=[0.6, 0.25, 0.15]))])
            # Items of a search need not stand together, nor in the order of the searches.
            shuffled = [items[place] for place in rng.permutation(len(items))]
            files |= {f"{country.lower()}_user_{split}.csv": users, f"{country.lower()}_item_{split}.csv": shuffled}
    return files


def write(folder: Path, files: dict[str, list[list[str]]]) -> None:
    for name, lines in files.items():
        place = folder / f"aliexpress_{name[:2].upper()}_datasets"
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("".join(f"{','.join(fields)}\n" for fields in lines))


def processed(files: dict[str, list[list[str]]], country: str, split: str) -> list[list[str]]:
    """What MTReclib makes of the publisher's files, in the order of the item file."""
    users = {fields[0]: fields for fields in files[f"{country.lower()}_user_{split}.csv"]}
    header = ["search_id", *(f"categorical_{n}" for n in range(1, 17)), *(f"numerical_{n}" for n in range(1, 64))]
    lines = [[*header, "click", "conversion"]]
    for item in files[f"{country.lower()}_item_{split}.csv"]:
        user = users[item[0]]
        categorical = [user[n - 1] for n in USER_CATEGORICAL] + [item[n - 1] for n in ITEM_CATEGORICAL]
        numerical = user[8:31] + [item[n - 1] for n in range(2, 49) if n not in ITEM_CATEGORICAL]
        label = [str(int(item[48] > "0")), str(int(item[48] == "2"))]
        lines.append([item[0], *categorical, *numerical, *label])
    return lines


def write_processed(folder: Path, files: dict[str, list[list[str]]]) -> None:
    for country in COUNTRIES:
        (folder / f"AliExpress_{country}").mkdir(parents=True, exist_ok=True)
        for split in SEARCHES:
            lines = processed(files, country, split)
            content = "".join(f"{','.join(fields)}\n" for fields in lines)
            (folder / f"AliExpress_{country}" / f"{split}.csv").write_text(content)


def run(folder: Path, **settings: object) -> PrepareReport:
    config = {"kind": "aliexpress", "raw": str(folder / "raw"), "countries": COUNTRIES, "threads": 1, **settings}
    return prepare(parse(Config, config, "test"), folder / "out")


def read(out: Path, split: str) -> dict[str, list]:
    return pa.concat_tables(pq.read_table(file) for file in sorted((out / split).glob("*.parquet"))).to_pydict()


def vocabulary(out: Path, table: str) -> dict[int, object]:
    listed = pq.read_table(out / "vocabulary" / f"{table}.parquet").to_pydict()
    return dict(zip(listed["row"], listed["id"], strict=True))


def test_scenarios_labels_and_features_are_those_of_the_lines(tmp_path: Path) -> None:
    files = raw_lines()
    write(tmp_path / "raw", files)
    report = run(tmp_path)
    out = tmp_path / "out"
    schema, test = FeatureSchema.read(out), read(out, "test")
    assert [scenario.name for scenario in schema.scenarios] == ["NL", "RU"]
    assert [(label.name, label.mask) for label in schema.labels] == [("click", None), ("conversion", "conversion_mask")]
    rows = SHOWN * SEARCHES["test"]
    assert report.rows["test"] == 2 * rows
    assert test["scenario"] == [0] * rows + [1] * rows
    lines = [line for country in COUNTRIES for line in processed(files, country, "test")[1:]]
    assert test["click"] == test["conversion_mask"] == [int(line[-2]) for line in lines]
    assert test["conversion"] == [int(line[-1]) for line in lines]
    assert {0, 1} == set(test["conversion"])
    for place, number in ((1, 1), (8, 8), (16, 16)):
        ids = vocabulary(out, f"categorical_{number}")
        assert [ids[row] for row in test[f"categorical_{number}"]] == [int(line[place]) for line in lines]
    for number in (1, 23, 24, 63):
        numeric = next(each for each in schema.numerics if each.name == f"numerical_{number}")
        raw = np.asarray([float(line[16 + number]) for line in lines])
        assert np.allclose(test[f"numerical_{number}"], (raw - numeric.mean) / numeric.std, atol=1e-5)
        assert numeric.group == ("user" if number < 24 else "item")


def test_mtreclibs_files_give_the_same(tmp_path: Path) -> None:
    files = raw_lines()
    for folder, writer in (("a", write), ("b", write_processed)):
        (tmp_path / folder).mkdir()
        writer(tmp_path / folder / "raw", files)
        run(tmp_path / folder)
    for split in ("train", "valid", "test"):
        assert read(tmp_path / "a" / "out", split) == read(tmp_path / "b" / "out", split)


def test_profiles_stand_for_users_and_items(tmp_path: Path) -> None:
    files = raw_lines()
    write(tmp_path / "raw", files)
    run(tmp_path)
    out = tmp_path / "out"
    schema, train = FeatureSchema.read(out), read(out, "train")
    assert (schema.user, schema.item, schema.time) == ("user_profile", "item_profile", None)
    assert min(train["user_profile"]) > 0
    names = {name.split("-")[0] for name in map(str, vocabulary(out, "user_profile").values())}
    assert names == {"0", "1"}
    assert {len(str(name).split("-")) for name in vocabulary(out, "item_profile").values()} == {7}
    features = {feature.name for feature in schema.features} | {numeric.name for numeric in schema.numerics}
    assert len(features) == 2 + 16 + 63
    # An id of one search would be new in every test row.
    assert not {"search_id", "country", "click", "conversion"} & features


def test_validation_takes_whole_searches_of_the_training_files(tmp_path: Path) -> None:
    files = raw_lines()
    for country in COUNTRIES:
        for split in SEARCHES:
            for number, fields in enumerate(files[f"{country.lower()}_user_{split}.csv"]):
                fields[1] = str(1000 * (country == "RU") + number)
    write(tmp_path / "raw", files)
    report = run(tmp_path, valid=0.3)
    assert report.rows["test"] == 2 * SHOWN * SEARCHES["test"]
    assert report.rows["train"] + report.rows["valid"] == 2 * SHOWN * SEARCHES["train"]
    assert report.rows["valid"] % SHOWN == 0
    # The feature tells searches apart: training has none of validation's.
    assert set(read(tmp_path / "out", "valid")["categorical_1"]) == {0}


def refused(folder: Path, *words: str, **settings: object) -> None:
    with pytest.raises(ValueError, match=r"\S") as error:
        run(folder, **settings)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert not (folder / "out").exists()


def test_missing_files_columns_and_countries(tmp_path: Path) -> None:
    files = raw_lines()
    refused(tmp_path, "AliExpress_NL/train.csv: no such file", "countries")
    write(tmp_path / "raw", {name: lines for name, lines in files.items() if name != "ru_user_test.csv"})
    refused(tmp_path, "ru_user_test.csv: no such file", "(raw)", "(countries)")
    refused(tmp_path, "countries.0", "NL", countries=["XX"])
    other = tmp_path / "other"
    write_processed(other / "raw", files)
    file = other / "raw" / "AliExpress_RU" / "test.csv"
    file.write_text(file.read_text().replace("categorical_16", "other", 1))
    refused(other, "AliExpress_RU/test.csv, line 1: no column 'categorical_16'")


@pytest.mark.parametrize(
    ("file", "line", "fields", "words"),
    [
        ("nl_item_test.csv", 4, slice(20, 49), ("line 4: no field for column 'c21'",)),
        ("nl_item_test.csv", 4, slice(48, 49), ("line 4: no field for column 'c49'",)),
        ("nl_user_train.csv", 5, slice(1, 1), ("line 5: more fields than columns", "correct or remove it")),
        ("nl_user_train.csv", 5, "0.4", ("line 5, column 'c2': '0.4' is no whole number",)),
        ("nl_user_train.csv", 5, "x", ("line 5:", "to 'BIGINT'")),
        ("nl_item_train.csv", 2, "7", ("line 2, column 'click': a label outside {0, 1}", "7")),
        ("nl_item_train.csv", 2, "", ("line 2, column 'click': a label outside {0, 1}",)),
        ("ru_item_test.csv", 6, "999", ("line 6: 999 is not in ", "nl_user_train.csv and 3 more")),
        ("ru_user_test.csv", 2, "3", ("line 2: 3 stands there a second time",)),
    ],
)
def test_a_wrong_line(tmp_path: Path, file: str, line: int, fields: str | slice, words: tuple[str, ...]) -> None:
    files = raw_lines()
    wrong = files[file][line - 1]
    if isinstance(fields, slice):
        wrong[fields] = ["0"] if fields.start == fields.stop else []
    else:
        wrong[{"x": 1, "0.4": 1, "999": 0, "3": 0}.get(fields, 48)] = fields
    write(tmp_path / "raw", files)
    refused(tmp_path, file, *words)


def test_copies_countries_given_twice_and_files_without_rows(tmp_path: Path) -> None:
    files = raw_lines()
    refused(tmp_path, "countries: 'NL' stands there a second time", countries=["NL", "NL"])
    write(tmp_path / "raw", files)
    write(tmp_path / "raw" / "copy", {"nl_user_test.csv": files["nl_user_test.csv"]})
    refused(tmp_path, "raw/aliexpress_NL_datasets/nl_user_test.csv", "raw/copy/", "leave one of them")
    other = tmp_path / "other"
    write_processed(other / "raw", files)
    file = other / "raw" / "AliExpress_RU" / "test.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1][:-3] + "0,7"]))
    refused(other, "AliExpress_RU/test.csv, line 2: a conversion that is 7", "0 or 1")
    file.write_text(f"{lines[0]}\n")
    refused(other, "AliExpress_RU/test.csv: no rows in there", "(raw)")
