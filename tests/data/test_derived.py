"""Rows of choices, pairs, catalogue and queries, against the same said in plain Python."""

import hashlib
import shutil
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import choices
from msr_dist.data import derived
from msr_dist.data.derived import (
    ANSWERS_FILE,
    LOG_SHARE,
    ROWS,
    Sides,
    read_summary,
    write_catalogue,
    write_choices,
    write_pairs,
    write_queries,
    write_question,
)
from msr_dist.data.parquet import ParquetSource
from msr_dist.models.two_tower import Config
from msr_dist.schema import FeatureSchema

USER = ("user", "history", "likes", "age")
ITEM = ("item", "place", "price")
NAMES = ["home", "search", "feed", "tiny", "abroad"]


def sides_of(folder, **changes) -> Sides:
    schema = Config(kind="two_tower").adapt(FeatureSchema.read(folder))
    return replace(Sides(folder, schema, ("user",), None, 3, "500MB"), **changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return choices.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def splits(data):
    """The rows of each split, with the place of each in its split's time."""
    return {split: ordered(choices.read(data / split)) for split in ("train", "valid", "test")}


def ordered(rows):
    return [row | {"moment": (row["time"], place)} for place, row in enumerate(rows)]


def newest(rows, key):
    """Key -> its newest row."""
    found = {}
    for row in sorted(rows, key=lambda row: row["moment"]):
        found[key(row)] = row
    return found


def plain(row, columns):
    """A hashable row."""
    return tuple(tuple(row[name]) if isinstance(row[name], list) else row[name] for name in columns)


def latest(splits):
    return newest([row for row in splits["train"] if row["item"]], lambda row: row["item"])


def eligible(splits):
    """Scenario -> its items."""
    known, found = latest(splits), defaultdict(set)
    for row in [row for rows in splits.values() for row in rows]:
        if row["item"] in known:
            found[row["scenario"]].add(row["item"])
    return found


def bytes_of(folder) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    assert files
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def readable(folder) -> FeatureSchema:
    """The schema of rows that training can read, all of them checked."""
    schema = FeatureSchema.read(folder)
    source = ParquetSource(folder / ROWS, schema)
    for group in range(len(source.row_groups)):
        source.read(group)
    return schema


# Choices


@pytest.mark.parametrize(("shown", "uniform"), [(False, 0.0), (True, 0.0), (False, 1.5), (True, 0.3)])
def test_rows_of_choices(tmp_path, data, splits, shown, uniform):
    summary = write_choices(sides_of(data), tmp_path / "rows", shown_negatives=shown, uniform_negatives=uniform)
    schema = readable(tmp_path / "rows")
    assert [(label.name, label.weight, label.mask) for label in schema.labels] == [("click", "watch", None)]
    assert [numeric.name for numeric in schema.numerics] == ["age", "price", LOG_SHARE]
    found = choices.read(tmp_path / "rows" / ROWS)
    columns = (*USER, *ITEM, "scenario", "click", "watch")
    taken = [row for row in splits["train"] if row["item"] and (shown or row["click"])]
    rest = Counter(plain(row, columns) for row in found)
    rest.subtract(Counter(plain(row, columns) for row in taken))
    assert min(rest.values()) == 0

    chosen = Counter(row["scenario"] for row in taken if row["click"])
    drawn = [dict(zip(columns, row, strict=True)) for row in rest.elements()]
    offered, features = eligible(splits), latest(splits)
    wanted = {scenario: int(count * uniform + 0.5) for scenario, count in chosen.items() if uniform}
    assert Counter(row["scenario"] for row in drawn) == wanted
    for row in drawn:
        assert (row["click"], row["watch"]) == (0, 1.0)
        assert row["item"] in offered[row["scenario"]]
        assert plain(row, ITEM) == plain(features[row["item"]], ITEM)
    # Each choice's user is set against about as many items.
    users = Counter(plain(row, (*USER, "scenario")) for row in taken if row["click"])
    times = Counter(plain(row, (*USER, "scenario")) for row in drawn)
    assert all(int(uniform) * count <= times[user] <= int(uniform + 1) * count for user, count in users.items())
    if uniform > 1:
        # Evenly: of hundreds of draws hardly an item is left out.
        assert len({row["item"] for row in drawn if row["scenario"] == 0}) > 0.9 * len(offered[0])

    items = Counter((row["scenario"], row["item"]) for row in found)
    scenarios = Counter(row["scenario"] for row in found)
    shares = [np.log(items[row["scenario"], row["item"]] / scenarios[row["scenario"]]) for row in found]
    np.testing.assert_array_equal([row[LOG_SHARE] for row in found], np.array(shares, np.float32))
    assert summary == {
        "choices": {name: chosen[scenario] for scenario, name in enumerate(NAMES)},
        "shown": sum(not row["click"] for row in taken),
        "drawn": len(drawn),
    }
    assert read_summary(tmp_path / "rows") == summary
    # In no order that says anything.
    assert [row["scenario"] for row in found[:50]] != sorted(row["scenario"] for row in found[:50])


def test_choices_by_another_label_leave_out_what_is_unknown(tmp_path, data, splits):
    sides = sides_of(data, label="buy")
    write_choices(sides, tmp_path / "rows", shown_negatives=True, uniform_negatives=0)
    schema = readable(tmp_path / "rows")
    assert [(label.name, label.weight, label.mask) for label in schema.labels] == [("buy", None, None)]
    columns = (*USER, *ITEM, "scenario", "buy")
    expected = Counter(plain(row, columns) for row in splits["train"] if row["item"] and row["buy_known"])
    assert Counter(plain(row, columns) for row in choices.read(tmp_path / "rows" / ROWS)) == expected


# Pairs


def pairs_of(folder):
    """(kind, entity, scenarios) -> its two rows."""
    rows = choices.read(folder / ROWS)
    found = {}
    for first, second in zip(rows[0::2], rows[1::2], strict=True):
        kind = "user" if first["user_pair"] else "item"
        assert first["user_pair"] + first["item_pair"] == 1
        for name in ("user_pair", "item_pair", "user_pair_weight", "item_pair_weight", kind):
            assert first[name] == second[name]
        key = kind, first[kind], (first["scenario"], second["scenario"])
        assert key not in found
        found[key] = first, second
    return found


def views_of(splits, kind, space):
    """Entity -> scenario -> the row that its view there is made of."""
    rows = [row for row in splits["train"] if row[kind] and (row["click"] or space != "labelled")]
    found = defaultdict(dict)
    for (entity, scenario), row in newest(rows, lambda row: (row[kind], row["scenario"])).items():
        found[entity][scenario] = row
    if kind == "item" and space == "entire":
        for entity, row in latest(splits).items():
            found[entity] = {scenario: found[entity].get(scenario, row) for scenario in range(choices.TAUGHT)}
    return found, rows


@pytest.mark.parametrize("space", ["entire", "shown", "labelled"])
def test_all_pairs_where_they_are_few(tmp_path, data, splits, space):
    summary = write_pairs(sides_of(data), tmp_path / "rows", space, most=6, balance=0.3, items=True, users=True)
    schema = readable(tmp_path / "rows")
    assert [(label.name, label.weight) for label in schema.labels] == [
        ("user_pair", "user_pair_weight"),
        ("item_pair", "item_pair_weight"),
    ]
    found = pairs_of(tmp_path / "rows")
    columns = (*USER, *ITEM)
    for kind in ("user", "item"):
        views, rows = views_of(splits, kind, space)
        expected = {
            (kind, entity, pair): tuple(plain(seen[scenario], columns) for scenario in pair)
            for entity, seen in views.items()
            for pair in combinations(sorted(seen), 2)
        }
        mine = {key: tuple(plain(row, columns) for row in pair) for key, pair in found.items() if key[0] == kind}
        assert mine == expected
        often = Counter(pair for _, _, pair in expected)
        weights = {key: often[key[2]] ** (0.3 - 1) for key in expected}
        mean = sum(weights.values()) / len(weights)
        for key, weight in weights.items():
            assert found[key][0][f"{kind}_pair_weight"] == pytest.approx(weight / mean, rel=1e-6)
        paired = {entity for _, entity, _ in expected}
        assert summary[kind] == {
            "pairs": len(expected),
            "entities": len({row[kind] for row in rows}),
            "paired": len(paired),
            "rows": len(rows),
            "paired_rows": sum(row[kind] in paired for row in rows),
        }
    # Both kinds are mixed, and no pair is torn apart.
    kinds = [row["user_pair"] for row in choices.read(tmp_path / "rows" / ROWS)]
    assert 0 < sum(kinds[:60]) < 60
    for file in (tmp_path / "rows" / ROWS).iterdir():
        metadata = pq.read_metadata(file)
        assert all(metadata.row_group(group).num_rows % 2 == 0 for group in range(metadata.num_row_groups))


def test_some_pairs_are_drawn_where_there_are_many(tmp_path, data, splits):
    sides = sides_of(data)
    write_pairs(sides, tmp_path / "rows", "shown", most=2, balance=1.0, items=True, users=False)
    found = pairs_of(tmp_path / "rows")
    assert {kind for kind, _, _ in found} == {"item"}
    views, _ = views_of(splits, "item", "shown")
    possible = {entity: set(combinations(sorted(seen), 2)) for entity, seen in views.items() if len(seen) > 1}
    drawn = defaultdict(set)
    for _, entity, pair in found:
        drawn[entity].add(pair)
    assert drawn.keys() == possible.keys()
    for entity, pairs in drawn.items():
        assert pairs <= possible[entity]
        assert 1 <= len(pairs) <= 2 or len(possible[entity]) <= 2
        if len(possible[entity]) <= 2:
            assert pairs == possible[entity]
    # All that are possible are drawn by somebody, and a balance of 1 weighs nothing.
    assert set().union(*drawn.values()) == set().union(*possible.values())
    assert {row["item_pair_weight"] for pair in found.values() for row in pair} == {1.0}


def test_users_pairs_alone(tmp_path, data, splits):
    summary = write_pairs(sides_of(data), tmp_path / "rows", "entire", most=1, balance=0, items=False, users=True)
    assert list(summary) == ["user"]
    found = pairs_of(tmp_path / "rows")
    views, _ = views_of(splits, "user", "entire")
    assert sorted(entity for _, entity, _ in found) == sorted(e for e, seen in views.items() if len(seen) > 1)
    sums = defaultdict(float)
    for (_, _, pair), (row, _) in found.items():
        sums[pair] += row["user_pair_weight"]
    assert len(sums) > 3
    # A balance of 0 gives every pair of scenarios the same.
    assert list(sums.values()) == [pytest.approx(len(found) / len(sums))] * len(sums)


# Catalogue and queries


def test_catalogue(tmp_path, data, splits):
    summary = write_catalogue(sides_of(data), tmp_path / "rows")
    readable(tmp_path / "rows")
    offered, features = eligible(splits), latest(splits)
    columns = ("scenario", *USER, *ITEM)
    found = [plain(row, columns) for row in choices.read(tmp_path / "rows" / ROWS)]
    assert found == [
        (scenario, 0, (), (), 0.0, *plain(features[item], ITEM))
        for scenario in range(5)
        for item in sorted(offered[scenario])
    ]
    assert summary == {"items": {name: len(offered[scenario]) for scenario, name in enumerate(NAMES)}}
    assert choices.NEVER_ITEM not in features
    assert 0 < len(offered[3]) < len(offered[0])


def expected_queries(splits, split, label="click"):
    """(scenario, user) -> the row that asks, its answers and what is excluded; and the summary."""

    def chooses(row):
        return row[label] and (label == "click" or row["buy_known"])

    before = {"valid": ["train"], "test": ["train", "valid"]}[split]
    had = {(row["user"], row["item"]) for name in before for row in splits[name] if chooses(row)}
    had = {(user, item) for user, item in had if user and item}
    known, asked = latest(splits), [row for row in splits[split] if chooses(row)]
    found = defaultdict(list)
    for row in asked:
        if row["user"] and row["item"] in known and (row["user"], row["item"]) not in had:
            found[row["scenario"], row["user"]].append(row)
    queries = {
        key: (
            min(rows, key=lambda row: row["moment"]),
            sorted({row["item"] for row in rows}),
            sorted(item for user, item in had if user == key[1]),
        )
        for key, rows in sorted(found.items())
    }
    summary = {
        "queries": len(queries),
        "answers": sum(len(truth) for _, truth, _ in queries.values()),
        "choices": len(asked),
        "of_unknown_users": sum(not row["user"] for row in asked),
        "of_unknown_items": sum(row["user"] != 0 and row["item"] not in known for row in asked),
        "repeated": sum((row["user"], row["item"]) in had and row["item"] in known for row in asked),
    }
    return queries, summary


@pytest.mark.parametrize(("split", "label"), [("valid", "click"), ("test", "click"), ("test", "buy")])
def test_queries(tmp_path, data, splits, split, label):
    summary = write_queries(sides_of(data, label=label), tmp_path / "rows", split)
    readable(tmp_path / "rows")
    expected, told = expected_queries(splits, split, label)
    columns = ("scenario", *USER, *ITEM)
    found = [plain(row, columns) for row in choices.read(tmp_path / "rows" / ROWS)]
    assert found == [(key[0], *plain(row, USER), 0, 0, 0.0) for key, (row, _, _) in expected.items()]
    answers = pq.read_table(tmp_path / "rows" / ANSWERS_FILE).to_pylist()
    assert answers == [
        {"scenario": scenario, "user": user, "truth": truth, "consumed": had}
        for (scenario, user), (_, truth, had) in expected.items()
    ]
    assert summary == told
    assert min(summary.values()) > 0 or label == "buy"
    assert any(len(row["truth"]) > 1 for row in answers)
    assert {row["scenario"] for row in answers} >= ({4} if label == "buy" else set(range(5)))


def test_one_question(tmp_path, data, splits):
    user = next(row["user"] for row in splits["train"] if row["user"])
    mine = [row for row in splits["train"] if row["user"] == user]
    had = sorted({row["item"] for row in mine if row["click"] and row["item"]})
    for scenario in range(5):
        write_question(sides_of(data), tmp_path / str(scenario), user, scenario)
        readable(tmp_path / str(scenario))
        (row,) = choices.read(tmp_path / str(scenario) / ROWS)
        # The newest row of that scenario, where there is one.
        newest_row = max(mine, key=lambda row: (row["scenario"] == scenario, row["moment"]))
        assert plain(row, ("scenario", *USER, *ITEM)) == (scenario, *plain(newest_row, USER), 0, 0, 0.0)
        (answer,) = pq.read_table(tmp_path / str(scenario) / ANSWERS_FILE).to_pylist()
        assert answer == {"scenario": scenario, "user": user, "truth": [], "consumed": had}
    with pytest.raises(ValueError, match=f"no row of the user in row {choices.USERS} of the vocabulary"):
        write_question(sides_of(data), tmp_path / "nobody", choices.USERS, 0)


# All of them


WRITERS = {
    "choices": lambda sides, out: write_choices(sides, out, shown_negatives=True, uniform_negatives=0.5),
    "pairs": lambda sides, out: write_pairs(sides, out, "entire", most=2, balance=0.5, items=True, users=True),
    "catalogue": write_catalogue,
    "queries": lambda sides, out: write_queries(sides, out, "test"),
}


@pytest.mark.parametrize("what", WRITERS)
def test_equal_seeds_give_equal_bytes(tmp_path, data, what):
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        WRITERS[what](sides_of(data, seed=seed), tmp_path / name)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "again")
    # Only what is drawn depends on the seed.
    assert (bytes_of(tmp_path / "one" / ROWS) != bytes_of(tmp_path / "other" / ROWS)) == (what in ("choices", "pairs"))
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_whole_is_left_alone_and_what_is_not_is_made_again(tmp_path, data):
    out = tmp_path / "rows"
    summary = write_catalogue(sides_of(data), out)
    whole = bytes_of(out)
    times = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert write_catalogue(sides_of(data), out) == summary
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == times

    (out / derived.SUMMARY_FILE).unlink()
    next((out / ROWS).iterdir()).write_bytes(b"half")
    out.rename(tmp_path / "rows.partial")
    assert write_catalogue(sides_of(data), out) == summary
    assert bytes_of(out) == whole
    assert not (tmp_path / "rows.partial").exists()

    (out / derived.SUMMARY_FILE).unlink()
    (out / "rows" / "part-00009.parquet").write_bytes(b"half")
    assert write_catalogue(sides_of(data), out) == summary
    assert bytes_of(out) == whole


