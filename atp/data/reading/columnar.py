"""Columnar files: rows of Parquet and Arrow files, and of folders that ``datasets`` has saved.

Sits under :mod:`atp.data.reading.files`; the place of a row is its number. It knows nothing of records.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atp.data.reading.opening import open_binary
from atp.errors import UserError

Row = tuple[Any, str]

SAVED = "state.json"
"""What ``datasets`` writes into a folder that holds one saved data set."""

_BATCH = 256


def parquet_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file.

    Raises:
        ValueError: It is none, is damaged, or two of its columns have one name.
    """
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with open_binary(path) as source, parquet.ParquetFile(source) as file:
            names = file.schema_arrow.names
            doubled = sorted({name for name in names if names.count(name) > 1})
            if doubled:
                raise UserError(f"{path}: the column {doubled[0]!r} stands twice; rename or remove one of them")
            for batch in file.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path} row {number}"
    except pyarrow.ArrowException as error:
        told = f"not a Parquet file ({error})" if not number else f"damaged after row {number} ({error})"
        raise UserError(f"{path}: {told}") from None


def saved_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of an Arrow file, or of a folder that ``Dataset.save_to_disk`` has written.

    Raises:
        ValueError: ``datasets`` cannot read it.
    """
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(str(path)) if path.is_dir() else Dataset.from_file(str(path))
    # Whatever is wrong inside (no rows' file, a cut one, an older layout), the folder is the user's to mend.
    except Exception as error:
        kind = "a data set saved by `datasets`" if path.is_dir() else "an Arrow file of `datasets`"
        raise UserError(
            f"{path}: cannot be read as {kind} ({type(error).__name__}: {error}); save it again with save_to_disk, or "
            "export it as JSONL or Parquet"
        ) from None
    assert isinstance(found, Dataset)
    for number, row in enumerate(found, start=1):
        yield row, f"{path} row {number}"
