"""Opening a GGUF file: which file a path means, and its metadata and tensors, or a message that says what is wrong.

First of the GGUF reader. The header is read here (format: the specification in the ggml repository, version 2 and 3),
as every length in it is checked against the file's before it is believed, so that a file cut short says so; the
``gguf`` package de-quantises the numbers. Knows nothing of models.
"""

from __future__ import annotations

import importlib
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atp.errors import UserError

MAGIC = b"GGUF"
SUFFIX = ".gguf"
VERSIONS = (2, 3)
_LISTED = 4
_OF_ANOTHER = ("config.json", ".hydra", "pruned")
"""What a directory in Hugging Face layout, or of a run, has beside its exports."""
_SCALARS = ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "?", "string", "array", "u8", "i8", "f8")
"""Types of metadata, by their number."""
_MOST_AXES = 4


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one of a directory that is neither a model nor a run.

    A file is known by its first bytes, whatever its name. None means that the path is something else.

    Raises:
        ValueError: The directory holds several GGUF files.
    """
    if path.is_file():
        return path if path.suffix.lower() == SUFFIX or _begins(path) == MAGIC else None
    if not path.is_dir() or any((path / name).exists() for name in _OF_ANOTHER):
        return None
    files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() == SUFFIX)
    if len(files) > 1:
        more = f" and {len(files) - _LISTED} more" if len(files) > _LISTED else ""
        raise UserError(
            f"model.path={path} holds {len(files)} GGUF files ({', '.join(file.name for file in files[:_LISTED])}"
            f"{more}); name one of them: model.path={files[0]}"
        )
    return files[0] if files else None


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(MAGIC))


@dataclass(frozen=True)
class _Stored:
    """Where a tensor's bytes are."""

    shape: tuple[int, ...]
    type: Any
    start: int
    length: int


