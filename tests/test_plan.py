"""Plans for machines that are not there, held against what real ranks hold."""

import json
import logging
from dataclasses import replace

import psutil
import pytest
import tomli_w

import canonical
import command
import planned
import vocabularies
from msr_dist.cli import main
from msr_dist.config import load, parse
from msr_dist.launch import launch
from msr_dist.plan import Machines, Planner, read_schema, size_text
from msr_dist.run import RunConfig

GIB = 1 << 30
CPUS = Machines("cpu", 2, GIB * 4)
GPUS = Machines("cuda", 64, 0, 141 * GIB)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return canonical.write(tmp_path_factory.mktemp("data"), rows=300)


def run_config(tmp_path, data, **changes) -> RunConfig:
    return load(RunConfig, command.write_config(tmp_path, data, **changes)).absolute()


def planner(run: RunConfig, rows: tuple[str, ...] = ()) -> Planner:
    return Planner(run, read_schema(run, None, rows), list_length=2)


def held(tmp_path, run: RunConfig, workers: int) -> list[dict]:
    """Per rank, the bytes of tables and of their optimizer state that it has."""
    launch(planned.build_model, planned.Building(run, tmp_path), "local", workers, tmp_path)
    return [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(workers)]


def foreseen(plan, part: str, rank: int) -> dict[str, int]:
    """Bytes of a part on a rank, by table."""
    found: dict[str, int] = {}
    for table in plan.estimate.tables:
        for shard in table.shards:
            if shard.rank == rank:
                found[table.name] = found.get(table.name, 0) + getattr(shard, part)
    return {name: size for name, size in found.items() if size}


@pytest.mark.parametrize(
    ("workers", "precision", "optimizer", "layouts"),
    [
        (1, "fp16", "rowwise_adagrad", {}),
        (2, "fp16", "rowwise_adagrad", {"users": "row_wise", "items": "table_wise", "tags": "row_wise"}),
        (2, "fp32", "adagrad", {"users": "column_wise", "items": "row_wise", "tags": "table_wise"}),
        (2, "fp16", "sgd", {"users": "row_wise", "items": "table_row_wise", "tags": "table_wise"}),
    ],
)
def test_ranks_hold_to_the_byte_what_was_planned(tmp_path, data, workers, precision, optimizer, layouts):
    run = run_config(
        tmp_path,
        data,
        embeddings={"precision": precision},
        stages=[{"sparse": {"kind": optimizer}}],
        parallel={"tables": {name: {"sharding": [layout]} for name, layout in layouts.items()}},
    )
    plan = planner(run).plan(replace(CPUS, ranks=workers))
    for rank, real in enumerate(held(tmp_path, run, workers)):
        for part in ("weights", "state"):
            assert foreseen(plan, part, rank) == {name: size for name, size in real[part].items() if size}


def test_gradients_of_a_replicated_table_are_foreseen(tmp_path, data):
    run = run_config(tmp_path, data, parallel={"tables": {"users": {"sharding": ["data_parallel"]}}})
    weights = canonical.USERS * 8 * 4
    users = next(table for table in planner(run).plan(CPUS).estimate.tables if table.name == "users")
    assert [(shard.rank, shard.weights, shard.state) for shard in users.shards] == [
        (rank, weights, weights + canonical.USERS * 4) for rank in range(2)
    ]


def test_a_plan_that_was_saved_and_edited_is_what_ranks_get(tmp_path, data):
    run = run_config(tmp_path, data)
    file = tmp_path / "plan.toml"
    planner(run).plan(CPUS).write(file)
    raw = parse_toml(file)
    assert raw["world_size"] == 2
    assert set(raw["tables"]) == {"users", "items", "tags"}
    whole = {"users": 1, "items": 0, "tags": 1}
    raw["tables"] = {name: {"sharding": ["table_wise"], "ranks": [rank]} for name, rank in whole.items()}
    file.write_text(tomli_w.dumps(raw))
    edited = run_config(tmp_path, data, parallel={"plan": str(file)})
    again = planner(edited).plan(CPUS)
    assert {table.name: [shard.rank for shard in table.shards] for table in again.estimate.tables} == {
        "users": [1],
        "items_": [0],
        "tags": [1],
    }
    for rank, real in enumerate(held(tmp_path, edited, 2)):
        assert {name for name, size in real["weights"].items() if size} == {
            {"items": "items_"}.get(name, name) for name, place in whole.items() if place == rank
        }


