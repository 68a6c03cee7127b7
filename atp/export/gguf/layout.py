"""How a pruned model is laid out in GGUF: which llama.cpp architecture holds it, and which tensors the file has.

Decides and refuses, writes nothing: :mod:`atp.export.gguf.file` turns a layout into a file, and a run can ask for one
before it trains. It reads configs and tensor names only. What is said here of llama.cpp (names of keys and tensors,
what each architecture's loader accepts) was read in its sources and checked by running it. Its traps:

* ``llama``, ``qwen2`` and ``qwen3`` build every layer at the widths of the first. Widths per layer need ``deci``
  (Llama, Mistral and Qwen2 weights) or ``openelm`` (Qwen3 weights: it normalises queries and keys, but ties the output
  head). An untied Qwen3 is filled up with zeros to the widest layer, which is exact and as large as that.
* Types that store weights in blocks need rows of whole blocks; FFN channels are filled up with zeros to them.
* ``deci`` drops the attention of a layer without FFN and takes the head size from layer 0; ``openelm`` builds every
  block. Where a block is needed but absent, one unit of zeros stands for it.
* ``qwen2`` takes only as many heads as make up the hidden size; ``llama`` takes any, and Qwen2's biases too.
* ``llama`` and ``deci`` rotate neighbouring dimensions, transformers the two halves of a head, so that the rows of
  queries and keys are permuted; the other architectures rotate halves.
* All heads have one size, for keys and for values. Dimensions that were removed inside heads are written as zeros,
  which is exact, as the scale of the scores stays that of whole heads.
* What else a family needs (multipliers, caps, windows) is metadata that its row in the table names.

How positions are written, rotary and windows, is in :mod:`atp.export.gguf.positions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedConfig

from atp.errors import UserError
from atp.export.gguf.positions import check_positions, check_score_scale, context_of, rope_of, rotary
from atp.export.gguf.tensors import GgufTensor, layer_tensors
from atp.model.families import FAMILIES, family_of
from atp.model.gguf.names import EMBEDDINGS, FINAL_NORM, HEAD, ROTARY_FACTORS
from atp.model.widths import LayerWidths, layer_widths

PER_LAYER = frozenset(family.gguf[1] for family in FAMILIES.values() if family.gguf[1] != family.gguf[0])
"""llama.cpp's architectures whose layers may differ in width; the table of families names them."""
FILLED_NOTE = (
    "llama.cpp has no architecture that holds this family with widths per layer (Qwen3: with an untied head or scaled "
    "rotary frequencies); GGUF files hold it with zeros up to the widest layer. Prune with prune.shape=uniform for "
    "small ones"
)
_BYTES_PER_WEIGHT = 34 / 32  # q8_0; the fewer, the more filling up pays


@dataclass(frozen=True)
class GgufLayout:
    """Architecture, metadata and list of tensors of a GGUF file, without the numbers and the vocabulary.

    Attributes:
        architecture: llama.cpp's name of the architecture.
        widths: Widths of every layer as written, zeroed units included.
        fields: Metadata below ``<architecture>.``.
        tensors: The tensors, in file order.
        notes: What the reader of the export should know.
    """

    architecture: str
    widths: tuple[LayerWidths, ...]
    fields: dict[str, Any] = field(default_factory=dict)
    tensors: tuple[GgufTensor, ...] = ()
    notes: tuple[str, ...] = ()


def gguf_architecture(config: PreTrainedConfig, *, uniform: bool) -> str:
    """Names the llama.cpp architecture for a model, before its widths are known.

    Args:
        config: Config of the dense or the pruned model.
        uniform: Whether all layers have the same widths, and every layer both blocks.

    Returns:
        Its name; one not in :data:`PER_LAYER` for widths per layer means that :func:`gguf_layout` fills up all layers
        with zeros to one size, as no other architecture computes the model.

    Raises:
        ValueError: No architecture of llama.cpp computes this model; the message says what would.
    """
    family = family_of(config)
    whole, per_layer = family.gguf
    if "gguf" in family.refused:
        raise UserError(f"GGUF: {family.refused['gguf']}; leave export.gguf out")
    activation = family.activation_of(config)
    if activation not in family.activations:
        raise UserError(
            f"GGUF: {family.activation}={activation!r} has no llama.cpp architecture here; only "
            f"{family.activations[0]} has"
        )
    if family.gguf_tied_only and not config.tie_word_embeddings:
        raise UserError(
            f"GGUF: llama.cpp's {whole} takes the embeddings as the output head, and this model has a head of its own "
            "(tie_word_embeddings=false); leave export.gguf out"
        )
    check_positions(config)
    if whole == "qwen3" and family.has_bias(config, "output"):
        raise UserError("GGUF: llama.cpp's Qwen3 has no bias in its output projection; export without attention_bias")
    fits = per_layer != "openelm" or _fits_openelm(config)
    return per_layer if fits and not uniform else whole


