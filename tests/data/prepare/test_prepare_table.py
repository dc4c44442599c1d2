import datetime
import errno
import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msr_dist.config import parse
from msr_dist.data.prepare import canonical
from msr_dist.data.prepare.canonical import prepare
from msr_dist.data.prepare.mapping import ScenarioValue, Split
from msr_dist.data.prepare.report import PrepareReport
from msr_dist.data.prepare.table import Config
from msr_dist.schema import SPLITS, FeatureSchema

ROWS = 4000


def log(rows: int = ROWS, seed: int = 0) -> dict[str, object]:
    rng = np.random.default_rng(seed)
    return {
        "user": rng.integers(0, 80, rows),
        "item": [f"i{n}" for n in rng.integers(0, 50, rows)],
        "page": rng.choice(["a", "b", "c"], rows, p=[0.6, 0.3, 0.1]),
        # Many equal moments: 4000 rows over 900 of them, not in order.
        "when": rng.integers(1000, 1900, rows),
        "click": rng.random(rows) < 0.4,
        "rating": rng.integers(1, 6, rows).astype(float),
        "rated": rng.random(rows) < 0.5,
        "stake": rng.random(rows),
        "hour": rng.integers(0, 24, rows),
        "price": rng.normal(5, 2, rows),
    }


COLUMNS: dict[str, object] = {
    "user": "user",
    "item": "item",
    "scenario": "page",
    "time": "when",
    "labels": [
        {"name": "click"},
        {"name": "like", "column": "rating", "above": 3, "mask": "rated", "weight": "stake"},
    ],
    "ids": [{"name": "hour"}],
    "numerics": [{"name": "price"}],
}


def write(folder: Path, columns: dict[str, object], name: str = "log.parquet") -> str:
    pq.write_table(pa.table(columns), folder / name, row_group_size=1000)
    return str(folder / name)


def run(folder: Path, files: object, columns: dict[str, object] | None = None, **settings: object) -> PrepareReport:
    listed = files if isinstance(files, list) else [files]
    raw = {"kind": "table", "interactions": listed, "columns": COLUMNS | (columns or {}), **settings}
    return prepare(parse(Config, raw, "test"), folder / "out")


def read(out: Path, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in sorted((out / split).glob("*.parquet")))


def vocabulary(out: Path, table: str) -> dict[object, int]:
    listed = pq.read_table(out / "vocabulary" / f"{table}.parquet").to_pydict()
    return dict(zip(listed["id"], listed["row"], strict=True))


def refused(folder: Path, files: object, *words: str, **more: object) -> str:
    with pytest.raises(ValueError, match=r"\S") as error:
        run(folder, files, **more)  # type: ignore[arg-type]
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not (folder / "out").exists()
    assert not list(folder.glob(".*preparing*"))
    return message


def test_types_and_columns_are_those_of_the_schema(tmp_path: Path) -> None:
    report = run(tmp_path, write(tmp_path, log()), history={"length": 3})
    schema = FeatureSchema.read(tmp_path / "out")
    table = read(tmp_path / "out", "train")
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    assert types == {
        "user": "int64",
        "item": "int64",
        "hour": "int64",
        "history": "list<element: int64 not null>",
        "price": "float",
        "click": "uint8",
        "like": "uint8",
        "rated": "bool",
        "stake": "float",
        "scenario": "int32",
        "time": "int64",
    }
    assert set(schema.columns()) <= set(table.column_names)
    assert schema.time == "time"
    assert [scenario.name for scenario in schema.scenarios] == ["a", "b", "c"]
    assert schema.table("user").rows == report.tables["user"] == report.users + 1
    assert sum(report.rows.values()) == ROWS
    assert all(table[column].null_count == 0 for column in table.column_names)


def test_time_split_keeps_moments_together_and_meets_the_shares(tmp_path: Path) -> None:
    report = run(tmp_path, write(tmp_path, log()))
    for scenario in range(3):
        times = []
        for split in SPLITS:
            table = read(tmp_path / "out", split)
            times.append(table["time"].to_numpy()[table["scenario"].to_numpy() == scenario])
        assert times[0].max() < times[1].min()
        assert times[1].max() < times[2].min()
        total = sum(map(len, times))
        assert abs(len(times[0]) / total - 0.8) < 0.02
        assert abs(len(times[1]) / total - 0.1) < 0.02
    for split in SPLITS:
        assert (np.diff(read(tmp_path / "out", split)["time"].to_numpy()) >= 0).all()
    assert report.rows["train"] == read(tmp_path / "out", "train").num_rows


def test_global_cutoff_is_one_moment_for_all(tmp_path: Path) -> None:
    raw = log()
    raw["when"] = np.asarray(raw["when"]) + 100 * (np.asarray(raw["page"]) == "b")
    run(tmp_path, write(tmp_path, raw), split={"kind": "time", "cutoff": "global"})
    times = [read(tmp_path / "out", split)["time"].to_numpy() for split in SPLITS]
    assert times[0].max() < times[1].min()
    assert times[1].max() < times[2].min()


