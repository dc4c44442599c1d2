"""Metrics per scenario and overall, for each label, exact over all ranks.

`ScenarioMetrics` collects rows while a model is evaluated; `compute` brings them to rank 0 and returns a `Report`.

Metrics are weighted by the label's `weights`, as its loss is; a row of weight 0 does not know the label and counts
nowhere. With p the predicted probability, y the label and w the weight of a row:

    rows, positives      number of rows that know the label, and of those with y = 1; not weighted
    auc                  chance that a positive scores above a negative, both drawn by weight; a tie counts one half
    log_loss             sum of w * -(y log p + (1 - y) log(1 - p)) / sum of w
    normalised_entropy   log_loss / entropy of the base rate, sum of wy / sum of w: above 1 is worse than no model
    calibration          sum of wp / sum of wy: above 1 predicts too much
    user_auc             mean over users of the AUC among their rows, by number of rows; left out are users whose labels
                         are all alike, and those that training never saw, whom the data do not tell apart

A metric that its rows do not define (no rows, one class only, a prediction that is not a number) is absent: None here,
null in JSON, left out of MLflow.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text
from torch import Tensor

from msr_dist.schema import UNSEEN, FeatureSchema

_log = logging.getLogger(__name__)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LabelMetrics:
    """The metrics of one label among some rows; None says that the rows do not define it."""

    rows: int
    positives: int
    auc: float | None
    log_loss: float | None
    normalised_entropy: float | None
    calibration: float | None
    user_auc: float | None


@dataclass(frozen=True)
class Report:
    """What a model was worth: metrics by label, over all rows and within each scenario, in the schema's order."""

    overall: dict[str, LabelMetrics]
    scenarios: dict[str, dict[str, LabelMetrics]]

    def to_json(self) -> dict[str, Any]:
        """The form of `metrics.json`: the first label's metrics as plain keys, and every label's under `labels`."""
        return {"overall": _block(self.overall), "scenarios": {name: _block(m) for name, m in self.scenarios.items()}}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """The report that `to_json` wrote; keys that it did not write are ignored."""
        return cls(
            overall=_read_block(raw["overall"]),
            scenarios={name: _read_block(block) for name, block in raw["scenarios"].items()},
        )

    def flat(self, split: str) -> dict[str, float]:
        """Present metrics under names that MLflow takes, such as `test/overall/auc` or `test/NAME/auc`.

        Labels after the first put their name before the metric's: `test/NAME/conversion/auc`. Characters that MLflow
        does not take become `_`; where that makes two names alike, the later one ends in a number.
        """
        scenario_names = metric_names(self.scenarios, reserved=("overall",))
        label_names = metric_names(self.overall)
        blocks = [("overall", self.overall)] + [(scenario_names[name], block) for name, block in self.scenarios.items()]
        flat: dict[str, float] = {}
        for place, block in blocks:
            for position, (label, metrics) in enumerate(block.items()):
                prefix = f"{split}/{place}" if position == 0 else f"{split}/{place}/{label_names[label]}"
                values = asdict(metrics).items()
                flat |= {f"{prefix}/{metric}": float(value) for metric, value in values if value is not None}
        return flat

    def table(self, oracle: Mapping[str, Any] | None = None, title: str | None = None) -> Table:
        """The report for people: one line per scenario (and label, where there are several), and one overall.

        Args:
            oracle: the content of `oracle.json`; puts the best possible AUC and log loss beside the model's.
            title: stands above the table.
        """
        several = len(self.overall) > 1
        table = Table(title=title)
        table.add_column("scenario")
        if several:
            table.add_column("label")
        best = ("AUC", "best AUC", "log loss", "best") if oracle else ("AUC", "log loss")
        for heading in ("rows", *best, "NE", "calibration", "user AUC"):
            table.add_column(heading, justify="right")
        best_scenarios: Mapping[str, Any] = (oracle or {}).get("scenarios", {})
        for name, block in self.scenarios.items():
            for label, metrics in block.items():
                # As text: brackets in a name are no markup.
                heads = (Text(name), label) if several else (Text(name),)
                table.add_row(*heads, *_cells(metrics, _best(oracle, best_scenarios.get(name), label)))
        table.add_section()
        for label, metrics in self.overall.items():
            heads = (Text("overall"), label) if several else (Text("overall"),)
            best_here = _best(oracle, (oracle or {}).get("overall"), label)
            table.add_row(*heads, *_cells(metrics, best_here), style="bold")
        return table


