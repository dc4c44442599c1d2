"""Users whom the language model finds alike, with what they chose and what the model read about them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from msr_dist.config import load
from msr_dist.extract import CONFIG_FILE, HISTORIES, ExtractConfig
from msr_dist.llm.history import History, read_histories
from msr_dist.llm.prompts import EARLIER, Templates, user_prompt
from msr_dist.llm.vectors import RowVectors, VectorStore, prompt_digest
from msr_dist.schema import FeatureSchema

EXAMPLES = 3
NEIGHBOURS = 3
SHOWN = 6
"""Choices of a scenario that are shown, the newest."""
SEARCHED = 20_000
"""Users, by row, among whom examples are chosen."""
SAMPLED = 1_000
"""Users of those whose neighbours within the sample tell whether neighbours have more in common than others."""


@dataclass(frozen=True)
class Choice:
    """An item that a user chose."""

    text: str
    shared: bool
    """Whether the user of the example chose it as well."""


@dataclass(frozen=True)
class Choices:
    """What a user chose in one scenario."""

    shown: tuple[Choice, ...]
    more: int


@dataclass(frozen=True)
class Person:
    """A user and what is known of it."""

    id: int | str
    cosine: float | None
    """With the user of the example; None for that one itself."""
    choices: dict[str, Choices]
    """By the scenario's name."""


@dataclass(frozen=True)
class Example:
    """A user, those who are nearest, and the prompt."""

    user: Person
    neighbours: tuple[Person, ...]
    prompt: str | None
    """None where it cannot be made again: templates or scenarios have changed since the extraction."""


@dataclass(frozen=True)
class InCommon:
    """What pairs of users have in common, of all that either chose: shares of the words in it, and of the items."""

    nearest_words: float
    random_words: float
    nearest_items: float
    random_items: float
    users: int
    """How many were asked for their nearest."""


@dataclass(frozen=True)
class People:
    """Examples, and whether neighbours have more in common than other users."""

    examples: tuple[Example, ...]
    in_common: InCommon | None
    """None where there are too few users to tell."""


def look_up(store: VectorStore, vectors: RowVectors, schema: FeatureSchema) -> People:
    """Choose examples, and find their nearest users by the vectors that training used.

    Examples are users who chose something in most scenarios, and of those the users with most choices.
    """
    histories = [each for each in _first_histories(store.folder) if each.row < vectors.rows]
    if not histories:
        return People((), None)
    start = histories[0].row
    found, known = vectors.read(start, histories[-1].row - start + 1)
    histories = [each for each in histories if known[each.row - start]]
    chosen = sorted(histories, key=lambda each: (-len(set(each.scenarios)), -len(each.texts), each.row))[:EXAMPLES]
    nearest = {each.row: vectors.nearest(each.row, NEIGHBOURS) for each in chosen}
    others = _histories(store.folder, {row for pairs in nearest.values() for row, _ in pairs})
    # What came before the log has the place behind the last scenario.
    names = [*(scenario.name for scenario in schema.scenarios), EARLIER]
    examples = []
    for each in chosen:
        theirs = frozenset(each.texts)
        neighbours = [_person(others[row], cosine, names, theirs) for row, cosine in nearest[each.row]]
        examples.append(
            Example(_person(each, None, names, frozenset()), tuple(neighbours), _prompt(store, each, schema))
        )
    some = histories[:: -(-len(histories) // SAMPLED)]
    return People(tuple(examples), _in_common(some, found[[each.row - start for each in some]]))


def _parts(store: Path) -> list[Path]:
    return sorted((store / HISTORIES).glob("part-*.parquet"))


def _first_histories(store: Path) -> Iterator[History]:
    left = SEARCHED
    for file in _parts(store):
        for history in read_histories(file)[:left]:
            left -= 1
            yield history
        if not left:
            return


def _histories(store: Path, rows: set[int]) -> dict[int, History]:
    """The histories of single users; files that cannot hold them are not read."""
    if not rows:
        return {}
    table = pq.read_table(_parts(store), filters=[("row", "in", rows)])
    return {line["row"]: History(**line) for line in table.to_pylist()}


def _person(history: History, cosine: float | None, names: Sequence[str], shared: frozenset[str]) -> Person:
    texts: dict[str, list[str]] = {}
    for scenario, text in zip(history.scenarios, history.texts, strict=True):
        texts.setdefault(names[scenario], []).append(text)
    choices = {
        name: Choices(tuple(Choice(text, text in shared) for text in each[:SHOWN]), max(0, len(each) - SHOWN))
        for name, each in texts.items()
    }
    return Person(history.id, cosine, choices)


def _prompt(store: VectorStore, history: History, schema: FeatureSchema) -> str | None:
    """What the model read about the user: of all lengths that the prompt may have been cut to, the one it was."""
    config = load(ExtractConfig, store.folder / CONFIG_FILE)
    try:
        templates = Templates.load(config.prompts)
    except ValueError:
        return None
    digest = _stored_digest(store, history.row)
    for most in range(len(history.texts), 0, -1):
        prompt = user_prompt(_newest(history, most), schema.scenarios, templates, config.prompts, lambda _text: 0)
        if prompt_digest(store.manifest.fingerprint, prompt.text, prompt.own_start) == digest:
            return prompt.text
    return None


def _newest(history: History, most: int) -> History:
    """The history with at most so many events of each scenario."""
    seen: dict[int, int] = {}
    kept = []
    for place, scenario in enumerate(history.scenarios):
        seen[scenario] = seen.get(scenario, 0) + 1
        if seen[scenario] <= most:
            kept.append(place)
    return replace(
        history,
        scenarios=[history.scenarios[place] for place in kept],
        texts=[history.texts[place] for place in kept],
    )


def _stored_digest(store: VectorStore, row: int) -> bytes:
    files = [store.folder / stored.file for stored in store.manifest.shards]
    digest: bytes = pq.read_table(files, columns=["prompt"], filters=[("row", "=", row)])["prompt"][0].as_py()
    return digest


def _in_common(histories: Sequence[History], vectors: npt.NDArray[np.float32]) -> InCommon | None:
    """Compare each user with its nearest in the sample, and with ten that only their place in the sample chooses."""
    count, strides = len(histories), 10
    if count <= 2 * strides:
        return None
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    nearest = cosines.argmax(axis=1)
    words = [frozenset(re.findall(r"\w{3,}", " ".join(each.texts).lower())) for each in histories]
    items = [frozenset(each.texts) for each in histories]
    steps = [count * stride // (strides + 1) for stride in range(1, strides + 1)]

    def of_nearest(sets: Sequence[frozenset[str]]) -> float:
        return float(np.mean([_shared(sets[place], sets[other]) for place, other in enumerate(nearest)]))

    def of_others(sets: Sequence[frozenset[str]]) -> float:
        return float(np.mean([_shared(sets[i], sets[(i + step) % count]) for i in range(count) for step in steps]))

    return InCommon(of_nearest(words), of_others(words), of_nearest(items), of_others(items), count)


def _shared(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / max(1, len(one | other))