def test_vocabulary_and_statistics_come_from_training_rows_alone(tmp_path: Path) -> None:
    raw = log()
    late = np.asarray(raw["when"]) > 1890
    raw["user"] = np.where(late, 999, raw["user"])
    raw["price"] = np.where(late, 1e6, raw["price"])
    report = run(tmp_path, write(tmp_path, raw))
    known, train, test = vocabulary(tmp_path / "out", "user"), *(read(tmp_path / "out", s) for s in ("train", "test"))
    assert 999 not in known
    assert (test["user"].to_numpy()[test["time"].to_numpy() > 1890] == 0).all()
    assert train["user"].to_numpy().min() == 1
    assert train["price"].to_numpy().mean() == pytest.approx(0, abs=1e-4)
    assert train["price"].to_numpy().std() == pytest.approx(1, abs=1e-4)
    assert any("test: rows on the reserved row 0" in warning for warning in report.warnings)


def test_vocabulary_is_by_count_then_id(tmp_path: Path) -> None:
    run(tmp_path, write(tmp_path, log()))
    listed = pq.read_table(tmp_path / "out" / "vocabulary" / "item.parquet").to_pydict()
    pairs = list(zip(listed["count"], listed["id"], strict=True))
    assert pairs == sorted(pairs, key=lambda pair: (-pair[0], pair[1]))
    assert listed["row"] == list(range(1, len(pairs) + 1))


def test_rare_ids_share_row_0(tmp_path: Path) -> None:
    raw = log()
    raw["item"] = ["rare", *raw["item"][1:]]  # type: ignore[index]
    run(tmp_path, write(tmp_path, raw), min_count=2)
    assert "rare" not in vocabulary(tmp_path / "out", "item")


@pytest.mark.parametrize("split", [{}, {"cutoff": "global"}, {"kind": "random"}, {"kind": "column", "column": "part"}])
def test_history_is_what_a_plain_loop_finds(tmp_path: Path, split: dict[str, object]) -> None:
    raw = log(1500) | {"id": np.arange(1500), "part": np.resize(["train", "train", "valid", "test"], 1500)}
    # Cuts in time far apart: what scenario a has in its test split is earlier than most training rows of b.
    raw["when"] = np.asarray(raw["when"]) + 700 * (np.asarray(raw["page"]) == "b")
    # The weight tells which raw row it is, in every split.
    columns: dict[str, object] = {"numerics": [], "ids": [], "labels": [{"name": "click", "weight": "id"}]}
    run(tmp_path, write(tmp_path, raw), columns, history={"length": 4}, split=split)
    out = tmp_path / "out"
    items = vocabulary(out, "item")
    tables = [read(out, name).to_pydict() for name in SPLITS]
    numbers = [set(map(int, table["id"])) for table in tables]
    by_time = split.get("kind", "time") == "time"
    for place, table in enumerate(tables):
        allowed = set().union(*numbers[: place + 1 if by_time else 1])
        assert any(table["history"])
        for number, time, history in zip(table["id"], table["time"], table["history"], strict=True):
            who = raw["user"][int(number)]  # type: ignore[index]
            assert history == plain_history(raw, items, allowed, who, time)


def plain_history(
    raw: dict[str, object], items: dict[object, int], allowed: set[int], user: object, time: int
) -> list[int]:
    rows = zip(raw["when"], raw["id"], raw["user"], raw["item"], raw["click"], strict=True)  # type: ignore[call-overload]
    before = [
        (when, number, item)
        for when, number, who, item, click in rows
        if who == user and click and when < time and item in items and number in allowed
    ]
    return [items[item] for _, _, item in sorted(before, reverse=True)[:4]]


def test_no_training_history_shows_another_scenarios_test_label(tmp_path: Path) -> None:
    # Scenario a runs from 0 to 99, b from 1000 to 1099, with one user. Training rows hold every item, a's or b's.
    raw = {
        "user": np.zeros(200, np.int64),
        "item": np.concatenate([np.arange(100), np.arange(100)[::-1]]),
        "page": np.repeat(["a", "b"], 100),
        "when": np.concatenate([np.arange(100), 1000 + np.arange(100)]),
        "click": np.repeat([True, False], 100),
    }
    columns = {"labels": [{"name": "click"}], "ids": [], "numerics": []}
    run(tmp_path, write(tmp_path, raw), columns, history={"length": 200})
    raw_item = {row: item for item, row in vocabulary(tmp_path / "out", "item").items()}
    for split, seen in zip(SPLITS, (80, 90, 100), strict=True):
        table = read(tmp_path / "out", split).to_pydict()
        of_b = [h for h, scenario in zip(table["history"], table["scenario"], strict=True) if scenario == 1]
        assert of_b
        assert all([raw_item[row] for row in history] == list(reversed(range(seen))) for history in of_b)


def test_random_split_history_uses_no_test_rows(tmp_path: Path) -> None:
    raw = log(2000) | {"item": [f"i{n}" for n in range(2000)]}
    run(tmp_path, write(tmp_path, raw), history={"length": 1000}, split={"kind": "random"})
    train = read(tmp_path / "out", "train").to_pydict()
    positive = {item for item, click in zip(train["item"], train["click"], strict=True) if click}
    for split in SPLITS:
        used = {item for history in read(tmp_path / "out", split).to_pydict()["history"] for item in history}
        assert used <= positive


