"""Sharding on real process groups: launched ranks train a small model under different plans."""

import json

import pytest
import torch
from torchrec.distributed.types import CacheParams, ParameterSharding, ShardingPlan

import canonical
import launched
from msr_dist.distributed import World
from msr_dist.launch import launch
from msr_dist.layout import Capacity, ParallelConfig, TableSharding, is_cached, make_plan
from msr_dist.models.mlp import Config as Mlp
from msr_dist.optim import SparseOptimizer
from msr_dist.recommender import EmbeddingsConfig, FeatureOverride, Recommender

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return canonical.write(tmp_path_factory.mktemp("data"), rows=3000)


def losses(tmp_path, data, workers: int, layouts: tuple[str, str, str], **settings) -> list[float]:
    job = launched.Training(data=data, folder=tmp_path, layouts=layouts, **settings)
    launch(launched.train_steps, job, "local", workers, tmp_path)
    return json.loads((tmp_path / "losses.json").read_text())


WHOLE = ("table_wise", "table_wise", "table_wise")


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_the_plan_and_the_world_size_change_no_loss(tmp_path, data, optimizer):
    alone = losses(tmp_path, data, 1, WHOLE, optimizer=optimizer)
    # A table's layout must not decide what trains it: each layout meets each table once over the three plans.
    by_column = "table_row_wise" if optimizer == "rowwise_adagrad" else "column_wise"
    plans = {3: ("row_wise", by_column, "data_parallel"), 2: ("data_parallel", "row_wise", by_column)}
    for workers, layouts in plans.items():
        assert losses(tmp_path, data, workers, layouts, optimizer=optimizer) == pytest.approx(alone, rel=1e-6)
    untrained = losses(tmp_path, data, 1, WHOLE, optimizer=optimizer, scale=0.0)
    assert all(abs(a - b) > 1e-4 for a, b in zip(alone[10:], untrained[10:], strict=True))


@pytest.mark.parametrize(
    ("communication", "layouts", "settings"),
    [
        ("bf16", ("table_wise", "row_wise", "column_wise"), {"optimizer": "adagrad"}),
        ("fp16", ("row_wise", "table_wise", "table_row_wise"), {}),
        ("fp16", ("column_wise", "row_wise", "row_wise"), {"optimizer": "adagrad", "attention": True}),
    ],
)
def test_vectors_may_be_shorter_between_ranks(tmp_path, data, communication, layouts, settings):
    exact = losses(tmp_path, data, 2, layouts, last=15, **settings)
    rounded = losses(tmp_path, data, 2, layouts, last=15, communication=communication, **settings)
    assert rounded != pytest.approx(exact, rel=1e-7)
    assert rounded == pytest.approx(exact, rel=3e-3)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad"])
def test_a_checkpoint_continues_under_any_plan(tmp_path, data, optimizer):
    whole = losses(tmp_path, data, 1, WHOLE, optimizer=optimizer)
    by_column = "row_wise" if optimizer == "rowwise_adagrad" else "column_wise"
    losses(tmp_path, data, 2, ("row_wise", "data_parallel", by_column), optimizer=optimizer, last=12, save=True)
    for workers, layouts in {1: WHOLE, 3: ("data_parallel", by_column, "table_wise")}.items():
        resumed = losses(tmp_path, data, workers, layouts, optimizer=optimizer, first=12)
        assert resumed == pytest.approx(whole[12:], rel=1e-6)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad"])
def test_lists_that_attention_reads_change_nothing_of_that(tmp_path, data, optimizer):
    alone = losses(tmp_path, data, 1, WHOLE, optimizer=optimizer, attention=True)
    assert alone[10:] != pytest.approx(losses(tmp_path, data, 1, WHOLE, optimizer=optimizer)[10:], rel=1e-5)
    by_column = "row_wise" if optimizer == "rowwise_adagrad" else "column_wise"
    plans = {3: ("table_wise", by_column, "row_wise"), 2: ("data_parallel", "row_wise", "table_wise")}
    for workers, layouts in plans.items():
        spread = losses(tmp_path, data, workers, layouts, optimizer=optimizer, attention=True)
        assert spread == pytest.approx(alone, rel=1e-6)
    losses(
        tmp_path, data, 2, ("row_wise", by_column, "row_wise"), optimizer=optimizer, attention=True, last=12, save=True
    )
    for workers, layouts in {1: WHOLE, 2: ("row_wise", "table_wise", "data_parallel")}.items():
        resumed = losses(tmp_path, data, workers, layouts, optimizer=optimizer, attention=True, first=12)
        assert resumed == pytest.approx(alone[12:], rel=1e-6)


