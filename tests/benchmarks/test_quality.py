"""Grids on small data through the real command."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tomli_w

import canonical
import command
import stores

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QUALITY = [sys.executable, str(BENCHMARKS / "quality.py")]


@pytest.fixture
def data(tmp_path):
    return canonical.write(tmp_path / "data", rows=3000)


def write_grid(folder: Path, **changes) -> Path:
    raw = {
        "seeds": [0, 1],
        "run": {"log_every": 2, "loader": {"batch_size": 300}, "tracking": {"enabled": False}},
        "data": [{"name": "small", "folder": str(folder / "data"), "prepare": "msr-dist prepare small"}],
    }
    file = folder / "grid.toml"
    file.write_text(tomli_w.dumps(raw | changes))
    return file


@pytest.fixture
def grid_of(monkeypatch):
    """Opens a grid in this process."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from quality_grid import Grid

    def opened(folder: Path, **changes):
        return Grid(write_grid(folder, **({"models": {"mlp": {}}} | changes)), folder / "results")

    return opened


def outcome(aucs: dict[str, float], **changes) -> dict:
    """What a run leaves, as far as the report reads it."""
    block = {"rows": 2000, "log_loss": 0.5, "calibration": 1.0, "user_auc": None}
    whole = {"overall": block | {"auc": 0.7}, "scenarios": {name: block | {"auc": auc} for name, auc in aucs.items()}}
    return whole | {"dense_parameters": 10, "samples_per_second": 1000, "commit": "abc"} | changes


def row(text: str, model: str, table: int) -> list[str]:
    """The cells of a model in the report's table of that number."""
    found = [line for line in text.splitlines() if line.startswith(f"| {model} |")]
    return [cell.strip() for cell in found[table].split("|")[2:-1]]


def flip_labels(data: Path) -> None:
    for file in (data / "train").glob("*.parquet"):
        table = pq.read_table(file)
        flipped = pc.subtract(pa.scalar(1, pa.uint8()), table["click"])
        pq.write_table(table.set_column(table.column_names.index("click"), "click", flipped), file)


def edit_schema(data: Path, old: str, new: str) -> None:
    text = (data / "schema.toml").read_text()
    assert old in text
    (data / "schema.toml").write_text(text.replace(old, new, 1))


def quality(*words, **options) -> subprocess.CompletedProcess:
    return command.call(*words, launched_by=QUALITY, **options)


def lines(folder: Path, name: str = "small.jsonl") -> list[dict]:
    file = folder / "results" / "grid" / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


SEARCH = {"trials": 2, "space": {"stages.0.dense.lr": [0.001, 0.004], "model.dropout": [0.0, 0.2]}}
MODELS = {"mlp": {"widths": [4]}, "mmoe": {"experts": 2, "widths": [4], "tower_widths": [4], "dropout": 0.1}}


