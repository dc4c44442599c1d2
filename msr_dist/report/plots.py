"""The plots of a report, as SVG that stands within the page: the same bytes for the same figures."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from msr_dist.report.comparison import OVERALL, Comparison, Variant

MAX_SCENARIOS = 16
"""Scenarios that a plot shows, the largest; the tables have them all."""
_MAX_NUMBERED = 10
"""With more scenarios, the cells of a heat map have no room for numbers."""
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""Okabe and Ito's, which people with any colour vision tell apart."""
_MARKERS = "osD^vP"
_NAME_LENGTH = 28
_STYLE: dict[Any, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    # A name is a name: a dollar sign in it begins no formula.
    "text.parse_math": False,
    "svg.fonttype": "none",
}


@mpl.rc_context(_STYLE)
def gains(comparison: Comparison, label: str, scenarios: Sequence[str]) -> Figure | None:
    """What each scenario gains over the backbone and the controls, and beside it, over the ablations."""
    titled = {
        "over the backbone and the controls": comparison.of_role("backbone", "control"),
        "over itself with a part changed": comparison.of_role("ablation"),
        "over other runs": comparison.of_role("other"),
    }
    panels = {title: variants for title, variants in titled.items() if variants}
    if not panels:
        return None
    rows = [*largest(comparison, label, scenarios), OVERALL]
    figure = _figure(4.2 * len(panels) + 1.3, 1.5 + 0.45 * len(rows) + 0.1 * max(map(len, panels.values())))
    columns = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (title, variants) in zip(columns, panels.items(), strict=True):
        for row in range(0, len(rows), 2):
            axes.axhspan(row - 0.5, row + 0.5, color="#f3f5f7", zorder=0)
        for number, variant in enumerate(variants):
            # From the top down within a scenario, as the legend has them.
            shift = 0.32 * (2 * (number + 0.5) / len(variants) - 1)
            _marks(axes, comparison, variant, label, rows, number, shift)
        _gain_axis(axes, comparison)
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), title=title, frameon=False, ncols=2)
    _name_rows(columns[0], rows)
    return figure


@mpl.rc_context(_STYLE)
def models(comparison: Comparison, label: str, scenarios: Sequence[str]) -> Figure | None:
    """What is gained over each other run: a grey dot for each scenario, and a mark over all rows."""
    others = {each.name: each for each in comparison.others}
    if not others:
        return None
    figure = _figure(7.0, 1.0 + 0.3 * len(others))
    axes = figure.subplots()
    for row, variant in enumerate(others.values()):
        inner = [gain.mean for name in scenarios if (gain := comparison.gain(variant, label, name))]
        axes.plot(inner, [row] * len(inner), "o", color="silver", markersize=4)
        if gain := comparison.gain(variant, label, OVERALL):
            axes.errorbar(gain.mean, row, xerr=gain.std, fmt="D", color=_COLORS[0], markersize=5)
    axes.plot([], [], "o", color="silver", markersize=4, label="a scenario")
    axes.plot([], [], "D", color=_COLORS[0], markersize=5, label="all rows")
    _gain_axis(axes, comparison)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, ncols=2)
    _name_rows(axes, list(others))
    return figure


@mpl.rc_context(_STYLE)
def strengths(scenarios: Sequence[str], bars: Mapping[str, Sequence[float]]) -> Figure:
    """One panel of bars for each of `bars`: title -> a number for each scenario."""
    figure = _figure(3.6 * len(bars) + 1.8, 1.0 + 0.3 * len(scenarios))
    columns = figure.subplots(1, len(bars), sharey=True, squeeze=False)[0]
    for axes, color, (title, values) in zip(columns, _COLORS, bars.items(), strict=False):
        drawn = axes.barh(range(len(scenarios)), values, color=color, height=0.65)
        axes.bar_label(drawn, [f"{value:.1%}" for value in values], padding=3, fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        axes.margins(x=0.18)
        axes.grid(axis="x", alpha=0.3)
    _name_rows(columns[0], scenarios)
    return figure


@mpl.rc_context(_STYLE)
def similarities(scenarios: Sequence[str], matrices: Mapping[str, np.ndarray]) -> Figure:
    """A heat map for each of `matrices`: title -> cosines `[S, S]`."""
    side = min(5.0, 1.6 + 0.42 * len(scenarios))
    figure = _figure(side * len(matrices) + 2.0, side)
    columns = figure.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
    names = [_short(name) for name in scenarios]
    for axes, (title, matrix) in zip(columns, matrices.items(), strict=True):
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set_title(title, fontsize=9)
        rotated = {"rotation": 90} if len(names) > _MAX_NUMBERED else {"rotation": 45, "ha": "right"}
        axes.set_xticks(range(len(names)), names, **rotated)
        axes.set_yticks(range(len(names)), names)
        if len(names) <= _MAX_NUMBERED:
            for (row, column), value in np.ndenumerate(matrix):
                color = "white" if abs(value) > 0.6 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=list(columns), shrink=0.8, label="cosine")
    return figure


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element; `name` keeps its ids apart from those of other plots on the page."""
    written = io.StringIO()
    with mpl.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    element = written.getvalue().partition("<svg")[2]
    return f'<svg role="img" aria-label="{name}"' + re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", element)


def largest(comparison: Comparison, label: str, scenarios: Sequence[str]) -> list[str]:
    """The scenarios with most rows, as many as a plot shows, in the order of `scenarios`."""
    rows = {name: block[label].rows for name, block in comparison.report.scenarios.items() if label in block}
    kept = sorted(scenarios, key=lambda name: -rows.get(name, 0))[:MAX_SCENARIOS]
    return [name for name in scenarios if name in kept]


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _gain_axis(axes: Axes, comparison: Comparison) -> None:
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("AUC gained" + (", ± std over seeds" if len(comparison.subject.runs) > 1 else ""))
    axes.grid(axis="x", alpha=0.3)


def _marks(
    axes: Axes, comparison: Comparison, variant: Variant, label: str, rows: Sequence[str], number: int, shift: float
) -> None:
    """One variant's mark in each row that defines one."""
    color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
    for row, scenario in enumerate(rows):
        if gain := comparison.gain(variant, label, scenario):
            axes.errorbar(gain.mean, row + shift, xerr=gain.std, fmt=marker, color=color, markersize=4.5, linewidth=1)
    axes.plot([], [], marker, color=color, markersize=4.5, label=_short(variant.name))


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """The first name on top."""
    axes.set_yticks(range(len(names)), ["all rows" if name == OVERALL else _short(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)


def _short(name: str) -> str:
    clean = "".join(letter if letter.isprintable() else "·" for letter in name)
    return clean if len(clean) <= _NAME_LENGTH else f"{clean[: _NAME_LENGTH - 1]}…"