def test_side_features_lists_and_texts(tmp_path: Path) -> None:
    items = [f"i{n}" for n in range(45)]
    genres = ["x|y" if n % 2 else "z" for n in range(45)]
    side = {"key": items, "genres": genres, "weight": [float(n) for n in range(45)], "title": ["t"] * 44 + [None]}
    report = run(
        tmp_path,
        write(tmp_path, log()),
        {
            "items_key": "key",
            "item_text": ["title"],
            "lists": [{"name": "genres", "source": "items", "separator": "|", "pooling": "sum"}],
            "numerics": [{"name": "weight", "source": "items"}],
        },
        items=[write(tmp_path, side, "items.parquet")],
    )
    out = tmp_path / "out"
    words, ids = {row: word for word, row in vocabulary(out, "genres").items()}, vocabulary(out, "item")
    raw_id = {row: word for word, row in ids.items()}
    table = read(out, "train").to_pydict()
    for item, genre in zip(table["item"], table["genres"], strict=True):
        number = int(str(raw_id[item])[1:])
        assert [words[row] for row in genre] == (genres[number].split("|") if number < 45 else [])
    texts = pq.read_table(out / "items.parquet").to_pydict()
    assert texts["row"] == list(range(1, len(ids) + 1))
    assert set(texts["title"]) == {"t", ""}
    assert any("not in the files" in warning for warning in report.warnings)
    assert any("no text in title" in warning for warning in report.warnings)
    schema = FeatureSchema.read(out)
    assert [(f.name, f.group, f.pooling) for f in schema.features if f.name == "genres"] == [("genres", "item", "sum")]


def test_nulls_become_the_mean_or_row_0_and_are_reported(tmp_path: Path) -> None:
    raw = log()
    raw["price"] = pa.array(raw["price"], mask=np.arange(ROWS) % 4 == 0)
    raw["hour"] = pa.array(raw["hour"], mask=np.arange(ROWS) % 5 == 0)
    report = run(tmp_path, write(tmp_path, raw))
    table = read(tmp_path / "out", "train")
    assert (table["price"].to_numpy() == 0).mean() == pytest.approx(0.25, abs=0.03)
    assert (table["hour"].to_numpy() == 0).mean() == pytest.approx(0.2, abs=0.03)
    assert "price: null in 1,000 rows, the training mean instead" in report.warnings
    assert "hour: null in 800 rows, row 0 instead" in report.warnings


def test_list_columns_of_the_log_and_shared_tables(tmp_path: Path) -> None:
    raw = log() | {"seen": [[f"i{n % 50}", f"i{n % 7}"] if n % 3 else [] for n in range(ROWS)]}
    run(tmp_path, write(tmp_path, raw), {"lists": [{"name": "seen", "table": "item", "group": "user"}]})
    items = vocabulary(tmp_path / "out", "item")
    known = sorted(map(tuple, raw["seen"]))  # type: ignore[arg-type]
    back = {row: item for item, row in items.items()}
    found = sorted(
        tuple(back[row] for row in seen)
        for split in SPLITS
        for seen in read(tmp_path / "out", split).to_pydict()["seen"]
    )
    assert found == known


def test_equal_input_gives_equal_bytes_at_any_number_of_threads(tmp_path: Path) -> None:
    files = [write(tmp_path, log(seed=seed), f"log-{seed}.parquet") for seed in range(3)]
    written = []
    for threads in (1, 2, 4):
        run(tmp_path, files, history={"length": 5}, threads=threads, overwrite=True, memory_limit="500MB")
        out = tmp_path / "out"
        written.append({f.relative_to(out): f.read_bytes() for f in sorted(out.rglob("*.parquet"))})
        written[-1][Path("schema")] = (out / "schema.toml").read_bytes()
    assert written[0] == written[1] == written[2]


def test_csv_gives_the_same_as_parquet(tmp_path: Path) -> None:
    import pyarrow.csv as pc

    table = pa.table(log())
    for half in (0, 1):
        pc.write_csv(table.slice(half * 2000, 2000), tmp_path / f"log-{half}.csv")
    run(tmp_path, write(tmp_path, log()))
    (tmp_path / "out").rename(tmp_path / "first")
    run(tmp_path, [str(tmp_path / "log-*.csv")])
    for split in SPLITS:
        assert read(tmp_path / "out", split).equals(read(tmp_path / "first", split))


def test_row_groups_are_many_and_even_and_files_bounded(tmp_path: Path) -> None:
    run(tmp_path, write(tmp_path, log()), rows_per_file=1000)
    for split in SPLITS:
        files = sorted((tmp_path / "out" / split).glob("*.parquet"))
        footers = [pq.read_metadata(file) for file in files]
        sizes = [m.row_group(g).num_rows for m in footers for g in range(m.num_row_groups)]
        assert len(sizes) == 96
        assert max(sizes) - min(sizes) <= 1
        assert all(footer.num_rows <= 1100 for footer in footers)
    assert len(list((tmp_path / "out" / "train").glob("*"))) == 4