def test_a_grid_from_the_search_to_the_report(tmp_path, data, grid_of):
    from quality_report import write_report

    grid, results = write_grid(tmp_path, models=MODELS, search=SEARCH), tmp_path / "results"
    # Trials must not know the test split: it is not there.
    (data / "test").rename(tmp_path / "hidden")
    done = quality("run", grid, "--local", "--only", "search", "--results", results)
    assert done.returncode == 0, done.stderr
    search = lines(tmp_path, "small-search.jsonl")
    assert [line["model"] for line in search] == ["mlp", "mlp", "mmoe", "mmoe"]
    assert [line["chosen"] for line in search[:2]] == [line["chosen"] for line in search[2:]]
    assert {line["overall"]["rows"] for line in search} == {750}
    (tmp_path / "hidden").rename(data / "test")

    done = quality("run", grid, "--workers", "2", "--results", results)
    assert done.returncode == 0, done.stderr
    assert "search: 4 of 4 runs stand already" in done.stderr
    found = lines(tmp_path)
    assert {(line["model"], line["seed"]) for line in found} == {(m, s) for m in MODELS for s in (0, 1)}
    for model in MODELS:
        trials = [line for line in search if line["model"] == model]
        best = max(trials, key=lambda line: sum(b["auc"] * b["rows"] for b in line["scenarios"].values()))
        assert {str(line["chosen"]) for line in found if line["model"] == model} == {str(best["chosen"])}
    assert found[0]["dense_parameters"] > 0
    assert found[0]["samples_per_second"] > 0
    assert found[0]["commit"]

    # A lost line is made again, and nothing else; equal to what it was.
    file = results / "grid" / "small.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]) + '{"model": "ml')
    done = quality("run", grid, "--local", "--only", "final", "--results", results)
    assert done.returncode == 0, done.stderr
    kept = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    again = kept[3]["overall"]["auc"]
    assert kept[:3] == found[:3]
    assert (len(kept), again) == (4, found[3]["overall"]["auc"])

    done = quality("report", grid, "--results", results)
    assert done.returncode == 0, done.stderr
    text = (results / "grid" / "README.md").read_text()
    assert "| mlp | 2 of 2 | 2 of 2 |" in text
    assert "- Lines left out: 1 not readable." in text
    assert re.search(r"- Commits: \w+(-dirty)? \(8 lines\)\.", text)
    assert "gain over mlp" in text
    trials = (results / "grid" / "search.md").read_text()
    assert re.search(r"\| mmoe \| .*\*\*0\.\d{4}\*\*", trials)
    plots = {plot: plot.read_bytes() for plot in (results / "grid").glob("*.svg")}
    assert {plot.stem for plot in plots} == {"small-gain", "small-speed"}
    write_report(grid_of(tmp_path, models=MODELS, search=SEARCH))
    assert all(plot.read_bytes() == before for plot, before in plots.items())


