import tomllib
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msr_dist.cli import main
from msr_dist.config import parse
from msr_dist.data import prepare
from msr_dist.data.prepare.table import Config
from msr_dist.data.prepare.write import LEAST_GROUPS, Compression, group_bounds, regroup, write_split


@pytest.mark.parametrize("rows", [0, 1, 95, 96, 97, 10_000, 1_000_003])
def test_row_groups_are_even_enough_and_many_enough(rows: int) -> None:
    bounds = group_bounds(rows, 1000)
    sizes = [end - begin for begin, end in pairwise(bounds)]
    assert sum(sizes) == rows
    assert len(sizes) >= min(rows, LEAST_GROUPS)
    assert all(0 < size <= 1000 for size in sizes)
    assert not sizes or max(sizes) - min(sizes) <= 1


def batches(*sizes: int) -> list[pa.RecordBatch]:
    begin, made = 0, []
    for size in sizes:
        made.append(pa.record_batch({"x": pa.array(range(begin, begin + size), pa.int64())}))
        begin += size
    return made


def test_regroup_keeps_order_over_any_batches() -> None:
    tables = list(regroup(batches(5, 0, 1, 14, 2), [7, 7, 8]))
    assert [table.num_rows for table in tables] == [7, 7, 8]
    assert pa.concat_tables(tables)["x"].to_pylist() == list(range(22))


def test_too_few_and_too_many_rows_are_errors(tmp_path: Path) -> None:
    schema = pa.schema({"x": pa.int64()})
    for place, (held, counted) in enumerate(((5, 6), (6, 5))):
        with pytest.raises(AssertionError, match="rows than"):
            write_split(tmp_path / str(place), schema, batches(held), counted, 10, 10)


@pytest.mark.parametrize(("compression", "codec"), [("lz4", "LZ4"), ("zstd", "ZSTD")])
def test_files_are_compressed_as_asked(tmp_path: Path, compression: Compression, codec: str) -> None:
    write_split(tmp_path / "train", pa.schema({"x": pa.int64()}), batches(9), 9, 10, 10, compression=compression)
    written = pq.read_metadata(tmp_path / "train" / "part-00000.parquet")
    assert written.row_group(0).column(0).compression == codec


def test_an_empty_split_is_one_file(tmp_path: Path) -> None:
    write_split(tmp_path / "test", pa.schema({"x": pa.int64()}), [], 0, 10, 10)
    assert pq.read_table(tmp_path / "test").num_rows == 0


def test_the_help_names_every_source(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    named = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    folder = Path(prepare.__path__[0])
    assert named >= {file.stem for file in folder.glob("*.py") if "\nclass Config(" in file.read_text()}


def test_the_commented_settings_of_the_example_are_right() -> None:
    lines = (Path(__file__).parents[3] / "jobs/configs/prepare-table.toml").read_text()
    for key in ("keep", "valid_from", "test_from"):
        assert f"# {key} = " in lines
        lines = lines.replace(f"# {key} = ", f"{key} = ")
    config = parse(Config, tomllib.loads(lines), "test")
    assert config.keep
    assert config.split.valid_from
