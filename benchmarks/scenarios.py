"""What a training step costs by the number of scenarios: lookup, forward, backward and optimizers, batches in memory.

python benchmarks/scenarios.py
python benchmarks/scenarios.py --models star ppnet --scenarios 5 100 1000 --batch-size 16384 --shares even

Steps of all sizes alternate within one process, so that what else the machine does hits all alike; the figures are
medians and their ratio to the first number of scenarios. Rows fall on scenarios as traffic does, scenario s with a
share of 1 / (s + 1), or evenly. Prints one JSON line per model, and the Markdown table of them.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from typing import Any

# Before torch is loaded: see msr_dist.launch.set_threads.
from msr_dist.launch import call_and_leave, set_threads, silence

silence()
set_threads(1)

import torch  # noqa: E402
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor  # noqa: E402

from msr_dist.batch import ScenarioBatch  # noqa: E402
from msr_dist.config import kind_config  # noqa: E402
from msr_dist.distributed import World, open_world  # noqa: E402
from msr_dist.layout import ParallelConfig  # noqa: E402
from msr_dist.models.base import BackboneConfig  # noqa: E402
from msr_dist.optim import DenseOptimizer, SparseOptimizer  # noqa: E402
from msr_dist.parallel import Sharded, shard  # noqa: E402
from msr_dist.recommender import EmbeddingsConfig, Recommender  # noqa: E402
from msr_dist.schema import Feature, FeatureSchema, Label, Scenario, Table  # noqa: E402

FEATURES, WIDTH, ROWS = 8, 16, 100_000
BATCHES = 4


@dataclass
class Case:
    """A model for so many scenarios, its batches, and the seconds of its steps."""

    scenarios: int
    sharded: Sharded
    batches: list[ScenarioBatch]
    seconds: list[float]

    def step(self, number: int) -> None:
        """One training step, timed."""
        batch = self.batches[number % len(self.batches)]
        start = time.perf_counter()
        self.sharded.optimizer.zero_grad()
        loss, _ = self.sharded.model(batch)
        loss.backward()
        self.sharded.optimizer.step()
        if loss.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)


def main() -> None:
    """Measure every model, print lines and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=model_kind, default=["mlp", "star", "ppnet", "m2m"])
    parser.add_argument("--scenarios", nargs="+", type=positive, default=[5, 20, 100])
    parser.add_argument("--batch-size", type=positive, default=8192)
    parser.add_argument("--steps", type=positive, default=60, help="timed steps of each number of scenarios")
    parser.add_argument("--shares", choices=["traffic", "even"], default="traffic", help="how rows fall on scenarios")
    chosen = parser.parse_args()
    lines = []
    with open_world() as world:
        for model in chosen.models:
            try:
                lines.append(measure(model, chosen.scenarios, chosen.batch_size, chosen.steps, chosen.shares, world))
            except ValueError as error:
                # Some models do not serve every number of scenarios.
                parser.error(f"{model}: {error}")
            print(json.dumps(lines[-1]), flush=True)
    print(table(lines))


def positive(text: str) -> int:
    """A number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


def model_kind(name: str) -> str:
    """The name of a model, for argparse."""
    try:
        kind_config("msr_dist.models", name)(kind=name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    return name


def measure(model: str, scenarios: list[int], batch_size: int, steps: int, shares: str, world: World) -> dict[str, Any]:
    """Median milliseconds of a step by number of scenarios, and the ratios to the first."""
    cases = [build(model, count, batch_size, shares, world) for count in scenarios]
    for number in range(steps + 5):
        for case in cases:
            case.step(number)
    medians = [statistics.median(case.seconds[5:]) for case in cases]
    return {
        "model": model,
        "batch_size": batch_size,
        "device": str(world.device),
        "shares": shares,
        "threads": torch.get_num_threads(),
        "milliseconds": {case.scenarios: round(1000 * each, 2) for case, each in zip(cases, medians, strict=True)},
        "ratio": {case.scenarios: round(each / medians[0], 3) for case, each in zip(cases, medians, strict=True)},
    }


def build(model: str, scenarios: int, batch_size: int, shares: str, world: World) -> Case:
    """The model with its tables and optimizers."""
    config = kind_config("msr_dist.models", model)(kind=model)
    assert isinstance(config, BackboneConfig)
    schema = config.adapt(describe(scenarios))
    torch.manual_seed(0)
    recommender = Recommender(schema, config.build(schema), EmbeddingsConfig())
    recommender.head.to(world.device)
    reserved = recommender.reserved_rows(schema)
    sharded = shard(recommender, ParallelConfig(), SparseOptimizer(), DenseOptimizer(), world, batch_size, 0, reserved)
    sharded.model.train()
    batches = [draw(scenarios, batch_size, shares).to(world.device) for _ in range(BATCHES)]
    return Case(scenarios, sharded, batches, [])


def describe(scenarios: int) -> FeatureSchema:
    """Eight features of 100,000 ids, 16 wide: 128 numbers per row go into the network."""
    names = ["user", "item", *(f"feature{n}" for n in range(FEATURES - 2))]
    return FeatureSchema(
        user="user",
        item="item",
        labels=(Label(name="click"),),
        scenarios=tuple(Scenario(id=s, name=f"scenario {s}") for s in range(scenarios)),
        tables=tuple(Table(name=name, rows=ROWS, width=WIDTH) for name in names),
        features=tuple(
            Feature(name=name, table=name, group="user" if n % 2 else "item") for n, name in enumerate(names)
        ),
    )


def draw(scenarios: int, batch_size: int, shares: str) -> ScenarioBatch:
    """Random rows; a scenario's share of them is by its place, or that of all others."""
    share = 1.0 / torch.arange(1, scenarios + 1) if shares == "traffic" else torch.ones(scenarios)
    return ScenarioBatch(
        ids=KeyedJaggedTensor(
            keys=[feature.name for feature in describe(scenarios).features],
            values=torch.randint(ROWS, (FEATURES * batch_size,)),
            lengths=torch.ones(FEATURES * batch_size, dtype=torch.int64),
        ),
        numeric=torch.zeros(batch_size, 0),
        scenario=torch.multinomial(share, batch_size, replacement=True),
        labels=torch.randint(2, (batch_size, 1)).float(),
        weights=torch.ones(batch_size, 1),
        row=torch.arange(batch_size),
        rows_per_rank=float(batch_size),
    )


def table(lines: list[dict[str, Any]]) -> str:
    """Milliseconds, and the ratio to the first number of scenarios, under a line that says how they were measured."""
    counts = list(lines[0]["milliseconds"])
    rows = [["model", *(f"{count} scenarios" for count in counts)], ["---"] * (len(counts) + 1)]
    for line in lines:
        cells = [f"{line['milliseconds'][count]:.1f} ms ({line['ratio'][count]:.2f})" for count in counts]
        rows.append([line["model"], *cells])
    how = f"{lines[0]['batch_size']:,} rows a step, shares {lines[0]['shares']}"
    caption = f"{how}, {lines[0]['device']}, threads {lines[0]['threads']}:"
    return "\n".join([caption, "", *("| " + " | ".join(row) + " |" for row in rows)])


if __name__ == "__main__":
    call_and_leave(main)
