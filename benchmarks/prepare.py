"""How fast `prepare` is and how much memory it takes: a log of any length, made here and prepared in a child process.

    python benchmarks/prepare.py --rows 5_000_000

Prints one JSON line: rows, seconds, rows per second, and the greatest resident memory of the child.
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from msr_dist.config import parse
from msr_dist.data.prepare.canonical import prepare
from msr_dist.data.prepare.table import Config

CHUNK_ROWS = 1 << 20
USERS, ITEMS, SCENARIOS = 1_000_000, 200_000, 10


def main() -> None:
    """Make the log, prepare it, report."""
    arguments = _arguments()
    folder = Path(tempfile.mkdtemp(prefix="prepare-benchmark-", dir=arguments.folder))
    try:
        write_log(folder / "log", arguments.rows)
        config = _config(folder / "log", arguments.memory_limit, arguments.history, arguments.split)
        begin = time.perf_counter()
        child = multiprocessing.get_context("spawn").Process(target=prepare, args=(config, folder / "out"))
        child.start()
        child.join()
        seconds = time.perf_counter() - begin
        if child.exitcode:
            raise SystemExit(f"the child process ended with {child.exitcode}")
        print(json.dumps(_result(arguments, seconds)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_log(folder: Path, rows: int) -> None:
    """A log of `rows` impressions in parquet files of about a million rows, and the items' categories and tags."""
    folder.mkdir(parents=True)
    for number, begin in enumerate(range(0, rows, CHUNK_ROWS)):
        generator, count = np.random.default_rng(number), min(CHUNK_ROWS, rows - begin)
        moment = 1_700_000_000 + (begin + np.arange(count)) * 7_776_000 // rows
        columns = {
            "user": (generator.random(count) ** 2 * USERS).astype(np.int64),
            "item": (generator.random(count) ** 3 * ITEMS).astype(np.int64),
            "scenario": (generator.random(count) ** 2 * SCENARIOS).astype(np.int32),
            # Logs come nearly in order, not quite.
            "time": moment + generator.integers(0, 3600, count),
            "price": generator.normal(20, 5, count),
            "click": generator.random(count) < 0.3,
        }
        pq.write_table(pa.table(columns), folder / f"log-{number:05d}.parquet")
    items = np.arange(ITEMS)
    tags = [[f"tag-{item % 97}", f"tag-{item % 89}"] for item in range(ITEMS)]
    pq.write_table(pa.table({"item": items, "category": items % 300, "tags": tags}), folder / "items.parquet")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--memory-limit", default="2GB", help="DuckDB's limit; the process takes some more")
    parser.add_argument("--history", type=int, default=0, help="length of a watch history; 0 for none")
    parser.add_argument("--split", choices=("time", "random"), default="time")
    parser.add_argument("--folder", type=Path, help="where to put the log and the output; they are removed at the end")
    return parser.parse_args()


def _config(log: Path, memory_limit: str, history: int, split: str) -> Config:
    columns = {
        "user": "user",
        "item": "item",
        "scenario": "scenario",
        "time": "time",
        "labels": [{"name": "click"}],
        "ids": [{"name": "category", "source": "items"}],
        "lists": [{"name": "tags", "source": "items"}],
        "numerics": [{"name": "price"}],
    }
    raw = {
        "kind": "table",
        "interactions": [str(log / "log-*.parquet")],
        "items": [str(log / "items.parquet")],
        "columns": columns,
        "memory_limit": memory_limit,
        "split": {"kind": split},
    }
    return parse(Config, raw | ({"history": {"length": history}} if history else {}), "benchmark")


def _result(arguments: argparse.Namespace, seconds: float) -> dict[str, object]:
    return {
        "rows": arguments.rows,
        "history": arguments.history,
        "split": arguments.split,
        "memory_limit": arguments.memory_limit,
        "seconds": round(seconds, 1),
        "rows_per_second": round(arguments.rows / seconds),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
    }


if __name__ == "__main__":
    main()
