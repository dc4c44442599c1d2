import hashlib
import json
import logging
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msr_dist.llm.vectors import (
    MANIFEST_FILE,
    PROMPT_BYTES,
    PreviousVectors,
    Provenance,
    StoreWriter,
    Written,
    open_store,
    vocabulary_digest,
)

WIDTH, SHARDS, SHARD_USERS = 12, 4, 50
PROVENANCE = Provenance(
    model={"name": "tiny", "revision": None, "dtype": "fp32", "layers": 2},
    fingerprint="f0",
    templates="t0",
    pooling="mean_own",
    layer=-1,
    cutoff=1_500,
    item_text=("title",),
    data="data/small",
    table="users",
    vocabulary="v0",
)


def rows_of(number: int) -> np.ndarray:
    """Every second row, from 1 on."""
    return 1 + 2 * np.arange(number * SHARD_USERS, (number + 1) * SHARD_USERS, dtype=np.int64)


def vectors_of(number: int) -> np.ndarray:
    """Of a large common mean, with a constant dimension and one that is far larger than all others."""
    drawn = np.random.default_rng(number).normal(3, 1, (SHARD_USERS, WIDTH)).astype(np.float32)
    drawn[:, 3], drawn[:, 5] = 0.1, drawn[:, 5] * 100
    return drawn


def prompts_of(rows: np.ndarray, text: str = "") -> list[bytes]:
    return [hashlib.blake2b(f"{text}{row}".encode(), digest_size=PROMPT_BYTES).digest() for row in rows]


def ids_of(rows: np.ndarray) -> pa.Array:
    return pa.array([f"u{row}" for row in rows])


def write(writer: StoreWriter, number: int, vectors=None, reasons=None) -> Written:
    rows = rows_of(number)
    vectors = vectors_of(number) if vectors is None else vectors
    return writer.write_shard(number, rows, ids_of(rows), prompts_of(rows), vectors, reasons or [None] * len(rows))


def write_scenarios(writer: StoreWriter, count: int = 3) -> None:
    vectors = np.random.default_rng(7).normal(9, 1, (count, WIDTH)).astype(np.float32)
    writer.write_scenarios([f"s{i}" for i in range(count)], [f"about s{i}" for i in range(count)], vectors)


def make(folder, scenarios: int = 3) -> StoreWriter:
    writer = StoreWriter(folder, "stamp", WIDTH)
    for number in range(SHARDS):
        write(writer, number)
    write_scenarios(writer, scenarios)
    writer.finish(PROVENANCE, SHARDS)
    return writer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "store"
    make(folder)
    return folder


@pytest.fixture
def store(made, tmp_path):
    """A copy to do harm to."""
    return shutil.copytree(made, tmp_path / "store")


def everything() -> np.ndarray:
    return np.concatenate([vectors_of(number) for number in range(SHARDS)]).astype(np.float16).astype(np.float64)


