"""The structure that the synthetic source plants: attributes and effects as functions of an id, without any table.

Every number is a hash of (seed, what it is for, ids), so that any amount of ids costs no memory and a chunk of rows
can be made without the others.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

ENOUGH_ROWS = 100.0
"""An id that is expected in this many rows shows its own effect in full; rarer ones proportionally less, so that what
is planted can be learned."""


def uniform(seed: int, purpose: str, *ids: Ints) -> Floats:
    """`[N]` numbers in (0, 1), functions of their ids."""
    state = np.full(1, seed, np.uint64)
    for number in (int.from_bytes(purpose.encode()[:8], "little"), *ids):
        state = _mixed(state ^ np.asarray(number).astype(np.uint64))
    return ((state >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def normal(seed: int, purpose: str, *ids: Ints) -> Floats:
    """`[N]` numbers of the standard normal distribution, functions of their ids (Box and Muller)."""
    radius = np.sqrt(-2 * np.log(uniform(seed, purpose, *ids)))
    return np.asarray(radius * np.cos(2 * np.pi * uniform(seed ^ 0x5EED, purpose, *ids)))


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64 (Steele, Lea and Flood, 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


@dataclass(frozen=True)
class Popularity:
    """Ids 0, 1, ... with frequencies that fall as a power of their rank."""

    ids: int
    exponent: float
    """Between 0 (all alike) and 1, exclusive."""

    def draw(self, u: Floats) -> Ints:
        """Ids for uniform numbers, through the inverse of the continuous distribution function."""
        rest = 1 - self.exponent
        drawn = ((self.ids + 1) ** rest * u + (1 - u)) ** (1 / rest) - 1
        return np.asarray(np.minimum(drawn.astype(np.int64), self.ids - 1))

    def share(self, ids: Ints) -> Floats:
        """Which share of the rows an id gets."""
        rest = 1 - self.exponent
        return np.asarray(((ids + 2.0) ** rest - (ids + 1.0) ** rest) / ((self.ids + 1) ** rest - 1))


@dataclass(frozen=True)
class Planted:
    """Who the users and items are, and the log odds of their clicks and conversions."""

    seed: int
    rows: int
    users: Popularity
    items: Popularity
    segments: int
    categories: int
    tags: int
    strength: float
    """Scale of all effects: the standard deviation of the click's log odds is about 1.2 times this."""

    def segment(self, users: Ints) -> Ints:
        """Each user's segment."""
        return self._pick("segment", self.segments, users)

    def category(self, items: Ints) -> Ints:
        """Each item's category."""
        return self._pick("category", self.categories, items)

    def tag(self, items: Ints, place: int) -> Ints:
        """The `place`-th tag of each item, -1 beyond its one to three tags; tags 0, 1, ... of all categories mixed."""
        tag = self._pick(f"tag{place}", self.tags, items)
        return np.where(uniform(self.seed, "tags", items) * 3 > place, tag, -1)

    def click(self, scenario: Ints, user: Ints, item: Ints, price: Floats) -> Floats:
        """Log odds `[N]` of a click. `price` is standard normal."""
        own = 0.1 * self._own("user", self.users, user) + 0.15 * self._own("item", self.items, item)
        return self._base(scenario) + self.strength * (
            self._shared("click", scenario, user, item) + own + 0.3 * self._tags(item) + self._price(scenario, price)
        )

    def conversion(self, scenario: Ints, user: Ints, item: Ints, price: Floats) -> Floats:
        """Log odds `[N]` of a conversion, given a click: in part what makes clicks, in part its own structure."""
        shared = self._shared("click", scenario, user, item) + self._shared("buy", scenario, user, item)
        return -0.9 + self.strength * (0.7 * shared - 0.4 * price)

    def favourites(self, scenario: int, count: int) -> list[int]:
        """The categories that are clicked most in a scenario, best first."""
        every = np.arange(self.categories)
        liking = normal(self.seed, "click-sc", np.full(self.categories, scenario), every)
        return [int(category) for category in np.argsort(-liking, kind="stable")[:count]]

    def _shared(self, what: str, scenario: Ints, user: Ints, item: Ints) -> Floats:
        """Scenario x category, segment x category (the same everywhere), and a part of both that is the scenario's."""
        segment, category = self.segment(user), self.category(item)
        return (
            0.6 * normal(self.seed, f"{what[:5]}-sc", scenario, category)
            + 0.7 * normal(self.seed, f"{what[:5]}-gc", segment, category)
            + 0.15 * normal(self.seed, f"{what[:4]}-sgc", scenario, segment, category)
        )

    def _base(self, scenario: Ints) -> Floats:
        return -1.3 + 0.5 * normal(self.seed, "base", scenario)

    def _price(self, scenario: Ints, price: Floats) -> Floats:
        return price * 0.3 * normal(self.seed, "price", scenario)

    def _tags(self, item: Ints) -> Floats:
        """The mean effect of the item's tags."""
        total, count = np.zeros(len(item)), np.zeros(len(item))
        for place in range(3):
            tag = self.tag(item, place)
            total += np.where(tag >= 0, normal(self.seed, "tagged", np.maximum(tag, 0)), 0)
            count += tag >= 0
        return total / count

    def _own(self, kind: str, popularity: Popularity, ids: Ints) -> Floats:
        shown = np.minimum(1.0, popularity.share(ids) * self.rows / ENOUGH_ROWS)
        return normal(self.seed, kind, ids) * shown

    def _pick(self, purpose: str, choices: int, ids: Ints) -> Ints:
        return (uniform(self.seed, purpose, ids) * choices).astype(np.int64)
