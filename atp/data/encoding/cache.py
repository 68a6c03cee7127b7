"""Token cache: encoded records on disk, found again by what they were made of.

Sits between :mod:`atp.data.encoding` and :mod:`atp.data.batches`: a run over the same records, tokenizer and lengths
reads token ids in place of tokenising again. The name of a file is a digest of everything that decides its content, so
that nothing in it can be out of date. It knows nothing of batches, models or where records come from.

Files are safetensors, written under a temporary name and renamed. A file that cannot be read is made anew. Records
that are streamed (:mod:`atp.data.streaming`) are not cached; their ids lie on disk anyway.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from atp.atomic import appearing
from atp.data.encoding.encoder import Encoder
from atp.data.encoding.example import Example
from atp.data.records import ChatRecord, ChoiceRecord, CompletionRecord, Record
from atp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

FORMAT = 4
FEWEST_RECORDS = 500
"""Fewer are tokenised as fast as they are read."""

MOST_BYTES = 10 * 2**30
"""What a cache may hold; beyond it, what was used longest ago is deleted."""

_ARRAYS = {
    "input_ids": np.int32,
    "ends": np.int64,
    "contexts": np.int32,
    "text_bytes": np.int64,
    "given": np.int64,  # example, start and end of each stretch, one after the other
}


def default_folder() -> Path:
    """``tokens`` in ``$ATP_CACHE``, or else in ``$XDG_CACHE_HOME/atp`` or ``~/.cache/atp``.

    A user without a home directory has it beside temporary files.
    """
    own, shared = os.environ.get("ATP_CACHE"), os.environ.get("XDG_CACHE_HOME")
    home = os.path.expanduser("~")
    if not (own or shared or os.path.isabs(home)):
        user = os.getuid() if hasattr(os, "getuid") else "cache"
        return Path(tempfile.gettempdir()) / f"atp-{user}" / "tokens"
    return (Path(own) if own else Path(shared or Path(home) / ".cache") / "atp") / "tokens"


class TokenCache:
    """Encoded records in a folder.

    Args:
        folder: Where files lie; made when first written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def examples(self, records: Sequence[Record], encoder: Encoder, loss_on: str) -> list[Example]:
        """Return the examples of all records in order, encoded now or at an earlier time.

        Either way the encoder's counts are the same afterwards.

        Args:
            records: What to encode, prompts and templates already applied.
            encoder: Encodes what is not there; its tokenizer and lengths are part of the key.
            loss_on: As for :meth:`atp.data.encoding.Encoder.encode`.
        """
        if len(records) < FEWEST_RECORDS:
            return _encoded(records, encoder, loss_on)
        path = self.folder / f"{cache_key(records, encoder, loss_on)}.safetensors"
        found = self._read(path, encoder)
        if found is not None:
            examples, counts = found
            encoder.add_counts(counts)
            return examples
        apart = encoder.fresh()
        examples = _encoded(records, apart, loss_on)
        encoder.add_counts(apart.counts())
        self._write(path, examples, apart.counts())
        return examples

    def _read(self, path: Path, encoder: Encoder) -> tuple[list[Example], dict[str, int]] | None:
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in _ARRAYS}
            if _checksum(arrays) != int(metadata["checksum"]):
                raise UserError("its checksum does not match")
            examples = _unpacked(arrays)
            stored = json.loads(metadata["counts"])
            counts = {name: int(stored[name]) for name in encoder.counts()}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log.warning("token cache: %s cannot be used (%s); tokenising anew", path, error)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return examples, counts

    def _write(self, path: Path, examples: Sequence[Example], counts: dict[str, int]) -> None:
        """Store examples; a folder that cannot be written to only costs the next run its time."""
        arrays = _packed(examples)
        metadata = {"counts": json.dumps(counts), "checksum": str(_checksum(arrays))}
        try:
            with appearing(path) as stage:
                save_file(arrays, stage, metadata=metadata)
            self._trim(path)
        except (OSError, SafetensorError) as error:
            log.warning("token cache: %s cannot be written (%s); choose another with data.cache=<folder>", path, error)

    def _trim(self, latest: Path) -> None:
        files = sorted(self.folder.glob("*.safetensors"), key=lambda file: -file.stat().st_mtime)
        total = 0
        for file in files:
            total += file.stat().st_size
            if total > MOST_BYTES and file != latest:
                file.unlink(missing_ok=True)


