"""Splits: records of one data set in three parts that share no content.

They are made by content: neither file order nor chance decides where a record goes. It sits after
:mod:`atp.data.records.types`. It knows nothing of files, tokens or models.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from atp.data.records.types import ChoiceRecord, Record, content_key
from atp.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """Records of one data set in three parts.

    Attributes:
        train: A list, or what reads the records anew at each iteration where they may not fit in memory.
        overlap: What the checks across splits found (:mod:`atp.data.records.overlap`).
        notes: What is to be said of where the records are from, a line each.
        skipped: Place of each row that was left out as bad, and what is wrong with it.
    """

    train: Collection[Record]
    validation: list[Record]
    test: list[Record]
    name: str
    overlap: dict[str, Any] = field(default_factory=dict, compare=False)
    notes: Sequence[str] = field(default=(), compare=False)
    skipped: Mapping[str, str] = field(default_factory=dict, compare=False)

    def counts(self) -> dict[str, int]:
        """Return the number of records per split."""
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}


def carve(
    records: Sequence[Record], fractions: Mapping[str, float], *, seed: int, where: str
) -> tuple[list[Record], dict[str, list[Record]]]:
    """Split named shares off, by content.

    Contents are ordered by a seeded hash, so the result depends on neither file order nor chance, and records of equal
    content stay together.

    Args:
        records: What to split.
        fractions: Share of the distinct contents per part, each in (0, 1), together below 1; a part gets at least one.
        seed: Which split.
        where: What to call the records in a message.

    Returns:
        The rest, and the parts by name; all in the given order.

    Raises:
        ValueError: A fraction is out of range, or there are no more distinct contents than parts.
    """
    if any(not 0 < share < 1 for share in fractions.values()) or sum(fractions.values()) >= 1:
        raise UserError(
            f"{where}: the fractions to carve off are {dict(fractions)}; each must lie in (0, 1) and their sum below 1"
        )
    ranked = sorted({content_key(record) for record in records}, key=lambda key: _rank(key, seed))
    if len(ranked) <= len(fractions):
        raise UserError(
            f"{where}: {len(ranked)} distinct records are too few to carve {sorted(fractions)} off; "
            "give more records, or files of their own (data.validation_path, data.test_path)"
        )
    owner: dict[str, str] = {}
    for i, (part, share) in enumerate(fractions.items()):
        parts_to_come = len(fractions) - i
        room = len(ranked) - len(owner) - parts_to_come
        size = min(max(1, round(share * len(ranked))), room)
        owner.update(dict.fromkeys(ranked[len(owner) : len(owner) + size], part))
    parts: dict[str, list[Record]] = {part: [] for part in fractions}
    rest: list[Record] = []
    for record in records:
        parts.get(owner.get(content_key(record), ""), rest).append(record)
    return rest, parts


def separate(splits: Splits) -> Splits:
    """Drop from training what validation or test holds, and from validation what test holds; log how many went."""
    tested = {content_key(record) for record in splits.test}
    validation = [record for record in splits.validation if content_key(record) not in tested]
    held_out = tested | {content_key(record) for record in validation}
    train = [record for record in splits.train if content_key(record) not in held_out]
    dropped = (len(splits.train) - len(train), len(splits.validation) - len(validation))
    if any(dropped):
        log.warning(
            "%s: left out %d training and %d validation records that a later split also holds", splits.name, *dropped
        )
    counts = {"train": dropped[0], "validation": dropped[1]}
    return replace(splits, train=train, validation=validation, overlap={**splits.overlap, "exact_dropped": counts})


def limit(records: Sequence[Record], most: int | None, seed: int) -> list[Record]:
    """Return at most ``most`` records, chosen by a seeded hash of their content, in the given order; None keeps all."""
    if most is not None and most < 1:
        raise UserError(f"a limit of {most} records leaves nothing; give at least 1, or null to keep all of them")
    if most is None or len(records) <= most:
        return list(records)
    order = sorted(range(len(records)), key=lambda i: (_rank(content_key(records[i]), seed), i))
    return [records[i] for i in sorted(order[:most])]


def few_shot(records: Sequence[Record], shots: int | None, seed: int) -> list[Record]:
    """Return at most ``shots`` records of each task, those of choices spread over the labels; None keeps all.

    Which ones depends on the seed and their content alone; the order stays the given one.
    """
    if shots is None:
        return list(records)
    if shots < 1:
        raise UserError(f"data.shots is {shots}; give at least 1, or null to keep all records")
    ranked = sorted(range(len(records)), key=lambda i: (_rank(content_key(records[i]), seed), i))
    seen: dict[tuple[str, int], int] = {}
    turns = []
    for i in ranked:
        record = records[i]
        group = (record.task, record.label if isinstance(record, ChoiceRecord) else 0)
        seen[group] = seen.get(group, 0) + 1
        turns.append((seen[group], i))
    taken: dict[str, list[int]] = {}
    for _, i in sorted(turns, key=lambda turn: turn[0]):
        taken.setdefault(records[i].task, []).append(i)
    return [records[i] for i in sorted(i for some in taken.values() for i in some[:shots])]


def _rank(key: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()
