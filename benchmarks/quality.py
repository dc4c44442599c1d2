"""Compares models honestly: the same data, the same search budget, several seeds, one command.

python benchmarks/quality.py run benchmarks/grids/literature.toml
python benchmarks/quality.py report benchmarks/grids/literature.toml
"""

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

# A run has one core wherever it stands; libraries read this when they are loaded.
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
os.environ |= THREADS

from msr_dist.launch import call_and_leave, log_to_stderr  # noqa: E402
from msr_dist.progress import Progress  # noqa: E402
from msr_dist.stopping import Stopped  # noqa: E402

if TYPE_CHECKING:
    from quality_grid import Case, DataConfig, Grid, Outcome

    from msr_dist.tracking import TrackingConfig

_PATH = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Compare models over data sets and seeds, as a grid (TOML) says.

    \b
    A grid first searches hyper-parameters, with the same few trials for every model and judged on the valid split
    alone, then runs every model with its best trial's settings and several seeds, judged on the test split.
    Results are lines under benchmarks/results/GRID/; what stands there is not run again, a run that failed neither.
    To have one run again, delete its line.

    A line stands for all settings and for the data, but not for the code: after a change of a model, delete its lines.
    The report says of which commits they are.

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
    """Run what is missing of GRID, each run on one core. Broken off, the same command goes on.

    Two processes may run the same grid on different data sets (--data).
    """
    with _told(), ExitStack() as stack:
        from quality_grid import RESULTS, Grid

        opened = Grid(grid, results or RESULTS)
        chosen_data = [each for each in opened.config.data if each.name in _known(datas, opened.config.data)]
        chosen_models = [name for name in opened.config.models if name in _known(models, opened.config.models)]
        for each in chosen_data:
            each.require(["train", "valid"] if only == "search" else ["train", "valid", "test"])
        for each in chosen_data:
            stack.enter_context(opened.locked(each.name))
            for odd in opened.odd(each.name):
                click.echo(f"skipped: {odd}", err=True)
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
    """Write tables and plots beside the results of GRID: README.md, and search.md of its trials.

    Of all lines only those that today's grid would make are shown; the others are counted, with the reason.
    """
    with _told():
        from quality_grid import RESULTS, Grid
        from quality_report import write_report

        click.echo(write_report(Grid(grid, results or RESULTS)))


def _phases(
    grid: "Grid", datas: "list[DataConfig]", models: list[str], only: str | None
) -> "Iterator[tuple[str, list[Case]]]":
    """Breadth first: all searches, then one seed of everything after the other, so that half a grid is a fair table."""
    if only != "final":
        yield (
            "search",
            [case for data in datas for search in grid.search(data, models).values() for case in search.cases],
        )
    if only == "search":
        return
    for seed in grid.config.seeds:
        cases = [case for data in datas for case in grid.finals(data, models, [seed])]
        if left := len(datas) * len(models) - len(cases):
            click.echo(f"seed {seed}: {left} runs have to wait for all trials of their model (--only search)", err=True)
        yield f"seed {seed}", cases


def _work(grid: "Grid", name: str, cases: "list[Case]", outcomes: Any) -> list[str]:
    """Run those of `cases` that have no line yet; why some failed, now or earlier."""
    from quality_grid import Failure, Result, commit_of_code

    commit, failed, missing = commit_of_code(), [], []
    lines = {case.data: grid.lines(case.data, case.run.evaluation.final) for case in cases}
    for case in cases:
        line = lines[case.data].get(case.key)
        if line is None:
            missing.append(case)
        elif isinstance(line, Failure):
            failed.append(f"{case.run.name}: {line.failed}, at {line.commit} ({_retry(grid, case)})")
    click.echo(f"{name}: {len(cases) - len(missing)} of {len(cases)} runs stand already", err=True)
    if tracked := [case for case in missing if case.run.tracking.enabled]:
        _make_store(tracked[0].run.tracking, tracked[0].run.runs, grid.file)
    progress = Progress(name, len(missing), unit="run")
    outcome: Outcome | Exception
    for case, outcome in outcomes(missing):
        if isinstance(outcome, Exception):
            reason = _line(outcome)
            # A full disk or a worker that was killed says nothing of the run: it is tried again.
            lost = isinstance(outcome, OSError | MemoryError)
            if not lost:
                grid.record(case, {"failed": reason, "commit": commit})
            retry = "the same command tries it again" if lost else _retry(grid, case)
            failed.append(f"{case.run.name}: {reason} ({retry})")
            progress.advance(values={case.run.name: "failed"})
        else:
            line = grid.record(case, outcome | {"commit": commit})
            assert isinstance(line, Result)
            progress.advance(values={case.run.name: f"{grid.judged(line):.4f}"})
    progress.close()
    return failed


def _retry(grid: "Grid", case: "Case") -> str:
    return f"to try again, delete its line {case.key!r} from {grid.file_of(case.data, case.run.evaluation.final)}"


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

    def here(cases: "list[Case]") -> "Iterator[tuple[Case, Outcome | Exception]]":
        for case in cases:
            try:
                yield case, execute(text(case))
            except Exception as error:  # noqa: BLE001 - told at the end; the other runs are worth having
                yield case, error

    def on_ray(cases: "list[Case]") -> "Iterator[tuple[Case, Outcome | Exception]]":
        import ray
        from ray.exceptions import RayError

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
                except RayError as error:
                    # Ray wraps what the run has raised; where it wraps nothing, the worker itself is gone.
                    cause = getattr(error, "cause", None)
                    lost = OSError(f"its worker is lost: {_line(error)}")
                    yield running[done], cause if isinstance(cause, Exception) else lost
                del running[done]

    log_to_stderr()
    # A grid is one line of progress; what its runs say would bury it.
    logging.getLogger("msr_dist").setLevel(logging.WARNING)
    logging.getLogger("msr_dist.progress").setLevel(logging.INFO)
    try:
        if workers:
            _start_ray(workers)
        yield on_ray if workers else here
    except (KeyboardInterrupt, Stopped):
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
    """What went wrong in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


if __name__ == "__main__":
    call_and_leave(main)
