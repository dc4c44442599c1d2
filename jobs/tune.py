"""Searches hyper-parameters of one model with Ray Tune; trials that fall behind are stopped early (ASHA).

python jobs/tune.py jobs/configs/movielens.toml model.kind=star --trials 16 --workers 2
"""

import json
import logging
import os
import shutil
import sys
import tomllib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import click
from pydantic import Field, model_validator

# A trial has one core wherever it runs; libraries read this when they are loaded.
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
os.environ |= THREADS
# Despite its name, for every system: Ray's own servers listen on the loopback interface alone.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

from msr_dist.config import Config, dump, load, merge, parse  # noqa: E402
from msr_dist.files import write_whole  # noqa: E402
from msr_dist.launch import call_and_leave, log_to_stderr  # noqa: E402
from msr_dist.metrics import Report  # noqa: E402
from msr_dist.recall import RetrievalReport  # noqa: E402
from msr_dist.run import RunConfig  # noqa: E402
from msr_dist.train import check, train  # noqa: E402

REQUEST_FILE = "request.json"
SEARCHABLE = ("loader", "embeddings", "model", "stages")
"""Sections of a run that decide what comes of it. A search manages the rest: trials must not read the test split."""
Curve = list[tuple[int, float]]


class Choice(Config):
    """What a setting is drawn from: exactly one of these."""

    log_uniform: tuple[float, float] | None = None
    uniform: tuple[float, float] | None = None
    choice: tuple[bool | int | float | str, ...] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("give one of log_uniform = [LOW, HIGH], uniform = [LOW, HIGH], choice = [VALUE, ...]")
        if not self.values:
            raise ValueError("choice = [] has nothing to draw from")
        for low, high in filter(None, (self.log_uniform, self.uniform)):
            if not low < high or (self.log_uniform and low <= 0):
                raise ValueError(f"[{low}, {high}] is no range to draw from")
        return self

    @property
    def values(self) -> tuple[bool | int | float | str, ...]:
        """All that can be drawn, or its bounds."""
        return self.choice or self.log_uniform or self.uniform or ()

    def domain(self) -> Any:
        """The same for Ray Tune."""
        from ray import tune

        if self.log_uniform:
            return tune.loguniform(*self.log_uniform)
        return tune.uniform(*self.uniform) if self.uniform else tune.choice(list(self.choice or ()))


class Space(Config):
    """A file of --space."""

    search: dict[str, Choice] = Field(min_length=1)


