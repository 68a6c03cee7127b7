"""Records: what a training or test item is, how a raw one is checked, and splits that share no content.

A record is plain text, a prompt with its completion, or a prompt with choices. This module types them and splits them
by content. It sits first in the flow: :mod:`atp.data.sources` -> records -> :mod:`atp.data.encoding` ->
:mod:`atp.data` and :mod:`atp.evaluate`. It knows nothing of files, tokens, models, torch or the network.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from atp.errors import UserError

log = logging.getLogger(__name__)

SHAPES = '{"text"}, {"prompt", "completion"} or {"prompt", "choices", "label"}'
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class TextRecord:
    """Running text; every token counts in the loss."""

    text: str
    task: str = "text"


@dataclass(frozen=True)
class CompletionRecord:
    """A prompt and the completion to learn; concatenated as they are, without a separator."""

    prompt: str
    completion: str
    task: str = "completion"


@dataclass(frozen=True)
class ChoiceRecord:
    """A prompt and candidate completions, ``choices[label]`` being right: trained on the right one, scored over all."""

    prompt: str
    choices: tuple[str, ...]
    label: int
    task: str = "choice"


Record = TextRecord | CompletionRecord | ChoiceRecord


@dataclass(frozen=True)
class Splits:
    """Records of one data set in three parts.

    Attributes:
        train: A list, or what reads the records anew at each iteration where they may not fit in memory.
        overlap: What the checks across splits found (:mod:`atp.data.overlap`).
    """

    train: Collection[Record]
    validation: list[Record]
    test: list[Record]
    name: str
    overlap: dict[str, Any] = field(default_factory=dict, compare=False)

    def counts(self) -> dict[str, int]:
        """Return the number of records per split."""
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}


def parse_record(raw: object, where: str) -> Record:
    """Check a raw record and make it a typed one.

    A record has a shape when it holds all keys of that shape; other keys are ignored. If several fit, choices win over
    a completion and a completion over plain text. The optional key ``task`` names the group its metrics go by.

    Args:
        raw: A JSON value that should be a dict of one of the three shapes.
        where: What to call its place in a message, e.g. ``train.jsonl:12``.

    Returns:
        The typed record.

    Raises:
        ValueError: No shape fits, a value has the wrong type or is empty, or the label names no choice.
    """
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: a record must be a JSON object, got {kind(raw)}; valid shapes: {SHAPES}")
    named = {"task": text_of(raw, "task", where)} if raw.get("task") is not None else {}
    if {"prompt", "choices", "label"} <= raw.keys():
        prompt, choices = text_of(raw, "prompt", where), raw["choices"]
        if not isinstance(choices, Sequence) or isinstance(choices, str) or len(choices) < 2:
            raise UserError(f"{where}: choices must be a list of at least two strings, got {kind(choices)}")
        texts = tuple(text_of({f"choices[{i}]": text}, f"choices[{i}]", where) for i, text in enumerate(choices))
        return ChoiceRecord(prompt, texts, _label(raw["label"], len(texts), where), **named)
    if {"prompt", "completion"} <= raw.keys():
        return CompletionRecord(text_of(raw, "prompt", where), text_of(raw, "completion", where), **named)
    if "text" in raw:
        return TextRecord(text_of(raw, "text", where), **named)
    raise UserError(f"{where}: no valid record, got the keys {sorted(map(str, raw))}; valid shapes: {SHAPES}")


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


def as_completion(record: Record) -> Record:
    """Return a record whose right choice is its completion; others as they are."""
    if not isinstance(record, ChoiceRecord):
        return record
    return CompletionRecord(record.prompt, record.choices[record.label], record.task)


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


def content_key(record: Record) -> str:
    """Return a digest that equal items share: without regard to case, white space, label or order of choices."""
    if isinstance(record, TextRecord):
        parts = [record.text]
    elif isinstance(record, CompletionRecord):
        parts = [record.prompt, record.completion]
    else:
        parts = [record.prompt, *sorted(record.choices)]
    plain = "\x1f".join(" ".join(part.split()).casefold() for part in parts)
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()


def text_of(raw: Mapping[str, Any], key: str, where: str) -> str:
    """Return ``raw[key]``, which must be a string with something in it; ValueError otherwise."""
    value = raw.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} must be a string, got {kind(value)}")
    if not value.strip():
        raise UserError(f"{where}: {key} is empty; fill it in or leave the record out")
    return value


def kind(value: object) -> str:
    """Return a short description of a value for a message: its type and how it begins."""
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _label(value: object, choices: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where}: label must be an integer, the position of the right choice, got {kind(value)}")
    if not 0 <= value < choices:
        raise UserError(f"{where}: label {value} is out of range for {choices} choices (0 to {choices - 1})")
    return value


def _rank(key: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()
