"""The command `msr-dist`. Loads nothing heavy before a command needs it: --help answers at once."""

import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from msr_dist.launch import Launcher, LaunchError, launch, log_to_stderr, set_threads, world_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from msr_dist.run import RunConfig

_FOLDER = click.Path(path_type=Path)


class _Commands(click.Group):
    """Bad input ends in one line per fault and status 2, lost workers in one line and status 1."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (ValueError, OSError) as error:
            for line in str(error).splitlines():
                click.echo(f"msr-dist: {line}", err=True)
            context.exit(2)
        except LaunchError as error:
            click.echo(f"msr-dist: {error}", err=True)
            context.exit(1)


def _launching(command: Any) -> Any:
    """Options that say where a command runs."""
    command = click.option(
        "--restarts",
        default=3,
        show_default=True,
        type=click.IntRange(0),
        help="How often to start again after a worker is lost.",
    )(command)
    command = click.option(
        "--workers", default=1, show_default=True, type=click.IntRange(1), help="Number of processes, one per GPU."
    )(command)
    return click.option(
        "--launcher",
        default="local",
        show_default=True,
        type=click.Choice(["local", "ray"]),
        help="Processes on this machine, or workers on Ray: on RAY_ADDRESS if that is set, else on a Ray of its own.",
    )(command)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train recommenders that serve many scenarios, with embedding tables sharded over all workers.

    \b
    Make data, train on two Ray workers, and look at the quality per scenario:
      msr-dist prepare synthetic data/quickstart
      msr-dist train jobs/configs/quickstart.toml --launcher ray --workers 2
      msr-dist evaluate runs/quickstart --split valid

    Any setting of a TOML file can be given as KEY=VALUE behind it, such as model.kind=star or seed=3.
    """
    log_to_stderr()


@main.command()
@click.argument("kind")
@click.argument("out", type=_FOLDER)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--config", type=_FOLDER, help="TOML file with the source's settings.")
def prepare(kind: str, out: Path, settings: tuple[str, ...], config: Path | None) -> None:
    """Turn raw logs into canonical parquet with a schema that describes itself.

    \b
    KIND is the source:
      synthetic  planted data whose best possible AUC is known
      movielens  MovieLens-1M, the publisher's zip or folder; three age groups as scenarios
      kuairand   KuaiRand (Pure, 1K, 27K), the publisher's folder; tabs of the app as scenarios
      mind       MIND news, the publisher's train and dev folders; news categories as scenarios
      amazon     Amazon reviews (2014, 2018, 2023), the publisher's JSON files; categories as scenarios
      douban     Douban ratings, the publisher's text files; books, music and films as scenarios
      aliccp     Ali-CCP, the publisher's CSV files; positions on Taobao's pages as scenarios
      aliexpress AliExpress searches, the publisher's or MTReclib's CSV files; countries as scenarios
      table      your own parquet or CSV logs, described by a TOML file
    OUT is the folder to write.

    \b
    Examples:
      msr-dist prepare synthetic data/quickstart rows=600000 scenarios=5
      msr-dist prepare movielens data/ml-1m raw=ml-1m.zip split.kind=random
      msr-dist prepare kuairand data/kuairand raw=KuaiRand-1K tabs=[0,1,2] split.kind=random
      msr-dist prepare table data/mine --config jobs/configs/prepare-table.toml
    """
    from msr_dist.config import kind_config, load, merge, parse
    from msr_dist.data.prepare.canonical import PrepareConfig
    from msr_dist.data.prepare.canonical import prepare as prepare_data

    source = kind_config("msr_dist.data.prepare", kind)
    settings = (f"kind={kind}", *settings)
    chosen = load(source, config, settings) if config else parse(source, merge({}, settings), where=f"prepare {kind}")
    assert isinstance(chosen, PrepareConfig)
    prepare_data(chosen, out, click.echo).show()


