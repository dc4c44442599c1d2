"""Tables and plots of a grid's results: `README.md` beside them, for whoever reads the repository."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from quality_grid import (
    SPLITS,
    DataConfig,
    Failure,
    Grid,
    Line,
    Result,
    Search,
    Split,
    key_of,
    read_lines,
    scenario_auc,
)
from scipy import stats

from msr_dist.files import write_whole

BASELINES = ("mlp", "single")
"""What every model is compared with: the scenario as a feature, and a model of its own for each scenario."""
MIN_ROWS = 1000
"""Scenarios with fewer test rows are in every mean by their rows, but no difference is read off them alone."""
MAX_SHOWN = 8
"""Scenarios that have a column in the table and a mark in the plot; the others are compared all the same."""

Metric = Callable[[Result], float]

_HEAD = """# {name}

Written by `python benchmarks/quality.py report {file}`; each run is a line in the files beside this one, with its
commit and all its settings. A line stands for settings and data, not for the code: it is made again only after someone
has deleted it, so look at the commits below each table.

A model's search is judged on the valid split, one seed, by {judge}; `trials` says how many of them stand, and
[search.md](search.md) shows each. The best setting then ran with the seeds shown, judged once on the test split.
Mean ± standard deviation over seeds; `scenario AUC` is the mean of the scenarios' AUCs by their rows; `samples/s` is of
one core that shared its machine.

p is of a two-sided paired t-test over the seeds that both models have, their number in brackets, not corrected for the
number of models. It covers the noise of training on one fixed test set only: the sampling error of the test set itself,
larger the smaller a scenario is, comes on top. `worst scenario` is the least of all scenarios' mean changes, ± their
standard deviation over seeds: of several noisy numbers the least is negative even where nothing has changed, so read it
with `worse`, the number of scenarios that are significantly worse (paired t-test over seeds, p < .05 after Holm's
correction for the number of scenarios). Scenarios below {rows:,} test rows are not among them.
"""
_SEARCH_HEAD = """# Trials of {name}

Written by `python benchmarks/quality.py report {file}`: {judge}, on the valid split, in the order of the draws; the
best of a model, which its final runs have, is bold. A setting that a model lacks is left out for it, and draws that
differ in nothing else are one run.
"""
_JUDGES = {"scenarios": "the scenarios' AUCs, averaged by rows", "overall": "the overall AUC"}


@dataclass(frozen=True)
class Runs:
    """The runs of one model on one data set, by seed."""

    model: str
    by_seed: Mapping[int, Result]

    @property
    def lines(self) -> list[Result]:
        """Lines in the order of the seeds."""
        return [self.by_seed[seed] for seed in sorted(self.by_seed)]

    def spread(self, metric: Metric, form: str = ".4f") -> str:
        """Mean and standard deviation over seeds; a dash where a run does not define the metric."""
        values = [metric(line) for line in self.lines]
        return "-" if any(math.isnan(value) for value in values) else _spread(values, form)

    def gains(self, other: "Runs", metric: Metric) -> list[float]:
        """Differences to `other`, one for each seed that both have."""
        seeds = sorted(self.by_seed.keys() & other.by_seed.keys())
        return [metric(self.by_seed[seed]) - metric(other.by_seed[seed]) for seed in seeds]


@dataclass(frozen=True)
class Standing:
    """What today's grid would make of one data set, as far as it is there."""

    data: DataConfig
    models: Mapping[str, Runs]
    """Those with a result, in the grid's order."""
    searches: Mapping[str, Search]
    """Of every model."""
    failed: Mapping[str, Sequence[int]]
    """Seeds whose run has failed, by model."""
    left_out: Mapping[str, int]
    """The number of lines that are not shown, by reason."""
    commits: Mapping[str, int]
    """The number of lines that are shown or have chosen a setting, by commit."""