def test_timestamps_and_milliseconds_become_seconds(tmp_path: Path) -> None:
    raw = log()
    seconds = np.asarray(raw["when"])
    raw["moment"] = [datetime.datetime.fromtimestamp(int(s), datetime.UTC).replace(tzinfo=None) for s in seconds]
    raw["ms"] = seconds * 1000 + 7
    run(tmp_path, write(tmp_path, raw), {"time": "moment"})
    first = read(tmp_path / "out", "test")
    run(tmp_path, write(tmp_path, raw), {"time": "ms", "time_unit": "ms"}, overwrite=True)
    assert first["time"].equals(read(tmp_path / "out", "test")["time"])


def test_split_by_a_column(tmp_path: Path) -> None:
    raw = log() | {"part": np.resize(["train", "train", "valid", "test"], ROWS)}
    report = run(tmp_path, write(tmp_path, raw), split={"kind": "column", "column": "part"})
    assert report.rows == {"train": 2000, "valid": 1000, "test": 1000}
    raw["part"] = ["dev", *raw["part"][1:]]
    out = tmp_path / "other"
    out.mkdir()
    refused(out, write(out, raw), "'dev'", "split.column", split={"kind": "column", "column": "part"})


def test_random_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    tables = []
    for seed in (0, 0, 1):
        report = run(tmp_path, write(tmp_path, log()), split={"kind": "random", "seed": seed}, overwrite=True)
        tables.append(read(tmp_path / "out", "test"))
        assert report.rows["train"] == pytest.approx(0.8 * ROWS, rel=0.05)
    assert tables[0].equals(tables[1])
    assert not tables[0].equals(tables[2])


def test_scenarios_file_gives_order_names_and_texts(tmp_path: Path) -> None:
    (tmp_path / "scenarios.csv").write_text("code,name,about\nc,Cart,The cart.\nz,Zoo,\nb,Bar,A bar.\na,Air,\n")
    report = run(
        tmp_path,
        write(tmp_path, log()),
        {"scenario_key": "code", "scenario_text": "about"},
        scenarios=[str(tmp_path / "scenarios.csv")],
    )
    scenarios = FeatureSchema.read(tmp_path / "out").scenarios
    assert [(s.name, s.text) for s in scenarios] == [("Cart", "The cart."), ("Zoo", ""), ("Bar", "A bar."), ("Air", "")]
    assert "train: no rows of scenario Zoo" in report.warnings
    assert any("Zoo" in line for line in report.lines())


def test_report_says_rows_and_rates(tmp_path: Path) -> None:
    report = run(tmp_path, write(tmp_path, log()))
    for each in report.scenarios:
        table = read(tmp_path / "out", each.split)
        rows = table["scenario"].to_numpy() == "abc".index(each.scenario)
        rated = rows & table["rated"].to_numpy()
        assert each.rows == rows.sum()
        assert each.positives["click"] == pytest.approx(table["click"].to_numpy()[rows].mean())
        assert each.positives["like"] == pytest.approx(table["like"].to_numpy()[rated].mean())


def test_missing_column_names_the_nearest(tmp_path: Path) -> None:
    refused(tmp_path, write(tmp_path, log()), "log.parquet", "'usr'", "columns.user", "'user'", columns={"user": "usr"})


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("user", -4, ("row 1234, row group 1", "a negative id (columns.user)", "-4")),
        ("item", None, ("row 1234, row group 1", "a null id (columns.item)")),
        ("page", None, ("an unknown scenario",)),
        ("when", None, ("a null time (columns.time)",)),
        ("stake", -0.5, ("weight", "columns.labels.1.weight")),
        ("price", float("inf"), ("infinite", "columns.numerics.0")),
        ("rated", None, ("a null mask",)),
    ],
)
def test_bad_values_are_counted_and_located(tmp_path: Path, column: str, value: object, words: tuple[str, ...]) -> None:
    raw = log()
    listed = pa.array(raw[column]).to_pylist()
    listed[1234] = listed[3000] = value
    refused(tmp_path, write(tmp_path, raw | {column: pa.array(listed)}), "1 more rows", f"column {column!r}", *words)


def test_the_first_offending_row_is_found_among_files(tmp_path: Path) -> None:
    bad = log(seed=1)
    bad["user"] = np.where(np.arange(ROWS) == 77, -1, bad["user"])  # type: ignore[call-overload]
    files = [write(tmp_path, log(), "log-0.parquet"), write(tmp_path, bad, "log-1.parquet")]
    refused(tmp_path, files, "log-1.parquet, row 77, row group 0")


def test_label_outside_0_and_1(tmp_path: Path) -> None:
    message = refused(
        tmp_path, write(tmp_path, log()), "label outside {0, 1}", columns={"labels": [{"name": "rating"}]}
    )
    assert "above" in message


