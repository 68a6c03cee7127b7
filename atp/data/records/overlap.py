"""Overlap: records of one split that another split also holds, whole or nearly so.

A model that has trained on its test figures well on it. ATP's calibration set leaks its evaluation sets, and HQS's test
holds two items of MeQSum's training set; so this check runs by default and its findings are reported. It sits beside
:mod:`atp.data.sources`. It knows nothing of tasks, files or tokens.

Two records are near duplicates if the word five-grams (shingles, Broder 1997) of the whole, or of what is asked, have a
Jaccard similarity of 0.8 (the threshold of Lee et al. 2022, arXiv 2107.06499), or one holds nearly all of the other's:
the two questions of MeQSum have answers of their own in HQS. Shingles that more than a few
records of the data set share are left out of both: what many records share is a template, and says nothing of any two.

Shared shingles are counted, not estimated with MinHash: one side of each comparison is the held-out records, whose
index is small.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from atp.data.records.splits import Splits
from atp.data.records.types import ChatRecord, Record, TextRecord, all_text, content_key, spoken
from atp.errors import UserError

log = logging.getLogger(__name__)

NEAR_DUPLICATES = ("drop", "report", "ignore")
_WORDS = 5
_JACCARD = 0.8
_CONTAINED = 0.95
_FEWEST = 4
_TEMPLATE = 5
"""A shingle that more distinct records hold is part of a template."""

_TELLING = 8
"""Fewer words may be the same by chance, or differ in signs that are not words."""

_ALARMING = 0.2
_EXAMPLES = 3
# Signs that change what a formula says are words; scripts without spaces have a word a character.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+|[+*/=<>^%|&~]"
)


class HeldOutIndex:
    """Finds, for a training record, a held-out one that it nearly equals.

    Args:
        records: The held-out records.
        others: The other records of the data set, read once, to learn which shingles belong to a template.
    """

    def __init__(self, records: Sequence[Record], others: Iterable[Record] = ()) -> None:
        self.records = records
        every = [words_of(record) for record in records]
        self._same = {tuple(words): number for number, words in reversed(list(enumerate(every)))}
        held = [shingles(words) for words in every]
        frequency = Counter({shingle: 0 for some in held for shingle in some})
        seen: set[int] = set()
        for words, some in zip(every, held, strict=True):
            self._count(frequency, seen, words, some)
        for record in others:
            words = words_of(record)
            self._count(frequency, seen, words, shingles(words))
        self._template = {shingle for shingle, count in frequency.items() if count > _TEMPLATE}
        self._held = [some - self._template for some in held]
        self._asked = [self._telling(asked_words(record)) for record in records]
        self._owners: dict[int, list[int]] = {}
        for number, telling in enumerate(self._held):
            for shingle in telling:
                self._owners.setdefault(shingle, []).append(number)

    def _telling(self, words: Sequence[str]) -> set[int]:
        return shingles(words) - self._template

    @staticmethod
    def _count(frequency: Counter[int], seen: set[int], words: Sequence[str], some: set[int]) -> None:
        """Count a record's shingles that held-out records have, once however often its words are repeated."""
        known = [shingle for shingle in some if shingle in frequency]
        whole = hash(tuple(words))
        if known and whole not in seen:
            seen.add(whole)
            frequency.update(known)

    def find(self, record: Record, among: Collection[int] | None = None) -> int | None:
        """Return the position of a held-out record that nearly equals this one, or None.

        Args:
            record: The record.
            among: Positions to look at; None for all.
        """
        words = words_of(record)
        same = self._same.get(tuple(words))
        if len(words) >= _TELLING and same is not None and (among is None or same in among):
            return same
        whole, owners = shingles(words), self._owners
        shared = Counter([owner for shingle in whole if shingle in owners for owner in owners[shingle]])
        if max(shared.values(), default=0) < _FEWEST:
            return None
        mine, asked = whole - self._template, self._telling(asked_words(record))
        for owner, count in shared.most_common():
            if count < _FEWEST:
                break
            if among is not None and owner not in among:
                continue
            theirs = self._held[owner]
            if count >= _CONTAINED * min(len(theirs), len(mine)) or _alike(theirs, mine):
                return owner
            if _alike(self._asked[owner], asked):
                return owner
        return None


def _alike(one: set[int], other: set[int]) -> bool:
    shared = len(one & other)
    return shared >= _FEWEST and shared >= _JACCARD * (len(one) + len(other) - shared)


def asked_words(record: Record) -> list[str]:
    """Return the words of what is asked: of a prompt, or of the turns before the assistant's last one."""
    if isinstance(record, ChatRecord):
        last = max((place for place, turn in enumerate(record.messages) if turn["role"] == "assistant"), default=0)
        return _WORD.findall(" ".join(map(spoken, record.messages[:last])).casefold())
    return [] if isinstance(record, TextRecord) else _WORD.findall(record.prompt.casefold())


def words_of(record: Record) -> list[str]:
    """Return the words of a record in order, without regard to case and punctuation."""
    return words_in(all_text(record))