def write_report(grid: Grid) -> Path:
    """Write README.md, search.md and the plots into the folder of the grid's results; the path of the first."""
    judge = _JUDGES[grid.config.judge]
    standings = [_standing(grid, data) for data in grid.config.data]
    if not any(each.models for each in standings):
        left_out = [f"{each.data.name}: {_counted(each.left_out)} left out" for each in standings if each.left_out]
        told = "; ".join(["no results of this grid yet", *left_out])
        raise ValueError(f"{grid.results}: {told}; make some: python benchmarks/quality.py run {grid.file}")
    parts = [_HEAD.format(name=grid.file.stem, file=grid.file, judge=judge, rows=MIN_ROWS)]
    for standing in standings:
        parts.append(f"## {standing.data.name}\n\n{_about(grid, standing)}\n")
        if not standing.models:
            continue
        parts += [_quality(grid, standing), _comparison(grid, standing.models)]
        if grid.config.against:
            parts.append(_claims(grid, standing.models))
        for name, draw in (("gain", _gain_plot), ("seesaw", _seesaw_plot), ("speed", _speed_plot)):
            if figure := draw(grid, standing.models):
                file = grid.results / f"{standing.data.name}-{name}.svg"
                _save(figure, file)
                parts.append(f"![{name} on {standing.data.name}]({file.name})\n")
    searches = [_SEARCH_HEAD.format(name=grid.file.stem, file=grid.file, judge=judge)]
    searches += [_trials(grid, standing) for standing in standings]
    write_whole(grid.results / "search.md", "\n".join(searches))
    write_whole(grid.results / "README.md", "\n".join(parts))
    return grid.results / "README.md"


def _standing(grid: Grid, data: DataConfig) -> Standing:
    models = list(grid.config.models)
    searches, digest = grid.search(data, models), grid.digest(data)
    expected = {case.key: case for case in grid.finals(data, models, grid.config.seeds)}
    by_seed: dict[str, dict[int, Result]] = {model: {} for model in models}
    failed: dict[str, list[int]] = {model: [] for model in models}
    left_out, shown = Counter[str](), list[Line]()
    for split in SPLITS:
        lines, odd = read_lines(grid.file_of(data.name, split))
        if odd:
            left_out["not readable"] += len(odd)
        known = expected.keys() if split == "test" else {case.key for each in searches.values() for case in each.cases}
        newest: dict[str, Line] = {}
        for line in lines:
            key = key_of(line)
            if key is None or key not in known:
                left_out[_why(grid, line, key, split, searches, digest)] += 1
                continue
            left_out["made again since"] += key in newest
            newest[key] = line
        shown += newest.values()
        if split == "test":
            for key, line in newest.items():
                model, seed = expected[key].model, expected[key].run.seed
                if isinstance(line, Result):
                    by_seed[model][seed] = line
                else:
                    failed[model].append(seed)
    found = {model: Runs(model, own) for model, own in by_seed.items() if own}
    return Standing(data, found, searches, failed, +left_out, Counter(line.commit for line in shown))


def _why(grid: Grid, line: Line, key: str | None, split: Split, searches: Mapping[str, Search], digest: str) -> str:
    """The reason why a line is not of today's grid."""
    if line.model not in searches:
        return "of a model that the grid does not have"
    if line.data_digest != digest:
        return "of other data"
    if key is None:
        return "of settings that the code does not know any more"
    if line.seed not in (grid.config.seeds if split == "test" else [grid.config.search.seed]):
        return "of a seed that the grid does not have"
    if split == "test" and not searches[line.model].over:
        return "of a model whose search is not over"
    return "of other settings than the grid's"


def _about(grid: Grid, standing: Standing) -> str:
    """What the tables below are of, and what is missing in them."""
    data, count = standing.data, len(next(iter(standing.searches.values())).drawn)
    search = f"{count} trials for each model" if count else "no search: the grid's settings"
    told = [f"`{data.prepare}`; {search}."]
    if not data.here:
        told.append("The data are not on the machine that wrote this: lines of the newest line's data are shown.")
    if not data.vectors_here:
        told.append("The vectors are not on the machine that wrote this: lines of the newest line's vectors are shown.")
    absent = {model: _lacks(standing, model) for model in standing.searches if model not in standing.models}
    told += [f"No results, {why}: {', '.join(models)}." for why, models in _grouped(absent).items()]
    seeds = set(grid.config.seeds)
    missing = {model: _listed(seeds - runs.by_seed.keys()) for model, runs in standing.models.items()}
    told += [f"No result of seed {which}: {', '.join(models)}." for which, models in _grouped(missing).items()]
    broken = {model: _listed(each) for model, each in standing.failed.items()}
    told += [f"Failed with seed {which}: {', '.join(models)}." for which, models in _grouped(broken).items()]
    if standing.commits:
        told.append(f"Commits: {', '.join(f'{commit} ({lines} lines)' for commit, lines in standing.commits.items())}.")
    if any(commit.endswith("-dirty") for commit in standing.commits):
        told.append("-dirty: the code was not that commit's, and nothing says what it was.")
    if standing.left_out:
        told.append(f"Lines left out: {_counted(standing.left_out)}.")
    large = _large_scenarios(standing.models)
    if len(large) > MAX_SHOWN:
        told.append(f"Of {len(large)} scenarios with {MIN_ROWS:,} test rows the {MAX_SHOWN} largest are shown.")
    return "\n".join([told[0], "", *(f"- {each}" for each in told[1:])])