@main.command()
@click.argument("config", type=_FOLDER)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@_launching
@click.option("--dry-run", is_flag=True, help="Print the resolved configuration and the sharding plan, then stop.")
def train(
    config: Path, settings: tuple[str, ...], launcher: Launcher, workers: int, restarts: int, dry_run: bool
) -> None:
    """Train the run that CONFIG (TOML) describes, or go on with it where it stopped, and evaluate it per scenario.

    \b
    Examples:
      msr-dist train jobs/configs/quickstart.toml
      msr-dist train jobs/configs/quickstart.toml name=star model.kind=star --launcher ray --workers 2
      msr-dist train jobs/configs/quickstart.toml --workers 4 --dry-run
      torchrun --nproc-per-node 2 -m msr_dist train jobs/configs/quickstart.toml
    """
    workers = _own_workers(launcher, workers)
    set_threads(workers)
    from msr_dist.config import dump, load
    from msr_dist.distributed import is_first
    from msr_dist.run import RunConfig
    from msr_dist.train import check
    from msr_dist.train import train as train_run

    run = load(RunConfig, config, settings).absolute()
    check(run, workers)
    # Workers of a cluster may have other devices and more memory than this machine: theirs is another plan.
    plan = run.dry_plan(workers) if launcher == "local" or dry_run else ""
    if dry_run:
        click.echo(f"{dump(run)}\n{plan}")
        return
    if is_first():
        run.claim_folder()
    _everywhere(train_run, run, launcher, workers, restarts)
    if is_first():
        _show(run, run.evaluation.final, config)


@main.command()
@click.argument("run", type=_FOLDER)
@click.option("--split", default="test", show_default=True, type=click.Choice(["train", "valid", "test"]))
@_launching
def evaluate(run: Path, split: str, launcher: Launcher, workers: int, restarts: int) -> None:
    """Evaluate the newest checkpoint of RUN, a run's folder, per scenario.

    \b
    Examples:
      msr-dist evaluate runs/quickstart
      msr-dist evaluate runs/quickstart --split valid --workers 2
    """
    workers = _own_workers(launcher, workers)
    set_threads(workers)
    from msr_dist.distributed import is_first
    from msr_dist.evaluate import evaluate as evaluate_run
    from msr_dist.run import read_run

    chosen = read_run(run)
    _everywhere(partial(evaluate_run, split=split), chosen, launcher, workers, restarts)
    if is_first():
        _show(chosen, split)


def _own_workers(launcher: Launcher, workers: int) -> int:
    """The number of workers: what --workers says, or what something like torchrun has started."""
    started = world_size()
    if started and (launcher != "local" or workers not in (1, started)):
        raise ValueError(f"{started} processes have been started already: leave out --launcher and --workers")
    return started or workers


def _everywhere(
    function: "Callable[[RunConfig], None]", run: "RunConfig", launcher: Launcher, workers: int, restarts: int
) -> None:
    """Call `function` on all workers: those that something like torchrun has started already, or our own."""
    if world_size():
        function(run)
    else:
        launch(function, run, launcher, workers, run.folder, restarts)


def _show(run: "RunConfig", split: str, config: Path | None = None) -> None:
    """The table of a split, and what to do with the run."""
    import json

    from rich.console import Console

    from msr_dist.evaluate import metrics_file
    from msr_dist.metrics import Report

    file = metrics_file(run.folder, split)
    planted = run.data / "oracle.json"
    oracle = json.loads(planted.read_text()) if planted.exists() and split == "test" else None
    report = Report.from_json(json.loads(file.read_text()))
    Console(width=None if Console().is_terminal else 120).print(
        report.table(oracle, title=f"{run.name}: {split} split")
    )
    bin_folder = _bin_folder()
    click.echo(f"run      {_near(run.folder)}")
    click.echo(f"metrics  {_near(file)}")
    if run.tracking.enabled:
        click.echo(f"MLflow   {bin_folder}{run.tracking.how_to_open(run.runs)}")
    if config is not None:
        other = "mmoe" if run.model.kind == "star" else "star"
        click.echo(f"next     {bin_folder}msr-dist evaluate {_near(run.folder)} --split valid")
        click.echo(f"         {bin_folder}msr-dist train {config} name={other} model.kind={other}")


def _near(path: Path) -> Path:
    """The path from here, where it is below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _bin_folder() -> str:
    """What to type before a command's name: nothing where the shell finds it."""
    called = Path(sys.argv[0])
    return f"{_near(called.parent)}/" if called.name == "msr-dist" and not shutil.which("msr-dist") else ""
