"""Reports of real runs: small data with text, a tiny language model, a few steps of training."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import texts
import tinymodel
from msr_dist.cli import main
from msr_dist.config import dump, load, parse
from msr_dist.extract import CompressConfig, ExtractConfig, extract, show_prompts
from msr_dist.llm.encode import EncoderConfig
from msr_dist.llm.history import HistoryConfig
from msr_dist.llm.prompts import PromptConfig
from msr_dist.llm.vectors import open_store, open_table
from msr_dist.models.llm4msr import Llm4msr, UserLevel
from msr_dist.report import write
from msr_dist.report.acting import read
from msr_dist.report.comparison import OVERALL, Gain, compare, judge
from msr_dist.report.people import EARLIER, look_up
from msr_dist.run import RunConfig, read_run
from msr_dist.schema import FeatureSchema
from msr_dist.train import train

pytestmark = [
    # mlflow's own use of SQLAlchemy, when its tables are mapped.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
    # mlflow's pool leaves connections to sqlite to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
]

HOSTILE = "<script>alert('x')</script>"
FRONT = "front & <b>page</b> $x^2$"
"""A scenario's name; its dollars begin no formula."""
SWITCHED = {
    "random vectors": {"vectors": "random"},
    "shuffled users": {"vectors": "shuffled"},
    "trained vectors": {"vectors": "trained"},
    "without user level": {"user_level": False},
    "without scenario level": {"scenario_level": False},
    "vectors as features": {"as_features": True},
}
STAR = {"kind": "star", "widths": [4], "auxiliary_widths": [4]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = texts.write(tmp_path_factory.mktemp("prepared") / "data")
    schema = FeatureSchema.read(folder)
    first = schema.scenarios[0].model_copy(update={"name": FRONT})
    schema.model_copy(update={"scenarios": (first, *schema.scenarios[1:])}).save(folder)
    items = pq.read_table(folder / "items.parquet")
    titles = [f"{title}{HOSTILE}" for title in items["title"].to_pylist()]
    pq.write_table(items.set_column(items.column_names.index("title"), "title", [titles]), folder / "items.parquet")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("made")
    config = ExtractConfig(
        data=data,
        out=folder / "store",
        model=EncoderConfig(name=str(tinymodel.llama(folder / "model")), dtype="fp32", device="cpu", max_tokens=2000),
        # Later than the first held-out rows, which is worth a note.
        history=HistoryConfig(per_scenario=5, before=2_000_000_000),
        prompts=PromptConfig(user_tokens=1100),
        users_per_shard=16,
        compress=CompressConfig(width=4),
    )
    extract(config)
    return config.out


def config(runs: Path, data: Path, name: str, model: dict, **changes) -> RunConfig:
    raw = {
        "name": name,
        "runs": str(runs),
        "data": str(data),
        "loader": {"batch_size": 300, "partitions": 2},
        "model": model,
        "evaluation": {"validate_epochs": 0},
        "tracking": {"enabled": False},
    }
    return parse(RunConfig, raw | changes, "test")


def wrapped(store: Path, **switches) -> dict:
    return {
        "model": {"kind": "llm4msr", "code_width": 8, "generator_width": 4, "rank": 4, "backbone": STAR} | switches,
        "knowledge": {"store": str(store), "width": 4},
    }


def trained(run: RunConfig) -> Path:
    run.claim_folder()
    train(run)
    return run.folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data, store):
    """`llm` and its backbone, both trained; `llm` is tracked."""
    folder = tmp_path_factory.mktemp("results") / "runs"
    quiet = {"tracking": {"system_every": 0, "every": 0.1}}
    trained(config(folder, data, "llm", **wrapped(store), **quiet))
    trained(config(folder, data, "star", STAR))
    return folder


@pytest.fixture
def family(tmp_path, runs):
    """A function that lays finished runs beside each other, changed from `llm`, whose AUC is as given."""
    home = tmp_path / "runs"
    base = read_run(runs / "llm")
    report = json.loads((runs / "llm/metrics.json").read_text())

    def lay(name: str, auc: float | None, seed: int = 0, model: dict | None = None, **changes) -> Path:
        raw = base.model_dump(mode="json", exclude_none=True) | {"name": name, "runs": str(home), "seed": seed}
        raw["model"] = raw["model"] | (model or {})
        if model == STAR:
            raw["model"] = STAR
            del raw["knowledge"]
        folder = home / name
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(dump(parse(RunConfig, raw | changes, name)))
        blocks = [report["overall"], *report["scenarios"].values()]
        for block in blocks:
            block["auc"] = block["labels"]["like"]["auc"] = auc
        (folder / "metrics.json").write_text(json.dumps(report))
        return folder

    return lay


