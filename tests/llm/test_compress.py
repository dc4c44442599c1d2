import json
import logging
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from msr_dist.llm import compress as module
from msr_dist.llm.compress import Projection, compress
from msr_dist.llm.vectors import MANIFEST_FILE, Provenance, RowVectors, StoreWriter, open_store, open_table
from msr_dist.noise import uniform

USERS, WIDTH, RANK, SHARDS = 600, 24, 6, 4
PROVENANCE = Provenance(
    model={"name": "tiny"},
    fingerprint="f0",
    templates="t0",
    pooling="mean_own",
    layer=-1,
    cutoff=None,
    item_text=(),
    data="data/small",
    table="users",
    vocabulary="v0",
)


def planted(noise: float = 0.02) -> np.ndarray:
    """A few directions of unlike strength, noise, a large common mean, one huge and one constant dimension."""
    rng = np.random.default_rng(0)
    strength = np.array([8, 5, 3, 2, 1.5, 1])
    values = (rng.normal(size=(USERS, RANK)) * strength) @ rng.normal(size=(RANK, WIDTH))
    values += noise * rng.normal(size=values.shape) + 5
    values[:, 4] *= 50
    values[:, 7] = 0.1
    return values.astype(np.float16)


def rows(users: int = USERS) -> np.ndarray:
    """Every third row."""
    return 1 + 3 * np.arange(users, dtype=np.int64)


def make(folder, vectors: np.ndarray, shards: int = SHARDS, scenario: np.ndarray | None = None):
    writer = StoreWriter(folder, "stamp", vectors.shape[1])
    for number, places in enumerate(np.array_split(np.arange(len(vectors)), shards)):
        mine = rows(len(vectors))[places]
        prompts = [int(place).to_bytes(16, "big") for place in places]
        given = vectors[places].astype(np.float32)
        writer.write_shard(number, mine, pa.array(mine), prompts, given, [None] * len(places))
    scenario = vectors[0] if scenario is None else scenario
    writer.write_scenarios(["a"], ["x"], scenario[None].astype(np.float32))
    writer.finish(PROVENANCE, shards)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made") / "store", planted())


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made, tmp_path / "store")


@pytest.fixture
def small_files(monkeypatch):
    """Row groups of 16 and files of 64 rows."""
    monkeypatch.setattr(module, "_GROUP_ROWS", 16)
    monkeypatch.setattr(module, "_FILE_GROUPS", 4)


def normalised() -> np.ndarray:
    values = planted().astype(np.float64)
    std = values.std(axis=0)
    return (values - values.mean(axis=0)) / np.where(std == 0, 1, std)


def read(folder) -> np.ndarray:
    """The vectors of all users."""
    table = RowVectors(folder)
    vectors, known = table.read(0, table.rows)
    assert np.flatnonzero(known).tolist() == rows().tolist()
    assert not vectors[~known].any()
    return vectors[known].astype(np.float64)


