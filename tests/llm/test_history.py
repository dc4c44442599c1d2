import shutil
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import canonical
import texts
from msr_dist.llm.history import (
    History,
    HistoryConfig,
    history_of,
    read_histories,
    scenario_statistics,
    shard_file,
    write_histories,
)
from msr_dist.llm.prompts import PromptConfig, Templates, scenario_prompts, user_prompt
from msr_dist.schema import Feature, FeatureSchema, Scenario

ALL_ROWS = HistoryConfig()
CUTOFF = texts.FIRST_TIME + 30_000
"""Two thirds of the training rows are older."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return texts.write(tmp_path_factory.mktemp("texts") / "data")


@pytest.fixture
def copy(data, tmp_path):
    """Data that a test may alter."""
    return shutil.copytree(data, tmp_path / "copy")


def histories(data, tmp_path, config=ALL_ROWS, users_per_shard=1000, name="histories"):
    schema = FeatureSchema.read(data)
    found = write_histories(data, schema, config, tmp_path / name, users_per_shard)
    return found, [each for n in range(found.shards) for each in read_histories(shard_file(tmp_path / name, n))]


def rewrite(data, change, split="train"):
    """Put `change` of all rows of `split` in their place."""
    whole = pq.read_table(data / split)
    shutil.rmtree(data / split)
    changed = change(whole)
    canonical.write_split(data / split, changed, canonical.uneven(changed.num_rows, 5))


def rewrite_items(data, **columns):
    items = pq.read_table(data / "items.parquet").select(["row", "id"])
    for name, values in columns.items():
        items = items.append_column(name, pa.array(values, pa.string()))
    pq.write_table(items, data / "items.parquet")


def setting(table, column, values):
    return table.set_column(table.column_names.index(column), column, pa.array(values, table[column].type))


def expected(data, per_scenario=20, before=None, event="like", known=None):
    """Histories by plain Python: row -> [(scenario, item row), ...]."""
    found = defaultdict(list)
    for place, line in enumerate(pq.read_table(data / "train").to_pylist()):
        if line[event] and (known is None or line[known]) and (before is None or line["time"] < before):
            found[line["user"]].append((line["scenario"], -line.get("time", 0), -place, line["item"]))
    kept = {}
    for user, events in sorted(found.items()):
        events.sort()
        kept[user] = [
            (scenario, item)
            for place, (scenario, _, _, item) in enumerate(events)
            if [each[0] for each in events[:place]].count(scenario) < per_scenario
        ]
    return kept


def named(events):
    return [(scenario, f"{texts.title(item)} ({texts.genre(item)})") for scenario, item in events]


def as_pairs(history):
    return list(zip(history.scenarios, history.texts, strict=True))


def prompts(data, tmp_path, before, name="histories"):
    """Every prompt's text: of the users by raw id, and of the scenarios by name."""
    schema, config = FeatureSchema.read(data), PromptConfig()
    templates = Templates.load(config)
    config_of_history = HistoryConfig(before=before, user_text=("age_text", "occupation_text"))
    found, all_of_them = histories(data, tmp_path, config_of_history, name=name)
    texts_of = {
        each.id: user_prompt(each, schema.scenarios, templates, config, lambda text: len(text.split())).text
        for each in all_of_them
    }
    for scenario, prompt in zip(schema.scenarios, scenario_prompts(schema, found.statistics, templates), strict=True):
        texts_of[scenario.name] = prompt.text
    return texts_of


@pytest.mark.parametrize(("per_scenario", "before"), [(20, None), (2, CUTOFF), (1, None)])
def test_each_user_has_the_newest_events_of_each_scenario(data, tmp_path, per_scenario, before):
    found, written = histories(data, tmp_path, HistoryConfig(per_scenario=per_scenario, before=before))
    wanted = expected(data, per_scenario, before)
    assert [each.row for each in written] == list(wanted)
    assert [as_pairs(each) for each in written] == [named(events) for events in wanted.values()]
    assert [each.id for each in written] == [texts.user_id(row) for row in wanted]
    assert found.users == len(wanted) == 38  # Two users have rows, but like nothing.
    assert found.cutoff == (before or texts.FIRST_TIME + 44_900 + 1)
    assert {each.about for each in written} == {""}
    assert found.notes == ()


