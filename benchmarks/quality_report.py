"""Tables and plots of a grid's results: `README.md` beside them, for whoever reads the repository."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from quality_grid import DataConfig, Grid, Line, read_lines, scenario_auc
from scipy import stats

from msr_dist.files import write_whole

BASELINES = ("mlp", "single")
"""What every model is compared with: the scenario as a feature, and a model of its own for each scenario."""
MIN_ROWS = 1000
"""Scenarios with fewer test rows are in every mean by their rows, but no difference is read off them alone."""

Metric = Callable[[Line], float]

_HEAD = """# {name}

Written by `python benchmarks/quality.py report {file}`; each run is a line in the files beside this one, with its
commit and all its settings.

On each data set every model had the same search, one seed, judged on the valid split by {judge}.
Its best setting then ran with the seeds shown, judged once on the test split. Mean ± standard deviation over seeds;
`scenario AUC` is the mean of the scenarios' AUCs by their rows; `samples/s` is of one core that shared its machine.
p is of a two-sided paired t-test over seeds that both models have, not corrected for the number of models. Scenarios
below {rows:,} test rows have no column.
"""
_JUDGES = {"scenarios": "the scenarios' AUCs, averaged by rows", "overall": "the overall AUC"}


@dataclass(frozen=True)
class Runs:
    """The runs of one model on one data set, by seed."""

    model: str
    by_seed: Mapping[int, Line]

    @property
    def lines(self) -> list[Line]:
        """Lines in the order of the seeds."""
        return [self.by_seed[seed] for seed in sorted(self.by_seed)]

    def spread(self, metric: Metric, form: str = ".4f") -> str:
        """Mean and standard deviation over seeds; a dash where a run does not define the metric."""
        values = [metric(line) for line in self.lines]
        if any(math.isnan(value) for value in values):
            return "-"
        deviation = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
        return f"{mean(values):{form}}{deviation}"

    def gains(self, other: "Runs", metric: Metric) -> list[float]:
        """Differences to `other`, one for each seed that both have."""
        seeds = sorted(self.by_seed.keys() & other.by_seed.keys())
        return [metric(self.by_seed[seed]) - metric(other.by_seed[seed]) for seed in seeds]


def write_report(grid: Grid) -> Path:
    """Write README.md and the plots into the folder of the grid's results; the path of the former."""
    judge = _JUDGES[grid.config.judge]
    parts = [_HEAD.format(name=grid.file.stem, file=grid.file, judge=judge, rows=MIN_ROWS)]
    for data in grid.config.data:
        models, stale = _standing(grid, data)
        if not models:
            continue
        trials = grid.config.search.trials if data.trials is None else data.trials
        parts += [f"## {data.name}\n\n`{data.prepare}`; {trials} trials per model\n"]
        parts += [_quality(models), _comparison(grid, models)]
        if stale:
            parts.append(f"{stale} older lines, of other settings than a model's newest, are left out.\n")
        for name, draw in (("gain", _gain_plot), ("seesaw", _seesaw_plot), ("speed", _speed_plot)):
            if figure := draw(grid, models):
                file = grid.results / f"{data.name}-{name}.svg"
                _save(figure, file)
                parts.append(f"![{name} on {data.name}]({file.name})\n")
    if len(parts) == 1:
        raise ValueError(f"{grid.results}: no results yet; make some: python benchmarks/quality.py run {grid.file}")
    write_whole(grid.results / "README.md", "\n".join(parts))
    return grid.results / "README.md"


def _standing(grid: Grid, data: DataConfig) -> tuple[dict[str, Runs], int]:
    """Runs by model in the grid's order, and the number of lines that have been superseded.

    A model's runs have the settings of its newest line, so that seeds are all that tells them apart.
    """
    lines = [line for line in read_lines(grid.file_of(data.name, "test")) if line["seed"] in grid.config.seeds]
    found, stale = {}, 0
    for model in grid.config.models:
        own = [line for line in lines if line["model"] == model]
        newest = [line for line in own if _without_seed(line) == _without_seed(own[-1])]
        stale += len(own) - len(newest)
        if newest:
            found[model] = Runs(model, {line["seed"]: line for line in newest})
    return found, stale


def _without_seed(line: Line) -> str:
    return json.dumps([line["data_digest"], line["settings"] | {"seed": 0}], sort_keys=True)


def _quality(models: Mapping[str, Runs]) -> str:
    columns = {"AUC": _overall("auc"), "scenario AUC": scenario_auc}
    columns |= {name: _scenario(name) for name in _large_scenarios(models)}
    columns |= {"log loss": _overall("log_loss"), "user AUC": _overall("user_auc")}
    rows = [["model", "seeds", *columns, "calibration", "dense parameters", "samples/s"]]
    for model, runs in models.items():
        cells = [runs.spread(metric) for metric in columns.values()] + [runs.spread(_overall("calibration"), ".3f")]
        speed = mean(line["samples_per_second"] for line in runs.lines)
        rows.append([model, str(len(runs.lines)), *cells, f"{runs.lines[0]['dense_parameters']:,}", f"{speed:,.0f}"])
    return _markdown(rows)


