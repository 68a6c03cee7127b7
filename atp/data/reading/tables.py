"""Tables: rows of CSV and TSV files, one at a time, each with the line that it begins on.

CSV is quoted as RFC 4180 and Python's ``csv`` have it. TSV has no quotes by convention (IANA, tab-separated-values): a
double quote is a letter, unless the file as a whole is quoted as spreadsheets and pandas write it. Sits under
:mod:`atp.data.reading.files`. It knows nothing of records.

A quote that is not closed swallows the lines after it. Such a row is an error that names the line where the quote
opens, and reading can go on with the line after.
"""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atp.data.reading.bad_rows import OnBad
from atp.data.reading.opening import open_binary
from atp.errors import UserError

Row = tuple[Any, str]

_LONG = 25
"""Lines of one row, each of them a row by itself, that no file has by chance."""

_MANY = 0.2
"""Share of rows over several lines that stray quotes do not make."""

_WRAPPED = re.compile(r'"(?:[^"]|"")*"')


def table_rows(path: Path, delimiter: str, header: Sequence[str] | None, bad: OnBad) -> Iterator[Row]:
    """Yield the rows of a table as dicts of column to text.

    Args:
        path: The file.
        delimiter: Between cells.
        header: Column names of a file that has no line of them.
        bad: Takes rows with too many or too few cells, and those with a quote that swallows others.

    Raises:
        ValueError: The file has no usable header.
    """
    limit = csv.field_size_limit(2**31 - 1)
    quoted = delimiter != "\t" or _is_quoted(path)
    try:
        columns = None if header is None else _columns(path, 1, header, delimiter)
        for cells, number in _cells(path, delimiter, quoted, columns, bad):
            where = f"{path}:{number}"
            if columns is None:
                columns = _columns(path, number, cells, delimiter)
            elif len(cells) != len(columns):
                told = f"{where}: {len(cells)} cells, but the columns are {columns}; check the quoting"
                bad(where, UserError(told))
            else:
                yield dict(zip(columns, cells, strict=True)), where
    finally:
        csv.field_size_limit(limit)


def _columns(path: Path, number: int, cells: Sequence[str], delimiter: str) -> list[str]:
    """The names of columns, which must differ; a column without a name is called ``Unnamed: 0`` by its place."""
    names = [cell.strip() or f"Unnamed: {place}" for place, cell in enumerate(cells)]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UserError(f"{path}:{number}: the column {doubled[0]!r} stands twice; rename or remove one of them")
    other = next((mark for mark in (";", "\t", "|") if mark != delimiter and mark in names[0]), None)
    if len(names) == 1 and other is not None:
        raise UserError(
            f"{path}:{number}: one column {names[0]!r}; the columns seem to be separated by {other!r}, where .csv "
            "takes commas and .tsv tabs"
        )
    return names


