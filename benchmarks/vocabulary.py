"""Rows lent to ids that are frequent by now, against plain hashing and against a row for every id that training holds.

python benchmarks/vocabulary.py
python benchmarks/vocabulary.py --data amazon14 --raw ../shared/data/amazon14_food_kitchen_beauty_elec

`drifting` is planted: users and items come and go, nothing but their ids tells them apart, and training goes through
the log once, in the order of time. `amazon14` is real: two epochs over shuffled rows. Users and items have as many rows
as a share of the ids in the training rows. What is measured is the AUC on the test rows, which for `drifting` are the
last ones.

Data are prepared and runs are kept in FOLDER; a line that is in the results already is not measured again. Appends a
JSON line per run to FOLDER/results.jsonl and prints the Markdown table of all.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Before torch is loaded: see msr_dist.launch.set_threads.
from msr_dist.launch import call_and_leave, set_threads, silence

silence()
set_threads(1)

from quality_grid import commit_of_code  # noqa: E402

from msr_dist.config import kind_config, load, merge, parse  # noqa: E402
from msr_dist.data.prepare.canonical import PrepareConfig, prepare  # noqa: E402
from msr_dist.run import RunConfig  # noqa: E402
from msr_dist.schema import FeatureSchema  # noqa: E402
from msr_dist.train import train  # noqa: E402
from msr_dist.vocabulary import WAYS  # noqa: E402

TABLES = ("user_id", "item_id")
CONFIGS = Path(__file__).parents[1] / "jobs/configs"
RUNS: dict[str, dict[str, Any]] = {
    "drifting": {
        "loader": {"batch_size": 2048, "shuffle": False},
        "stages": [{"sparse": {"lr": 0.2}, "dense": {"lr": 2e-3}}],
    },
    "amazon14": {"loader": {"batch_size": 8192}, "stages": [{"epochs": 2, "sparse": {"lr": 0.5}}]},
}
"""What runs of a data set have in common. Rates were tried by hand, with a row for every id; shared hashing would
gain up to 0.004 on `drifting` with a higher one."""
HALF_LIVES = {"drifting": 50, "amazon14": 10_000}
"""Of counts, in steps: an id of `drifting` lives for about 120 of them."""


@dataclass(frozen=True)
class Case:
    """One run."""

    data: str
    way: str
    """all: a row for every id; managed; no ageing: managed, but counts are never halved; shared: plain hashing."""
    share: float
    """Rows by ids."""
    seed: int


def main() -> None:
    """Measure what has not been measured, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/vocabulary"), help="for data, runs and results")
    parser.add_argument("--data", nargs="+", choices=list(RUNS), default=["drifting"])
    parser.add_argument("--raw", type=Path, help="the raw files of amazon14")
    parser.add_argument("--rows", type=int, help="rows of the planted log, instead of its default")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.25, 0.125], help="rows by ids")
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    if "amazon14" in chosen.data and chosen.raw is None:
        parser.error("--data amazon14 needs --raw, the folder of its files")
    results = chosen.folder / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for data in chosen.data:
        ids = make_data(data, chosen.folder, chosen.raw, chosen.rows)
        for case in cases(data, chosen.shares, chosen.seeds):
            if not any(asdict(case).items() <= line.items() for line in lines):
                lines.append(measure(case, chosen.folder, ids))
                with results.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
                print(json.dumps(lines[-1]), flush=True)
    print(table(lines))


def make_data(data: str, folder: Path, raw: Path | None, rows: int | None) -> dict[str, int]:
    """Prepare the data with a list of the ids and without; ids in the training rows by table."""
    settings: list[str] = [] if rows is None else [f"rows={rows}"]
    for kind in ("listed", "open"):
        out = folder / f"{data}-{kind}"
        if not (out / "schema.toml").exists():
            opened = [f"open_tables.{name}=320" for name in TABLES] if kind == "open" else []
            prepare(preparation(data, raw, [*settings, *opened]), out)
    listed = FeatureSchema.read(folder / f"{data}-listed")
    return {name: listed.table(name).rows - 1 for name in TABLES}