def _grouped(told: Mapping[str, str]) -> dict[str, list[str]]:
    """Models by what is told of them; those of which nothing is told are left out."""
    groups: dict[str, list[str]] = {}
    for model, text in told.items():
        if text:
            groups.setdefault(text, []).append(model)
    return groups


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def _lacks(standing: Standing, model: str) -> str:
    search = standing.searches[model]
    if not search.over or (search.cases and not search.results):
        return f"{search} trials"
    return "failed" if standing.failed[model] else "not run"


def _counted(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items())


def _trials(grid: Grid, standing: Standing) -> str:
    """What was drawn, and what each model made of it."""
    title, searches = f"## {standing.data.name}\n", standing.searches
    draws = grid.config.search.draw(standing.data)
    if not draws:
        return f"{title}\nNo search: the grid's settings.\n"
    keys = list(draws[0])
    drawn = [["trial", *(key.removeprefix("stages.0.") for key in keys)]]
    drawn += [[str(number), *(str(draw[key]) for key in keys)] for number, draw in enumerate(draws, start=1)]
    rows = [["model", *(str(number) for number in range(1, len(draws) + 1))]]
    for model, search in searches.items():
        best = max((grid.judged(line) for line in search.results), default=None) if search.over else None
        cells = []
        for case in search.drawn:
            line = search.lines.get(case.key)
            if isinstance(line, Result):
                auc = grid.judged(line)
                cells.append(f"**{auc:.4f}**" if auc == best else f"{auc:.4f}")
            else:
                cells.append("failed" if isinstance(line, Failure) else "")
        rows.append([model, *cells])
    return f"{title}\n{_markdown(drawn)}\n{_markdown(rows)}"


def _quality(grid: Grid, standing: Standing) -> str:
    models = standing.models
    columns = {"AUC": _overall("auc"), "scenario AUC": scenario_auc}
    columns |= {name: _scenario(name) for name in _shown(models)}
    columns |= {"log loss": _overall("log_loss"), "user AUC": _overall("user_auc")}
    rows = [["model", "seeds", "trials", *columns, "calibration", "dense parameters", "samples/s"]]
    for model, runs in models.items():
        cells = [runs.spread(metric) for metric in columns.values()] + [runs.spread(_overall("calibration"), ".3f")]
        cells += [f"{runs.lines[0].dense_parameters:,}", f"{_speed(runs):,.0f}"]
        search = standing.searches[model]
        seeds = f"{len(runs.lines)} of {len(grid.config.seeds)}"
        rows.append([model, seeds, str(search) if search.cases else "none", *cells])
    return _markdown(rows)


def _comparison(grid: Grid, models: Mapping[str, Runs]) -> str:
    per_baseline = ("gain over {}", "p", "worst scenario against {}", "worse")
    baselines = [name for name in BASELINES if name in grid.config.models]
    rows = [["model", *(head.format(name) for name in baselines for head in per_baseline), "chosen"]]
    for model, runs in models.items():
        cells: list[str] = []
        for name in baselines:
            gains = runs.gains(models[name], grid.judged) if name in models and name != model else []
            cells += [f"{mean(gains):+.4f}" if gains else "-", _p_value(gains)]
            cells += _seesaw(runs, models[name], _large_scenarios(models)) if gains else ["-", "-"]
        chosen = ", ".join(f"{key.removeprefix('stages.0.')} {value}" for key, value in runs.lines[-1].chosen.items())
        rows.append([model, *cells, chosen or "-"])
    return _markdown(rows)


