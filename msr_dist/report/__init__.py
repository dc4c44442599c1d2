"""A run as one HTML page: what it gains and over what, how its meta layers act, and whom the language model compares.

RUN/
  report.html      the page: one file that loads nothing from elsewhere and runs no script
  backbone.toml    the run's backbone alone, where no such run was found: what `msr-dist train` makes it from
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined

from msr_dist.config import dump
from msr_dist.files import write_whole
from msr_dist.llm.vectors import VectorStore, open_store, open_table
from msr_dist.metrics import LabelMetrics
from msr_dist.report import plots
from msr_dist.report.acting import Acting, Reading, read
from msr_dist.report.comparison import (
    BACKBONE_FILE,
    CONTROLS,
    OVERALL,
    TEST,
    Comparison,
    Gain,
    Verdict,
    backbone_alone,
    compare,
    judge,
)
from msr_dist.report.people import People, look_up
from msr_dist.run import read_run
from msr_dist.tracking import attach

REPORT_FILE = "report.html"
SUSPICIOUS = 0.01
"""Twice the largest gain that was published: a larger one is first of all a suspicion."""

FEW_ROWS = 1_000
"""Fewer rows tell a gain of this method from nothing only by luck."""
MIN_SCENARIOS = 3
"""Of two vectors less their mean, one is the other's opposite, whatever they say."""

Floats = npt.NDArray[np.float64]


