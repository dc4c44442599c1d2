import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import buckets
import canonical
from msr_dist.config import dump, load, parse
from msr_dist.data.parquet import Lists, ParquetSource
from msr_dist.data.places import Remote, here, place
from msr_dist.extract import ExtractConfig
from msr_dist.run import RunConfig
from msr_dist.schema import FeatureSchema

MODEL = {"kind": "mlp", "widths": [4]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return canonical.write(tmp_path_factory.mktemp("data"), rows=600, groups=12)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("data/ml-1m", Path("data/ml-1m")),
        ("/data/a b", Path("/data/a b")),
        ("file:///data/a%20b", Path("/data/a b")),
        ("s3://bucket", Remote("s3", "bucket")),
        ("s3://bucket/a//b/", Remote("s3", "bucket/a/b")),
        ("s3://bucket/day=1/a%20b c", Remote("s3", "bucket/day=1/a%20b c")),
        ("gs://bucket/a", Remote("gs", "bucket/a")),
    ],
)
def test_a_setting_names_a_place(given, expected):
    assert place(given) == expected
    assert place(str(expected)) == place(expected) == expected


@pytest.mark.parametrize(
    "given",
    [
        "s3://key:hidden@bucket/a",
        "s3://hidden@bucket/a",
        "s3://bucket/a?access_key=key&secret_key=hidden",
        "s3://bucket/a#hidden",
        "s3://hidden:9000/bucket",
        "s3://",
        "s3:///hidden",
        "http://key:hidden@host/a",
        "file://hidden/a",
        7,
    ],
)
def test_a_setting_that_names_none_is_not_repeated(given):
    with pytest.raises(ValueError, match="expected a folder") as caught:
        parse(RunConfig, {"name": "a", "data": given, "model": MODEL}, where="run.toml")
    assert str(caught.value).startswith("run.toml: data: ")
    assert "hidden" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configuration_with_remote_data_is_read_as_it_was_written(tmp_path):
    run = parse(RunConfig, {"name": "a", "data": "s3://bucket/a", "model": MODEL}, where="run.toml")
    assert run.absolute().data == run.data == Remote("s3", "bucket/a")
    (tmp_path / "config.toml").write_text(dump(run))
    assert load(RunConfig, tmp_path / "config.toml") == run
    assert 'data = "s3://bucket/a"' in (tmp_path / "config.toml").read_text()


def test_what_needs_files_here_says_so_at_once(tmp_path):
    remote = {"name": "a", "data": "s3://bucket/a", "model": MODEL}
    for change, says in (
        ({"model": {"kind": "two_tower"}}, "data: model.kind 'two_tower' needs them in a folder"),
        ({"knowledge": {"store": "knowledge/a"}}, "data: knowledge needs them in a folder"),
        ({"runs": "s3://bucket/runs"}, "runs: expected a folder of a file system, not s3://"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            parse(RunConfig, remote | change, where="run.toml")
    with pytest.raises(ValueError, match=r"data: expected a folder of a file system, not gs://"):
        parse(ExtractConfig, {"data": "gs://b/a", "out": "out", "model": {"name": "m"}}, where="extract.toml")
    assert here(tmp_path) == tmp_path


def as_lists(columns) -> dict[str, list]:
    return {
        name: [part.tolist() for part in (column if isinstance(column, Lists) else [column])]
        for name, column in columns.items()
    }


def test_a_bucket_is_read_as_a_folder_is(reached, folder):
    remote, schema = place(reached.upload(folder, "same")), canonical.schema()
    assert FeatureSchema.read(remote) == FeatureSchema.read(folder) == schema
    assert [(each.is_file(), (folder / "x").is_file()) for each in (remote / "train", remote / "x")] == [
        (False,) * 2
    ] * 2
    there, local = ParquetSource(remote / "train", schema), ParquetSource(folder / "train", schema)
    assert [str(group) for group in there.row_groups] == [
        str(group).replace(str(folder), str(remote)) for group in local.row_groups
    ]
    for group in range(len(local.row_groups)):
        assert as_lists(there.read(group)) == as_lists(local.read(group))


def test_a_footer_and_a_row_group_take_one_request_each(reached, folder):
    uri = reached.upload(folder, "counted")
    source = ParquetSource(place(uri) / "train", canonical.schema())
    files = sorted({str(group.file) for group in source.row_groups})
    groups = [sum(str(group.file) == file for group in source.row_groups) for file in files]
    assert groups == [2, 10]
    assert [reached.requests(file) for file in files] == [["HEAD", "GET"]] * 2
    for group in range(12):
        source.read(group)
    assert [reached.requests(file)[2:] for file in files] == [["GET"] * 2, ["GET"] * 10]


def test_a_damaged_object_is_named(reached, folder):
    uri, schema = reached.upload(folder, "damaged"), canonical.schema()
    file = "train/part-00001.parquet"
    whole = (folder / file).read_bytes()
    reached.replace(f"{uri}/{file}", whole[:-100])
    with pytest.raises(ValueError, match=rf"^{uri}/{file}: not a readable parquet file.*prepare the data again"):
        ParquetSource(place(uri) / "train", schema)
    first = pq.read_metadata(folder / file).row_group(0).column(0)
    end = first.dictionary_page_offset + first.total_compressed_size
    reached.replace(f"{uri}/{file}", whole[:4] + b"\xff" * (end - 4) + whole[end:])
    source = ParquetSource(place(uri) / "train", schema)
    with pytest.raises(ValueError, match=rf"^{uri}/{file}, row group 0: cannot be read, the file is damaged"):
        source.read(2)


def test_a_store_that_fails_is_no_damage(reached, folder):
    """It is no ValueError, for which a run would not be started again."""
    uri, schema = reached.upload(folder, "lost"), canonical.schema()
    source = ParquetSource(place(uri) / "train", schema)
    reached.remove(f"{uri}/train/part-00001.parquet")
    with pytest.raises(OSError, match=rf"^{uri}/train/part-00001.parquet, row group 9: .*AWS Error") as caught:
        source.read(11)
    assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match=r"^s3://nowhere/a: .*NO_SUCH_BUCKET.*look at the bucket's name"):
        FeatureSchema.read(place("s3://nowhere/a"))
    with pytest.raises(ValueError, match=rf"^s3://{buckets.BUCKET}/absent: no schema.toml there; make the data"):
        FeatureSchema.read(place(f"s3://{buckets.BUCKET}/absent"))
    with pytest.raises(ValueError, match=rf"^{uri}/absent: no parquet files there"):
        ParquetSource(place(uri) / "absent", schema)


def test_wrong_credentials_are_told_and_not_shown(reached, folder):
    data = place(reached.upload(folder, "guarded"))
    with reached.suspicious(), pytest.raises(OSError, match=r"INVALID_ACCESS_KEY_ID.*AWS_SECRET_ACCESS_KEY") as caught:
        FeatureSchema.read(data)
    assert str(caught.value).startswith(f"{data}: ")
    assert buckets.SECRET not in str(caught.value)
    assert FeatureSchema.read(data) == canonical.schema()


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("reached")
def test_nobody_waits_for_minutes_for_a_store_that_is_not_there(monkeypatch):
    # Its port is taken by nobody: the lowest is reserved.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(OSError, match=r"^s3://unreachable/a: .*Could not connect.*AWS_ENDPOINT_URL") as caught:
        FeatureSchema.read(place("s3://unreachable/a"))
    assert buckets.SECRET not in str(caught.value)