def _claims(grid: Grid, models: Mapping[str, Runs]) -> str:
    """Each model against those that it has to beat, one by one, and whether it beats every one of them."""
    rows = [["model", "against", "gain", "p", "worst scenario", "worse", "counts"]]
    runs = {name: models.get(name, Runs(name, {})) for name in grid.config.models}
    for model, others in grid.config.against.items():
        gains = {name: runs[model].gains(runs[name], grid.judged) for name in others}
        if any(len(each) < len(grid.config.seeds) for each in gains.values()):
            verdict = "not all run"
        else:
            # Each of them has to hold, so the weakest is the test of all, and needs no correction for their number.
            verdict = "yes" if all(_holds(each) for each in gains.values()) else "no"
        for name, each in gains.items():
            seesaw = _seesaw(runs[model], runs[name], _large_scenarios(models))
            rows.append([model, name, _spread(each, ".4f", "+") if each else "-", _p_value(each), *seesaw, verdict])
    return (
        "A model's gain counts where it is positive with p < .05 (two-sided paired t-test over the grid's seeds) "
        "over every one of those that it is held against; where seeds do not differ at all, the sign decides."
        "\n\n" + _markdown(rows)
    )


def _holds(gains: Sequence[float]) -> bool:
    """Whether a model gains over one that it is held against, by test, or by sign where seeds do not differ at all."""
    p = _p(gains)
    return len(gains) > 1 and mean(gains) > 0 and (p is None or p < 0.05)


def _seesaw(runs: Runs, baseline: Runs, scenarios: Sequence[str]) -> list[str]:
    """The scenario that fares worst, on average over seeds, and how many are significantly worse."""
    changes = {name: gains for name in scenarios if (gains := _defined(runs, baseline, name))}
    if not changes:
        return ["-", "-"]
    worst = min(changes, key=lambda name: mean(changes[name]))
    tested = {name: p for name, gains in changes.items() if (p := _p(gains)) is not None}
    rejected = [name for name in _holm(tested) if mean(changes[name]) < 0]
    return [
        f"{_spread(changes[worst], '.4f', '+')} ({worst})",
        f"{len(rejected)} of {len(tested)}" if tested else "-",
    ]


def _defined(runs: Runs, baseline: Runs, scenario: str) -> list[float]:
    """Changes of a scenario's AUC, over the seeds where both models' runs define one."""
    return [gain for gain in runs.gains(baseline, _scenario(scenario)) if not math.isnan(gain)]


def _holm(p_values: Mapping[str, float], level: float = 0.05) -> list[str]:
    """The names whose hypothesis is rejected, with no false one among them but by chance of `level`."""
    rejected: list[str] = []
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda pair: pair[1])):
        if p * (len(p_values) - rank) >= level:
            break
        rejected.append(name)
    return rejected


def _p(gains: Sequence[float]) -> float | None:
    """Of a two-sided t-test that the mean is 0; None where the gains have no spread to test it by."""
    if len(gains) < 2 or not stdev(gains):
        return None
    return float(stats.ttest_1samp(gains, 0.0).pvalue)


def _p_value(gains: Sequence[float]) -> str:
    p = _p(gains)
    if p is None:
        return f"- ({len(gains)})" if gains else "-"
    return f"{'<.001' if p < 0.0005 else f'{p:.3f}'} ({len(gains)})"


def _interval(values: Sequence[float]) -> float:
    """Half of the mean's 95% interval; 0 for a single value, which has none."""
    if len(values) < 2:
        return 0.0
    return float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def _spread(values: Sequence[float], form: str, sign: str = "") -> str:
    deviation = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{sign}{form}}{deviation}"


def _speed(runs: Runs) -> float:
    return mean(line.samples_per_second for line in runs.lines)


def _large_scenarios(models: Mapping[str, Runs]) -> list[str]:
    """Scenarios with enough test rows, from the largest on; of whichever run names them."""
    rows = {
        name: block.rows
        for runs in models.values()
        for line in runs.lines
        for name, block in line.scenarios.items()
        if block.rows >= MIN_ROWS and block.auc is not None
    }
    return sorted(rows, key=lambda name: -rows[name])