@pytest.mark.usefixtures("data")
def test_an_interrupted_grid_keeps_what_has_finished(tmp_path):
    grid = write_grid(tmp_path, models={"mlp": {}}, search={}, seeds=list(range(50)))
    words = [*QUALITY, "run", str(grid), "--local", "--results", str(tmp_path / "results")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begun = time.monotonic()
    while not lines(tmp_path):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - begun < 60
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    assert "the same command goes on" in errors
    before = lines(tmp_path)
    assert 1 <= len(before) < 50

    grid = write_grid(tmp_path, models={"mlp": {}}, search={}, seeds=list(range(len(before) + 1)))
    assert quality("run", grid, "--local", "--results", tmp_path / "results").returncode == 0
    assert lines(tmp_path)[:-1] == before
    assert [line["seed"] for line in lines(tmp_path)] == list(range(len(before) + 1))


@pytest.mark.usefixtures("data")
def test_a_run_that_fails_is_told_and_not_repeated(tmp_path):
    models = {"broken": {"kind": "mlp", "widths": [4]}, "mlp": {"widths": [4]}}
    search = {"trials": 2, "space": {"stages.0.dense.lr": [0.001, 1e30]}}
    grid = write_grid(tmp_path, models=models, search=search, seeds=[0])
    words = ("run", grid, "--local", "--results", tmp_path / "results")
    done = quality(*words)
    assert done.returncode == 1
    assert done.stderr.count("failed: small-") == 2
    assert "ValueError: stage train: the loss is nan at step" in done.stderr
    assert [line["chosen"] for line in lines(tmp_path)] == [{"stages.0.dense.lr": 0.001}] * 2

    before = lines(tmp_path, "small-search.jsonl")
    done = quality(*words)
    assert "search: 4 of 4 runs stand already" in done.stderr
    assert done.stderr.count("failed: small-") == 2
    broken = next(line for line in before if "failed" in line)
    assert f"to try again, delete its line '{broken['key']}' from" in done.stderr
    assert done.returncode == 1
    assert lines(tmp_path, "small-search.jsonl") == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "sedes: unknown key; did you mean 'seeds'?"),
        ({"models": {"starr": {}}}, "starr on small: model: unknown kind 'starr'; did you mean 'star'?"),
        ({"search": {"trials": 1, "space": {"model.dropuot": [0.1]}}}, "model.dropuot: no model of this grid has"),
        ({"search": {"trials": 1, "space": {"stages.0.dense.lr": [-1.0]}}}, "greater than 0 (got -1.0)"),
        ({"run": {"seed": 3}}, "run.seed: the grid sets it; leave it out"),
        ({"seeds": [1, 1]}, "seeds: [1, 1] names one twice"),
        (
            {"search": {"trials": 1, "space": {"evaluation.final": ["test"]}}},
            "space.evaluation.final: the space may hold keys of loader, embeddings, model, stages",
        ),
    ],
)
def test_a_wrong_grid(tmp_path, grid_of, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        grid_of(tmp_path, **({"search": {}} | changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "stands"),
    [
        (flip_labels, False),
        (lambda data: edit_schema(data, "width = 8", "width = 16"), False),
        (lambda data: edit_schema(data, 'pooling = "mean"', 'pooling = "sum"'), False),
        (lambda data: shutil.copy(data / "train/part-00000.parquet", data / "valid/part-00009.parquet"), False),
        (lambda data: edit_schema(data, 'text = ""', 'text = "the front page"'), True),
        (lambda data: shutil.rmtree(data / "test"), True),
    ],
)
def test_a_line_stands_for_its_data(tmp_path, data, grid_of, change, stands):
    grid = grid_of(tmp_path)
    (small,) = grid.config.data
    (case,) = grid.finals(small, ["mlp"], [0])
    grid.record(case, outcome({"home": 0.6}))
    change(data)
    assert ([case.key for case in grid.finals(small, ["mlp"], [0])] == list(grid.lines("small", "test"))) == stands


def cut(file: Path) -> str:
    file.write_bytes(file.read_bytes()[:-9])
    return f"{file}: not a readable parquet file"


def remove(folder: Path) -> str:
    shutil.rmtree(folder)
    return f"{folder}: no parquet files there"


@pytest.mark.parametrize(
    ("damage", "splits"),
    [
        (lambda data: cut(data / "valid/part-00000.parquet"), ["train", "valid"]),
        (lambda data: remove(data / "train"), ["train", "valid"]),
        (lambda data: remove(data / "test"), ["train", "valid", "test"]),
    ],
)
def test_damaged_data_are_named(tmp_path, data, grid_of, damage, splits):
    (small,) = grid_of(tmp_path).config.data
    message = damage(data)
    with pytest.raises(ValueError, match=re.escape(f"data set small: {message}")):
        small.require(splits)
    if splits[-1] == "test":
        small.require(splits[:-1])


@pytest.mark.usefixtures("data")
def test_one_process_runs_a_data_set_of_a_grid(tmp_path, grid_of):
    grid = grid_of(tmp_path, search={})
    with grid.locked("small"), grid.locked("another"):
        assert not grid.lines("small", "test")
        done = quality("run", grid.file, "--local", "--results", tmp_path / "results")
        assert done.returncode == 2
        assert f"another process runs {grid.file} on small: wait for it" in done.stderr
    # It was there for the lock alone.
    assert not list(grid.results.iterdir())
    with grid.locked("small"):
        pass


@pytest.mark.usefixtures("data")
def test_finals_wait_until_the_search_is_over(tmp_path, grid_of):
    grid = grid_of(tmp_path, search={"trials": 3, "space": {"stages.0.dense.lr": [0.001, 0.002, 0.004]}})
    (small,) = grid.config.data
    first, second, third = grid.search(small, ["mlp"])["mlp"].cases
    grid.record(first, outcome({"home": 0.6}))
    grid.record(second, outcome({"home": 0.7}))
    assert grid.finals(small, ["mlp"], [0]) == []
    grid.record(third, {"failed": "ValueError: the loss is nan", "commit": "abc"})
    assert [case.chosen for case in grid.finals(small, ["mlp"], [0])] == [second.chosen]
    assert str(grid.search(small, ["mlp"])["mlp"]) == "2 of 3 (1 failed)"


@pytest.mark.usefixtures("data")
def test_the_report_shows_what_todays_grid_would_make_and_counts_the_rest(tmp_path, grid_of):
    grid = grid_of(tmp_path, models={"mlp": {}, "star": {}, "mmoe": {}, "ple": {}}, seeds=[0, 1, 2])
    from quality_report import write_report

    (small,) = grid.config.data
    for case in grid.finals(small, list(grid.config.models), [0, 1, 2]):
        # Scenarios of other names, as of a test split that was prepared anew, are no reason to break.
        aucs = {"home": 0.6, "search" if case.model == "star" else "cart": 0.7}
        if (case.model, case.run.seed) in {("mlp", 0), ("mlp", 1), ("mlp", 2), ("star", 1)}:
            grid.record(case, outcome(aucs, commit="abc-dirty" if case.model == "star" else "abc"))
        elif case.model == "star":
            grid.record(case, {"failed": "ValueError: no", "commit": "abc"})
    file = grid.file_of("small", "test")
    line = json.loads(file.read_text().splitlines()[0])
    settings = line["settings"]
    for change in (
        {"settings": settings | {"loader": settings["loader"] | {"batch_size": 77}}},
        {"settings": settings | {"loader": {"no such": 1}}},
        {"settings": settings | {"seed": 9}, "seed": 9},
        {"data_digest": "other"},
        {"model": "gone"},
    ):
        with open(file, "a") as out:
            out.write(json.dumps(line | change) + "\n")
    with open(file, "a") as out:
        out.write('{"model": "mlp"}\n3\nhalf a li')
    text = write_report(grid).read_text()
    for told in (
        "no search: the grid's settings",
        "- No results, not run: mmoe, ple.",
        "- No result of seed 0, 2: star.",
        "- Failed with seed 0, 2: star.",
        "- Commits: abc (5 lines), abc-dirty (1 lines).",
        "1 of settings that the code does not know any more",
        "1 of other settings than the grid's",
        "1 of a seed that the grid does not have",
        "1 of a model that the grid does not have",
        "1 of other data",
        "3 not readable",
    ):
        assert told in text
    assert row(text, "mlp", 0)[:2] == ["3 of 3", "none"]
    assert row(text, "star", 0)[:2] == ["1 of 3", "none"]
    assert row(text, "star", 1)[:2] == ["+0.0000", "- (1)"]
    assert "star (n = 1)" in (grid.results / "small-gain.svg").read_text()
    assert [place.partition(": ")[0] for place in grid.odd("small")] == [f"{file}:{number}" for number in (12, 13, 14)]

    # Without the data at hand the report is of those that its newest line is of.
    shutil.rmtree(tmp_path / "data")
    text = write_report(grid).read_text()
    assert "1 of other data" in text
    assert "The data are not on the machine that wrote this" in text


@pytest.mark.usefixtures("data")
def test_noise_is_no_seesaw(tmp_path, grid_of):
    seeds = list(range(5))
    grid = grid_of(tmp_path, models={"mlp": {}, "star": {}, "mmoe": {}}, seeds=seeds)
    from quality_report import _holm, write_report

    (small,) = grid.config.data
    rng = random.Random(3)
    names = [f"scenario {number}" for number in range(10)]
    for case in grid.finals(small, list(grid.config.models), seeds):
        aucs = {name: 0.7 + rng.gauss(0, 0.002) for name in names}
        aucs["scenario 4"] -= 0.05 * (case.model == "mmoe")
        grid.record(case, outcome(aucs))
    text = write_report(grid).read_text()
    worst, worse = row(text, "star", 1)[2:4]
    assert re.fullmatch(r"-0\.00\d\d ± 0\.00\d\d \(scenario \d\)", worst)
    assert worse == "0 of 10"
    worst, worse = row(text, "mmoe", 1)[2:4]
    assert re.fullmatch(r"-0\.05\d\d ± 0\.00\d\d \(scenario 4\)|-0\.04\d\d ± 0\.00\d\d \(scenario 4\)", worst)
    assert worse == "1 of 10"
    assert row(text, "mmoe", 1)[1] == "<.001 (5)"
    assert "- Of 10 scenarios with 1,000 test rows the 8 largest are shown." in text
    assert _holm({"a": 0.01, "b": 0.03, "c": 0.02}) == ["a", "c", "b"]
    assert _holm({"a": 0.01, "b": 0.04, "c": 0.03}) == ["a"]


def test_absent_data_end_in_one_line(tmp_path):
    done = quality("run", write_grid(tmp_path, models={"mlp": {}}), "--local")
    assert done.returncode == 2
    assert f"data set small: no data in {tmp_path}/data; make them: msr-dist prepare small" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("data")
def test_a_line_stands_under_defaults_that_are_new_and_no_others(tmp_path, grid_of):
    grid = grid_of(tmp_path)
    (case,) = grid.finals(grid.config.data[0], ["mlp"], [0])
    grid.record(case, outcome({"home": 0.6}))
    file, (line,) = grid.file_of("small", "test"), lines(tmp_path)
    del line["settings"]["loader"]["window_rows"]
    file.write_text(json.dumps(line) + "\n")
    assert case.key in grid.lines("small", "test")
    line["settings"]["loader"]["window_rows"] = 77
    file.write_text(json.dumps(line) + "\n")
    assert case.key not in grid.lines("small", "test")


KNOWING = {
    "models": {
        "mlp": {"widths": [4]},
        "knowing": {"kind": "llm4msr", "backbone": {"kind": "mlp", "widths": [4]}},
        "guessing": {"kind": "llm4msr", "backbone": {"kind": "mlp", "widths": [4]}, "vectors": "random"},
    },
    "against": {"knowing": ["mlp", "guessing"]},
}


def knowing(folder: Path) -> dict:
    data = {"name": "small", "folder": str(folder / "data"), "prepare": "msr-dist prepare small"}
    known = {
        "knowledge": {"store": str(folder / "store"), "width": stores.TABLE_WIDTH},
        "extract": "msr-dist extract x",
    }
    return KNOWING | {"data": [data | known]}


def test_models_that_read_knowledge_are_held_against_their_backbone_and_controls(tmp_path, data, grid_of):
    stores.write_vocabulary(data)
    grid = write_grid(tmp_path, **knowing(tmp_path))
    absent = quality("run", grid, "--results", tmp_path / "results", "--local")
    assert absent.returncode == 2
    assert re.fullmatch(r"\S+: data set small: .*store.* the command was: msr-dist extract x\n", absent.stderr)
    stores.write(tmp_path / "store", data)
    quality("run", grid, "--results", tmp_path / "results", "--local")
    written = lines(tmp_path)
    assert {each["model"] for each in written if "knowledge" in each["settings"]} == {"knowing", "guessing"}
    parameters = {each["model"]: each["table_parameters"] for each in written}
    assert parameters["knowing"] - parameters["mlp"] == canonical.USERS * stores.TABLE_WIDTH
    quality("report", grid, "--results", tmp_path / "results")
    report = (tmp_path / "results/grid/README.md").read_text()
    claims = [line for line in report.splitlines() if line.startswith("| knowing | ")][-2:]
    assert [line.split("|")[2].strip() for line in claims] == ["mlp", "guessing"]
    # Lines stand where the vectors are not at hand, and fall when they have been made anew.
    shutil.move(tmp_path / "store", tmp_path / "elsewhere")
    assert len(standing(grid_of, tmp_path)) == 6
    stores.write(tmp_path / "store", data, seed=1)
    assert {case.model for case in standing(grid_of, tmp_path)} == {"mlp"}


def test_a_model_may_read_other_vectors_than_the_rest(tmp_path, data, grid_of):
    stores.write_vocabulary(data)
    for seed, name in enumerate(("store", "words")):
        stores.write(tmp_path / name, data, seed=seed)
    given = knowing(tmp_path)
    given["data"][0]["stores"] = {"words": {"store": str(tmp_path / "words"), "width": stores.TABLE_WIDTH}}
    given["models"] = given["models"] | {"reading": given["models"]["knowing"]}
    given["reads"] = {"reading": "words"}

    def digests() -> dict:
        grid = grid_of(tmp_path, **given)
        cases = grid.finals(grid.config.data[0], ["mlp", "knowing", "guessing", "reading"], [0])
        for case in cases:
            if case.key not in grid.lines("small", "test"):
                grid.record(case, outcome({"home": 0.6}))
        return {case.model: case.run.knowledge and case.run.knowledge.digest for case in cases}

    first = digests()
    assert first["mlp"] is None
    assert first["knowing"] == first["guessing"] != first["reading"]
    # Where one store is not at hand, what its own models read is known by their lines.
    shutil.move(tmp_path / "words", tmp_path / "elsewhere")
    assert digests() == first
    with pytest.raises(ValueError, match=r"reads\.reading: data set small has no stores\.text"):
        grid_of(tmp_path, **given | {"reads": {"reading": "text"}})
    with pytest.raises(ValueError, match=r"reads\.nobody: the grid has no model 'nobody'"):
        grid_of(tmp_path, **given | {"reads": {"nobody": "words"}})


def test_data_are_told_by_their_bytes_where_the_vectors_are_absent(tmp_path, data, grid_of):
    stores.write_vocabulary(data)
    shutil.rmtree(stores.write(tmp_path / "store", data) / f"pca-{stores.TABLE_WIDTH}")
    grid = grid_of(tmp_path, **knowing(tmp_path))
    from quality_report import write_report

    (small,) = grid.config.data
    with pytest.raises(ValueError, match=r"data set small: .*store: has no vectors of width 8; .* msr-dist extract x"):
        small.require(["train"])
    (case,) = grid.finals(small, ["mlp"], [0])
    grid.record(case, outcome({"home": 0.6}))
    text = write_report(grid).read_text()
    assert "The vectors are not on the machine that wrote this" in text
    assert "The data are not on the machine" not in text
    flip_labels(data)
    assert [each.key for each in grid.finals(small, ["mlp"], [0])] != [case.key]


def test_a_model_is_tuned_alike_with_and_without_a_wrapper(tmp_path, grid_of):
    search = {"trials": 1, "space": {"model.dropout": [0.3], "model.rank": [4]}}
    grid = grid_of(tmp_path, **knowing(tmp_path), search=search)
    searches = grid.search(grid.config.data[0], ["mlp", "knowing"])
    assert searches["mlp"].cases[0].chosen == {"model.dropout": 0.3}
    (trial,) = searches["knowing"].cases
    assert trial.chosen == {"model.backbone.dropout": 0.3, "model.rank": 4}
    assert (trial.run.model.dropout, trial.run.model.backbone.dropout) == (0.0, 0.3)


def standing(grid_of, folder: Path) -> list:
    grid = grid_of(folder, **knowing(folder))
    known = grid.lines("small", "test")
    return [each for each in grid.finals(grid.config.data[0], list(KNOWING["models"]), [0, 1]) if each.key in known]


@pytest.mark.parametrize(
    ("gains", "noise", "seeds", "counts"),
    [
        ((0.01, 0.012), 1e-4, [0, 1, 2], "yes"),
        ((0.01, -0.001), 1e-4, [0, 1, 2], "no"),
        ((0.01, 0.012), 0.0, [0, 1, 2], "yes"),
        ((0.01, 0.0), 0.0, [0, 1, 2], "no"),
        ((0.01, 0.012), 1e-4, [0, 2], "not all run"),
        ((0.01, 0.012), 1e-4, [], "not all run"),
    ],
)
def test_a_gain_counts_over_every_one_that_it_is_held_against(tmp_path, grid_of, gains, noise, seeds, counts):
    models = {"mlp": {}, "star": {}, "mmoe": {}}
    grid = grid_of(tmp_path, models=models, against={"star": ["mlp", "mmoe"]}, seeds=[0, 1, 2])
    for model, gain in zip(("mlp", "mmoe", "star"), (*gains, 0.0), strict=True):
        for case in grid.finals(grid.config.data[0], [model], seeds if model == "mmoe" else [0, 1, 2]):
            jitter = case.run.seed * noise * (model == "star")
            grid.record(case, outcome({"a": 0.7 - gain + jitter}))
    from quality_report import write_report

    text = write_report(grid).read_text()
    assert "two-sided paired t-test" in text.rpartition("A model's gain counts")[2]
    found = text.splitlines()
    rows = [line.split(" | ") for line in found if line.startswith(("| star | mlp |", "| star | mmoe |"))]
    assert [cells[-1] for cells in rows] == [f"{counts} |"] * 2
    assert (rows[1][2:-1] == ["-"] * 4) == (not seeds)


def test_a_grid_says_what_it_lacks_for_knowledge(tmp_path, grid_of):
    with pytest.raises(ValueError, match="knowing reads knowledge, and data set small names none"):
        grid_of(tmp_path, models=KNOWING["models"])
    with pytest.raises(ValueError, match=r"against\.mlp: the grid has no model 'star'"):
        grid_of(tmp_path, against={"mlp": ["star"]})
