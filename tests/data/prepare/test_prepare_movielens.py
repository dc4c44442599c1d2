import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msr_dist.config import parse
from msr_dist.data.prepare.canonical import prepare
from msr_dist.data.prepare.movielens import Config
from msr_dist.data.prepare.report import PrepareReport
from msr_dist.schema import SPLITS, FeatureSchema

REAL = Path(__file__).parents[4] / "shared/data/movielens-1m/ml-1m.zip"
AGES = (1, 18, 25, 35, 45, 50, 56)


def raw_files() -> dict[str, str]:
    rng = np.random.default_rng(0)
    users = [f"{n}::{'FM'[n % 2]}::{AGES[n % 7]}::{n % 21}::{48000 + n}-1" for n in range(1, 71)]
    movies = [f"{n}::Amélie, No. {n} ({1990 + n % 9})::Drama|War" for n in range(1, 40)]
    ratings = [
        f"{rng.integers(1, 71)}::{rng.integers(1, 40)}::{rng.integers(1, 6)}::{976000000 + rng.integers(0, 10**6)}"
        for _ in range(2000)
    ]
    return {"users.dat": lines(users), "movies.dat": lines(movies), "ratings.dat": lines(ratings)}


def lines(listed: list[str]) -> str:
    return "".join(f"{line}\n" for line in listed)


def zipped(folder: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(folder / "ml-1m.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(f"ml-1m/{name}", content.encode("latin-1"))
    return folder / "ml-1m.zip"


def run(raw: Path, out: Path, **settings: object) -> PrepareReport:
    return prepare(parse(Config, {"kind": "movielens", "raw": str(raw), **settings}, "test"), out)


def read(out: Path, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in sorted((out / split).glob("*.parquet")))


def test_zip_and_folder_give_the_same(tmp_path: Path) -> None:
    run(zipped(tmp_path, raw_files()), tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "ml-1m.zip") as archive:
        archive.extractall(tmp_path)
    run(tmp_path / "ml-1m", tmp_path / "b")
    for split in SPLITS:
        assert read(tmp_path / "a", split).equals(read(tmp_path / "b", split))


def test_scenarios_features_and_texts(tmp_path: Path) -> None:
    report = run(zipped(tmp_path, raw_files()), tmp_path / "out")
    assert sum(report.rows.values()) == 2000
    schema = FeatureSchema.read(tmp_path / "out")
    assert [scenario.name for scenario in schema.scenarios] == ["under-25", "25-34", "35-and-over"]
    names = ["user_id", "item_id", "gender", "age", "occupation", "zip", "year", "genres", "history"]
    assert [feature.name for feature in schema.features] == names
    assert {f.name: f.table for f in schema.features}["history"] == "item_id"
    train = read(tmp_path / "out", "train").to_pydict()
    ages = pq.read_table(tmp_path / "out/vocabulary/age.parquet").to_pydict()
    code = dict(zip(ages["row"], ages["id"], strict=True))
    for age, scenario in zip(train["age"], train["scenario"], strict=True):
        assert scenario == (0 if code[age] < 25 else 1 if code[age] < 35 else 2)
    items = pq.read_table(tmp_path / "out/items.parquet").to_pydict()
    assert items["title"][0].startswith("Amélie, No.")
    assert items["genres_text"][0] == "Drama, War"
    assert set(pq.read_table(tmp_path / "out/users.parquet")["gender_text"].to_pylist()) == {"female", "male"}
    assert max(map(len, train["history"])) <= 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ratings.dat": "1::1::x::976000000\n"}, "ratings.dat"),
        ({"ratings.dat": ""}, "ratings.dat is empty"),
        ({"ratings.dat": "99::1::5::976000000\n"}, "line 1: user 99"),
        ({"users.dat": "1::F::25\n"}, "users.dat, line 1"),
        ({"users.dat": "1::F::26::1::48000\n"}, "users.dat, line 1: age '26'"),
        ({"movies.dat": "7\n"}, "movies.dat, line 1"),
    ],
)
def test_bad_files(tmp_path: Path, change: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        run(zipped(tmp_path, raw_files() | change), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_absent_damaged_and_foreign_archives(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        run(tmp_path / "none.zip", tmp_path / "out")
    with pytest.raises(ValueError, match=r"no ratings\.dat there"):
        run(tmp_path, tmp_path / "out")
    whole = zipped(tmp_path, raw_files())
    whole.write_bytes(whole.read_bytes()[:-500])
    with pytest.raises(ValueError, match="not a complete zip"):
        run(whole, tmp_path / "out")
    with pytest.raises(ValueError, match=r"no ratings\.dat in the zip"):
        run(zipped(tmp_path, {"other.txt": "x"}), tmp_path / "out")


@pytest.mark.skipif(not REAL.exists(), reason="needs the publisher's ml-1m.zip in ../shared/data/movielens-1m")
def test_the_real_data_have_the_published_counts(tmp_path: Path) -> None:
    report = run(REAL, tmp_path / "out")
    counts = dict.fromkeys(("under-25", "25-34", "35-and-over"), 0)
    for each in report.scenarios:
        counts[each.scenario] += each.rows
    assert counts == {"under-25": 210_747, "25-34": 395_556, "35-and-over": 393_906}
    footers = [pq.read_metadata(file) for file in (tmp_path / "out" / "valid").glob("*")]
    assert sum(footer.num_row_groups for footer in footers) == 96
