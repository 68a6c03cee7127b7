"""The base model and its tokenizer, from a directory, a hub id or the embedded model.

First of the builders; removal and evaluation load the dense model through it again. It knows nothing of data, masks or
adapters.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from atp import embedded
from atp.config.schema import ModelConfig
from atp.data.encoding.tokenizer import check_ids, check_texts
from atp.data.encoding.tokenizer import load_tokenizer as load
from atp.data.records import Record
from atp.data.records.types import all_text
from atp.errors import UserError
from atp.masks.adapter import has_adapter, merge_beside
from atp.model import modeling_atp
from atp.model.families import family_of
from atp.run.parts.quantization import bitsandbytes_settings

log = logging.getLogger(__name__)

SAMPLED_RECORDS = 64
"""Records on which the tokenizer is compared with its file."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def model_source(config: ModelConfig) -> str:
    """Directory or hub id of the base model.

    Raises:
        ValueError: ``model.path`` is not set, or is a path that does not exist.
    """
    if not config.path:
        raise UserError("model.path is not set; give a directory in Hugging Face layout, a hub id, or 'embedded'")
    if config.path == "embedded":
        return str(embedded.base_dir())
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") != 1
    path = Path(config.path).expanduser()
    if path.is_dir():
        return str(path)
    if looks_local:
        raise UserError(
            f"model.path={config.path}: no such directory; give one that holds config.json and *.safetensors"
        )
    return config.path


def load_base(config: ModelConfig, *, quantized: bool = False, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The dense base model, frozen weights in ``model.dtype``, from safetensors only.

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


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a padding token.

    Raises:
        ValueError: There is none, no access, or it has more ids than the model's config says there are embeddings.
    """
    source = model_source(config)
    try:
        tokenizer = load(source, revision=config.revision)
        settings, _ = PreTrainedConfig.get_config_dict(source, revision=config.revision)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(_access_message("model.path", source, error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if isinstance(settings.get("vocab_size"), int):
        check_ids(tokenizer, settings["vocab_size"], f"model.path={source}")
    return tokenizer


def check_tokenizer(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, records: Iterable[Record]
) -> None:
    """Check a tokenizer against the model as it is loaded, and against its own file on some of the data.

    Raises:
        ValueError: It has ids beyond the embeddings, or reads a record otherwise than its ``tokenizer.json``.
    """
    source = model_source(config)
    embeddings: Any = model.get_input_embeddings()
    check_ids(tokenizer, embeddings.weight.shape[0], f"model.path={source}")
    check_texts(tokenizer, source, map(all_text, itertools.islice(records, SAMPLED_RECORDS)))


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
