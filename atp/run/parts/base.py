"""The base model and its tokenizer, from a directory, a GGUF file, a hub id or the embedded model.

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
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from atp import embedded
from atp.config.schema import ModelConfig, TrainConfig
from atp.data.encoding.tokenizer import check_ids, check_texts
from atp.data.encoding.tokenizer import load_tokenizer as load
from atp.data.records import Record
from atp.data.records.types import all_text
from atp.errors import UserError
from atp.export.formats import WEIGHT_DTYPES
from atp.model.gguf.base import companions
from atp.model.gguf.packages import gguf_of
from atp.model.loading import fetched, is_local, load_model
from atp.model.odd_places import model_home
from atp.model.stops import stored_stops
from atp.model.stored import StoredModel
from atp.run.parts.quantization import bitsandbytes_settings

log = logging.getLogger(__name__)

SAMPLED_RECORDS = 64
"""Records on which the tokenizer is compared with its file."""

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in WEIGHT_DTYPES}


def model_source(config: ModelConfig) -> str:
    """Directory, GGUF file or hub id of the base model; of a run directory, its ``pruned/``.

    Raises:
        ValueError: ``model.path`` is not set, does not exist, is no model, or a package that is not installed.
    """
    if not config.path:
        raise UserError(
            "model.path is not set; give a directory in Hugging Face layout, a GGUF file, a hub id, or 'embedded'"
        )
    if config.path == "embedded":
        return str(embedded.base_dir())
    if gguf := gguf_of(config.path):
        return str(gguf)
    if not is_local(config.path):
        return config.path
    if not Path(config.path).expanduser().exists():
        raise UserError(
            f"model.path={config.path}: no such directory; give one that holds config.json and *.safetensors, or a "
            "GGUF file"
        )
    try:
        return str(model_home(config.path))
    except UserError as error:
        raise UserError(f"model.path: {error}") from error


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
    working = _known("model.dtype", config.dtype)
    if Path(source).is_file() and config.quantization is not None:
        raise UserError(
            f"model.quantization={config.quantization} packs weights in Hugging Face layout, and {source} is a GGUF "
            "file, which is de-quantised; leave model.quantization out"
        )
    packed: dict[str, Any] = {}
    if quantized and config.quantization is not None:
        settings = bitsandbytes_settings(config, working)
        packed = {"quantization_config": settings, "device_map": {"": device}}
    try:
        return load_model(
            source,
            revision=config.revision,
            dtype=working,
            attn_implementation=config.attn_implementation,
            packed=packed,
        )
    except UserError as error:
        raise UserError(f"model.path: {error}") from error
    except OSError as error:
        raise UserError(_access_message("model.path", source, error)) from error


def export_dtype(config: TrainConfig) -> torch.dtype:
    """Type of the exported weights: ``export.dtype``, or the base's own.

    A base that trains in less than float32 (``model.dtype``), or comes as a GGUF file, is exported as it trains.

    Raises:
        ValueError: The base cannot be read, or a type is unknown.
    """
    source, working = model_source(config.model), _known("model.dtype", config.model.dtype)
    stored = None if Path(source).is_file() else _stored_base(config.model)
    if config.export.dtype:
        return _known("export.dtype", config.export.dtype)
    if stored is None or working != torch.float32:
        return working
    own = stored.dtype if stored.dtype in DTYPES.values() else torch.float32
    if len(stored.dtypes) > 1 or own != stored.dtype:
        counts = ", ".join(f"{count} tensors in {name}" for name, count in sorted(stored.dtypes.items()))
        log.info("export: the base holds %s; all are exported in %s (export.dtype chooses)", counts, _named(own))
    elif own != torch.float32:
        log.info("export: weights in %s, as the base's are (export.dtype chooses)", _named(own))
    return own


def _stored_base(config: ModelConfig) -> StoredModel:
    """The base's files, their headers checked."""
    source = model_source(config)
    try:
        return StoredModel(fetched(source, config.revision))
    except UserError as error:
        raise UserError(f"model.path: {error}") from error
    except OSError as error:
        raise UserError(_access_message("model.path", source, error)) from error


def _known(field: str, name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"{field} is {name!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a padding token.

    Raises:
        ValueError: There is none, no access, or it has more ids than the model's config says there are embeddings.
    """
    source = files_source(config)
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


def base_stops(config: ModelConfig) -> list[int]:
    """The ids at which the base stops generating, by its own configs; its tokenizer's is not among them."""
    return stored_stops(files_source(config), config.revision)


def check_tokenizer(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, records: Iterable[Record]
) -> None:
    """Check a tokenizer against the model as it is loaded, and against its own file on some of the data.

    Raises:
        ValueError: It has ids beyond the embeddings, or reads a record otherwise than its ``tokenizer.json``.
    """
    source = files_source(config)
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
