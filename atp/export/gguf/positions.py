"""How positions are written for llama.cpp: rotary frequencies, layers without them, sliding windows, scale of scores.

Beside :mod:`atp.export.gguf.layout`, which asks here. Decides and refuses by the config alone. What llama.cpp does
whatever a file says was read in its sources and checked by running it: ``smollm3`` leaves every fourth layer unrotated;
``gemma2`` and ``gemma3`` slide in all layers but every second or sixth, and for their largest models take the scale of
scores from the widths. Rotary scaling is written as frequency factors where the architecture reads them, which holds
every static kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedConfig

from atp.errors import UserError
from atp.model.families import family_of
from atp.model.gguf.names import FACTORS

_LONGEST_EXACT_CONTEXT = 1 << 30
UNROTATED_STEP = 4
"""Every which layer llama.cpp's smollm3 leaves unrotated."""
LOCAL_BASE = 10000.0
"""Rotary base of sliding layers in llama.cpp's architectures that have one for each kind of layer."""


def rope_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Rotary parameters of the layers that attend to everything."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    return dict(rope["full_attention"]) if "full_attention" in rope else rope


def check_positions(config: PreTrainedConfig) -> None:
    """Refuses layers without rotary, or sliding ones, elsewhere or otherwise than llama.cpp has them.

    Raises:
        UserError: What the config says, and what llama.cpp does.
    """
    family, layers = family_of(config), range(config.num_hidden_layers)
    if family.unrotated:
        rotated = [bool(value) for value in getattr(config, family.unrotated)[: len(layers)]]
        if rotated != [bool((index + 1) % UNROTATED_STEP) for index in layers]:
            raise UserError(
                f"GGUF: llama.cpp rotates all layers but every {UNROTATED_STEP}th, the model's config has "
                f"{family.unrotated}={getattr(config, family.unrotated)}; leave export.gguf out"
            )
    if step := family.gguf_window_step:
        slides = [kind == "sliding_attention" for kind in config.layer_types]
        if slides != [bool((index + 1) % step) for index in layers]:
            raise UserError(
                f"GGUF: llama.cpp slides in all layers of {config.model_type} but every {step}th, the model's config "
                f"has layer_types={config.layer_types}; leave export.gguf out"
            )
        local = (config.rope_parameters or {}).get("sliding_attention")
        if local and (local.get("rope_type", "default") != "default" or local["rope_theta"] != LOCAL_BASE):
            raise UserError(
                f"GGUF: llama.cpp rotates sliding layers with a base of {LOCAL_BASE:g}, the model has {local}; "
                "leave export.gguf out"
            )


def check_score_scale(config: PreTrainedConfig, num_heads: int, head_dim: int, axes: Sequence[str] = ()) -> None:
    """Refuses scores of another scale than llama.cpp takes, which it has in no field of a file.

    Args:
        config: Config of the dense or the pruned model.
        num_heads: Query heads of its layers as written.
        head_dim: Size of a head.
        axes: Kinds of units that pruning may still remove.

    Raises:
        UserError: What the config says, and what llama.cpp would compute.
    """
    family = family_of(config)
    for name in (family.score_cap, family.logit_cap) if family.score_cap else ():
        if getattr(config, name, None) is None:
            raise UserError(
                f"GGUF: llama.cpp caps scores and logits of every {config.model_type}, the model's config has "
                f"{name}=None; leave export.gguf out"
            )
    if not family.score_size:
        return
    size, layers = float(getattr(config, family.score_size)), config.num_hidden_layers
    by_width = layers == family.gguf_wide_layers
    taken = config.hidden_size / num_heads if by_width else head_dim
    if by_width and (cut := [kind for kind in axes if kind in ("heads", "query_heads", "hidden")]):
        raise UserError(
            f"GGUF: llama.cpp takes the scale of scores from the widths of a {config.model_type} of {layers} layers; "
            f"take {', '.join(cut)} out of prune.space={list(axes)}, or leave export.gguf out"
        )
    if size != taken:
        raise UserError(
            f"GGUF: llama.cpp divides scores of this {config.model_type} by the root of {taken:g}, the model's config "
            f"has {family.score_size}={size:g}; leave export.gguf out"
        )


def rotary(config: PreTrainedConfig, architecture: str, head_dim: int) -> tuple[tuple[float, ...], dict[str, Any]]:
    """Frequency factors (default over actual frequency, none where all are one) and the metadata of the rotary part."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind in ("dynamic", "longrope") or rope.get("partial_rotary_factor", 1.0) != 1.0 or "rope_theta" not in rope:
        raise UserError(
            f"GGUF: rope_parameters={rope} of the model's config change with the length or are partial, for which "
            "files have no field; leave GGUF out (export.gguf)"
        )
    fields: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if kind == "default":
        return (), fields
    if kind == "linear":
        return (), {**fields, "rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn" and architecture not in FACTORS:
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        fields |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"])}
        return (), {**fields, "rope.scaling.original_context_length": int(original)}
    if architecture not in FACTORS:
        raise UserError(f"GGUF: llama.cpp's {architecture} takes no {kind!r} rotary scaling; leave GGUF out")
    computed: Any = LlamaRotaryEmbedding(cast(Any, config))
    actual = computed.inv_freq.double()
    default = float(rope["rope_theta"]) ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if actual.shape != default.shape:
        raise UserError(f"GGUF: {2 * len(actual)} rotary dimensions in heads of {head_dim} are not supported")
    ratios = default / actual
    fields |= {"rope.scaling.type": "none"} if kind == "yarn" else {}
    if computed.attention_scaling != 1.0:
        fields["rope.scaling.attn_factor"] = float(computed.attention_scaling)
    return tuple(float(ratio) for ratio in ratios), fields


def context_of(config: PreTrainedConfig) -> tuple[int, tuple[str, ...]]:
    """Longest context that llama.cpp computes as transformers does: the window, for architectures that know none."""
    family = family_of(config)
    window = (None if family.gguf_window_step else family.window(config)) or _LONGEST_EXACT_CONTEXT
    if window >= config.max_position_embeddings:
        return int(config.max_position_embeddings), ()
    return int(window), (
        f"llama.cpp computes no sliding window here: the context is limited to the window of {window} tokens, within "
        "which both agree",
    )