def rewrite(data, folder, change, splits=("train", "valid", "test")):
    """The same data after `change` of each split's table."""
    shutil.copytree(data, folder)
    for split in splits:
        for file in (folder / split).iterdir():
            pq.write_table(change(pq.read_table(file)), file, row_group_size=100)
    return folder


def replaced(table, column, values):
    place = table.column_names.index(column)
    return table.set_column(place, column, pa.array(values, table.schema.field(column).type))


def test_data_without_time_have_the_order_of_their_files(tmp_path, data, splits):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    FeatureSchema.read(data).model_copy(update={"time": None}).save(folder)
    unordered = {split: [row | {"moment": place} for place, row in enumerate(rows)] for split, rows in splits.items()}
    write_catalogue(sides_of(folder), tmp_path / "catalogue")
    features = latest(unordered)
    for row in choices.read(tmp_path / "catalogue" / ROWS):
        assert plain(row, ITEM) == plain(features[row["item"]], ITEM)
    write_queries(sides_of(folder), tmp_path / "queries", "test")
    expected, _ = expected_queries(unordered, "test")
    found = choices.read(tmp_path / "queries" / ROWS)
    assert [plain(row, USER) for row in found] == [plain(row, USER) for row, _, _ in expected.values()]


def test_columns_may_have_any_names(tmp_path, data):
    """Also those that the making of rows uses itself."""
    names = {"age": "moment", "place": "chosen", "likes": "user_row", "history": "scenario_id", "price": "item_row"}
    names |= {"user": "entity", "item": "Truth", "watch": "weight", "click": "kind", "scenario": "Place"}

    def renamed(what):
        """`what` with all names of columns, which stand under these keys, replaced."""
        if isinstance(what, dict):
            keys = ("name", "mask", "weight", "user", "item", "scenario")
            return {
                key: names.get(x, x) if key in keys and isinstance(x, str) else renamed(x) for key, x in what.items()
            }
        return [renamed(each) for each in what] if isinstance(what, list) else what

    folder = rewrite(
        data, tmp_path / "data", lambda table: table.rename_columns([names.get(n, n) for n in table.column_names])
    )
    FeatureSchema.model_validate(renamed(FeatureSchema.read(data).model_dump(mode="json"))).save(folder)
    for what, write in WRITERS.items():
        write(sides_of(data), tmp_path / "plain" / what)
        write(sides_of(folder), tmp_path / "renamed" / what)
        expected = [
            {names.get(name, name): value for name, value in row.items()}
            for row in choices.read(tmp_path / "plain" / what / ROWS)
        ]
        assert choices.read(tmp_path / "renamed" / what / ROWS) == expected


