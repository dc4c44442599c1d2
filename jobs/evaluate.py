"""Evaluates a run per scenario, as a job of a Ray cluster.

ray job submit --working-dir . -- python jobs/evaluate.py /shared/runs/sass-tastes --split valid --workers 8

The run, and the data that it names, lie on a file system that all machines share.
"""

import sys
from functools import partial
from pathlib import Path

import click

from msr_dist import stopping
from msr_dist.launch import LaunchError, call_and_leave, launch, loading, log_to_stderr, set_threads


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--split", default="test", show_default=True, type=click.Choice(["train", "valid", "test"]))
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Ranks: one per GPU, or core.")
@click.option("--restarts", default=3, show_default=True, type=click.IntRange(0), help="After a worker is lost.")
def main(run: Path, split: str, workers: int, restarts: int) -> None:
    """Evaluate the newest checkpoint of RUN, a run's folder, on Ray; see `msr-dist evaluate --help`.

    \b
    Examples:
      python jobs/evaluate.py runs/quickstart --split valid --workers 2
      ray job submit --working-dir . -- python jobs/evaluate.py /shared/runs/sass-tastes --workers 8
    """
    log_to_stderr()
    # Before torch is loaded.
    set_threads(workers)
    with loading():
        from rich.console import Console

        from msr_dist.evaluate import evaluate, metrics_file, report_table
        from msr_dist.run import read_run

    try:
        chosen = read_run(run)
        launch(partial(evaluate, split=split), chosen, "ray", workers, chosen.folder, restarts)
    except (ValueError, OSError, LaunchError) as error:
        for line in str(error).splitlines():
            click.echo(f"evaluate: {line}", err=True)
        sys.exit(1 if isinstance(error, LaunchError) else 2)
    except stopping.Stopped as stopped:
        click.echo(f"evaluate: {stopped}", err=True)
        sys.exit(stopping.STATUS)
    Console(width=None if Console().is_terminal else 120).print(report_table(chosen, split))
    click.echo(f"metrics  {metrics_file(chosen.folder, split)}")


if __name__ == "__main__":
    call_and_leave(main)
