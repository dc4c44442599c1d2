"""The command `msr-dist`. Loads nothing heavy before a command needs it: --help answers at once."""

import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from msr_dist import stopping
from msr_dist.launch import Launcher, LaunchError, launch, load_ahead, loading, log_to_stderr, set_threads, world_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from msr_dist.llm.compress import Precision
    from msr_dist.run import RunConfig

_FOLDER = click.Path(path_type=Path)


class _Size(click.ParamType[int]):
    """Bytes, with a unit."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        from pydantic import ByteSize, TypeAdapter, ValidationError

        try:
            # Without a unit, 80 would be 80 bytes.
            return int(TypeAdapter(ByteSize).validate_python("no unit" if str(value).isdecimal() else value))
        except ValidationError:
            self.fail(f"{value!r} is no size: give a number and a unit, such as 141GiB or 80GB", param, context)


class _Commands(click.Group):
    """Bad input ends in one line per fault and status 2, lost workers in one line and status 1, a stop in status 75."""

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
        except stopping.Stopped as stopped:
            click.echo(f"msr-dist: {stopped}", err=True)
            context.exit(stopping.STATUS)


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
      drifting   planted clicks of users and items that come and go, for open vocabularies; the best AUC is known
      movielens  MovieLens-1M, the publisher's zip or folder; three age groups as scenarios
      kuairand   KuaiRand (Pure, 1K, 27K), the publisher's folder; tabs of the app as scenarios
      mind       MIND news, the publisher's train and dev folders; news categories as scenarios
      amazon     Amazon reviews (2014, 2018, 2023), the publisher's JSON files; categories as scenarios
      douban     Douban ratings, the publisher's text files; books, music and films as scenarios
      aliccp     Ali-CCP, the publisher's CSV files; positions on Taobao's pages as scenarios
      aliexpress AliExpress searches, the publisher's or MTReclib's CSV files; countries as scenarios
      table      your own parquet or CSV logs, described by a TOML file
    OUT is the folder to write; `train` reads copies of it in object stores as well.

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
@click.option(
    "--min-workers",
    type=click.IntRange(1),
    help="On Ray: go on with as few while machines are missing, and with --workers again when they are back.",
)
@click.option("--dry-run", is_flag=True, help="Print the resolved configuration and the sharding plan, then stop.")
def train(
    config: Path,
    settings: tuple[str, ...],
    launcher: Launcher,
    workers: int,
    restarts: int,
    min_workers: int | None,
    dry_run: bool,
) -> None:
    """Train the run that CONFIG (TOML) describes, or go on with it where it stopped, and evaluate it per scenario.

    Models predict labels (star, mmoe, ...), or find items: sass and two_tower, whose stages have the objectives
    contrastive (pre-training) and retrieval.

    The data may lie in an object store, data=s3://bucket/folder or gs://..., with credentials in the environment only:
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS.

    Ctrl-C, or SIGTERM, saves after the step that the run is in, and ends with status 75; a second one ends at once.

    \b
    Examples:
      msr-dist train jobs/configs/quickstart.toml
      msr-dist train jobs/configs/quickstart.toml name=star model.kind=star --launcher ray --workers 2
      msr-dist train jobs/configs/quickstart.toml --workers 4 --dry-run
      msr-dist train jobs/configs/quickstart.toml --workers 2 data=s3://bucket/quickstart
      msr-dist train jobs/configs/sass-tastes.toml --workers 2
      msr-dist train jobs/configs/quickstart.toml --launcher ray --workers 8 --min-workers 2
      torchrun --nproc-per-node 2 -m msr_dist train jobs/configs/quickstart.toml
    """
    if min_workers is not None and launcher != "ray":
        raise ValueError("--min-workers is for --launcher ray: the workers of one machine come and go together")
    workers = _begin(launcher, workers, None if dry_run else "msr_dist.train")
    with loading():
        from msr_dist.config import dump, load
        from msr_dist.distributed import is_first
        from msr_dist.ray_metrics import shown
        from msr_dist.run import RunConfig
        from msr_dist.train import check, fewer_workers
        from msr_dist.train import train as train_run

    run = load(RunConfig, config, settings).absolute()
    check(run, workers)
    fewer = fewer_workers(run, min_workers, workers)
    # Workers of a cluster may have other devices and more memory than this machine: theirs is another plan.
    plan = run.dry_plan(workers) if launcher == "local" or dry_run else ""
    if dry_run:
        click.echo(f"{dump(run)}\n{plan}")
        return
    if is_first():
        run = run.claim_folder()
    _everywhere(shown(run) if launcher == "ray" else train_run, run, launcher, workers, restarts, fewer)
    if is_first():
        _show(run, run.evaluation.final, config)


@main.command()
@click.argument("config", type=_FOLDER)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--gpus", type=click.IntRange(1), help="Number of GPUs, one rank each.")
@click.option("--hbm", type=_Size(), help="Memory of a GPU, such as 141GiB or 80GB.")
@click.option("--per-machine", default=8, show_default=True, type=click.IntRange(1), help="GPUs of one machine.")
@click.option("--cpus", type=click.IntRange(1), help="Number of CPU processes, one rank each.")
@click.option("--memory", type=_Size(), help="Main memory of one rank; with --gpus, for cached tables.")
@click.option("--schema", type=_FOLDER, help="A schema.toml, where the data of CONFIG are not here.")
@click.option("--rows", multiple=True, metavar="TABLE=ROWS", help="Rows of a table, instead of the schema's.")
@click.option(
    "--list-length", default=10.0, show_default=True, type=click.FloatRange(1), help="Mean ids of a list feature."
)
@click.option("--out", type=_FOLDER, help="Write the plan to this TOML file, to edit and to train with.")
def plan(
    config: Path,
    settings: tuple[str, ...],
    schema: Path | None,
    rows: tuple[str, ...],
    list_length: float,
    out: Path | None,
    **machines: Any,
) -> None:
    """Say where the tables of CONFIG go on machines that need not be there, what every rank needs, and if it fits.

    Nothing but CONFIG and a schema is read, and no table is allocated: billions of rows take seconds. Ends with status
    1 where the run does not fit; the smallest number of ranks that fits, of those that divide loader.partitions, is
    printed in any case.

    \b
    Examples:
      msr-dist plan jobs/configs/quickstart.toml --cpus 2 --memory 8GiB
      msr-dist plan run.toml --gpus 64 --hbm 141GiB loader.partitions=192 --schema schema.toml
      msr-dist plan run.toml --gpus 64 --hbm 80GB loader.partitions=192 --rows user=10_000_000_000
      msr-dist plan run.toml --gpus 8 --hbm 80GiB --memory 200GiB parallel.cache=0.2
      msr-dist plan run.toml --cpus 2 --memory 8GiB --out plan.toml
      msr-dist train run.toml --workers 2 parallel.plan=plan.toml
    """
    set_threads(1)
    with loading():
        from rich.console import Console

        from msr_dist.config import load
        from msr_dist.plan import Machines, Planner, read_schema, size_text
        from msr_dist.run import RunConfig

    wanted = Machines.of(**machines)
    run = load(RunConfig, config, settings).absolute()
    planner = Planner(run, read_schema(run, schema, rows), list_length)
    found = planner.plan(wanted)
    fewest = planner.fewest(found)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(found.tables())
    console.print(found.memory())
    usable, needed = wanted.usable, sum(found.rank_bytes(found.fullest).values())
    margin = f" of {size_text(wanted.hbm)}" if wanted.hbm else ""
    click.echo(
        f"fits     {'yes' if found.fits else 'NO'}: {size_text(needed)} needed, {size_text(usable)}{margin} usable"
    )
    if wanted.device == "cuda":
        most = max(map(found.main_bytes, range(wanted.ranks)))
        click.echo(
            f"main     {size_text(most)} of a rank's main memory, for cached tables and to write checkpoints from"
        )
    if run.checkpoint.in_background(wanted.device) and not found.copied:
        click.echo("saving   training waits while checkpoints are written: there is no room for a copy of the tables")
    click.echo(f"step     {found.estimate.milliseconds:.1f} ms of lookups and their communication, by TorchRec's model")
    click.echo(f"fewest   {fewest.machines.ranks if fewest else 'no number'} of those that divide loader.partitions")
    if out is not None:
        found.write(out)
        click.echo(f"plan     {_near(out.absolute())}")
    if not found.fits:
        click.get_current_context().exit(1)


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
    workers = _begin(launcher, workers, "msr_dist.evaluate")
    with loading():
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
    workers = _begin(launcher, workers, "msr_dist.index")
    with loading():
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
    with loading():
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
    with loading():
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
    with loading():
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
    with loading():
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
    with loading():
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


@main.command()
@click.argument("job")
@click.argument("arguments", nargs=-1, required=True, metavar="CONFIG [KEY=VALUE]...")
@click.option("--address", envvar="RAY_API_SERVER_ADDRESS", required=True, help="Job server, as http://HOST:8265.")
@click.option("--workers", type=click.IntRange(1), help="Number of the job's workers.")
@click.option("--follow", is_flag=True, help="Show what the job says until it ends, and end as it does.")
def submit(job: str, arguments: tuple[str, ...], address: str, workers: int | None, follow: bool) -> None:
    """Have a Ray cluster run jobs/JOB.py, as it is in this folder, with CONFIG and what is behind it.

    The folder is sent along, without data/, runs/, knowledge/ and what .gitignore names: data and results lie on a file
    system that all machines share, at absolute paths. Other options of the job stand behind a --. A cluster that asks
    for a token is given Ray's: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH. Ctrl-C leaves the job
    running.

    \b
    Examples:
      msr-dist submit pipeline jobs/configs/pipeline-quickstart.toml --workers 8 --address http://127.0.0.1:8265 \
        --follow data=/shared/data/quickstart store=/shared/knowledge/quickstart train.runs=/shared/runs
      msr-dist submit evaluate /shared/runs/quickstart --address http://127.0.0.1:8265 -- --split valid
    """
    from msr_dist.submit import JobServer, entrypoint

    chosen = arguments if workers is None else ("--workers", str(workers), *arguments)
    command = entrypoint(job, chosen, Path.cwd())
    server = JobServer(address)
    submission = server.submit(command, Path.cwd())
    click.echo("\n".join([f"job      {submission}", *server.hints(submission)]))
    if not follow:
        return
    try:
        succeeded = server.follow(submission, partial(click.echo, nl=False))
    except KeyboardInterrupt:
        click.echo("\n".join(["", f"{submission} goes on:", *server.hints(submission)]), err=True)
        sys.exit(130)
    if not succeeded:
        sys.exit(1)


def _begin(launcher: Launcher, workers: int, module: str | None) -> int:
    """The number of workers: what --workers says, or what something like torchrun has started.

    Local ones begin to load `module`, whose function they will call, while this process loads what it needs itself.
    """
    started = world_size()
    if started and (launcher != "local" or workers not in (1, started)):
        raise ValueError(f"{started} processes have been started already: leave out --launcher and --workers")
    set_threads(started or workers)
    if module and not started:
        load_ahead(launcher, workers, module)
    return started or workers


def _everywhere(
    function: "Callable[[RunConfig], None]",
    run: "RunConfig",
    launcher: Launcher,
    workers: int,
    restarts: int,
    fewer: tuple[int, ...] = (),
) -> None:
    """Call `function` on all workers: those that something like torchrun has started already, or our own."""
    if world_size():
        function(run)
    else:
        launch(function, run, launcher, workers, run.folder, restarts, fewer)


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