def cache_key(records: Iterable[Record], encoder: Encoder, loss_on: str) -> str:
    """Return the digest of all that decides the token ids: records, tokenizer, lengths and what is learnt."""
    digest = hashlib.sha256()
    settings = [FORMAT, loss_on, *encoder.settings, _fingerprint(encoder.tokenizer)]
    digest.update(json.dumps(settings).encode())
    for record in records:
        if isinstance(record, ChoiceRecord):
            parts = ["choice", record.prompt, *record.choices, str(record.label), str(record.frame), record.end]
        elif isinstance(record, CompletionRecord):
            parts = ["completion", record.prompt, record.completion, str(record.frame), record.end]
        elif isinstance(record, ChatRecord):
            turns = json.dumps([record.messages, record.tools], sort_keys=True, default=str)
            parts = ["chat", turns, encoder.chats.text]
        else:
            parts = ["text", record.text]
        for part in parts:
            text = part.encode("utf-8", "surrogatepass")
            digest.update(len(text).to_bytes(8, "little"))
            digest.update(text)
        digest.update(b"\xff" * 8)
    return digest.hexdigest()


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of a tokenizer: its whole definition where the library gives it, else vocabulary and settings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts: list[str] = [type(tokenizer).__name__, str(tokenizer.special_tokens_map)]
    if backend is not None:
        parts.append(backend.to_str())
    else:
        settings = {key: value for key, value in tokenizer.init_kwargs.items() if key != "name_or_path"}
        vocabulary = sorted(tokenizer.get_vocab().items())
        parts += [json.dumps(vocabulary), json.dumps(settings, sort_keys=True, default=str)]
        files = [Path(str(value)) for value in settings.values() if isinstance(value, str) and len(value) < 4096]
        parts += [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
    return hashlib.sha256("\x00".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _encoded(records: Sequence[Record], encoder: Encoder, loss_on: str) -> list[Example]:
    return [example for some in encoder.encode(records, loss_on) for example in some]


def _packed(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    ids = [example.input_ids for example in examples]
    return {
        "input_ids": np.concatenate(ids).astype(np.int32) if ids else np.zeros(0, np.int32),
        "ends": np.cumsum([len(one) for one in ids], dtype=np.int64),
        "contexts": np.array([example.context for example in examples], dtype=np.int32),
        "text_bytes": np.array([example.text_bytes for example in examples], dtype=np.int64),
        "given": np.array(
            [[number, *span] for number, example in enumerate(examples) for span in example.given], dtype=np.int64
        ).reshape(-1),
    }


def _unpacked(arrays: dict[str, np.ndarray]) -> list[Example]:
    for name, dtype in _ARRAYS.items():
        if arrays[name].dtype != dtype or arrays[name].ndim != 1:
            raise UserError(f"{name} is {arrays[name].dtype} of shape {arrays[name].shape}")
    ends = arrays["ends"].tolist()
    rows = zip([0, *ends], ends, arrays["contexts"].tolist(), arrays["text_bytes"].tolist(), strict=False)
    if not len(ends) == len(arrays["contexts"]) == len(arrays["text_bytes"]) or (
        ends and ends[-1] != len(arrays["input_ids"])
    ):
        raise UserError("its arrays do not fit together")
    given: dict[int, list[tuple[int, int]]] = {}
    for number, first, last in arrays["given"].reshape(-1, 3).tolist():
        given.setdefault(number, []).append((first, last))
    return [
        Example(arrays["input_ids"][start:end], context, size, tuple(given.get(number, ())))
        for number, (start, end, context, size) in enumerate(rows)
    ]


def _checksum(arrays: dict[str, np.ndarray]) -> int:
    value = 0
    for name in _ARRAYS:
        value = zlib.crc32(arrays[name].tobytes(), value)
    return value