def test_a_label_that_is_not_a_number_is_not_above(tmp_path: Path) -> None:
    raw = log() | {"rating": np.where(np.arange(ROWS) == 9, np.nan, 4.0), "rated": np.full(ROWS, True)}
    refused(tmp_path, write(tmp_path, raw), "row 9", "label outside {0, 1} (columns.labels.1)", "0 more rows")


def test_masked_labels_may_be_null(tmp_path: Path) -> None:
    raw = log()
    raw["rating"] = pa.array(raw["rating"], mask=~np.asarray(raw["rated"]))
    assert sum(run(tmp_path, write(tmp_path, raw)).rows.values()) == ROWS


def test_unknown_scenario(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("scenario_id,name\na,A\nb,B\n")
    refused(
        tmp_path,
        write(tmp_path, log()),
        "unknown scenario",
        "'c'",
        "name it in the scenarios files",
        scenarios=[str(tmp_path / "s.csv")],
    )


@pytest.mark.parametrize("name", ["log.parquet", "log.csv"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    refused(tmp_path, str(tmp_path / name), name, "empty")


def test_file_without_rows(tmp_path: Path) -> None:
    write(tmp_path, {name: pa.array(values)[:0] for name, values in log(5).items()})
    refused(tmp_path, str(tmp_path / "log.parquet"), "no rows")


def test_truncated_parquet(tmp_path: Path) -> None:
    file = Path(write(tmp_path, log()))
    file.write_bytes(file.read_bytes()[:-100])
    refused(tmp_path, str(file), "log.parquet", "not a complete parquet file")


def test_damaged_row_group_is_named(tmp_path: Path) -> None:
    file = Path(write(tmp_path, log()))
    begin = pq.read_metadata(file).row_group(2).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    content[begin : begin + 400] = b"\xff" * 400
    file.write_bytes(content)
    refused(tmp_path, str(file), "log.parquet, row group 2", "cannot be read")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"user": "price"}, ("DOUBLE", "columns.user", "integers or text")),
        ({"time": "page"}, ("VARCHAR", "columns.time")),
        ({"scenario": "price"}, ("DOUBLE", "columns.scenario")),
        ({"labels": [{"name": "page"}]}, ("VARCHAR", "columns.labels.0")),
        ({"numerics": [{"name": "page"}]}, ("VARCHAR", "columns.numerics.0")),
        ({"lists": [{"name": "page"}]}, ("VARCHAR", "columns.lists.0", "separator")),
        ({"lists": [{"name": "user", "separator": "|"}]}, ("columns.lists.0", "text")),
        ({"ids": [{"name": "hour", "source": "users"}]}, ("columns.ids.0", "no users files")),
        ({"item_text": ["title"]}, ("columns.item_text",)),
        ({"ids": [{"name": "click"}]}, ("'click'", "two columns")),
        ({"ids": [{"name": "time", "column": "hour"}]}, ("'time'", "taken")),
    ],
)
def test_wrong_types(tmp_path: Path, columns: dict[str, object], words: tuple[str, ...]) -> None:
    refused(tmp_path, write(tmp_path, log()), *words, columns=columns)


def test_wrong_value_in_a_csv(tmp_path: Path) -> None:
    rows = [f"{n},{n},a,{n},{n % 2}" for n in range(40_000)]
    rows[30_000] = "x,1,a,30000,1"
    (tmp_path / "log.csv").write_text("\n".join(["user,item,page,when,click", *rows]))
    columns = {"labels": [{"name": "click"}], "ids": [], "numerics": []}
    refused(tmp_path, str(tmp_path / "log.csv"), "30002", '"user"', columns=columns)


def test_no_rows_left_in_a_split(tmp_path: Path) -> None:
    raw = log() | {"when": np.full(ROWS, 5)}
    refused(tmp_path, write(tmp_path, raw), "no rows left in the valid split", "split.fractions")


def test_an_item_listed_twice(tmp_path: Path) -> None:
    items = [write(tmp_path, {"item": ["i1", "i2", "i1"]}, "items.parquet")]
    refused(tmp_path, write(tmp_path, log()), "items.parquet, row 2", "'i1'", "second time", items=items)


def test_no_file_and_unknown_format(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path / "none-*.parquet"), "interactions", "no file matches")
    (tmp_path / "log.json").write_text("{}")
    refused(tmp_path, str(tmp_path / "log.json"), ".json", "parquet")


def test_split_by_time_needs_a_time(tmp_path: Path) -> None:
    columns = {name: value for name, value in COLUMNS.items() if name != "time"}
    raw = {"kind": "table", "interactions": [write(tmp_path, log())], "columns": columns}
    with pytest.raises(ValueError, match=r"columns\.time"):
        prepare(parse(Config, raw, "test"), tmp_path / "out")
    report = prepare(parse(Config, raw | {"split": {"kind": "random"}}, "test"), tmp_path / "out")
    assert sum(report.rows.values()) == ROWS
    assert FeatureSchema.read(tmp_path / "out").time is None


