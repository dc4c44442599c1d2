"""Which runs a run is compared with, and what it gains over them.

A comparison is fair where nothing differs but the model: the data, the order of their rows, the tables, the stages and
the seed are the same. Runs that differ in nothing but the seed are one `Variant`; two variants are compared seed by
seed.
"""

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from msr_dist.evaluate import metrics_file
from msr_dist.metrics import LabelMetrics, Report
from msr_dist.run import CONFIG_FILE, RunConfig, read_run
from msr_dist.schema import KNOWLEDGE_TABLE

Role = Literal["subject", "backbone", "control", "ablation", "other"]

WRAPPER = "llm4msr"
"""The kind of model that brings a language model's knowledge to a backbone."""
CONTROLS = {"random": "random vectors", "shuffled": "shuffled users", "trained": "trained vectors"}
"""What stands in for a language model's vectors -> what the runs are called."""
OVERALL = ""
"""Stands for all rows in the place of a scenario's name, which is never empty."""
BACKBONE_FILE = "backbone.toml"
"""In the run's folder: what its backbone alone is trained from, as no setting on a command line takes the section
[knowledge] away."""
LEVEL = 0.05
"""A gain is told from chance where `TEST` says so at this level."""
TEST = f"one-sided sign test over seeds at {LEVEL:.0%}, which five of five seeds pass"


@dataclass(frozen=True)
class Finished:
    """A run with metrics."""

    run: RunConfig
    report: Report


