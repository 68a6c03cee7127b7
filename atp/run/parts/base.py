"""The base model and its tokenizer, from a directory, a GGUF file, a hub id or the embedded model.

First of the builders; removal and evaluation load the dense model through it again. It knows nothing of data, masks or
adapters.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from atp import embedded
from atp.config.schema import ModelConfig
from atp.errors import UserError
from atp.masks.adapter import has_adapter, merge_beside
from atp.model import modeling_atp
from atp.model.families import family_of
from atp.model.gguf.base import companions, load_gguf
from atp.model.gguf.packages import PACKAGED, packaged_file
from atp.model.gguf.reading import find_gguf
from atp.run.parts.quantization import bitsandbytes_settings

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def model_source(config: ModelConfig) -> str:
    """Directory, GGUF file or hub id of the base model.

    Raises:
        ValueError: ``model.path`` is not set, is a path that does not exist, or a package that is not installed.
    """
    if not config.path:
        raise UserError(
            "model.path is not set; give a directory in Hugging Face layout, a GGUF file, a hub id, or 'embedded'"
        )
    if config.path == "embedded":
        return str(embedded.base_dir())
    if config.path in PACKAGED:
        return str(packaged_file(config.path))
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") != 1
    path = Path(config.path).expanduser()
    if gguf := find_gguf(path):
        return str(gguf)
    if path.is_dir():
        return str(path)
    if looks_local:
        raise UserError(
            f"model.path={config.path}: no such directory; give one that holds config.json and *.safetensors, or a "
            "GGUF file"
        )
    return config.path


def files_source(config: ModelConfig) -> str:
    """As :func:`model_source`, for a GGUF file a folder with the config and the tokenizer files in it."""
    source = model_source(config)
    return str(companions(Path(source))) if Path(source).is_file() else source


def load_base(config: ModelConfig, *, quantized: bool = False, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The dense base model, frozen weights in ``model.dtype``, from safetensors or a GGUF file only.

    Args:
        config: Which model.
        quantized: Quantise its linears as ``model.quantization`` says, to train on; without effect where that is unset.
        device: Where a quantised model is put; others stay on the CPU, their weights mapped from the files.

    Raises:
        ValueError: Unknown dtype or family, nothing to load, an adapter that does not fit, or no access; each says the
            way out.
    """
    source = model_source(config)
    if config.dtype not in DTYPES:
        raise UserError(f"model.dtype is {config.dtype!r}; known: {', '.join(DTYPES)}")
    modeling_atp.register()
    if Path(source).is_file():
        return _load_gguf(config, source)
    packed: dict[str, Any] = {}
    if quantized and config.quantization is not None and has_adapter(source):
        raise UserError(
            f"model.path={source} carries an adapter, which cannot be merged into packed weights; "
            "export it merged, or leave model.quantization out"
        )
    if quantized and config.quantization is not None:
        settings = bitsandbytes_settings(config, DTYPES[config.dtype])
        packed = {"quantization_config": settings, "device_map": {"": device}}
    try:
        family_of(AutoConfig.from_pretrained(source, revision=config.revision))
        model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=config.revision,
            dtype=DTYPES[config.dtype],
            attn_implementation=config.attn_implementation,
            use_safetensors=True,
            **packed,
        )
    except OSError as error:
        raise UserError(_access_message("model.path", source, error)) from error
    if not packed and merge_beside(model, source):
        log.info("%s: the adapter beside the weights is merged into them", source)
    model.eval()
    return model


def _load_gguf(config: ModelConfig, source: str) -> PreTrainedModel:
    if config.quantization is not None:
        raise UserError(
            f"model.quantization={config.quantization} packs weights in Hugging Face layout, and {source} is a GGUF "
            "file, which is de-quantised; leave model.quantization out"
        )
    return load_gguf(Path(source), dtype=DTYPES[config.dtype], attn_implementation=config.attn_implementation)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a padding token.

    Raises:
        ValueError: There is none, or no access.
    """
    source = files_source(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=config.revision)
    except (OSError, ValueError) as error:
        raise UserError(_access_message("model.path", source, error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _access_message(field: str, source: str, error: Exception) -> str:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if Path(source).is_dir():
        return (
            f"{field}={source}: cannot be loaded ({reason}); it needs config.json, tokenizer files and "
            "*.safetensors weights"
        )
    return (
        f"{field}={source}: cannot be fetched from the hub ({reason}). Without network, use model=local "
        "model.path=<directory>; for a "
        "gated model, accept its licence on its page and log in with `hf auth login`"
    )
