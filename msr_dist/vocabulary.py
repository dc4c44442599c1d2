"""Tables without a list of their ids: ids come as 64-bit hashes, and the rows go to those that are frequent by now.

A table's rows are sets of `WAYS`, and an id belongs to one set for good, by its upper bits. The first row of a set is
shared by all of its ids that have no row of their own; the others are lent to one id each. In training:

- a lookup of an id that has a row raises the row's count;
- other ids are counted in a sketch (count-min with two hashes: Cormode and Muthukrishnan, 2005, "An improved data
  stream summary"), which never counts too few;
- an id that has been counted `min_count` times gets a free row of its set, or the row with the lowest count, the one
  among equals that was not looked up for longest, if that count is lower than its own; the row starts anew;
- every `half_life` steps all counts are halved, so that what was frequent once makes room.

Sketch, halving, and the comparison of who comes with who would have to go are TinyLFU's (Einziger, Friedman and Manes,
2017, "TinyLFU: A highly efficient cache admission policy"); TorchRec's own policy divides the count by the steps since
the last lookup instead. Sets of few rows, each of which evicts alone, are those of caches in processors.

TorchRec's managed collision modules bring ids to the rank that has their rows. Of its two tables behind that, one goes
by the wall clock and the other evicts per rank, from a history that no checkpoint holds. Here a set never spans ranks,
all arithmetic is on integers, and all state is in buffers with one line per row: losses are the same at any world size
that divides the sets, and a checkpoint of any step continues exactly. Evaluation changes nothing. Rows that pad a batch
are looked up as well, and counted, the same at any world size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torchrec.distributed.mc_embeddingbag import (
    ManagedCollisionEmbeddingBagCollectionSharder,
    ShardedManagedCollisionEmbeddingBagCollection,
)
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import ManagedCollisionCollection, ManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor

from msr_dist.config import Config
from msr_dist.distributed import World

WAYS = 32
"""Rows of a set."""
ABSENT = 0
"""The id that stands for none: it never gets a row of its own."""
_FREE, _SHARED = -1, -2
_COUNTERS = 4  # of the sketch, for each row
_HASHES = (0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64))
_MOST = (1 << 26) - 1  # that is counted
_STEP_BITS, _WAY_BITS = 31, 5
_STAYS = torch.iinfo(torch.int64).max

Draw = Callable[[str, Tensor], Tensor]
"""Table and rows of it `[N]` -> their weights at the start `[N, width]`."""


class VocabularyConfig(Config):
    """How ids share the rows of a table that has no list of them."""

    collisions: Literal["managed", "shared"] = "managed"
    """managed: frequent ids have rows of their own; shared: plain hashing, each id has the row that its hash says."""
    min_count: int = Field(default=2, ge=1)
    """Occurrences in training before an id gets a row of its own."""
    half_life: int = Field(default=10_000, ge=1)
    """Steps after which an occurrence counts half."""


class _Rows(ManagedCollisionModule):
    """Ids -> rows of one table, or of one rank's part of it."""

    def __init__(
        self, config: VocabularyConfig, ids: int, whole: int, first: int, rows: int, device: torch.device
    ) -> None:
        """`rows` rows from `first` on, of `whole` in the table, for ids 0 to `ids` - 1."""
        super().__init__(device, output_segments=[])
        # It says how many ranks there are, and a checkpoint is for any number.
        del self._output_segments_tensor
        self.config, self._range, self._whole, self._first, self._rows = config, ids, whole, first, rows
        self._block = -(-ids // (whole // WAYS))

    def rows_of(self, ids: Tensor) -> Tensor:
        """The row within this part for each id `[N]`."""
        raise NotImplementedError

    def remap(
        self,
        features: dict[str, JaggedTensor],
        mutate_miss_lengths: bool = True,  # noqa: ARG002 - the base class has it
        write_weights: Tensor | None = None,  # noqa: ARG002 - the base class has it
    ) -> dict[str, JaggedTensor]:
        """Ids of this part -> rows of the table."""
        return {
            table: JaggedTensor(values=self.rows_of(ids.values()) + self._first, lengths=ids.lengths())
            for table, ids in features.items()
        }

    def forward(self, features: dict[str, JaggedTensor], mutate_miss_lengths: bool = True) -> dict[str, JaggedTensor]:
        """The same, of a table that is not sharded."""
        return self.remap(features, mutate_miss_lengths)

    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Nothing before the lookup, which counts."""
        return features

    def preprocess(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Nothing: ids were hashed when the data were prepared."""
        return features

    def evict(self) -> Tensor | None:
        """Rows of the table that start anew with this lookup."""
        return None

    def output_size(self) -> int:
        """Rows of this part."""
        return self._rows

    def input_size(self) -> int:
        """Ids of the whole table are below this, which all ranks share evenly."""
        return self._block * (self._whole // WAYS)

    def buckets(self) -> int:
        """Sets of the whole table, which the world size has to divide."""
        return self._whole // WAYS

    def validate_state(self) -> None:
        """Any state fits any world size."""

    def open_slots(self) -> Tensor:
        """TorchRec logs it."""
        return torch.zeros(1, dtype=torch.int64)

    def rebuild_with_output_id_range(
        self,
        output_id_range: tuple[int, int],
        output_segments: list[int],  # noqa: ARG002 - the base class has it
        device: torch.device | None = None,
    ) -> "_Rows":
        """One rank's part."""
        first, end = output_id_range
        return type(self)(self.config, self._range, self._whole, first, end - first, device or self.device)


class Hashing(_Rows):
    """Plain hashing: each id has the row that its hash says, whoever else is there."""

    def rows_of(self, ids: Tensor) -> Tensor:
        """The set by the upper bits, the row within by others."""
        return (ids // self._block) * WAYS - self._first + _hash(ids, _HASHES[0], WAYS)


class Vocabulary(_Rows):
    """Rows of their own for ids that are frequent by now; see the module's text."""

    ids: Tensor
    """`[rows]` int64: whom the row is lent to, `_FREE`, or `_SHARED`."""
    counts: Tensor
    """`[rows]` int32: occurrences, halved every half-life."""
    last: Tensor
    """`[rows]` int32: the step of the last lookup."""
    sketch: Tensor
    """`[rows, counters]` int32; all counters of a set's rows belong to its ids without a row."""
    _current_iter_tensor: Tensor

    def __init__(
        self, config: VocabularyConfig, ids: int, whole: int, first: int, rows: int, device: torch.device
    ) -> None:
        super().__init__(config, ids, whole, first, rows, device)
        holders = torch.full((rows,), _FREE, dtype=torch.int64, device=device)
        holders[::WAYS] = _SHARED
        self.register_buffer("ids", holders)
        for name, shape in (("counts", (rows,)), ("last", (rows,)), ("sketch", (rows, _COUNTERS))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int32, device=device))
        self._anew: Tensor | None = None
        self._tally = [0, 0, 0, 0, 0]

    @torch.no_grad()
    def rows_of(self, ids: Tensor) -> Tensor:
        """The ids' own rows, else those of their sets; in training, the ids are counted and may get rows now."""
        unique, inverse, times = torch.unique(ids, return_inverse=True, return_counts=True)
        sets = unique // self._block - self._first // WAYS
        is_own = self.ids.view(-1, WAYS).index_select(0, sets) == unique[:, None]  # U x WAYS
        shared = sets * WAYS
        # Where none is its own, this finds the first, which the set shares.
        rows = shared + is_own.int().argmax(1)
        if self.training:
            self._count(unique, sets, times, rows != shared, rows)
        found: Tensor = rows[inverse]
        return found

    def evict(self) -> Tensor | None:
        """Rows of the table that were lent to other ids in this lookup."""
        anew, self._anew = self._anew, None
        return None if anew is None else anew + self._first

    def take_tally(self) -> Tensor:
        """What became of the rows, `[7]` int64.

        Rows to lend and those lent now; since the last call, of training: steps, lookups, lookups of ids that had a
        row, rows lent, and of these, rows taken from others.
        """
        taken, self._tally = self._tally, [0, 0, 0, 0, 0]
        return torch.tensor([self._rows - self._rows // WAYS, int((self.ids >= 0).sum()), *taken])

    def _count(self, unique: Tensor, sets: Tensor, times: Tensor, owned: Tensor, rows: Tensor) -> None:
        """Count ids `[U]`, and put into `rows` those that ids without one get now."""
        self._current_iter_tensor += 1
        step = int(self._current_iter_tensor)
        if step % self.config.half_life == 0:
            self.counts.bitwise_right_shift_(1)
            self.sketch.bitwise_right_shift_(1)
        known = unique != ABSENT
        own = rows[owned]
        self.counts[own] = (self.counts[own] + times[owned]).clamp_(max=_MOST).int()
        self.last[own] = step
        # Ids without a row.
        others = (known & ~owned).nonzero().squeeze(1)
        admitted = self._sketched(unique[others], sets[others], times[others])
        who, lent, evicted = self._lend(unique[others], sets[others], admitted, step)
        rows[others[who]] = lent
        self._anew = lent if len(lent) else None
        found = [1, int(times[known].sum()), int(times[owned].sum()), len(lent), evicted]
        self._tally = [before + now for before, now in zip(self._tally, found, strict=True)]

    def _sketched(self, ids: Tensor, sets: Tensor, times: Tensor) -> Tensor:
        """Count ids in the sketch; how often they have occurred, at least `[M]`."""
        size = WAYS * _COUNTERS
        places = sets[:, None] * size + torch.stack([_hash(ids, factor, size) for factor in _HASHES], 1)  # M x 2
        counters = self.sketch.view(-1)
        # Sums of integers: in any order, and with any ids on the same counter, the same.
        counters.index_add_(0, places.view(-1), times.int().repeat_interleave(len(_HASHES)))
        return counters[places].amin(1).clamp_(max=_MOST)

    def _lend(self, ids: Tensor, sets: Tensor, counts: Tensor, step: int) -> tuple[Tensor, Tensor, int]:
        """Rows for those of the ids `[M]`, which are sorted, whose counts suffice.

        In each set the most frequent id comes first, and meets the row that would go first. Returns places among the
        ids, their rows, and how many of these others have lost.
        """
        asking = (counts >= self.config.min_count).nonzero().squeeze(1)
        asking = asking[counts[asking].argsort(descending=True, stable=True)]
        asking = asking[sets[asking].argsort(stable=True)]
        asked, line, size = torch.unique_consecutive(sets[asking], return_inverse=True, return_counts=True)
        turn = torch.arange(len(asking), device=ids.device) - (size.cumsum(0) - size)[line]
        worth = self._worth(asked, step)
        who, lent = [asking[:0]], [asking[:0]]
        for number in range(min(WAYS, int(size.max()) if len(size) else 0)):
            now, lines = asking[turn == number], line[turn == number]
            least = worth.index_select(0, lines).amin(1)
            worth[lines, least % WAYS] = _STAYS
            gets = (least >> (_STEP_BITS + _WAY_BITS)) < counts[now]
            who.append(now[gets])
            lent.append((asked[lines] * WAYS + least % WAYS)[gets])
        chosen, rows = torch.cat(who), torch.cat(lent)
        evicted = int((self.ids[rows] >= 0).sum())
        self.ids[rows], self.counts[rows], self.last[rows] = ids[chosen], counts[chosen].int(), step
        return chosen, rows, evicted

    def _worth(self, sets: Tensor, step: int) -> Tensor:
        """What decides which rows of some sets go first, `[sets, WAYS]`: count, then last lookup, then place."""
        holders, counts, last = (
            # Far faster than an index in brackets.
            state.view(-1, WAYS).index_select(0, sets).long()
            for state in (self.ids, self.counts, self.last)
        )
        counts[holders == _FREE] = -1
        worth = (((counts << _STEP_BITS) + last) << _WAY_BITS) + torch.arange(WAYS, device=sets.device)
        # What this very step looks up, stays: its vectors are on their way.
        worth[(holders == _SHARED) | ((last == step) & (holders >= 0))] = _STAYS
        return worth


def _hash(ids: Tensor, factor: int, size: int) -> Tensor:
    """Ids -> 0 to `size` - 1, a power of 2: multiplication, whose upper bits depend on all below."""
    return (ids * factor).bitwise_right_shift(48).bitwise_and(size - 1)


class ShardedBags(ShardedManagedCollisionEmbeddingBagCollection):
    """Tables with such rows on all ranks.

    TorchRec's own starts rows anew with a kernel that is for row-wise Adagrad on GPUs alone, and draws their weights
    from a generator, whose state depends on what was drawn before.
    """

    def begin(self, draw: Draw) -> None:
        """Rows start with what `draw` says whenever they are lent, and those that sets share with zero."""
        self._draw = draw
        for table, rows in self.vocabularies():
            if isinstance(rows, Vocabulary):
                self._tensors(table)[0][::WAYS].zero_()

    def vocabularies(self) -> Iterator[tuple[str, _Rows]]:
        """Table, and its vocabulary on this rank."""
        yield from self._managed_collision_collection._managed_collision_modules.items()

    def _evict(self, evictions_per_table: Mapping[str, Tensor | None]) -> None:
        """Weights and optimizer state of these rows start anew; TorchRec calls it between counting and lookup."""
        for table, rows in evictions_per_table.items():
            if rows is not None:
                weights, *states = self._tensors(table)
                first = self._managed_collision_collection._table_to_offset[table]
                weights[rows] = self._draw(table, rows + first).to(weights.dtype)
                for state in states:
                    state[rows] = 0

    def _tensors(self, table: str) -> list[Tensor]:
        """Weights and optimizer states of this rank's rows of a table, as its kernel has them."""
        kernel, place = self._table_to_tbe_and_index[table]
        # Without state, as with sgd, there is no list for any table.
        states = kernel.split_optimizer_states() or [[]] * (int(place) + 1)
        return [kernel.split_embedding_weights()[int(place)], *states[int(place)]]


class BagsSharder(ManagedCollisionEmbeddingBagCollectionSharder):
    """Makes `ShardedBags` of what `managed_bags` gives."""

    def shard(
        self,
        module: ManagedCollisionEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,  # noqa: ARG002 - the base class has it
    ) -> ShardedBags:
        """The tables of `module` on all ranks."""
        assert device is not None
        return ShardedBags(module, params, self._e_sharder, self._mc_sharder, env, device)


def managed_bags(
    tables: Sequence[EmbeddingBagConfig], vocabularies: Mapping[str, VocabularyConfig], ids: int
) -> ManagedCollisionEmbeddingBagCollection:
    """Tables with such rows for ids 0 to `ids` - 1, which take no memory before they are sharded.

    The rows of each are a multiple of `WAYS`; `vocabularies` are by table name.
    """
    meta, modules = torch.device("meta"), {}
    for table in tables:
        rows, config = table.num_embeddings, vocabularies[table.name]
        kind = Vocabulary if config.collisions == "managed" else Hashing
        modules[table.name] = kind(config, ids, rows, 0, rows, meta)
    return ManagedCollisionEmbeddingBagCollection(
        EmbeddingBagCollection(tables=list(tables), device=meta),
        ManagedCollisionCollection(modules, list(tables), need_preprocess=False),
    )


def vocabulary_tables(module: nn.Module) -> dict[str, int]:
    """Rows of each table that `managed_bags` has made in `module`, by name."""
    return {
        table.name: table.num_embeddings
        for child in module.modules()
        if isinstance(child, ManagedCollisionEmbeddingBagCollection)
        for table in child._managed_collision_collection.embedding_configs()
    }


def usage(model: nn.Module, world: World) -> dict[str, dict[str, float]]:
    """What became of each managed table since the last call, by its name; all ranks together.

    `occupancy`, the share of the rows that are lent now; `hits`, the share of training's lookups whose id had a row;
    `admissions` and `evictions` per step.
    """
    values: dict[str, dict[str, float]] = {}
    for child in model.modules():
        if isinstance(child, ShardedBags):
            for table, rows in child.vocabularies():
                if isinstance(rows, Vocabulary):
                    capacity, lent, steps, lookups, hits, admitted, evicted = world.sum(rows.take_tally()).tolist()
                    steps = max(1, steps / world.world_size)
                    values[table] = {
                        "occupancy": lent / capacity,
                        "hits": hits / max(1, lookups),
                        "admissions": admitted / steps,
                        "evictions": evicted / steps,
                    }
    return values
