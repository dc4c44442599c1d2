import sys
from pathlib import Path

import pytest
import tomli_w

import command
import texts
import tinymodel
from msr_dist.cli import main
from msr_dist.llm.vectors import open_store, open_table

EXTRACT_JOB = [sys.executable, str(Path(__file__).parents[1] / "jobs" / "extract.py")]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepared data and a model."""
    folder = tmp_path_factory.mktemp("prepared")
    return texts.write(folder / "data"), tinymodel.llama(folder / "model")


@pytest.fixture
def toml(tmp_path, prepared):
    data, model = prepared
    raw = {
        "data": str(data),
        "out": str(tmp_path / "store"),
        "users_per_shard": 16,
        "model": {"name": str(model), "dtype": "fp32", "max_tokens": 2000},
        "prompts": {"user_tokens": 2000},
        "compress": {"width": 4},
    }
    file = tmp_path / "extract.toml"
    file.write_text(tomli_w.dumps(raw))
    return file


def done(*words) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == 0


def refused(capsys, *words) -> str:
    """The one line that a wrong call gets, with status 2."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    errors = capsys.readouterr().err
    assert end.value.code == 2, errors
    # Beside what the log says of the work before.
    told = [line for line in errors.splitlines() if line.startswith("msr-dist: ")]
    assert len(told) == 1, errors
    assert "Traceback" not in errors
    return told[0]


@pytest.mark.parametrize("name", ["extract", "compress", "prompts"])
def test_every_command_shows_an_example(name, capsys):
    done(name, "--help")
    assert f"msr-dist {name} " in capsys.readouterr().out.split("Examples:")[1]


def test_extract_then_compress(tmp_path, toml):
    called = command.call("extract", toml, "compress.width=6")
    assert called.returncode == 0, called.stderr
    assert "extract: user 38/38 (100%), users/s" in called.stderr
    assert "Traceback" not in called.stderr
    assert "users with a vector" in called.stdout
    assert f"vectors  {tmp_path}/store\n" in called.stdout
    assert "knowledge.store=" in called.stdout
    assert open_table(open_store(tmp_path / "store"), 6).manifest.precision == "fp16"


def test_compress_says_what_it_keeps(tmp_path, toml, capsys):
    done("extract", toml)
    capsys.readouterr()
    done("compress", tmp_path / "store", "--width", 9, "--precision", "int8", "--no-whiten")
    printed = capsys.readouterr().out
    assert f"made: {tmp_path}/store/pca-9, 38 users" in printed
    assert "% of the variance, as 38 users have it" in printed
    assert open_table(open_store(tmp_path / "store"), 9).manifest.precision == "int8"
    done("compress", tmp_path / "store", "--width", 9, "--precision", "int8", "--no-whiten")
    assert "was there already: " in capsys.readouterr().out
    assert "the largest possible is 16" in refused(capsys, "compress", tmp_path / "store", "--width", 17)
    assert "no vectors of a language model there" in refused(capsys, "compress", tmp_path)


def test_prompts_are_printed_and_nothing_is_written(tmp_path, toml, prepared, capsys):
    (prepared[1] / "model.safetensors").rename(tmp_path / "hidden")
    try:
        done("prompts", toml)
    finally:
        (tmp_path / "hidden").rename(prepared[1] / "model.safetensors")
    printed = capsys.readouterr().out
    assert printed.count("== scenario ") == 3
    assert printed.count("== user ") == 1
    done("prompts", toml, "--user", texts.user_id(5))
    printed = capsys.readouterr().out
    assert printed.startswith(f"== user {texts.user_id(5)} (row 5): ")
    shared, own = printed.split("-- its own part: ")
    assert "home: People open the front page" in shared
    assert "\nhome: " in own
    done("prompts", toml, "--scenario", "tonight")
    assert capsys.readouterr().out.count("== ") == 1
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["extract", "prompts"])
@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.nmae='x'", "model.nmae: unknown key; did you mean 'name'?"),
        ("data=/nowhere", "/nowhere: no schema.toml there; make the data with `msr-dist prepare`"),
        ("model.name=/nowhere", "model '/nowhere': no such file or folder"),
        ("model.name='package:nobody/x'", "the package 'nobody' is not installed"),
        ("users_per_shard=0", "users_per_shard: Input should be greater than or equal to 1 (got 0)"),
        ("model.batch_tokens=0", "model.batch_tokens: Input should be greater than or equal to 1 (got 0)"),
        ("history.per_scenario=0", "per_scenario 0 leaves prompts empty: give earlier"),
        ("history.label=liked", "history.label: there is no label 'liked'; "),
        ("history.item_text=['titel']", "no column 'titel' in "),
        ("prompts.user_template=/nowhere.txt", "/nowhere.txt (prompts.user_template): cannot be read"),
        ("prompts.user_tokens=3000", "prompts.user_tokens 3000 lets prompts become longer than model.max_tokens 2000"),
    ],
)
def test_a_wrong_setting_gets_one_line(tmp_path, toml, capsys, name, override, says):
    assert says in refused(capsys, name, toml, override)
    assert not (tmp_path / "store/users").exists()


@pytest.mark.parametrize("name", ["extract", "prompts"])
def test_a_misspelt_placeholder_gets_one_line(tmp_path, toml, capsys, name):
    (tmp_path / "mine.txt").write_text("In {number} scenarios:\n{scenarios}\n\n{usr}\n")
    says = refused(capsys, name, toml, f"prompts.user_template={tmp_path}/mine.txt")
    assert "unknown placeholder {usr}; there are {number}, {scenarios}, {user}" in says


def test_who_is_not_there_gets_one_line(toml, capsys):
    assert "there is no user '31415'" in refused(capsys, "prompts", toml, "--user", "31415")
    assert "no scenario 'hoem'" in refused(capsys, "prompts", toml, "--scenario", "hoem")
    assert "has no events" in refused(capsys, "prompts", toml, "--user", texts.user_id(40))
    assert "has no prompt" in refused(capsys, "prompts", toml, "--user", texts.user_id(5), "prompts.user_tokens=50")


def test_a_model_that_cannot_be_loaded_gets_one_line(tmp_path, toml, capsys):
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capsys, "extract", toml, f"model.name={tmp_path}/empty")
    assert "layer 7" in refused(capsys, "extract", toml, "model.layer=7")


def test_extract_is_no_matter_for_torchrun(toml, capsys, monkeypatch):
    for variable, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(variable, value)
    assert "call it without torchrun" in refused(capsys, "extract", toml)


@pytest.mark.usefixtures("ray_cluster")
def test_a_job_of_a_cluster(tmp_path, toml, monkeypatch):
    import ray

    # As for a job that is submitted.
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    called = command.call(toml, "--workers", 1, launched_by=EXTRACT_JOB)
    assert called.returncode == 0, called.stderr
    assert "users with a vector" in called.stdout
    assert open_store(tmp_path / "store").manifest.users == 38
    called = command.call(toml, "model.layers=3", launched_by=EXTRACT_JOB)
    assert called.returncode == 2
    assert called.stderr.startswith("extract: ")
    assert called.stderr.count("\n") == 1
