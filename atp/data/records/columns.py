"""Columns: how a row of the user's own file becomes a record, with a mapping of columns where they are named otherwise.

It sits between :mod:`atp.data.reading.files` and :mod:`atp.data.sources`. It knows the three shapes of a
record and Jinja, and nothing of files, splits or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2

from atp.data.records.shapes import SHAPE_NAMES, Recognised, recognise
from atp.data.records.types import SHAPES, Record, kind, parse_record
from atp.data.tasks import ENVIRONMENT, label_of, nearest
from atp.errors import UserError

KEYS = ("text", "prompt", "completion", "choices", "label", "messages", "tools", "task")


class RowParser:
    """Makes a record of a row and its ``file:line``, and remembers what it took the columns for.

    Args:
        fields: Record key to the row's column; to a Jinja template over its columns, where the value holds ``{{``; or,
            for choices, to a list of those. With it, only our own keys are looked at.
        shape: What columns mean, one of :data:`atp.data.records.shapes.SHAPE_NAMES`.
        check: Raises UserError for a record that cannot be used.

    Raises:
        ValueError: A key that no record has, a template that is not valid Jinja, or an unknown shape.
    """

    def __init__(
        self,
        fields: Mapping[str, Any] | None = None,
        shape: str = "auto",
        check: Callable[[Record], None] | None = None,
    ) -> None:
        mapping = dict(fields or {})
        for key in mapping:
            if key not in KEYS:
                raise UserError(
                    f"data.fields maps {key!r}, which no record has; {nearest(str(key), KEYS)}; valid shapes: {SHAPES}"
                )
        if shape not in SHAPE_NAMES:
            raise UserError(f"data.shape={shape!r} is unknown; {nearest(shape, SHAPE_NAMES)}")
        self._readers = {key: _reader(key, value) for key, value in mapping.items()}
        self._shape, self._check = shape, check
        self._seen: dict[Recognised, tuple[str, set[str]]] = {}

    def __call__(self, row: Any, where: str) -> Record:
        """Return the record of a row.

        Raises:
            ValueError: The row makes no record.
        """
        if not isinstance(row, Mapping):
            return parse_record(row, where)
        if self._readers:
            row = {**row, **{key: read(row, where) for key, read in self._readers.items()}}
        if isinstance(row.get("choices"), Sequence) and isinstance(row.get("label"), str):
            choices = [str(choice) for choice in row["choices"]]
            row = {**row, "label": label_of(row["label"], [choice.strip() for choice in choices], where)}
        mapped = self._readers.keys() - {"task", "tools", "messages"}
        if mapped and self._shape == "auto":
            record = parse_record({key: row[key] for key in KEYS if key in row}, where)
        elif "messages" in self._readers:
            record = recognise(row, where, "chat")[1]
        else:
            recognised, record = recognise(row, where, self._shape)
            unused = set(map(str, row)) - {*recognised.columns, "task"}
            self._seen.setdefault(recognised, (where, set()))[1].update(unused)
        if self._check is not None:
            self._check(record)
        return record

    def told(self) -> list[str]:
        """Return what columns were taken for, a line for each way."""
        lines = []
        for recognised, (where, unused) in self._seen.items():
            more = f"; not used: {', '.join(sorted(unused))}" if unused else ""
            lines.append(
                f"columns {', '.join(recognised.columns)} (from {where} on) are read as {recognised.shape}: "
                f"{recognised.meaning}{more}; data.shape or data.fields changes that"
            )
        return lines


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
