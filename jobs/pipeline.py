"""Prepares data, has a language model read them, trains on both and evaluates, as one job of a Ray cluster.

ray job submit --working-dir . -- python jobs/pipeline.py jobs/configs/pipeline-movielens.toml --workers 8 \
  data=/shared/data/ml-1m-time store=/shared/knowledge/ml-1m-time train.runs=/shared/runs \
  prepare.raw=/shared/raw/ml-1m.zip

All of these lie on a file system that all machines share, hence the absolute paths: a relative one would be below
Ray's copy of the working directory. A job that was lost is submitted again: what is done stays done.
"""

import os
import sys
from pathlib import Path

import click

from msr_dist import stopping
from msr_dist.launch import LaunchError, call_and_leave, loading, log_to_stderr, set_threads


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="One per GPU, or core.")
@click.option("--restarts", default=3, show_default=True, type=click.IntRange(0), help="After a worker is lost.")
def main(config: Path, settings: tuple[str, ...], workers: int, restarts: int) -> None:
    """Do what CONFIG (TOML) describes on Ray, or go on with it: prepare, extract, train, evaluate.

    \b
    Examples:
      python jobs/pipeline.py jobs/configs/pipeline-quickstart.toml --workers 2
      python jobs/pipeline.py jobs/configs/pipeline-quickstart.toml --workers 2 train.name=seed-3 train.seed=3
      ray job submit --working-dir . -- python jobs/pipeline.py jobs/configs/pipeline-quickstart.toml --workers 8 \
        data=/shared/data/quickstart store=/shared/knowledge/quickstart train.runs=/shared/runs
    """
    log_to_stderr()
    # Before torch is loaded.
    set_threads(os.cpu_count() or 1)
    with loading():
        from rich.console import Console

        from msr_dist.config import load
        from msr_dist.evaluate import report_table
        from msr_dist.pipeline import PipelineConfig, pipeline

    try:
        chosen = load(PipelineConfig, config, settings)
        run = pipeline(chosen, workers, restarts)
    except (ValueError, OSError, LaunchError) as error:
        for line in str(error).splitlines():
            click.echo(f"pipeline: {line}", err=True)
        sys.exit(1 if isinstance(error, LaunchError) else 2)
    except stopping.Stopped as stopped:
        click.echo(f"pipeline: {stopped}", err=True)
        sys.exit(stopping.STATUS)
    for split in chosen.evaluate:
        Console(width=None if Console().is_terminal else 120).print(report_table(run, split))
    click.echo(f"run      {run.folder}")


if __name__ == "__main__":
    call_and_leave(main)
