"""The config of the model in a GGUF file, from its metadata and the names of its tensors.

Between :mod:`atp.model.gguf.reading` and the weights. Refuses what the families here do not compute, as the weights
would load and the answers be wrong.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig

from atp.errors import UserError
from atp.model.families import FAMILIES
from atp.model.gguf.names import EMBEDDINGS, HEAD, NEIGHBOURS, ROTARY_FACTORS
from atp.model.gguf.reading import GgufFile

log = logging.getLogger(__name__)

WHOLE = {family.gguf[0]: name for name, family in reversed(FAMILIES.items()) if family.gguf_base}
"""llama.cpp's architecture -> the family that computes it; widths are equal in all layers."""
PER_LAYER = frozenset(family.gguf[1] for family in FAMILIES.values() if family.gguf_base)

_READ = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scale_linear"),
    *("rope.scaling.attn_factor", "rope.scaling.finetuned"),
)
_NEUTRAL = {"expert_count": (0,), "expert_used_count": (0,), "attention.causal": (True,), "logit_scale": (0, 1)}
"""Metadata that only these values of are computed by the families here."""
# Low and high factor that Llama 3.1, 3.2 and 3.3 share, and their original context: facts of their configs.
_LOW, _HIGH = 1.0, 4.0
_ORIGINALS = (8192, *(1 << power for power in range(4, 18)))
_SAME = 1e-5