DEFAULT_SPACE = {
    "stages.0.dense.lr": Choice(log_uniform=(3e-4, 1e-2)),
    "stages.0.sparse.lr": Choice(log_uniform=(0.01, 0.2)),
    "model.dropout": Choice(choice=(0.0, 0.1, 0.2)),
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--space", type=click.Path(path_type=Path), help="TOML file with the settings to search, as above.")
@click.option("--trials", default=16, show_default=True, type=click.IntRange(1), help="How many settings to try.")
@click.option(
    "--workers",
    default=os.cpu_count() or 1,
    show_default="cores",
    type=click.IntRange(1),
    help="Trials at once, a core each.",
)
@click.option(
    "--gpus",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0),
    help="GPUs of each trial; 0.5 lets two share one.",
)
@click.option("--seed", default=0, show_default=True, help="Draws the settings.")
def main(
    config: Path, settings: tuple[str, ...], space: Path | None, trials: int, workers: int, gpus: float, seed: int
) -> None:
    """Search hyper-parameters for the run that CONFIG (TOML) describes, by its valid split; the test split is not read.

    After every epoch a trial reports its AUC (per scenario, averaged by rows), or recall where it retrieves. Of the
    trials that have come as far, the best third goes on, the others are stopped. At the end the best settings stand in
    RUNS/NAME-tuned.toml, ready for `msr-dist train`. The same command again continues a search that was broken off.

    \b
    By default the learning rates of stage 0 are searched, and dropout where the model has it. A file says otherwise:
      [search]
      "stages.0.dense.lr" = { log_uniform = [1e-4, 1e-2] }
      "stages.0.sparse.lr" = { log_uniform = [0.01, 0.2] }
      "model.widths" = { choice = ["[64]", "[128, 64]"] }
      "model.dropout" = { uniform = [0.0, 0.3] }

    \b
    Examples:
      python jobs/tune.py jobs/configs/movielens.toml model.kind=star --trials 16 --workers 2
      python jobs/tune.py jobs/configs/quickstart.toml name=wide model.widths=[256,128] --space space.toml
    """
    log_to_stderr()
    try:
        base = load(RunConfig, config, settings)
        searched = _space(base, space, str(config))
        check(_trial_run(base, {}, "trial"), 1)
        results = _search(base, searched, trials, workers, gpus, seed)
    except (ValueError, OSError) as error:
        for line in str(error).splitlines():
            click.echo(f"tune: {line}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("tune: interrupted; the same command goes on", err=True)
        sys.exit(130)
    if not _show(base, results, list(searched)):
        click.echo("tune: no trial has reported; see the reasons above", err=True)
        sys.exit(1)


def trial(drawn: Mapping[str, Any], base: str) -> None:
    """One trial, in a process of Ray's: trains, and reports after each epoch; Ray may stop it there."""
    from ray import tune

    logging.getLogger("msr_dist").setLevel(logging.WARNING)
    run = _trial_run(parse(RunConfig, tomllib.loads(base), where="trial"), drawn, tune.get_context().get_trial_id())
    run = run.claim_folder()

    def validated(epochs: int, report: Report | RetrievalReport) -> None:
        worth = scenario_auc(report) if isinstance(report, Report) else report.mean[_recall(run)]
        tune.report({"epochs": epochs, "worth": worth})

    train(run, validated)
    shutil.rmtree(run.folder, ignore_errors=True)


def _recall(run: RunConfig) -> str:
    return f"recall_at_{max(run.evaluation.top_k)}"


def _metric(run: RunConfig) -> str:
    """What trials are judged by, for people."""
    return f"mean recall@{max(run.evaluation.top_k)}" if run.retrieves else "scenario AUC"


def scenario_auc(report: Report) -> float:
    """Mean of the scenarios' AUCs of the first label by their rows: the overall AUC also pays for telling scenarios."""
    blocks = [next(iter(by_label.values())) for by_label in report.scenarios.values()]
    known = [(block.auc, block.rows) for block in blocks if block.auc is not None]
    return sum(auc * rows for auc, rows in known) / max(1, sum(rows for _, rows in known))


def _space(base: RunConfig, file: Path | None, where: str) -> dict[str, Choice]:
    """What is searched, each key tried once against the configuration."""
    if file is None:
        # A model that wraps others may lack it.
        keys = [key for key in DEFAULT_SPACE if key != "model.dropout" or "dropout" in type(base.model).model_fields]
        return {key: DEFAULT_SPACE[key] for key in keys}
    searched = load(Space, file).search
    for key, choice in searched.items():
        section, *below = key.split(".")
        if section not in SEARCHABLE:
            raise ValueError(f"{file}: {key}: a search draws settings of {', '.join(SEARCHABLE)}")
        # Otherwise a place that is free would be taken for a further stage.
        if section == "stages" and below and below[0].isdigit() and int(below[0]) >= len(base.stages):
            count = "one stage" if len(base.stages) == 1 else f"{len(base.stages)} stages"
            raise ValueError(f"{file}: {key}: the run has {count}; the last is stages.{len(base.stages) - 1}")
        for value in choice.values:
            parse(RunConfig, _merged(base, {key: value}), where=f"{file}: {key} in {where}")
    return searched


def _search(
    base: RunConfig, space: Mapping[str, Choice], trials: int, workers: int, gpus: float, seed: int
) -> list[Any]:
    """Run what is left of the search; the results of all its trials."""
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    folder = _folder(base)
    request = {"run": dump(base), "trials": trials, "seed": seed}
    request["space"] = {key: choice.model_dump(exclude_none=True, mode="json") for key, choice in space.items()}
    known = folder / REQUEST_FILE
    if known.exists() and json.loads(known.read_text()) != request:
        raise ValueError(f"{folder} holds another search: choose another name=, or delete that folder")
    if not ray.is_initialized():
        ray.init(
            address=os.environ.get("RAY_ADDRESS") or "local",
            num_cpus=None if os.environ.get("RAY_ADDRESS") else workers,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": THREADS, "worker_process_setup_hook": "msr_dist.launch.silence"},
        )
    _require_gpus(gpus, [node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]])
    trainable = tune.with_resources(partial(trial, base=dump(base.absolute())), {"cpu": 1, "gpu": gpus})
    domains = {key: choice.domain() for key, choice in space.items()}
    # Not before: a search that never began must not keep another one from this name.
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(known, json.dumps(request, indent=1) + "\n")
    if tune.Tuner.can_restore(str(folder / "tune")):
        tuner = tune.Tuner.restore(str(folder / "tune"), trainable, restart_errored=True, param_space=domains)
    else:
        epochs = sum(stage.epochs for stage in base.stages)
        tuner = tune.Tuner(
            trainable,
            param_space=domains,
            tune_config=tune.TuneConfig(
                metric="worth",
                mode="max",
                num_samples=trials,
                max_concurrent_trials=workers,
                search_alg=BasicVariantGenerator(random_state=seed),
                scheduler=ASHAScheduler(time_attr="epochs", max_t=epochs, grace_period=1, reduction_factor=3),
            ),
            run_config=tune.RunConfig(
                name="tune", storage_path=str(folder), verbose=0, callbacks=[_lines(trials, _metric(base))]
            ),
        )
    results = list(tuner.fit())
    # Ray ends a search that is interrupted as if it were over.
    if not all(result.error or (result.metrics or {}).get("done") for result in results) or len(results) < trials:
        raise KeyboardInterrupt
    shutil.rmtree(folder / "trials", ignore_errors=True)
    return results