def test_vectors_of_a_scenarios_own(tmp_path, data):
    alone = losses(tmp_path, data, 1, WHOLE, per_scenario=True)
    assert alone[10:] != pytest.approx(losses(tmp_path, data, 1, WHOLE)[10:], rel=1e-3)
    spread = losses(tmp_path, data, 2, ("row_wise", "row_wise", "table_wise"), per_scenario=True)
    assert spread == pytest.approx(alone, rel=1e-6)


def test_half_precision_tables_train_and_continue(tmp_path, data):
    whole = losses(tmp_path, data, 1, WHOLE, precision="fp16")
    assert whole != losses(tmp_path, data, 1, WHOLE)
    losses(tmp_path, data, 2, ("row_wise", "table_wise", "row_wise"), precision="fp16", last=12, save=True)
    resumed = losses(tmp_path, data, 1, WHOLE, precision="fp16", first=12)
    assert resumed == pytest.approx(whole[12:], rel=1e-3)


def test_the_learning_rate_really_moves(tmp_path, data):
    constant = losses(tmp_path, data, 1, WHOLE)
    falling = losses(tmp_path, data, 1, WHOLE, decay="linear")
    assert falling[0] == constant[0]
    assert falling != constant
    still = losses(tmp_path, data, 1, WHOLE, scale=0.0)
    weights = json.loads((tmp_path / "weights.json").read_text())
    losses(tmp_path, data, 1, WHOLE, scale=0.0, last=1)
    assert json.loads((tmp_path / "weights.json").read_text()) == weights
    assert still[0] == constant[0]


LAYOUTS = ("table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel")


@pytest.fixture(scope="module")
def lookups(tmp_path_factory, data) -> dict[int, list[list[dict]]]:
    """World size -> run -> rank -> what it saw: a fixed table in every layout, a trained one, and a resumed run."""
    folder = tmp_path_factory.mktemp("lookups")
    fixed, trained = [launched.Lookup(layout) for layout in LAYOUTS], launched.Lookup("row_wise", trained=True)
    runs = {
        1: (launched.Lookup("table_wise"), launched.Lookup("table_wise", trained=True)),
        2: (*fixed, trained, launched.Lookup("column_wise", last=6, save=True)),
        3: (*fixed, trained, launched.Lookup("row_wise", first=6), launched.Lookup("data_parallel", first=6)),
    }
    found = {}
    for workers, chosen in runs.items():
        launch(launched.train_lookups, launched.Lookups(data, folder, chosen), "local", workers, folder)
        files = [folder / f"lookups-{workers}-{rank}.json" for rank in range(workers)]
        found[workers] = list(zip(*(json.loads(file.read_text()) for file in files), strict=True))
    return found


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fixed_table_is_the_same_under_any_layout_and_stays_as_it_was_given(lookups, workers, layout):
    ((alone,), _) = lookups[1]
    for rank in lookups[workers][LAYOUTS.index(layout)]:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        assert rank["kept"]
        assert rank["tensors"] == ["model/knowledge.embedding_bags.knowledge.weight"]


def test_a_rank_asks_for_the_values_of_its_own_rows_alone(lookups):
    row_wise, replicated = LAYOUTS.index("row_wise"), LAYOUTS.index("data_parallel")
    assert [rank["asked"] for rank in lookups[2][row_wise]] == [[[0, 30]], [[30, 30]]]
    assert [rank["asked"] for rank in lookups[3][row_wise]] == [[[0, 20]], [[20, 20]], [[40, 20]]]
    assert [rank["asked"] for rank in lookups[2][replicated]] == [[[0, 60]], [[0, 60]]]
    assert sorted(rank["asked"] for rank in lookups[2][0]) == [[], [[0, 60]]]


def test_a_checkpoint_with_a_fixed_table_continues_under_any_plan(lookups):
    ((alone,), _) = lookups[1]
    for run in lookups[3][-2:]:
        for rank in run:
            assert rank["losses"] == pytest.approx(alone["losses"][6:], rel=1e-6)
            assert rank["kept"]


def test_a_trained_table_in_the_place_of_a_fixed_one(lookups):
    ((fixed,), (alone,)) = lookups[1]
    assert alone["losses"][6:] != pytest.approx(fixed["losses"][6:], rel=1e-4)
    for rank in (*lookups[2][len(LAYOUTS)], *lookups[3][len(LAYOUTS)]):
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        assert not rank["kept"]
        assert rank["asked"] == []
        assert rank["tensors"] == [
            "model/knowledge.embedding_bags.knowledge.weight",
            "optimizer/knowledge.embedding_bags.knowledge.weight/momentum1",
        ]


