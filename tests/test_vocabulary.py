"""Vocabularies that fill themselves: against a plain Python one, over ranks, and what they refuse."""

import json
from dataclasses import replace

import pytest
import torch
from torchrec.sparse.jagged_tensor import JaggedTensor

import canonical
import command
import vocabularies
from msr_dist.config import load
from msr_dist.data.parquet import ParquetSource
from msr_dist.distributed import World
from msr_dist.extract import ExtractConfig, check
from msr_dist.launch import launch
from msr_dist.layout import ParallelConfig, TableSharding, make_plan
from msr_dist.models.mlp import Config as Mlp
from msr_dist.optim import SparseOptimizer
from msr_dist.recommender import EmbeddingsConfig, FeatureOverride, Recommender, TableOverride
from msr_dist.run import RunConfig
from msr_dist.schema import OPEN_IDS, FeatureSchema
from msr_dist.vocabulary import ABSENT, WAYS, Hashing, Vocabulary, VocabularyConfig

CPU = torch.device("cpu")
ROWS = 8 * WAYS


def remapped(rows: Vocabulary | Hashing, ids: torch.Tensor) -> torch.Tensor:
    return rows.remap({"table": JaggedTensor(values=ids, lengths=torch.ones_like(ids))})["table"].values()


def vocabulary(**settings) -> Vocabulary:
    return Vocabulary(VocabularyConfig(**settings), OPEN_IDS, ROWS, 0, ROWS, CPU)


