"""Streaming: training data larger than memory.

Records are read from their files anew at every pass; their split is a function of their content alone, so that no list
of them is needed to carve test and validation records off. Their token ids go to
:mod:`atp.data.batches.store`. It sits beside :mod:`atp.data.sources`. It knows nothing of torch or models.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import itertools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from atp.data.reading.bad_rows import OnBad, refuse
from atp.data.reading.files import parsed
from atp.data.records import Record, Splits, content_key
from atp.data.records.overlap import HeldOutIndex, shown, tell_near_duplicates
from atp.errors import UserError

log = logging.getLogger(__name__)

MAX_HELD_OUT = 2000


class StreamedRecords(Collection[Record]):
    """Records that are read from files at every iteration.

    Args:
        files: The files, in order.
        parse: Makes a record of a row and its place.
        keep: Which records belong to it; None takes all.
        most: At most so many, the first.
        transform: What is done to each record that belongs to it, such as putting a prompt before it.
        bad: Takes bad rows, at every iteration.
        form: Format of the files in place of their suffixes.
    """

    def __init__(
        self,
        files: Sequence[Path],
        parse: Callable[[Any, str], Record],
        keep: Callable[[Record], bool] | None = None,
        most: int | None = None,
        transform: Callable[[Record], Record] | None = None,
        bad: OnBad = refuse,
        form: str | None = None,
    ) -> None:
        self.files, self.parse, self.keep, self.most, self.transform = list(files), parse, keep, most, transform
        self.bad, self.form = bad, form
        self._count: int | None = None

    def __iter__(self) -> Iterator[Record]:
        every = parsed(self.files, self.parse, self.bad, self.form)
        kept = every if self.keep is None else filter(self.keep, every)
        first = itertools.islice(kept, self.most)
        return first if self.transform is None else map(self.transform, first)

    def __len__(self) -> int:
        if self._count is None:
            self._count = sum(1 for _ in self)
        return self._count

    def __contains__(self, record: object) -> bool:
        return any(record == other for other in self)

    def limited(self, most: int | None) -> StreamedRecords:
        """Return the first ``most`` of the records; None keeps all."""
        return self if most is None else self._with(self.keep, most, self.transform)

    def transformed(self, transform: Callable[[Record], Record]) -> StreamedRecords:
        """Return the same records, each transformed."""
        return self._with(self.keep, self.most, transform)

    def kept(self, keep: Callable[[Record], bool]) -> StreamedRecords:
        """Return those of the records that ``keep`` takes."""
        return self._with(keep, self.most, self.transform)

    def _with(
        self,
        keep: Callable[[Record], bool] | None,
        most: int | None,
        transform: Callable[[Record], Record] | None,
    ) -> StreamedRecords:
        return StreamedRecords(self.files, self.parse, keep, most, transform, self.bad, self.form)


def stream_splits(
    records: StreamedRecords,
    held_out: Mapping[str, list[Record]],
    shares: Mapping[str, float],
    *,
    seed: int,
    near_duplicates: str,
    name: str,
) -> Splits:
    """Split a stream in one pass: records whose seeded content hash falls into a share are held out.

    At most :data:`MAX_HELD_OUT` records per split are held in memory, those of the lowest hashes.

    Args:
        records: The stream.
        held_out: Validation and test records that have files of their own.
        shares: Share carved off for each of the others.
        seed: Which split.
        near_duplicates: ``drop`` near duplicates of held-out records from training, ``report`` or ``ignore`` them.
        name: Name of the data set.

    Raises:
        ValueError: The shares are out of range, or a split turns out empty.
    """
    carved = {split: share for split, share in shares.items() if split not in held_out}
    if any(not 0 < share < 1 for share in carved.values()) or sum(carved.values()) >= 1:
        raise UserError(f"{name}: the fractions to carve off are {carved}; each must lie in (0, 1), their sum below 1")
    split_of = functools.partial(_split_of, dict(zip(carved, itertools.accumulate(carved.values()), strict=True)), seed)
    parts = {**_carve(records, list(carved), split_of, seed), **held_out}
    for split, found in parts.items():
        if not found:
            raise UserError(
                f"the {split} split of {name!r} is empty; raise data.{split}_fraction or give a file of its own"
            )
    given = {content_key(record) for some in held_out.values() for record in some}
    trained = (record for record in records if split_of(record) == "train")
    held = [*parts["test"], *parts["validation"]]
    index = HeldOutIndex(held, trained) if near_duplicates != "ignore" else None
    rule = _Training(split_of, given, index, drop=near_duplicates == "drop")
    train = records.kept(rule)
    left, counts = len(train), dict(rule.counts)
    if not left and not counts["near"]:
        why = f": {counts['exact']} also stand in a later split" if counts["exact"] else ""
        raise UserError(f"the train split of {name!r} is empty{why}; give more records or another data.path")
    near = {"train_held_out": counts["near"]}
    report = {
        "exact_dropped": {"train": counts["exact"], "validation": 0},
        "near": near,
        "near_duplicates": near_duplicates,
        "examples": list(rule.examples),
    }
    tell_near_duplicates(name, near, rule.examples, near_duplicates, {"training": (left + counts["near"], left)})
    log.info("%s: streaming %d training records; overlap: %s", name, left, near)
    return Splits(train, parts["validation"], parts["test"], name, report)


class _Training:
    """Which records of a stream are trained on; counts those that are left out."""

    def __init__(
        self, split_of: Callable[[Record], str], given: Collection[str], index: HeldOutIndex | None, *, drop: bool
    ) -> None:
        self.split_of, self.given, self.index, self.drop = split_of, given, index, drop
        self.counts = {"exact": 0, "near": 0}
        self.examples: list[dict[str, str]] = []

    def __call__(self, record: Record) -> bool:
        if self.split_of(record) != "train":
            return False
        if content_key(record) in self.given:
            self.counts["exact"] += 1
            return False
        owner = None if self.index is None else self.index.find(record)
        if self.index is not None and owner is not None:
            self.counts["near"] += 1
            if not self.examples:
                self.examples.append({"train": shown(record), "held out": shown(self.index.records[owner])})
        return owner is None or not self.drop


def _split_of(bounds: Mapping[str, float], seed: int, record: Record) -> str:
    place = _fraction(record, seed)
    return next((split for split, bound in bounds.items() if place < bound), "train")


def _carve(
    records: StreamedRecords, splits: Sequence[str], split_of: Callable[[Record], str], seed: int
) -> dict[str, list[Record]]:
    """One pass: the records of the splits to carve off, of each those of the lowest hashes, in the stream's order."""
    found: dict[str, dict[str, Record]] = {split: {} for split in splits}
    highest: dict[str, list[tuple[float, str]]] = {split: [] for split in splits}  # negated: the highest hash on top
    for record in records:
        split, key = split_of(record), content_key(record)
        if split not in found:
            continue
        if key not in found[split]:
            heapq.heappush(highest[split], (-_fraction(record, seed), key))
        found[split][key] = record
        if len(found[split]) > MAX_HELD_OUT:
            del found[split][heapq.heappop(highest[split])[1]]
    return {split: list(kept.values()) for split, kept in found.items()}


def _fraction(record: Record, seed: int) -> float:
    """A number in [0, 1) that a record's content and the seed decide."""
    digest = hashlib.sha256(f"{seed}:{content_key(record)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
