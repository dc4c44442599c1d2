"""Trains a run, both stages of SASS among them, as a job of a Ray cluster.

ray job submit --working-dir . -- python jobs/train.py jobs/configs/sass-tastes.toml --workers 8 \
  data=/shared/data/tastes runs=/shared/runs

Data and runs lie on a file system that all machines share, hence the absolute paths: a relative one would be below
Ray's copy of the working directory. Data, but not two towers', may lie in an object store, data=s3://bucket/ml-1m, with
credentials in the environment of every machine of the cluster. A job that was lost is submitted again: it goes on.
"""

import sys
from pathlib import Path

import click

from msr_dist.launch import LaunchError, call_and_leave, launch, loading, log_to_stderr, set_threads
from msr_dist.stopping import STATUS, Stopped


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Ranks: one per GPU, or core.")
@click.option("--restarts", default=3, show_default=True, type=click.IntRange(0), help="After a worker is lost.")
@click.option("--min-workers", type=click.IntRange(1), help="Go on with as few while machines are missing.")
def main(config: Path, settings: tuple[str, ...], workers: int, restarts: int, min_workers: int | None) -> None:
    """Train the run that CONFIG (TOML) describes on Ray, or go on with it; see `msr-dist train --help`.

    \b
    Examples:
      python jobs/train.py jobs/configs/sass-tastes.toml --workers 2
      ray job submit --working-dir . -- python jobs/train.py jobs/configs/sass-tastes.toml --workers 8 \
        data=/shared/data/tastes runs=/shared/runs
    """
    log_to_stderr()
    # Before torch is loaded.
    set_threads(workers)
    with loading():
        from rich.console import Console

        from msr_dist.config import load
        from msr_dist.evaluate import report_table
        from msr_dist.ray_metrics import shown
        from msr_dist.run import RunConfig
        from msr_dist.train import check, fewer_workers

    try:
        run = load(RunConfig, config, settings).absolute()
        check(run, workers)
        fewer = fewer_workers(run, min_workers, workers)
        run = run.claim_folder()
        launch(shown(run), run, "ray", workers, run.folder, restarts, fewer)
    except Stopped as stopped:
        click.echo(f"train: {stopped}", err=True)
        sys.exit(STATUS)
    except (ValueError, OSError, LaunchError) as error:
        for line in str(error).splitlines():
            click.echo(f"train: {line}", err=True)
        sys.exit(1 if isinstance(error, LaunchError) else 2)
    Console(width=None if Console().is_terminal else 120).print(report_table(run, run.evaluation.final))
    click.echo(f"run      {run.folder}")


if __name__ == "__main__":
    call_and_leave(main)
