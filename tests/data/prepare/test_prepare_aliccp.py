from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msr_dist.config import parse
from msr_dist.data.prepare.aliccp import Config
from msr_dist.data.prepare.canonical import prepare
from msr_dist.data.prepare.report import PrepareReport
from msr_dist.schema import FeatureSchema

POSITIONS = (9351665, 9351670, 9351680)
PAGES = {"train": 60, "test": 20}


def entries(*listed: tuple[str, int, float]) -> str:
    return "\x01".join(f"{field}\x02{number}\x03{value}" for field, number, value in listed)


def raw_lines() -> dict[str, list[list[str]]]:
    """Fields of each line of each file; 30 users with two pages each in train, ten samples a page."""
    rng = np.random.default_rng(0)
    files: dict[str, list[list[str]]] = {}
    for split, pages in PAGES.items():
        common, samples = [], []
        for page in range(pages):
            user = [("101", 31000 + page % 30, 1.0)] if page != 5 else []
            profile = [("121", 100 + page % 7, 1.0), ("124", 200 + page % 2, 1.0), ("127", 250, 1.0)]
            # The same field name with and without a suffix; three categories of which 402 counts most.
            behaviours = [("109_14", 400, 0.69315), ("109_14", 402, 2.3979), ("109_14", 401, 1.09861)]
            listed = entries(*user, *profile, *behaviours, ("127_14", 500, 1.0))
            common.append([f"{split[0]}{page:04x}", "8", listed])
            for _ in range(10):
                item = int(rng.integers(0, 20))
                fields = [
                    ("216", 9342000 + item % 3, 1.0),
                    ("301", POSITIONS[int(rng.choice(3, p=[0.4, 0.1, 0.5]))], 1.0),
                    ("205", 7702000 + item, 1.0),
                    ("206", 8317000 + item % 4, 1.0),
                    ("207", 8967000 + item % 5, 1.0),
                    *([("508", 9356000 + item % 4, 2.30259)] if item % 2 else []),
                    ("210", 9059239, 1.0),
                    ("210", 9059240 + item % 2, 1.0),
                ]
                click = int(rng.random() < 0.4)
                # As published, a conversion without a click happens.
                buy = int(rng.random() < 0.5)
                samples.append([str(len(samples) + 1), str(click), str(buy), common[-1][0], "8", entries(*fields)])
        files[f"common_features_{split}.csv"] = common
        files[f"sample_skeleton_{split}.csv"] = samples
    return files


