"""Quality of the models on MovieLens-1M, by random and by time split, over seeds.

python benchmarks/movielens.py --raw ml-1m.zip
python benchmarks/movielens.py --raw ml-1m.zip --models star --seeds 0 --launcher ray --workers 2

Each run leaves a line in benchmarks/results/movielens.jsonl; what stands there already is not run again. At the end the
table of all lines is printed, in Markdown.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "movielens.jsonl"
CONFIG = Path(__file__).parent.parent / "jobs" / "configs" / "movielens.toml"
EPOCHS = {"random": 5, "time": 2}
"""By the valid split's AUC: later epochs gain nothing."""


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="the publisher's zip or folder")
    parser.add_argument("--models", nargs="+", default=["mlp", "shared_bottom", "mmoe", "star"])
    parser.add_argument("--splits", nargs="+", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--launcher", default="local", choices=["local", "ray"])
    parser.add_argument("--workers", type=int, default=1)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for split in chosen.splits:
            data = Path(folder) / split
            call("prepare", "movielens", data, f"raw={chosen.raw}", f"split.kind={split}")
            for model in chosen.models:
                for seed in chosen.seeds:
                    case = {"model": model, "split": split, "seed": seed}
                    case |= {"launcher": chosen.launcher, "workers": chosen.workers}
                    if not any(case.items() <= line.items() for line in results()):
                        record(case | run(case, data, Path(folder)))
    print(table())


def run(case: dict[str, Any], data: Path, folder: Path) -> dict[str, Any]:
    """Train and evaluate one case."""
    name = "-".join(str(value) for value in case.values())
    stage = f'{{epochs={EPOCHS[case["split"]]},schedule={{decay="linear"}}}}'
    call(
        "train", CONFIG, f"data={data}", f"runs={folder / 'runs'}", f"name={name}", f"seed={case['seed']}",
        f"model.kind={case['model']}", f"stages=[{stage}]", "tracking.enabled=false", "evaluation.validate_epochs=0",
        "--launcher", case["launcher"], "--workers", str(case["workers"]),
    )  # fmt: skip
    report = json.loads((folder / "runs" / name / "metrics.json").read_text())
    scenarios = {scenario: block["auc"] for scenario, block in report["scenarios"].items()}
    overall = report["overall"]
    return {"auc": overall["auc"], "log_loss": overall["log_loss"], "scenarios": scenarios, "commit": commit()}


def call(*words: object) -> None:
    """Run the command msr-dist; its output is shown where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "msr_dist", *map(str, words)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)


def commit() -> str:
    """The commit that was measured."""
    return subprocess.check_output(["git", "describe", "--always", "--dirty"], text=True).strip()


def results() -> list[dict[str, Any]]:
    """All lines so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def record(line: dict[str, Any]) -> None:
    """Add a line and show it."""
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def table() -> str:
    """Mean and standard deviation over seeds, by split and model."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in results():
        groups[line["split"], line["model"]].append(line)
    names = list(next(iter(groups.values()))[0]["scenarios"])
    rows = [["split", "model", "runs", "AUC", *names, "log loss"]]
    for (split, model), lines in sorted(groups.items()):
        aucs = [_spread([line["auc"] for line in lines])]
        aucs += [_spread([line["scenarios"][name] for line in lines]) for name in names]
        rows.append([split, model, str(len(lines)), *aucs, _spread([line["log_loss"] for line in lines])])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


if __name__ == "__main__":
    main()