def test_nothing_written_before_is_harmed(tmp_path: Path) -> None:
    file = write(tmp_path, log())
    run(tmp_path, file)
    before = (tmp_path / "out" / "schema.toml").read_bytes()
    with pytest.raises(ValueError, match="overwrite"):
        run(tmp_path, file)
    with pytest.raises(ValueError, match="label outside"):
        run(tmp_path, file, {"labels": [{"name": "rating"}]}, overwrite=True)
    assert (tmp_path / "out" / "schema.toml").read_bytes() == before
    run(tmp_path, file, width=32, overwrite=True)
    assert FeatureSchema.read(tmp_path / "out").table("user").width == 32
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log.parquet", "out"]


def test_overwrite_replaces_prepared_data_only(tmp_path: Path) -> None:
    file = write(tmp_path, log())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for overwrite in (True, False):
        with pytest.raises(ValueError, match=r"out: .*schema\.toml"):
            run(tmp_path, file, overwrite=overwrite)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log.parquet", "out"]


def one_line(folder: Path, out: Path, **settings: object) -> str:
    raw = {"kind": "table", "interactions": [write(folder, log())], "columns": COLUMNS, **settings}
    with pytest.raises(ValueError, match=r"\S") as error:
        prepare(parse(Config, raw, "test"), out)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "out", Path("/proc/msr-dist-out"), tmp_path / ("n" * 300)):
        message = one_line(tmp_path, out)
        assert message.startswith(f"{out}: cannot be written")
        assert "another folder" in message


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(canonical, "write_split", full)
    message = one_line(tmp_path, tmp_path / "out")
    assert (
        message == f"{tmp_path / 'out'}: cannot be written (No space left on device); make room, or give another folder"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["log.parquet"]


@pytest.mark.parametrize("above", ["inf", "-inf", "nan"])
def test_a_threshold_is_finite(above: str) -> None:
    labels = [{"name": "like", "column": "rating", "above": float(above)}]
    raw = {"kind": "table", "interactions": ["log.parquet"], "columns": COLUMNS | {"labels": labels}}
    with pytest.raises(ValueError, match=r"^test: columns\.labels\.0\.above: .*finite"):
        parse(Config, raw, "test")


def test_labels_may_share_masks_and_weights(tmp_path: Path) -> None:
    labels = [
        {"name": "click", "weight": "stake"},
        {"name": "like", "column": "rating", "above": 3, "mask": "rated", "weight": "stake"},
        # A label, and a column that is a feature too.
        {"name": "love", "column": "rating", "above": 4, "mask": "click", "weight": "hour"},
        {"name": "hate", "column": "rated", "mask": "rated"},
    ]
    run(tmp_path, write(tmp_path, log()), {"labels": labels})
    schema = FeatureSchema.read(tmp_path / "out")
    assert [(label.name, label.mask, label.weight) for label in schema.labels] == [
        ("click", None, "stake"),
        ("like", "rated", "like_weight"),
        ("love", "love_mask", "love_weight"),
        ("hate", "hate_mask", None),
    ]
    table = read(tmp_path / "out", "train")
    assert set(schema.columns()) <= set(table.column_names)
    assert table["like_weight"].equals(table["stake"])
    assert table["hate_mask"].equals(table["rated"])
    assert (table["love_mask"].to_numpy() == (table["click"].to_numpy() == 1)).all()
    assert set(table["love_weight"].to_pylist()) == set(map(float, range(24)))


@pytest.mark.parametrize("names", ["A,A", 'A,""'])
def test_scenarios_need_names_of_their_own(tmp_path: Path, names: str) -> None:
    first, second = names.split(",")
    (tmp_path / "s.csv").write_text(f"scenario_id,name\na,{first}\nb,{second}\nc,C\n")
    refused(tmp_path, write(tmp_path, log()), "s.csv, line 3", "name", scenarios=[str(tmp_path / "s.csv")])


def test_an_empty_scenario_in_the_log(tmp_path: Path) -> None:
    raw = log() | {"page": ["a"] * 20 + [""] + ["b"] * (ROWS - 21)}
    refused(tmp_path, write(tmp_path, raw), "log.parquet, row 20", "'page'", "columns.scenario", "empty scenario")


def test_faults_of_a_sources_own_scenarios_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = tuple(ScenarioValue(page, "same") for page in "abc")
    monkeypatch.setattr(Config, "_of_log", lambda *_: values)
    refused(tmp_path, write(tmp_path, log()), "log.parquet: scenario 1 ('b')", "'same'", "a name of its own")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"ids": [{"name": "x/y", "column": "hour"}]}, ("columns.ids.0", "'x/y'", "columns.ids.0.table")),
        ({"ids": [{"name": "hour", "table": "a/b"}]}, ("columns.ids.0", "'a/b'")),
        ({"user": "u/v"}, ("columns.user", "'u/v'", "rename")),
    ],
)
def test_a_table_is_called_as_a_file_can_be(tmp_path: Path, columns: dict[str, object], words: tuple[str, ...]) -> None:
    raw = log()
    refused(tmp_path, write(tmp_path, raw | {"u/v": raw["user"]}), "slash", *words, columns=columns)


def lines(rows: int = 40_000) -> list[str]:
    return ["user,item,page,when,click", *(f"{n % 90},i{n % 70},a,{n},{n % 2}" for n in range(rows))]


