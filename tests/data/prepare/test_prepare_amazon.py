import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msr_dist.config import parse
from msr_dist.data.prepare.amazon import Config
from msr_dist.data.prepare.canonical import prepare
from msr_dist.data.prepare.report import PrepareReport
from msr_dist.schema import SPLITS, FeatureSchema

BOTH = ["Beauty", "Toys_and_Games"]
LEAKS = {"salesRank", "rank", "related", "also_buy", "average_rating", "rating_number", "helpful", "overall", "rating"}


def reviews(edition: str, seed: int, rows: int = 400) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    drawn = zip(
        rng.integers(0, 30, rows),
        rng.integers(0, 15, rows),
        rng.integers(1, 6, rows),
        rng.integers(0, 500, rows),
        strict=True,
    )
    return [
        review(edition, f"A{user}", f"B{seed}{item:03}", float(rating), int(day)) for user, item, rating, day in drawn
    ]


def review(edition: str, user: str, item: str, rating: float, day: int) -> dict[str, Any]:
    seconds = 1252800000 + 86400 * day
    old = {"reviewerID": user, "asin": item, "reviewerName": "J.", "reviewText": 'It\'s "great"', "overall": rating}
    old |= {"summary": "Good", "unixReviewTime": seconds, "reviewTime": "09 13, 2009"}
    if edition == "2014":
        return old | {"helpful": [2, 3]}
    if edition == "2018":
        return old | {"verified": True, "vote": "2", "style": {"Size:": " 180"}}
    new = {"rating": rating, "title": "Good", "text": "Great", "images": [], "asin": f"{item}-red", "parent_asin": item}
    return new | {"user_id": user, "timestamp": seconds * 1000 + 123, "helpful_vote": 0, "verified_purchase": True}


def products(edition: str, seed: int) -> list[dict[str, Any]]:
    return [product(edition, f"B{seed}{item:03}", item) for item in range(15)]


def product(edition: str, item: str, number: int) -> dict[str, Any]:
    path = ["Beauty", "Hair Care" if number % 2 else "Skin &amp; Face"]
    common: dict[str, Any] = {"title": f'The girl\'s "no. {number}" &amp; more'}
    if edition == "2014":
        known = {"brand": "Acme"} if number % 3 else {}
        more = {"salesRank": {"Beauty": 626}, "related": {"also_bought": ["B1"]}, "price": 8.35, "imUrl": "http://x"}
        return {"asin": item, **common, **known, **more, "categories": [path, [*path, "Other"]]}
    if edition == "2018":
        more = {"rank": "866,012 in Beauty (", "also_buy": [], "main_cat": "All Beauty", "price": "", "tech1": ""}
        return {"category": path, **common, "brand": "Acme" if number % 3 else "", **more, "asin": item}
    more = {"average_rating": 4.8, "rating_number": 10, "price": None, "details": {"Brand": "Acme"}, "features": []}
    return {
        "main_category": "All Beauty",
        **common,
        **more,
        "store": "Acme" if number % 3 else None,
        "categories": path,
        "parent_asin": item,
    }


