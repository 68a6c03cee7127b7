"""A GGUF file as a base model: config, weights and tokenizer, each read when it is asked for.

The door of the GGUF reader: :mod:`atp.run.parts.base` asks it, and nobody else. It knows nothing of the configuration.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from atp.model.gguf.config import gguf_config
from atp.model.gguf.reading import GgufFile
from atp.model.gguf.tokenizer import gguf_tokenizer
from atp.model.gguf.weights import check_tensors, read_tensors
from atp.model.widths import build_model


@dataclass(frozen=True)
class GgufBase:
    """A model in a GGUF file.

    Attributes:
        file: The open file.
        config: Its config; nothing in it tells of quantisation.
    """

    file: GgufFile
    config: PreTrainedConfig

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors by transformers' names, float32, one at a time.

        Raises:
            ValueError: They are not those of the config, or of a type that cannot be de-quantised.
        """
        architecture = str(self.file.needed("general.architecture"))
        yield from read_tensors(self.file, check_tensors(self.file, self.config, architecture))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Its tokenizer, with its chat template (:func:`atp.model.gguf.tokenizer.gguf_tokenizer`)."""
        return gguf_tokenizer(self.file)


def read_gguf(path: Path) -> GgufBase:
    """Opens a GGUF file as a base model.

    Args:
        path: The file.

    Raises:
        ValueError: It cannot be read, or holds what is not pruned here; the message says the way out.
    """
    file = GgufFile(path)
    return GgufBase(file, gguf_config(file))


def load_gguf(path: Path, *, dtype: torch.dtype, attn_implementation: str | None = None) -> PreTrainedModel:
    """The model in a GGUF file, de-quantised.

    Args:
        path: The file.
        dtype: Type of the parameters; float32 holds every de-quantised weight exactly.
        attn_implementation: The attention kernel, as transformers names it; its own choice by default.

    Raises:
        ValueError: As :func:`read_gguf`, or tensors are missing, misshapen or left over.
    """
    base = read_gguf(path)
    base.config.dtype = dtype
    model = build_model(base.config, dtype=dtype)
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    targets = model.state_dict()
    with torch.no_grad():
        for name, tensor in base.tensors():
            targets[name].copy_(tensor)
    return model


def companions(path: Path) -> Path:
    """A folder with the config and the tokenizer files of a GGUF file, gone when the program ends.

    Raises:
        ValueError: As :func:`read_gguf` and :func:`atp.model.gguf.tokenizer.gguf_tokenizer`.
    """
    facts = path.stat()
    return Path(_companions(path.resolve(), facts.st_size, facts.st_mtime_ns).name)


@functools.cache
def _companions(path: Path, size: int, mtime_ns: int) -> tempfile.TemporaryDirectory[str]:
    base = read_gguf(path)
    tokenizer = base.tokenizer()  # before there is a folder, as it may refuse
    folder = tempfile.TemporaryDirectory(prefix="atp-gguf-")
    base.config.save_pretrained(folder.name)
    tokenizer.save_pretrained(folder.name)
    return folder