def test_rows_of_one_moment_are_ordered_by_their_place(copy, tmp_path):
    rewrite(copy, lambda rows: setting(rows, "time", [texts.FIRST_TIME] * len(rows)))
    _, written = histories(copy, tmp_path)
    assert [as_pairs(each) for each in written] == [named(events) for events in expected(copy).values()]


def test_without_time_later_rows_are_newer_and_there_is_no_cut_off(tmp_path):
    data = texts.write(tmp_path / "data", timed=False)
    found, written = histories(data, tmp_path)
    assert found.cutoff is None
    assert [as_pairs(each) for each in written] == [named(events) for events in expected(data).values()]
    with pytest.raises(ValueError, match=r"history\.before: .*data has no column of time; leave it out"):
        histories(data, tmp_path, HistoryConfig(before=5))


def test_a_label_with_a_mask_counts_where_it_is_known(data, tmp_path):
    _, written = histories(data, tmp_path, HistoryConfig(label="share"))
    wanted = expected(data, event="share", known="share_known")
    assert {each.row: as_pairs(each) for each in written} == {row: named(events) for row, events in wanted.items()}
    assert wanted != expected(data, event="share")


def test_nothing_from_the_cut_off_on_enters_a_prompt(data, copy, tmp_path):
    """The issue's own test: whatever happens to later rows and to the other splits, every byte stays."""
    rng = np.random.default_rng(0)

    def disturb(rows):
        late = np.flatnonzero(rows["time"].to_numpy() >= CUTOFF)
        for column in ("user", "item", "scenario", "time"):
            values = rows[column].to_numpy().copy()
            values[late] = rng.permutation(values[late])
            rows = setting(rows, column, values)
        for column in ("like", "share"):
            values = rows[column].to_numpy().copy()
            values[late] = 1 - values[late]
            rows = setting(rows, column, values)
        early = np.setdiff1d(np.arange(len(rows)), late)
        return rows.take(np.concatenate([late, early]))

    before = prompts(data, tmp_path, CUTOFF, name="before")
    assert len(before) == 38 + 3

    rewrite(copy, disturb)
    for split in ("valid", "test"):
        rewrite(copy, lambda rows: setting(rows, "time", [0] * len(rows)), split)
    assert prompts(copy, tmp_path, CUTOFF, name="disturbed") == before

    rewrite(copy, lambda rows: rows.filter(pc.less(rows["time"], CUTOFF)))
    for split in ("valid", "test"):
        shutil.rmtree(copy / split)
    assert prompts(copy, tmp_path, CUTOFF, name="cut") == before
    assert prompts(copy, tmp_path, None, name="all of what is left") == before
    assert prompts(data, tmp_path, None, name="all") != before


def test_a_row_before_the_cut_off_changes_the_prompt_of_its_user_alone(data, copy, tmp_path):
    before = prompts(data, tmp_path, CUTOFF, name="before")
    rows = pq.read_table(data / "train")
    place = next(n for n, line in enumerate(rows.to_pylist()) if line["time"] == CUTOFF - 100 and line["user"] <= 38)
    like = rows["like"].to_numpy().copy()
    like[place] = 1 - like[place]
    rewrite(copy, lambda rows: setting(rows, "like", like))
    after = prompts(copy, tmp_path, CUTOFF, name="after")
    assert after.keys() == before.keys()
    changed = [key for key in before if before[key] != after[key]]
    assert changed == [texts.user_id(rows["user"][place].as_py())]


def test_statistics_count_all_rows_before_the_cut_off(data, tmp_path):
    config = HistoryConfig(before=CUTOFF)
    found, _ = histories(data, tmp_path, config)
    lines = [line for line in pq.read_table(data / "train").to_pylist() if line["time"] < CUTOFF]
    for scenario, counts in enumerate(found.statistics):
        of_scenario = [line for line in lines if line["scenario"] == scenario]
        assert counts.interactions == len(of_scenario)
        assert counts.users == len({line["user"] for line in of_scenario})
        assert counts.items == len({line["item"] for line in of_scenario})
    assert found.statistics == scenario_statistics(data, FeatureSchema.read(data), config)