def contents(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def flip(file, place: int) -> None:
    changed = bytearray(file.read_bytes())
    changed[place] ^= 0x10
    file.write_bytes(changed)


def flip_vector(folder, number: int) -> None:
    file = folder / f"part-{number:05d}.parquet"
    flip(file, file.read_bytes().index(vectors_of(number).astype(np.float16)[10].tobytes()))


def truncate(file) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_what_was_written_is_read_in_the_order_of_the_rows(made):
    opened = open_store(made)
    rows, vectors = (np.concatenate(parts) for parts in zip(*opened.batches(), strict=True))
    assert rows.tolist() == list(range(1, 2 * SHARDS * SHARD_USERS, 2))
    assert np.array_equal(vectors, everything())
    assert (opened.manifest.users, opened.manifest.failed, opened.manifest.scenarios.rows) == (200, 0, 3)
    first = pq.read_table(made / "users/part-00000.parquet")
    assert first["id"].to_pylist() == ids_of(rows_of(0)).to_pylist()
    assert first["prompt"].to_pylist() == prompts_of(rows_of(0))
    assert first["vector"].type == pa.list_(pa.field("element", pa.float16()), WIDTH)
    opened.verify()


def test_statistics_are_those_of_all_vectors_at_once(made):
    opened = open_store(made)
    np.testing.assert_allclose(opened.mean, everything().mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(opened.std, everything().std(axis=0), rtol=1e-6, atol=1e-12)
    assert opened.std[3] == 0


def test_normalised_vectors_have_mean_0_and_standard_deviation_1(made):
    opened = open_store(made)
    vectors = np.concatenate([opened.normalise(batch) for _, batch in opened.batches()])
    varied = np.arange(WIDTH) != 3
    np.testing.assert_allclose(vectors.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(vectors[:, varied].std(axis=0), 1, rtol=1e-5)
    assert not vectors[:, 3].any()


def test_a_store_is_the_same_bytes_in_whatever_order_and_attempts_it_was_made(made, tmp_path):
    folder = tmp_path / "store"
    writer = StoreWriter(folder, "stamp", WIDTH)
    write_scenarios(writer)
    for number in (3, 1):
        write(writer, number)
    again = StoreWriter(folder, "stamp", WIDTH)
    for number in range(SHARDS):
        if not again.shard_done(number, SHARD_USERS):
            write(again, number)
    (folder / "users" / "part-00002.parquet.0a1b.partial").write_bytes(b"half")
    again.finish(PROVENANCE, SHARDS)
    assert contents(folder) == contents(made)


def test_shards_of_a_finer_division_go(made, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "store"
    writer = StoreWriter(folder, "stamp", WIDTH)
    write(writer, SHARDS)
    make(folder)
    assert "part-00004.parquet: left from an earlier attempt, removed" in caplog.text
    assert contents(folder) == contents(made)


def test_users_that_failed_are_listed_and_stand_nowhere_else(tmp_path):
    writer = StoreWriter(tmp_path, "stamp", WIDTH)
    vectors = vectors_of(0)
    vectors[2, 4], vectors[5, 0], vectors[6, 1] = 7e4, np.nan, -np.inf
    reasons = ["1,200 tokens, more than 1,024", *[None] * (SHARD_USERS - 1)]
    assert write(writer, 0, vectors, reasons) == Written(users=46, failed=4)
    assert writer.shard_done(0, SHARD_USERS)
    write_scenarios(writer)
    manifest = writer.finish(PROVENANCE, 1)
    assert (manifest.users, manifest.failed) == (46, 4)
    failed = open_store(tmp_path).failures()
    assert failed["row"].to_pylist() == [1, 5, 11, 13]
    assert failed["id"].to_pylist() == ["u1", "u5", "u11", "u13"]
    assert failed["reason"].to_pylist() == [
        "1,200 tokens, more than 1,024",
        "a value of 7e+04 is beyond fp16, which ends at 65504",
        "the vector is not finite",
        "the vector is not finite",
    ]
    kept = np.concatenate([rows for rows, _ in open_store(tmp_path).batches()])
    assert sorted([*kept, 1, 5, 11, 13]) == rows_of(0).tolist()


def test_a_store_in_which_every_user_failed_is_complete(tmp_path):
    writer = StoreWriter(tmp_path, "stamp", WIDTH)
    assert write(writer, 0, reasons=["empty"] * SHARD_USERS) == Written(users=0, failed=SHARD_USERS)
    assert writer.shard_done(0, SHARD_USERS)
    write_scenarios(writer)
    assert writer.finish(PROVENANCE, 1).users == 0
    opened = open_store(tmp_path)
    assert not opened.mean.any()
    assert not opened.std.any()
    assert np.isfinite(opened.scenario_vectors()).all()


def test_a_scenario_must_have_a_vector(tmp_path):
    with pytest.raises(ValueError, match="scenario 'b': a value of 1e\\+05 is beyond fp16"):
        StoreWriter(tmp_path, "stamp", 1).write_scenarios(["a", "b"], ["", ""], np.array([[1.0], [1e5]], np.float32))


def lose_failed(store):
    (store / "failed/part-00002.parquet").unlink()
    return "failed/part-00002.parquet: cannot be read, it is absent or damaged"


def lose_users(store):
    (store / "users/part-00002.parquet").unlink()
    return "users/part-00002.parquet: cannot be read, it is absent or damaged"


def truncate_users(store):
    truncate(store / "users/part-00002.parquet")
    return "users/part-00002.parquet: cannot be read, it is absent or damaged"


def flip_a_byte_of_a_vector(store):
    flip_vector(store / "users", 2)
    return "users/part-00002.parquet: cannot be read, it is absent or damaged"


def other_stamp(store):
    write(StoreWriter(store, "other", WIDTH), 2)
    return "users/part-00002.parquet: was made with other settings or from other data"


def other_shard(store):
    for kind in ("users", "failed"):
        shutil.copy(store / kind / "part-00001.parquet", store / kind / "part-00002.parquet")
    return "users/part-00002.parquet: holds another shard than its name says"


@pytest.mark.parametrize(
    "harm", [lose_failed, lose_users, truncate_users, flip_a_byte_of_a_vector, other_stamp, other_shard]
)
def test_a_shard_that_is_not_as_it_was_written_is_not_done_and_named(store, caplog, harm):
    writer = StoreWriter(store, "stamp", WIDTH)
    told = harm(store)
    assert [writer.shard_done(number, SHARD_USERS) for number in range(SHARDS)] == [True, True, False, True]
    assert told in caplog.text
    assert "the shard is made again" in caplog.text
    with pytest.raises(ValueError, match="part-00002"):
        writer.finish(PROVENANCE, SHARDS)


def test_no_flipped_byte_leads_past_the_checks(tmp_path, caplog):
    """What remains done after a flip holds the same rows and vectors."""
    caplog.set_level(logging.ERROR)
    writer = StoreWriter(tmp_path, "stamp", 4)
    rows = np.arange(1, 4, dtype=np.int64)
    writer.write_shard(0, rows, ids_of(rows), prompts_of(rows), np.ones((3, 4), np.float32), [None] * 3)
    file = tmp_path / "users/part-00000.parquet"
    before, good = file.read_bytes(), pq.read_table(file)
    for place in range(0, len(before), 3):
        flip(file, place)
        if writer.shard_done(0, 3):
            found = pq.read_table(file)
            assert found["row"].equals(good["row"]), place
            assert found["vector"].equals(good["vector"]), place
        file.write_bytes(before)


def test_a_shard_accounts_for_every_user_of_its_history(made, caplog):
    writer = StoreWriter(made, "stamp", WIDTH)
    assert not writer.shard_done(0, SHARD_USERS + 1)
    assert "accounts for 50 users, the shard has 51" in caplog.text


def test_a_shard_that_nobody_has_begun_is_not_done(tmp_path, caplog):
    assert not StoreWriter(tmp_path, "stamp", WIDTH).shard_done(0, 1)
    assert not caplog.text


def test_a_user_in_two_shards_ends_the_extraction(tmp_path):
    writer = StoreWriter(tmp_path, "stamp", WIDTH)
    write(writer, 0)
    rows = rows_of(0)[-1:]
    writer.write_shard(1, rows, ids_of(rows), prompts_of(rows), vectors_of(0)[-1:], [None])
    write_scenarios(writer)
    with pytest.raises(ValueError, match=r"part-00001.parquet: row 99 belongs to an earlier shard"):
        writer.finish(PROVENANCE, 2)


def test_a_failed_write_leaves_nothing(tmp_path):
    writer = StoreWriter(tmp_path, "stamp", WIDTH)
    write(writer, 0)
    before = contents(tmp_path)
    rows = rows_of(0)
    with pytest.raises(pa.ArrowInvalid):
        writer.write_shard(0, rows, ids_of(rows), [b"short"] * SHARD_USERS, vectors_of(0), [None] * SHARD_USERS)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "file", ["users/part-00001.parquet", "failed/part-00003.parquet", "statistics.parquet", "scenarios.parquet"]
)
def test_verify_names_the_file_that_was_changed(store, file):
    opened = open_store(store)
    flip(store / file, 30)
    with pytest.raises(ValueError, match=f"{file}: is damaged, its checksum"):
        opened.verify()
    (store / file).unlink()
    with pytest.raises(ValueError, match=f"{file}: is absent"):
        opened.verify()


def test_small_files_are_compared_whenever_they_are_read(store):
    opened = open_store(store)
    flip(store / "scenarios.parquet", 40)
    with pytest.raises(ValueError, match=r"scenarios.parquet: is damaged"):
        opened.scenario_vectors()
    flip(store / "statistics.parquet", 40)
    with pytest.raises(ValueError, match=r"statistics.parquet: is damaged"):
        open_store(store)


def test_what_is_not_there_or_not_finished_or_of_another_format_is_no_store(store, tmp_path):
    with pytest.raises(ValueError, match="no vectors of a language model there; make them with `msr-dist extract`"):
        open_store(tmp_path / "none")
    manifest = store / MANIFEST_FILE
    raw = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(raw | {"format": 2}))
    with pytest.raises(ValueError, match="has format 2, this version of msr-dist reads 1"):
        open_store(store)
    manifest.write_text(json.dumps(raw | {"width": "wide"}))
    with pytest.raises(ValueError, match=r"manifest.json: width: .*'wide'"):
        open_store(store)
    raw["shards"][0]["file"] = "../../elsewhere.parquet"
    manifest.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"shards.0.file"):
        open_store(store)
    truncate(manifest)
    with pytest.raises(ValueError, match=r"manifest.json: cannot be read, the file is damaged"):
        open_store(store)
    manifest.unlink()
    (store / "histories").mkdir()
    for number in range(6):
        (store / "histories" / f"part-{number:05d}.parquet").touch()
    with pytest.raises(ValueError, match="not finished: 4 of 6 shards; run the same `msr-dist extract` again"):
        open_store(store)


def test_a_mismatch_names_both_sides(made):
    manifest = open_store(made).manifest
    manifest.require({"model": "tiny", "pooling": "mean_own", "cutoff": 1_500, "dtype": "fp32", "width": None}, "S")
    with pytest.raises(ValueError) as told:  # noqa: PT011 - the whole text is compared
        manifest.require({"model": "large", "cutoff": None, "pooling": "mean_all", "dtype": "bf16"}, "S")
    assert str(told.value).splitlines() == [
        f"S: the store has {has}; extract again, or ask for what the store has"
        for has in (
            "model 'tiny', the run asks for 'large'",
            "pooling 'mean_own', the run asks for 'mean_all'",
            "dtype 'fp32', the run asks for 'bf16'",
        )
    ]
    with pytest.raises(ValueError, match="a store tells nothing of 'colour'; it knows cutoff, data, dtype"):
        manifest.require({"colour": 3}, "S")


def test_a_model_without_a_name_is_none():
    with pytest.raises(ValueError, match="needs its name"):
        Provenance(**PROVENANCE.model_dump() | {"model": {"layers": 2}})


def test_scenario_vectors_tell_scenarios_apart_and_nothing_else(made, tmp_path):
    opened = open_store(made)
    assert opened.scenario_names() == ["s0", "s1", "s2"]
    assert opened.scenario_prompts() == ["about s0", "about s1", "about s2"]
    raw = opened.scenario_vectors(normalised=False)
    np.testing.assert_allclose(raw, np.random.default_rng(7).normal(9, 1, (3, WIDTH)), rtol=1e-3)
    vectors = opened.scenario_vectors()
    np.testing.assert_allclose(vectors.mean(axis=0), 0, atol=1e-6)
    assert np.mean(vectors.astype(np.float64) ** 2) == pytest.approx(1)
    # The dimension that is a hundred times larger in users, and the one that is constant in them, rule nothing.
    assert np.abs(vectors[:, 5]).max() < 1
    assert np.abs(vectors).max() < 4
    one = make(tmp_path / "one", scenarios=1).folder
    assert not open_store(one).scenario_vectors().any()


def test_equal_scenarios_have_equal_vectors(tmp_path):
    writer = make(tmp_path)
    writer.write_scenarios(["a", "b", "c"], ["x"] * 3, np.full((3, WIDTH), 0.1, np.float32))
    writer.finish(PROVENANCE, SHARDS)
    assert not open_store(tmp_path).scenario_vectors().any()


def test_vectors_of_an_older_extraction_are_found_by_their_prompt(made, tmp_path):
    shutil.copytree(made / "users", tmp_path / "previous")
    previous = PreviousVectors.build(tmp_path / "previous", WIDTH)
    assert len(previous) == SHARDS * SHARD_USERS
    rows = np.array([399, 3, 4, 151, 3])  # row 4 was never there
    found, vectors = previous.take(prompts_of(rows))
    assert found.tolist() == [True, True, False, True, True]
    expected = everything()[rows // 2]
    expected[2] = 0
    assert np.array_equal(vectors, expected)
    assert not previous.take(prompts_of(rows, "changed"))[0].any()
    # Taken up by another process, and by one that comes after a kill.
    shutil.rmtree(tmp_path / "previous" / "index")
    (tmp_path / "previous" / "index.partial").mkdir()
    PreviousVectors.build(tmp_path / "previous", WIDTH)
    assert PreviousVectors(tmp_path / "previous").take(prompts_of(rows))[0].tolist() == found.tolist()


def test_damaged_older_shards_and_those_of_another_width_are_encoded_again(made, tmp_path, caplog):
    folder = shutil.copytree(made / "users", tmp_path / "previous")
    truncate(folder / "part-00000.parquet")
    flip_vector(folder, 1)
    rows = rows_of(3)
    StoreWriter(tmp_path, "stamp", 2).write_shard(
        3, rows, ids_of(rows), prompts_of(rows), np.ones((SHARD_USERS, 2), np.float32), [None] * SHARD_USERS
    )
    shutil.copy(tmp_path / "users/part-00003.parquet", folder)
    previous = PreviousVectors.build(folder, WIDTH)
    assert [previous.take(prompts_of(rows_of(n)))[0].mean() for n in range(SHARDS)] == [0, 0, 1, 0]
    assert np.array_equal(previous.take(prompts_of(rows_of(2)))[1], vectors_of(2).astype(np.float16))
    for number in (0, 1):
        assert f"part-0000{number}.parquet: cannot be read" in caplog.text
    assert "its users are encoded again" in caplog.text


def test_an_empty_older_extraction_knows_nobody(tmp_path):
    found, vectors = PreviousVectors.build(tmp_path, WIDTH).take(prompts_of(rows_of(0)))
    assert not found.any()
    assert vectors.shape == (SHARD_USERS, WIDTH)


@pytest.mark.parametrize("ids", [[5, 9, 7], ["a", "", "ü"]])
def test_the_digest_of_a_vocabulary_is_that_of_its_content(tmp_path, ids):
    (tmp_path / "vocabulary").mkdir()
    file = tmp_path / "vocabulary" / "users.parquet"

    def digest(ids, rows=(1, 2, 3), **layout):
        pq.write_table(pa.table({"row": pa.array(rows, layout.pop("type", pa.int32())), "id": ids}), file, **layout)
        return vocabulary_digest(tmp_path, "users")

    whole = digest(ids)
    assert digest(ids, row_group_size=1, compression="zstd") == whole
    assert digest(ids, type=pa.int64(), use_dictionary=False) == whole
    assert digest(ids[::-1]) != whole
    assert digest(ids, rows=(1, 2, 4)) != whole
    assert digest([str(each) + "x" for each in ids]) != whole


def test_the_digest_tells_where_one_text_ends_and_whether_it_is_text(tmp_path):
    (tmp_path / "vocabulary").mkdir()
    digests = set()
    for ids in (["ab", "c"], ["a", "bc"], [1, 2], ["1", "2"]):
        pq.write_table(pa.table({"row": [1, 2], "id": ids}), tmp_path / "vocabulary" / "users.parquet")
        digests.add(vocabulary_digest(tmp_path, "users"))
    assert len(digests) == 4
    with pytest.raises(ValueError, match=r"vocabulary/items.parquet: no such file"):
        vocabulary_digest(tmp_path, "items")
    pq.write_table(pa.table({"row": [1, 2], "id": ["a", None]}), tmp_path / "vocabulary" / "users.parquet")
    with pytest.raises(ValueError, match="has nulls"):
        vocabulary_digest(tmp_path, "users")