def stream(steps: int, size: int = 400, seed: int = 0) -> list[torch.Tensor]:
    """Ids whose frequencies fall, from a window that moves: old ones die, new ones come."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for step in range(steps):
        rank = (torch.rand(size, generator=generator) ** 3 * 600).long() + 1 + step * 4
        found.append(torch.tensor([vocabularies.hashed(each) for each in rank.tolist()]))
    return found


class Plain:
    """The same rules with dicts, one id at a time."""

    def __init__(self, min_count: int, half_life: int) -> None:
        self.min_count, self.half_life = min_count, half_life
        self.step = self.lookups = self.hits = self.admitted = self.evicted = 0
        self.sets = [dict[int, dict[str, int]]() for _ in range(ROWS // WAYS)]
        self.counters = [[0] * 4 * WAYS for _ in self.sets]

    def look_up(self, ids: list[int]) -> list[int]:
        block = -(-OPEN_IDS // len(self.sets))
        times = {each: ids.count(each) for each in sorted(set(ids))}
        self._learn(times, block)
        return [each // block * WAYS + self.sets[each // block].get(each, {"way": 0})["way"] for each in ids]

    def _learn(self, times: dict[int, int], block: int) -> None:
        self.step += 1
        if self.step % self.half_life == 0:
            for held in self.sets:
                for entry in held.values():
                    entry["count"] //= 2
            self.counters = [[count // 2 for count in line] for line in self.counters]
        asking: list[tuple[int, int, int]] = []
        for each, n in times.items():
            entry = self.sets[each // block].get(each)
            if each != ABSENT:
                self.lookups += n
                self.hits += n if entry else 0
            if entry:
                entry |= {"count": entry["count"] + n, "last": self.step}
            elif each != ABSENT:
                for place in self._places(each):
                    self.counters[each // block][place] += n
        for each in times:
            if each != ABSENT and each not in self.sets[each // block]:
                count = min(self.counters[each // block][place] for place in self._places(each))
                if count >= self.min_count:
                    asking.append((each // block, -count, each))
        for which, minus, each in sorted(asking):
            held = self.sets[which]
            ways = {entry["way"] for entry in held.values()}
            free = [way for way in range(1, WAYS) if way not in ways]
            if free:
                way = free[0]
            else:
                old = {id_: entry for id_, entry in held.items() if entry["last"] != self.step}
                if not old:
                    continue
                goes = min(old, key=lambda id_: (old[id_]["count"], old[id_]["last"], old[id_]["way"]))
                if old[goes]["count"] >= -minus:
                    continue
                way = held.pop(goes)["way"]
                self.evicted += 1
            held[each] = {"way": way, "count": -minus, "last": self.step}
            self.admitted += 1

    def _places(self, each: int) -> list[int]:
        factors = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9)
        return [(each * factor % (1 << 64) >> 48) % (4 * WAYS) for factor in factors]


@pytest.mark.parametrize(("min_count", "half_life"), [(1, 10_000), (2, 25), (5, 7)])
def test_it_does_what_plain_dicts_do(min_count, half_life):
    rows, plain = vocabulary(min_count=min_count, half_life=half_life), Plain(min_count, half_life)
    for ids in stream(60):
        # Twice in places: an absent id, and one that is seen again at once.
        ids = torch.cat([ids, ids[:5], torch.tensor([ABSENT] * 3)])
        assert remapped(rows, ids).tolist() == plain.look_up(ids.tolist())
    capacity, lent, steps, lookups, hits, admitted, evicted = rows.take_tally().tolist()
    assert (capacity, lent, steps) == (ROWS - ROWS // WAYS, sum(map(len, plain.sets)), 60)
    assert (lookups, hits, admitted, evicted) == (plain.lookups, plain.hits, plain.admitted, plain.evicted)
    assert min(hits, evicted) > 0


def test_an_id_gets_a_row_when_it_has_been_seen_often_enough():
    rows, one = vocabulary(min_count=3), torch.tensor([vocabularies.hashed(1)])
    assert remapped(rows, one) % WAYS == 0
    assert remapped(rows, one) % WAYS == 0
    own = remapped(rows, one)
    assert own % WAYS != 0
    assert remapped(rows, one) == own
    # Several times in one step count as well.
    assert (remapped(rows, torch.tensor([vocabularies.hashed(2)] * 3)) % WAYS != 0).all()


def test_evaluation_changes_nothing():
    rows = vocabulary(min_count=1)
    for ids in stream(5):
        remapped(rows, ids)
        assert rows.evict() is not None
    before = {name: tensor.clone() for name, tensor in rows.state_dict().items()}
    rows.eval()
    for ids in stream(5, seed=1):
        looked_up = remapped(rows, ids)
    assert all(torch.equal(before[name], tensor) for name, tensor in rows.state_dict().items())
    assert rows.evict() is None
    assert set(before) == {"ids", "counts", "last", "sketch", "_current_iter_tensor"}
    # Ids that it has not seen share the row of their set.
    assert 0 < (looked_up % WAYS == 0).sum() < len(looked_up)


def test_what_is_no_longer_frequent_makes_room():
    rows = vocabulary(min_count=1, half_life=5)
    old, new = ([torch.tensor([vocabularies.hashed(base + i) for i in range(600)])] * 8 for base in (1, 10_001))
    for ids in old:
        remapped(rows, ids.repeat(4))
    assert (remapped(rows.eval(), old[0]) % WAYS != 0).float().mean() > 0.35
    rows.train()
    for ids in new * 4:
        remapped(rows, ids)
    assert (remapped(rows.eval(), old[0]) % WAYS != 0).float().mean() == 0
    assert (remapped(rows, new[0]) % WAYS != 0).float().mean() > 0.35


def test_plain_hashing_uses_all_rows_evenly():
    rows = Hashing(VocabularyConfig(collisions="shared"), OPEN_IDS, ROWS, 0, ROWS, CPU)
    ids = torch.tensor([vocabularies.hashed(i) for i in range(100 * ROWS)])
    times = torch.bincount(remapped(rows, ids), minlength=ROWS)
    assert len(times) == ROWS
    assert times.min() > 50
    assert not rows.state_dict().keys() - {"_current_iter_tensor"}


def test_parts_of_a_table_do_what_the_whole_does():
    whole = vocabulary(min_count=2, half_life=9)
    parts = [Vocabulary(whole.config, OPEN_IDS, ROWS, first, ROWS // 4, CPU) for first in range(0, ROWS, ROWS // 4)]
    block = whole.input_size() // 4
    for ids in stream(20):
        rows, owner = remapped(whole, ids), ids // block
        for number, part in enumerate(parts):
            assert torch.equal(remapped(part, ids[owner == number]), rows[owner == number])
    for name in ("ids", "counts", "last", "sketch"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return vocabularies.write(tmp_path_factory.mktemp("opened"))


MANAGED = EmbeddingsConfig(min_count=2, half_life=12)


@pytest.fixture(scope="module")
def seen(tmp_path_factory, data) -> dict[str, dict]:
    """What came of each of these trainings."""
    folder = tmp_path_factory.mktemp("trained")
    job = vocabularies.Training(data, folder, MANAGED)
    kinds = {
        "managed": job,
        "shared": replace(job, embeddings=EmbeddingsConfig(collisions="shared")),
        "adagrad": replace(job, optimizer="adagrad"),
        "sgd": replace(job, optimizer="sgd"),
        "fp16": replace(job, precision="fp16"),
    }
    launches = {
        1: {**kinds, "evaluated": replace(job, evaluate=True)},
        2: {**kinds, "begun": replace(job, last=12, save=True)},
        3: {"managed": job, "gone on": replace(job, first=12, last=20, save=True)},
    }
    launches_after = {1: {"ended": replace(job, first=20)}, 2: {"ended": replace(job, first=20)}}
    found = {}
    for workers, jobs in [*launches.items(), *launches_after.items()]:
        launch(vocabularies.train, tuple(jobs.values()), "local", workers, folder)
        outcomes = json.loads((folder / f"seen-{workers}.json").read_text())
        found |= {f"{name} {workers}": outcome for name, outcome in zip(jobs, outcomes, strict=True)}
    return found


def same_tables(one: dict, other: dict) -> None:
    for name, values in one["state"].items():
        if "_managed_collision_modules" in name:
            assert other["state"][name] == values
        else:
            assert torch.tensor(other["state"][name]).allclose(torch.tensor(values), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["managed", "shared", "adagrad", "sgd", "fp16"])
def test_two_ranks_do_what_one_does(seen, kind):
    one, two = seen[f"{kind} 1"], seen[f"{kind} 2"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-3 if kind == "fp16" else 1e-6)
    assert two["usage"] == one["usage"]
    if kind != "fp16":
        same_tables(one, two)
    assert bool(one["usage"]) == (kind != "shared")


def test_each_way_is_another(seen):
    found = [tuple(seen[f"{kind} 1"]["losses"]) for kind in ("managed", "shared", "adagrad", "sgd", "fp16")]
    assert len(set(found)) == len(found)


def test_the_figures_of_its_use(seen):
    users = seen["managed 1"]["usage"]["users"]
    assert set(seen["managed 1"]["usage"]) == {"users", "items_"}
    assert set(users) == {"occupancy", "hits", "admissions", "evictions"}
    assert 0.9 < users["occupancy"] <= 1
    assert 0.1 < users["hits"] < 1
    assert 0 < users["evictions"] < users["admissions"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_checkpoint_of_any_step_continues_at_any_world_size(seen, workers):
    """Two ranks save, three go on, one or two end."""
    whole = seen["managed 1"]
    assert seen["begun 2"]["losses"] == pytest.approx(whole["losses"][:12], rel=1e-6)
    assert seen["gone on 3"]["losses"] == pytest.approx(whole["losses"][12:20], rel=1e-6)
    assert seen[f"ended {workers}"]["losses"] == pytest.approx(whole["losses"][20:], rel=1e-6)
    same_tables(whole, seen[f"ended {workers}"])


def test_evaluation_in_between_changes_no_loss(seen):
    assert seen["evaluated 1"]["losses"] == seen["managed 1"]["losses"]
    assert seen["evaluated 1"]["state"] == seen["managed 1"]["state"]


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad"])
def test_a_row_that_is_lent_starts_anew(tmp_path, data, optimizer):
    job = vocabularies.Training(data, tmp_path, MANAGED, optimizer=optimizer, last=15)
    launch(vocabularies.lend_marked_rows, job, "local", 1, tmp_path)
    found = json.loads((tmp_path / "marked.json").read_text())
    for table in ("users", "items_"):
        part = {
            kind: {name.rsplit(".", 1)[-1]: values for name, values in found[kind].items() if f".{table}." in name}
            for kind in ("before", "after")
        }
        before, after = torch.tensor(part["before"]["ids"]), torch.tensor(part["after"]["ids"])
        lent = before != after
        assert 0 < lent.sum() < 100
        weights, state = (torch.tensor(part["after"][name]) for name in ("weight", "weight/momentum1"))
        assert torch.equal(weights[lent], torch.tensor(found["started"][table])[lent].double())
        assert (weights[~lent] == 7).all()
        assert (state[lent] < 1).all()
        assert (state[~lent] >= 5).all()
        assert not torch.tensor(found["started"][table])[::WAYS].any()


def plan(world_size: int = 2, rows: int = 192, **layouts) -> None:
    schema = vocabularies.schema(rows)
    model = Recommender(schema, Mlp().build(schema), EmbeddingsConfig())
    make_plan(model, ParallelConfig(**layouts), SparseOptimizer(), World(0, world_size, 0, world_size, CPU), 64)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"world_size": 4}, r"table 'users' has 192 rows, no multiple of 32 for each of 4 ranks; round its rows"),
        (
            {"tables": {"users": TableSharding(sharding=("table_wise",))}},
            "table 'users' .* is row_wise and never cached",
        ),
    ],
)
def test_layouts_that_cannot_be(settings, says):
    plan()
    plan(world_size=3)
    with pytest.raises(ValueError, match=says):
        plan(**settings)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"tables": {"tags": {"rows": 64}}}, r"embeddings\.tables\.tags\.rows: is for tables with an open vocabulary"),
        ({"tables": {"tags": {"min_count": 2}}}, r"embeddings\.tables\.tags\.min_count: is for tables"),
        ({"per_scenario": True}, "tables.users: per_scenario does not go with an open vocabulary"),
        ({"features": {"history": {"pooling": "attention"}}}, "features.history: pooling 'attention' needs a list of"),
    ],
)
def test_settings_that_do_not_go_with_it(config, says):
    config = {
        name: {key: (TableOverride if name == "tables" else FeatureOverride)(**value) for key, value in given.items()}
        if isinstance(given, dict)
        else given
        for name, given in config.items()
    }
    with pytest.raises(ValueError, match=says):
        EmbeddingsConfig(**config).apply(vocabularies.schema())


def test_plain_hashing_counts_nothing():
    with pytest.raises(ValueError, match="min_count: collisions 'shared' counts nothing; leave it out"):
        TableOverride(collisions="shared", min_count=3)
    config = EmbeddingsConfig(collisions="shared", tables={"users": TableOverride(min_count=3)})
    with pytest.raises(ValueError, match=r"embeddings.tables.users.min_count: collisions 'shared' counts nothing"):
        config.apply(vocabularies.schema(rows=64))


def test_settings_of_open_vocabularies_where_there_is_none():
    with pytest.raises(ValueError, match=r"embeddings\.half_life: is for tables with an open vocabulary"):
        EmbeddingsConfig(half_life=3).apply(canonical.schema())
    with pytest.raises(ValueError, match=r"embeddings\.tables\.users\.rows: 100 is no multiple of 32; round it"):
        EmbeddingsConfig().apply(vocabularies.schema(rows=100))


def test_settings_of_a_run():
    config = EmbeddingsConfig(rows=320, min_count=4, tables={"users": TableOverride(rows=640, half_life=7)})
    schema = config.apply(vocabularies.schema())
    assert {table.name: table.rows for table in schema.tables} == {"users": 640, "items": 320, "tags": canonical.TAGS}
    assert config.vocabulary(schema.table("users")) == VocabularyConfig(min_count=4, half_life=7)
    assert config.vocabulary(schema.table("items")) == VocabularyConfig(min_count=4)


def test_ids_that_are_no_hashes(tmp_path, data):
    schema = FeatureSchema.read(data)
    source = ParquetSource(data / "train", schema)
    source.read(0)
    negative = canonical.table(20).set_column(0, "user", [list(range(-1, 19))])
    canonical.write_split(tmp_path / "train", negative, [20])
    with pytest.raises(ValueError, match="column 'user': value -1, but ids of table 'users' with an open vocabulary"):
        ParquetSource(tmp_path / "train", schema).read(0)


def run_config(folder, data, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    return command.write_config(folder, data, embeddings={"min_count": 2, "half_life": 12}, **changes)


def test_whole_runs_in_the_order_of_time(tmp_path, data):
    in_time = {"loader": {"batch_size": 120, "partitions": 6, "shuffle": False}}
    for name, workers, changes in (("one", 1, in_time), ("two", 2, in_time), ("shuffled", 1, {})):
        done = command.call("train", run_config(tmp_path / name, data, **changes), "--workers", workers)
        assert done.returncode == 0, done.stderr
    one, two, shuffled = (tmp_path / name / "runs/run" for name in ("one", "two", "shuffled"))
    for values in ("loss", "tables/users/hits", "tables/items/occupancy", "tables/items/evictions"):
        found = command.losses(one, f"train/{values}")
        assert len(found) == 50
        assert command.losses(two, f"train/{values}") == pytest.approx(found, rel=1e-5)
        assert command.losses(shuffled, f"train/{values}") != found
    auc = [json.loads((run / "metrics.json").read_text())["overall"]["auc"] for run in (one, two)]
    assert auc[1] == pytest.approx(auc[0], rel=1e-4)
    assert len(list((one / "checkpoints").iterdir())) > 0
    done = command.call("evaluate", one, "--split", "valid", "--workers", 2)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"kind": "two_tower"}}, "tables.users: model.kind 'two_tower' needs a list of its ids"),
        (
            {"model": {"kind": "sass"}, "knowledge": {"store": "knowledge"}},
            "tables.users: model.kind 'sass' needs a list of its ids",
        ),
        (
            {"model": {"kind": "llm4msr", "backbone": {"kind": "mlp"}}, "knowledge": {"store": "knowledge"}},
            "tables.users: knowledge needs a list of its ids",
        ),
    ],
)
def test_runs_that_need_a_list_of_the_ids(tmp_path, data, changes, says):
    run = load(RunConfig, run_config(tmp_path, data, **changes))
    with pytest.raises(ValueError, match=says):
        run.read_schema()


def test_an_extraction_that_needs_a_list_of_the_ids(data):
    config = ExtractConfig(data=data, out=data / "store", model={"name": "nowhere"})
    with pytest.raises(ValueError, match=r"tables\.users: extraction needs a list of its ids"):
        check(config)
