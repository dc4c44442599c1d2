"""What retrieval is worth: recall, NDCG and hit rate of the nearest items, per scenario, exact.

Shapes: `Q` users who ask, `N` items of their scenario, `d` width of a vector, `K` items that are retrieved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from msr_dist.metrics import metric_names

_MOST_SCORES = 1 << 24
"""Products that are held at a time: 64 MiB."""


@dataclass(frozen=True)
class RetrievalReport:
    """Metrics by scenario, in the schema's order: `recall_at_20` and their like, between 0 and 1.

    Recall is the share of a user's answers among the first K, NDCG (Järvelin and Kekäläinen, 2002) gives the answer at
    rank r the worth 1 / log2(r + 1) and divides by the best possible order, hit rate is whether there is any answer.
    All are means over the users who ask in the scenario.
    """

    scenarios: dict[str, dict[str, float]]
    """Scenarios without queries have no metrics."""
    queries: dict[str, int]
    items: dict[str, int]
    left_out: dict[str, int]
    """Choices of the split that are not asked for, by reason."""

    @property
    def mean(self) -> dict[str, float]:
        """The mean over scenarios, each counted once."""
        return {name: sum(values) / len(values) for name, values in self._by_metric().items()}

    @property
    def worst(self) -> dict[str, float]:
        """Each metric in the scenario where it is least."""
        return {name: min(values) for name, values in self._by_metric().items()}

    def _by_metric(self) -> dict[str, list[float]]:
        present = [metrics for metrics in self.scenarios.values() if metrics]
        return {name: [metrics[name] for metrics in present] for name in (present[0] if present else ())}

    def to_json(self) -> dict[str, Any]:
        """The form of `metrics.json`."""
        counts = {"queries": self.queries, "items": self.items, "left_out": self.left_out}
        return {"mean": self.mean, "worst": self.worst, "scenarios": self.scenarios} | counts

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """The report that `to_json` wrote."""
        return cls(raw["scenarios"], raw["queries"], raw["items"], raw["left_out"])

    def flat(self, split: str) -> dict[str, float]:
        """Metrics under names that MLflow takes, such as `test/mean/recall_at_20` or `test/NAME/recall_at_20`."""
        names = metric_names(self.scenarios, reserved=("mean", "worst"))
        blocks = {"mean": self.mean, "worst": self.worst}
        blocks |= {names[scenario]: metrics for scenario, metrics in self.scenarios.items()}
        return {f"{split}/{place}/{name}": value for place, block in blocks.items() for name, value in block.items()}

    def table(self, oracle: Mapping[str, Any] | None = None, title: str | None = None) -> Table:
        """The report for people: a line per scenario, their mean, and the worst.

        Args:
            oracle: the content of `oracle.json`; puts the best possible recall beside the model's.
            title: stands above the table.
        """
        table = Table(title=title)
        table.add_column("scenario")
        metrics = list(self.mean)
        best: Mapping[str, Mapping[str, float]] = (oracle or {}).get("scenarios", {})
        known = {name for block in best.values() for name in block if name.startswith("recall")} & set(metrics)
        headings = {name: name.replace("_at_", "@").replace("_", " ") for name in metrics}
        for heading in ("users", "items", *headings.values(), *(f"best {headings[name]}" for name in sorted(known))):
            table.add_column(heading, justify="right")
        for name, values in self.scenarios.items():
            cells = [f"{values[metric]:.4f}" if values else "-" for metric in metrics]
            cells += [f"{best[name][metric]:.4f}" if name in best else "-" for metric in sorted(known)]
            # A name in brackets is no markup.
            table.add_row(Text(name), f"{self.queries[name]:,}", f"{self.items[name]:,}", *cells)
        table.add_section()
        for name, values in (("mean", self.mean), ("worst", self.worst)):
            table.add_row(name, "", "", *(f"{values[metric]:.4f}" for metric in metrics), style="bold")
        return table


def ranked(users: Tensor, items: Tensor, most: int, without: Sequence[Tensor]) -> Tensor:
    """The nearest items of each user, the nearest first.

    Args:
        users: `[Q, d]`.
        items: `[N, d]`.
        most: K; fewer where there are not so many.
        without: for each user, places in `items` that are not retrieved.

    Returns:
        `[Q, K]`: places in `items`; -1 where nothing is left.
    """
    found = []
    block = max(1, _MOST_SCORES // max(1, len(items)))
    for start in range(0, len(users), block):
        scores = users[start : start + block] @ items.T
        excluded = without[start : start + block]
        if excluded:
            rows = torch.repeat_interleave(torch.arange(len(excluded)), torch.tensor([len(each) for each in excluded]))
            scores[rows, torch.cat(list(excluded))] = -torch.inf
        best, places = scores.topk(min(most, len(items)), dim=1)
        found.append(places.masked_fill(best == -torch.inf, -1))
    return torch.cat(found) if found else torch.empty(0, min(most, len(items)), dtype=torch.int64)


def sums(places: Tensor, answers: Sequence[Tensor], top_k: Sequence[int]) -> dict[str, float]:
    """Sums over users of every metric.

    Args:
        places: `[Q, K]` as `ranked` returns them.
        answers: for each user the places of the answers, at least one.
        top_k: cut-offs; K is the largest, or all items.
    """
    counts = torch.tensor([len(each) for each in answers], dtype=torch.int64)
    span = int(max(places.max().item() if places.numel() else 0, *(int(each.max()) for each in answers), 0)) + 1
    asked = torch.arange(len(answers))
    keys = torch.cat([each + span * row for row, each in enumerate(answers)])
    hits = torch.isin(places + span * asked[:, None], keys) & (places >= 0)
    worth = 1 / torch.log2(torch.arange(2, max(*top_k, places.shape[1]) + 2, dtype=torch.float64))
    ideal = torch.cat([worth.new_zeros(1), worth.cumsum(0)])
    total: dict[str, float] = {}
    for k in top_k:
        first = hits[:, :k].double()
        best = ideal[counts.clamp(max=k)]
        total[f"recall_at_{k}"] = (first.sum(1) / counts).sum().item()
        total[f"ndcg_at_{k}"] = ((first * worth[: first.shape[1]]).sum(1) / best).sum().item()
        total[f"hit_rate_at_{k}"] = first.any(1).sum().item()
    return total