def write(folder: Path, edition: str, packed: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(BOTH):
        names = {"2014": f"reviews_{name}_5.json", "2018": f"{name}_5.json", "2023": f"{name}.jsonl"}
        dump = repr if edition == "2014" else json.dumps
        put(folder, names[edition], [json.dumps(each) for each in reviews(edition, seed)], packed)
        meta = f"meta_{name}.json" + ("l" if edition == "2023" else "")
        put(folder, meta, [dump(each) for each in products(edition, seed)], packed)
    return folder


def put(folder: Path, name: str, lines: list[str], packed: bool) -> None:
    content = "".join(f"{line}\n" for line in lines).encode()
    (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)


def run(raw: Path, out: Path, **settings: object) -> PrepareReport:
    return prepare(parse(Config, {"kind": "amazon", "raw": str(raw), "categories": BOTH, **settings}, "test"), out)


def read(out: Path, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in sorted((out / split).glob("*.parquet")))


def refused(raw: Path, *words: str, **settings: object) -> None:
    with pytest.raises(ValueError, match=r"\S") as error:
        run(raw, raw.parent / "refused", **settings)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_all_editions_give_the_same_rows(tmp_path: Path) -> None:
    for edition in ("2014", "2018", "2023"):
        run(write(tmp_path / edition, edition, packed=edition != "2018"), tmp_path / f"out{edition}")
    for split in SPLITS:
        table = read(tmp_path / "out2018", split)
        assert table.equals(read(tmp_path / "out2023", split))
        # Products of 2014 stand in several places of the shop.
        assert table.drop_columns(["categories"]).equals(read(tmp_path / "out2014", split).drop_columns(["categories"]))


def test_scenarios_labels_features_and_texts(tmp_path: Path) -> None:
    report = run(write(tmp_path / "raw", "2014"), tmp_path / "out")
    schema = FeatureSchema.read(tmp_path / "out")
    assert [scenario.name for scenario in schema.scenarios] == ["Beauty", "Toys and Games"]
    assert [f.name for f in schema.features] == ["user_id", "item_id", "brand", "categories", "history"]
    assert not LEAKS & set(schema.columns())
    counts = {each.scenario: 0 for each in report.scenarios}
    likes = dict.fromkeys(counts, 0.0)
    for each in report.scenarios:
        counts[each.scenario] += each.rows
        likes[each.scenario] += each.rows * (each.positives["like"] or 0)
    for seed, name in enumerate(counts):
        ratings = [each["overall"] for each in reviews("2014", seed)]
        assert counts[name] == len(ratings)
        assert likes[name] == pytest.approx(sum(rating > 3 for rating in ratings))
    items = pq.read_table(tmp_path / "out/items.parquet").to_pydict()
    titles = dict(zip(items["id"], items["title"], strict=True))
    assert titles["B0003"] == 'The girl\'s "no. 3" & more'
    categories = pq.read_table(tmp_path / "out/vocabulary/categories.parquet")["id"].to_pylist()
    assert set(categories) == {"Beauty", "Hair Care", "Skin & Face", "Other"}
    assert pq.read_table(tmp_path / "out/vocabulary/brand.parquet")["id"].to_pylist() == ["Acme"]


def test_settings(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", "2023")
    for file in raw.glob("meta_*"):
        file.unlink()
    refused(raw, "none of meta_Beauty.json, meta_Beauty.jsonl (or packed, .gz)", "metadata=false")
    split = {"valid_from": "2010-10-01", "test_from": "2010-12-01"}
    report = run(raw, tmp_path / "out", metadata=False, above=4, split=split, categories=["Toys_and_Games"])
    rows = reviews("2023", 1)
    assert report.rows["train"] == sum(each["timestamp"] < 1285891200000 for each in rows)
    assert report.rows["test"] == sum(each["timestamp"] >= 1291161600000 for each in rows)
    train = read(tmp_path / "out", "train")
    assert set(train["like"].to_pylist()) == {0, 1}
    early = [each for each in rows if each["timestamp"] < 1285891200000]
    assert sum(train["like"].to_pylist()) == sum(each["rating"] == 5 for each in early)
    assert {"brand", "categories"}.isdisjoint(train.column_names)


def test_products_listed_twice_and_titles_of_script(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", "2018", packed=False)
    more = [product("2018", "B0001", 1) | {"title": "again"}, product("2018", "B0002", 2)]
    with open(raw / "meta_Beauty.json", "a") as file:
        file.writelines(f"{json.dumps(each)}\n" for each in more)
    lines = (raw / "meta_Toys_and_Games.json").read_text().splitlines()
    first = json.loads(lines[0]) | {"title": "var aPageStart = (new Date()).getTime();"}
    put(raw, "meta_Toys_and_Games.json", [json.dumps(first), *lines[1:]], packed=False)
    run(raw, tmp_path / "out")
    items = pq.read_table(tmp_path / "out/items.parquet").to_pydict()
    titles = dict(zip(items["id"], items["title"], strict=True))
    assert titles["B0001"] == 'The girl\'s "no. 1" & more'
    assert titles["B1000"] == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('{"reviewerID": "A1", "asin": ', ["is no JSON object"]),
        ("{'reviewerID': 'A1'}", ["is no JSON object"]),
        ("[1, 2]", ["is no JSON object"]),
        ({"overall": "x"}, ["overall is 'x', not a number"]),
        ({"overall": None}, ["label", "fill or remove these rows"]),
        ({"unixReviewTime": "soon"}, ["unixReviewTime is 'soon'"]),
        ({"unixReviewTime": None}, ["null time"]),
        ({"reviewerID": ""}, ["null id"]),
        ({"asin": None}, ["null id"]),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_bad_reviews(tmp_path: Path, change: str | dict[str, object], words: list[str], packed: bool) -> None:
    raw = write(tmp_path / "raw", "2014", packed)
    listed = reviews("2014", 1)
    bad = change if isinstance(change, str) else json.dumps(listed[2] | change)
    # The empty line counts as one.
    put(raw, "reviews_Toys_and_Games_5.json", [json.dumps(listed[0]), "", bad, json.dumps(listed[3])], packed)
    refused(raw, "reviews_Toys_and_Games_5.json", "line 3", *words)


def test_bad_metadata(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", "2014", packed=False)
    put(raw, "meta_Beauty.json", [repr(product("2014", "B0", 0)), "__import__('os').getcwd()"], packed=False)
    refused(raw, "meta_Beauty.json, line 2", "is no JSON object")
    put(raw, "meta_Beauty.json", ["{'title': 'x'}"], packed=False)
    refused(raw, "meta_Beauty.json, line 1: asin is None")


def test_files_that_are_missing_cut_or_of_another_edition(tmp_path: Path) -> None:
    refused(tmp_path / "none", "none: no such folder (raw)")
    raw = write(tmp_path / "raw", "2014")
    refused(raw, "for 'Books'", "there are meta_Beauty.json.gz", categories=["Books"])
    refused(raw, "'Beauty' stands there a second time", categories=["Beauty", "Beauty"])
    whole = (raw / "reviews_Beauty_5.json.gz").read_bytes()
    (raw / "reviews_Beauty_5.json.gz").write_bytes(whole[:-30])
    refused(raw, "reviews_Beauty_5.json.gz, after line", "cannot be read")
    (raw / "reviews_Beauty_5.json.gz").write_bytes(gzip.compress(b""))
    refused(raw, "no reviews in there")
    put(raw, "reviews_Beauty_5.json", ['{"asin": "B1"}'], packed=False)
    refused(raw, "reviews_Beauty_5.json and reviews_Beauty_5.json.gz are there")
    (raw / "reviews_Beauty_5.json.gz").unlink()
    refused(raw, "reviews_Beauty_5.json, line 1: its fields are asin")
    put(raw, "reviews_Beauty_5.json", [json.dumps(review("2023", "A", "B", 5, 0))], packed=False)
    refused(raw, "of 2023 and", "give one edition")


def test_a_line_that_is_not_utf_8(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", "2014", packed=False)
    file = raw / "reviews_Beauty_5.json"
    lines = file.read_bytes().split(b"\n")
    lines[20] = lines[20].replace(b"great", b"gr\xff\xfet")
    file.write_bytes(b"\n".join(lines))
    refused(raw, "reviews_Beauty_5.json, line 21: it is not UTF-8")