def test_a_scenario_without_rows_has_statistics_of_zero(copy, tmp_path):
    schema = FeatureSchema.read(copy)
    more = schema.model_copy(update={"scenarios": (*schema.scenarios, Scenario(id=3, name="empty"))})
    more.save(copy)
    found, _ = histories(copy, tmp_path)
    assert found.statistics[3].model_dump() == {"interactions": 0, "users": 0, "items": 0}
    assert "scenarios without a text are described by their names alone: empty" in found.notes


def test_shards_cut_the_users_and_nothing_else(data, tmp_path, monkeypatch):
    whole, together = histories(data, tmp_path, name="whole")
    # Batches that are smaller than a shard, and larger.
    for users_per_shard, batch in ((1, 2048), (7, 2048), (38, 2048), (38, 10)):
        monkeypatch.setattr("msr_dist.llm.history.EVENTS_PER_BATCH", batch)
        name = f"{users_per_shard}-{batch}"
        found, apart = histories(data, tmp_path, users_per_shard=users_per_shard, name=name)
        assert apart == together
        assert found.shards == -(-38 // users_per_shard)
        sizes = [len(read_histories(shard_file(tmp_path / name, n))) for n in range(found.shards)]
        assert sizes[:-1] == [users_per_shard] * (found.shards - 1)
    assert whole.shards == 1


def test_equal_data_give_equal_bytes(data, tmp_path):
    histories(data, tmp_path, users_per_shard=10, name="one")
    histories(data, tmp_path, users_per_shard=10, name="two")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert files == ["histories.json", *(f"part-0000{n}.parquet" for n in range(4))]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_complete_folder_is_kept_until_data_or_settings_change(copy, tmp_path):
    first, _ = histories(copy, tmp_path)
    # What was kept can be told from what was written again.
    mark = shard_file(tmp_path / "histories", 0)
    mark.write_bytes(mark.read_bytes() + b"kept")

    def kept():
        return mark.read_bytes().endswith(b"kept")

    assert histories_summary(copy, tmp_path) == first
    assert histories_summary(copy, tmp_path, HistoryConfig(memory_limit="1GB")) == first
    assert kept()
    assert histories_summary(copy, tmp_path, HistoryConfig(per_scenario=3)).digest != first.digest
    assert not kept()
    assert histories_summary(copy, tmp_path) == first
    rewrite_items(copy, title=["Another Name"] * 30)
    changed = histories_summary(copy, tmp_path)
    assert changed.digest != first.digest
    rewrite(copy, lambda rows: setting(rows, "like", 1 - rows["like"].to_numpy()))
    assert histories_summary(copy, tmp_path).digest != changed.digest


def histories_summary(data, tmp_path, config=ALL_ROWS):
    return write_histories(data, FeatureSchema.read(data), config, tmp_path / "histories", 1000)


def test_what_an_interrupted_run_left_is_replaced(data, tmp_path):
    left = tmp_path / "histories.partial"
    (left / "work").mkdir(parents=True)
    (left / "part-00007.parquet").write_text("half a file")
    histories(data, tmp_path)
    assert not left.exists()
    assert sorted(path.name for path in (tmp_path / "histories").iterdir()) == ["histories.json", "part-00000.parquet"]


def test_a_failed_run_leaves_what_was_there(data, tmp_path):
    first, written = histories(data, tmp_path)
    with pytest.raises(ValueError, match=r"no row is an event \(like = 1 and time < 5\), so nobody has a history"):
        histories_summary(data, tmp_path, HistoryConfig(before=5))
    assert [path.name for path in tmp_path.iterdir()] == ["histories"]
    assert histories(data, tmp_path) == (first, written)


def test_a_folder_of_something_else_is_left_alone(data, tmp_path):
    (tmp_path / "histories").mkdir()
    (tmp_path / "histories" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="something is there that is no folder of histories"):
        histories(data, tmp_path)
    assert (tmp_path / "histories" / "thesis.txt").read_text() == "years of work"


def test_items_are_named_by_what_there_is(copy, tmp_path):
    names = {1: ("Plain", "drama"), 2: ("", "comedy"), 3: (None, None), 4: ("  ", ""), 5: ("Only a title", None)}
    rewrite_items(
        copy,
        title=[names.get(row, ("T", "g"))[0] for row in range(1, 31)],
        genres_text=[names.get(row, ("T", "g"))[1] for row in range(1, 31)],
    )
    found, written = histories(copy, tmp_path)
    wanted = {
        1: "Plain (drama)",
        2: "comedy",
        3: f"item {texts.item_id(3)}",
        4: f"item {texts.item_id(4)}",
        5: "Only a title",
    }
    assert [as_pairs(each) for each in written] == [
        [(scenario, wanted.get(item, "T (g)")) for scenario, item in events] for events in expected(copy).values()
    ]
    assert found.notes == (
        "1 of 30 items have no title: named by genres_text",
        "2 of 30 items have no text: named by their ids",
    )
    _, written = histories(copy, tmp_path, HistoryConfig(item_text=("genres_text", "title")))
    assert {"drama (Plain)", "comedy", "g (T)"} < {text for each in written for text in each.texts}


def test_without_texts_ids_stand_for_the_items(copy, tmp_path):
    rewrite_items(copy)
    found, _ = histories(copy, tmp_path)
    assert found.notes == ("items.parquet has no columns of text: items are named by their ids",)
    (copy / "items.parquet").unlink()
    found, written = histories(copy, tmp_path)
    assert found.notes == ("no items.parquet: items are named by their ids",)
    assert found.item_text == ()
    assert [as_pairs(each) for each in written] == [
        [(scenario, f"item {texts.item_id(item)}") for scenario, item in events] for events in expected(copy).values()
    ]


HARD = (
    "two\nlines and\ttab\u2028end\r\n",
    "{user} {scenarios} {0} {{}} {",
    "$user ${scenarios} $",
    "\"double\" 'single' \\back; semi: colon",
    "nul\x00 and \x85 and \u00a0blank",
    "Zoë, 東京物語, 👩\u200d🚀",
)


def test_hard_titles_come_out_in_one_line_as_they_are(copy, tmp_path):
    rewrite_items(copy, title=[HARD[row % len(HARD)] for row in range(30)])
    _, written = histories(copy, tmp_path)
    assert {text for each in written for text in each.texts} == {
        "two lines and tab end",
        *HARD[1:4],
        "nul and and blank",
        HARD[5],
    }


def test_long_names_are_cut(copy, tmp_path):
    rewrite_items(copy, title=["word " * 100_000] * 29 + ["w" * 20])
    _, written = histories(copy, tmp_path, HistoryConfig(item_characters=20))
    found = {text for each in written for text in each.texts}
    assert found == {"word word word word…", "w" * 20}


def test_user_text_introduces_who_it_is_where_it_is_asked_for(copy, tmp_path):
    users = pq.read_table(copy / "users.parquet")
    users = setting(users, "age_text", ["", None, "4\n5", *["18"] * 37])
    pq.write_table(users, copy / "users.parquet")
    _, written = histories(copy, tmp_path, HistoryConfig(user_text=("age_text", "occupation_text")))
    works = users["occupation_text"].to_pylist()
    assert [each.about for each in written[:4]] == [
        f"occupation: {works[0]}",
        f"occupation: {works[1]}",
        f"age: 4 5, occupation: {works[2]}",
        f"age: 18, occupation: {works[3]}",
    ]


def test_raw_ids_may_be_text(copy, tmp_path):
    for table in ("users", "items"):
        file = copy / "vocabulary" / f"{table}.parquet"
        known = pq.read_table(file)
        pq.write_table(known.set_column(1, "id", pa.array([f"{table}'{n}" for n in range(len(known))])), file)
    (copy / "items.parquet").unlink()
    _, written = histories(copy, tmp_path)
    assert written[0].id == "users'0"
    assert all(text.startswith("item items'") for text in written[0].texts)
    assert history_of(copy, FeatureSchema.read(copy), HistoryConfig(), "users'0") == written[0]


@pytest.mark.parametrize("order", ["newest_first", "oldest_first"])
def test_a_published_history_stands_in_a_line_of_its_own(copy, tmp_path, order):
    def add(whole):
        user = whole["user"].to_numpy()
        # Of later rows of a user, the list has gone on: what counts is what came before the log.
        first = np.array([not (user[:place] == user[place]).any() for place in range(len(user))])
        lists = [
            [0, 1, 2, 3] if one == 40 else [4, 5] if oldest else [6] for one, oldest in zip(user, first, strict=True)
        ]
        return whole.append_column("before", pa.array(lists, pa.list_(pa.int64())))

    rewrite(copy, add)
    schema = FeatureSchema.read(copy)
    listed = Feature(name="before", table="items", group="user", pooling="mean")
    schema = schema.model_copy(update={"features": (*schema.features, listed)})
    schema.save(copy)
    _, without = histories(copy, tmp_path, name="without")
    config = HistoryConfig(earlier="before", earlier_order=order, per_scenario=2, earlier_events=2)
    _, all_of_them = histories(copy, tmp_path, config)
    by_row = {each.row: each for each in all_of_them}
    # User 40 has no event of its own, and the reserved item 0 names nothing.
    assert 40 not in {each.row for each in without}
    alone = HistoryConfig(earlier="before", earlier_order=order, per_scenario=0, earlier_events=1)
    _, before_the_log = histories(copy, tmp_path, alone, name="alone")
    assert {tuple(each.scenarios) for each in before_the_log} == {(3,)}
    newest = [1, 2] if order == "newest_first" else [3, 2]
    assert by_row[40].texts == [name_of(item) for item in newest]
    assert list(by_row[40].scenarios) == [3, 3]
    assert [by_row[1].texts[-2:], by_row[1].scenarios[-2:]] == [
        [name_of(item) for item in ([4, 5] if order == "newest_first" else [5, 4])],
        [3, 3],
    ]
    templates = Templates.load(PromptConfig())
    text = user_prompt(by_row[40], schema.scenarios, templates, PromptConfig(user_tokens=9999), len).text
    assert text.endswith(f"earlier, anywhere: {'; '.join(by_row[40].texts)}")
    assert history_of(copy, schema, config, by_row[40].id) == by_row[40]
    with pytest.raises(ValueError, match=r"^history\.earlier: no list of items 'after' in .*; they have before$"):
        histories(copy, tmp_path, HistoryConfig(earlier="after"), name="wrong")


def name_of(item):
    return f"{texts.title(item)} ({texts.genre(item)})"


def test_ids_outside_the_vocabulary_are_counted_and_left_out(copy, tmp_path):
    rows = pq.read_table(copy / "train")
    wanted = expected(copy)
    user, item = rows["user"].to_numpy().copy(), rows["item"].to_numpy().copy()
    lost_users = np.flatnonzero((user == 5) & (rows["like"].to_numpy() == 1))
    lost_items = np.flatnonzero((item == 3) & (user != 5) & (rows["like"].to_numpy() == 1))
    user[user == 5], item[item == 3] = 0, 0
    rewrite(copy, lambda rows: setting(setting(rows, "user", user), "item", item))
    found, written = histories(copy, tmp_path)
    assert found.notes == (
        f"{len(lost_users)} events of users outside the vocabulary are in no history",
        f"{len(lost_items) + sum(n == 3 for _, n in wanted[5])} events of items outside the vocabulary "
        "are in no history",
    )
    del wanted[5]
    assert {each.row: as_pairs(each) for each in written} == {
        row: named([(scenario, n) for scenario, n in events if n != 3]) for row, events in wanted.items()
    }
    of_first = [line for line in pq.read_table(copy / "train").to_pylist() if line["scenario"] == 0]
    assert found.statistics[0].interactions == len(of_first)
    assert found.statistics[0].users == len({line["user"] for line in of_first} - {0})


def test_what_is_newer_than_held_out_rows_is_said(copy, tmp_path):
    rewrite(copy, lambda rows: setting(rows, "time", [CUTOFF] * len(rows)), "valid")
    found, _ = histories(copy, tmp_path, name="all")
    assert found.notes == (
        f"the valid split begins at {CUTOFF}, before the cut-off {texts.FIRST_TIME + 44_901}: histories hold events "
        "that are newer than some of its rows",
    )
    found, _ = histories(copy, tmp_path, HistoryConfig(before=CUTOFF), name="cut")
    assert found.notes == ()


def test_the_history_of_one_user_is_the_one_that_is_written(data, tmp_path):
    config, schema = HistoryConfig(per_scenario=2, before=CUTOFF, user_text=("age_text",)), FeatureSchema.read(data)
    _, written = histories(data, tmp_path, config)
    for each in (written[0], written[20]):
        found = history_of(data, schema, config, each.id)
        assert isinstance(found, History)
        assert found == each
        assert history_of(data, schema, config, str(each.id)) == each
    with pytest.raises(ValueError, match=r"users\.parquet: there is no user 99999; training has no rows of that id"):
        history_of(data, schema, config, 99999)
    idle = texts.user_id(40)
    with pytest.raises(ValueError, match=rf"user {idle} has no events \(like = 1 and time < {CUTOFF}\)"):
        history_of(data, schema, config, idle)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (HistoryConfig(label="buy"), r"history\.label: there is no label 'buy'; .* has like, share"),
        (HistoryConfig(item_text=("name",)), r"history\.item_text: no column 'name' in .*items\.parquet; it has title"),
        (HistoryConfig(user_text=("title",)), r"history\.user_text: no column 'title' in .*users\.parquet; it has age"),
        (HistoryConfig(memory_limit="much"), r"cannot be read \(Parser Error.*history\.memory_limit \(much\)"),
    ],
)
def test_wrong_settings(data, tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        histories(data, tmp_path, config)
    assert list(tmp_path.iterdir()) == []


def without_vocabulary(data):
    (data / "vocabulary" / "items.parquet").unlink()


def without_training(data):
    shutil.rmtree(data / "train")


def with_a_null_time(data):
    rewrite(data, lambda rows: setting(rows, "time", [None, *rows["time"].to_pylist()[1:]]))


def without_time(data):
    rewrite(data, lambda rows: rows.drop_columns("time"))


def with_another_scenario(data):
    rewrite(data, lambda rows: setting(rows, "scenario", [3] * len(rows)))


def with_another_user(data):
    rewrite(data, lambda rows: setting(rows, "user", [41, *rows["user"].to_pylist()[1:]]))
    rewrite(data, lambda rows: setting(rows, "like", [1] * len(rows)))


def with_another_item(data):
    rewrite(data, lambda rows: setting(rows, "item", [31] * len(rows)))


def with_a_damaged_file(data):
    (data / "train" / "part-00001.parquet").write_text("not parquet")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_vocabulary, r"vocabulary/items\.parquet: no such file; prepare the data again"),
        (without_training, r"train: no parquet files there; make the data with `msr-dist prepare`"),
        (with_a_null_time, r"train: 1 rows without a value for time; prepare the data again"),
        (without_time, r"train: column 'time' of the schema is absent"),
        (with_another_scenario, r"train: scenarios from 3 to 3, but the schema has 0 to 2"),
        (with_another_user, r"vocabulary/users\.parquet: row 41 of the training split is not there"),
        (with_another_item, r"vocabulary/items\.parquet: items that user row 1 engaged with are not there"),
        (with_a_damaged_file, r"cannot be read \(.*part-00001\.parquet.*\); is a file damaged"),
    ],
)
def test_faults_of_the_data(copy, tmp_path, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=message):
        histories(copy, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
