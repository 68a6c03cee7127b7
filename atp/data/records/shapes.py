"""Shapes: what a row's columns mean, where they are named as data sets of the field name them.

A row is recognised by its columns, and the first way that fits in :data:`SHAPES` is taken; ``data.shape`` asks for one.
Sits between rows and :mod:`atp.data.records.types`. It knows nothing of files or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atp.data.records.chat import COLUMNS as CHAT_COLUMNS
from atp.data.records.chat import chat_record, column_of
from atp.data.records.types import CompletionRecord, Record, TextRecord, kind, parse_record, text_of
from atp.data.tasks import label_of
from atp.errors import UserError

ANSWERS = ("output", "response", "completion", "answer", "target")
REQUESTS = ("instruction", "prompt", "query", "input")
CONTEXTS = ("context", "passage", "input")


@dataclass(frozen=True)
class Recognised:
    """What a row was taken for.

    Attributes:
        shape: Its name in :data:`SHAPES`.
        columns: The columns that are used.
        meaning: How they are put together.
    """

    shape: str
    columns: tuple[str, ...]
    meaning: str


Reader = Callable[[Mapping[str, Any], str], tuple[Recognised, Record] | None]


def _first(row: Mapping[str, Any], names: Sequence[str], but: Sequence[str | None] = ()) -> str | None:
    return next((name for name in names if name in row and name not in but), None)


def _task(row: Mapping[str, Any], where: str, default: str) -> str:
    return text_of(row, "task", where) if row.get("task") is not None else default


def _native(*columns: str, name: str) -> Reader:
    def read(row: Mapping[str, Any], where: str) -> tuple[Recognised, Record] | None:
        if not all(column in row for column in columns):
            return None
        only = {column: row[column] for column in (*columns, "task") if column in row}
        return Recognised(name, columns, "as they are"), parse_record(only, where)

    return read


def _completion(row: Mapping[str, Any], where: str) -> tuple[Recognised, Record] | None:
    if "prompt" not in row or "completion" not in row:
        return None
    turns = row["prompt"], row["completion"]
    if all(isinstance(some, Sequence) and not isinstance(some, str) for some in turns):
        record = chat_record({**row, "messages": [*turns[0], *turns[1]]}, where, _task(row, where, "chat"))
        told = "a conversation; the assistant's turns are learnt"
        return Recognised("chat", ("prompt", "completion"), told), record
    return _native("prompt", "completion", name="completion")(row, where)


def _choice(row: Mapping[str, Any], where: str) -> tuple[Recognised, Record] | None:
    if "question" not in row or "choices" not in row or "answer" not in row or "prompt" in row:
        return _native("prompt", "choices", "label", name="choice")(row, where)
    choices, used = row["choices"], ("question", "choices", "answer")
    if not isinstance(choices, Sequence) or isinstance(choices, str):
        raise UserError(f"{where}: choices must be a list of strings, got {kind(choices)}; map it with data.fields")
    texts = [text_of({"choices": choice}, "choices", where).strip() for choice in choices]
    label = label_of(row["answer"], texts, where)
    prompt = f"Question: {text_of(row, 'question', where).strip()}\nAnswer:"
    raw = {"prompt": prompt, "choices": [f" {text}" for text in texts], "label": label, "task": row.get("task")}
    return Recognised("choice", used, "prompt: 'Question: ...', 'Answer:'"), parse_record(raw, where)


def _chat(row: Mapping[str, Any], where: str) -> tuple[Recognised, Record] | None:
    column = column_of(row)
    if column is None:
        return None
    columns = (column, *(name for name in ("tools", "system") if row.get(name)))
    record = chat_record(row, where, _task(row, where, "chat"))
    return Recognised("chat", columns, "a conversation; the assistant's turns are learnt"), record


def _instruction(row: Mapping[str, Any], where: str) -> tuple[Recognised, Record] | None:
    request = _first(row, REQUESTS)
    answer = _first(row, ANSWERS)
    if request is None or answer is None or {request, answer} == {"prompt", "completion"}:
        return None
    more = _first(row, CONTEXTS, (request,)) if request in ("instruction", "prompt") else None
    before = [name for name in ("system",) if str(row.get(name) or "").strip()]
    parts = [text_of(row, name, where).strip() for name in (*before, request)]
    if more is not None and str(row[more] or "").strip():
        parts.append(text_of(row, more, where).strip())
    used = (*before, request, *([more] if more else []), answer)
    told = f"prompt: {', '.join(used[:-1])}, each with an empty line after it; completion: {answer}"
    prompt = "".join(f"{part}\n\n" for part in parts)
    record = CompletionRecord(prompt, text_of(row, answer, where).strip(), _task(row, where, "completion"))
    return Recognised("instruction", used, told), record


def _question(row: Mapping[str, Any], where: str) -> tuple[Recognised, Record] | None:
    answer = _first(row, ("answer", "response", "output"))
    if "question" not in row or answer is None or "choices" in row:
        return None
    context = _first(row, ("context", "passage"))
    before = ""
    if context is not None and str(row[context] or "").strip():
        before = text_of(row, context, where).strip() + "\n\n"
    prompt = f"{before}Question: {text_of(row, 'question', where).strip()}\nAnswer:"
    used = (*([context] if context else []), "question", answer)
    told = f"prompt: {'the ' + context + ', ' if context else ''}'Question: ...', 'Answer:'; completion: {answer}"
    record = CompletionRecord(prompt, " " + text_of(row, answer, where).strip(), _task(row, where, "completion"))
    return Recognised("question", used, told), record


def _chosen(row: Mapping[str, Any], where: str) -> tuple[Recognised, Record] | None:
    if "chosen" not in row:
        return None
    used = ("prompt", "chosen") if "prompt" in row else ("chosen",)
    chosen = row["chosen"]
    if isinstance(chosen, str) and "prompt" in row:
        given = text_of(row, "prompt", where)
        record: Record = CompletionRecord(given, text_of(row, "chosen", where), _task(row, where, "completion"))
    elif isinstance(chosen, str):
        record = TextRecord(text_of(row, "chosen", where), _task(row, where, "text"))
    else:
        turns = [chosen] if isinstance(chosen, Mapping) and "content" in chosen else chosen
        prompt = row.get("prompt")
        if isinstance(prompt, str) and isinstance(turns, Sequence) and len(turns) == 1:
            turns = [{"role": "user", "content": prompt}, *turns]
        elif isinstance(prompt, Sequence) and not isinstance(prompt, str) and isinstance(turns, Sequence):
            turns = turns if list(turns[: len(prompt)]) == list(prompt) else [*prompt, *turns]
        record = chat_record({**row, "messages": turns}, where, _task(row, where, "chat"))
    return Recognised("chosen", used, "the chosen answer is learnt, the rejected one is not used"), record


SHAPES: dict[str, Reader] = {
    "choice": _choice,
    "completion": _completion,
    "chat": _chat,
    "question": _question,
    "instruction": _instruction,
    "text": _native("text", name="text"),
    "chosen": _chosen,
}
SHAPE_NAMES = ("auto", *SHAPES)

_WANTED = {
    "choice": "prompt, choices and label",
    "completion": "prompt and completion",
    "chat": " or ".join(CHAT_COLUMNS[:2]),
    "question": f"question and one of {', '.join(ANSWERS)}",
    "instruction": f"one of {', '.join(REQUESTS)} and one of {', '.join(ANSWERS)}",
    "text": "text",
    "chosen": "chosen",
}


def recognise(row: Mapping[str, Any], where: str, shape: str = "auto") -> tuple[Recognised, Record]:
    """Make a record of a row by what its columns mean.

    Args:
        row: Column to value.
        where: Its place.
        shape: One of :data:`SHAPE_NAMES`.

    Raises:
        ValueError: The columns mean nothing known, or preferences, which are not learnt from; or a value is wrong.
    """
    if shape != "auto":
        found = SHAPES[shape](row, where)
        if found is None:
            raise UserError(
                f"{where}: data.shape={shape} needs the columns {_WANTED[shape]}; the record has "
                f"{sorted(map(str, row))}"
            )
        return found
    _no_preferences(row, where)
    for name, reader in SHAPES.items():
        if name != "chosen":
            found = reader(row, where)
            if found is not None:
                return found
    parse_record(row, where)
    raise AssertionError(where)


def _no_preferences(row: Mapping[str, Any], where: str) -> None:
    """Refuse pairs of a better and a worse answer, and answers that are marked good or bad."""
    if "chosen" in row and "rejected" in row:
        raise UserError(
            f"{where}: preferences (chosen, rejected) are not learnt from; data.shape=chosen learns the chosen "
            "answers, data.fields={prompt: COLUMN, completion: COLUMN} other columns"
        )
    if {"prompt", "completion"} <= row.keys() and isinstance(row.get("label"), bool):
        raise UserError(
            f"{where}: answers marked good or bad (a label of true or false) are not learnt from; keep the good ones, "
            "or say data.shape=completion to learn all"
        )
