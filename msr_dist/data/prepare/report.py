"""What became of the raw rows, for people to read."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from msr_dist.schema import SPLITS, UNSEEN, FeatureSchema


@dataclass(frozen=True)
class ScenarioReport:
    """Counts of one scenario in one split."""

    scenario: str
    split: str
    rows: int
    positives: dict[str, float | None]
    """Label -> share of ones among the rows where it is known; None where it never is."""


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` wrote."""

    out: Path
    rows: dict[str, int]
    """Split -> rows."""
    scenarios: tuple[ScenarioReport, ...]
    tables: dict[str, int]
    """Table -> rows, row 0 included."""
    users: int
    items: int
    """Users and items that the training split holds."""
    warnings: tuple[str, ...] = ()

    def table(self) -> list[list[str]]:
        """Rows of text under a header: scenario, split, rows and the positive rate of each label."""
        labels = list(self.scenarios[0].positives)
        body = [
            [each.scenario, each.split, f"{each.rows:,}", *map(_share, each.positives.values())]
            for each in self.scenarios
        ]
        return [["scenario", "split", "rows", *labels], *body]

    def lines(self) -> list[str]:
        """The report as plain text."""
        cells = self.table()
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
        lines = ["  ".join(row).rstrip() for row in padded]
        splits = ", ".join(f"{name} {count:,}" for name, count in self.rows.items())
        tables = ", ".join(f"{name} {rows:,}" for name, rows in self.tables.items())
        lines += [f"rows: {splits}", f"in training: {self.users:,} users, {self.items:,} items"]
        lines.append(f"table rows: {tables}")
        return [*lines, *(f"warning: {warning}" for warning in self.warnings), f"written to {self.out}"]

    def show(self) -> None:
        """Print the report."""
        print("\n".join(self.lines()))


@dataclass
class Tally:
    """Counts over the rows of one split while they are written."""

    schema: FeatureSchema
    rows: "np.ndarray[tuple[int], np.dtype[np.int64]]" = field(init=False)
    """`[S]`"""
    known: dict[str, "np.ndarray[tuple[int], np.dtype[np.int64]]"] = field(init=False)
    ones: dict[str, "np.ndarray[tuple[int], np.dtype[np.int64]]"] = field(init=False)
    unseen: dict[str, int] = field(init=False)
    """Single-valued feature -> rows on the reserved row."""

    def __post_init__(self) -> None:
        count = len(self.schema.scenarios)
        self.rows = np.zeros(count, np.int64)
        self.known = {label.name: np.zeros(count, np.int64) for label in self.schema.labels}
        self.ones = {label.name: np.zeros(count, np.int64) for label in self.schema.labels}
        self.unseen = {feature.name: 0 for feature in self.schema.features if feature.pooling is None}

    def add(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Count `batch` and hand it on."""
        scenario, count = batch[self.schema.scenario].to_numpy(), len(self.schema.scenarios)
        self.rows += np.bincount(scenario, minlength=count)
        for label in self.schema.labels:
            known = batch[label.mask].to_numpy(zero_copy_only=False) if label.mask else np.ones(len(scenario), bool)
            one = known & (batch[label.name].to_numpy() == 1)
            self.known[label.name] += np.bincount(scenario[known], minlength=count)
            self.ones[label.name] += np.bincount(scenario[one], minlength=count)
        for name in self.unseen:
            self.unseen[name] += pc.sum(pc.equal(batch[name], UNSEEN)).as_py() or 0
        return batch

    def report(self, split: str) -> list[ScenarioReport]:
        """One entry per scenario."""
        return [
            ScenarioReport(scenario.name, split, int(self.rows[place]), {n: self._rate(n, place) for n in self.known})
            for place, scenario in enumerate(self.schema.scenarios)
        ]

    def warnings(self, split: str) -> list[str]:
        """What a user should know about the split."""
        empty = [each.name for each, rows in zip(self.schema.scenarios, self.rows, strict=True) if rows == 0]
        total = int(self.rows.sum())
        said = [f"{split}: no rows of scenario {', '.join(empty)}"] if empty else []
        said += [f"{split}: label {name} is never known" for name in self.known if not self.known[name].any()]
        unseen = {name: rows for name, rows in self.unseen.items() if rows}
        listed = ", ".join(f"{name} {rows:,} ({rows / total:.1%})" for name, rows in unseen.items())
        return said + ([f"{split}: rows on the reserved row 0 (unseen, rare or null ids): {listed}"] if unseen else [])

    def _rate(self, label: str, scenario: int) -> float | None:
        known = int(self.known[label][scenario])
        return int(self.ones[label][scenario]) / known if known else None


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.4f}"


def in_split_order(reports: dict[str, list[ScenarioReport]]) -> tuple[ScenarioReport, ...]:
    """By scenario, then by split."""
    return tuple(reports[split][place] for place in range(len(reports[SPLITS[0]])) for split in SPLITS)
