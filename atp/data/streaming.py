"""Streaming: training data larger than memory.

Records are read from their files anew at every pass; their split is a function of their content alone, so that no list
of them is needed to carve test and validation records off. Token ids go to a file on disk that is mapped into memory,
from which batches take examples in any order; a run over a stream therefore resumes like any other. It sits beside
:mod:`atp.data.sources` and :mod:`atp.data.batches`. It knows nothing of torch or models.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import itertools
import logging
import tempfile
import weakref
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from atp.data.encoding import Encoder, Example
from atp.data.files import rows
from atp.data.overlap import HeldOutIndex
from atp.data.records import Record, Splits, content_key
from atp.errors import UserError

log = logging.getLogger(__name__)

MAX_HELD_OUT = 2000
_CHUNK = 1024


class StreamedRecords(Collection[Record]):
    """Records that are read from files at every iteration.

    Args:
        files: The files, in order.
        parse: Makes a record of a row and its place.
        keep: Which records belong to it; None takes all.
        most: At most so many, the first.
        transform: What is done to each record that belongs to it, such as putting a prompt before it.
    """

    def __init__(
        self,
        files: Sequence[Path],
        parse: Callable[[Any, str], Record],
        keep: Callable[[Record], bool] | None = None,
        most: int | None = None,
        transform: Callable[[Record], Record] | None = None,
    ) -> None:
        self.files, self.parse, self.keep, self.most, self.transform = list(files), parse, keep, most, transform
        self._count: int | None = None

    def __iter__(self) -> Iterator[Record]:
        every = (self.parse(row, where) for file in self.files for row, where in rows(file))
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
        return self if most is None else StreamedRecords(self.files, self.parse, self.keep, most, self.transform)

    def transformed(self, transform: Callable[[Record], Record]) -> StreamedRecords:
        """Return the same records, each transformed."""
        return StreamedRecords(self.files, self.parse, self.keep, self.most, transform)


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
    index = HeldOutIndex([*parts["validation"], *parts["test"]]) if near_duplicates != "ignore" else None
    counts = {"exact": 0, "near": 0}

    def keep(record: Record) -> bool:
        if split_of(record) != "train":
            return False
        if content_key(record) in given:
            counts["exact"] += 1
            return False
        if index is not None and index.find(record) is not None:
            counts["near"] += 1
            return near_duplicates != "drop"
        return True

    train = StreamedRecords(records.files, records.parse, keep)
    if not len(train):
        raise UserError(f"the train split of {name!r} is empty; give more records or another data.path")
    report = {
        "exact_dropped": {"train": counts["exact"], "validation": 0},
        "near": {"train_held_out": counts["near"]},
        "near_duplicates": near_duplicates,
        "examples": [],
    }
    log.info("%s: streaming %d training records; overlap: %s", name, len(train), report["near"])
    return Splits(train, parts["validation"], parts["test"], name, report)


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


class TokenStore(Sequence[Example]):
    """Examples whose token ids lie in a file, mapped into memory; of each, a dozen bytes are held.

    Args:
        records: What to encode, in one pass.
        encoder: The encoder.
        loss_on: As for :meth:`atp.data.encoding.Encoder.encode`.
    """

    def __init__(self, records: Collection[Record], encoder: Encoder, loss_on: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="atp-tokens-")
        self._finalizer = weakref.finalize(self, self._folder.cleanup)
        path = Path(self._folder.name) / "tokens.bin"
        self._ends, self._contexts, self._bytes = array("q"), array("i"), array("i")
        source = iter(records)
        with path.open("wb") as file:
            end = 0
            while chunk := list(itertools.islice(source, _CHUNK)):
                for example in itertools.chain.from_iterable(encoder.encode(chunk, loss_on)):
                    if example.loss_tokens > 0:
                        file.write(example.input_ids.astype(np.int32).tobytes())
                        end += len(example.input_ids)
                        self._ends.append(end)
                        self._contexts.append(example.context)
                        self._bytes.append(example.text_bytes)
        self._ids = np.memmap(path, dtype=np.int32, mode="r") if end else np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def lengths(self) -> list[int]:
        """Return the tokens of each example."""
        return np.diff(np.frombuffer(self._ends, dtype=np.int64), prepend=0).tolist() if self._ends else []

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Return an example, or several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = self._ends[index - 1] if index else 0
        ids = np.array(self._ids[start : self._ends[index]])
        return Example(ids, self._contexts[index], self._bytes[index])


def _fraction(record: Record, seed: int) -> float:
    """A number in [0, 1) that a record's content and the seed decide."""
    digest = hashlib.sha256(f"{seed}:{content_key(record)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
