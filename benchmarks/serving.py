"""What the meta networks of LLM4MSR cost at serving: one user, some hundreds of candidates, beside the backbone alone.

python benchmarks/serving.py
python benchmarks/serving.py --backbones star mmoe ppnet --candidates 500 --scenarios 5 --threads 1 2
python benchmarks/serving.py --forms

The dense part alone, in evaluation without gradients: looking up embeddings and vectors is not part of it. All cases
alternate within one process; times are medians, a ratio is the median over rounds of a case's time by the backbone's in
the same round. CPU time is that of all threads: with one, about the latency on a machine that does nothing else. Prints
one JSON line per backbone and number of threads, which is also added to benchmarks/results/serving.jsonl, and the
Markdown table of them.

With --forms: CPU milliseconds of the user level in its three forms, by rows per user, in training (forward and
backward) and in evaluation, with one thread: other work on the machine hardly changes them.
`msr_dist.models.llm4msr.fastest` follows from it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch is loaded: see msr_dist.launch.set_threads.
from msr_dist.launch import call_and_leave, set_threads, silence

silence()
set_threads(1)

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from msr_dist.config import kind_config  # noqa: E402
from msr_dist.models.base import BackboneConfig, Inputs  # noqa: E402
from msr_dist.models.llm4msr import Config, Form, Llm4msr, UserLevel, fastest  # noqa: E402
from msr_dist.schema import Feature, FeatureSchema, Knowledge, Label, Scenario, Table  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "serving.jsonl"
FEATURES, WIDTH = 8, 16
USER_WIDTH, SCENARIO_WIDTH = 64, 384
WARM_UP = 5
ROWS_PER_USER = (1, 2, 4, 8, 16, 32, 128)
FORMS: tuple[Form, ...] = ("grouped", "gathered", "bilinear")


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", type=model_kind, default=["star"])
    parser.add_argument("--candidates", type=positive, default=500)
    parser.add_argument("--scenarios", type=positive, default=5)
    parser.add_argument("--threads", nargs="+", type=positive, default=[1, 2])
    parser.add_argument("--rounds", type=positive, default=300)
    parser.add_argument("--forms", action="store_true", help="measure the user level's forms instead, with one thread")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file that lines are added to")
    chosen = parser.parse_args()
    if chosen.forms:
        lines = [forms(rank, chosen.rounds) for rank in (16, 32, "full")]
    else:
        cases = [(kind, threads) for kind in chosen.backbones for threads in chosen.threads]
        lines = [serving(*case, chosen.candidates, chosen.scenarios, chosen.rounds) for case in cases]
    written = "".join(f"{json.dumps(line)}\n" for line in lines)
    with open(chosen.out, "a") as file:
        file.write(written)
    print(written)
    print(table_of_forms(lines) if chosen.forms else table_of_serving(lines))


def positive(text: str) -> int:
    """A number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


def model_kind(name: str) -> str:
    """The name of a model that can stand in the middle, for argparse."""
    try:
        Config(backbone=kind_config("msr_dist.models", name)(kind=name))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    return name