class Page(HTMLParser):
    """The text of each section, by its id, and every tag and attribute."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self._inside = ""
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "section":
            self._inside = dict(attrs).get("id") or dict(attrs)["class"]
            self.sections.setdefault(self._inside, "")

    def handle_data(self, text):
        if self._inside:
            self.sections[self._inside] += f" {text}"

    def section(self, name: str) -> str:
        return " ".join(self.sections[name].split())


@pytest.fixture(scope="module")
def page(runs):
    file, tracked = write(runs / "llm")
    assert file == runs / "llm/report.html"
    assert tracked
    return Page(file)


def test_the_page_shows_every_part_and_loads_nothing(runs, page):
    assert set(page.sections) == {"headline", "gains", "metrics", "strength", "similarity", "people", "method"}
    assert page.tags.count("svg") == 3
    assert not {"script", "iframe", "img", "link", "object"} & set(page.tags)
    assert not [pair for pair in page.attributes if pair[0] in ("src", "onload", "onclick")]
    named = [value for name, value in page.attributes if name == "id" and value]
    assert len(named) == len(set(named))
    for name, target in page.attributes:
        if name in ("href", "xlink:href"):
            assert target.removeprefix("#") in named or target.startswith("data:image/png;base64,")
    for reference in re.findall(r"url\(#([^)]*)\)", (runs / "llm/report.html").read_text()):
        assert reference in named


def test_the_gain_is_the_difference_of_the_runs_metrics(runs, page):
    own, its = (json.loads((runs / name / "metrics.json").read_text()) for name in ("llm", "star"))
    for name in own["scenarios"]:
        gain = own["scenarios"][name]["auc"] - its["scenarios"][name]["auc"]
        assert f"{name} {own['scenarios'][name]['auc']:.4f} {gain:+.4f}" in page.section("gains")
    assert f"{its['overall']['log_loss'] - own['overall']['log_loss']:+.4f}" in page.section("gains")
    assert "log loss this run gain over the backbone star" in page.section("gains")
    assert "A gain is above 0 where this run is better; one in log loss is by how much it is lower." in page.section(
        "gains"
    )
    assert "one-sided sign test over seeds at 5%, which five of five seeds pass" in page.section("method")
    assert "18 rows: too few to tell" in page.section("headline")


def test_what_is_missing_is_named_with_a_command_that_makes_it(runs, store, page, tmp_path):
    told = page.section("gains")
    assert "the backbone star backbone msr-dist" not in told
    folder = runs / "llm"
    for name, changes in SWITCHED.items():
        settings = " ".join(f"model.{key}={json.dumps(value)}" for key, value in changes.items()).replace('"', "")
        found = re.search(rf"{name} (control|ablation) msr-dist train (\S+) name=(\S+) (\S+)", told)
        assert found, name
        assert (found[2], found[4]) == (f"{folder}/config.toml", settings)
        made = load(RunConfig, Path(found[2]), [f"name={found[3]}", found[4]])
        assert made.model == parse(RunConfig, {"name": "x", "data": "y"} | wrapped(store, **changes), "test").model

    alone = tmp_path / "runs/llm"
    shutil.copytree(folder, alone)
    file, tracked = write(alone)
    assert not tracked
    assert not (alone.parent / "mlflow.db").exists()
    assert f"msr-dist train {alone}/backbone.toml" in Page(file).section("gains")
    assert load(RunConfig, alone / "backbone.toml").model == read_run(runs / "star").model
    trained(load(RunConfig, alone / "backbone.toml", ["tracking.enabled=false"]))
    told = Page(write(alone)[0]).section("gains")
    assert "over the backbone star" in told
    assert "backbone.toml" not in told


def test_what_the_extraction_noted_is_shown(store, page):
    notes = open_store(store).manifest.notes
    assert any(note.startswith("the test split begins at ") for note in notes)
    assert f"Of the prompts, the extraction noted: {' '.join(notes)}" in page.section("method")


def test_prompts_and_neighbours_are_those_of_the_store(store, page):
    told = page.section("people")
    users = re.findall(r"User (\d+) user", told)
    assert len(users) == len(set(users)) == 3
    rows = {texts.user_id(row): row for row in range(1, 41)}
    table = open_table(open_store(store), 4)
    for user in users:
        part = told.split(f"User {user} user")[1]
        for row, cosine in table.nearest(rows[int(user)], 3):
            assert f"user {texts.user_id(row)} cosine {cosine:.2f}" in part
        assert part.count(f"What the language model read about user {user}") == 1
    config = load(ExtractConfig, store / "config.toml")
    prompts = [next(show_prompts(config, user=user)).prompt.text for user in users]
    # The budget of 1,100 bytes does not hold all that is known of these users.
    assert all(900 < len(prompt) <= 1100 for prompt in prompts)
    assert all(" ".join(prompt.split()) in told for prompt in prompts)
    assert all(HOSTILE in prompt for prompt in prompts)
    assert "nearest neighbours share" in told


def test_a_prompt_that_cannot_be_made_again_is_left_out_and_said(tmp_path, runs, store):
    kept, folder = tmp_path / "store", tmp_path / "runs/llm"
    shutil.copytree(store, kept)
    shutil.copytree(runs / "llm", folder)
    file = folder / "config.toml"
    file.write_text(file.read_text().replace(str(store), str(kept)))
    template = tmp_path / "user.txt"
    settings = load(ExtractConfig, kept / "config.toml")
    prompts = settings.prompts.model_copy(update={"user_template": template})
    (kept / "config.toml").write_text(dump(settings.model_copy(update={"prompts": prompts})))
    # Gone, and another one.
    for text in (None, "Of {scenarios}: {history}"):
        if text is not None:
            template.write_text(text)
        page = Page(write(folder)[0])
        users = re.findall(r"User (\d+) user", page.section("people"))
        assert len(users) == 3
        assert "What the language model read about user" not in page.section("people")
        assert f"What the language model read about {', '.join(users)} is not shown" in page.section("left-out")


def test_what_came_before_the_log_is_of_no_scenario(data, store):
    schema = FeatureSchema.read(data)
    fewer = schema.model_copy(update={"scenarios": schema.scenarios[:-1]})
    people = look_up(open_store(store), open_table(open_store(store), 4), fewer)
    names = {name for example in people.examples for name in example.user.choices}
    assert names == {EARLIER, *(each.name for each in fewer.scenarios)}
    assert {example.prompt for example in people.examples} == {None}


def test_names_and_titles_are_text_whatever_they_hold(runs, page):
    content = (runs / "llm/report.html").read_text()
    assert "<script" not in content
    assert "<b>page" not in content
    assert page.section("headline").count(FRONT) == 1
    # As a row's name in plots, where a dollar begins no formula.
    assert content.count("front &amp; &lt;b&gt;page&lt;/b&gt; $x^2$</text>") >= 4


def test_strength_and_similarity_of_a_trained_model(data, page):
    told = page.section("strength")
    assert "The scenario level adds a logit of " in told
    assert "The user level moves the input by " in told
    assert "Read on 60 rows of the valid split" in told
    split = pq.read_table(data / "valid")
    count = split["scenario"].to_pylist().count(1)
    users = [row for row, scenario in zip(split["user"].to_pylist(), split["scenario"].to_pylist(), strict=True)
             if scenario == 1]  # fmt: skip
    known = sum(0 < row <= 38 for row in users) / count
    assert f"search {count} {known:.1%}" in told
    assert "most alike" in page.section("similarity")
    assert "What the language model was told of" in page.section("similarity")


@pytest.mark.parametrize("fusion", ["sum", "weighted"])
def test_strength_is_that_of_the_models_parts(tmp_path, data, store, fusion, monkeypatch):
    """Of a run in which a scenario has no training rows: others stand in for it, so its own level has no say."""
    prepared = tmp_path / "data"
    shutil.copytree(data, prepared)
    schema = FeatureSchema.read(prepared)
    counted = [each.model_copy(update={"rows": 300 * each.id}) for each in schema.scenarios]
    schema.model_copy(update={"scenarios": tuple(counted)}).save(prepared)
    folder = trained(config(tmp_path / "runs", prepared, "llm", **wrapped(store, fusion=fusion)))
    seen = []
    forward = Llm4msr.objective

    def objective(model, inputs):
        seen.append((inputs.scenario, model.parts(inputs), model.share))
        return forward(model, inputs)

    monkeypatch.setattr(Llm4msr, "objective", objective)
    found = read(read_run(folder)).scenarios
    ((scenario, parts, share),) = seen
    assert found[FRONT].scenario_level is None
    for place, name in enumerate(found):
        mine = scenario == place
        before, after = parts.before[mine], parts.after[mine]
        moved = ((after - before).norm(dim=1) / before.norm(dim=1)).mean()
        assert found[name].user_level == pytest.approx(moved.item(), rel=1e-5)
        if place:
            of_level, of_backbone = parts.scenario[mine].abs(), parts.backbone.logits[mine].abs()
            if share is not None:
                of_level, of_backbone = share.abs() * of_level, (1 - share) * of_backbone
            assert found[name].scenario_level == pytest.approx((of_level.mean() / of_backbone.mean()).item(), rel=1e-4)
    assert f"{FRONT} 20 {found[FRONT].known:.1%} - {found[FRONT].user_level:.1%}" in Page(write(folder)[0]).section(
        "strength"
    )


def test_rows_without_an_input_are_left_out_of_how_far_it_moves(runs, monkeypatch):
    seen = []
    forward, objective = UserLevel.forward, Llm4msr.objective

    def emptied(level, x, user, knowledge):
        x[::2] = 0
        after = forward(level, x, user, knowledge)
        seen.append(((after - x).norm(dim=1) / x.norm(dim=1))[1::2])
        return after

    def watched(model, inputs):
        seen.append(inputs.scenario[1::2])
        return objective(model, inputs)

    monkeypatch.setattr(UserLevel, "forward", emptied)
    monkeypatch.setattr(Llm4msr, "objective", watched)
    found = read(read_run(runs / "llm")).scenarios
    scenario, moved = seen
    for place, each in enumerate(found.values()):
        assert each.user_level == pytest.approx(moved[scenario == place].mean().item(), rel=1e-5)


@pytest.mark.usefixtures("page")
def test_the_page_is_the_same_every_time_and_in_mlflow(runs):
    from mlflow import MlflowClient

    first = (runs / "llm/report.html").read_bytes()
    file, tracked = write(runs / "llm")
    assert file.read_bytes() == first
    assert tracked
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    (state,) = json.loads((runs / "llm/tracking.json").read_text())["stores"].values()
    fetched = client.download_artifacts(state["run_id"], "report.html")
    assert Path(fetched).read_bytes() == first
    assert client.get_run(state["run_id"]).info.status == "FINISHED"


def test_an_mlflow_that_is_gone_stops_no_report(runs, tmp_path, caplog):
    copied = tmp_path / "runs/llm"
    shutil.copytree(runs / "llm", copied)
    (tmp_path / "runs/mlflow.db").write_bytes(b"no database")
    assert write(copied) == (copied / "report.html", False)
    assert "does not take" in caplog.text


def test_a_run_without_a_language_model(runs, capsys):
    with pytest.raises(SystemExit) as end:
        main(["report", str(runs / "star")])
    assert end.value.code == 0
    assert f"report   {runs}/star/report.html\n" in capsys.readouterr().out
    page = Page(runs / "star/report.html")
    assert set(page.sections) == {"headline", "gains", "metrics", "left-out", "method"}
    assert "No language model took part" in page.section("left-out")
    assert "Models that were compared: 1" in page.section("headline")
    assert "over llm4msr(star)" in page.section("gains")


@pytest.mark.parametrize("switches", [{"as_features": True}, {"scenario_level": False}, {"user_level": False}])
def test_parts_that_a_run_does_not_have_are_left_out_and_said(tmp_path, data, store, switches):
    folder = trained(config(tmp_path / "runs", data, "part", **wrapped(store, **switches)))
    page = Page(write(folder)[0])
    absent = {
        "as_features": ("strength", "no meta layers"),
        "scenario_level": ("similarity", "does not read the scenarios' vectors"),
        "user_level": ("people", "does not read the users' vectors"),
    }[next(iter(switches))]
    assert {"strength", "similarity", "people"} - set(page.sections) == {absent[0]}
    assert absent[1] in page.section("left-out")


def test_one_line_for_what_cannot_be_reported(runs, data, tmp_path, family, capsys):
    def refused(*words) -> str:
        with pytest.raises(SystemExit) as end:
            main(["report", *map(str, words)])
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    # A run of another trade, alone or among the others.
    retrieving = config(tmp_path / "mixed", data, "towers", {"kind": "two_tower", "widths": [4], "out_width": 4})
    retrieving.claim_folder()
    assert "model.kind 'two_tower' retrieves, and a report shows models that predict labels" in refused(
        retrieving.folder
    )
    assert "'two_tower' retrieves" in refused(runs / "star", "--against", retrieving.folder)
    shutil.copytree(runs / "star", tmp_path / "mixed/star")
    assert write(tmp_path / "mixed/star")

    assert f"{tmp_path}: no config.toml there" in refused(tmp_path)
    other = family("other", 0.6, data=str(tmp_path / "data"))
    assert f"--against {other}: of other data, {tmp_path}/data; {runs}/llm is of {data}" in refused(
        runs / "llm", "--against", other
    )
    unfinished = family("unfinished", 0.6, model=STAR)
    (unfinished / "metrics.json").unlink()
    line = refused(unfinished)
    assert f"{unfinished}: no metrics.json there; finish the run with `msr-dist train {unfinished}/config.toml`" in line
    assert "no metrics.json there" in refused(runs / "llm", "--against", unfinished)
    assert "has the settings and the seed of" in refused(runs / "llm", "--against", runs / "llm")
    assert "seed 7, but llm was trained with seed 0" in refused(
        runs / "llm", "--against", family("seven", 0.6, seed=7, model=STAR)
    )
    empty = family("empty", 0.6, model={"code_width": 12})
    assert f"{empty}: no checkpoint there; train the run first" in refused(empty)


def verdict(folder: Path, *against: Path):
    return judge(compare(read_run(folder), [read_run(each) for each in against]), "like", OVERALL)


def test_a_gain_counts_only_over_all_controls_and_beyond_chance(family):
    seeds = range(5)
    folder = family("llm", 0.70)
    assert verdict(folder).sentence == "Open: there is no run of its backbone to compare with."
    family("star", 0.69, model=STAR)
    assert verdict(folder).sentence.endswith("open without random vectors, shuffled users and trained vectors.")
    for kind in ("random", "shuffled", "trained"):
        family(kind, 0.695, model={"vectors": kind})
    assert verdict(folder).kind == "leads"
    assert (
        "better than the backbone star in 1 of 1 seed (one-sided sign test over seeds at 5%, which"
        in verdict(folder).sentence
    )
    for seed in seeds[1:]:
        family(f"llm-{seed}", 0.70 + seed / 1000, seed)
        family(f"star-{seed}", 0.69, seed, STAR)
        for kind in ("random", "shuffled", "trained"):
            family(f"{kind}-{seed}", 0.695, seed, {"vectors": kind})
    found = verdict(folder)
    assert (found.kind, found.sentence) == (
        "counts",
        "Counts: better than its backbone and all controls, over 5 seeds.",
    )
    comparison = compare(read_run(folder), [])
    gain = comparison.gain(comparison.of_role("backbone")[0], "like", OVERALL)
    assert gain.values == pytest.approx((0.010, 0.011, 0.012, 0.013, 0.014))
    assert (gain.mean, gain.std) == pytest.approx((0.012, 0.00158114))
    # One seed in which a control is better is one too many of five.
    shutil.rmtree(folder.parent / "random-3")
    family("random-3", 0.71, 3, {"vectors": "random"})
    assert "better than random vectors in 4 of 5 seeds" in verdict(folder).sentence
    # On average no better than a control.
    shutil.rmtree(folder.parent / "shuffled-2")
    family("shuffled-2", 0.80, 2, {"vectors": "shuffled"})
    assert (
        verdict(folder).sentence == "Does not count: shuffled users do as well or better, so it is not the knowledge."
    )
    assert verdict(folder.parent / "random").sentence.startswith("A control itself")


def test_all_rows_decide_and_scenarios_with_rows_are_told_beside(family, runs):
    for seed in range(5):
        for name, auc, model in (("llm", 0.7, None), ("star", 0.69, STAR)):
            home = family(f"{name}-{seed}", auc, seed, model).parent
        for kind in ("random", "shuffled", "trained"):
            family(f"{kind}-{seed}", 0.695, seed, {"vectors": kind})
    shutil.copytree(runs / "llm/checkpoints", home / "llm-0/checkpoints")
    told = Page(write(home / "llm-0")[0]).section("headline")
    assert "Yes: over all rows it is better than its backbone and than every control, beyond chance (one-sided" in told
    assert "No scenario has the 1,000 rows" in told

    # It loses over all rows, and wins in every scenario, of which one has rows enough.
    for seed in range(5):
        file = home / f"llm-{seed}/metrics.json"
        report = json.loads(file.read_text())
        report["overall"]["labels"]["like"]["auc"] = 0.6
        report["scenarios"][FRONT]["labels"]["like"]["rows"] = 5000
        file.write_text(json.dumps(report))
    told = Page(write(home / "llm-0")[0]).section("headline")
    assert "No: over all rows it is not ahead of its backbone and every control." in told
    assert "Among scenarios with 1,000 rows or more it counts in 1 of 1, and may be chance in 0" in told


def test_shuffled_users_are_no_control_of_a_run_that_does_not_read_them(family):
    base = {"user_level": False}
    folder = family("llm", 0.70, model=base)
    family("star", 0.69, model=STAR)
    names = [(each.name, each.role) for each in compare(read_run(folder), []).missing]
    assert names == [
        ("random vectors", "control"),
        ("trained vectors", "control"),
        ("with user level", "ablation"),
        ("vectors as features", "ablation"),
    ]
    for kind in ("random", "trained"):
        family(kind, 0.695, model=base | {"vectors": kind})
    assert verdict(folder).kind == "leads"
    # The same run in truth, so it takes nothing from the verdict.
    family("shuffled", 0.70, model=base | {"vectors": "shuffled"})
    assert verdict(folder).kind == "leads"


def test_a_run_that_loses_or_has_no_auc(family):
    folder = family("llm", 0.70)
    family("star", 0.70, model=STAR)
    assert verdict(folder).sentence == "No gain over the backbone star."
    assert verdict(family("one-class", None, model={"code_width": 12})).kind == "undefined"


def test_which_runs_are_compared(family):
    folder = family("llm", 0.70)
    family("again", 0.6)
    family("star", 0.69, model=STAR)
    family("star-later", 0.68, model=STAR, stages=[{"epochs": 7}])
    family("star-seed", 0.68, 3, model=STAR)
    family("wide", 0.68, model={"code_width": 12})
    family("random-alone", 0.68, model={"vectors": "random", "user_level": False})
    begun = family("begun", 0.6, model={"vectors": "shuffled"})
    (begun / "metrics.json").unlink()
    old = family("old", 0.6)
    (old / "config.toml").write_text("name = 'old'\nfrom_an_older_version = true\n")
    found = compare(read_run(folder), [])
    assert {(each.name, each.role): [run.run.name for run in each.runs.values()] for each in found.others} == {
        ("the backbone star", "backbone"): ["star", "star-seed"],
        ("random vectors, without user level", "ablation"): ["random-alone"],
    }
    assert found.notes[0] == "again has the settings and the seed of llm: left out"
    assert found.notes[1].startswith("old left out, its configuration is not of this version: ")
    commands = {each.name: each.command for each in found.missing}
    assert commands["shuffled users"] == f"msr-dist train {begun}/config.toml"
    assert commands["random vectors"].endswith("name=llm-random model.vectors=random")

    asked = [read_run(folder.parent / name) for name in ("star-later", "wide")]
    named = [(each.name, each.role) for each in compare(read_run(folder), asked).others]
    assert ("the backbone star, stages.0.epochs = 7", "backbone") in named
    assert ("llm4msr(star), model.code_width = 12", "other") in named


@pytest.mark.parametrize(
    ("wins", "losses", "beyond"),
    [(1, 0, False), (4, 0, False), (5, 0, True), (5, 1, False), (7, 1, True), (9, 2, True), (8, 3, False)],
)
def test_beyond_chance_is_a_sign_test(wins, losses, beyond):
    from scipy.stats import binomtest

    gain = Gain((0.1,) * wins + (-0.1,) * losses)
    assert gain.beyond_chance == beyond
    assert beyond == (binomtest(wins, wins + losses, alternative="greater").pvalue <= 0.05)