def parse_toml(file):
    import tomllib

    return tomllib.loads(file.read_text())


def test_a_plan_survives_being_written_and_read(tmp_path, data):
    stages = [{"sparse": {"kind": "adagrad"}}]
    run = run_config(tmp_path, data, stages=stages, embeddings={"width": 24}, parallel={"sharding": ["column_wise"]})
    machines = replace(CPUS, ranks=3)
    first = planner(run).plan(machines)
    assert [shard.weights for shard in first.estimate.tables[1].shards] == [canonical.TAGS * 4 * n for n in (8, 8, 8)]
    file = tmp_path / "plan.toml"
    first.write(file)
    again = planner(run_config(tmp_path, data, stages=stages, embeddings={"width": 24}, parallel={"plan": str(file)}))
    assert again.plan(machines).estimate == first.estimate


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"zzz": {"sharding": ["table_wise"], "ranks": [0]}}, "no table 'zzz' in the model"),
        ({"tags": None}, "plan.toml: says nothing of table 'tags'"),
        ({"users": {"sharding": ["table_wise"], "ranks": [2]}}, "table 'users': .* there is no rank 2"),
        ({"users": {"sharding": ["table_wise"], "ranks": [0, 1]}}, "table 'users': .* is on one rank"),
        ({"users": {"sharding": ["row_wise"], "ranks": [0]}}, "table 'users': .* on all 2 ranks"),
        ({"users": {"sharding": ["table_row_wise"], "ranks": [1]}}, "table 'users': .* ranks of one machine"),
        ({"users": {"sharding": ["column_wise"], "ranks": [0, 1]}}, "table 'users': column_wise does not go with"),
        ({"users": {"sharding": ["row_wise"]}}, "tables.users: a plan says the ranks of every table"),
        ({"users": {"ranks": [0]}}, "tables.users: ranks need one layout"),
        (
            {"users": {"sharding": ["table_wise"], "ranks": [0], "cache": 0.1}},
            "users.cache: tables stand in main memory",
        ),
    ],
)
def test_plans_that_do_not_fit_the_run(tmp_path, data, tables, says):
    whole = {name: {"sharding": ["table_wise"], "ranks": [0]} for name in ("users", "items", "tags")}
    tables = {name: table for name, table in (whole | tables).items() if table}
    (tmp_path / "plan.toml").write_text(tomli_w.dumps({"world_size": 2, "tables": tables}))
    run = run_config(tmp_path, data, parallel={"plan": str(tmp_path / "plan.toml")})
    with pytest.raises(ValueError, match=says):
        planner(run).plan(CPUS)


def test_parts_of_columns_are_multiples_of_4(tmp_path, data):
    users = {"sharding": ["column_wise"], "ranks": [0, 1, 0]}
    run = run_config(tmp_path, data, stages=[{"sparse": {"kind": "adagrad"}}], parallel={"tables": {"users": users}})
    with pytest.raises(ValueError, match=r"table 'users': .* 8 columns cannot be cut into 3 equal parts"):
        planner(run).plan(CPUS)


def test_a_plan_for_another_world(tmp_path, data):
    planner(run_config(tmp_path, data)).plan(CPUS).write(tmp_path / "plan.toml")
    run = run_config(tmp_path, data, parallel={"plan": str(tmp_path / "plan.toml")})
    with pytest.raises(ValueError, match=r"plan.toml: a plan for 2 ranks, and this run has 3"):
        planner(run).plan(replace(CPUS, ranks=3))
    with pytest.raises(ValueError, match="plan says where tables go: leave out sharding"):
        run_config(tmp_path, data, parallel={"plan": "plan.toml", "sharding": ["row_wise"]})