def plan(config: ParallelConfig, optimizer="rowwise_adagrad", world_size=2, rows=None):
    schema = canonical.schema()
    if rows:
        tables = {"users": schema.table("users").model_copy(update={"rows": rows})}
        schema = schema.with_tables(tables)
    model = Recommender(schema, Mlp(kind="mlp").build(schema), EmbeddingsConfig())
    world = World(0, world_size, 0, world_size, CPU)
    return make_plan(model, config, SparseOptimizer(kind=optimizer), world, batch_size=64)


def test_a_plan_keeps_to_what_is_allowed():
    text = str(plan(ParallelConfig(sharding=("row_wise",), tables={"tags": TableSharding(sharding=("table_wise",))})))
    kinds = {line.split("|")[0].strip(): line.split("|")[1].strip() for line in text.splitlines() if "wise" in line}
    assert kinds == {"users": "row_wise", "items_": "row_wise", "tags": "table_wise"}


@pytest.mark.parametrize(
    ("config", "optimizer", "says"),
    [
        (
            {"tables": {"zzz": {"sharding": ("row_wise",)}}},
            "sgd",
            "no table 'zzz' in the model; it has users",
        ),
        ({"sharding": ("column_wise",)}, "rowwise_adagrad", "column_wise does not go with rowwise_adagrad"),
        ({}, "adam", "no fused Adam for CPU; choose rowwise_adagrad, adagrad or sgd"),
    ],
)
def test_layouts_that_would_change_the_optimizer(config, optimizer, says):
    with pytest.raises(ValueError, match=says):
        plan(ParallelConfig(**config), optimizer)


@pytest.mark.parametrize("layout", ["table_row_wise", "data_parallel"])
def test_layouts_that_lists_of_attention_cannot_have(layout):
    embeddings = EmbeddingsConfig(features={"history": FeatureOverride(pooling="attention")})
    schema = embeddings.apply(canonical.schema())
    model = Recommender(schema, Mlp().build(schema), embeddings)
    layouts = ParallelConfig(tables={"items_": TableSharding(sharding=(layout,))})
    with pytest.raises(ValueError, match=f"table 'items_' has a list that attention reads: .*{layout}"):
        make_plan(model, layouts, SparseOptimizer(), World(0, 2, 0, 2, CPU), batch_size=64)


def gpu_tables(config: ParallelConfig, gpu: int, precision: str = "fp32") -> dict[str, ParameterSharding]:
    """The plan for one GPU with so much memory for tables; none is here, and tables are on the meta device."""
    embeddings = EmbeddingsConfig(precision=precision)
    schema = embeddings.apply(canonical.schema())
    model = Recommender(schema, Mlp().build(schema), embeddings)
    world = World(0, 1, 0, 1, torch.device("cuda"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Capacity, "here", lambda _world: Capacity(1 << 30, gpu))
        plan = make_plan(model, config, SparseOptimizer(), world, batch_size=4)
    return dict(plan.plan["embeddings"])


def test_kernels_of_gpu_tables():
    config = ParallelConfig(tables={"users": TableSharding(cache=0.25)})
    found = gpu_tables(config, 1 << 30, "fp16")
    assert found["users"].compute_kernel == "fused_uvm_caching"
    assert found["users"].cache_params == CacheParams(load_factor=0.25, prefetch_pipeline=True)
    assert found["tags"].compute_kernel == "fused"
    assert found["tags"].cache_params is None
    assert all(table.stochastic_rounding for table in found.values())
    assert is_cached(ShardingPlan({"embeddings": found}))
    found = gpu_tables(ParallelConfig(cache=0.25), 1 << 30)
    assert {table.compute_kernel for table in found.values()} == {"fused"}
    assert not any(table.stochastic_rounding for table in found.values())
    assert not is_cached(ShardingPlan({"embeddings": found}))


def test_a_replicated_table_has_no_cache():
    config = ParallelConfig(tables={"users": TableSharding(sharding=("data_parallel",), cache=0.25)})
    with pytest.raises(ValueError, match=r"tables.users: a data_parallel table stands in GPU memory"):
        gpu_tables(config, 1 << 30)


def test_tables_that_do_not_fit():
    with pytest.raises(ValueError, match=r"no layout fits: .* GiB of tables, without"):
        plan(ParallelConfig(), rows=10**13)