def write(folder: Path, against: Sequence[Path] = ()) -> tuple[Path, bool]:
    """Write the report of the run in `folder`; the file, and whether MLflow has it too.

    Args:
        folder: of a run that has been judged.
        against: folders of further runs of the same data to compare it with, wherever they are.

    Raises:
        ValueError: there is no such run, it has no metrics, or what it was trained with is not there any more.
    """
    run = read_run(folder)
    for each in (run, *map(read_run, against)):
        if each.retrieves:
            raise ValueError(
                f"{each.folder}: model.kind {each.model.kind!r} retrieves, and a report shows models that predict "
                f"labels; its metrics are those of `msr-dist evaluate {each.folder}`"
            )
    comparison = compare(run, [read_run(each) for each in against])
    page = _summary(comparison) | (_knowledge(comparison) if comparison.wraps else _plain(comparison))
    environment = Environment(
        loader=PackageLoader("msr_dist.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"gained": _gained, "number": _number, "percent": _percent}
    if any(each.role == "backbone" for each in comparison.missing):
        write_whole(run.folder / BACKBONE_FILE, dump(backbone_alone(run)))
    file = run.folder / REPORT_FILE
    write_whole(file, environment.get_template(REPORT_FILE).render(page))
    return file, attach(run.tracking, run.folder, file)


@dataclass(frozen=True)
class Card:
    """What one scenario gains, at a glance; None stands for all rows."""

    scenario: str | None
    gain: Gain | None
    auc: float | None
    rows: int
    verdict: Verdict

    @property
    def few(self) -> bool:
        """Whether chance in the choice of the rows is larger than any gain that one may hope for."""
        return self.rows < FEW_ROWS


@dataclass(frozen=True)
class Line:
    """A line of a table of gains."""

    name: str
    overall: bool
    own: str
    gains: tuple[Gain | None, ...]


@dataclass(frozen=True)
class Own:
    """A line of the run's own metrics."""

    name: str
    overall: bool
    metrics: LabelMetrics


@dataclass(frozen=True)
class Similarity:
    """How alike the scenarios are, in sentences and a plot; and what the language model was told of each."""

    sentences: tuple[str, ...]
    plot: str
    prompts: Mapping[str, str]


@dataclass(frozen=True)
class Strength:
    """How strongly the meta layers act, in sentences, a plot and numbers."""

    sentences: tuple[str, ...]
    plot: str
    scenarios: Mapping[str, Acting]

    @property
    def rows(self) -> int:
        """Rows that were read."""
        return sum(each.rows for each in self.scenarios.values())


def _summary(comparison: Comparison) -> dict[str, Any]:
    """What every run's page shows."""
    report, label = comparison.report, comparison.labels[0]
    scenarios = [name for name, block in report.scenarios.items() if block[label].rows]
    plot = (plots.gains if comparison.wraps else plots.models)(comparison, label, scenarios)
    tables = [("AUC", label, "auc"), ("log loss", label, "log_loss"), ("user AUC", label, "user_auc")]
    tables += [(f"AUC of {other}", other, "auc") for other in comparison.labels[1:]]
    return {
        "run": comparison.run,
        "comparison": comparison,
        "test": TEST,
        "split": comparison.run.evaluation.final,
        "label": label,
        "seeds": list(comparison.subject.runs),
        "gain_plot": plot and plots.svg(plot, "gains"),
        "hidden": max(0, len(scenarios) - plots.MAX_SCENARIOS) if comparison.wraps else 0,
        "tables": [_table(comparison, *each) for each in tables],
        "metrics": {
            each: [
                *(Own(name, False, block[each]) for name, block in report.scenarios.items()),
                Own("all rows", True, report.overall[each]),
            ]
            for each in comparison.labels
        },
    }


def _plain(comparison: Comparison) -> dict[str, Any]:
    """What is said of a run without a language model."""
    label = comparison.labels[0]
    aucs = {name: block[label].auc for name, block in comparison.report.scenarios.items()}
    defined = {name: auc for name, auc in aucs.items() if auc is not None}
    told = [f"AUC {_number(comparison.report.overall[label].auc)} over all rows."]
    if len(defined) > 1:
        best, worst = max(defined, key=lambda name: defined[name]), min(defined, key=lambda name: defined[name])
        told.append(f"Best in {best} ({_number(defined[best])}), hardest is {worst} ({_number(defined[worst])}).")
    gains = {each.name: gain for each in comparison.others if (gain := comparison.gain(each, label, OVERALL))}
    if gains:
        better = [name for name, gain in gains.items() if gain.mean < 0]
        strongest = min(gains, key=lambda name: gains[name].mean)
        text = f"Models that were compared: {len(gains)}; with a higher AUC over all rows: {len(better)}"
        told.append(text + (f", most of all {strongest}, by {-gains[strongest].mean:.4f}." if better else "."))
    note = (
        "No language model took part in this run, so there is nothing to show of meta layers, of the vectors of "
        "scenarios and of alike users. `msr-dist extract` makes them, and model.kind = llm4msr reads them."
    )
    nothing: dict[str, Any] = {
        "cards": [],
        "language_model": None,
        "strength": None,
        "similarity": None,
        "people": None,
    }
    return nothing | {"headline": told, "left_out": [note]}


def _knowledge(comparison: Comparison) -> dict[str, Any]:
    """What is said of a run that a language model took part in."""
    run, label = comparison.run, comparison.labels[0]
    assert run.knowledge is not None
    schema, reading, store = run.read_schema(), read(run), open_store(run.knowledge.store)
    manifest, left_out, people = store.manifest, [], None
    if comparison.vectors in CONTROLS:
        left_out.append(
            f"The users of this run have {CONTROLS[comparison.vectors]}: the report of a run with the language model's "
            "own vectors shows whom it finds alike."
        )
    elif not run.model.user_level:
        left_out.append("This run does not read the users' vectors: the report of one that does shows users.")
    else:
        people = look_up(store, open_table(store, run.knowledge.width), schema)
        unread = [str(each.user.id) for each in people.examples if each.prompt is None]
        if unread:
            left_out.append(
                f"What the language model read about {', '.join(unread)} is not shown: templates or scenarios have "
                "changed since the extraction, so that the prompts cannot be made again."
            )
    if not reading.acts:
        left_out.append("The vectors are features of the backbone in this run: there are no meta layers to look at.")
    if reading.given is None:
        left_out.append("This run does not read the scenarios' vectors, so how alike they are is not shown.")
    elif len(reading.given) < MIN_SCENARIOS:
        left_out.append(f"With {len(reading.given)} scenarios, how alike their vectors are says nothing.")
    shown = [None, *(name for name, block in comparison.report.scenarios.items() if block[label].rows)]
    cards = [_card(comparison, label, name) for name in shown]
    return {
        "cards": cards,
        "headline": _headline(comparison, cards),
        "language_model": {
            "name": manifest.model["name"],
            "pooling": manifest.pooling,
            "cutoff": _date(manifest.cutoff),
            "notes": manifest.notes,
        },
        "strength": _strength(comparison, reading) if reading.acts else None,
        "similarity": _similarity(comparison, reading, store),
        "people": people and {"examples": people.examples, "sentences": _alike(people)},
        "left_out": left_out,
    }


def _card(comparison: Comparison, label: str, scenario: str | None) -> Card:
    place = OVERALL if scenario is None else scenario
    metrics = (comparison.report.overall if scenario is None else comparison.report.scenarios[scenario])[label]
    backbones = comparison.of_role("backbone")
    gain = comparison.gain(backbones[0], label, place) if backbones else None
    return Card(scenario, gain, metrics.auc, metrics.rows, judge(comparison, label, place))


def _headline(comparison: Comparison, cards: Sequence[Card]) -> list[str]:
    """The answer in a sentence, and what should not be missed about it."""
    whole, *inner = cards
    if comparison.vectors in CONTROLS:
        told = [
            f"This run is a control, with {CONTROLS[comparison.vectors]}: it shows what the added layers are worth."
        ]
    else:
        told = [_ANSWERS[whole.verdict.kind]]
        kinds = [card.verdict.kind for card in inner if not card.few]
        if kinds:
            told.append(
                f"Among scenarios with {FEW_ROWS:,} rows or more it counts in {kinds.count('counts')} of {len(kinds)}, "
                f"and may be chance in {kinds.count('leads')}; each is judged alone, one of many may count by chance."
            )
        else:
            told.append(f"No scenario has the {FEW_ROWS:,} rows that it takes to tell of it alone.")
    if whole.gain is not None:
        told.append(f"Over all rows its AUC differs from that of its backbone by {_gained(whole.gain)}.")
    if any(card.gain is not None and card.gain.mean > SUSPICIOUS and not card.few for card in cards):
        told.append(
            f"A gain above {SUSPICIOUS} is more than was ever published of this method: before believing it, make sure "
            "that no row that is predicted, or a later one, entered the prompts."
        )
    return told


def _table(comparison: Comparison, title: str, label: str, metric: str) -> dict[str, Any]:
    """A metric of the run, and what it gains over each other."""
    rows = []
    for place in [*(name for name, block in comparison.report.scenarios.items() if block[label].rows), OVERALL]:
        values = list(comparison.subject.values(label, place, metric).values())
        own = Gain(tuple(values)) if values else None
        gains = tuple(comparison.gain(each, label, place, metric) for each in comparison.others)
        rows.append(Line(place or "all rows", place == OVERALL, _spread(own), gains))
    return {"title": title, "names": [each.name for each in comparison.others], "rows": rows}


def _strength(comparison: Comparison, reading: Reading) -> Strength:
    """Where the levels act most and least."""
    told, bars = [], {}
    shown = plots.largest(comparison, comparison.labels[0], list(reading.scenarios))
    words = {
        "scenario_level": "scenario level adds a logit of {:.1%} of the backbone's",
        "user_level": "user level moves the input by {:.1%} of its length",
    }
    for level, does in words.items():
        values = {
            each: value for each, acts in reading.scenarios.items() if (value := getattr(acts, level)) is not None
        }
        if not values:
            continue
        most, least = max(values, key=lambda each: values[each]), min(values, key=lambda each: values[each])
        text = f"The {does.format(values[most])} in {most}"
        if len(values) > 1:
            text += f", where it acts most, and {values[least]:.1%} in {least}, where it acts least"
        told.append(f"{text}.")
        bars[level.replace("_", " ")] = [values.get(each, 0.0) for each in shown]
    return Strength(tuple(told), plots.svg(plots.strengths(shown, bars), "strength"), reading.scenarios)


def _similarity(comparison: Comparison, reading: Reading, store: VectorStore) -> Similarity | None:
    """Which scenarios' vectors are alike, and what the model has made of them."""
    if reading.given is None or reading.made is None or len(reading.given) < MIN_SCENARIOS:
        return None
    names = store.scenario_names()
    matrices = {"vectors that it is given": _cosines(reading.given), "codes that it learned": _cosines(reading.made)}
    told = []
    if comparison.vectors in ("random", "trained"):
        told.append(
            f"The scenarios of this run have {CONTROLS[comparison.vectors]}, not the language model's: likeness is of "
            "chance, or of training."
        )
    for title, matrix in matrices.items():
        pairs = sorted(combinations(range(len(names)), 2), key=lambda pair: matrix[pair])
        (one, other), (third, fourth) = pairs[-1], pairs[0]
        told.append(
            f"Among the {title}, {names[one]} and {names[other]} are most alike ({matrix[one, other]:.2f}), "
            f"{names[third]} and {names[fourth]} least ({matrix[third, fourth]:.2f})."
        )
    prompts = dict(zip(names, store.scenario_prompts(), strict=True))
    shown = plots.largest(comparison, comparison.labels[0], names)
    places = [names.index(name) for name in shown]
    parts = {title: matrix[np.ix_(places, places)] for title, matrix in matrices.items()}
    return Similarity(tuple(told), plots.svg(plots.similarities(shown, parts), "similarity"), prompts)


def _alike(people: People) -> list[str]:
    """Whether neighbours have more in common than any two users."""
    common = people.in_common
    if common is None:
        return ["There are too few users to tell whether neighbours have more in common than others."]
    return [
        f"Of the words in what two users chose, nearest neighbours share {common.nearest_words:.1%}, any two users "
        f"{common.random_words:.1%}; of the items, {common.nearest_items:.1%} and {common.random_items:.1%} "
        f"({common.users:,} users, each with its nearest among them)."
    ]


def _cosines(vectors: Floats) -> Floats:
    """`[S, S]` of vectors less their mean; that of a vector without a length is 0."""
    centred = vectors - vectors.mean(axis=0)
    sizes = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.where(sizes > 0, sizes, 1)
    cosines: Floats = unit @ unit.T
    return cosines


def _date(seconds: int | None) -> str | None:
    return None if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _gained(gain: Gain) -> str:
    return f"{gain.mean:+.4f}" + (f" ± {gain.std:.4f}" if gain.std is not None else "")


def _spread(values: Gain | None) -> str:
    return "-" if values is None else _gained(values).removeprefix("+")


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


_ANSWERS = {
    "counts": f"Yes: over all rows it is better than its backbone and than every control, beyond chance ({TEST}).",
    "leads": f"Perhaps: over all rows it is ahead of its backbone and every control, but that may be chance ({TEST}).",
    "fails": "No: over all rows it is not ahead of its backbone and every control.",
    "open": "Not known yet: runs to compare with are missing, and a gain counts only over all controls.",
    "undefined": "Not known: over all rows, AUC is not defined.",
}
"""Kind of the verdict over all rows -> whether the language model helps. Scenarios have no say: among many, one is
ahead by chance."""
