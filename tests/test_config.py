from pathlib import Path

import pytest

from msr_dist.config import Config, component, dump, load, merge, parse


class Inner(Config):
    lr: float = 0.1
    widths: tuple[int, ...] = (8, 4)


class Outer(Config):
    name: str
    inner: Inner = Inner()
    by_name: dict[str, Inner] = {}
    model: component("msr_dist.models") = None
    path: Path = Path("a")


def fault(raw) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        parse(Outer, raw, where="run.toml")
    return str(caught.value)


def test_what_is_dumped_is_what_is_read(tmp_path):
    config = parse(Outer, {"name": "x", "inner": {"widths": [2]}, "model": {"kind": "star"}, "path": "b/c"}, "here")
    (tmp_path / "run.toml").write_text(dump(config))
    assert load(Outer, tmp_path / "run.toml") == config


def test_the_kind_chooses_the_class():
    model = parse(Outer, {"name": "x", "model": {"kind": "mmoe", "experts": 7}}, "here").model
    assert type(model).__module__ == "msr_dist.models.mmoe"
    assert model.experts == 7


def test_a_misspelt_key_names_its_place_and_its_neighbour():
    assert fault({"name": "x", "inner": {"widhts": [1]}}) == (
        "run.toml: inner.widhts: unknown key; did you mean 'widths'?"
    )
    assert fault({"name": "x", "by_name": {"t": {"lrr": 1}}}) == (
        "run.toml: by_name.t.lrr: unknown key; did you mean 'lr'?"
    )
    assert "run.toml: model.expertz: unknown key; did you mean 'experts'?" in fault(
        {"name": "x", "model": {"kind": "mmoe", "expertz": 3}}
    )
    assert fault({"naem": "x", "name": "y"}) == "run.toml: naem: unknown key; did you mean 'name'?"


@pytest.mark.parametrize("value", ["0.1", True, None, [0.1]])
def test_a_wrong_type_shows_the_value(value):
    message = fault({"name": "x", "inner": {"lr": value}})
    assert message.startswith("run.toml: inner.lr: ")
    assert repr(value) in message


def test_every_fault_has_its_line():
    assert len(fault({"inner": {"lr": "a", "widths": "b"}}).splitlines()) == 3


def test_an_unknown_kind_lists_what_there_is():
    assert "did you mean 'star'?" in fault({"name": "x", "model": {"kind": "sta"}})
    message = fault({"name": "x", "model": {"kind": "zzz"}})
    assert "shared_bottom" in message
    assert "layers" not in message
    assert "unknown kind '.star'" in fault({"name": "x", "model": {"kind": ".star"}})
    assert "is no component" in fault({"name": "x", "model": {"kind": "layers"}})
    assert "needs a kind" in fault({"name": "x", "model": {"experts": 3}})


def test_a_kind_from_outside_of_the_package(tmp_path, monkeypatch):
    (tmp_path / "my_model.py").write_text(
        "from msr_dist.models import mlp\nclass Config(mlp.Config):\n    kind: str\n    extra: int = 1\n"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "my_model.py").rename(tmp_path / "mine" / "model.py")
    monkeypatch.syspath_prepend(tmp_path)
    model = parse(Outer, {"name": "x", "model": {"kind": "mine.model", "extra": 5}}, "here").model
    assert model.extra == 5


def test_overrides_are_toml_values_or_else_strings():
    merged = merge(
        {"inner": {"lr": 1.0}}, ["inner.lr=0.5", "inner.widths=[1,2]", "name=abc", "path=a/b.zip", "new.x=true"]
    )
    assert merged == {
        "inner": {"lr": 0.5, "widths": [1, 2]},
        "name": "abc",
        "path": "a/b.zip",
        "new": {"x": True},
    }


def test_overrides_reach_into_lists_of_sections():
    raw = {"stages": [{"epochs": 1}]}
    assert merge(raw, ["stages.0.epochs=3", "stages.1.epochs=2"]) == {"stages": [{"epochs": 3}, {"epochs": 2}]}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("lr", "KEY=VALUE"),
        ("name.x=1", "name is a value, not a section"),
        ("stages.5.epochs=1", r"stages\.5 is a value, not a section"),
        ("stages.0=1", r"such as stages\.0\.KEY=VALUE"),
    ],
)
def test_a_bad_override(override, says):
    with pytest.raises(ValueError, match=says):
        merge({"name": "x", "stages": [{}]}, [override])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load(Outer, tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(ValueError, match=r"bad\.toml: not valid TOML"):
        load(Outer, tmp_path / "bad.toml")
    with pytest.raises(ValueError, match="cannot be read"):
        load(Outer, tmp_path)
