"""The command `msr-dist`. Loads nothing heavy before a command needs it: --help answers at once."""

import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from msr_dist.launch import Launcher, LaunchError, launch, log_to_stderr, set_threads, world_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from msr_dist.llm.compress import Precision
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
        help="How often to try again after a worker is lost; for extract, each shard.",
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
      tastes     planted choices in scenarios with items of their own, for two towers; the best recall is known
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

    Models predict labels (star, mmoe, ...), or find items: sass and two_tower, whose stages have the objectives
    contrastive (pre-training) and retrieval.

    \b
    Examples:
      msr-dist train jobs/configs/quickstart.toml
      msr-dist train jobs/configs/quickstart.toml name=star model.kind=star --launcher ray --workers 2
      msr-dist train jobs/configs/quickstart.toml --workers 4 --dry-run
      msr-dist train jobs/configs/sass-tastes.toml --workers 2
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
        run = run.claim_folder()
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


@main.command("export-index")
@click.argument("run", type=_FOLDER)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@_launching
def export_index(run: Path, settings: tuple[str, ...], launcher: Launcher, workers: int, restarts: int) -> None:
    """Write RUN/index: the vectors of every scenario's items, and a graph of them for approximate search.

    RUN is the folder of a finished run of two towers. The share of the exact nearest items that the graph finds is
    printed per scenario; neighbours, build_width and search_width trade it for time and memory.

    \b
    Examples:
      msr-dist export-index runs/sass
      msr-dist export-index runs/sass neighbours=48 search_width=256 --workers 2
    """
    workers = _own_workers(launcher, workers)
    set_threads(workers)
    from rich.console import Console

    from msr_dist.config import merge, parse
    from msr_dist.distributed import is_first
    from msr_dist.index import FOLDER, IndexConfig, read_manifest
    from msr_dist.index import export_index as export
    from msr_dist.run import read_run

    chosen = read_run(run)
    wanted = parse(IndexConfig, merge({}, settings), where="export-index")
    _everywhere(partial(export, settings=wanted), chosen, launcher, workers, restarts)
    if is_first():
        table = read_manifest(chosen).table(f"{chosen.name}: items by scenario")
        Console(width=None if Console().is_terminal else 120).print(table)
        click.echo(f"index    {_near(chosen.folder / FOLDER)}")
        scenario = chosen.read_schema().scenarios[0].name
        click.echo(f"next     {_bin_folder()}msr-dist retrieve {_near(chosen.folder)} --user ID --scenario {scenario}")


@main.command()
@click.argument("run", type=_FOLDER)
@click.option("--user", required=True, help="A user's id as in the raw data.")
@click.option("--scenario", required=True, help="A scenario's name.")
@click.option("-k", default=20, show_default=True, type=click.IntRange(1), help="How many items.")
def retrieve(run: Path, user: str, scenario: str, k: int) -> None:
    """Print the items of a scenario that are nearest to a user, from RUN/index, without those chosen before.

    \b
    Examples:
      msr-dist retrieve runs/sass --user 1024 --scenario search
      msr-dist retrieve runs/sass --user 1024 --scenario home -k 5
    """
    set_threads(1)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from msr_dist.index import retrieve as find
    from msr_dist.run import read_run

    table = Table(title=Text(f"user {user}, {scenario}"))
    for heading in ("", "item", "about", "cosine"):
        table.add_column(heading, overflow="fold")
    for found in find(read_run(run), user, scenario, k):
        # As text: brackets in a title are no markup.
        table.add_row(str(found.place), Text(str(found.id)), Text(found.about), f"{found.score:.4f}")
    Console(width=None if Console().is_terminal else 120).print(table)


@main.command()
@click.argument("run", type=_FOLDER)
@click.option("--against", multiple=True, type=_FOLDER, help="Another run to compare with; may be given several times.")
def report(run: Path, against: tuple[Path, ...]) -> None:
    """Write RUN/report.html: what RUN, a finished run's folder, gains and has learned, on one page.

    It is compared with the runs beside it that differ in the model alone. For LLM4MSR these are its backbone, ablations
    and controls; the page also shows how strongly its meta layers act, and which scenarios and users the language model
    finds alike. The run in MLflow gets the page as well.

    \b
    Examples:
      msr-dist report runs/llm4msr
      msr-dist report runs/llm4msr --against elsewhere/star --against elsewhere/star-seed1
    """
    set_threads(1)
    from msr_dist.report import write

    file, tracked = write(run, against)
    click.echo(f"report   {_near(file)}{' (and in MLflow)' if tracked else ''}")


