"""Seeded drawing and the words that every domain shares: people, places, firms, dates, money.

What it is: the lowest part of the embedded corpus; the domain modules draw all their slots through `Draw`.
Where it sits: drawing -> legal, health, finance, narrative -> corpus -> `atp.embedded.records`.
What it does NOT know: domains, splits, tokens, models.

Only `random.Random.random` is used, because it is the one method whose sequence Python promises to keep; the corpus,
and so its digest, therefore does not change with the Python version.
"""

from __future__ import annotations

import hashlib
import random
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
Record = dict[str, Any]


class Draw:
    """A source of choices that is a pure function of its seed text.

    Args:
        seed: any text; equal texts give equal sequences on every machine.
    """

    def __init__(self, seed: str) -> None:
        digest = hashlib.blake2b(seed.encode("utf-8"), digest_size=8).digest()
        self._random = random.Random(int.from_bytes(digest, "big")).random

    def below(self, bound: int) -> int:
        """Return a whole number in [0, bound)."""
        return int(self._random() * bound)

    def pick(self, items: Sequence[Item]) -> Item:
        """Return one of the items."""
        return items[int(self._random() * len(items))]

    def chance(self, share: float) -> bool:
        """Return True in a share (0-1) of the calls."""
        return self._random() < share

    def whole(self, low: int, high: int, step: int = 1) -> int:
        """Return a whole number from low to high, both included, in steps."""
        return low + step * int(self._random() * ((high - low) // step + 1))

    def some(self, items: Sequence[Item], count: int) -> list[Item]:
        """Return `count` different positions' items, in drawn order."""
        pool = list(items)
        for i in range(count):
            j = i + int(self._random() * (len(pool) - i))
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]

    def other(self, items: Sequence[Item], taken: Item) -> Item:
        """Return an item that differs from `taken`."""
        while True:
            found = self.pick(items)
            if found != taken:
                return found


@dataclass(frozen=True)
class Task:
    """One kind of record of a domain.

    Attributes:
        weight: how many of the domain's records, relative to its other tasks, are of this kind.
        make: takes a `Draw` and the record's number within the task (labels go round with it, so they are balanced)
            and returns the raw record and its key: the slots whose combination decides the split. The key's words
            are all visible in the record, so equal records have equal keys and no record can be in two splits.
    """

    weight: int
    make: Callable[[Draw, int], tuple[Record, tuple[str, ...]]]


def wording(name: str) -> dict[str, Any]:
    """Return the tables of `wording/<name>.toml`."""
    return tomllib.loads((Path(__file__).parent / "wording" / f"{name}.toml").read_text(encoding="utf-8"))


def article(noun: str) -> str:
    """Return the noun with its indefinite article."""
    silent = noun.startswith(("hour", "honest", "heir"))
    sounded = noun.startswith(("uni", "use", "util", "one", "Uni", "Euro"))
    return f"an {noun}" if (noun[0] in "aeiouAEIOU" and not sounded) or silent else f"a {noun}"


def sentence(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def listed(items: Sequence[str], word: str = "and") -> str:
    """Return `a, b, and c`."""
    if len(items) < 3:
        return f" {word} ".join(items)
    return f"{', '.join(items[:-1])}, {word} {items[-1]}"


def numbered(choices: Sequence[str], label: int, draw: Draw) -> list[str]:
    """Put the right choice, which comes first, at position `label` among the others, which are shuffled."""
    rest = draw.some(choices[1:], len(choices) - 1)
    return [*rest[:label], choices[0], *rest[label:]]


_SHARED = wording("shared")
WOMEN: Sequence[str] = _SHARED["women"]
MEN: Sequence[str] = _SHARED["men"]
SURNAMES: Sequence[str] = _SHARED["surnames"]
TOWNS: Sequence[str] = _SHARED["towns"]
STATES: Sequence[str] = _SHARED["states"]
MONTHS: Sequence[str] = _SHARED["months"]
ROOTS: Sequence[str] = _SHARED["roots"]
TRADES: Sequence[str] = _SHARED["trades"]
FORMS: Sequence[str] = _SHARED["forms"]
COUNTS: Sequence[str] = _SHARED["counts"]


def person(draw: Draw) -> tuple[str, str, str, str]:
    """Return a first name with the pronouns that go with it: name, `she`, `her` (possessive), `her` (object)."""
    if draw.chance(0.5):
        return draw.pick(WOMEN), "she", "her", "her"
    return draw.pick(MEN), "he", "his", "him"


def company(draw: Draw) -> str:
    """Return a company name such as `Aldren Freight Inc.`."""
    return f"{draw.pick(ROOTS)} {draw.pick(TRADES)} {draw.pick(FORMS)}"


def dollars(draw: Draw, low: int, high: int, step: int) -> str:
    """Return an amount such as `$4,500`; bounds and step in dollars."""
    return f"${draw.whole(low, high, step):,}"
