"""Columns: how a row of the user's own file becomes a record, with a mapping of columns where they are named otherwise.

It sits between :mod:`atp.data.reading.files` and :mod:`atp.data.sources`. It knows the three shapes of a
record and Jinja, and nothing of files, splits or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2

from atp.data.records import SHAPES, Record, kind, parse_record
from atp.data.tasks import ENVIRONMENT, label_of, nearest
from atp.errors import UserError

KEYS = ("text", "prompt", "completion", "choices", "label", "task")


def record_parser(fields: Mapping[str, Any] | None = None) -> Callable[[Any, str], Record]:
    """Return what makes a record of a row and its ``file:line``.

    Args:
        fields: Record key to the row's column; to a Jinja template over its columns, where the value holds ``{{``; or,
            for choices, to a list of those.

    Raises:
        ValueError: A key that no record has, or a template that is not valid Jinja.
    """
    mapping = dict(fields or {})
    for key in mapping:
        if key not in KEYS:
            raise UserError(
                f"data.fields maps {key!r}, which no record has; {nearest(str(key), KEYS)}; valid shapes: {SHAPES}"
            )
    readers = {key: _reader(key, value) for key, value in mapping.items()}

    def parse(row: Any, where: str) -> Record:
        if isinstance(row, Mapping) and readers:
            row = {**row, **{key: read(row, where) for key, read in readers.items()}}
        if isinstance(row, Mapping) and isinstance(row.get("choices"), Sequence) and isinstance(row.get("label"), str):
            choices = [str(choice) for choice in row["choices"]]
            row = {**row, "label": label_of(row["label"], [choice.strip() for choice in choices], where)}
        return parse_record(row, where)

    return parse


def _reader(key: str, value: Any) -> Callable[[Mapping[str, Any], str], Any]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        parts = [_reader(key, part) for part in value]
        return lambda row, where: [part(row, where) for part in parts]
    if not isinstance(value, str):
        raise UserError(f"data.fields.{key} must be a column or a template, got {kind(value)}")
    if "{{" not in value and "{%" not in value:
        return lambda row, where: _column(row, value, where)
    try:
        template = ENVIRONMENT.from_string(value)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"data.fields.{key} is not valid Jinja ({error.message}): {value!r}") from None

    def render(row: Mapping[str, Any], where: str) -> str:
        try:
            return template.render(**row)
        except jinja2.UndefinedError as error:
            raise UserError(
                f"{where}: data.fields.{key}: {error.message}; the columns are {sorted(map(str, row))}"
            ) from None
        except (TypeError, ValueError, AttributeError, jinja2.TemplateError) as error:
            raise UserError(f"{where}: data.fields.{key} cannot be made of this record: {error}") from None

    return render


def _column(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise UserError(f"{where}: data.fields names the columns [{column!r}]; the record has {sorted(map(str, row))}")
    return row[column]
