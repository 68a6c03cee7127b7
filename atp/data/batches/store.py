"""The token store: examples whose token ids lie in a file on disk, for training data larger than memory.

The file is mapped into memory, and batches take examples from it in any order; a run over a stream therefore resumes
like any other. It sits between :mod:`atp.data.encoding` and :mod:`atp.data.batches.loading`. It knows nothing of torch.
"""

from __future__ import annotations

import itertools
import tempfile
import weakref
from array import array
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from atp.data.encoding.encoder import Encoder
from atp.data.encoding.example import Example
from atp.data.records import Record

_CHUNK = 1024


class TokenStore(Sequence[Example]):
    """Examples whose token ids lie in a file, mapped into memory; of each, a dozen bytes are held.

    Args:
        records: What to encode, in one pass.
        encoder: The encoder.
        loss_on: As for :meth:`atp.data.encoding.Encoder.encode`.
    """

    def __init__(self, records: Collection[Record], encoder: Encoder, loss_on: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="atp-tokens-")
        self._finalizer = weakref.finalize(self, self._folder.cleanup)
        path = Path(self._folder.name) / "tokens.bin"
        self._ends, self._contexts, self._bytes = array("q"), array("i"), array("i")
        self._given: dict[int, tuple[tuple[int, int], ...]] = {}
        source = iter(records)
        with path.open("wb") as file:
            end = 0
            while chunk := list(itertools.islice(source, _CHUNK)):
                for example in itertools.chain.from_iterable(encoder.encode(chunk, loss_on)):
                    if example.loss_tokens > 0:
                        file.write(example.input_ids.astype(np.int32).tobytes())
                        end += len(example.input_ids)
                        if example.given:
                            self._given[len(self._ends)] = example.given
                        self._ends.append(end)
                        self._contexts.append(example.context)
                        self._bytes.append(example.text_bytes)
        self._ids = np.memmap(path, dtype=np.int32, mode="r") if end else np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def lengths(self) -> list[int]:
        """Return the tokens of each example."""
        return np.diff(np.frombuffer(self._ends, dtype=np.int64), prepend=0).tolist() if self._ends else []

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Return an example, or several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = self._ends[index - 1] if index else 0
        ids = np.array(self._ids[start : self._ends[index]])
        return Example(ids, self._contexts[index], self._bytes[index], self._given.get(index, ()))
