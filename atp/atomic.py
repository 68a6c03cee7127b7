"""Files appear whole or not at all.

At the very bottom: a kill or a full disk in the middle of writing leaves the file that was there, or none, never half a
one. A file that is replaced keeps its permissions, and a link to it stays a link. It knows names and bytes, nothing of
what is in a file.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Give a hidden name to write to, which becomes ``path`` at the end of the block, or disappears if that fails.

    Args:
        path: The file to write; its folder is made if absent.

    Yields:
        The name to write to, in the same folder. For a pipe or a device (``/dev/stdout``) it is ``path`` itself, since
        these are written to and cannot be replaced.

    Raises:
        IsADirectoryError: ``path`` is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield stage
        if path.exists():
            shutil.copymode(path, stage)
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
