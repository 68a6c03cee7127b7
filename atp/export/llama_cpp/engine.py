"""llama.cpp through its C interface, in the wheel xllamacpp: logits, tokens, quantised rows, and why a file fails.

The engine behind the checks of GGUF files. :mod:`atp.export.verify.probe` loads this file by its path in a process
without atp, so it imports nothing of atp; inside atp the quantiser and the server ask it too. Structures of the C
interface change with llama.cpp's releases: they are those of one version of the wheel, and looked at before use.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

VERSION = "2026.10.11549"
"""Version of xllamacpp whose structures are written down here."""

_FLOAT32, _FLASH_ATTENTION_OFF, _NO_VOCABULARY, _ERROR = 0, 0, 0, 4
_CPU_ONLY = 0
_MOST_LINES = 40
_ROOM = 512  # bytes; more than any structure has, since what lies behind its end is neither read nor written


class _Structure(ctypes.Structure):
    """A structure passed by value, of which only a few fields are named, by their offsets."""

    _fields_ = [("room", ctypes.c_uint8 * _ROOM)]

    def get(self, offset: int) -> int:
        """The 32-bit field at an offset."""
        return ctypes.c_int32.from_buffer(self, offset).value

    def set(self, offset: int, value: int) -> None:
        """Set the 32-bit field at an offset."""
        ctypes.c_int32.from_buffer(self, offset).value = value


class _Batch(ctypes.Structure):
    """``llama_batch``; positions and sequences are left to llama.cpp."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    ]


# Offsets in llama_context_params and llama_model_params.
_CONTEXT, _BATCH, _MICRO_BATCH, _SEQUENCES = 0, 4, 8, 12
_THREADS, _THREADS_BATCH, _FLASH_ATTENTION, _CACHE_KEYS, _CACHE_VALUES = 28, 32, 52, 104, 108
_GPU_LAYERS = 16
_CONTEXT_DEFAULTS = {
    **{_CONTEXT: 512, _BATCH: 2048, _MICRO_BATCH: 512, _SEQUENCES: 1, _THREADS: 4, _THREADS_BATCH: 4},
    **{_FLASH_ATTENTION: -1, _CACHE_KEYS: 1, _CACHE_VALUES: 1},
}
_MODEL_DEFAULTS = {0: 0, _GPU_LAYERS: -1}

_POINTER, _INT, _TEXT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_log_set": (None, (_LOG, _POINTER)),
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (_Structure, ()),
    "llama_context_default_params": (_Structure, ()),
    "llama_model_load_from_file": (_POINTER, (_TEXT, _Structure)),
    "llama_model_free": (None, (_POINTER,)),
    "llama_model_get_vocab": (_POINTER, (_POINTER,)),
    "llama_vocab_type": (ctypes.c_int, (_POINTER,)),
    "llama_vocab_n_tokens": (_INT, (_POINTER,)),
    "llama_tokenize": (
        _INT,
        (_POINTER, _TEXT, _INT, _POINTER, _INT, ctypes.c_bool, ctypes.c_bool),
    ),
    "llama_init_from_model": (_POINTER, (_POINTER, _Structure)),
    "llama_free": (None, (_POINTER,)),
    "llama_get_memory": (_POINTER, (_POINTER,)),
    "llama_memory_clear": (None, (_POINTER, ctypes.c_bool)),
    "llama_decode": (_INT, (_POINTER, _Batch)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (_POINTER,)),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        (ctypes.c_int, _POINTER, _POINTER, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _POINTER),
    ),
}


@functools.cache
def library() -> Any:
    """The shared library in the wheel, with the functions used here declared.

    Raises:
        ImportError: xllamacpp is not installed, or its library cannot be loaded here.
        RuntimeError: It is laid out otherwise than :data:`VERSION` is.
    """
    module = importlib.import_module("xllamacpp")
    try:
        loaded = ctypes.CDLL(str(module.xllamacpp.__file__))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (AttributeError, OSError) as error:
        raise RuntimeError(f"the library in xllamacpp {module.__version__} has no C interface ({error})") from error
    found = (loaded.llama_context_default_params(), loaded.llama_model_default_params())
    for structure, defaults in zip(found, (_CONTEXT_DEFAULTS, _MODEL_DEFAULTS), strict=True):
        if any(structure.get(offset) != value for offset, value in defaults.items()):
            raise RuntimeError(
                f"xllamacpp {module.__version__} lays llama.cpp's structures out otherwise than {VERSION} does"
            )
    loaded.llama_log_set(_QUIET, None)
    loaded.llama_backend_init()
    return loaded


_said: list[str] = []


# At the module, as llama.cpp calls it for as long as the process lives.
@_LOG
def _QUIET(level: int, text: bytes, data: Any) -> None:
    if level == _ERROR and len(_said) < _MOST_LINES:
        _said.append(text.decode("utf-8", "replace").strip())


@contextmanager
def _model(path: str) -> Iterator[int]:
    """A loaded model, on the CPU.

    Raises:
        ValueError: llama.cpp does not load it, with what it said.
    """
    lib = library()
    lib.llama_log_set(_QUIET, None)  # a server in this process has set its own
    _said.clear()
    parameters = lib.llama_model_default_params()
    parameters.set(_GPU_LAYERS, _CPU_ONLY)
    model = lib.llama_model_load_from_file(os.fsencode(path), parameters)
    if not model:
        raise ValueError(_reason() or "it says no more")
    try:
        yield model
    finally:
        lib.llama_model_free(model)