class ScenarioMetrics:
    """Collects labels and predictions of an evaluation; exact, so it keeps every row until `compute`.

    There are no bins: with 0.65% positives, 200 bins read an AUC of 0.737 where it was 0.756. The price is memory:
    each rank keeps 12 + 9T bytes per row it saw (T labels), and rank 0 another 12 + 9T for every row of every rank,
    plus about 110 bytes of scratch per row while it computes: 10 million rows of one label peak at 1.3 GB and take
    7 s on one core.

    Why not torchmetrics: its AUC has no weights, knows no groups, and wants one metric object and one pass per
    scenario; the user-grouped AUC has millions of groups, which `grouped_auc` does in one sort.
    """

    def __init__(self, schema: FeatureSchema) -> None:
        self._scenarios = [scenario.name for scenario in schema.scenarios]
        self._labels = [label.name for label in schema.labels]
        self._rows = _Rows(len(self._labels))

    def update(self, scenario: Tensor, user: Tensor, logits: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Add rows; they are copied to the CPU, so the tensors may be reused.

        Args:
            scenario: `[B]` integers, ids in the schema.
            user: `[B]` integers, any value.
            logits: `[B, T]`, kept as fp32.
            labels: `[B, T]`, 0 or 1; the value of a row of weight 0 does not matter.
            weights: `[B, T]`, not negative; 0 where the label is unknown.

        Raises:
            ValueError: shapes that do not fit each other, or a scenario that the schema does not have.
        """
        batch, width = scenario.shape[0], len(self._labels)
        for name, tensor, shape in (
            ("scenario", scenario, (batch,)),
            ("user", user, (batch,)),
            ("logits", logits, (batch, width)),
            ("labels", labels, (batch, width)),
            ("weights", weights, (batch, width)),
        ):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"metrics: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        scenario = scenario.to("cpu", torch.int32, copy=True)
        if batch and not 0 <= int(scenario.min()) <= int(scenario.max()) < len(self._scenarios):
            raise ValueError(f"metrics: scenario ids must lie in [0, {len(self._scenarios)})")
        self._rows.add(scenario, user, logits, labels > 0.5, weights)

    def compute(self) -> Report | None:
        """The report on rank 0 and None elsewhere; a collective call, after which the collection is empty.

        Uses the default process group where there is one; a rank may come without rows.

        Raises:
            RuntimeError: the process group cannot move CPU tensors (NCCL alone).
        """
        rows = self._rows.take()
        if rows is None:
            return None
        scenario, user, logits, labels, weights = rows
        by_label = [
            self._measure(scenario, user, logits[:, t], labels[:, t] > 0, weights[:, t], name)
            for t, name in enumerate(self._labels)
        ]
        blocks = [dict(zip(self._labels, place, strict=True)) for place in zip(*by_label, strict=True)]
        return Report(overall=blocks[-1], scenarios=dict(zip(self._scenarios, blocks[:-1], strict=True)))

    def _measure(
        self,
        scenario: NDArray[np.int32],
        user: Ints,
        logit: NDArray[np.float32],
        label: NDArray[np.bool_],
        weight: NDArray[np.float32],
        name: str,
    ) -> list[LabelMetrics]:
        """Metrics of one label: one entry per scenario, and the overall ones last."""
        known = weight > 0
        if not known.all():
            scenario, user, logit = scenario[known], user[known], logit[known]
            label, weight = label[known], weight[known]
        count = len(self._scenarios)
        # One more place than there are scenarios: the last one is overall.
        totals = _totals(scenario, count, logit, label, weight)
        broken = totals.broken > 0
        if broken[-1]:
            _log.warning("%d predictions of label %r are not numbers: its metrics are absent", totals.broken[-1], name)

        auc = np.full(count + 1, np.nan)
        by_scenario = grouped_auc(scenario, logit, label, weight)
        auc[by_scenario.group] = by_scenario.auc
        overall = grouped_auc(np.full_like(scenario, count), logit, label, weight)
        auc[overall.group] = overall.auc

        user_auc = np.full(count + 1, np.nan)
        # Users that training never saw share one id: as a group they would be ranked against each other.
        seen = user != UNSEEN
        scenario, user, logit = scenario[seen], user[seen], logit[seen]
        label, weight = label[seen], weight[seen]
        user = _below(user, (1 << 32) // count)
        by_user = grouped_auc(user * count + scenario, logit, label, weight)
        user_auc[:count] = _mean_auc(by_user, by_user.group % count, count)
        by_user = grouped_auc(user, logit, label, weight)
        user_auc[count:] = _mean_auc(by_user, np.zeros_like(by_user.group), 1)

        return totals.metrics(np.where(broken, np.nan, auc), np.where(broken, np.nan, user_auc))


@dataclass(frozen=True)
class GroupedAuc:
    """AUC by group: `group [G]` ascending, `auc [G]` (NaN where there is one class only), `rows [G]`."""

    group: Ints
    auc: Floats
    rows: Ints


def grouped_auc(
    group: NDArray[Any], score: NDArray[np.float32], label: NDArray[np.bool_], weight: NDArray[Any]
) -> GroupedAuc:
    """Exact weighted AUC within each group, all groups in one sort: 10 million rows take 1.4 s, however grouped.

    The rank formula: over positives, weight times (weight of the group's negatives that score lower, plus half of
    those that tie), over the product of the weights of both classes. Sums are fp64 and exact for whole weights; else
    the error is about 1e-16 of the weight of all rows over that of the group.

    Args:
        group: `[N]` integers, any value.
        score: `[N]` fp32; a group that holds a NaN has AUC NaN.
        label: `[N]`.
        weight: `[N]`, positive.
    """
    if not len(group):
        return GroupedAuc(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))
    names: Ints | None = None
    if group.min() < 0 or group.max() >= 1 << 32:
        names, group = np.unique(group, return_inverse=True)
    # Group above score in one 64-bit key: a single sort without indirection, several times faster than np.lexsort.
    key = group.astype(np.uint64) << np.uint64(32) | _sortable(score)
    order = np.argsort(key)
    key = key[order]

    # A tie is a run of equal keys; then groups are runs of ties.
    tie = _runs(key)
    ordered, is_positive = weight[order].astype(np.float64), label[order]
    positive = np.add.reduceat(np.where(is_positive, ordered, 0.0), tie)
    negative = np.add.reduceat(np.where(is_positive, 0.0, ordered), tie)
    tie_group = key[tie] >> np.uint64(32)
    first = _runs(tie_group)

    below = np.cumsum(negative) - negative
    below -= np.repeat(below[first], np.diff(first, append=len(tie)))
    won = np.add.reduceat(positive * (below + 0.5 * negative), first)
    pairs = np.add.reduceat(positive, first) * np.add.reduceat(negative, first)
    auc = np.divide(won, pairs, out=np.full(len(first), np.nan), where=pairs > 0)

    found = tie_group[first].astype(np.int64)
    unordered = np.isnan(score)
    if unordered.any():
        auc[np.isin(found, group[unordered])] = np.nan
    rows = np.diff(tie[first], append=len(key))
    return GroupedAuc(found if names is None else names[found], auc, rows)


def metric_names(names: Iterable[str], reserved: Sequence[str] = ()) -> dict[str, str]:
    """Each name as one component of an MLflow metric name: distinct, and the same whenever `names` are the same.

    A name that MLflow takes stays as it is, whatever the others are called, unless it is `reserved`.
    """
    listed = list(names)
    clean = {name: re.sub(r"[^\w\-. ]", "_", name)[:_NAME_LENGTH] for name in listed}
    # MLflow reads names as paths and refuses those that a normalisation would change.
    clean = {name: text if text.strip(".") else "_" * len(text) for name, text in clean.items()}
    kept = {name for name in listed if clean[name] == name and name not in reserved}
    taken = kept | set(reserved)
    for position, name in enumerate(listed):
        if name in kept:
            continue
        candidate = clean[name]
        while candidate in taken:
            candidate = f"{candidate}_{position}"
        clean[name] = candidate
        taken.add(candidate)
    return clean


_NAME_LENGTH = 80
"""Three components and their separators stay below MLflow's 250 characters."""


class _Rows:
    """Rows as five lists of CPU tensors: scenario, user, logits, labels, weights."""

    def __init__(self, labels: int) -> None:
        self._empty = (
            torch.empty(0, dtype=torch.int32),
            torch.empty(0, dtype=torch.int64),
            torch.empty(0, labels, dtype=torch.float32),
            torch.empty(0, labels, dtype=torch.uint8),
            torch.empty(0, labels, dtype=torch.float32),
        )
        self._columns: list[list[Tensor]] = [[] for _ in self._empty]

    def add(self, *rows: Tensor) -> None:
        for column, tensor, like in zip(self._columns, rows, self._empty, strict=True):
            column.append(tensor.detach().to("cpu", like.dtype, copy=True))

    def take(self) -> list[NDArray[Any]] | None:
        """All rows of all ranks on rank 0, None elsewhere; nothing is kept."""
        spread = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if spread and "cpu:" not in dist.get_backend_config():
            raise RuntimeError(
                f"metrics: the process group ({dist.get_backend_config()}) cannot move CPU tensors; "
                'open it with the backend "cpu:gloo,cuda:nccl"'
            )
        taken: list[NDArray[Any]] = []
        for column, empty in zip(self._columns, self._empty, strict=True):
            rows = torch.cat([empty, *column])
            # Column by column, so that at most one of them is held twice.
            column.clear()
            gathered = _to_rank_0(rows) if spread else rows
            if gathered is not None:
                taken.append(gathered.numpy())
        return taken or None


def _to_rank_0(rows: Tensor) -> Tensor | None:
    """Rows of all ranks, in the order of the ranks, on rank 0: as many as there are, without padding."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    counts = torch.zeros(world_size, dtype=torch.int64)
    counts[rank] = len(rows)
    dist.all_reduce(counts)
    if rank > 0:
        if len(rows):
            dist.send(rows, dst=0)
        return None
    whole = rows.new_empty(int(counts.sum()), *rows.shape[1:])
    parts = torch.split(whole, counts.tolist())
    parts[0].copy_(rows)
    for source, part in enumerate(parts):
        if source and len(part):
            dist.recv(part, src=source)
    return whole


@dataclass(frozen=True)
class _Totals:
    """Sums over the rows of each place, `[S + 1]` each: the scenarios, then overall."""

    rows: Ints
    positives: Ints
    broken: Ints
    weight: Floats
    observed: Floats
    predicted: Floats
    loss: Floats

    def metrics(self, auc: Floats, user_auc: Floats) -> list[LabelMetrics]:
        with np.errstate(divide="ignore", invalid="ignore"):
            log_loss = self.loss / self.weight
            rate = self.observed / self.weight
            # NaN at a rate of 0 or 1: one class has no entropy to compare with.
            entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
            normalised = log_loss / np.where(entropy > 0, entropy, np.nan)
            calibration = self.predicted / np.where(self.observed > 0, self.observed, np.nan)
        return [
            LabelMetrics(
                rows=int(self.rows[place]),
                positives=int(self.positives[place]),
                auc=_finite(auc[place]),
                log_loss=_finite(log_loss[place]),
                normalised_entropy=_finite(normalised[place]),
                calibration=_finite(calibration[place]),
                user_auc=_finite(user_auc[place]),
            )
            for place in range(len(self.rows))
        ]


def _totals(
    scenario: NDArray[np.int32],
    count: int,
    logit: NDArray[np.float32],
    label: NDArray[np.bool_],
    weight: NDArray[np.float32],
) -> _Totals:
    def total(values: NDArray[Any] | None = None) -> Floats:
        by_scenario = np.bincount(scenario, values, minlength=count)
        return np.append(by_scenario, by_scenario.sum())

    def number(which: NDArray[np.bool_]) -> Ints:
        return total(which).astype(np.int64)

    weight64, logit64 = weight.astype(np.float64), logit.astype(np.float64)
    # log(1 + e^x) without overflow: -log p is that of -logit, -log(1 - p) that of logit.
    # A NaN may pass: it makes the sums of its scenario NaN, which become absent.
    with np.errstate(invalid="ignore"):
        loss = np.logaddexp(0, np.where(label, -logit64, logit64))
        probability = np.exp(-np.logaddexp(0, -logit64))
    return _Totals(
        rows=total().astype(np.int64),
        positives=number(label),
        broken=number(np.isnan(logit)),
        weight=total(weight64),
        observed=total(np.where(label, weight64, 0.0)),
        predicted=total(weight64 * probability),
        loss=total(weight64 * loss),
    )


def _mean_auc(groups: GroupedAuc, place: Ints, count: int) -> Floats:
    """Mean of the groups' AUC by their rows within each of `count` places; NaN where no group has one."""
    defined = ~np.isnan(groups.auc)
    rows = np.bincount(place[defined], groups.rows[defined], minlength=count)
    weighted = np.bincount(place[defined], (groups.auc * groups.rows)[defined], minlength=count)
    mean: Floats = np.divide(weighted, rows, out=np.full(count, np.nan), where=rows > 0)
    return mean


def _below(ids: Ints, limit: int) -> Ints:
    """`ids`, renumbered from 0 where any is negative or not below `limit`."""
    if len(ids) and (ids.min() < 0 or ids.max() >= limit):
        renumbered: Ints = np.unique(ids, return_inverse=True)[1]
        return renumbered
    return ids


def _sortable(score: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Integers that order as the scores do."""
    # Adding 0 turns -0 into 0, which has other bits but is the same number.
    bits = (score.astype(np.float32) + np.float32(0)).view(np.uint32)
    # Negative numbers order backwards by their bits, and come before the positive ones.
    return bits ^ np.where(bits >> np.uint32(31), np.uint32(0xFFFFFFFF), np.uint32(0x80000000))


def _runs(values: NDArray[Any]) -> Ints:
    """Where each run of equal values starts."""
    return np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _block(by_label: Mapping[str, LabelMetrics]) -> dict[str, Any]:
    labels = {label: asdict(metrics) for label, metrics in by_label.items()}
    return {**next(iter(labels.values())), "labels": labels}


def _read_block(raw: Mapping[str, Any]) -> dict[str, LabelMetrics]:
    names = [field.name for field in fields(LabelMetrics)]
    return {label: LabelMetrics(**{name: block[name] for name in names}) for label, block in raw["labels"].items()}


def _best(oracle: Mapping[str, Any] | None, block: Mapping[str, Any] | None, label: str) -> Mapping[str, Any] | None:
    """The best possible metrics of a label: None without an oracle, empty where it does not know the place."""
    if oracle is None:
        return None
    best: Mapping[str, Any] = (block or {}).get(label, {})
    return best


def _cells(metrics: LabelMetrics, best: Mapping[str, Any] | None) -> list[str]:
    auc, log_loss = [_number(metrics.auc)], [_number(metrics.log_loss)]
    if best is not None:
        auc.append(_number(best.get("auc")))
        log_loss.append(_number(best.get("log_loss")))
    rest = (metrics.normalised_entropy, metrics.calibration, metrics.user_auc)
    return [f"{metrics.rows:,}", *auc, *log_loss, *map(_number, rest)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
