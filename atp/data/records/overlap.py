"""Overlap: records of one split that another split also holds, whole or nearly so.

A model that has trained on its test figures well on it. ATP's calibration set leaks its evaluation sets, and HQS's test
holds two items of MeQSum's training set; so this check runs by default and its findings are reported. It sits beside
:mod:`atp.data.sources`. It knows nothing of tasks, files or tokens.

Two records are near duplicates if one holds most of the other's word five-grams (shingles, Broder 1997). Shingles that
many held-out records share, such as a task's template, say nothing and are left out.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from atp.data.records import ChoiceRecord, CompletionRecord, Record, Splits, TextRecord, content_key
from atp.errors import UserError

log = logging.getLogger(__name__)

NEAR_DUPLICATES = ("drop", "report", "ignore")
_WORDS = 5
_SHARED = 0.8
_FEWEST = 4
_EXAMPLES = 3
_WORD = re.compile(r"\w+")


class HeldOutIndex:
    """Finds, for a training record, a held-out one that it nearly equals.

    Args:
        records: The held-out records.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        every = [shingles(record) for record in records]
        frequency = Counter(shingle for some in every for shingle in some)
        common = max(5, 0.02 * len(records))
        self._sizes: list[int] = []
        self._owners: dict[int, list[int]] = {}
        self._common = {shingle for shingle, count in frequency.items() if count > common}
        for number, some in enumerate(every):
            telling = some - self._common
            self._sizes.append(len(telling))
            for shingle in telling:
                self._owners.setdefault(shingle, []).append(number)

    def find(self, record: Record) -> int | None:
        """Return the position of a held-out record that nearly equals this one, or None."""
        mine = shingles(record) - self._common
        owners = self._owners
        shared = Counter([owner for shingle in mine if shingle in owners for owner in owners[shingle]])
        for owner, count in shared.most_common(3):
            if count >= _FEWEST and count >= _SHARED * min(self._sizes[owner], len(mine)):
                return owner
        return None


def shingles(record: Record) -> set[int]:
    """Return digests of the word five-grams of a record, without regard to case and punctuation."""
    words = _WORD.findall(text_of_record(record).casefold())
    return {zlib.crc32(" ".join(words[i : i + _WORDS]).encode()) for i in range(max(1, len(words) - _WORDS + 1))}


def text_of_record(record: Record) -> str:
    """Return all the text of a record."""
    if isinstance(record, TextRecord):
        return record.text
    if isinstance(record, CompletionRecord):
        return f"{record.prompt} {record.completion}"
    assert isinstance(record, ChoiceRecord)
    return " ".join((record.prompt, *record.choices))


def check_overlap(splits: Splits, near_duplicates: str = "drop") -> Splits:
    """Look for near duplicates across splits and, if wanted, drop them from the earlier split.

    Args:
        splits: Splits that share no equal content (:func:`atp.data.records.separate`).
        near_duplicates: ``drop`` them from training (and from validation what nearly equals a test record), only
            ``report`` them, or ``ignore`` them without looking.

    Returns:
        The splits, with the findings under ``overlap``: near duplicates per pair of splits, and a few of them.

    Raises:
        ValueError: ``near_duplicates`` is unknown.
    """
    if near_duplicates not in NEAR_DUPLICATES:
        raise UserError(f"data.near_duplicates={near_duplicates!r} is unknown; choose one of {NEAR_DUPLICATES}")
    if near_duplicates == "ignore" or not splits.test:
        return splits
    found: dict[str, int] = {}
    examples: list[dict[str, str]] = []
    kept: dict[str, Collection[Record]] = {"train": splits.train, "validation": splits.validation}
    for early, late in (("validation", "test"), ("train", "test"), ("train", "validation")):
        index = HeldOutIndex(list(getattr(splits, late)))
        rest: list[Record] = []
        pairs = 0
        for record in kept[early]:
            owner = index.find(record)
            if owner is None:
                rest.append(record)
                continue
            pairs += 1
            if len(examples) < _EXAMPLES:
                examples.append({early: _shown(record), late: _shown(index.records[owner])})
        found[f"{early}_{late}"] = pairs
        if near_duplicates == "drop":
            kept[early] = rest
    if any(found.values()):
        done = "left out of the earlier split" if near_duplicates == "drop" else "kept (data.near_duplicates=report)"
        log.warning("%s: near duplicates across splits, %s: %s", splits.name, done, found)
    report: dict[str, Any] = {**splits.overlap, "near": found, "near_duplicates": near_duplicates, "examples": examples}
    return replace(splits, train=list(kept["train"]), validation=list(kept["validation"]), overlap=report)


def duplicates(records: Collection[Record]) -> int:
    """Return how many records repeat the content of an earlier one."""
    return len(records) - len({content_key(record) for record in records})


def _shown(record: Record) -> str:
    text = " ".join(text_of_record(record).split())
    return text if len(text) <= 160 else text[:157] + "..."