def check_layout(config: PreTrainedConfig, *, uniform: bool, axes: Sequence[str] = ()) -> str:
    """Refuses, before the widths are known, what :func:`gguf_layout` would refuse of the pruned model.

    Args:
        config: Config of the dense model.
        uniform: As in :func:`gguf_architecture`.
        axes: Kinds of units that pruning may remove (``prune.space``).

    Returns:
        Name of the architecture.

    Raises:
        ValueError: llama.cpp could not compute the pruned model; the message says why and what can be done.
    """
    architecture = gguf_architecture(config, uniform=uniform)
    refused = family_of(config).refused
    for kind in axes:
        if reason := refused.get(f"gguf:{kind}"):
            raise UserError(f"GGUF: {reason}; take {kind} out of prune.space={list(axes)}, or leave export.gguf out")
    head_dim = _one_head_dim(config, layer_widths(config))
    rotary(config, _roped(config, architecture), head_dim)
    check_score_scale(config, config.num_attention_heads, head_dim, axes)
    return architecture


def _roped(config: PreTrainedConfig, architecture: str) -> str:
    """The architecture that reads this kind of rotary scaling: llama computes Qwen2 too and takes every static one."""
    plain = rope_of(config).get("rope_type", "default") in ("default", "linear", "yarn")
    return "llama" if architecture == "qwen2" and not plain else architecture


def _fits_openelm(config: PreTrainedConfig) -> bool:
    """Whether llama.cpp's openelm computes a Qwen3: it ties the output head and scales no rotary frequencies."""
    return config.tie_word_embeddings and rope_of(config).get("rope_type", "default") in ("default", "linear")


def gguf_layout(config: PreTrainedConfig, *, block: int = 1) -> GgufLayout:
    """Lays out a model.

    Args:
        config: Config of a dense or pruned model.
        block: Weights of a row that the type stores together. FFN channels are filled up with zeros to a multiple where
            that takes less space than rows left in float16.

    Raises:
        ValueError: llama.cpp cannot compute this model; the message says why and what can be done.
    """
    widths = layer_widths(config)
    uniform = widths[0].has_attention and widths[0].has_mlp and len(set(widths)) == 1
    architecture = _roped(config, gguf_architecture(config, uniform=uniform))
    head_dim = _one_head_dim(config, widths)
    if architecture == "qwen2" and widths[0].num_attention_heads * head_dim != config.hidden_size:
        architecture = "llama"
    written, notes = _written(config, widths, architecture, head_dim, block)
    _check_cuts(config, widths, written)
    check_score_scale(config, written[0].num_attention_heads, head_dim)
    factors, rope_fields = rotary(config, architecture, head_dim)
    context, window_notes = context_of(config)
    notes += window_notes
    if any(layer.is_slim for layer in widths):
        notes += ("dimensions removed inside heads are zeros in this file, as llama.cpp knows one head size",)
    counts = _counts(written, as_lists=architecture in PER_LAYER)
    fields = {
        "vocab_size": config.vocab_size,
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": len(written),
        "attention.head_count": counts[0],
        "attention.head_count_kv": counts[1],
        "feed_forward_length": counts[2],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        **rope_fields,
        **_own_fields(config),
    }
    tensors = [GgufTensor(ROTARY_FACTORS, (len(factors),), filling=factors)] if factors else []
    for index, (kept, layer) in enumerate(zip(widths, written, strict=True)):
        tensors += layer_tensors(config, architecture, index, kept, layer)
    return GgufLayout(architecture, written, fields, (*_outer_tensors(config), *tensors), notes)