CSV_COLUMNS = {"labels": [{"name": "click"}], "ids": [], "numerics": []}


@pytest.mark.parametrize(
    ("line", "content", "words"),
    [
        (2, "7,i7", ("no field for column 'page'", "complete or remove it")),
        (5, "7,i7", ("no field for column 'page'",)),
        (30_002, "7,i7", ("no field for column 'page'",)),
        (40_001, "7,i7,a", ("no field for column 'when'", "if the file was cut, write it again")),
        (9, "7,i7,a,9,1,1", ("more fields than columns",)),
        (30_002, "7,i7,a,9,1,1", ("more fields than columns",)),
        (30_002, "7,i7,a,late,1", ('"when"', '"late"', "correct it")),
    ],
)
@pytest.mark.parametrize("name", ["b.csv", "b.csv.gz"])
def test_a_bad_line_of_a_csv(tmp_path: Path, name: str, line: int, content: str, words: tuple[str, ...]) -> None:
    (tmp_path / "a.csv").write_text("\n".join(lines(100)) + "\n")
    listed = lines()
    listed[line - 1] = content
    text = "\n".join(listed).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    files = [str(tmp_path / "a.csv"), str(tmp_path / name)]
    refused(tmp_path, files, f"{name}, line {line}:", f"{content!r}", *words, columns=CSV_COLUMNS)


