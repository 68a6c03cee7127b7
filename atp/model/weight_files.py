"""The safetensors files of a model directory: which there are, whether they are whole, and what is in them.

Below the comparison of stored with expected tensors. Reads headers, and single tensors on request; opens no pickle and
knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from atp.errors import UserError
from atp.model.odd_places import LFS_POINTER, other_weights

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a file's header describes it.

    Attributes:
        file: The file.
        name: Its name in the file.
        shape: Its shape.
        dtype: Its type in safetensors' spelling, such as ``BF16``.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a directory, all of them present.

    Raises:
        UserError: There are none, one is missing, or two sets of weights lie side by side.
    """
    index, single = directory / INDEX_FILE, directory / WEIGHTS_FILE
    files = [single]
    if index.is_file():
        content = index.read_bytes()
        _refuse_pointer(index, content)
        try:
            names = sorted(set(json.loads(content)["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} is not a valid index of weight files: {error!r}; copy it again") from error
        files = [directory / str(name) for name in names]
    missing = [file.name for file in files if file.parent != directory or not file.is_file()]
    if not missing and index.is_file() and single.is_file() and single not in files:
        raise UserError(
            f"{directory} holds two sets of weights, {WEIGHTS_FILE} and the shards of {INDEX_FILE}; remove one"
        )
    if not missing:
        return files
    there = sorted(path.name for path in directory.glob("*.safetensors"))
    if not there and (other := other_weights(directory)):
        raise UserError(f"{directory} has no *.safetensors: {other}")
    if there and not index.is_file():
        raise UserError(
            f"{directory} lacks weight files: {WEIGHTS_FILE}, or {INDEX_FILE} for {', '.join(there[:3])}; copy it too"
        )
    raise UserError(
        f"{directory} lacks weight files: {', '.join(missing[:4])}; copy or download the *.safetensors again"
    )


def read_header(file: Path) -> dict[str, StoredTensor]:
    """What a file holds, by name, once it is known to be whole.

    Raises:
        UserError: It is a git-lfs pointer, cut short, or no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        _refuse_pointer(file, start + opened.read(64))
        opened.seek(8)
        length = int.from_bytes(start, "little")
        header = opened.read(length) if 0 < length <= min(size, _LONGEST_HEADER) else b""
    if not size:
        raise UserError(f"{file} is empty; copy or download it again")
    try:
        entries = json.loads(header, object_pairs_hook=_without_doubles)
        entries.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(file, name, tuple(entry["shape"]), str(entry["dtype"]))
            for name, entry in entries.items()
        }
        whole = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        cut = length > size and start.isascii() is False
        reason = f"its header is {length} bytes long, the file {size}" if cut else "it has no safetensors header"
        raise UserError(
            f"{file} is truncated or not a safetensors file ({reason}); copy, download or export it again"
        ) from error
    if whole != size:
        raise UserError(
            f"{file} is truncated or not a safetensors file ({size} bytes, of {whole} by its header); copy, download "
            "or export it again"
        )
    return tensors


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A file's tensors, mapped into memory.

    Raises:
        UserError: It is truncated or no safetensors file.
    """
    try:
        with safe_open(str(file), framework="pt", device="cpu") as stored:
            yield stored
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or not a safetensors file ({error}); copy or export it again") from error


def _refuse_pointer(file: Path, content: bytes) -> None:
    if content.startswith(LFS_POINTER):
        raise UserError(
            f"{file} is a git-lfs pointer, not the weights; fetch them with `git lfs pull` there, or with `hf download`"
        )


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found
