"""What every builder draws with: a fixed random stream, and the shares of a table that train, validation and test get.

An entry of a table belongs to the part that its place names, counted in fives: places 0, 2 and 4 are trained on, 3
is for validation, 1 for the test. A set without a validation split tests on places 1 and 3. So no part of a set
has what another part has.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
Row = dict[str, Any]

PLACES: Mapping[str, tuple[int, ...]] = {"train": (0, 2, 4), "validation": (3,), "test": (1,), "both": (1, 3)}
NAMES = (
    "Anna, Ben, Clara, David, Emma, Frank, Grace, Henry, Iris, Jack, Kate, Leo, Maria, Noah, Olivia, Paul, Rosa, Sam, "
    "Tina, Victor, Wendy, Adam, Bella, Carl, Diana, Eric, Fiona, George, Helen, Ian, Julia, Kevin, Laura, Martin, "
    "Nina, Oscar, Paula, Robert, Sarah, Tom, Alice, Brian, Cora, Daniel, Ella, Felix, Hannah, Jacob, Lucy, Mark"
)


@dataclass(frozen=True)
class Draw:
    """One part of one set. `seed` names its stream."""

    seed: str
    places: tuple[int, ...]
    rng: random.Random
    golds: dict[int, Iterator[int]] = field(default_factory=dict)  # number of options -> places of the right one

    @classmethod
    def of(cls, seed: str, part: str) -> "Draw":
        # hash() of a text differs from process to process, sha256 does not.
        number = int.from_bytes(hashlib.sha256(f"{seed}/{part}".encode()).digest()[:8], "big")
        return cls(f"{seed}/{part}", PLACES[part], random.Random(number))

    def share(self, items: Sequence[T]) -> list[T]:
        """The entries of a table that belong to this part."""
        return [item for place, item in enumerate(items) if place % 5 in self.places]

    def one(self, items: Sequence[T]) -> T:
        return self.rng.choice(items)

    def few(self, items: Sequence[T], number: int) -> list[T]:
        return self.rng.sample(items, number)

    def rounds(self, items: Sequence[T]) -> Iterator[T]:
        """All items in a random order, then again in another, without end."""
        while True:
            yield from self.few(items, len(items))

    def names(self, number: int) -> list[str]:
        return self.few(self.share(listed(NAMES)), number)

    def among(self, gold: str, wrong: Sequence[str]) -> tuple[list[str], int]:
        """The options in a random order, and the place of the right one; every place is right equally often."""
        number = len(wrong) + 1
        place = next(self.golds.setdefault(number, self.rounds(range(number))))
        options = self.few(wrong, len(wrong))
        return [*options[:place], gold, *options[place:]], place

    def id(self, number: int) -> str:
        return hashlib.sha256(f"{self.seed}/{number}".encode()).hexdigest()[:32]


def listed(text: str) -> list[str]:
    return text.split(", ")


def a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def distinct(rows: Iterator[Row], number: int, *keys: str) -> list[Row]:
    """The first `number` rows that differ in the columns `keys`."""
    found: dict[tuple[str, ...], Row] = {}
    # A generator that cannot give so many is our mistake, so it must not run for ever.
    for _, row in zip(range(60 * number), rows, strict=False):
        found.setdefault(tuple(str(row[key]) for key in keys), row)
        if len(found) == number:
            return list(found.values())
    raise AssertionError(f"only {len(found)} of {number} distinct rows")