def serving(kind: str, threads: int, candidates: int, scenarios: int, rounds: int) -> dict[str, Any]:
    """Median milliseconds of a request, and the ratio to the backbone's."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    schema = describe(scenarios)
    backbone = kind_config("msr_dist.models", kind)(kind=kind)
    assert isinstance(backbone, BackboneConfig)
    request = of_users(torch.zeros(candidates, dtype=torch.int64), device)
    rows = of_users(torch.arange(candidates), device)
    models = {
        "whole": Config(backbone=backbone),
        "user level alone": Config(backbone=backbone, scenario_level=False),
        "scenario level alone": Config(backbone=backbone, user_level=False),
    }
    built = {name: build(config, schema).to(device).eval() for name, config in models.items()}
    whole = built["whole"]
    # Calling eval makes the model forget the weights that it kept.
    cases: dict[str, tuple[nn.Module, Inputs, Callable[[], object] | None]] = {
        "backbone": (whole.backbone, request, None),
        "llm4msr": (whole, request, None),
        "user level alone": (built["user level alone"], request, None),
        "scenario level alone": (built["scenario level alone"], request, None),
        "scenario weights in each request": (whole, request, whole.eval),
        "user weights for each candidate": (whole, rows, None),
        "both": (whole, rows, whole.eval),
    }
    clocks = {"milliseconds": time.perf_counter, "cpu_milliseconds": time.process_time}
    taken: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in cases} for clock in clocks}
    with torch.no_grad():
        for _ in range(rounds + WARM_UP):
            for name, (model, inputs, before) in cases.items():
                # What another case made the model forget is made again, outside of the measured time.
                model(inputs)
                if before:
                    before()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                start = {clock: read() for clock, read in clocks.items()}
                model(inputs)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                for clock, read in clocks.items():
                    taken[clock][name].append(read() - start[clock])
    figures: dict[str, dict[str, float]] = {}
    for clock, of_cases in taken.items():
        timed = {name: each[WARM_UP:] for name, each in of_cases.items()}
        figures[clock] = {name: round(1000 * statistics.median(each), 3) for name, each in timed.items()}
        figures[clock.replace("milliseconds", "ratio")] = {
            name: round(statistics.median(own / base for own, base in zip(each, timed["backbone"], strict=True)), 3)
            for name, each in timed.items()
        }
    settings = {"what": "serving", "backbone": kind, "candidates": candidates, "scenarios": scenarios}
    return {**settings, "device": str(device), "threads": threads, "rounds": rounds, **figures}


def forms(rank: Any, rounds: int, rows: int = 2048) -> dict[str, Any]:
    """Median CPU milliseconds of the user level in each form, in training and evaluation, by rows per user."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    level = UserLevel(Config(rank=rank), USER_WIDTH, FEATURES * WIDTH)
    milliseconds: dict[str, dict[int, dict[str, float]]] = {"training": {}, "evaluation": {}}
    chosen: dict[int, Form] = {}
    for per_user in ROWS_PER_USER:
        user = (torch.arange(rows) // per_user)[torch.randperm(rows)]
        x, knowledge = torch.randn(rows, FEATURES * WIDTH, requires_grad=True), said(user)
        chosen[per_user] = fastest(rows, rows // per_user, level.core_width, level.generator_width)
        for mode, by_users in milliseconds.items():
            seconds: dict[Form, list[float]] = {form: [] for form in FORMS}
            for _ in range(rounds + WARM_UP):
                for form, taken in seconds.items():
                    level.execution = form
                    with torch.set_grad_enabled(mode == "training"):
                        start = time.process_time()
                        out = level(x, user, knowledge)
                        if mode == "training":
                            out.sum().backward()
                        taken.append(time.process_time() - start)
            by_users[per_user] = {
                form: round(1000 * statistics.median(taken[WARM_UP:]), 2) for form, taken in seconds.items()
            }
    settings = {"rank": rank, "generator_width": level.generator_width, "rows": rows, "rounds": rounds}
    return {"what": "forms", **settings, "milliseconds": milliseconds, "chosen": chosen}


def build(config: Config, schema: FeatureSchema) -> Llm4msr:
    """The model, its last meta layers no longer at 0."""
    torch.manual_seed(0)
    model = config.build(schema)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.01)
    return model


def describe(scenarios: int) -> FeatureSchema:
    """Eight features, 16 wide: 128 numbers per row go into the network, as in benchmarks/scenarios.py."""
    names = ["user", "item", *(f"feature{n}" for n in range(FEATURES - 2))]
    vectors = torch.randn(scenarios, SCENARIO_WIDTH, generator=torch.Generator().manual_seed(0))
    return FeatureSchema(
        user="user",
        item="item",
        labels=(Label(name="click"),),
        scenarios=tuple(Scenario(id=s, name=f"scenario {s}") for s in range(scenarios)),
        tables=tuple(Table(name=name, rows=1, width=WIDTH) for name in names),
        features=tuple(
            Feature(name=name, table=name, group="user" if n % 2 else "item") for n, name in enumerate(names)
        ),
        knowledge=Knowledge(
            folder=Path("unread"),
            width=USER_WIDTH,
            scenarios=tuple(tuple(vector) for vector in vectors.tolist()),
        ),
    )


def of_users(user: Tensor, device: torch.device) -> Inputs:
    """A request: candidates of one scenario, for the users named."""
    half, generator = FEATURES * WIDTH // 2, torch.Generator().manual_seed(1)
    groups = {name: torch.randn(len(user), half, generator=generator).to(device) for name in ("item", "user")}
    rows = torch.arange(len(user), device=device)
    knowledge = said(torch.zeros_like(user)).to(device)
    return Inputs(groups, torch.zeros_like(rows), rows, user=user.to(device), knowledge=knowledge)


def said(user: Tensor) -> Tensor:
    """What is known of the users, `[B, K + 1]`."""
    vectors = torch.randn(int(user.max()) + 1, USER_WIDTH, generator=torch.Generator().manual_seed(2))
    return torch.cat([vectors[user], torch.ones(len(user), 1)], dim=1)


def table_of_serving(lines: list[dict[str, Any]]) -> str:
    """Milliseconds and ratio by case, wall and CPU, for each backbone and number of threads."""
    columns = [
        (
            f"{line['backbone']}, threads {line['threads']}, {clock}",
            line[f"{prefix}milliseconds"],
            line[f"{prefix}ratio"],
        )
        for line in lines
        for clock, prefix in (("wall", ""), ("CPU", "cpu_"))
    ]
    rows = [["request", *(title for title, _, _ in columns)], ["---"] * (len(columns) + 1)]
    rows += [
        [case, *(f"{times[case]:.2f} ms ({ratios[case]:.2f})" for _, times, ratios in columns)]
        for case in lines[0]["milliseconds"]
    ]
    caption = f"{lines[0]['candidates']} candidates of one user, {lines[0]['scenarios']} scenarios, dense part alone, "
    return "\n".join([f"{caption}{lines[0]['device']}:", "", *("| " + " | ".join(row) + " |" for row in rows)])


def table_of_forms(lines: list[dict[str, Any]]) -> str:
    """Milliseconds by form and rows per user; the form that the model chooses is marked."""
    head = ["rank", "", "form", *(f"{count} a user" for count in ROWS_PER_USER)]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        for mode, by_users in line["milliseconds"].items():
            for form in FORMS:
                cells = [f"{by_users[n][form]:.1f}{' *' * (line['chosen'][n] == form)}" for n in ROWS_PER_USER]
                rows.append([str(line["rank"]), mode, form, *cells])
    caption = f"CPU milliseconds of the user level, {lines[0]['rows']:,} rows, one thread; * is what the model chooses:"
    return "\n".join([caption, "", *("| " + " | ".join(row) + " |" for row in rows)])


if __name__ == "__main__":
    call_and_leave(main)
