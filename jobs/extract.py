"""Extracts knowledge with a frozen language model, as a job of a Ray cluster.

ray job submit --working-dir . -- python jobs/extract.py jobs/configs/extract-movielens.toml --workers 8 \
  data=/shared/data/ml-1m-time out=/shared/knowledge/ml-1m-time

OUT and the data lie on a file system that all machines share, hence the absolute paths: a relative one would be below
Ray's copy of the working directory. A job that was lost is submitted again: it goes on.
"""

import os
import sys
from pathlib import Path

import click

from msr_dist.launch import LaunchError, call_and_leave, loading, log_to_stderr, set_threads


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Actors: one per GPU, or core.")
@click.option("--retries", default=3, show_default=True, type=click.IntRange(0), help="Per shard, after a lost worker.")
@click.option("--retry-failed", is_flag=True, help="Try users again who failed for reasons of the machine.")
def main(config: Path, settings: tuple[str, ...], workers: int, retries: int, retry_failed: bool) -> None:
    """Make the store of vectors that CONFIG (TOML) describes, or bring it up to date; see `msr-dist extract --help`.

    \b
    Examples:
      python jobs/extract.py jobs/configs/extract-movielens.toml --workers 2
      ray job submit --working-dir . -- python jobs/extract.py jobs/configs/extract-movielens.toml --workers 8 \
        data=/shared/data/ml-1m-time out=/shared/knowledge/ml-1m-time
    """
    log_to_stderr()
    # Before torch is loaded.
    set_threads(os.cpu_count() or 1)
    with loading():
        from rich.console import Console

        from msr_dist.config import load
        from msr_dist.extract import ExtractConfig, extract

    try:
        summary = extract(load(ExtractConfig, config, settings), "ray", workers, retries, retry_failed)
    except (ValueError, OSError, LaunchError) as error:
        for line in str(error).splitlines():
            click.echo(f"extract: {line}", err=True)
        sys.exit(1 if isinstance(error, LaunchError) else 2)
    Console(width=None if Console().is_terminal else 120).print(summary.table())


if __name__ == "__main__":
    call_and_leave(main)
