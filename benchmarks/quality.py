"""Compares models honestly: the same data, the same search budget, several seeds, one command.

python benchmarks/quality.py run benchmarks/grids/literature.toml
python benchmarks/quality.py report benchmarks/grids/literature.toml
"""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

# A run has one core wherever it stands; libraries read this when they are loaded.
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
os.environ |= THREADS

from msr_dist.launch import log_to_stderr  # noqa: E402
from msr_dist.progress import Progress  # noqa: E402

if TYPE_CHECKING:
    from quality_grid import Case, DataConfig, Grid

    from msr_dist.tracking import TrackingConfig

    Outcome = tuple[Case, dict[str, Any] | Exception]

_PATH = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Compare models over data sets and seeds, as a grid (TOML) says.

    \b
    A grid first searches hyper-parameters, with the same few trials for every model and judged on the valid split
    alone, then runs every model with its best trial's settings and several seeds, judged on the test split.
    Results are lines under benchmarks/results/GRID/; what stands there is not run again.

    \b
    Examples:
      python benchmarks/quality.py run benchmarks/grids/literature.toml
      python benchmarks/quality.py run benchmarks/grids/literature.toml --data kuairand --model mlp --model star
      python benchmarks/quality.py report benchmarks/grids/literature.toml
    """


@main.command()
@click.argument("grid", type=_PATH)
@click.option("--workers", default=os.cpu_count() or 1, show_default="cores", type=click.IntRange(1))
@click.option("--local", is_flag=True, help="Run one after the other in this process, without Ray.")
@click.option("--only", type=click.Choice(["search", "final"]), help="Only the trials, or only the final runs.")
@click.option("--data", "datas", multiple=True, help="Only this data set; may be given several times.")
@click.option("--model", "models", multiple=True, help="Only this model; may be given several times.")
@click.option("--results", type=_PATH, help="Where results go; by default benchmarks/results.")
def run(
    grid: Path,
    workers: int,
    local: bool,
    only: str | None,
    datas: tuple[str, ...],
    models: tuple[str, ...],
    results: Path | None,
) -> None:
    """Run what is missing of GRID, each run on one core. Broken off, the same command goes on."""
    with _told():
        from quality_grid import RESULTS, Grid

        opened = Grid(grid, results or RESULTS)
        chosen_data = [each for each in opened.config.data if each.name in _known(datas, opened.config.data)]
        chosen_models = [name for name in opened.config.models if name in _known(models, opened.config.models)]
        for each in chosen_data:
            each.require()
        failed: list[str] = []
        with _executor(0 if local else workers) as outcomes:
            for name, cases in _phases(opened, chosen_data, chosen_models, only):
                failed += _work(opened, name, cases, outcomes)
        for reason in failed:
            click.echo(f"failed: {reason}", err=True)
        click.echo(f"results in {opened.results}; next: python benchmarks/quality.py report {grid}")
        sys.exit(1 if failed else 0)


@main.command()
@click.argument("grid", type=_PATH)
@click.option("--results", type=_PATH, help="Where the results are; by default benchmarks/results.")
def report(grid: Path, results: Path | None) -> None:
    """Write tables and plots of all results of GRID beside them."""
    with _told():
        from quality_grid import RESULTS, Grid
        from quality_report import write_report

        click.echo(write_report(Grid(grid, results or RESULTS)))


def _phases(
    grid: "Grid", datas: "list[DataConfig]", models: list[str], only: str | None
) -> "Iterator[tuple[str, list[Case]]]":
    """Breadth first: all searches, then one seed of everything after the other, so that half a grid is a fair table."""
    if only != "final":
        yield "search", [case for data in datas for model in models for case in grid.trials(data, model)]
    if only == "search":
        return
    for seed in grid.config.seeds:
        cases = [case for data in datas for case in grid.finals(data, models, seed)]
        if left := len(datas) * len(models) - len(cases):
            click.echo(f"seed {seed}: {left} runs wait for a trial of their model (--only search makes them)", err=True)
        yield f"seed {seed}", cases


def _work(grid: "Grid", name: str, cases: "list[Case]", outcomes: Any) -> list[str]:
    """Run those of `cases` that have no result yet; why some failed."""
    stand = {case.data: set(grid.lines(case.data, case.run.evaluation.final)) for case in cases}
    missing = [case for case in cases if case.key not in stand[case.data]]
    click.echo(f"{name}: {len(cases) - len(missing)} of {len(cases)} runs stand already", err=True)
    if tracked := [case for case in missing if case.run.tracking.enabled]:
        _make_store(tracked[0].run.tracking, tracked[0].run.runs, grid.file)
    commit, failed = _commit(), []
    progress = Progress(name, len(missing), unit="run")
    outcome: dict[str, Any] | Exception
    for case, outcome in outcomes(missing):
        if isinstance(outcome, Exception):
            failed.append(f"{case.run.name}: {_line(outcome)}")
            progress.advance(values={case.run.name: "failed"})
        else:
            grid.record(case, outcome | {"commit": commit})
            progress.advance(values={case.run.name: f"{grid.judged(outcome):.4f}"})
    progress.close()
    return failed


@cache
def _make_store(tracking: "TrackingConfig", runs: Path, grid: Path) -> None:
    """Make the store in MLflow, with a run that keeps the grid: processes that all find none make it in parts."""
    from msr_dist.tracking import open_tracker

    runs.mkdir(parents=True, exist_ok=True)
    tracking = tracking.model_copy(update={"uri": tracking.resolved_uri(runs)})
    with (
        tempfile.TemporaryDirectory() as folder,
        open_tracker(tracking, 0, Path(folder) / f"grid-{grid.stem}", {}) as tracker,
    ):
        tracker.artifact(grid)


@contextmanager
def _executor(workers: int) -> Iterator[Any]:
    """A function from cases to their outcomes, as they come: on Ray's workers, or with 0 workers in this process."""
    from quality_grid import execute, text_of

    folder = Path(tempfile.mkdtemp(prefix="quality-"))

    def text(case: "Case") -> str:
        uri = case.run.tracking.resolved_uri(case.run.runs)
        return text_of(case, folder, uri)

    def here(cases: "list[Case]") -> "Iterator[Outcome]":
        for case in cases:
            try:
                yield case, execute(text(case))
            except Exception as error:  # noqa: BLE001 - told at the end; the other runs are worth having
                yield case, error

    def on_ray(cases: "list[Case]") -> "Iterator[Outcome]":
        import ray

        remote = ray.remote(num_cpus=1, max_retries=0)(execute)
        waiting = list(reversed(cases))
        running: dict[Any, Case] = {}
        while waiting or running:
            while waiting and len(running) < workers:
                case = waiting.pop()
                running[remote.remote(text(case))] = case
            for done in ray.wait(list(running))[0]:
                try:
                    yield running[done], ray.get(done)
                except Exception as error:  # noqa: BLE001
                    yield running[done], error
                del running[done]

    log_to_stderr()
    # A grid is one line of progress; what its runs say would bury it.
    logging.getLogger("msr_dist").setLevel(logging.WARNING)
    logging.getLogger("msr_dist.progress").setLevel(logging.INFO)
    try:
        if workers:
            _start_ray(workers)
        yield on_ray if workers else here
    except KeyboardInterrupt:
        click.echo("interrupted: what has finished stands; the same command goes on", err=True)
        sys.exit(130)
    finally:
        if workers:
            import ray

            ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _start_ray(workers: int) -> None:
    # Despite its name, for every system: Ray's own servers listen on the loopback interface alone.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    ray.init(
        address="local",
        num_cpus=workers,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": THREADS, "worker_process_setup_hook": "msr_dist.launch.silence"},
    )


def _known(names: tuple[str, ...], known: Any) -> list[str]:
    """`names`, or all that are known."""
    all_names = [getattr(each, "name", each) for each in known]
    if unknown := [name for name in names if name not in all_names]:
        raise ValueError(f"the grid has no {unknown[0]!r}; it has {', '.join(all_names)}")
    return list(names) or all_names


@contextmanager
def _told() -> Iterator[None]:
    """Bad input ends in one line per fault and status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        for line in str(error).splitlines():
            click.echo(f"quality: {line}", err=True)
        sys.exit(2)


def _line(error: Exception) -> str:
    """What went wrong in one line; Ray wraps it into traceback."""
    cause = getattr(error, "cause", None) or error
    text = str(cause).strip()
    return f"{type(cause).__name__}: {text.splitlines()[0]}" if text else type(cause).__name__


def _commit() -> str:
    """The commit that is measured."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
