"""Chat records: conversations of several turns, as OpenAI and ShareGPT write them.

Rows with ``messages`` (``role``, ``content``) or ``conversations`` (``from``, ``value``) become one kind of record,
whose turns are named as chat templates name them. Sits between rows and :mod:`atp.data.records.types`. It knows nothing
of templates or tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from atp.data.records.types import ChatRecord, check_text, kind, text_of
from atp.errors import UserError

COLUMNS = ("messages", "conversations", "conversation")
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""The roles that data sets use, and what chat templates call them."""


def column_of(row: Mapping[str, Any]) -> str | None:
    """Return the column that holds a row's conversation."""
    return next((name for name in COLUMNS if row.get(name) is not None), None)


def chat_record(row: Mapping[str, Any], where: str, task: str = "chat") -> ChatRecord:
    """Make a record of a row with a conversation, and ``tools`` and ``system`` where it has any.

    Args:
        row: The row.
        where: Its place.
        task: The group that its metrics go by.

    Raises:
        ValueError: It is no list of turns, a role is unknown, a turn is empty or holds more than text, or there is no
            assistant's turn that follows another.
    """
    column = column_of(row)
    if column is None:
        raise UserError(f"{where}: no conversation; it stands in {' or '.join(COLUMNS[:2])}")
    turns = _list(row[column], column, where)
    messages = tuple(_message(turn, f"{column}[{place}]", where) for place, turn in enumerate(turns))
    if isinstance(row.get("system"), str) and row["system"].strip() and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": text_of(row, "system", where)}, *messages)
    tools = tuple(_tools(row.get("tools"), where))
    for place, message in enumerate(messages):
        if message["role"] in ("system", "developer") and place and messages[place - 1]["role"] != "system":
            raise UserError(f"{where}: {column}[{place}]: a {message['role']} turn stands at the beginning only")
    first = next((place for place, message in enumerate(messages) if message["role"] == "assistant"), None)
    if first is None:
        raise UserError(f"{where}: {column} holds no assistant's turn, so there is nothing to learn")
    if not any(message["role"] == "user" for message in messages[:first]):
        raise UserError(f"{where}: {column}[{first}]: the assistant speaks before any user's turn")
    return ChatRecord(messages, tools, task, where)


def _list(value: Any, name: str, where: str) -> Sequence[Any]:
    """A list of turns: as it is, as text of JSON, or as columns, which is how some tools store it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise UserError(f"{where}: {name} must be a list of turns, got {kind(value)}") from None
    if isinstance(value, Mapping) and value and all(isinstance(some, Sequence) for some in value.values()):
        sizes = {len(some) for some in value.values()}
        if len(sizes) == 1:
            value = [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if not isinstance(value, Sequence) or not value:
        raise UserError(f"{where}: {name} must be a list of turns, got {kind(value)}")
    return value


def _message(turn: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise UserError(f"{where}: {name} must be an object with role and content, got {kind(turn)}")
    told = turn.get("role", turn.get("from"))
    role = ROLES.get(told.strip().casefold()) if isinstance(told, str) else None
    if role is None:
        raise UserError(f"{where}: {name}: unknown role {told!r}; known: {', '.join(ROLES)}")
    if turn.get("weight") == 0 or turn.get("train") is False:
        raise UserError(
            f"{where}: {name}: turns that are not to be learnt (weight, train) are not supported; all of the "
            "assistant's turns are learnt"
        )
    content = _content(turn.get("content", turn.get("value")), name, where)
    kept = {key: value for key, value in turn.items() if key not in ("role", "from", "content", "value", "weight")}
    message: dict[str, Any] = {"role": role, "content": content}
    message |= {key: value for key, value in kept.items() if value is not None}
    if isinstance(message.get("function_call"), Mapping) and "tool_calls" not in message:
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], name, where)
    extras = {key: value for key, value in message.items() if key not in ("role", "content")}
    if extras:
        check_text(json.dumps(extras, ensure_ascii=False, default=str), name, where)
    if not content.strip() and role in ("user", "assistant") and not message.get("tool_calls"):
        raise UserError(f"{where}: {name}: the {role}'s turn is empty; fill it in or leave the record out")
    return message


def _content(value: Any, name: str, where: str) -> str:
    """The text of a turn, also where it is given in parts."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in value]
        other = [
            part.get("type")
            for part, text in zip(value, texts, strict=True)
            if isinstance(part, Mapping) and text is None
        ]
        if other or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{where}: {name}: content of the type {other or kind(value)} is not text; only text is learnt"
            )
        value = "".join(map(str, texts))
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {name}: content must be a string, got {kind(value)}")
    check_text(value, f"{name}.content", where)
    return value


def _calls(value: Any, name: str, where: str) -> list[Any]:
    """A turn's calls, their arguments as the objects that chat templates take."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, Sequence) or not all(isinstance(call, Mapping) for call in value):
        raise UserError(f"{where}: {name}: tool_calls must be a list of objects")
    found = []
    for call in value:
        call = {key: part for key, part in call.items() if part is not None}
        function = call.get("function")
        if isinstance(function, Mapping):
            call["function"] = {**function, "arguments": _arguments(function.get("arguments"))}
        elif "arguments" in call:
            call["arguments"] = _arguments(call["arguments"])
        found.append(call)
    return found


def _arguments(value: Any) -> Any:
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            return value
        return parsed if isinstance(parsed, dict) else value
    return {key: part for key, part in value.items() if part is not None} if isinstance(value, Mapping) else value


def _tools(value: Any, where: str) -> Sequence[Any]:
    """The tools that the assistant may call, as a list, also where they are stored as text of JSON."""
    if isinstance(value, str) and value.strip():
        text_of({"tools": value}, "tools", where)
        try:
            value = json.loads(value)
        except ValueError:
            raise UserError(f"{where}: tools must be a list of objects or that as JSON, got {kind(value)}") from None
    if value is None or value == "":
        return []
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not all(isinstance(tool, Mapping) for tool in value)
    ):
        raise UserError(f"{where}: tools must be a list of objects, got {kind(value)}")
    check_text(json.dumps(value, ensure_ascii=False, default=str), "tools", where)
    return value
