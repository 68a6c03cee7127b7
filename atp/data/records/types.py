"""The types of records, how a raw one is checked, and when two hold the same.

A record is plain text, a prompt with its completion, or a prompt with choices. It sits first in the flow:
:mod:`atp.data.sources` -> records -> :mod:`atp.data.encoding` -> :mod:`atp.data.batches` and :mod:`atp.evaluate`. It
knows nothing of files, tokens, models, torch or the network.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from atp.errors import UserError

SHAPES = '{"text"}, {"prompt", "completion"}, {"prompt", "choices", "label"} or {"messages"}'
PathLike = str | os.PathLike[str]
Frame = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TextRecord:
    """Running text; every token counts in the loss."""

    text: str
    task: str = "text"


@dataclass(frozen=True)
class CompletionRecord:
    """A prompt and the completion to learn; concatenated as they are, without a separator.

    Attributes:
        prompt: What is given.
        completion: What is to follow.
        task: The group its metrics go by.
        frame: Stretches of the prompt, as (start, end) in characters, that a chat template wrote: there the names of
            control tokens mean the tokens, everywhere else they are text. The template has also written what begins the
            sequence.
        end: What a chat template writes after the answer, to be learnt in place of the end of sequence; empty for that.
    """

    prompt: str
    completion: str
    task: str = "completion"
    frame: Frame = ()
    end: str = ""


@dataclass(frozen=True)
class ChoiceRecord:
    """A prompt and candidate completions, ``choices[label]`` being right: trained on the right one, scored over all.

    ``frame`` and ``end`` as in :class:`CompletionRecord`.
    """

    prompt: str
    choices: tuple[str, ...]
    label: int
    task: str = "choice"
    frame: Frame = ()
    end: str = ""


@dataclass(frozen=True)
class ChatRecord:
    """A conversation; the assistant's turns count in the loss. It is written out by the model's own chat template.

    Attributes:
        messages: Turns with ``role``, ``content`` and what else the template may use (``tool_calls``, ``name``).
        tools: Tools that the assistant may call, as JSON schemas.
        where: Its place in the data, for messages.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    task: str = "chat"
    where: str = field(default="", compare=False)


Record = TextRecord | CompletionRecord | ChoiceRecord | ChatRecord


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
    named: dict[str, Any] = {"task": text_of(raw, "task", where)} if raw.get("task") is not None else {}
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
    raise UserError(
        f"{where}: no valid record, got the keys {sorted(map(str, raw))}; valid shapes: {SHAPES}; map other columns "
        "with data.fields"
    )


def as_completion(record: Record) -> Record:
    """Return a record whose right choice is its completion; others as they are."""
    if not isinstance(record, ChoiceRecord):
        return record
    return CompletionRecord(record.prompt, record.choices[record.label], record.task, record.frame, record.end)


def content_key(record: Record) -> str:
    """Return a digest that equal items share: without regard to case, white space, label or order of choices."""
    if isinstance(record, TextRecord):
        parts = [record.text]
    elif isinstance(record, CompletionRecord):
        parts = [record.prompt, record.completion]
    elif isinstance(record, ChatRecord):
        parts = [part for message in record.messages for part in (message["role"], spoken(message))]
    else:
        parts = [record.prompt, *sorted(record.choices)]
    plain = "\x1f".join(" ".join(part.split()).casefold() for part in parts)
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()


def all_text(record: Record) -> str:
    """Return all the text of a record."""
    if isinstance(record, TextRecord):
        return record.text
    if isinstance(record, CompletionRecord):
        return f"{record.prompt} {record.completion}"
    if isinstance(record, ChatRecord):
        return " ".join(map(spoken, record.messages))
    return " ".join((record.prompt, *record.choices))


def spoken(message: Mapping[str, Any]) -> str:
    """Return what a turn says, its calls of tools as JSON."""
    calls = message.get("tool_calls")
    text = str(message["content"])
    return f"{text} {json.dumps(calls, sort_keys=True, default=str)}" if calls else text


def check_text(text: str, name: str, where: str) -> None:
    """Refuse what is no valid Unicode text, or holds a NUL, which no text does; ValueError says where."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        why = f"not valid text (lone surrogate U+{code:04X} after {error.start} characters); mend it or leave it out"
        if 0xDC80 <= code <= 0xDCFF:  # how a byte that is not UTF-8 was read
            why = f"not UTF-8 (byte 0x{code - 0xDC00:02x}); save the file as UTF-8"
        raise UserError(f"{where}: {name} is {why}") from None
    if "\0" in text:
        raise UserError(
            f"{where}: {name} holds a NUL character after {text.index(chr(0))} characters; mend or leave the record out"
        )


def text_of(raw: Mapping[str, Any], key: str, where: str) -> str:
    """Return ``raw[key]``, which must be a string with something in it; ValueError otherwise."""
    value = raw.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} must be a string, got {kind(value)}")
    if not value.strip():
        raise UserError(f"{where}: {key} is empty; fill it in or leave the record out")
    check_text(value, key, where)
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