def _shown(models: Mapping[str, Runs]) -> list[str]:
    return _large_scenarios(models)[:MAX_SHOWN]


def _overall(metric: str) -> Metric:
    return lambda line: _number(getattr(line.overall, metric))


def _scenario(name: str) -> Metric:
    return lambda line: _number(line.scenarios[name].auc if name in line.scenarios else None)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _markdown(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _gain_plot(grid: Grid, models: Mapping[str, Runs]) -> Figure | None:
    """Forest plot: a dot per seed, their mean, and its 95% interval; a hollow dot where one seed is all there is."""
    if "mlp" not in models or len(models) < 2:
        return None
    gains = {name: runs.gains(models["mlp"], grid.judged) for name, runs in models.items() if name != "mlp"}
    gains = dict(sorted(((name, each) for name, each in gains.items() if each), key=lambda pair: mean(pair[1])))
    named = [f"{name} (n = {len(values)})" if len(values) == 1 else name for name, values in gains.items()]
    figure, axes = _rows(named, "AUC gain over mlp, 95% interval over seeds")
    for row, values in enumerate(gains.values()):
        if len(values) == 1:
            axes.plot(values, [row], "o", markerfacecolor="none", color="tab:blue")
            continue
        axes.plot(values, [row] * len(values), ".", color="silver")
        axes.errorbar(mean(values), row, xerr=_interval(values), fmt="o", color="tab:blue", capsize=3)
    return figure


def _seesaw_plot(_grid: Grid, models: Mapping[str, Runs]) -> Figure | None:
    """What each scenario gains over a model of its own, with its 95% interval over seeds."""
    scenarios = _shown(models)
    if "single" not in models or len(models) < 2 or not scenarios:
        return None
    shown = {name: runs for name, runs in models.items() if name != "single" and _shared(runs, models["single"])}
    label = "AUC change of each scenario against a model of its own (single), 95% interval over seeds"
    figure, axes = _rows(list(shown), label, 0.15 + 0.07 * len(scenarios))
    for number, scenario in enumerate(scenarios):
        # From the top down within a model's row, as the legend has them.
        shift = 0.35 - 0.7 * (number + 0.5) / len(scenarios)
        marker, color = "osDv^<>P"[number], f"C{number}"
        for row, runs in enumerate(shown.values()):
            if changes := _defined(runs, models["single"], scenario):
                half = _interval(changes)
                place = mean(changes), row + shift
                axes.errorbar(*place, xerr=half or None, fmt=marker, color=color, markersize=3.5, linewidth=0.8)
        axes.plot([], [], marker, color=color, label=scenario)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _shared(runs: Runs, other: Runs) -> bool:
    return bool(runs.by_seed.keys() & other.by_seed.keys())


def _speed_plot(grid: Grid, models: Mapping[str, Runs]) -> Figure | None:
    """Quality against what it costs."""
    points = {name: (_speed(runs), mean(grid.judged(line) for line in runs.lines)) for name, runs in models.items()}
    figure = Figure(figsize=(7, max(3.0, 0.9 + 0.17 * len(points))), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points.values(), strict=True), "o", color="tab:blue")
    # Names stand in a column beside the plot, each tied to its point: at the points themselves they would overlap.
    for place, name in enumerate(sorted(points, key=lambda name: points[name][1])):
        axes.annotate(
            name,
            points[name],
            xytext=(1.04, (place + 0.5) / len(points)),
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "grey", "shrinkB": 3},
            fontsize=8,
            va="center",
        )
    axes.set_xscale("log")
    axes.set_xlabel("training samples/s, one core")
    axes.set_ylabel("scenario AUC" if grid.config.judge == "scenarios" else "AUC")
    axes.grid(alpha=0.3)
    return figure


def _rows(names: Sequence[str], label: str, height: float = 0.26) -> tuple[Figure, Axes]:
    """A figure with a row of that height per model, and a line where nothing is gained."""
    figure = Figure(figsize=(7, 1.2 + height * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    return figure, axes


def _save(figure: Figure, file: Path) -> None:
    """The same bytes for the same figure: neither a date nor random names within."""
    with mpl.rc_context({"svg.hashsalt": file.stem, "svg.fonttype": "none"}):
        figure.savefig(file, metadata={"Date": None})
