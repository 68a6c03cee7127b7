"""Writing GGUF files for llama.cpp from an exported directory.

Reads one stored tensor at a time and writes it before the next, so that memory stays at one tensor however large the
model; a file appears under its name only when it is whole. Which architecture and which tensors is decided in
:mod:`atp.export.gguf.layout`. K-quants are made by llama.cpp: by its own quantiser where llama-cpp-python is
installed, otherwise by its rule and its routines (:mod:`atp.export.gguf.k_quants`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atp.atomic import appearing
from atp.data.encoding.tokenizer import load_tokenizer
from atp.errors import UserError
from atp.export.extras import LLAMA_CPP, Package, require, silenced_llama_cpp
from atp.export.gguf import k_quants
from atp.export.gguf.layout import GgufLayout, GgufTensor, gguf_layout
from atp.export.gguf.vocabulary import Vocabulary, gguf_vocabulary
from atp.export.hf.loading import StoredModel
from atp.model.stops import stored_stops

logger = logging.getLogger(__name__)

WRITTEN_TYPES = ("f32", "f16", "bf16", "q8_0")
"""Types written here."""
BLOCK = 32
"""Weights of a row that the types of less than two bytes store together, at the least."""
_FLOATS = ("f32", "f16", "bf16")
QUANTISER_TYPES = tuple(k_quants.MIXES)
"""Types that need llama.cpp to be written."""
_BUILD = Package("llama_cpp")
"""llama-cpp-python, whose build of llama.cpp has the quantiser."""


@dataclass(frozen=True)
class GgufFile:
    """What was written.

    Attributes:
        path: The file.
        architecture: llama.cpp's name of the architecture.
        type: Type of the matrices.
        size_bytes: Size of the file.
        tensor_bytes: What the tensors take of it; the rest is vocabulary and names.
        mix: How many of its matrices have which type.
        notes: What the user should know of it.
    """

    path: Path
    architecture: str
    type: str
    size_bytes: int
    tensor_bytes: int
    mix: str
    notes: tuple[str, ...]


def check_types(types: Sequence[str]) -> None:
    """Checks the names of GGUF types, and that what writes them is installed.

    Raises:
        ValueError: A name is unknown, or its writer is not installed.
    """
    known = (*WRITTEN_TYPES, *QUANTISER_TYPES)
    for name in types:
        if name.lower() not in known:
            raise UserError(f"GGUF type {name!r} is not known; choose from {', '.join(known)}")
    require("gguf", extra="gguf")
    if any(name.lower() in QUANTISER_TYPES for name in types):
        _check_quantiser()


def _check_quantiser() -> None:
    if not _BUILD.is_installed:
        LLAMA_CPP.require()


def export_gguf(
    model_dir: str | Path,
    output_dir: str | Path | None = None,
    *,
    types: Sequence[str] = ("f16",),
    tokenizer: bool = True,
    overwrite: bool = False,
) -> list[GgufFile]:
    """Writes one GGUF file per type.

    Args:
        model_dir: A directory as :func:`atp.export.hf.writing.export_hf` writes it.
        output_dir: Where the files go, as ``model-<type>.gguf``; by default ``gguf`` below the model.
        types: Types of the matrices; vectors stay float32, and rows that do not fit a block type are float16.
        tokenizer: Write the vocabulary; without it llama.cpp takes and gives token ids only.
        overwrite: Replace files that are there.

    Returns:
        One entry per type.

    Raises:
        ValueError: Unknown type, no tokenizer, a model that llama.cpp cannot compute, or a file in the way.
        OSError: If the disk is full.
    """
    check_types(types)
    import gguf

    stored = StoredModel(model_dir)
    gguf_layout(stored.config)  # refuses before anything else is looked at
    folder = Path(output_dir) if output_dir is not None else stored.directory / "gguf"
    targets = {name.lower(): folder / f"model-{name.lower()}.gguf" for name in types}
    if blocked := [str(path) for path in targets.values() if path.exists() and not overwrite]:
        raise UserError(f"{blocked[0]} exists; overwrite it (--overwrite) or choose another directory")
    vocabulary = _vocabulary(stored) if tokenizer else None
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, path in targets.items():
        layout = gguf_layout(stored.config, block=1 if kind in _FLOATS else BLOCK)
        with _appearing_file(path) as stage:
            if kind in QUANTISER_TYPES and _BUILD.is_installed:
                _quantise(stored, layout, vocabulary, kind, stage)
            else:
                _write(stored, layout, vocabulary, kind, stage)
        tensors = gguf.GGUFReader(path).tensors
        tensor_bytes = sum(int(tensor.n_bytes) for tensor in tensors)
        mix = k_quants.described([tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1])
        written.append(GgufFile(path, layout.architecture, kind, path.stat().st_size, tensor_bytes, mix, layout.notes))
    for note in dict.fromkeys(note for file in written for note in file.notes):
        logger.warning("%s", note)
    return written


def _vocabulary(stored: StoredModel) -> Vocabulary:
    if not any((stored.directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(
            f"{stored.directory} holds no tokenizer, which GGUF files carry; put the base model's tokenizer files "
            "there (tokenizer.json, tokenizer_config.json), or export without (--no-tokenizer)"
        )
    try:
        tokenizer = load_tokenizer(stored.directory, local_files_only=True)
    except Exception as error:  # a broken tokenizer.json raises plain Exception
        raise UserError(f"the tokenizer in {stored.directory} cannot be read: {error}") from error
    return gguf_vocabulary(tokenizer, stored.config.vocab_size, stored_stops(stored.directory))


@contextmanager
def _appearing_file(path: Path) -> Iterator[Path]:
    """As :func:`atp.atomic.appearing`, and a full disk says which file and that nothing of it is left."""
    try:
        with appearing(path) as stage:
            yield stage
    except OSError as error:
        raise OSError(f"could not write {path}: {error}; nothing was left there") from error


def _write(stored: StoredModel, layout: GgufLayout, vocabulary: Vocabulary | None, kind: str, path: Path) -> None:
    """Writes the file: metadata, then the description of all tensors, then one tensor after the other."""
    import gguf

    writer = gguf.GGUFWriter(path, layout.architecture)
    _write_metadata(writer, stored, layout, kind)
    _write_vocabulary(writer, vocabulary)
    plan = list(zip(layout.tensors, _stored_types(layout, kind), strict=True))
    for tensor, stored_type in plan:
        dtype: Any = np.uint8
        shape = tensor.shape
        if stored_type in _unblocked():
            dtype = np.float32 if stored_type == gguf.GGMLQuantizationType.F32 else np.float16
            nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        else:
            shape = gguf.quant_shape_to_byte_shape(shape, stored_type)
            nbytes = int(np.prod(shape))
        writer.add_tensor_info(tensor.name, shape, np.dtype(dtype), nbytes, raw_dtype=stored_type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, stored_type in plan:
            values = tensor.values(stored.tensor)
            by_llama_cpp = kind in QUANTISER_TYPES and stored_type not in _unblocked()
            rows = (
                k_quants.quantised(values, stored_type) if by_llama_cpp else gguf.quants.quantize(values, stored_type)
            )
            writer.write_tensor_data(np.ascontiguousarray(rows))
    finally:
        writer.close()


def _unblocked() -> tuple[Any, Any]:
    """Types whose numbers stand one by one."""
    import gguf

    return gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16


def _stored_types(layout: GgufLayout, kind: str) -> list[Any]:
    """Types of the tensors, by the name of the file's."""
    import gguf

    if kind in QUANTISER_TYPES:
        return [gguf.GGMLQuantizationType[name] for name in k_quants.tensor_types(layout, kind)]
    wanted = gguf.GGMLQuantizationType[kind.upper()]
    return [_stored_type(tensor, wanted) for tensor in layout.tensors]