def test_billions_of_rows_on_many_gpus_need_no_memory_here(tmp_path, data):
    run = run_config(tmp_path, data, embeddings={"width": 64}, loader={"partitions": 192, "batch_size": 65536})
    before = psutil.Process().memory_info().rss
    known = planner(run, ("users=8_000_000_000", "items=2_000_000_000"))
    plan = known.plan(GPUS)
    assert plan.fits
    rank = plan.rank_bytes(plan.fullest)
    assert rank["tables"] == pytest.approx(10e9 * 64 * 4 / 64, rel=0.01)
    assert rank["optimizer state of tables"] == pytest.approx(10e9 * 4 / 64, rel=0.01)
    assert plan.estimate.milliseconds > 0
    fewest = known.fewest(plan)
    assert fewest is not None
    # 2,600 GB on GPUs of which 128.7 GB are usable; 21 and 22 would be enough, but do not divide 192 into machines.
    assert fewest.machines.ranks == 24
    assert psutil.Process().memory_info().rss - before < GIB
    less = known.plan(replace(GPUS, ranks=16))
    assert not less.fits
    assert less.rank_bytes(0)["tables"] == pytest.approx(10e9 * 64 * 4 / 16, rel=0.01)


def test_ranks_that_are_given_are_no_plan_for_fewer(tmp_path, data):
    users = {"sharding": ["row_wise"], "ranks": [0, 1]}
    known = planner(run_config(tmp_path, data, parallel={"tables": {"users": users}}))
    plan = known.plan(CPUS)
    assert plan.fits
    assert known.fewest(plan).machines.ranks == 2


def test_ranks_that_cannot_be(tmp_path, data):
    run = run_config(tmp_path, data, loader={"partitions": 48})
    with pytest.raises(ValueError, match=r"5 ranks do not divide loader.partitions = 48: .* loader.partitions=240"):
        planner(run).plan(replace(CPUS, ranks=5))
    with pytest.raises(ValueError, match="12 GPUs do not make machines of 8: give another --per-machine"):
        planner(run).plan(replace(GPUS, ranks=12))


def layouts(plan) -> dict[str, float | None]:
    return {table.name: table.cache for table in plan.estimate.tables}


def test_gpu_tables_go_to_main_memory_where_asked_or_where_they_must(tmp_path, data):
    """Planned for CUDA on the meta device; no GPU is here."""
    rows, one = ("users=100_000_000",), Machines("cuda", 1, 16 * GIB, 2 * GIB)
    asked = run_config(tmp_path, data, parallel={"tables": {"items": {"cache": 0.1}}})
    assert layouts(planner(asked).plan(one)) == {"users": None, "items_": 0.1, "tags": None}
    # 3.2 GB, and 0.4 GB of state.
    alone = planner(run_config(tmp_path, data), rows).plan(one)
    assert not alone.fits
    must = planner(run_config(tmp_path, data, parallel={"cache": 0.2}), rows).plan(one)
    assert must.fits
    assert layouts(must) == {"users": 0.2, "items_": None, "tags": None}
    users = 100_000_000 * (8 * 4 + 4)
    others = sum(must.rank_bytes(0)[part] for part in ("tables", "optimizer state of tables"))
    dense = sum(must.rank_bytes(0)[part] for part in ("dense parameters", "dense optimizer"))
    assert must.main_bytes(0) == 2 * users + others + dense
    stopping = run_config(tmp_path, data, parallel={"cache": 0.2}, checkpoint={"background": False})
    assert planner(stopping, rows).plan(one).main_bytes(0) == users
    assert 0.2 * 3.2e9 < must.rank_bytes(0)["buffers"] < 2 * GIB
    small = planner(run_config(tmp_path, data, parallel={"cache": 0.2}), rows).plan(replace(one, memory=GIB))
    assert not small.fits
    # 3.6 GB of cached tables and their state, and as much again to write checkpoints from.
    full = planner(run_config(tmp_path, data, parallel={"cache": 0.2}), rows).plan(replace(one, memory=6 * GIB))
    assert full.fits
    assert full.main_bytes(0) == users
    assert must.copied
    assert not full.copied