class GgufFile:
    """A GGUF file whose header was read and found whole.

    Args:
        path: The file.

    Attributes:
        path: The file.
        metadata: Values by name.
        shapes: Shape of every tensor, rows first, by name.

    Raises:
        ValueError: The ``gguf`` package is missing, or this is no whole GGUF file of one part that holds a model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._gguf = _library()
        begins = _begins(path)
        if begins != MAGIC:
            kind = "is empty" if not begins else f"begins with {begins!r}"
            raise UserError(f"{path} is not a GGUF file: it {kind}, not with {MAGIC!r}")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as bytes_:
            header = _Header(path, bytes_)
            self.metadata = header.metadata()
            self._stored = header.tensors(self._gguf, int(self.value("general.alignment", 32)))
        self.shapes = {name: stored.shape for name, stored in self._stored.items()}
        self._refuse_parts()

    def _refuse_parts(self) -> None:
        if int(self.value("split.count", 0)) > 1:
            raise UserError(
                f"{self.path} is one of {self.value('split.count')} parts of a model; merge them first: "
                f"llama-gguf-split --merge {self.path.name} WHOLE.gguf"
            )
        kind = self.value("general.type", "model")
        if kind != "model":
            raise UserError(f"{self.path} holds a GGUF of type {kind!r}, not a model; give the model's own file")

    def value(self, key: str, default: Any = None) -> Any:
        """A value of the metadata; ``default`` where the file has none."""
        return self.metadata.get(key, default)

    def needed(self, key: str) -> Any:
        """A value of the metadata that must be there.

        Raises:
            ValueError: It is not.
        """
        if key not in self.metadata:
            raise UserError(f"{self.path} lacks {key} in its metadata, which llama.cpp needs too; export it again")
        return self.metadata[key]

    def tensor(self, name: str) -> np.ndarray:
        """A tensor, de-quantised to float32, read now.

        Raises:
            ValueError: Its type is not known to the ``gguf`` package.
        """
        stored = self._stored[name]
        with self.path.open("rb") as file:
            file.seek(stored.start)
            raw = np.fromfile(file, np.uint8, stored.length)
        rows = raw.reshape(*stored.shape[:-1], -1)
        try:
            values = self._gguf.quants.dequantize(rows, stored.type)
        except NotImplementedError as error:
            raise UserError(
                f"{self.path}: {name} is stored as {stored.type.name}, which the gguf package cannot de-quantise; take "
                "a file of another type (Q8_0, F16), or a newer gguf"
            ) from error
        return np.ascontiguousarray(values, dtype=np.float32).reshape(stored.shape)


class _Header:
    """Reads a header from its start to its end."""

    def __init__(self, path: Path, bytes_: mmap.mmap) -> None:
        self._path, self._bytes, self._at = path, bytes_, len(MAGIC)
        version = self._number("u4")
        if version not in VERSIONS:
            order = " (or of the other byte order)" if version & 0xFFFF == 0 else ""
            raise UserError(
                f"{path} is GGUF of version {version}{order}; versions {VERSIONS} are read: export it again"
            )
        self._tensor_count, self._value_count = self._number("u8"), self._number("u8")

    def metadata(self) -> dict[str, Any]:
        """Values by name; numbers as Python's."""
        return {self._string(): self._value(self._number("u4")) for _ in range(self._value_count)}

    def tensors(self, gguf: Any, alignment: int) -> dict[str, _Stored]:
        """Where the tensors are, all of them within the file."""
        described = []
        for _ in range(self._tensor_count):
            name, axes = self._string(), self._number("u4")
            if not 0 < axes <= _MOST_AXES:
                raise self._damaged(f"{name} has {axes} axes")
            sizes = tuple(self._number("u8") for _ in range(axes))
            described.append((name, sizes[::-1], self._number("u4"), self._number("u8")))
        if alignment < 1:
            raise self._damaged(f"its alignment is {alignment}")
        start = -(-self._at // alignment) * alignment
        found = {}
        for name, shape, number, offset in described:
            try:
                kind = gguf.GGMLQuantizationType(number)
            except ValueError:
                raise UserError(f"{self._path}: {name} is stored as type {number}, which gguf does not know") from None
            block, size = gguf.GGML_QUANT_SIZES[kind]
            length = math.prod(shape) // block * size
            if shape[-1] % block or start + offset + length > len(self._bytes):
                raise self._damaged(f"{name} would end at byte {start + offset + length}")
            found[name] = _Stored(shape, kind, start + offset, length)
        return found

    def _value(self, number: int) -> Any:
        if number >= len(_SCALARS):
            raise self._damaged(f"a value is of type {number}")
        kind = _SCALARS[number]
        if kind == "string":
            return self._string()
        return self._list() if kind == "array" else self._number(kind)

    def _list(self) -> list[Any]:
        number, count = self._number("u4"), self._number("u8")
        if number >= len(_SCALARS):
            raise self._damaged(f"a list is of type {number}")
        kind = _SCALARS[number]
        if kind in ("string", "array"):
            read = self._string if kind == "string" else self._list
            return [read() for _ in range(count)]
        return np.frombuffer(self._take(count * np.dtype(kind).itemsize), np.dtype(kind).newbyteorder("<")).tolist()

    def _string(self) -> str:
        (length,) = struct.unpack("<Q", self._take(8))
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"a text is not UTF-8: {error}") from None

    def _number(self, kind: str) -> Any:
        dtype = np.dtype(kind).newbyteorder("<")
        return np.frombuffer(self._take(dtype.itemsize), dtype)[0].item()

    def _take(self, length: int) -> bytes:
        start, self._at = self._at, self._at + length
        if self._at > len(self._bytes):
            raise self._damaged(f"its header goes on to byte {self._at}")
        return self._bytes[start : self._at]

    def _damaged(self, why: str) -> UserError:
        size = len(self._bytes)
        return UserError(
            f"{self._path} is cut short or damaged ({why}; it has {size} bytes); download or export it again"
        )


def _library() -> Any:
    try:
        gguf = importlib.import_module("gguf")
        importlib.import_module("gguf.quants")
    except ImportError as error:
        raise UserError(f"reading GGUF files needs the gguf package ({error}): pip install 'atp[gguf]'") from error
    return gguf