def _stored_type(tensor: GgufTensor, wanted: Any) -> Any:
    """Type of one tensor: vectors in float32, matrices as wanted, or float16 where rows do not fit its blocks."""
    import gguf

    if len(tensor.shape) == 1:
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return gguf.GGMLQuantizationType.F16 if tensor.shape[-1] % block else wanted


def _write_metadata(writer: Any, stored: StoredModel, layout: GgufLayout, kind: str) -> None:
    import gguf

    writer.add_type("model")
    writer.add_name(stored.directory.resolve().name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    if kind not in _FLOATS:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, value in layout.fields.items():
        key = f"{layout.architecture}.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)


def _write_vocabulary(writer: Any, vocabulary: Vocabulary | None) -> None:
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for role, index in vocabulary.special.items():
        getattr(writer, f"add_{role}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.model == "llama":
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _quantise(stored: StoredModel, layout: GgufLayout, vocabulary: Vocabulary | None, kind: str, path: Path) -> None:
    """Writes float32 and lets llama.cpp's quantiser make the wanted type of it."""
    llama_cpp = silenced_llama_cpp()
    full = path.with_name(path.name + "-f32")
    try:
        _write(stored, layout, vocabulary, "f32", full)
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
        failed = llama_cpp.llama_model_quantize(str(full).encode(), str(path).encode(), options)
    finally:
        full.unlink(missing_ok=True)
    if failed or not path.is_file():
        raise UserError(f"llama.cpp's quantiser could not make {kind} of this {layout.architecture} model")