def test_a_csv_with_another_delimiter(tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    file.write_text("\n".join(line.replace(",", ";") for line in lines(500)).replace("i3", "3,5"))
    refused(tmp_path, str(file), "log.csv", "delimiter=';'", columns=CSV_COLUMNS)
    run(tmp_path, str(file), CSV_COLUMNS, delimiter=";")
    assert "3,5" in vocabulary(tmp_path / "out", "item")
    (tmp_path / "log.tsv").write_text("\n".join(line.replace(",", "\t") for line in lines(500)))
    report = run(tmp_path, str(tmp_path / "log.tsv"), CSV_COLUMNS, overwrite=True)
    assert sum(report.rows.values()) == 500
    with pytest.raises(ValueError, match="one kind"):
        run(tmp_path, [str(file), str(tmp_path / "log.tsv")], CSV_COLUMNS, overwrite=True)


def test_a_bad_line_of_the_scenarios_file(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("scenario_id,name\na,A\nb\nc,C\n")
    refused(tmp_path, write(tmp_path, log()), "s.csv, line 3", "'name'", scenarios=[str(tmp_path / "s.csv")])


def test_ids_of_text_are_compared_as_text(tmp_path: Path) -> None:
    listed = [*lines(500), "007,i1,a,1,1"]
    (tmp_path / "log.csv").write_text("\n".join(listed))
    run(tmp_path, str(tmp_path / "log.csv"), CSV_COLUMNS)
    assert {"7", "007"} <= set(vocabulary(tmp_path / "out", "user"))


def test_the_configuration_is_kept_beside_the_data(tmp_path: Path) -> None:
    run(tmp_path, write(tmp_path, log()))
    assert "log.parquet" in (tmp_path / "out" / "prepare.toml").read_text()


@pytest.mark.parametrize("begins", [(1500, 1700), (1500.5, 1700.5)])
def test_split_at_given_moments(tmp_path: Path, begins: tuple[float, float]) -> None:
    raw = log()
    names = ("valid_from", "test_from")
    split = {
        name: datetime.datetime.fromtimestamp(begin, datetime.UTC).isoformat()
        for name, begin in zip(names, begins, strict=True)
    }
    run(tmp_path, write(tmp_path, raw), split=split)
    when, scenarios = np.asarray(raw["when"]), np.asarray(raw["page"])
    for place, (first, last) in enumerate([(0, begins[0]), begins, (begins[1], 10**9)]):
        table = read(tmp_path / "out", SPLITS[place])
        chosen = (when >= first) & (when < last)
        assert sorted(table["time"].to_pylist()) == sorted(when[chosen].tolist())
        for scenario, name in enumerate("abc"):
            assert (table["scenario"].to_numpy() == scenario).sum() == (chosen & (scenarios == name)).sum()


def test_a_moment_is_a_date_or_has_an_offset_or_is_of_utc() -> None:
    found = [
        Split.model_validate_json(f'{{"valid_from": "{text}", "test_from": "2022-06-01"}}', strict=True).valid_from
        for text in ("2022-05-01", "2022-05-01 00:00:00", "2022-05-01T08:00:00+08:00")
    ]
    assert found == [datetime.datetime(2022, 5, 1, tzinfo=datetime.UTC)] * 3


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ({"valid_from": "2022-05-01"}, "belong together"),
        ({"valid_from": "2022-05-01", "test_from": "2022-05-01"}, "must be earlier"),
        ({"valid_from": "May", "test_from": "2022-05-01"}, "valid_from: .*'May'"),
        ({"kind": "random", "valid_from": "2022-05-01", "test_from": "2022-05-02"}, "belong to kind"),
    ],
)
def test_moments_that_make_no_split(tmp_path: Path, split: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(tmp_path, "log.parquet", split=split)


def test_no_rows_left_after_a_moment(tmp_path: Path) -> None:
    split = {"valid_from": "2022-05-01", "test_from": "2022-05-02"}
    refused(tmp_path, write(tmp_path, log()), "no rows left in the valid split", "split.valid_from", split=split)


def test_keeping_some_scenarios(tmp_path: Path) -> None:
    raw = log()
    report = run(tmp_path, write(tmp_path, raw), keep=["c", "a"])
    pages = list(raw["page"])  # type: ignore[call-overload]
    assert [scenario.name for scenario in FeatureSchema.read(tmp_path / "out").scenarios] == ["a", "c"]
    assert sum(report.rows.values()) == pages.count("a") + pages.count("c")
    assert f"{pages.count('b'):,} rows left out (keep): those of scenario b" in report.warnings[0]


def test_keeping_scenarios_of_a_file_of_integers(tmp_path: Path) -> None:
    raw = log()
    raw["page"] = ["abc".index(page) + 7 for page in raw["page"]]  # type: ignore[attr-defined]
    names = write(tmp_path, {"scenario_id": [9, 8, 7], "name": ["C", "B", "A"]}, "names.parquet")
    run(tmp_path, write(tmp_path, raw), keep=[7, 9], scenarios=[names])
    assert [scenario.name for scenario in FeatureSchema.read(tmp_path / "out").scenarios] == ["C", "A"]


def test_kept_scenarios_are_there_and_null_ones_are_refused(tmp_path: Path) -> None:
    raw = log()
    refused(tmp_path, write(tmp_path, raw), "keep: there is no scenario 'd'", "'a', 'b', 'c'", keep=["d"])
    raw["page"] = [None, *raw["page"][1:]]  # type: ignore[index]
    refused(tmp_path, write(tmp_path, raw), "row 0", "an unknown scenario, None", keep=["a"])


def test_keeping_some_scenarios_does_not_hide_unknown_ones(tmp_path: Path) -> None:
    names = write(tmp_path, {"scenario_id": ["a", "c"], "name": ["A", "C"]}, "names.parquet")
    words = ("column 'page'", "an unknown scenario, 'b'")
    refused(tmp_path, write(tmp_path, log()), *words, keep=["a"], scenarios=[names])


def test_whole_numbers_stored_as_floats_are_ids(tmp_path: Path) -> None:
    raw = log()
    hours = np.asarray(raw["hour"])
    run(tmp_path, write(tmp_path, raw))
    whole = read(tmp_path / "out", "train")
    (tmp_path / "floats").mkdir()
    run(tmp_path / "floats", write(tmp_path, raw | {"hour": hours.astype(float)}))
    assert read(tmp_path / "floats/out", "train").equals(whole)
    (tmp_path / "gaps").mkdir()
    gaps = [None if hour == 3 else float("nan") if hour == 4 else float(hour) for hour in hours]
    run(tmp_path / "gaps", write(tmp_path, raw | {"hour": gaps}))
    table = read(tmp_path / "gaps/out", "train")
    known = vocabulary(tmp_path / "out", "hour")
    assert ((table["hour"].to_numpy() == 0) == np.isin(whole["hour"].to_numpy(), [known[3], known[4]])).all()
    for wrong in (2.5, float("inf")):
        raw["hour"] = [wrong if row == 17 else float(hour) for row, hour in enumerate(hours)]
        words = ("row 17", "column 'hour'", "no whole number", str(wrong), "columns.numerics")
        (tmp_path / "refused").mkdir(exist_ok=True)
        refused(tmp_path / "refused", write(tmp_path, raw), *words)


def test_fractions_below_whole_numbers_of_a_csv(tmp_path: Path) -> None:
    listed = lines()
    listed[30_001] = "7.5,i7,a,9,1"
    (tmp_path / "log.csv").write_text("\n".join(listed))
    words = ("log.csv, line 30002, column 'user': '7.5' is no whole number", "or give parquet if the column is numbers")
    refused(tmp_path, str(tmp_path / "log.csv"), *words, columns=CSV_COLUMNS)


def test_a_csv_without_rows_among_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log-0.csv").write_text("\n".join(lines(500)))
    (tmp_path / "log-1.csv").write_text(lines(0)[0] + "\n")
    words = "log-1.csv: no rows in there; remove it (interactions)"
    refused(tmp_path, str(tmp_path / "log-*.csv"), words, columns=CSV_COLUMNS)


def test_a_parquet_part_without_rows_is_passed_over_unless_all_are(tmp_path: Path) -> None:
    empty = {column: pa.array(values)[:0] for column, values in log(5).items()}
    write(tmp_path, empty, "log-0.parquet")
    words = "no rows in there; give files with rows (interactions)"
    refused(tmp_path, str(tmp_path / "log-*.parquet"), words, columns=CSV_COLUMNS)
    write(tmp_path, log(), "log-1.parquet")
    found = run(tmp_path, str(tmp_path / "log-*.parquet"), CSV_COLUMNS)
    assert sum(found.rows.values()) == len(log()["user"])
