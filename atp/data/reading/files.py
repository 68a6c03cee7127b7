"""Files: rows of JSONL, JSON, CSV, TSV, Parquet and folders of text, one at a time, each with its place.

The only part of the data path that opens the user's files. It comes first: files -> :mod:`atp.data.sources` (which
makes records of rows). Rows are plain dicts and come with ``file:line``, so that every later complaint can name its
place. Nothing is read ahead, so a file may be larger than memory. It knows nothing of records, tasks or tokens.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from atp.data.records.types import PathLike, kind
from atp.errors import UserError

Row = tuple[Any, str]
"""A row's value, a mapping in every format but a JSONL line that holds something else, and its ``file:line``."""

TEXT_SUFFIXES = (".txt", ".md", ".markdown")
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_PARQUET_BATCH = 256


def paths_of(value: PathLike | Sequence[PathLike], field: str = "data.path") -> list[Path]:
    """Return the files that a setting names; a folder stands for itself.

    Raises:
        ValueError: The list is empty, or something named does not exist.
    """
    given = [value] if isinstance(value, str) or not isinstance(value, Sequence) else list(value)
    if not given:
        raise UserError(f"{field} is an empty list; name at least one file or folder")
    found = [Path(path).expanduser() for path in given]
    for path in found:
        if not path.exists():
            raise UserError(
                f"{path} does not exist (looked from {Path.cwd()}); set {field} to a file "
                f"({', '.join(ROW_SUFFIXES)}) or a folder of {', '.join(TEXT_SUFFIXES)} files"
            )
    return found


def rows(path: Path, *, header: Sequence[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a file, or of a folder of text files, in order.

    Args:
        path: A file whose suffix says its format, or a folder: every text or Markdown file below it is one row
            ``{"text"}``; without any, the rows of its JSONL, JSON, CSV, TSV and Parquet files.
        header: Column names of a CSV or TSV file that has no line of them.

    Raises:
        ValueError: The format is unknown, the folder holds nothing, or a line is malformed (named as ``file:line``).
    """
    if path.is_dir():
        yield from _folder(path)
        return
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        yield from _jsonl(path)
    elif suffix == ".json":
        yield from _json(path)
    elif suffix in (".csv", ".tsv"):
        yield from _csv(path, "\t" if suffix == ".tsv" else ",", header)
    elif suffix == ".parquet":
        yield from _parquet(path)
    elif suffix in TEXT_SUFFIXES:
        yield {"text": _text(path)}, f"{path}:1"
    else:
        raise UserError(f"{path}: unknown format {suffix!r}; use {', '.join((*ROW_SUFFIXES, *TEXT_SUFFIXES))}")


def _folder(path: Path) -> Iterator[Row]:
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    texts = [file for file in files if file.suffix.lower() in TEXT_SUFFIXES]
    tables = [file for file in files if file.suffix.lower() in ROW_SUFFIXES]
    if not texts and not tables:
        raise UserError(f"{path} is a directory without {', '.join((*TEXT_SUFFIXES, *ROW_SUFFIXES))} files below it")
    for file in texts:
        yield {"text": _text(file)}, f"{file}:1"
    if not texts:
        for file in tables:
            yield from rows(file)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}:{number}"
                yield _decode(line, where, first=number == 1), where


def _decode(line: bytes, where: str, *, first: bool) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON ({error.msg}, character {error.pos + 1}); a line must be one JSON object"
        ) from None


def _json(path: Path) -> Iterator[Row]:
    """Yield the items of a JSON array; named by position, since items have no line of their own."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); one object a line is .jsonl") from None
    if not isinstance(content, list):
        raise UserError(f"{path}: a .json file must hold a list of objects, got {kind(content)}")
    for number, row in enumerate(content, start=1):
        yield row, f"{path} item {number}"


def _csv(path: Path, delimiter: str, header: Sequence[str] | None) -> Iterator[Row]:
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            columns = list(header) if header is not None else None
            for cells in reader:
                where = f"{path}:{reader.line_num}"
                if not any(cell.strip() for cell in cells):
                    continue
                if columns is None:
                    columns = cells
                elif len(cells) != len(columns):
                    raise UserError(f"{where}: {len(cells)} cells, but the columns are {columns}; check the quoting")
                else:
                    yield dict(zip(columns, cells, strict=True)), where
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid {path.suffix[1:].upper()} ({error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from None
    number = 0
    with file:
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield row, f"{path} row {number}"
