"""What a run is: its configuration, its folder, and the model that it trains.

RUNS/NAME/
  config.toml          the resolved configuration
  plan.txt             the sharding plan
  metrics.jsonl        every value that was tracked, one line per step
  metrics.json         per-scenario metrics of the test split (metrics-valid.json: of the valid split)
  checkpoints/         stage-S-step-N
  heartbeats/ stacks/  how far each rank is, and where it was when the run was found to hang
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator

from msr_dist.checkpoint import CheckpointConfig
from msr_dist.compiled import compile_layers
from msr_dist.config import Config, component, dump, load
from msr_dist.data.loader import LoaderConfig
from msr_dist.data.places import Data, Folder
from msr_dist.distributed import World
from msr_dist.files import held, write_whole
from msr_dist.guard import GuardConfig
from msr_dist.knowledge import KnowledgeConfig, UserVectors
from msr_dist.layout import (
    Capacity,
    Communication,
    Estimate,
    ParallelConfig,
    estimate,
    make_plan,
    module_tables,
    read_plan,
)
from msr_dist.models.base import BackboneConfig, ModelConfig, of_whole_batch
from msr_dist.models.objectives import Contrastive, Labels, Retrieval
from msr_dist.models.towers import TowersConfig
from msr_dist.optim import DenseOptimizer, Schedule, SparseOptimizer
from msr_dist.parallel import Sharded, shard
from msr_dist.recommender import EmbeddingsConfig, Precision, Recommender, module_name
from msr_dist.schema import KNOWLEDGE_TABLE, FeatureSchema
from msr_dist.tracking import TrackingConfig
from msr_dist.watch import WatchConfig

log = logging.getLogger(__name__)

CONFIG_FILE = "config.toml"
METRICS_FILE = "metrics.json"
PLAN_FILE = "plan.txt"
LOCK_FILE = "lock"
CHECKPOINTS = "checkpoints"


class StageConfig(Config):
    """One pass of training with its own optimizers; a later stage starts from the weights of the one before."""

    name: str = "train"
    objective: Annotated[Labels | Retrieval | Contrastive, Field(discriminator="kind")] | None = None
    """What it minimises; by default what the model is for: labels, or for two towers retrieval. A name alone, such as
    "contrastive", stands for that objective as it is."""
    epochs: int = Field(default=1, ge=1)
    frozen_tables: int = Field(default=0, ge=0)
    """So many steps at the beginning leave the embedding tables as they are."""
    sparse: SparseOptimizer = SparseOptimizer()
    dense: DenseOptimizer = DenseOptimizer()
    schedule: Schedule = Schedule()

    @field_validator("objective", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return {"kind": given} if isinstance(given, str) else given


class EvaluationConfig(Config):
    """How the model is judged."""

    batch_size: int = Field(default=16384, ge=1)
    """Rows of all ranks in one evaluation step; changes no result."""
    validate_epochs: int = Field(default=1, ge=0)
    """Evaluate the valid split after every so many epochs; 0 never does."""
    final: Literal["valid", "test"] = "test"
    """The split that the finished run is judged on; with valid, as a search does, the test split is never opened."""
    top_k: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (20, 50)
    """Two towers: how many items are retrieved, for recall, NDCG and hit rate."""

    def validates_after(self, epochs: int) -> bool:
        """Whether the valid split is due after so many epochs."""
        return self.validate_epochs > 0 and epochs % self.validate_epochs == 0


class RunConfig(Config):
    """Everything about a run.

    `seed`, `data`, `loader`, `embeddings`, `knowledge`, `model`, `precision`, `dense_rows`, `communication`, `compile`
    and `stages` decide its losses.
    """

    name: str = Field(min_length=1, pattern=r"^\w[\w.-]*$")
    """Names the run's folder and the run in MLflow; the same name continues the same run."""
    runs: Folder = Path("runs")
    """The folder of all runs."""
    seed: int = Field(default=0, ge=0, lt=1 << 31)
    data: Data
    """A folder that `msr-dist prepare` has made, here or copied to an object store: s3://bucket/folder or
    gs://bucket/folder, whose credentials, region and endpoint stand in the environment. Two towers and `knowledge` want
    it here."""
    loader: LoaderConfig = LoaderConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    knowledge: KnowledgeConfig | None = None
    """What a language model says of users and scenarios, for models that read it."""
    model: component("msr_dist.models")  # type: ignore[valid-type]
    """`kind` names a file in msr_dist/models, or a module of your own; the other keys are that model's."""
    precision: Precision = "fp32"
    """Of the model's products: bf16 takes a fraction of the time where processors multiply it (AVX512-BF16, AMX, GPUs),
    and longer than fp32 where they do not. Weights, optimizers, tables and losses have precisions of their own."""
    dense_rows: int | None = Field(default=None, ge=1)
    """Rows of a rank that its model computes at once, by default all: for steps of `loader.batch_size` rows whose
    activations do not fit. They go through the model in parts of so many, and again in the backward pass, so that the
    activations of one part are all that is held, for up to a third more time. It stays one step: each row is looked up
    once, tables and model are updated once. The sums over rows are made in parts, so losses differ in the last digits.
    Not for models that look at a batch as a whole, as batch normalisation does."""
    communication: Communication = "fp32"
    """Of tables' vectors and gradients on their way between ranks: bf16 and fp16 (with gradients in bf16) are half the
    bytes, for networks that are slower than the ranks. Then losses depend a little on the number of ranks."""
    compile: bool = False
    """MLPs and experts become kernels of torch.compile, which takes a minute at the start and needs a C++ compiler. For
    GPUs: on CPUs these layers take 1.3 to 2.3 times as long. Losses differ in the last digits."""
    parallel: ParallelConfig = ParallelConfig()
    stages: tuple[StageConfig, ...] = Field(default=(StageConfig(),), min_length=1)
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    guard: GuardConfig = GuardConfig()
    watch: WatchConfig = WatchConfig()
    log_every: int = Field(default=20, ge=1)
    """Steps between two tracked values of the training loss."""

    @model_validator(mode="after")
    def _objectives_fit(self) -> Self:
        """The stages train what the model is for."""
        if not isinstance(self.model, BackboneConfig | TowersConfig):
            raise ValueError(f"model.kind {self.model.kind!r} is no model; choose one of msr_dist/models")
        kind, objectives = self.model.kind, [self.objective(index) for index in range(len(self.stages))]
        if not self.retrieves:
            wrong = [index for index, each in enumerate(objectives) if not isinstance(each, Labels)]
            if wrong:
                raise ValueError(
                    f"stages.{wrong[0]}.objective: {objectives[wrong[0]].kind!r} is for two towers, and model.kind "
                    f"{kind!r} predicts labels; leave it out, or choose model.kind 'sass' or 'two_tower'"
                )
            if self.evaluation.top_k != EvaluationConfig().top_k:
                raise ValueError(f"evaluation.top_k: model.kind {kind!r} retrieves nothing; leave it out")
            return self
        wrong = [index for index, each in enumerate(objectives) if isinstance(each, Labels)]
        if wrong:
            raise ValueError(
                f"stages.{wrong[0]}.objective: 'labels' is for models that predict labels, and model.kind {kind!r} "
                "retrieves; choose 'retrieval' or 'contrastive'"
            )
        if self.precision != "fp32":
            raise ValueError(f"precision: model.kind {kind!r} retrieves, which is done in fp32 alone; leave it out")
        if self.dense_rows is not None:
            raise ValueError(
                f"dense_rows: model.kind {kind!r} compares the rows of a batch with each other, so it is not computed "
                "in parts; leave it out"
            )
        if not isinstance(objectives[-1], Retrieval):
            raise ValueError("stages: the last objective has to be 'retrieval', on which the run is judged")
        return self

    @model_validator(mode="after")
    def _data_are_here(self) -> Self:
        """So that nobody finds out in the middle of a run."""
        if isinstance(self.data, Path) or not (self.retrieves or self.knowledge):
            return self
        reader = f"model.kind {self.model.kind!r}" if self.retrieves else "knowledge"
        raise ValueError(f"data: {reader} needs them in a folder of a file system; copy {self.data} to one")

    @property
    def data_here(self) -> Path:
        """The folder of data that are on this machine, as those of two towers and of runs with knowledge are."""
        assert isinstance(self.data, Path)
        return self.data

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.runs / self.name

    @property
    def retrieves(self) -> bool:
        """Whether the model is one of two towers."""
        return isinstance(self.model, TowersConfig)

    def objective(self, stage: int) -> Labels | Retrieval | Contrastive:
        """What the stage of that index minimises."""
        return self.stages[stage].objective or (Retrieval() if self.retrieves else Labels())

    def absolute(self) -> Self:
        """The same run with paths that hold in any working directory: a worker's is not the driver's."""
        changed: dict[str, Any] = {"runs": self.runs.absolute(), "data": self.data.absolute()}
        if self.knowledge is not None:
            changed["knowledge"] = self.knowledge.model_copy(update={"store": self.knowledge.store.absolute()})
        if self.parallel.plan is not None:
            changed["parallel"] = self.parallel.model_copy(update={"plan": self.parallel.plan.absolute()})
        return self.model_copy(update=changed)

    def read_schema(self, data: FeatureSchema | None = None) -> FeatureSchema:
        """The schema of the data with this run's tables; ValueError where the data, or what is known, do not fit.

        `data` is the schema of data that are not there.
        """
        assert isinstance(self.model, ModelConfig)
        if self.knowledge is None and self.model.reads_knowledge:
            raise ValueError(
                f"model: kind {self.model.kind!r} reads what a language model says of the users: make that with "
                "`msr-dist extract`, and name the folder with knowledge.store=STORE"
            )
        if self.knowledge is not None and not (self.model.reads_knowledge or self.model.takes_knowledge):
            wrapped = f"wrap the model with model.kind='llm4msr' and model.backbone.kind={self.model.kind!r}"
            other = "choose model.kind='sass'" if self.retrieves else wrapped
            raise ValueError(
                f"knowledge: kind {self.model.kind!r} does not read it: leave that section out, or {other}"
            )
        schema = self.embeddings.apply(data or FeatureSchema.read(self.data))
        for index in range(len(self.stages)):
            objective, known = self.objective(index), [label.name for label in schema.labels]
            if isinstance(objective, Retrieval) and objective.label not in (None, *known):
                raise ValueError(
                    f"stages.{index}.objective.label: there is no label {objective.label!r}; {self.data} has "
                    f"{', '.join(known)}"
                )
        if self.retrieves:
            schema.expect_listed((schema.user_table, schema.item_table), f"model.kind {self.model.kind!r}")
        if self.knowledge is not None:
            schema.expect_listed([schema.user_table], "knowledge")
            schema = self.knowledge.apply(schema, self.data_here)
        return self.model.adapt(schema)

    def epochs_before(self, stage: int) -> int:
        """Epochs of all stages before the one of that index."""
        return sum(each.epochs for each in self.stages[:stage])

    def check_tables(self, schema: FeatureSchema) -> None:
        """Raise ValueError where a layout is given for a table that the data do not have."""
        known = [table.name for table in schema.tables] + ([KNOWLEDGE_TABLE] if schema.knowledge else [])
        unknown = sorted(set(self.parallel.tables) - set(known))
        if unknown:
            raise ValueError(f"parallel.tables: no table {unknown[0]!r} in the data; it has {', '.join(known)}")

    def claim_folder(self) -> Self:
        """Create the run's folder; ValueError where it holds a run that has had other losses.

        Returns the run to train: what a language model says is in it by its digest, and may not change any more.
        A folder without a checkpoint has nothing to continue: another configuration moves it out of the way.
        """
        resolved = self
        if self.knowledge is not None:
            resolved = self.model_copy(update={"knowledge": self.knowledge.pinned()})
        if (self.folder / CONFIG_FILE).exists():
            before, now = _losses(load(RunConfig, self.folder / CONFIG_FILE)), _losses(resolved)
            changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
            if changed and any((self.folder / CHECKPOINTS).glob("stage-*")):
                key = changed[0]
                raise ValueError(
                    f"{self.folder} holds a run with {key} = {before.get(key)!r}, not {now.get(key)!r}: "
                    "choose another name=, or delete that folder"
                )
            if changed:
                self.folder.rename(self.folder.with_name(f"{self.name}.abandoned-{time.time_ns()}"))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / CONFIG_FILE, dump(resolved))
        return resolved

    @contextmanager
    def locked(self, world: World) -> Iterator[None]:
        """Keep the folder for this run, as long as rank 0 lives; ValueError where another process has it."""
        if world.rank:
            yield
            return
        taken = f"{self.folder} is being trained by another process: wait for it, or choose another name="
        with held(self.folder / LOCK_FILE, taken):
            yield

    def build(self, schema: FeatureSchema, index: int, world: World) -> Sharded:
        """The model of this run with objective and optimizers of a stage, its weights drawn from the seed."""
        stage = self.stages[index]
        recommender = self.recommender(schema, index)
        recommender.head.to(world.device)
        if self.compile:
            compile_layers(recommender.head, world.device)
        rows = -(-self.loader.batch_size // world.world_size)
        reserved = recommender.reserved_rows(schema)
        fixed = {table: UserVectors(schema, self.seed) for table in _fixed(schema)}
        layouts = self._layouts(recommender, world)
        return shard(
            recommender, layouts, stage.sparse, stage.dense, world, rows, self.seed, reserved, fixed, self.communication
        )

    def dry_plan(self, world_size: int) -> str:
        """The sharding plan for `world_size` ranks on machines like this one, without any data or process group."""
        world = World.imagined(world_size)
        rows = -(-self.loader.batch_size // world_size)
        schema = self.read_schema()
        recommender = self.recommender(schema, 0)
        layouts = self._layouts(recommender, world)
        return str(make_plan(recommender, layouts, self.stages[0].sparse, world, rows, _fixed(schema)))

    def estimate(
        self, schema: FeatureSchema, index: int, world: World, capacity: Capacity, lengths: Mapping[str, float]
    ) -> Estimate:
        """Where the tables go in a stage, on machines that need not be there; see `layout.estimate`."""
        recommender = self.recommender(schema, index)
        rows = -(-self.loader.batch_size // world.world_size)
        layouts, sparse = self._layouts(recommender, world), self.stages[index].sparse
        return estimate(recommender, layouts, sparse, world, rows, _fixed(schema), capacity, lengths)

    def recommender(self, schema: FeatureSchema, index: int) -> Recommender:
        """The model of a stage, its dense part drawn from the seed, its tables without memory."""
        torch.manual_seed(self.seed)
        assert isinstance(self.model, BackboneConfig | TowersConfig)
        objective = self.objective(index)
        given = None if isinstance(objective, Labels) else objective
        model = self.model.build(schema)
        whole = of_whole_batch(model)
        if self.dense_rows is not None and whole:
            raise ValueError(
                f"dense_rows: model.kind {self.model.kind!r} sees a batch as a whole ({', '.join(whole)}), so it is "
                "not computed in parts; leave it out, or choose another model"
            )
        return Recommender(schema, model, self.embeddings, given, self.precision, self.dense_rows)

    def _layouts(self, recommender: Recommender, world: World) -> ParallelConfig:
        """What tables may be like, by the names of their submodules."""
        file = self.parallel.plan
        parallel = self.parallel if file is None else read_plan(file, world.world_size)
        tables = {module_name(table): layout for table, layout in parallel.tables.items()}
        missing = sorted(set(module_tables(recommender)) - set(tables))
        if file is not None and missing:
            raise ValueError(f"{file}: says nothing of table {missing[0]!r}, which the model has")
        return parallel.model_copy(update={"tables": tables})


def say_untaught(schema: FeatureSchema, world: World) -> None:
    """Warn of scenarios that no training row belongs to, once for all ranks."""
    names = [scenario.name for scenario in schema.scenarios if not scenario.taught]
    if names and world.rank == 0:
        log.warning(
            "no training rows of scenario %s: predicted by what the other scenarios share", ", ".join(map(repr, names))
        )


def read_run(folder: Path) -> RunConfig:
    """The configuration of the run in `folder`, wherever that folder is now."""
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder}: no {CONFIG_FILE} there; give the folder of a run, such as runs/quickstart")
    run = load(RunConfig, folder / CONFIG_FILE)
    return run.model_copy(update={"runs": folder.absolute().parent, "name": folder.absolute().name})


def _fixed(schema: FeatureSchema) -> list[str]:
    """Tables that the run does not train."""
    return [KNOWLEDGE_TABLE] if schema.knowledge is not None and not schema.knowledge.trained else []


def _losses(run: RunConfig) -> dict[str, Any]:
    """What decides the losses, by dotted key."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, below in value.items():
                walk(f"{prefix}.{key}", below)
        else:
            flat[prefix] = value

    whole = run.absolute().model_dump(mode="json")
    keys = ("seed", "data", "loader", "embeddings", "knowledge", "model")
    for key in (*keys, "precision", "dense_rows", "communication", "compile"):
        walk(key, whole[key])
    for index, stage in enumerate(whole["stages"]):
        walk(f"stages.{index}", stage)
    for key in (
        "loader.threads",
        "loader.prefetch",
        "loader.memory_limit",
        "knowledge.model",
        "knowledge.pooling",
        "knowledge.cutoff",
    ):
        flat.pop(key, None)
    return flat