class _Lines:
    """The lines of a file, of which some can be given back; counts those that rows are made of."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._returned: deque[str] = deque()
        self.taken: list[str] = []
        self.done = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._returned.popleft() if self._returned else next(self._lines)
        self.taken.append(line)
        return line

    def finish(self, keep: int | None = None) -> int:
        """Count the first ``keep`` lines taken (all if None), give the others back, return the number of the first."""
        first = self.done + 1
        kept = self.taken if keep is None else self.taken[:keep]
        self._returned.extendleft(reversed(self.taken[len(kept) :]))
        self.done += len(kept)
        self.taken = []
        return first


def _cells(
    path: Path, delimiter: str, quoted: bool, columns: Sequence[str] | None, bad: OnBad
) -> Iterator[tuple[list[str], int]]:
    """Yield the cells of each row that is not empty, with its line."""
    width = None if columns is None else len(columns)
    used: bool | None = None
    with _text(path) as text:
        lines = _Lines(iter(text))
        reader = _reader(lines, delimiter, quoted)
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                number, count = lines.done + 1, len(lines.taken)
                lines.finish(1)
                bad(f"{path}:{number}", _not_closed(path, number, count, error))
                reader = _reader(lines, delimiter, quoted)
                continue
            width = width or (len(cells) if any(cells) else None)
            count = len(lines.taken)
            if quoted and count > 1 and _each_is_a_row(lines.taken, delimiter, width):
                used = _writes_quotes(path, delimiter) if used is None else used
                if not used or (count >= _LONG and width != 1):
                    number = lines.finish(1)
                    bad(f"{path}:{number}", _swallowed(path, number, count))
                    reader = _reader(lines, delimiter, quoted)
                    continue
            number = lines.finish()
            if any(cell.strip() for cell in cells):
                yield cells, number


def _reader(lines: Iterator[str], delimiter: str, quoted: bool) -> Any:
    if quoted:
        return csv.reader(lines, delimiter=delimiter, strict=True)
    return csv.reader(lines, delimiter=delimiter, strict=True, quoting=csv.QUOTE_NONE)


def _not_closed(path: Path, number: int, count: int, error: csv.Error) -> UserError:
    if count == 1:
        return UserError(f"{path}:{number}: not valid {_format(path)} ({error})")
    return UserError(
        f"{path}:{number}: not valid {_format(path)}: a quote opens in this line and is not closed properly up to line "
        f"{number + count - 1} ({error}); double it or close it"
    )


def _swallowed(path: Path, number: int, count: int) -> UserError:
    return UserError(
        f"{path}:{number}: not valid {_format(path)}: a quote that opens in this line takes {count} lines, up to line "
        f"{number + count - 1}, as one row, though each of them is a row by itself; double the quote, or close it"
    )


def _format(path: Path) -> str:
    return "TSV" if ".tsv" in path.suffixes else "CSV"


def _each_is_a_row(lines: Sequence[str], delimiter: str, width: int | None) -> bool:
    """Whether each of several lines has as many cells as the table has columns."""
    return width is not None and all(line.count(delimiter) == width - 1 for line in lines)


def _writes_quotes(path: Path, delimiter: str) -> bool:
    """Whether whoever wrote the file quotes: some line holds a whole quoted cell, or many rows take several lines."""
    mark = re.escape(delimiter)
    whole = re.compile(rf'(?:^|{mark})"(?:[^"]|"")*"(?:{mark}|$)')
    with _text(path) as text:
        if any(whole.search(line.rstrip("\r\n")) for line in text if '"' in line):
            return True
    count = several = 0
    with _text(path) as text:
        reader = _reader(text, delimiter, quoted=True)
        before = 0
        try:
            for _ in reader:
                count += 1
                several += reader.line_num - before > 1
                before = reader.line_num
        except csv.Error:
            return False
    return several > _MANY * count


def _is_quoted(path: Path) -> bool:
    """Whether a TSV file is written with quotes.

    It is if its header, or all of a column, stands in quotes; if only quotes give all rows the same number of cells; or
    if a cell in quotes has doubled quotes within.
    """
    with _text(path) as text:
        if not any('"' in line for line in text):
            return False
    header: list[str] = []
    wrapped: list[bool] = []
    count, even, doubled = 0, True, False
    with _text(path) as text:
        for line in text:
            cells = line.rstrip("\r\n").split("\t")
            if not line.strip():
                continue
            whole = [_WRAPPED.fullmatch(cell) is not None for cell in cells]
            if not count:
                header, wrapped = cells, [True] * len(cells)
                if all(whole):
                    return True
            elif len(cells) != len(header):
                even = False
            else:
                wrapped = [before and now for before, now in zip(wrapped, whole, strict=True)]
                doubled = doubled or any(
                    '""' in cell[1:-1] for cell, is_whole in zip(cells, whole, strict=True) if is_whole
                )
            count += 1
    if even and ((count > 2 and any(wrapped)) or not doubled):
        return count > 2 and any(wrapped)
    try:
        with _text(path) as text:
            widths = [len(cells) for cells in _reader(text, "\t", quoted=True) if any(cell.strip() for cell in cells)]
    except csv.Error:
        return False
    return all(width == len(header) for width in widths) and (not even or len(widths) == count)


@contextmanager
def _text(path: Path) -> Iterator[io.TextIOWrapper]:
    """Open a file as text; bytes that are not UTF-8 become lone surrogates, which are found where records are made."""
    with open_binary(path) as file, io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
        yield text
