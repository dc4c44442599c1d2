"""Whether knowledge of users tells the future: how well test rows are ranked by texts of what their users chose before.

python benchmarks/leakage.py data/arts-office
python benchmarks/leakage.py data/ml-1m-time --text title --text genres_text --per-scenario 15

A row's score is the mean cosine of its item's words (TF-IDF) and those of the newest training choices of its user in
each scenario, as prompts hold them: of all choices, and of those alone that are older than the row. Where knowledge
leaks, the first says more. No model is trained. Prints one JSON line, and a row of Markdown for each way.
"""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import roc_auc_score

from msr_dist.schema import FeatureSchema

Array = np.ndarray[Any, Any]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("data", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--text", "columns", multiple=True, default=["title"], show_default=True, help="Of items.parquet.")
@click.option("--per-scenario", type=click.IntRange(1), default=10, show_default=True, help="Newest choices.")
def main(data: Path, columns: tuple[str, ...], per_scenario: int) -> None:
    """Rank the test rows of DATA, a prepared folder, by texts of earlier and of all training choices."""
    schema = FeatureSchema.read(data)
    items = pq.read_table(data / "items.parquet")
    if missing := [name for name in columns if name not in items.column_names]:
        raise click.UsageError(
            f"{data}/items.parquet has no column {missing[0]!r}; it has {', '.join(items.column_names)}"
        )
    words = _words(items, columns, schema.item_table.rows)
    chosen, test = _events(data / "train", schema), _events(data / "test", schema)
    chosen = chosen[chosen["label"] > 0].sort_values(["user", "time"], kind="stable")
    users, stream, times, scenarios = (chosen[name].to_numpy() for name in ("user", "item", "time", "scenario"))
    bounds = (np.searchsorted(users, test["user"], side) for side in ("left", "right"))
    scores: dict[str, list[float]] = {"all": [], "older": []}
    later = np.zeros(len(test), bool)
    for row, (begin, end, item, time) in enumerate(zip(*bounds, test["item"], test["time"], strict=True)):
        mine = slice(begin, end)
        likeness = (words[stream[mine]] @ words[item].T).toarray().ravel()
        older = times[mine] < time
        later[row] = (times[mine] > time).any()
        for way, kept in (("all", np.ones_like(older)), ("older", older)):
            newest = _newest(kept, scenarios[mine], per_scenario)
            scores[way].append(float(likeness[newest].mean()) if newest.any() else 0.0)
    label = test["label"].to_numpy() > 0
    auc = {way: round(float(roc_auc_score(label, values)), 4) for way, values in scores.items()}
    share = round(float(later.mean()), 4)
    click.echo(json.dumps({"data": data.name, "text": list(columns), "rows": len(label), "auc": auc, "later": share}))
    click.echo(f"| {data.name} | {auc['all']} | {auc['older']} | {share:.1%} of {len(label):,} rows |")


def _events(folder: Path, schema: FeatureSchema) -> Any:
    """The rows of a split, as a pandas table of user, item, scenario, time and label."""
    columns = {schema.user: "user", schema.item: "item", "scenario": "scenario", "time": "time"}
    columns[schema.labels[0].name] = "label"
    return pq.read_table(folder, columns=list(columns)).to_pandas().rename(columns=columns)


def _words(items: pa.Table, columns: tuple[str, ...], rows: int) -> Any:
    """TF-IDF of the items' texts, a line for each row of their table; empty for unseen ids."""
    texts = [""] * rows
    for row, *parts in zip(*(items[name].to_pylist() for name in ("row", *columns)), strict=True):
        texts[row] = " ".join(filter(None, parts))
    return TfidfVectorizer(sublinear_tf=True, stop_words="english").fit_transform(texts)


def _newest(kept: Array, scenario: Array, most: int) -> Array:
    """Of the choices that are kept, oldest first, the last ones of each scenario."""
    newest = np.zeros_like(kept)
    for each in np.unique(scenario):
        newest[np.flatnonzero(kept & (scenario == each))[-most:]] = True
    return newest


if __name__ == "__main__":
    main()