def test_what_is_not_there_is_said(tmp_path, data):
    out = tmp_path / "rows"
    with pytest.raises(ValueError, match=r"there is no label 'like'; .* has click, buy"):
        write_choices(sides_of(data, label="like"), out, shown_negatives=False, uniform_negatives=0)
    with pytest.raises(ValueError, match=r"/dev: no parquet files there; prepare the data with that split"):
        write_queries(sides_of(data), out, "dev")
    never = rewrite(data, tmp_path / "never", lambda table: replaced(table, "click", [0] * len(table)))
    with pytest.raises(ValueError, match=r"/train: no row has click = 1 and a known item: there is nothing to retr"):
        write_choices(sides_of(never), out, shown_negatives=True, uniform_negatives=0)
    with pytest.raises(ValueError, match=r"/valid: no known user chose anything new that training knows"):
        write_queries(sides_of(never), out, "valid")
    with pytest.raises(ValueError, match=r"nobody was seen in two scenarios, .* \(space 'labelled'\)"):
        write_pairs(sides_of(never), out, "labelled", most=4, balance=0.5, items=True, users=True)
    alone = rewrite(data, tmp_path / "alone", lambda table: replaced(table, "scenario", [1] * len(table)), ("train",))
    with pytest.raises(ValueError, match=r"set space='entire' and sides='both'"):
        write_pairs(sides_of(alone), out, "shown", most=4, balance=0.5, items=True, users=True)
    assert not out.exists()
    # What failed is no obstacle to what comes next.
    write_queries(sides_of(data), out, "valid")


