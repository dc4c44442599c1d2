"""Prepares a data set on one worker, as a job of a Ray cluster.

ray job submit --working-dir . -- python jobs/prepare.py jobs/configs/prepare-movielens.toml /shared/data/ml-1m-time \
  raw=/shared/raw/ml-1m.zip

OUT and the raw files lie on a file system that all machines share, hence the absolute paths: a relative one would be
below Ray's copy of the working directory. Data that are there already, made with the same settings, are left alone.
"""

import os
import sys
from pathlib import Path

import click

from msr_dist.launch import LaunchError, call_and_leave, log_to_stderr, set_threads


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--restarts", default=3, show_default=True, type=click.IntRange(0), help="After the worker is lost.")
def main(config: Path, out: Path, settings: tuple[str, ...], restarts: int) -> None:
    """Write the data set that CONFIG (TOML, with its kind) describes to the folder OUT; see `msr-dist prepare --help`.

    \b
    Examples:
      python jobs/prepare.py jobs/configs/prepare-movielens.toml data/ml-1m-time raw=ml-1m.zip
      ray job submit --working-dir . -- python jobs/prepare.py jobs/configs/prepare-movielens.toml \
        /shared/data/ml-1m-time raw=/shared/raw/ml-1m.zip
    """
    log_to_stderr()
    # Before torch is loaded.
    set_threads(os.cpu_count() or 1)
    from pydantic import ConfigDict

    from msr_dist.config import Kinded, kind_config, load
    from msr_dist.data.prepare.canonical import PrepareConfig
    from msr_dist.pipeline import SOURCES, prepare_on_ray

    class AnySource(Kinded):
        """What a file says of its kind."""

        model_config = ConfigDict(extra="ignore")

    try:
        source = load(kind_config(SOURCES, load(AnySource, config, settings).kind), config, settings)
        assert isinstance(source, PrepareConfig)
        prepare_on_ray(source, out.absolute(), restarts)
    except (ValueError, OSError, LaunchError) as error:
        for line in str(error).splitlines():
            click.echo(f"prepare: {line}", err=True)
        sys.exit(1 if isinstance(error, LaunchError) else 2)
    click.echo(f"data     {out}")


if __name__ == "__main__":
    call_and_leave(main)