@dataclass(frozen=True)
class Variant:
    """Runs that differ in nothing but the seed."""

    name: str
    role: Role
    runs: Mapping[int, Finished]
    """By seed."""

    def values(self, label: str, scenario: str, metric: str) -> dict[int, float]:
        """A metric by seed, where it is defined; `scenario` may be `OVERALL`."""
        found = {seed: _metric(each.report, label, scenario, metric) for seed, each in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass(frozen=True)
class Missing:
    """A run that would have to be trained, or finished, for the comparison to be whole."""

    name: str
    role: Role
    command: str


@dataclass(frozen=True)
class Comparison:
    """A run, with those that differ from it in seed only, and all that it is compared with."""

    run: RunConfig
    subject: Variant
    others: tuple[Variant, ...]
    missing: tuple[Missing, ...]
    notes: tuple[str, ...]
    """What was left out, and why."""

    @property
    def wraps(self) -> bool:
        """Whether the run brings knowledge to a backbone."""
        return self.vectors is not None

    @property
    def vectors(self) -> str | None:
        """Whose vectors the run reads: those of `CONTROLS`, or the language model's; None where it reads none."""
        model = _model(self.run)
        return str(model["vectors"]) if model["kind"] == WRAPPER else None

    @property
    def labels(self) -> list[str]:
        """As the run's metrics have them; the first is the one that is shown first."""
        return list(self.report.overall)

    @property
    def report(self) -> Report:
        """The run's own."""
        return self.subject.runs[self.run.seed].report

    def of_role(self, *roles: Role) -> list[Variant]:
        """The other variants with one of these roles."""
        return [each for each in self.others if each.role in roles]

    def gain(self, other: Variant, label: str, scenario: str, metric: str = "auc") -> "Gain | None":
        """What the run gains over `other`; None where no seed defines it for both."""
        own, its = self.subject.values(label, scenario, metric), other.values(label, scenario, metric)
        sign = -1 if metric == "log_loss" else 1
        shared = sorted(own.keys() & its.keys())
        return Gain(tuple(sign * (own[seed] - its[seed]) for seed in shared)) if shared else None


@dataclass(frozen=True)
class Gain:
    """Differences seed by seed, above 0 where the run is better."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return mean(self.values)

    @property
    def std(self) -> float | None:
        """None for a single seed, which has no spread."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def wins(self) -> int:
        """Seeds in which the run is better."""
        return sum(value > 0 for value in self.values)

    @property
    def beyond_chance(self) -> bool:
        """Whether so many wins would be rarer than `LEVEL` if better and worse were equally likely."""
        seeds = len(self.values)
        as_many = sum(math.comb(seeds, wins) for wins in range(self.wins, seeds + 1))
        return as_many <= LEVEL * float(2**seeds)


@dataclass(frozen=True)
class Verdict:
    """Whether a gain counts, in a word for the eye and a sentence for the reader."""

    kind: Literal["counts", "leads", "fails", "open", "undefined"]
    sentence: str


def compare(run: RunConfig, against: Sequence[RunConfig]) -> Comparison:
    """Find what `run` is compared with: in the folder of its runs, and those of `against`.

    Of runs in the folder, only those are taken that differ in the model alone.

    Raises:
        ValueError: `run` or one of `against` has no metrics of the split that `run` is judged on, or one of `against`
            is of other data, is `run` itself, or is of a seed that `run` was not trained with.
    """
    split = run.evaluation.final
    subject = {run.seed: Finished(run, _report(run, split))}
    notes: list[str] = []
    unfinished: list[RunConfig] = []
    groups: dict[str, dict[int, Finished]] = {}
    for other in _in_folder(run, notes):
        if not _comparable(run, other):
            continue
        if not metrics_file(other.folder, split).is_file():
            unfinished.append(other)
            continue
        same = subject if not _differences(run, other) else groups.setdefault(_identity(other), {})
        if other.seed in same:
            notes.append(f"{other.name} has the settings and the seed of {same[other.seed].run.name}: left out")
        else:
            same[other.seed] = Finished(other, _report(other, split))
    for other in against:
        if other.data.absolute() != run.data.absolute():
            raise ValueError(f"--against {other.folder}: of other data, {other.data}; {run.folder} is of {run.data}")
    for other in sorted(against, key=lambda each: bool(_differences(run, each))):
        if not _differences(run, other):
            if other.seed in subject:
                raise ValueError(f"--against {other.folder}: has the settings and the seed of {run.folder} itself")
            subject[other.seed] = Finished(other, _report(other, split))
        elif other.seed not in subject:
            raise ValueError(
                f"--against {other.folder}: seed {other.seed}, but {run.name} was trained with {_listed(subject)}; "
                "runs are compared seed by seed"
            )
        else:
            groups.setdefault(_identity(other), {})[other.seed] = Finished(other, _report(other, split))
    others = []
    for variant in _named(run, list(groups.values())):
        if variant.runs.keys() & subject.keys():
            others.append(variant)
        else:
            notes.append(f"{variant.name}: left out, it has {_listed(variant.runs)} and this run {_listed(subject)}")
    missing = _missing(run, others, unfinished)
    own = Variant(model_name(run), "subject", dict(sorted(subject.items())))
    return Comparison(run, own, tuple(others), missing, tuple(notes))


def judge(comparison: Comparison, label: str, scenario: str) -> Verdict:
    """Whether the AUC that the run gains over its backbone counts: only over all controls, and beyond chance.

    One verdict needs every one of its gains to be beyond chance, so that no correction for their number is due.
    """
    backbones, controls = comparison.of_role("backbone"), comparison.of_role("control")
    if comparison.vectors in CONTROLS:
        return Verdict("open", f"A control itself: {CONTROLS[comparison.vectors]} say nothing of what is known.")
    if not comparison.subject.values(label, scenario, "auc"):
        return Verdict("undefined", "AUC is not defined: all labels here are alike.")
    over = {each.name: gain for each in backbones if (gain := comparison.gain(each, label, scenario))}
    if not over:
        return Verdict("open", "Open: there is no run of its backbone to compare with.")
    if lost := _least(over):
        return Verdict("fails", f"No gain over {lost}.")
    rivals = {each.name: gain for each in controls if (gain := comparison.gain(each, label, scenario))}
    if lost := _least(rivals):
        return Verdict("fails", f"Does not count: {lost} do as well or better, so it is not the knowledge.")
    if absent := [each.name for each in comparison.missing if each.role == "control"]:
        return Verdict("open", f"Better than its backbone; whether that counts is open without {_joined(absent)}.")
    gains = over | rivals
    seeds = min(len(gain.values) for gain in gains.values())
    if all(gain.beyond_chance for gain in gains.values()):
        return Verdict("counts", f"Counts: better than its backbone and all controls, over {seeds} seeds.")
    weakest = min(gains, key=lambda name: gains[name].wins / len(gains[name].values))
    wins, tried = gains[weakest].wins, len(gains[weakest].values)
    reason = f"better than {weakest} in {wins} of {tried} {'seed' if tried == 1 else 'seeds'}"
    return Verdict("leads", f"Ahead of its backbone and all controls, but that may be chance: {reason} ({TEST}).")


def backbone_alone(run: RunConfig) -> RunConfig:
    """The run that differs from `run` in nothing but that its backbone stands alone."""
    tables = {name: layout for name, layout in run.parallel.tables.items() if name != KNOWLEDGE_TABLE}
    changes = {"name": f"{run.name}-backbone", "model": run.model.backbone, "knowledge": None}
    return run.model_copy(update=changes | {"parallel": run.parallel.model_copy(update={"tables": tables})})


def model_name(run: RunConfig) -> str:
    """Such as `llm4msr(star)`."""
    return _kind(_model(run))


def _least(gains: Mapping[str, Gain]) -> str | None:
    """The name over which least is gained, where that is nothing."""
    least = min(gains, key=lambda name: gains[name].mean, default=None)
    return least if least is not None and gains[least].mean <= 0 else None


def _metric(report: Report, label: str, scenario: str, metric: str) -> float | None:
    block: Mapping[str, LabelMetrics] = report.overall if scenario == OVERALL else report.scenarios.get(scenario, {})
    value: float | None = getattr(block[label], metric) if label in block else None
    return value


def _report(run: RunConfig, split: str) -> Report:
    file = metrics_file(run.folder, split)
    if not file.is_file():
        typed = _typed(run.folder)
        raise ValueError(
            f"{run.folder}: no {file.name} there; finish the run with `msr-dist train {typed}/{CONFIG_FILE}`, or judge "
            f"it with `msr-dist evaluate {typed} --split {split}`"
        )
    return Report.from_json(json.loads(file.read_text()))


def _in_folder(run: RunConfig, notes: list[str]) -> Iterable[RunConfig]:
    """The other runs in the folder of runs; one that cannot be read is told in `notes`."""
    for file in sorted(run.runs.glob(f"*/{CONFIG_FILE}")):
        if file.parent == run.folder:
            continue
        try:
            other = read_run(file.parent)
            if not other.retrieves:
                yield other
        except ValueError as error:
            reason = str(error).splitlines()[0]
            notes.append(f"{file.parent.name} left out, its configuration is not of this version: {reason}")


def _model(run: RunConfig) -> dict[str, Any]:
    dumped: dict[str, Any] = run.model.model_dump(mode="json")
    return dumped


def _kind(model: Mapping[str, Any]) -> str:
    inner = model.get("backbone")
    return f"{model['kind']}({_kind(inner)})" if isinstance(inner, Mapping) else str(model["kind"])


def _settings(run: RunConfig) -> dict[str, Any]:
    """What decides the losses but the seed, by dotted key; and the split that the run is judged on."""
    whole = run.absolute().model_dump(mode="json")
    kept = {key: whole[key] for key in ("data", "loader", "embeddings", "model", "knowledge")}
    kept["loader"] = _without(kept["loader"], "threads", "prefetch", "memory_limit")
    # What the store was expected to be: that it was, is known.
    kept["knowledge"] = _without(kept["knowledge"] or {}, "model", "pooling", "cutoff")
    kept["stages"] = {str(place): stage for place, stage in enumerate(whole["stages"])}
    kept["evaluation"] = {"final": whole["evaluation"]["final"]}
    return _flat(kept)


def _without(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def _identity(run: RunConfig) -> str:
    return json.dumps(_settings(run), sort_keys=True)


def _differences(run: RunConfig, other: RunConfig) -> dict[str, Any]:
    """Keys of which the two have different values -> the value of `other`, None where it has none."""
    own, its = _settings(run), _settings(other)
    return {key: its.get(key) for key in sorted(own.keys() | its.keys()) if own.get(key) != its.get(key)}


def _comparable(run: RunConfig, other: RunConfig) -> bool:
    """Whether `other`, which nobody asked for by name, tells something about `run`."""
    changed = _differences(run, other)
    if not all(key.startswith(_MODEL) for key in changed):
        return False
    return _role(run, other) != "other" or _model(run)["kind"] != WRAPPER


def _role(run: RunConfig, other: RunConfig) -> Role:
    """What a comparison with `other` shows, by its model alone."""
    own, its = _model(run), _model(other)
    if own["kind"] != WRAPPER:
        return "other"
    if its == own["backbone"]:
        return "backbone"
    changed = {key.removeprefix("model.") for key in _differences(run, other) if key.startswith(_MODEL)}
    if not changed <= _SWITCHES.keys() | {"vectors"}:
        return "other"
    return "control" if changed == {"vectors"} and its["vectors"] in _controls(its) else "ablation"


def _controls(model: Mapping[str, Any]) -> dict[str, str]:
    """Those of `CONTROLS` that change something: only users' vectors are shuffled, and not every model reads them."""
    return {vectors: name for vectors, name in CONTROLS.items() if vectors != "shuffled" or model["user_level"]}


def _named(run: RunConfig, groups: Sequence[dict[int, Finished]]) -> list[Variant]:
    """The groups as variants, each named by what differs; the backbone first, then controls, ablations and others."""
    firsts = [group[min(group)].run for group in groups]
    names = [_name(run, first) for first in firsts]
    named = []
    for group, first, name in zip(groups, firsts, names, strict=True):
        distinct = f"{name}, {first.name}" if names.count(name) > 1 else name
        named.append(Variant(distinct, _role(run, first), dict(sorted(group.items()))))
    order: list[Role] = ["backbone", "control", "ablation", "other"]
    return sorted(named, key=lambda each: (order.index(each.role), each.name))


def _name(run: RunConfig, other: RunConfig) -> str:
    """What is different in `other`, in words where there are any."""
    changed = _differences(run, other)
    words = [f"{key} = {value}" for key, value in changed.items() if not key.startswith(_MODEL)]
    role, its = _role(run, other), _model(other)
    if role == "backbone":
        return ", ".join([f"the backbone {_kind(its)}", *words])
    if role == "other":
        if _kind(its) != model_name(run):
            return ", ".join([_kind(its), *words])
        return ", ".join([_kind(its), *(f"{key} = {value}" for key, value in changed.items())])
    told = [_SWITCHES[key][bool(its[key])] for key in _SWITCHES if f"model.{key}" in changed]
    if "model.vectors" in changed:
        told.insert(0, CONTROLS.get(its["vectors"], "the language model's vectors"))
    return ", ".join([*told, *words])


def _missing(run: RunConfig, others: Sequence[Variant], unfinished: Sequence[RunConfig]) -> tuple[Missing, ...]:
    """The backbone, controls and ablations that no finished run stands for, each with the command that makes it."""
    model = _model(run)
    if model["kind"] != WRAPPER:
        return ()
    wanted: list[tuple[str, Role, str, list[str]]] = [
        (f"the backbone {_kind(model['backbone'])}", "backbone", "backbone", [])
    ]
    if model["vectors"] not in CONTROLS:
        wanted += [(name, "control", each, [f"model.vectors={each}"]) for each, name in _controls(model).items()]
    for key, (off, on) in _SWITCHES.items():
        if key.endswith("_level") and not any(model[level] for level in _SWITCHES if level not in (key, "as_features")):
            continue  # the other level is off already, and without both there is the backbone
        word = off if model[key] else on
        suffix = key.replace("_", "-") if not model[key] else f"no-{key.replace('_', '-')}"
        wanted.append((word, "ablation", suffix, [f"model.{key}={json.dumps(not model[key])}"]))
    begun = {_name(run, each): each for each in unfinished if each.seed == run.seed}
    missing = []
    for name, role, suffix, overrides in wanted:
        if any(each.name == name for each in others):
            continue
        if name in begun:
            command = f"msr-dist train {_typed(begun[name].folder)}/{CONFIG_FILE}"
        elif role == "backbone":
            command = f"msr-dist train {_typed(run.folder)}/{BACKBONE_FILE}"
        else:
            settings = [f"name={run.name}-{suffix}", *overrides]
            command = f"msr-dist train {_typed(run.folder)}/{CONFIG_FILE} {shlex.join(settings)}"
        missing.append(Missing(name, role, command))
    return tuple(missing)


def _typed(path: Path) -> str:
    """The path as one types it: from here, where it is below."""
    near = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return shlex.quote(str(near))


def _joined(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]


def _listed(seeds: Iterable[int]) -> str:
    listed = ", ".join(map(str, sorted(seeds)))
    return f"seeds {listed}" if "," in listed else f"seed {listed}"


_MODEL = ("model.", "knowledge.")
"""Keys in which two runs may differ and still be compared unasked."""
_SWITCHES = {
    "user_level": ("without user level", "with user level"),
    "scenario_level": ("without scenario level", "with scenario level"),
    "as_features": ("with meta layers", "vectors as features"),
}
"""Setting of the model -> what it is called where it is off, and on."""