def test_no_choice_may_be_asked_of_what_was_trained_on(tmp_path, data):
    with pytest.raises(ValueError, match=r"'train'.*choose valid or test"):
        write_queries(sides_of(data), tmp_path / "rows", "train")


def test_rows_of_other_data_or_settings_are_made_anew(tmp_path, data):
    out, copied = tmp_path / "rows", shutil.copytree(data, tmp_path / "data")
    first = write_choices(sides_of(copied), out, shown_negatives=False, uniform_negatives=0.0)
    more = write_choices(sides_of(copied), out, shown_negatives=True, uniform_negatives=0.0)
    assert more["shown"] > first["shown"] == 0
    # The training rows have become fewer.
    lost = sorted((copied / "train").glob("*.parquet"))[0]
    lost.unlink()
    less = write_choices(sides_of(copied), out, shown_negatives=True, uniform_negatives=0.0)
    assert sum(less["choices"].values()) < sum(more["choices"].values())
    # Where data and rows lie is no matter.
    marker = (out / "summary.json").stat().st_mtime_ns
    moved = copied.rename(tmp_path / "moved")
    assert write_choices(sides_of(moved), out, shown_negatives=True, uniform_negatives=0.0) == less
    assert (out / "summary.json").stat().st_mtime_ns == marker


def test_one_process_writes_and_the_others_wait(tmp_path, data):
    out = tmp_path / "rows"
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(write_catalogue, sides_of(data, writes=False), out)
        time.sleep(0.3)
        assert not waiting.done()
        assert not out.exists()
        summary = write_catalogue(sides_of(data), out)
        assert waiting.result(timeout=20) == summary


def test_a_database_without_memory_is_one_line(tmp_path, data):
    with pytest.raises(ValueError, match=r"rows: the database failed \(.*loader\.memory_limit too small\?$"):
        write_choices(sides_of(data, memory_limit="1MB"), tmp_path / "rows", False, 0.0)
    assert not (tmp_path / "rows").exists()