def _require_gpus(gpus: float, nodes: list[float]) -> None:
    """ValueError where no machine could ever start a trial; Ray would wait for one."""
    if gpus > max(nodes, default=0.0):
        raise ValueError(f"--gpus {gpus:g}: no machine of this Ray has as many; they have {nodes or 'none'}")
    if gpus > 1 and gpus % 1:
        raise ValueError(f"--gpus {gpus:g}: above 1 only whole numbers")


def _lines(count: int, metric: str) -> Any:
    """Tells of every trial that has ended; Ray's own tables would bury it."""
    from ray import tune

    class Lines(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ARG002
            ended = {each.trial_id for each in trials if each.is_finished()} | {trial.trial_id}
            last = trial.last_result or {}
            told = f"{metric} {last.get('worth', 0.0):.4f} after {last.get('epochs', 0)} epochs"
            drawn = ", ".join(f"{key} {_number(value)}" for key, value in trial.config.items())
            click.echo(f"trial {len(ended)}/{count}: {told}, {drawn}", err=True)

    return Lines()


def _show(base: RunConfig, results: list[Any], keys: list[str]) -> bool:
    """Print the trials from the best on, write the best settings and the curves; False where none has reported."""
    from rich.console import Console
    from rich.table import Table

    # A trial that was stopped early has never shown what it comes to.
    ranked = sorted(results, key=lambda r: [-(r.metrics or {}).get(name, 0) for name in ("epochs", "worth")])
    table = Table(title=f"{base.name}: valid split")
    for head in (_metric(base), "epochs", *keys, ""):
        table.add_column(head)
    for result in ranked:
        metrics = result.metrics or {}
        drawn = [_number(result.config[key]) for key in keys]
        reason = "" if result.error is None else f"failed: {str(result.error).strip().splitlines()[-1]}"
        table.add_row(f"{metrics.get('worth', 0.0):.4f}", str(metrics.get("epochs", 0)), *drawn, reason)
    Console(width=None if Console().is_terminal else 120).print(table)
    best = ranked[0]
    if "worth" not in (best.metrics or {}):
        return False
    tuned = base.runs / f"{base.name}-tuned.toml"
    merged = _merged(base, {key: best.config[key] for key in keys} | {"name": f"{base.name}-tuned"})
    write_whole(tuned, dump(parse(RunConfig, merged, where="best trial")))
    curves = _folder(base) / "curves.svg"
    _plot({_label(result, keys): _curve(result) for result in ranked}, _metric(base), curves)
    click.echo(f"curves   {curves}")
    click.echo(f"best     {tuned}")
    click.echo(f"next     msr-dist train {tuned}")
    return True


def _curve(result: Any) -> Curve:
    """Epochs and worth, as the trial reported them."""
    file = Path(result.path) / "result.json"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(line["epochs"], line["worth"]) for line in lines if "worth" in line]


def _label(result: Any, keys: list[str]) -> str:
    return ", ".join(f"{key.removeprefix('stages.0.')} {_number(result.config[key])}" for key in keys)


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plot(curves: Mapping[str, Curve], metric: str, file: Path) -> None:
    """Every trial's worth over epochs; the best ones have a name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for rank, (label, curve) in enumerate(curves.items()):
        named = {"label": label, "color": f"C{rank}"} if rank < 5 else {"color": "silver", "zorder": 0}
        axes.plot([epochs for epochs, _ in curve], [worth for _, worth in curve], "o-", markersize=3, **named)
    axes.set_xlabel("epochs")
    axes.set_ylabel(f"{metric}, valid split")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.savefig(file)


def _trial_run(base: RunConfig, drawn: Mapping[str, Any], name: str) -> RunConfig:
    given: dict[str, Any] = {
        "name": name,
        "runs": str((_folder(base) / "trials").absolute()),
        "data": str(base.data.absolute()),
    }
    given |= {"evaluation.final": "valid", "evaluation.validate_epochs": 1, "checkpoint.keep": 1}
    # Trials that are stopped would stand in MLflow as if they ran for ever.
    given |= {"tracking.enabled": False}
    return parse(RunConfig, _merged(base, dict(drawn) | given), where="trial")


def _merged(base: RunConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    return merge(tomllib.loads(dump(base)), [f"{key}={_toml(value)}" for key, value in values.items()])


def _toml(value: Any) -> str:
    # A choice such as "[128, 64]" is a list to the configuration.
    return value if isinstance(value, str) and value.startswith("[") else json.dumps(value)


def _folder(base: RunConfig) -> Path:
    """Where a search keeps what it needs to go on."""
    return base.runs.absolute() / f"{base.name}-tune"


if __name__ == "__main__":
    call_and_leave(main)
