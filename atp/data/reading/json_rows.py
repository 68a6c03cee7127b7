"""JSON rows: JSON Lines, and a JSON array, one object at a time, each with the line that it begins on.

Sits under :mod:`atp.data.reading.files`. A key that stands twice in an object is an error: which one is meant, nobody
can tell. It knows nothing of records.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atp.data.reading.bad_rows import OnBad
from atp.data.reading.opening import open_binary
from atp.data.records.types import kind
from atp.errors import UserError

Row = tuple[Any, str]


class _DoubledKey(ValueError):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise _DoubledKey(f"the key {doubled!r} stands twice in an object; leave one of them out")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def jsonl_rows(path: Path, bad: OnBad) -> Iterator[Row]:
    """Yield the values of the lines that are not empty."""
    with open_binary(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    value = _line(line, where, first=number == 1)
                except UserError as error:
                    bad(where, error)
                else:
                    yield value, where


def _line(line: bytes, where: str, *, first: bool) -> Any:
    try:
        return _DECODER.decode(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start} of the line); save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON ({error.msg}, character {error.pos + 1}); a line must be one JSON object"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {error}") from None


def json_rows(path: Path, bad: OnBad) -> Iterator[Row]:
    """Yield the items of a JSON array; a file of one object a line, which ``.json`` often is, is read as JSON Lines."""
    if _is_lines(path):
        yield from jsonl_rows(path, bad)
        return
    with open_binary(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    if not text.strip():
        return
    yield from _items(path, text, bad)


def _items(path: Path, text: str, bad: OnBad) -> Iterator[Row]:
    place, line = _after_space(text, 0), 1
    line += text.count("\n", 0, place)
    if text[place] != "[":
        found = _value(path, text, place)[0]
        told = f"{kind(found)[:90]}"
        if isinstance(found, dict):
            told = f"an object with the keys {list(found)[:8]}"
        raise UserError(f"{path}: a .json file must hold a list of objects, or one object a line, got {told}")
    seen, place = place, _after_space(text, place + 1)
    if text[place : place + 1] == "]":
        _end(path, text, place + 1)
        return
    while True:
        line += text.count("\n", seen, place)
        seen, where = place, f"{path}:{line}"
        try:
            value, place = _value(path, text, place)
        except _DoubledKey as error:
            bad(where, UserError(f"{where}: {error}"))
            value, place = json.JSONDecoder().raw_decode(text, place)
        else:
            yield value, where
        place = _after_space(text, place)
        mark = text[place : place + 1]
        if mark == "]":
            _end(path, text, place + 1)
            return
        if mark != ",":
            _broken(path, text, place, "Expecting ',' delimiter" if mark else "the list does not end")
        place = _after_space(text, place + 1)


def _value(path: Path, text: str, place: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, place)
    except json.JSONDecodeError as error:
        _broken(path, text, error.pos, error.msg)
    except _DoubledKey:
        raise
    except (ValueError, RecursionError) as error:
        _broken(path, text, place, str(error))
    raise AssertionError


def _end(path: Path, text: str, place: int) -> None:
    if text[place:].strip():
        _broken(path, text, _after_space(text, place), "something follows the list")


def _broken(path: Path, text: str, place: int, why: str) -> None:
    line = text.count("\n", 0, place) + 1
    raise UserError(f"{path}:{line}: not valid JSON ({why}); one object a line is .jsonl")


def _after_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _is_lines(path: Path) -> bool:
    """Whether the first line that is not empty is an object by itself, and there are more of them."""
    with open_binary(path) as file:
        full = list(itertools.islice((line for line in file if line.strip()), 2))
    if len(full) < 2 or not full[1].lstrip().startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(full[0].decode("utf-8-sig")), dict)
    except ValueError:
        return False
