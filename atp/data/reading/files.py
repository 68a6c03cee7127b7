"""Files: rows of the user's files, one at a time, each with its place.

With its neighbours the only part of the data path that opens the user's files. It comes first: files ->
:mod:`atp.data.sources` (which makes records of rows). Rows are plain dicts and come with ``file:line``, so that every
later complaint can name its place. Nothing is read ahead, so a file may be larger than memory (a ``.json`` array may
not). It knows nothing of records, tasks or tokens.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from atp.data.reading.bad_rows import OnBad, refuse
from atp.data.reading.columnar import SAVED, parquet_rows, saved_rows
from atp.data.reading.json_rows import json_rows, jsonl_rows
from atp.data.reading.opening import COMPRESSED, PACKED, open_binary, suffix_of
from atp.data.reading.tables import table_rows
from atp.data.records.types import PathLike
from atp.errors import UserError

Row = tuple[Any, str]
"""A row's value, a mapping in every format but a JSONL line that holds something else, and its ``file:line``."""

FORMATS = {
    "jsonl": (".jsonl", ".ndjson"),
    "json": (".json",),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "text": (".txt", ".md", ".markdown"),
}
TEXT_SUFFIXES = FORMATS["text"]
ROW_SUFFIXES = tuple(suffix for name, suffixes in FORMATS.items() if name != "text" for suffix in suffixes)
_T = TypeVar("_T")


def paths_of(value: PathLike | Sequence[PathLike], field: str = "data.path") -> list[Path]:
    """Return the files that a setting names, by name or by a pattern with ``*``; a folder stands for itself.

    Raises:
        ValueError: The list is empty, or something named does not exist.
    """
    given = [value] if isinstance(value, str) or not isinstance(value, Sequence) else list(value)
    if not given:
        raise UserError(f"{field} is an empty list; name at least one file or folder")
    found: list[Path] = []
    for path in (Path(path).expanduser() for path in given):
        matching = sorted(map(Path, glob.glob(str(path), recursive=True))) if "*" in str(path) else [path]
        if not matching or not matching[0].exists():
            raise UserError(
                f"{path} does not exist (looked from {Path.cwd()}); set {field} to a file "
                f"({', '.join(ROW_SUFFIXES)}) or a folder of {', '.join(TEXT_SUFFIXES)} files"
            )
        found += matching
    return found


def is_saved(path: Path) -> bool:
    """Whether a folder is a data set that ``datasets`` has saved, which counts as one file."""
    return path.is_dir() and (path / SAVED).is_file()


def format_of(path: Path) -> str | None:
    """Return the format that a file's suffix tells, also under compression; None for one that is no data."""
    if is_saved(path):
        return "saved"
    suffix = suffix_of(path)
    return next((name for name, suffixes in FORMATS.items() if suffix in suffixes), None)


def rows(
    path: Path, *, header: Sequence[str] | None = None, bad: OnBad = refuse, form: str | None = None
) -> Iterator[Row]:
    """Yield the rows of a file, or of a folder that ``datasets`` has saved, in order.

    Args:
        path: A file whose suffix says its format (``.gz``, ``.bz2`` or ``.xz`` may follow); a text or Markdown file is
            one row ``{"text"}``.
        header: Column names of a CSV or TSV file that has no line of them.
        bad: Takes rows that cannot be read.
        form: One of :data:`FORMATS` in place of the suffix.

    Raises:
        ValueError: The format is unknown, or the file cannot be read on (named as ``file:line``).
    """
    own = format_of(path)
    form = own if form is None or own == "saved" else form
    if form == "jsonl":
        yield from jsonl_rows(path, bad)
    elif form == "json":
        yield from json_rows(path, bad)
    elif form in ("csv", "tsv"):
        yield from table_rows(path, "\t" if form == "tsv" else ",", header, bad)
    elif form == "parquet":
        yield from parquet_rows(path)
    elif form in ("arrow", "saved"):
        yield from saved_rows(path)
    elif form == "text":
        yield {"text": _text(path)}, f"{path}:1"
    elif path.suffix.lower() in PACKED:
        raise UserError(f"{path}: unpack it first; files may be compressed one by one ({', '.join(COMPRESSED)})")
    else:
        known = ", ".join((*ROW_SUFFIXES, *TEXT_SUFFIXES))
        raise UserError(
            f"{path}: unknown format {path.suffix!r}; use {known}, or say what it is: data.format={'|'.join(FORMATS)}"
        )


def parsed(
    files: Iterable[Path], parse: Callable[[Any, str], _T], bad: OnBad = refuse, form: str | None = None
) -> Iterator[_T]:
    """Yield what is made of the rows of files, in order.

    Args:
        files: The files.
        parse: Makes something of a row and its place; raises UserError for what it cannot use.
        bad: Takes rows that cannot be read or used.
        form: As for :func:`rows`.
    """
    for file in files:
        yield from made(rows(file, bad=bad, form=form), parse, bad)


def made(some: Iterable[Row], parse: Callable[[Any, str], _T], bad: OnBad = refuse) -> Iterator[_T]:
    """Yield what is made of rows, as :func:`parsed` does."""
    for row, where in some:
        try:
            found = parse(row, where)
        except UserError as error:
            bad(where, error)
        else:
            yield found


def _text(path: Path) -> str:
    with open_binary(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(f"{path}:{line}: holds a NUL character; this is no text, or remove it")
    return text.replace("\r\n", "\n").replace("\r", "\n")
