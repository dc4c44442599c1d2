import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import canonical
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


def some_rows(rows: int) -> list[pa.RecordBatch]:
    return canonical.table(rows).to_batches(max_chunksize=4)


def test_too_few_and_too_many_rows_are_errors(tmp_path: Path) -> None:
    for place, (held, counted) in enumerate(((5, 6), (6, 5))):
        with pytest.raises(AssertionError, match="rows than"):
            write_split(tmp_path / str(place), canonical.schema(), some_rows(held), counted, 10, 10)


@pytest.mark.parametrize(("compression", "codec"), [("lz4", "LZ4"), ("zstd", "ZSTD")])
def test_files_are_compressed_as_asked(tmp_path: Path, compression: Compression, codec: str) -> None:
    write_split(tmp_path / "train", canonical.schema(), some_rows(9), 9, 10, 10, compression=compression)
    written = pq.read_metadata(tmp_path / "train" / "part-00000.parquet")
    assert written.row_group(0).column(0).compression == codec


@pytest.mark.parametrize("change", [{}, {"rows": 4097}, {"rows": 4097, "vocabulary": "open"}])
def test_ids_are_encoded_by_how_often_they_come_again(tmp_path: Path, change: dict[str, Any]) -> None:
    schema = canonical.schema()
    schema = schema.with_tables({"items": schema.table("items").model_copy(update=change)})
    write_split(tmp_path / "train", schema, some_rows(20), 20, 10, 10)
    group = pq.read_metadata(tmp_path / "train" / "part-00000.parquet").row_group(0)
    encodings = {group.column(n).path_in_schema: group.column(n).encodings for n in range(group.num_columns)}
    wide = {"history.list.element", "item"} if change == {"rows": 4097} else set()
    assert {name for name, used in encodings.items() if "BYTE_STREAM_SPLIT" in used} == wide
    assert {name for name, used in encodings.items() if "RLE_DICTIONARY" not in used} >= wide
    held = pq.read_table(tmp_path / "train")
    assert held.to_pylist() == canonical.table(20).select(held.column_names).to_pylist()
    assert not any(field.nullable for field in held.schema)


def test_a_null_is_an_error(tmp_path: Path) -> None:
    rows = canonical.table(9)
    rows = rows.set_column(rows.column_names.index("item"), "item", pa.array([1] * 8 + [None], pa.int64()))
    with pytest.raises(ValueError, match="item"):
        write_split(tmp_path / "train", canonical.schema(), rows.to_batches(), 9, 10, 10)


def test_an_empty_split_is_one_file(tmp_path: Path) -> None:
    write_split(tmp_path / "test", canonical.schema(), [], 0, 10, 10)
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