def gguf_config(file: GgufFile) -> PreTrainedConfig:
    """The config of the model in a file, without anything about its quantisation.

    Raises:
        ValueError: Its architecture is none of the families here, or it computes what they do not.
    """
    architecture = _architecture(file)
    _refuse_what_is_not_computed(file, architecture)
    hidden, heads = (int(_own(file, key)) for key in ("embedding_length", "attention.head_count"))
    head_dim = _head_dim(file, hidden // heads)
    family, biases = _family(file, architecture, hidden, heads)
    fields: dict[str, Any] = {
        "vocab_size": file.shapes[EMBEDDINGS][0] if EMBEDDINGS in file.shapes else _own(file, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": int(_own(file, "feed_forward_length")),
        "num_hidden_layers": int(_own(file, "block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(_own(file, "attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "max_position_embeddings": int(_own(file, "context_length")),
        "rms_norm_eps": float(str(np.float32(_own(file, "attention.layer_norm_rms_epsilon")))),
        "tie_word_embeddings": HEAD not in file.shapes,
        "rope_parameters": _rope(file, architecture, head_dim),
        "dtype": "float32",
        **biases,
        **{f"{role}_token_id": file.value(f"tokenizer.ggml.{name}_token_id") for role, name in _SPECIAL.items()},
    }
    turn = file.value("tokenizer.ggml.eot_token_id")
    if turn is not None and turn != fields["eos_token_id"]:  # an instruct model stops at the end of its turn as well
        fields["eos_token_id"] = [index for index in (fields["eos_token_id"], turn) if index is not None]
    if family == "mistral":
        fields["sliding_window"] = None
    config = AutoConfig.for_model(family, **fields)
    config.architectures = [f"{config.__class__.__name__.removesuffix('Config')}ForCausalLM"]
    return config


_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _architecture(file: GgufFile) -> str:
    name = str(file.needed("general.architecture"))
    if name in PER_LAYER:
        raise UserError(
            f"{file.path} holds layers of different widths (llama.cpp's {name!r}), which are read from the Hugging "
            "Face directory that the file was made of: model.path=<directory>"
        )
    if name not in WHOLE:
        raise UserError(
            f"{file.path} is of llama.cpp's architecture {name!r}; ATP prunes {', '.join(sorted(WHOLE))} "
            "(Llama, Mistral, Qwen2 and Qwen3)"
        )
    return name


def _own(file: GgufFile, key: str, default: Any = None) -> Any:
    """A value below the architecture's name, equal for all layers; it must be there where there is no default."""
    name = f"{file.needed('general.architecture')}.{key}"
    value = file.needed(name) if default is None else file.value(name, default)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise UserError(f"{file.path}: {name}={value} differs by layer, which only exports of other forms have")
        return value[0]
    return value


def _refuse_what_is_not_computed(file: GgufFile, architecture: str) -> None:
    unread = []
    for key in file.metadata:
        name = key.removeprefix(f"{architecture}.")
        if name == key or name in _READ:
            continue
        value = file.value(key)
        if name in _NEUTRAL and value in _NEUTRAL[name]:
            continue
        if name in _NEUTRAL or name.startswith(("expert", "attention.", "residual_scale", "embedding_scale")):
            raise UserError(
                f"{file.path} has {key}={value}, which no family here computes (they are {', '.join(FAMILIES)})"
            )
        unread.append(key)
    if unread:
        log.warning("%s: not read: %s", file.path, ", ".join(unread))


def _head_dim(file: GgufFile, usual: int) -> int:
    rotary = int(_own(file, "rope.dimension_count", 0))
    size = int(_own(file, "attention.key_length", rotary or usual))
    values = int(_own(file, "attention.value_length", size))
    if (rotary or size) != size or values != size:
        raise UserError(
            f"{file.path}: heads have {size} dimensions for keys, {values} for values and {rotary} rotary ones; the "
            "families here have one size for all"
        )
    return size


def _family(file: GgufFile, architecture: str, hidden: int, heads: int) -> tuple[str, dict[str, bool]]:
    """The family whose class holds the tensors, and the fields that give its projections their biases."""
    biased = {name.split(".")[2] for name in file.shapes if name.startswith("blk.") and name.endswith(".bias")}
    attention, output, ffn = "attn_q" in biased, "attn_output" in biased, bool(biased & {"ffn_gate", "ffn_down"})
    family = WHOLE[architecture]
    if family == "llama" and attention and not (output or ffn):
        return "qwen2", {}
    if family == "llama" and not (attention or ffn) and hidden % heads:
        return "mistral", {}  # Llama's tensors and function; LlamaConfig refuses the head count
    fields = {"llama": {"attention_bias": attention, "mlp_bias": ffn}, "qwen3": {"attention_bias": attention}}
    return family, fields.get(family, {})


def _rope(file: GgufFile, architecture: str, head_dim: int) -> dict[str, Any]:
    """What transformers calls ``rope_parameters``."""
    theta = float(_own(file, "rope.freq_base", 10000.0))
    kind = _own(file, "rope.scaling.type", "none")
    factor = float(_own(file, "rope.scaling.factor", _own(file, "rope.scale_linear", 1.0)))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    told = f"{file.path}: rotary scaling {kind!r} with factor {factor}"
    if ROTARY_FACTORS in file.shapes:
        return rope | _llama3(file, theta, head_dim)
    if float(_own(file, "rope.scaling.attn_factor", 1.0)) != 1.0:
        raise UserError(f"{told} also scales attention, which cannot be read back")
    if kind == "linear" or (kind == "none" and factor != 1.0):
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and architecture not in NEIGHBOURS:
        original = int(_own(file, "rope.scaling.original_context_length"))
        return rope | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if kind != "none":
        raise UserError(f"{told} is not read here; take the model's Hugging Face directory")
    return rope


def _llama3(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling, where the file's frequency factors are those of it."""
    factors = torch.from_numpy(file.tensor(ROTARY_FACTORS)).double()
    factor = round(float(factors.max()), 4)
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    for original in _ORIGINALS:
        turns = original * frequencies / (2 * torch.pi)  # of a pair over the original context
        share = ((turns - _LOW) / (_HIGH - _LOW)).clamp(0, 1)
        expected = 1 / ((1 - share) / factor + share)
        if factors.shape == expected.shape and torch.allclose(factors, expected, rtol=_SAME, atol=_SAME):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": original,
            }
    raise UserError(
        f"{file.path} scales its rotary frequencies by factors that are not Llama 3's; take the model's Hugging Face "
        "directory"
    )
