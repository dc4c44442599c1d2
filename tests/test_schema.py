import pytest

import canonical
from msr_dist.schema import FeatureSchema


def changed(**changes) -> dict:
    return canonical.schema().model_dump(mode="json") | changes


def test_the_file_gives_back_the_schema(tmp_path):
    canonical.schema().save(tmp_path)
    assert FeatureSchema.read(tmp_path) == canonical.schema()


def test_group_widths_follow_the_schema():
    assert canonical.schema().group_widths() == {"user": 16, "item": 13}


def test_columns_are_all_that_is_read():
    assert canonical.schema().columns() == [
        "user", "history", "item", "tags", "price", "click", "buy", "buy_known", "buy_weight", "scenario",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"user": "nobody"}, "'nobody' stands as user or item"),
        ({"item": "tags"}, "'tags' stands as user or item"),
        ({"scenarios": [{"id": 1, "name": "a"}]}, "ids must run 0, 1, 2"),
        ({"scenarios": [{"id": 0, "name": "a"}, {"id": 1, "name": "a"}]}, "a occurs twice"),
        ({"labels": []}, "labels"),
        ({"tables": [{"name": "users", "rows": 3, "width": 6}]}, "width"),
        ({"tables": [{"name": "users", "rows": 3}]}, "there is no table 'items'"),
        ({"scenario": "user"}, "user occurs twice"),
        ({"knowledge": {"folder": "x", "width": 8, "scenarios": [[1.0]]}}, "knowledge: belongs to a run"),
    ],
)
def test_what_does_not_fit_together(tmp_path, changes, says):
    import tomli_w

    raw = {key: value for key, value in changed(**changes).items() if value is not None}
    raw = _without_none(raw)
    (tmp_path / "schema.toml").write_text(tomli_w.dumps(raw))
    with pytest.raises(ValueError, match=says):
        FeatureSchema.read(tmp_path)


def test_no_schema_at_all(tmp_path):
    with pytest.raises(ValueError, match="msr-dist prepare"):
        FeatureSchema.read(tmp_path)


def _without_none(value):
    if isinstance(value, dict):
        return {key: _without_none(below) for key, below in value.items() if below is not None}
    return [_without_none(below) for below in value] if isinstance(value, list) else value
