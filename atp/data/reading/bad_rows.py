"""Bad rows: what is done about a row that cannot be read or makes no record.

Reading goes on after a bad row where it can. Whoever reads decides what becomes of it: it is refused, which ends the
reading, or kept in a list with its place and the reason. It knows nothing of files, records or settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from atp.atomic import write_text
from atp.errors import UserError

OnBad = Callable[[str, UserError], None]
"""Takes the place of a bad row and what is wrong with it; may raise that."""

ON_ERROR = ("raise", "skip")
FILE = "skipped_rows.jsonl"
"""What a run keeps the rows in that it has skipped."""

_PLACE = re.compile(r"(?s)(?P<file>.*?)(?::| row | item )(?P<line>\d+)")


def refuse(where: str, error: UserError) -> None:
    """Raise what is wrong."""
    raise error


class BadRows:
    """A list of bad rows, each once however often it is read."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def __call__(self, where: str, error: UserError) -> None:
        """Take a bad row."""
        self.reasons[where] = str(error).removeprefix(f"{where}: ")

    def __len__(self) -> int:
        return len(self.reasons)

    def __str__(self) -> str:
        """Return how many there are and the first of them."""
        where, reason = next(iter(self.reasons.items()))
        return f"{len(self)} bad rows skipped (data.on_error=skip); the first: {where}: {reason}"


def bad_rows_of(on_error: str) -> OnBad:
    """Return what ``data.on_error`` asks for: what refuses bad rows, or a list of them.

    Raises:
        ValueError: It asks for something else.
    """
    if on_error not in ON_ERROR:
        raise UserError(f"data.on_error={on_error!r} is unknown; choose one of {ON_ERROR}")
    return BadRows() if on_error == "skip" else refuse


def write_bad_rows(path: Path, reasons: Mapping[str, str]) -> None:
    """Write ``file``, ``line`` (or row) and ``reason`` of bad rows as JSON lines."""
    lines = []
    for where, reason in reasons.items():
        place = _PLACE.fullmatch(where)
        file, line = (place["file"], int(place["line"])) if place else (where, None)
        lines.append(json.dumps({"file": file, "line": line, "reason": reason}) + "\n")
    write_text(path, "".join(lines))