def contents(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_retained_variance_is_that_of_numpy(store):
    report = compress(store, RANK)
    values = np.linalg.svd(normalised(), compute_uv=False) ** 2
    np.testing.assert_allclose(report.retained, (values / values.sum())[:RANK], rtol=1e-4)
    assert report.total == pytest.approx(sum(report.retained))
    assert 0.99 < report.total < 1
    assert (report.users, report.sampled, report.made) == (USERS, USERS, True)
    assert compress(store, 2).total == pytest.approx((values / values.sum())[:2].sum(), rel=1e-4)


def test_streamed_components_are_those_of_all_vectors_at_once(store):
    compress(store, RANK, whiten=False)
    _, values, lines = np.linalg.svd(normalised(), full_matrices=False)
    expected = lines[:RANK]
    expected *= np.sign(expected[np.arange(RANK), np.abs(expected).argmax(axis=1)])[:, None]
    projection = Projection.read(store / "pca-6")
    np.testing.assert_allclose(projection.loadings, expected, atol=1e-4)
    np.testing.assert_allclose(projection.variance, values[:RANK] ** 2 / USERS, rtol=1e-4)
    np.testing.assert_allclose(read(store / "pca-6"), normalised() @ expected.T, atol=0.01)


@pytest.mark.usefixtures("small_files")
def test_neither_shards_nor_row_groups_show_in_the_table(store, tmp_path):
    compress(store, RANK)
    other = make(tmp_path / "other", planted(), shards=1)
    compress(other, RANK)
    np.testing.assert_allclose(read(store / "pca-6"), read(other / "pca-6"), atol=2e-3)
    files = RowVectors(other / "pca-6").manifest.files
    assert [file.rows for file in files] == [64] * 9 + [24]
    assert [(file.first, file.last) for file in files] == [
        (file.first, file.last) for file in RowVectors(store / "pca-6").manifest.files
    ]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_whitened_vectors_have_mean_0_and_covariance_1(store, precision):
    compress(store, RANK, precision=precision)
    vectors = read(store / "pca-6")
    tolerance = 2e-3 if precision == "fp16" else 0.02
    np.testing.assert_allclose(vectors.mean(axis=0), 0, atol=tolerance)
    np.testing.assert_allclose(np.cov(vectors.T, bias=True), np.eye(RANK), atol=tolerance)


def test_components_beyond_the_rank_stay_near_0(tmp_path, caplog):
    exact = np.tile(np.random.default_rng(0).integers(-2, 3, (20, 3)), (30, 4)).astype(np.float16)
    store = make(tmp_path, exact)
    report = compress(store, 8)
    assert "5 of 8 components have no variance to speak of" in caplog.text
    assert report.total == pytest.approx(1)
    vectors = read(store / "pca-8")
    np.testing.assert_allclose(vectors.std(axis=0)[:3], 1, rtol=2e-3)
    assert np.abs(vectors[:, 3:]).max() < 0.01


@pytest.mark.parametrize("whiten", [True, False])
def test_int8_errs_by_half_a_step_at_most(store, whiten):
    compress(store, RANK, whiten=whiten, precision="int8")
    table = RowVectors(store / "pca-6")
    assert pq.read_table(store / "pca-6/part-00000.parquet")["vector"].type.value_type == pa.int8()
    exact = Projection.read(store / "pca-6")(planted().astype(np.float32))
    steps = np.array(table.manifest.scales)
    np.testing.assert_allclose(steps, np.abs(exact).max(axis=0) / 127, rtol=1e-5)
    assert (np.abs(read(store / "pca-6") - exact) <= steps * 0.5001).all()


def test_a_new_user_is_projected_like_the_others(store):
    compress(store, RANK)
    again = Projection.read(store / "pca-6")(planted().astype(np.float32))
    assert np.array_equal(again.astype(np.float16), read(store / "pca-6"))


def test_a_sample_is_drawn_by_row_and_seed(store, tmp_path):
    report = compress(store, RANK, sample=200)
    assert 150 < report.sampled < 250
    other = make(tmp_path / "other", planted(), shards=3)
    assert compress(other, RANK, sample=200).sampled == report.sampled
    np.testing.assert_allclose(compress(other, RANK, sample=200).retained, report.retained, rtol=1e-9)
    differing = compress(store, RANK, sample=200, seed=1)
    assert differing.retained != report.retained
    np.testing.assert_allclose(differing.total, report.total, rtol=0.01)


def test_a_width_that_the_vectors_do_not_have_names_the_largest(store, tmp_path):
    with pytest.raises(ValueError, match=r"width 24 is more than 600 users .* the largest possible is 23"):
        compress(store, WIDTH)
    few = make(tmp_path / "few", planted()[:5], shards=1)
    with pytest.raises(ValueError, match="the largest possible is 4"):
        compress(few, 8)
    assert compress(few, 4).users == 5
    nobody = make(tmp_path / "nobody", np.full((1, WIDTH), np.nan, np.float16), shards=1, scenario=np.zeros(WIDTH))
    with pytest.raises(ValueError, match="the largest possible is 0"):
        compress(nobody, 1)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_user_beyond_fp16_is_named(tmp_path):
    """One user, whom the sample does not hold, has a dimension to itself, which whitening blows up."""
    users, share = 80_000, 0.5
    alone = int(np.flatnonzero(uniform(0, torch.tensor(rows(users)), torch.zeros(1, dtype=torch.int64)) > share)[0])
    vectors = np.random.default_rng(0).normal(size=(users, 3)).astype(np.float16)
    vectors[:, 2] = np.arange(users) == alone
    store = make(tmp_path, vectors)
    with pytest.raises(ValueError, match=rf"the vector of row {rows(users)[alone]} reaches 7.\de\+04, .* beyond fp16"):
        compress(store, 3, sample=int(users * share))
    assert compress(store, 2, sample=int(users * share)).made


def test_a_store_that_is_not_finished_cannot_be_compressed(store):
    (store / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match="not finished"):
        compress(store, RANK)


def test_the_same_table_is_kept(store):
    first = compress(store, RANK)
    before = {file: file.stat().st_mtime_ns for file in (store / "pca-6").iterdir()}
    second = compress(store, RANK)
    assert (first.made, second.made) == (True, False)
    assert second.retained == first.retained
    assert {file: file.stat().st_mtime_ns for file in (store / "pca-6").iterdir()} == before


def test_another_width_stands_beside_it(store):
    compress(store, RANK)
    compress(store, 4)
    assert read(store / "pca-4").shape == (USERS, 4)
    np.testing.assert_allclose(read(store / "pca-4"), read(store / "pca-6")[:, :4], atol=1e-5)


def test_a_table_of_other_settings_is_replaced_and_it_is_said(store, caplog):
    caplog.set_level(logging.INFO)
    compress(store, RANK)
    assert compress(store, RANK, precision="int8").made
    assert "pca-6 was made with precision 'fp16'; it is replaced" in caplog.text
    assert compress(store, RANK, precision="int8", whiten=False).made
    assert "pca-6 was made with whiten True; it is replaced" in caplog.text
    assert sorted(path.name for path in store.iterdir() if path.name.startswith("pca")) == ["pca-6"]


def test_a_table_of_other_vectors_is_told_and_replaced(store, caplog):
    caplog.set_level(logging.INFO)
    compress(store, RANK)
    open_table(open_store(store), RANK)
    make(store, planted(noise=0.3))
    with pytest.raises(ValueError, match=r"pca-6: was made from other vectors .* --width 6"):
        open_table(open_store(store), RANK)
    assert compress(store, RANK).made
    assert "pca-6 was made from other vectors; it is replaced" in caplog.text
    open_table(open_store(store), RANK)


def lose_a_file(folder):
    (folder / "part-00000.parquet").unlink()


def change_a_byte(folder):
    file = folder / "components.parquet"
    content = bytearray(file.read_bytes())
    content[99] ^= 1
    file.write_bytes(content)


def lose_the_manifest(folder):
    (folder / MANIFEST_FILE).unlink()


@pytest.mark.parametrize("harm", [lose_a_file, change_a_byte, lose_the_manifest])
def test_a_damaged_table_is_made_again(store, caplog, harm):
    compress(store, RANK)
    before = contents(store / "pca-6")
    harm(store / "pca-6")
    (store / "pca-6.partial").mkdir()
    assert compress(store, RANK).made
    assert "pca-6 is replaced" in caplog.text
    assert contents(store / "pca-6") == before


@pytest.mark.usefixtures("small_files")
def test_a_range_of_rows_is_read_from_the_files_that_hold_it(store):
    compress(store, RANK)
    whole, known = RowVectors(store / "pca-6").read(0, 3 * USERS)
    table = RowVectors(store / "pca-6")
    keep = table.manifest.files[2:4]
    for file in table.manifest.files:
        if file not in keep:
            (store / "pca-6" / file.file).unlink()
    first, last = keep[0].first, keep[1].last
    for start, count in [(first, last - first + 1), (first + 1, 1), (first + 50, 200), (last, 3)]:
        vectors, found = table.read(start, count)
        assert vectors.dtype == np.float32
        assert np.array_equal(vectors, whole[start : start + count])
        assert np.array_equal(found, known[start : start + count])
    with pytest.raises(ValueError, match=r"part-00001.parquet: cannot be read, it is absent or damaged"):
        table.read(first - 3, 2)


@pytest.mark.usefixtures("small_files")
def test_only_row_groups_of_the_range_are_read(store):
    """The third row group of a file is spoilt: what it does not hold is still read."""
    compress(store, RANK)
    file = store / "pca-6" / "part-00000.parquet"
    table = RowVectors(store / "pca-6")
    expected = table.read(0, 3 * 32)[0]
    place = pq.read_metadata(file).row_group(2).column(1).data_page_offset
    content = bytearray(file.read_bytes())
    content[place + 80] ^= 1
    file.write_bytes(content)
    assert np.array_equal(table.read(0, 3 * 32)[0], expected)
    with pytest.raises(ValueError, match=r"part-00000.parquet: cannot be read"):
        table.read(3 * 32, 3)


def test_rows_beyond_the_users_have_no_vector(store):
    compress(store, RANK)
    table = RowVectors(store / "pca-6")
    assert table.rows == 3 * (USERS - 1) + 2
    vectors, known = table.read(table.rows - 1, 4)
    assert known.tolist() == [True, False, False, False]
    assert not vectors[1:].any()
    vectors, known = table.read(table.rows + 10, 3)
    assert not known.any()
    assert vectors.shape == (3, RANK)
    assert table.read(0, 1)[1].tolist() == [False]
    assert table.read(5, 0)[0].shape == (0, RANK)


@pytest.mark.usefixtures("small_files")
def test_the_nearest_users_are_those_of_the_largest_cosine(store):
    compress(store, RANK)
    vectors = read(store / "pca-6")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors[100]
    cosines[100] = -2
    best = np.argsort(-cosines)[:5]
    found = RowVectors(store / "pca-6").nearest(int(rows()[100]), 5)
    assert [row for row, _ in found] == rows()[best].tolist()
    np.testing.assert_allclose([cosine for _, cosine in found], cosines[best], rtol=1e-3)
    assert len(RowVectors(store / "pca-6").nearest(1, USERS + 5)) == USERS - 1
    with pytest.raises(ValueError, match="row 0 has no vector"):
        RowVectors(store / "pca-6").nearest(0, 5)


def test_no_table_or_one_of_another_format(store):
    with pytest.raises(ValueError, match=r"has no vectors of width 6; make them with `msr-dist compress .* --width 6`"):
        open_table(open_store(store), RANK)
    with pytest.raises(ValueError, match="no table of vectors there"):
        RowVectors(store / "pca-6")
    compress(store, RANK)
    manifest = store / "pca-6" / MANIFEST_FILE
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 9}))
    with pytest.raises(ValueError, match="format 9"):
        RowVectors(store / "pca-6")


def test_a_projection_that_was_changed_is_not_used(store):
    compress(store, RANK)
    change_a_byte(store / "pca-6")
    with pytest.raises(ValueError, match=r"components.parquet: is damaged"):
        Projection.read(store / "pca-6")