@main.command()
@click.argument("config", type=_FOLDER)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--retry-failed", is_flag=True, help="Try users again who failed for want of memory, or whose worker died of them."
)
@_launching
def extract(
    config: Path, settings: tuple[str, ...], retry_failed: bool, launcher: Launcher, workers: int, restarts: int
) -> None:
    """Have a frozen language model read what each user engaged with, and keep a vector of every user and scenario.

    CONFIG (TOML) names prepared data, the model, and the folder OUT to write. The same command again goes on where it
    stopped; where the data have changed since, only users whose prompt is another one are encoded again. On a CPU every
    worker has one core, and a model of its own in memory; with GPUs each has one. One local worker is the command's own
    process: two or more survive a prompt that kills a worker, and name it.

    \b
    A configuration that is complete:
      data = "data/ml-1m"
      out = "knowledge/ml-1m"
      [model]
      name = "HuggingFaceTB/SmolLM2-135M-Instruct"   # or a local folder, or a .gguf file
      [compress]
      width = 64

    \b
    Examples:
      msr-dist extract jobs/configs/extract-movielens.toml --workers 2
      msr-dist extract jobs/configs/extract-movielens.toml history.before=970000000 --launcher ray --workers 8
      msr-dist extract jobs/configs/extract-movielens.toml out=knowledge/last model.pooling=last_prompt_token
    """
    if world_size():
        raise ValueError("extract starts its own workers: call it without torchrun, with --workers")
    # Before torch is loaded. Each worker has one thread, so that vectors do not depend on how many workers there are.
    set_threads(os.cpu_count() or 1)
    from rich.console import Console

    from msr_dist.config import load
    from msr_dist.extract import ExtractConfig
    from msr_dist.extract import extract as extract_all

    chosen = load(ExtractConfig, config, settings)
    summary = extract_all(chosen, launcher, workers, restarts, retry_failed)
    Console(width=None if Console().is_terminal else 120).print(summary.table())
    bin_folder = _bin_folder()
    click.echo(f"vectors  {chosen.out}")
    if summary.compressed is None:
        click.echo(f"next     {bin_folder}msr-dist compress {chosen.out} --width 64")
    else:
        asked = f"knowledge.store={chosen.out} knowledge.width={len(summary.compressed.retained)}"
        click.echo(f"next     {bin_folder}msr-dist train RUN.toml model.kind=llm4msr model.backbone.kind=star {asked}")


@main.command()
@click.argument("store", type=_FOLDER)
@click.option("--width", default=64, show_default=True, type=click.IntRange(1), help="Principal components to keep.")
@click.option(
    "--precision", default="fp16", show_default=True, type=click.Choice(["fp16", "int8"]), help="Of the numbers."
)
@click.option("--whiten/--no-whiten", default=True, show_default=True, help="Give every component the same variance.")
@click.option(
    "--sample",
    default=100_000,
    show_default=True,
    type=click.IntRange(2),
    help="Users that the components are fitted on.",
)
@click.option("--seed", default=0, show_default=True, help="Draws the sample.")
def compress(store: Path, width: int, precision: "Precision", whiten: bool, sample: int, seed: int) -> None:
    """Bring the vectors of STORE, the folder of an extraction, to the width that training wants.

    STORE/pca-WIDTH holds them by row of the user's table; widths stand beside each other.

    \b
    Examples:
      msr-dist compress knowledge/ml-1m --width 64
      msr-dist compress knowledge/ml-1m --width 128 --precision int8
    """
    set_threads(1)
    from msr_dist.llm.compress import compress as compress_store

    report = compress_store(store, width, whiten=whiten, precision=precision, sample=sample, seed=seed)
    click.echo(f"{'made' if report.made else 'was there already'}: {report.folder}, {report.users:,} users")
    click.echo(f"width {width} keeps {report.total:.1%} of the variance, as {report.sampled:,} users have it")
    most = 8
    shares = " ".join(f"{share:.1%}" for share in report.retained[:most])
    click.echo(f"by component: {shares}{' ...' if width > most else ''}")


@main.command()
@click.argument("config", type=_FOLDER)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--user", help="Id of a user, as the raw data have it.")
@click.option("--scenario", help="Name of a scenario.")
def prompts(config: Path, settings: tuple[str, ...], user: str | None, scenario: str | None) -> None:
    """Print what the language model is given to read by the extraction CONFIG: of all scenarios and a user, or of one.

    \b
    Examples:
      msr-dist prompts jobs/configs/extract-movielens.toml
      msr-dist prompts jobs/configs/extract-movielens.toml --user 4711
      msr-dist prompts jobs/configs/extract-movielens.toml prompts.user_template=mine.txt --user 4711
    """
    set_threads(1)
    from msr_dist.config import load
    from msr_dist.extract import ExtractConfig, show_prompts

    shared = ""
    for shown in show_prompts(load(ExtractConfig, config, settings), user, scenario):
        start, text = shown.prompt.own_start, shown.prompt.text
        click.secho(f"== {shown.title}: {shown.tokens} tokens", bold=True)
        if text[:start] != shared:
            shared = text[:start]
            click.secho(shared.rstrip("\n"), dim=True)
            click.echo()
        click.secho(f"-- its own part: {shown.own_tokens} tokens", bold=True)
        click.echo(f"{text[start:]}\n")


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
    from rich.console import Console

    from msr_dist.evaluate import metrics_file, report_table

    Console(width=None if Console().is_terminal else 120).print(report_table(run, split))
    bin_folder = _bin_folder()
    click.echo(f"run      {_near(run.folder)}")
    click.echo(f"metrics  {_near(metrics_file(run.folder, split))}")
    if run.tracking.enabled:
        click.echo(f"MLflow   {bin_folder}{run.tracking.how_to_open(run.runs)}")
    if config is not None:
        other = "mmoe" if run.model.kind == "star" else "star"
        click.echo(f"next     {bin_folder}msr-dist evaluate {_near(run.folder)} --split valid")
        if run.retrieves:
            click.echo(f"         {bin_folder}msr-dist export-index {_near(run.folder)}")
        else:
            click.echo(f"         {bin_folder}msr-dist train {config} name={other} model.kind={other}")


def _near(path: Path) -> Path:
    """The path from here, where it is below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _bin_folder() -> str:
    """What to type before a command's name: nothing where the shell finds it."""
    called = Path(sys.argv[0])
    return f"{_near(called.parent)}/" if called.name == "msr-dist" and not shutil.which("msr-dist") else ""