def write(folder: Path, files: dict[str, list[list[str]]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, lines in files.items():
        (folder / name).write_text("".join(f"{','.join(fields)}\n" for fields in lines))
    return folder


def run(folder: Path, **settings: object) -> PrepareReport:
    config = {"kind": "aliccp", "raw": str(folder / "raw"), "threads": 1, **settings}
    return prepare(parse(Config, config, "test"), folder / "out")


def read(out: Path, split: str) -> dict[str, list]:
    return pa.concat_tables(pq.read_table(file) for file in sorted((out / split).glob("*.parquet"))).to_pydict()


def vocabulary(out: Path, table: str) -> dict[int, int]:
    listed = pq.read_table(out / "vocabulary" / f"{table}.parquet").to_pydict()
    return dict(zip(listed["row"], listed["id"], strict=True))


def value(fields: list[str], field: str) -> list[int]:
    triples = [entry.replace("\x03", "\x02").split("\x02") for entry in fields[-1].split("\x01")]
    return [int(number) for name, number, _ in triples if name == field]


def test_scenarios_labels_and_masks_are_those_of_the_lines(tmp_path: Path) -> None:
    files = raw_lines()
    write(tmp_path / "raw", files)
    report = run(tmp_path)
    schema = FeatureSchema.read(tmp_path / "out")
    assert [scenario.name for scenario in schema.scenarios] == [f"position {value}" for value in POSITIONS]
    assert [(label.name, label.mask) for label in schema.labels] == [
        ("click", None),
        ("conversion", "conversion_mask"),
    ]
    assert report.rows["test"] == 200
    samples = files["sample_skeleton_test.csv"]
    test = read(tmp_path / "out", "test")
    assert test["scenario"] == [POSITIONS.index(value(fields, "301")[0]) for fields in samples]
    assert test["click"] == [int(fields[1]) for fields in samples]
    assert test["conversion_mask"] == [fields[1] == "1" for fields in samples]
    assert test["conversion"] == [int(fields[1] == fields[2] == "1") for fields in samples]
    assert any(fields[1:3] == ["0", "1"] for fields in samples)


def test_over_all_impressions_a_conversion_without_a_click_is_none(tmp_path: Path) -> None:
    files = raw_lines()
    write(tmp_path / "raw", files)
    run(tmp_path, conversion="impression")
    assert FeatureSchema.read(tmp_path / "out").labels[1].mask is None
    conversions = [int(fields[1] == fields[2] == "1") for fields in files["sample_skeleton_test.csv"]]
    assert read(tmp_path / "out", "test")["conversion"] == conversions


def test_ids_lists_and_values(tmp_path: Path) -> None:
    files = raw_lines()
    write(tmp_path / "raw", files)
    run(tmp_path, behaviours=2)
    out = tmp_path / "out"
    test, samples = read(out, "test"), files["sample_skeleton_test.csv"]
    items, brands, nodes = (vocabulary(out, name) for name in ("item_id", "brand", "intentions"))
    assert [items[row] for row in test["item_id"]] == [value(fields, "205")[0] for fields in samples]
    assert [brands[row] for row in test["brand"]] == [value(fields, "216")[0] for fields in samples]
    assert [{nodes[row] for row in listed} for listed in test["intentions"]] == [
        set(value(fields, "210")) for fields in samples
    ]
    # Pages without a user count as users of their own: training never saw that of a test page.
    assert test["user_id"][50:60] == [0] * 10
    assert sorted(vocabulary(out, "user_id").values()) == [*range(31000, 31030), (1 << 40) + 5]
    assert vocabulary(out, "consumption_2")[test["consumption_2"][0]] == 250
    categories = vocabulary(out, "behaviour_categories")
    assert [categories[row] for row in test["behaviour_categories"][0]] == [402, 401]
    crossed = [bool(value(fields, "508")) for fields in samples]
    assert [row > 0 for row in test["category_cross"]] == crossed
    assert [number > 0 for number in test["category_cross_value"]] == crossed


def test_the_publishers_test_rows_stay_apart_and_validation_takes_whole_pages(tmp_path: Path) -> None:
    files = raw_lines()
    for split in PAGES:
        # Each page is told by its profile.
        for page, fields in enumerate(files[f"common_features_{split}.csv"]):
            fields[2] = entries(("101", 31000, 1.0), ("121", page, 1.0))
    write(tmp_path / "raw", files)
    report = run(tmp_path, valid=0.3)
    assert report.rows["test"] == 200
    assert 0.1 < report.rows["valid"] / 600 < 0.5
    assert report.rows["valid"] % 10 == 0
    assert (np.asarray(read(tmp_path / "out", "valid")["profile"]) == 0).all()
    first = read(tmp_path / "out", "valid")
    assert run(tmp_path, valid=0.3, threads=4, overwrite=True).rows == report.rows
    assert read(tmp_path / "out", "valid") == first
    run(tmp_path, valid=0.3, overwrite=True, split={"seed": 1})
    assert read(tmp_path / "out", "valid") != first


def test_the_scenario_and_feedback_are_no_features(tmp_path: Path) -> None:
    write(tmp_path / "raw", raw_lines())
    run(tmp_path, behaviours=0)
    schema = FeatureSchema.read(tmp_path / "out")
    names = {feature.name for feature in schema.features} | {numeric.name for numeric in schema.numerics}
    assert not {"position", "split", "test", "sample", "click", "conversion"} & names
    assert not [name for name in names if name.startswith("behaviour")]
    assert {"user_id", "item_id", "category", "gender", "intention_cross"} <= names


def test_scenarios_in_an_order_of_ones_own(tmp_path: Path) -> None:
    files = raw_lines()
    write(tmp_path / "raw", files)
    run(tmp_path, positions=POSITIONS[::-1])
    samples = files["sample_skeleton_test.csv"]
    assert read(tmp_path / "out", "test")["scenario"] == [
        POSITIONS[::-1].index(value(fields, "301")[0]) for fields in samples
    ]


def refused(folder: Path, *words: str, **settings: object) -> None:
    with pytest.raises(ValueError, match=r"\S") as error:
        run(folder, **settings)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert not (folder / "out").exists()


def test_a_missing_or_empty_file(tmp_path: Path) -> None:
    files = raw_lines()
    write(tmp_path / "raw", files)
    (tmp_path / "raw" / "common_features_test.csv").write_text("")
    refused(tmp_path, "common_features_test.csv: the file is empty", "(raw)")
    (tmp_path / "raw" / "common_features_test.csv").unlink()
    refused(tmp_path, "common_features_test.csv: no such file", "(raw)")


SKELETON = "sample_skeleton_test.csv"


@pytest.mark.parametrize(
    ("file", "line", "place", "content", "words"),
    [
        (SKELETON, 3, 5, "301\x029351665", ("test.csv, line 3: malformed features", "0 more", "FIELD")),
        (SKELETON, 3, 5, "205\x02item\x031.0", ("line 3: malformed features",)),
        ("common_features_train.csv", 7, 2, "101:5:1.0", ("train.csv, line 7: malformed features",)),
        (SKELETON, 3, 5, f"205\x02{10**29}\x031.0", ("line 3: malformed features",)),
        (SKELETON, 4, 1, "0.4", ("line 4, column 'click': '0.4' is no whole number",)),
        (SKELETON, 4, 2, "7", ("line 4: a conversion that is 7, here and in 0 more; 0 or 1",)),
        (SKELETON, 4, 1, "x", ("line 4:", "to 'UTINYINT'")),
        (SKELETON, 4, 1, "2", ("line 4, column 'click': a label outside {0, 1}",)),
        (
            SKELETON,
            4,
            3,
            "none",
            (
                "line 4: none is not in ",
                "common_features_train.csv and 1 more",
            ),
        ),
        ("common_features_test.csv", 2, 0, "t0000", ("line 2: t0000 stands there a second time",)),
        (SKELETON, 6, 5, entries(("205", 7702000, 1.0)), ("line 6: no field 301",)),
        (SKELETON, 6, 5, entries(("301", 7, 1.0)), ("line 6: field 301 has more than 3 values", "positions")),
    ],
)
def test_a_wrong_line(tmp_path: Path, file: str, line: int, place: int, content: str, words: tuple[str, ...]) -> None:
    files = raw_lines()
    files[file][line - 1][place] = content
    write(tmp_path / "raw", files)
    refused(tmp_path, file, *words)


def test_a_line_with_too_few_fields_and_one_that_was_cut(tmp_path: Path) -> None:
    files = raw_lines()
    files[SKELETON][8] = files[SKELETON][8][:3]
    write(tmp_path / "raw", files)
    refused(tmp_path, f"{SKELETON}, line 9: no field for column 'index'", "(raw)")


def test_an_unknown_scenario(tmp_path: Path) -> None:
    write(tmp_path / "raw", raw_lines())
    refused(tmp_path, "line 1", "'position'", "an unknown scenario", "9351", "(positions)", positions=(1, 2))


@pytest.mark.parametrize("split", [{"column": "foo"}, {"kind": "time"}])
def test_a_split_that_would_lose_the_publishers_test_rows(tmp_path: Path, split: dict[str, str]) -> None:
    refused(
        tmp_path, "the publisher gives the test rows and no times", "leave split.kind and split.column", split=split
    )