def _comparison(grid: Grid, models: Mapping[str, Runs]) -> str:
    heads = [head for name in BASELINES for head in (f"gain over {name}", "p", f"worst scenario against {name}")]
    rows = [["model", *heads, "chosen"]]
    for model, runs in models.items():
        cells: list[str] = []
        for name in BASELINES:
            gains = runs.gains(models[name], grid.judged) if name in models and name != model else []
            worst = _worst(runs, models[name], _large_scenarios(models)) if gains else "-"
            cells += [f"{mean(gains):+.4f}" if gains else "-", _p_value(gains), worst]
        chosen = ", ".join(
            f"{key.removeprefix('stages.0.')} {value}" for key, value in runs.lines[-1]["chosen"].items()
        )
        rows.append([model, *cells, chosen or "-"])
    return _markdown(rows)


def _worst(runs: Runs, baseline: Runs, scenarios: Sequence[str]) -> str:
    """The seesaw: what the scenario that fares worst gains, on average over seeds."""
    changes = {name: mean(runs.gains(baseline, _scenario(name))) for name in scenarios}
    worst = min(changes, key=changes.__getitem__, default=None)
    return "-" if worst is None else f"{changes[worst]:+.4f} ({worst})"


def _p_value(gains: Sequence[float]) -> str:
    if len(gains) < 2 or not stdev(gains):
        return "-"
    return f"{stats.ttest_1samp(gains, 0.0).pvalue:.3f}"


def _large_scenarios(models: Mapping[str, Runs]) -> list[str]:
    first = next(iter(models.values())).lines[0]
    return [
        name for name, block in first["scenarios"].items() if block["rows"] >= MIN_ROWS and block["auc"] is not None
    ]


def _overall(metric: str) -> Metric:
    return lambda line: _number(line["overall"][metric])


def _scenario(name: str) -> Metric:
    return lambda line: _number(line["scenarios"][name]["auc"])


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _markdown(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _gain_plot(grid: Grid, models: Mapping[str, Runs]) -> Figure | None:
    """Forest plot: a dot per seed, their mean, and its 95% interval."""
    if "mlp" not in models or len(models) < 2:
        return None
    gains = {name: runs.gains(models["mlp"], grid.judged) for name, runs in models.items() if name != "mlp"}
    gains = dict(sorted(((name, each) for name, each in gains.items() if each), key=lambda pair: mean(pair[1])))
    figure, axes = _rows(list(gains), "AUC gain over mlp")
    for row, values in enumerate(gains.values()):
        axes.plot(values, [row] * len(values), ".", color="silver")
        half = 0.0
        if len(values) > 1:
            half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
        axes.errorbar(mean(values), row, xerr=half, fmt="o", color="tab:blue", capsize=3)
    return figure


def _seesaw_plot(_grid: Grid, models: Mapping[str, Runs]) -> Figure | None:
    """What each scenario gains over a model of its own."""
    scenarios = _large_scenarios(models)
    if "single" not in models or len(models) < 2 or not scenarios:
        return None
    shown = {name: runs for name, runs in models.items() if name != "single" and _shared(runs, models["single"])}
    figure, axes = _rows(list(shown), "AUC change of each scenario against a model of its own (single)")
    for number, scenario in enumerate(scenarios):
        changes = [mean(runs.gains(models["single"], _scenario(scenario))) for runs in shown.values()]
        axes.plot(changes, range(len(shown)), "osDv^<>Pp*"[number % 10], color=f"C{number % 10}", label=scenario)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _shared(runs: Runs, other: Runs) -> bool:
    return bool(runs.by_seed.keys() & other.by_seed.keys())


def _speed_plot(grid: Grid, models: Mapping[str, Runs]) -> Figure | None:
    """Quality against what it costs."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for model, runs in models.items():
        speed = mean(line["samples_per_second"] for line in runs.lines)
        auc = mean(grid.judged(line) for line in runs.lines)
        axes.plot(speed, auc, "o", color="tab:blue")
        axes.annotate(model, (speed, auc), xytext=(4, 3), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("training samples/s, one core")
    axes.set_ylabel("scenario AUC" if grid.config.judge == "scenarios" else "AUC")
    axes.grid(alpha=0.3)
    return figure


def _rows(names: Sequence[str], label: str) -> tuple[Figure, Axes]:
    """A figure with a row per model, and a line where nothing is gained."""
    figure = Figure(figsize=(7, 1.2 + 0.26 * len(names)), layout="constrained")
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
