"""Opening: the bytes of a user's file, unpacked where it is compressed.

At the bottom of reading. It tells what is no data though its name says so: a git-lfs pointer, UTF-16. It knows nothing
of what a file holds otherwise.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from atp.errors import UserError

COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PACKED = (".zst", ".zip", ".tar", ".tgz", ".7z", ".rar")
"""What is to be unpacked before."""

_LFS = b"version https://git-lfs.github.com/spec/"


def suffix_of(path: Path) -> str:
    """Return the suffix that says the format, in lower case, without that of the compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


@contextmanager
def open_binary(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to read its bytes.

    Raises:
        ValueError: It cannot be opened or unpacked, is a git-lfs pointer, or UTF-16.
    """
    opener = COMPRESSED.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            start = file.read(len(_LFS))
            _check(path, start)
            file.seek(0)
            yield file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason})") from None


def _check(path: Path, start: bytes) -> None:
    if start == _LFS:
        raise UserError(f"{path}: a git-lfs pointer, not the data itself; fetch it with `git lfs pull` in its folder")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}:1: UTF-16, not UTF-8; save the file as UTF-8")
