"""Files appear whole or not at all.

At the very bottom: a kill or a full disk in the middle of writing leaves the file that was there, or none, never half a
one. It knows names and bytes, nothing of what is in a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Give a hidden name to write to, which becomes ``path`` at the end of the block, or disappears if that fails.

    Args:
        path: The file to be; its folder is made if absent.

    Yields:
        The name to write to, in the same folder.
    """
    if path.exists() and not path.is_file():  # a pipe or a device is written to, not replaced
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield stage
        os.replace(stage, path)
    finally:
        stage.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file."""
    with appearing(path) as stage:
        stage.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write a text file in UTF-8."""
    with appearing(path) as stage:
        stage.write_text(content, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON that people can read: indented, letters as they are."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