def _own_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Metadata that the family's row names, where the config has it."""
    fields = family_of(config).gguf_fields.items()
    return {key: value for key, name in fields if (value := getattr(config, name, None)) is not None}


def _check_cuts(config: PreTrainedConfig, widths: Sequence[LayerWidths], written: Sequence[LayerWidths]) -> None:
    """Refuses a model that lost units that the family's row says llama.cpp cannot be without."""
    refused = family_of(config).refused
    if "gguf:qk_pairs" in refused and any(layer.rotary_pairs is not None for layer in widths):
        raise UserError(f"GGUF: {refused['gguf:qk_pairs']}; leave GGUF out")
    lost = any(layer.num_attention_heads * layer.head_dim != config.hidden_size for layer in (*widths, *written))
    if "gguf:heads" in refused and lost:
        raise UserError(f"GGUF: {refused['gguf:heads']}; leave GGUF out")


def _outer_tensors(config: PreTrainedConfig) -> list[GgufTensor]:
    """Tensors outside the layers."""
    table = (config.vocab_size, config.hidden_size)
    family = family_of(config)
    embeddings, final_norm, head = family.embedding_tensors
    tensors = [
        GgufTensor(EMBEDDINGS, table, (embeddings,)),
        GgufTensor(FINAL_NORM, table[1:], (final_norm,), added=family.norm_offset),
    ]
    if not config.tie_word_embeddings:
        tensors.append(GgufTensor(HEAD, table, (head,)))
    elif family.gguf_own_head:
        tensors.append(GgufTensor(HEAD, table, (embeddings,)))
    return tensors


def _one_head_dim(config: PreTrainedConfig, widths: Sequence[LayerWidths]) -> int:
    """The head size of all layers; llama.cpp reads one."""
    dense = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = sorted({layer.head_dim for layer in widths if layer.has_attention}) or [dense]
    if len(sizes) > 1:
        raise UserError(f"GGUF: layers have head sizes {sizes}, and llama.cpp reads one for all; leave GGUF out")
    return sizes[0]


def _written(
    config: PreTrainedConfig, widths: Sequence[LayerWidths], architecture: str, head_dim: int, block: int
) -> tuple[tuple[LayerWidths, ...], tuple[str, ...]]:
    """The widths of the file's layers, and what to say of them."""
    filled = [_with_blocks(layer, index, architecture, head_dim) for index, layer in enumerate(widths)]
    notes: tuple[str, ...] = ()
    if architecture not in PER_LAYER and len(set(filled)) > 1:
        kv_heads = max(layer.num_key_value_heads for layer in filled)
        group = max(layer.num_attention_heads // layer.num_key_value_heads for layer in filled)
        channels = max(layer.intermediate_size for layer in filled)
        filled = [LayerWidths(kv_heads * group, kv_heads, head_dim, channels)] * len(filled)
        notes = (FILLED_NOTE,)
    if config.hidden_size % block == 0:
        channels_written = [_whole_blocks(layer.intermediate_size, block) for layer in filled]
        filled = [replace(layer, intermediate_size=n) for layer, n in zip(filled, channels_written, strict=True)]
    return tuple(filled), notes


def _with_blocks(layer: LayerWidths, index: int, architecture: str, head_dim: int) -> LayerWidths:
    """The widths of a layer, one unit of zeros where llama.cpp needs a block that is not there."""
    heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
    if not layer.has_attention and (index == 0 or architecture != "deci"):
        heads = kv_heads = 1
    return LayerWidths(heads, kv_heads, head_dim if heads else 0, max(layer.intermediate_size, 1))


def _whole_blocks(channels: int, block: int) -> int:
    """Channels filled up to whole blocks, where three matrices of them take less space than one left in float16."""
    whole = -(-channels // block) * block
    return whole if 3 * whole * _BYTES_PER_WEIGHT < channels * (2 * _BYTES_PER_WEIGHT + 2) else channels


def _counts(written: Sequence[LayerWidths], *, as_lists: bool) -> list[Any]:
    """Query heads, KV heads and channels: of every layer, or of all."""
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    lists = [[getattr(layer, name) for layer in written] for name in names]
    return lists if as_lists else [values[0] for values in lists]
