"""The whole story on planted data and a language model of a few thousand weights, broken off and gone on with."""

import json
import tomllib
from pathlib import Path

import pytest
import tomli_w

import tinymodel
from msr_dist.config import load
from msr_dist.pipeline import RECORD_FILE, PipelineConfig, is_prepared, pipeline

QUICKSTART = Path(__file__).parents[1] / "jobs/configs/pipeline-quickstart.toml"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tinymodel.llama(tmp_path_factory.mktemp("model"))


def write_config(folder: Path, model: Path) -> Path:
    """A file for a run of two epochs on 2,400 rows."""
    raw = {
        "data": str(folder / "data"),
        "store": str(folder / "store"),
        "prepare": {"kind": "synthetic", "rows": 3000, "users": 60, "items": 40, "scenarios": 3},
        "extract": {
            "users_per_shard": 20,
            "history": {"per_scenario": 2},
            "prompts": {"user_tokens": 900},
            "model": {"name": str(model), "dtype": "fp32", "device": "cpu", "max_tokens": 2000},
            "compress": {"width": 8},
        },
        "train": {
            "name": "run",
            "runs": str(folder / "runs"),
            "loader": {"batch_size": 240},
            "model": {"kind": "llm4msr", "backbone": {"kind": "mlp", "widths": [8]}},
            "stages": [{"epochs": 2}],
            "tracking": {"enabled": False},
        },
    }
    file = folder / "pipeline.toml"
    file.write_text(tomli_w.dumps(raw))
    return file


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """Another value for each file that has been written again; the extraction's notes of itself are not told."""
    files = [
        *folder.glob("data/**/*"),
        *folder.glob("store/users/*"),
        *folder.glob("store/pca-*/*"),
        *folder.glob("runs/run/checkpoints/*/*"),
        *folder.glob("runs/run/metrics*"),
    ]
    return {str(file): (file.stat().st_ino, file.stat().st_mtime_ns) for file in files if file.is_file()}


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_done_is_not_done_again_and_what_was_done_otherwise_is_refused(tmp_path, model, caplog):
    file = write_config(tmp_path, model)
    run = pipeline(load(PipelineConfig, file), workers=2)
    assert run.knowledge.store == tmp_path / "store"
    assert run.knowledge.width == 8
    made = written(tmp_path)
    assert {"metrics.json", "metrics-valid.json"} <= {Path(name).name for name in made}

    caplog.set_level("INFO")
    pipeline(load(PipelineConfig, file), workers=2)
    assert written(tmp_path) == made
    assert "prepare: done before" in caplog.text
    assert "train: done before" in caplog.text

    for setting, says in {
        "prepare.seed=1": "run holds a run on data that were prepared with other settings",
        "extract.history.per_scenario=1": "store holds vectors made with history.per_scenario = 2, not 1",
        "train.seed=1": "run holds a run with seed = 0, not 1",
    }.items():
        with pytest.raises(ValueError, match=says):
            pipeline(load(PipelineConfig, file, [setting]), workers=2)
    assert written(tmp_path) == made

    # What the record does not know is done again, and nothing else.
    record = tmp_path / "runs/run" / RECORD_FILE
    known = json.loads(record.read_text())
    del known["judged"]["valid"]
    record.write_text(json.dumps(known))
    pipeline(load(PipelineConfig, file, ["prepare.overwrite=true"]), workers=2)
    assert {Path(name).name for name, told in written(tmp_path).items() if told != made[name]} == {"metrics-valid.json"}

    # The run would go on with other data, for all that they have as many rows.
    made = written(tmp_path)
    with pytest.raises(ValueError, match="run holds a run on data that were prepared with other settings"):
        pipeline(load(PipelineConfig, file, ["prepare.seed=1", "prepare.overwrite=true"]), workers=2)
    assert written(tmp_path) == made


def test_data_are_known_by_the_settings_that_decide_them(tmp_path):
    from msr_dist.data.prepare.canonical import prepare
    from msr_dist.data.prepare.synthetic import Config

    source, out = Config(rows=300, users=20, items=20, scenarios=2), tmp_path / "data"
    assert not is_prepared(source, out)
    prepare(source, out)
    assert is_prepared(source.model_copy(update={"threads": 1, "memory_limit": "1GB"}), out)
    assert not is_prepared(source.model_copy(update={"overwrite": True}), out)
    with pytest.raises(ValueError, match=r"prepared with rows = 300, not 400"):
        is_prepared(source.model_copy(update={"rows": 400}), out)


def test_folders_stand_in_one_place(tmp_path, model):
    file = write_config(tmp_path, model)
    config = load(PipelineConfig, file, ["data=elsewhere"])
    assert config.extract.data == config.train.data == Path("elsewhere")
    assert config.absolute().train.data == Path.cwd() / "elsewhere"
    assert config.absolute().extract.out == tmp_path / "store"


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("train.data=other", "train: data: 'other', but the other sections say"),
        ("extract.out=other", "extract: out: 'other', but the other sections say"),
        ("train.knowledge.width=16", "train: knowledge.width: 16, but the other sections say 8"),
        ("train.sede=3", "train.sede: unknown key; did you mean 'seed'?"),
        ("prepare.rwos=3", "prepare.rwos: unknown key; did you mean 'rows'?"),
        ("prepare.kind=movielnes", "prepare: unknown kind 'movielnes'; did you mean 'movielens'?"),
        ("train.model={kind='star'}", "'star' does not read what the extraction would make"),
        ("evaluate=['tset']", "evaluate.0: "),
    ],
)
def test_a_wrong_setting_gets_one_line(tmp_path, model, setting, says):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        load(PipelineConfig, write_config(tmp_path, model), [setting])
    assert says in str(error.value)


def test_store_and_extraction_come_together(tmp_path, model):
    raw = tomllib.loads(write_config(tmp_path, model).read_text())
    for lacking in ("store", "extract"):
        file = tmp_path / f"without-{lacking}.toml"
        file.write_text(tomli_w.dumps({key: value for key, value in raw.items() if key != lacking}))
        with pytest.raises(ValueError, match=r"give both, or neither|out: Field required"):
            load(PipelineConfig, file)


@pytest.mark.parametrize("file", sorted(QUICKSTART.parent.glob("pipeline-*.toml")), ids=lambda file: file.stem)
def test_the_shipped_files_are_right(file):
    config = load(PipelineConfig, file)
    assert config.train.knowledge.store == config.store