def test_on_cpu_a_copy_for_checkpoints_is_foreseen_where_there_is_room(tmp_path, data):
    rows = ("users=20_000_000",)
    alone = planner(run_config(tmp_path, data), rows).plan(CPUS)
    copying = planner(run_config(tmp_path, data, checkpoint={"background": True}), rows).plan(CPUS)
    assert "copy for checkpoints" not in alone.rank_bytes(0)
    found = copying.rank_bytes(0)
    assert found["copy for checkpoints"] == sum(
        found[part] for part in ("tables", "optimizer state of tables", "dense parameters", "dense optimizer")
    )
    # Room for 0.72 GB of a table and its state, and for half as much again.
    tight = planner(run_config(tmp_path, data, checkpoint={"background": True}), rows).plan(
        Machines("cpu", 1, alone.shared.total + 1_080_000_000)
    )
    assert tight.fits
    assert "copy for checkpoints" not in tight.rank_bytes(0)
    small = planner(run_config(tmp_path, data, checkpoint={"background": True}), rows).plan(
        Machines("cpu", 1, alone.shared.total + 700_000_000)
    )
    assert not small.fits


def test_cached_tables_need_main_memory(tmp_path, data):
    with pytest.raises(ValueError, match="cached tables stand in main memory: give that of a rank, --memory"):
        planner(run_config(tmp_path, data, parallel={"cache": 0.2})).plan(Machines("cuda", 1, 0, GIB))


@pytest.mark.parametrize("parallel", [{"cache": 0.2}, {"tables": {"users": {"cache": 0.2}}}])
def test_nothing_is_cached_on_cpu(tmp_path, data, parallel):
    with pytest.raises(ValueError, match="tables stand in main memory on CPU, where nothing is cached"):
        planner(run_config(tmp_path, data, parallel=parallel)).plan(CPUS)


def test_what_an_open_vocabulary_knows_of_ids_is_foreseen(tmp_path):
    vocabularies.schema(rows=6400).save(tmp_path)
    plan = planner(run_config(tmp_path, tmp_path)).plan(CPUS)
    users = next(table for table in plan.estimate.tables if table.name == "users")
    # An id, two counts or steps, four counters, and the optimizer's number.
    assert [shard.state for shard in users.shards] == [3200 * (8 + 2 * 4 + 4 * 4 + 4)] * 2
    assert plan.rank_bytes(0)["activations"] > 0


def test_lists_enter_buffers_and_data(tmp_path, data):
    run = run_config(tmp_path, data)
    schema = read_schema(run, None, ())
    short, long = (Planner(run, schema, length).plan(CPUS) for length in (1, 50))
    assert long.rank_bytes(0)["buffers"] > short.rank_bytes(0)["buffers"]
    assert long.rank_bytes(0)["data"] > short.rank_bytes(0)["data"]


def test_what_is_kept_for_the_backward_pass_grows_with_the_model(tmp_path, data):
    sizes = []
    for width in (16, 1024):
        run = run_config(tmp_path, data, model={"kind": "mlp", "widths": [width]})
        part = planner(run).plan(CPUS).rank_bytes(0)
        sizes.append((part["activations"], part["dense parameters"]))
        assert part["dense optimizer"] == 2 * part["dense parameters"]
    # 60 rows of a rank, 1,008 more units of 4 bytes, kept at least once.
    assert sizes[1][0] - sizes[0][0] >= 60 * 1008 * 4
    assert sizes[1][1] > sizes[0][1]