def words_in(text: str) -> list[str]:
    """Return the words of a text in order, without regard to case and punctuation."""
    return _WORD.findall(text.casefold())


def shingles(words: Sequence[str]) -> set[int]:
    """Return digests of the five-grams of words; of fewer words, of all of them."""
    return {
        zlib.crc32(" ".join(words[i : i + _WORDS]).encode("utf-8", "surrogatepass"))
        for i in range(max(1, len(words) - _WORDS + 1))
    }


def check_overlap(splits: Splits, near_duplicates: str = "drop") -> Splits:
    """Look for near duplicates across splits and, if wanted, drop them from the earlier split.

    Args:
        splits: Splits that share no equal content (:func:`atp.data.records.separate`).
        near_duplicates: ``drop`` them from training (and from validation what nearly equals a test record), only
            ``report`` them, or ``ignore`` them without looking.

    Returns:
        The splits, with the findings under ``overlap``: near duplicates per pair of splits, and a few of them.

    Raises:
        ValueError: ``near_duplicates`` is unknown, or dropping leaves a split empty.
    """
    if near_duplicates not in NEAR_DUPLICATES:
        raise UserError(f"data.near_duplicates={near_duplicates!r} is unknown; choose one of {NEAR_DUPLICATES}")
    if near_duplicates == "ignore" or not (splits.test or splits.validation):
        return splits
    index = HeldOutIndex([*splits.test, *splits.validation], splits.train)
    tested, drop = range(len(splits.test)), near_duplicates == "drop"
    search = _Search(index, tested)
    gone = [search.finds("validation", record, tested) and drop for record in splits.validation]
    validation = [record for record, flag in zip(splits.validation, gone, strict=True) if not flag]
    validated = {place for place, flag in enumerate(gone, start=len(splits.test)) if not flag}
    train = [record for record in splits.train if not (search.finds("train", record, tested, validated) and drop)]
    report: dict[str, Any] = {"near": search.found, "near_duplicates": near_duplicates, "examples": search.examples}
    sizes = {
        "training": (len(splits.train), len(train)),
        "validation": (len(splits.validation), len(validation)),
    }
    tell_near_duplicates(splits.name, search.found, search.examples, near_duplicates, sizes)
    return replace(splits, train=train, validation=validation, overlap={**splits.overlap, **report})


class _Search:
    """Looks records up among held-out ones, and keeps count of what it finds and a few pairs."""

    def __init__(self, index: HeldOutIndex, tested: range) -> None:
        self.index, self.tested = index, tested
        self.found = {"validation_test": 0, "train_test": 0, "train_validation": 0}
        self.examples: list[dict[str, str]] = []

    def finds(self, early: str, record: Record, *among: Collection[int]) -> bool:
        """Whether a record nearly equals one of some held-out records, which are looked through one set at a time."""
        owner = next((found for some in among if (found := self.index.find(record, some)) is not None), None)
        if owner is None:
            return False
        late = "test" if owner in self.tested else "validation"
        self.found[f"{early}_{late}"] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append({early: shown(record), late: shown(self.index.records[owner])})
        return True


def tell_near_duplicates(
    name: str,
    found: Mapping[str, int],
    examples: Sequence[Mapping[str, str]],
    near_duplicates: str,
    sizes: Mapping[str, tuple[int, int]],
) -> None:
    """Say how many near duplicates there were, and show a pair of them.

    Args:
        name: Name of the data set.
        found: How many, per pair of splits.
        examples: Pairs of split to text.
        near_duplicates: What is done with them.
        sizes: Split to its records with them and, where they are dropped, without.

    Raises:
        ValueError: Dropping them leaves a split empty.
    """
    if not any(found.values()):
        return
    pair = "; for example " + ", and ".join(f"{split}: {text!r}" for split, text in examples[0].items())
    ways = "data.near_duplicates=report keeps them, data.near_duplicates=ignore does not look"
    if near_duplicates != "drop":
        log.warning("%s: near duplicates across splits, kept (data.near_duplicates=report): %s%s", name, found, pair)
        return
    for split, (had, left) in sizes.items():
        if had and not left:
            raise UserError(f"{name}: all {had} {split} records nearly equal records of a later split{pair}. {ways}")
        if had - left > _ALARMING * had:
            log.warning(
                "%s: WARNING: %d of %d %s records (%d%%) ARE LEFT OUT as near duplicates of a later split; if they are "
                "not, %s",
                *(name, had - left, had, split, 100 * (had - left) // had, ways),
            )
    log.warning("%s: near duplicates across splits, left out of the earlier split: %s%s", name, found, pair)


def duplicates(records: Collection[Record]) -> int:
    """Return how many records repeat the content of an earlier one."""
    return len(records) - len({content_key(record) for record in records})


def shown(record: Record) -> str:
    """Return how a record begins, on one line."""
    text = " ".join(all_text(record).split())
    return text if len(text) <= 160 else text[:157] + "..."
