import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import canonical
from msr_dist.data.parquet import Lists, ParquetSource

GOOD = canonical.table(40)


def source(folder, table=GOOD, rows=10) -> ParquetSource:
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / "part-00000.parquet", row_group_size=rows)
    return ParquetSource(folder, canonical.schema())


def replaced(column: str, values, row: int = 25, kind=None) -> pa.Table:
    """GOOD with one value of `column` replaced in the third row group."""
    all_values = GOOD[column].to_pylist()
    all_values[row] = values
    kind = kind or GOOD.schema.field(column).type
    return GOOD.set_column(GOOD.schema.get_field_index(column), column, pa.array(all_values, kind))


def test_good_data_are_read_by_row_group(tmp_path):
    subject = source(tmp_path)
    assert [group.rows for group in subject.row_groups] == [10, 10, 10, 10]
    found, expected = subject.read(2), GOOD.slice(20, 10).select(canonical.schema().columns())
    assert sorted(found) == sorted(expected.column_names)
    for name, column in found.items():
        rows = np.split(column.values, np.cumsum(column.lengths)[:-1]) if isinstance(column, Lists) else column
        assert [row.tolist() for row in rows] == expected[name].to_pylist()


def test_a_row_group_without_rows(tmp_path):
    with pq.ParquetWriter(tmp_path / "part-00000.parquet", GOOD.schema) as writer:
        for rows in (GOOD.slice(0, 10), GOOD.slice(0, 0), GOOD.slice(10, 30)):
            writer.write_table(rows)
    subject = ParquetSource(tmp_path, canonical.schema())
    assert [group.rows for group in subject.row_groups] == [10, 0, 30]
    for column in subject.read(1).values():
        assert len(column.values) == len(column.lengths) == 0 if isinstance(column, Lists) else len(column) == 0


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("click", 2, "value 2, but labels run from 0 to 1"),
        ("user", None, "1 nulls"),
        ("user", -3, "value -3, but ids of table 'users' with 60 rows run from 0 to 59"),
        ("user", 60, "value 60, but ids"),
        ("history", [1, -1], "value -1"),
        ("history", [1, None], "1 nulls within lists"),
        ("history", None, "1 nulls"),
        ("scenario", 3, "value 3, but scenarios run from 0 to 2"),
        ("scenario", None, "1 nulls"),
        ("price", float("nan"), "NaN or infinite"),
        ("buy_weight", -1.0, "value -1.0, but weights"),
        ("buy_weight", float("inf"), "NaN or infinite"),
        ("buy_known", None, "1 nulls"),
    ],
)
def test_a_bad_value_names_file_row_group_and_column(tmp_path, column, value, says):
    subject = source(tmp_path, replaced(column, value))
    subject.read(1)
    with pytest.raises(ValueError, match=rf"part-00000\.parquet, row group 2, column '{column}': .*prepare") as caught:
        subject.read(2)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_column_that_is_absent(tmp_path):
    with pytest.raises(ValueError, match=r"part-00000\.parquet: column 'item' of the schema is absent"):
        source(tmp_path, GOOD.drop_columns(["item"]))


@pytest.mark.parametrize(
    ("column", "kind", "expected"),
    [
        ("user", pa.string(), "int64"),
        ("history", pa.list_(pa.float32()), "a list of integers"),
        ("price", pa.int64(), "a floating point number"),
        ("click", pa.float64(), "0 or 1 as an integer"),
        ("buy_known", pa.uint8(), "a boolean"),
    ],
)
def test_a_type_that_does_not_match_the_schema(tmp_path, column, kind, expected):
    values = {
        pa.string(): ["a"] * 40,
        pa.list_(pa.float32()): [[0.5]] * 40,
    }.get(kind, [1] * 40)
    table = GOOD.set_column(GOOD.schema.get_field_index(column), column, pa.array(values, kind))
    with pytest.raises(ValueError, match=f"column '{column}': type .*but the schema wants {expected}"):
        source(tmp_path, table)


def test_an_empty_file(tmp_path):
    with pytest.raises(ValueError, match=r"part-00000\.parquet: holds no rows"):
        source(tmp_path, GOOD.slice(0, 0))


def test_a_truncated_file(tmp_path):
    source(tmp_path)
    file = tmp_path / "part-00000.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"part-00000\.parquet: not a readable parquet file.*prepare"):
        ParquetSource(tmp_path, canonical.schema())


def test_a_file_with_a_damaged_page(tmp_path):
    source(tmp_path, rows=40)
    file = tmp_path / "part-00000.parquet"
    damaged = bytearray(file.read_bytes())
    damaged[4:400] = b"\xff" * 396
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"row group 0: cannot be read, the file is damaged"):
        ParquetSource(tmp_path, canonical.schema()).read(0)


def test_a_folder_without_files(tmp_path):
    with pytest.raises(ValueError, match="no parquet files there"):
        ParquetSource(tmp_path, canonical.schema())