def preparation(data: str, raw: Path | None, settings: list[str]) -> PrepareConfig:
    """How the data are made."""
    if data == "drifting":
        found = parse(kind_config("msr_dist.data.prepare", data), merge({"kind": data}, settings), where=data)
    else:
        assert raw is not None
        files = {"interactions": "ctr_pop_neg4", "items": "items", "scenarios": "scenarios"}
        paths = [f'{name}=["{(raw / file).absolute()}.parquet"]' for name, file in files.items()]
        file = CONFIGS / "prepare-amazon14.toml"
        found = load(kind_config("msr_dist.data.prepare", "table"), file, [*paths, *settings])
    assert isinstance(found, PrepareConfig)
    return found


def cases(data: str, shares: list[float], seeds: int) -> Iterator[Case]:
    """Every run of a data set, seed by seed."""
    for seed in range(seeds):
        yield Case(data, "all", 1.0, seed)
        for share in shares:
            for way in ("managed", "shared", *(["no ageing"] if data == "drifting" else [])):
                yield Case(data, way, share, seed)


def measure(case: Case, folder: Path, ids: dict[str, int]) -> dict[str, Any]:
    """Train, and read what came out."""
    rows = {name: max(1, round(case.share * count / WAYS)) * WAYS for name, count in ids.items()}
    settings: dict[str, Any] = {"collisions": "shared" if case.way == "shared" else "managed"}
    if case.way != "shared":
        settings["half_life"] = 1_000_000 if case.way == "no ageing" else HALF_LIVES[case.data]
    tables = {} if case.way == "all" else {name: settings | {"rows": rows[name]} for name in TABLES}
    name = f"{case.data}-{case.way}-{case.share}-{case.seed}".replace(" ", "-")
    raw = {
        "name": name,
        "runs": str(folder / "runs"),
        "data": str(folder / f"{case.data}-{'listed' if case.way == 'all' else 'open'}"),
        "seed": case.seed,
        "model": {"kind": "mlp"},
        "embeddings": {"tables": tables},
        "evaluation": {"validate_epochs": 0},
        "tracking": {"enabled": False},
    }
    run = parse(RunConfig, raw | RUNS[case.data], where=name).claim_folder()
    begun = time.monotonic()
    train(run)
    seconds = time.monotonic() - begun
    overall = json.loads((run.folder / "metrics.json").read_text())["overall"]
    values = [json.loads(line)["metrics"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    used = {
        f"{table}/{what}": round(statistics.mean(known), 4)
        for table in TABLES
        for what in ("occupancy", "hits", "admissions", "evictions")
        if (known := [each[key] for each in values if (key := f"train/tables/{table}/{what}") in each])
    }
    found = {"rows": rows if tables else ids, "auc": overall["auc"], "log_loss": overall["log_loss"]}
    oracle = folder / f"{case.data}-listed" / "oracle.json"
    if oracle.exists():
        found["best_auc"] = json.loads(oracle.read_text())["overall"]["click"]["auc"]
    return asdict(case) | found | {"seconds": round(seconds, 1), "used": used, "commit": commit_of_code()}


def table(lines: list[dict[str, Any]]) -> str:
    """AUC by way of sharing rows and by share, mean and standard deviation over seeds."""
    rows = ["| data | rows / ids | " + " | ".join(_WAYS) + " | hits, managed |", "|---" * (len(_WAYS) + 3) + "|"]
    for data, share in sorted({(line["data"], line["share"]) for line in lines}, key=lambda key: (key[0], -key[1])):
        here = [line for line in lines if (line["data"], line["share"]) == (data, share)]
        cells = [_cell([line["auc"] for line in here if line["way"] == way]) for way in _WAYS]
        hits = [
            " / ".join(f"{line['used'][f'{name}/hits']:.0%}" for name in TABLES)
            for line in here
            if line["way"] == "managed"
        ]
        rows.append(f"| {data} | {share:g} | {' | '.join(cells)} | {hits[0] if hits else ''} |")
    return "\n".join(rows)


_WAYS = ("all", "managed", "no ageing", "shared")


def _cell(found: list[float]) -> str:
    if not found:
        return ""
    return f"{statistics.mean(found):.4f} ± {statistics.stdev(found) if len(found) > 1 else 0:.4f}"


if __name__ == "__main__":
    call_and_leave(main)