def test_activations_of_parts_are_foreseen(tmp_path, data):
    model = {"kind": "mlp", "widths": [256, 256]}

    def known(**changes) -> Planner:
        run = run_config(tmp_path, data, model=model, loader={"batch_size": 3840, "partitions": 6}, **changes)
        return planner(run)

    def activations(**changes) -> int:
        return known(**changes).plan(CPUS).rank_bytes(0)["activations"]

    whole, parts = activations(), activations(dense_rows=96)
    # 1,920 rows of a rank; 192 and 384 were measured.
    assert parts == pytest.approx(known()._peak(1920, 96)[1], rel=0.02)
    assert parts < whole / 4
    assert activations(dense_rows=1920) == whole


def test_the_command(tmp_path, data, capsys):
    config, file = command.write_config(tmp_path, tmp_path / "nowhere"), tmp_path / "plan.toml"
    words = ["plan", str(config), "--schema", str(data / "schema.toml"), "--cpus", "2", "--out", str(file)]
    with pytest.raises(SystemExit) as end:
        main([*words, "--memory", "24GiB", "--rows", "users=1_000_000"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert "1,000,000" in said
    assert "fits     yes" in said
    assert "fewest   1 " in said
    assert parse_toml(file)["tables"]["users"]["sharding"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--memory", "600MiB", "--rows", "users=1_000_000_000"])
    assert end.value.code == 1
    assert "fits     NO" in capsys.readouterr().out


def test_the_command_says_where_there_is_no_room_for_a_copy(tmp_path, data, capsys):
    config = command.write_config(tmp_path, data, checkpoint={"background": True})
    waits = "training waits while checkpoints are written"
    # Beside what a process takes, 0.72 GB of a table and its state, and half of that or twice as much.
    process = psutil.Process().memory_info().rss
    for memory, said in ((f"{process + 2_160_000_000 >> 20}MiB", False), (f"{process + 1_080_000_000 >> 20}MiB", True)):
        with pytest.raises(SystemExit) as end:
            main(["plan", str(config), "--cpus", "1", "--memory", memory, "--rows", "users=20_000_000"])
        out = capsys.readouterr().out
        assert end.value.code == 0, out
        assert (waits in out) == said, out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus", "2", "--hbm", "141"], "'141' is no size: give a number and a unit"),
        (["--gpus", "2", "--hbm", "many"], "'many' is no size"),
        (["--gpus", "2"], "give the memory of one as well, such as --hbm 80GiB"),
        (["--cpus", "2"], "such as --memory 24GiB"),
        ([], "give either --gpus"),
        (["--gpus", "2", "--cpus", "2"], "give either --gpus"),
        (["--cpus", "2", "--memory", "1GiB", "--rows", "zzz=3"], "expected TABLE=ROWS with one of the tables users"),
        (["--cpus", "2", "--memory", "1GiB", "--rows", "users=many"], "'many' is no number of rows"),
        (["--cpus", "2", "--memory", "1GiB", "--schema", "zzz.toml"], "zzz.toml: no such file"),
    ],
)
def test_wrong_calls(tmp_path, data, capsys, words, says):
    with pytest.raises(SystemExit) as end:
        main(["plan", str(command.write_config(tmp_path, data)), *words])
    assert end.value.code == 2
    assert says in capsys.readouterr().err


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "msr-dist plan run.toml --gpus 64 --hbm 141GiB" in capsys.readouterr().out


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1023 B"), (3 << 29, "1.50 GiB"), (5 << 40, "5.00 TiB")])
def test_sizes_as_people_read_them(size, text):
    assert size_text(size) == text


def test_two_towers_are_planned_too(data):
    raw = {
        "name": "x",
        "data": str(data),
        "model": {"kind": "two_tower"},
        "loader": {"batch_size": 120, "partitions": 6},
    }
    run = parse(RunConfig, raw, "here")
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    assert planner(run).plan(CPUS).rank_bytes(0)["activations"] > 0