def _reason() -> str:
    """The first thing that llama.cpp found wrong, without the names of its functions."""
    first = next(filter(None, _said), "")
    return re.sub(r"^\w+: (error loading model: )?", "", first)


def why_not_loaded(path: str | Path) -> str:
    """What llama.cpp says of a file that it does not load; empty if it loads it."""
    try:
        with _model(str(path)):
            return ""
    except ValueError as error:
        return str(error)


class LlamaCppEngine:
    """A GGUF file in llama.cpp, with a float32 cache and plain attention.

    Args:
        task: ``path``; ``context``, the longest sequence; ``threads``.

    Raises:
        ValueError: llama.cpp does not load the file.
    """

    remark = ""

    def __init__(self, task: dict[str, Any]) -> None:
        self._lib = library()
        self._opened = _model(task["path"])
        self._model = self._opened.__enter__()
        self._vocabulary = self._lib.llama_model_get_vocab(self._model)
        self._size = self._lib.llama_vocab_n_tokens(self._vocabulary)
        parameters = self._lib.llama_context_default_params()
        wanted = dict.fromkeys((_CONTEXT, _BATCH, _MICRO_BATCH), task["context"])
        wanted |= dict.fromkeys((_THREADS, _THREADS_BATCH), task.get("threads") or 1)
        wanted |= dict.fromkeys((_CACHE_KEYS, _CACHE_VALUES), _FLOAT32)
        for offset, value in {**wanted, _FLASH_ATTENTION: _FLASH_ATTENTION_OFF}.items():
            parameters.set(offset, value)
        self._context = self._lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            reason = _reason()
            self._opened.__exit__(None, None, None)
            raise ValueError(f"llama.cpp makes no context of {task['context']} tokens: {reason}")

    def close(self) -> None:
        """Free the model."""
        if self._context:
            self._lib.llama_free(self._context)
            self._opened.__exit__(None, None, None)
            self._context = None

    def tokenize(self, text: str, *, control: bool = False) -> list[int] | None:
        """Token ids of a text, the beginning of a sequence included; None where the file holds no vocabulary.

        Args:
            text: The text.
            control: Whether the names of control tokens in it mean the tokens.
        """
        if self._lib.llama_vocab_type(self._vocabulary) == _NO_VOCABULARY:
            return None
        raw = text.encode("utf-8")
        room = len(raw) + 8
        ids = (_INT * room)()
        count = self._lib.llama_tokenize(self._vocabulary, raw, len(raw), ids, room, True, control)
        if count < 0:
            raise ValueError(f"llama.cpp does not tokenise a text of {len(text)} characters ({count})")
        return list(ids[:count])

    def logits(self, ids_T: np.ndarray) -> np.ndarray:
        """Logits [T, V] of one window."""
        self._forget()
        return self._decode(ids_T)

    def generate(self, prompt_T: np.ndarray, new_tokens: int) -> list[int]:
        """Greedy continuation, one token at a time with llama.cpp's own cache."""
        self._forget()
        made: list[int] = []
        logits_V = self._decode(prompt_T, last=True)[-1]
        while len(made) < new_tokens:
            made.append(int(logits_V.argmax()))
            logits_V = self._decode(np.asarray(made[-1:]))[-1]
        return made

    def _forget(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _decode(self, ids_T: np.ndarray, *, last: bool = False) -> np.ndarray:
        """Logits of tokens that follow those before; of the last one alone where only it is asked for."""
        tokens_T = np.ascontiguousarray(ids_T, np.int32)
        wanted_T = np.ones(len(tokens_T), np.int8)
        wanted_T[:-1] = not last
        batch = _Batch(n_tokens=len(tokens_T), token=tokens_T.ctypes.data, logits=wanted_T.ctypes.data)
        failed = self._lib.llama_decode(self._context, batch)
        if failed:
            raise RuntimeError(f"llama.cpp could not decode {len(tokens_T)} tokens ({failed}): {_reason()}")
        found = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(found, (int(wanted_T.sum()), self._size)).copy()


def quantise_rows(rows: np.ndarray, type_number: int, row_bytes: int) -> np.ndarray:
    """Rows of a matrix as llama.cpp's own quantiser stores them.

    Args:
        rows: Matrix [rows, columns], float32.
        type_number: ggml's number of the type.
        row_bytes: Bytes that a row takes in it.

    Returns:
        Bytes [rows, row_bytes].
    """
    lib = library()
    rows = np.ascontiguousarray(rows, np.float32)
    made = np.empty((len(rows), row_bytes), np.uint8)

    def quantise(start: int, stop: int) -> int:
        columns = rows.shape[1]
        place = (type_number, rows.ctypes.data, made.ctypes.data, start * columns, stop - start, columns, None)
        return int(lib.ggml_quantize_chunk(*place))

    parts = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, len(rows))
    bounds = np.linspace(0, len(rows), parts + 1).astype(int).tolist()
    with ThreadPoolExecutor(parts) as pool:
        written = sum(pool.map(quantise, bounds[:-1], bounds[1:]))
    if written != made.nbytes:
        raise RuntimeError(f"llama.cpp wrote {written} bytes of type {type_number}, not {made.nbytes}")
    return made
