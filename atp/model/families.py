"""The table of model families: every name and convention by which one family differs from another, as data.

At the bottom of the model room. Widths, pruning space, masked model, removal, costs, exports and tests read the rows
and ask no ``model_type`` of their own, so a new family is a row here (and its classes in the per-layer modeling file).
What a row says is in :mod:`atp.model.family`. The table knows nothing of masks, LoRA or files. Names and conventions
were read in transformers 5.23, llama.cpp's in its sources (see :mod:`atp.export.gguf.layout`).
"""

from __future__ import annotations

import difflib
from typing import Any

from atp.errors import UserError
from atp.model.family import (
    ALWAYS,
    ATTENTION_ROLES,
    FFN_ROLES,
    PER_LAYER_PREFIX,
    ROLES,
    SILU,
    Family,
    Norm,
    StockClass,
)

__all__ = [
    "ALWAYS",
    "ATTENTION_ROLES",
    "FAMILIES",
    "FFN_ROLES",
    "PER_LAYER_PREFIX",
    "ROLES",
    "SILU",
    "Family",
    "Norm",
    "StockClass",
    "family_of",
    "is_stock",
]

ADDING_PAGE, BASES_PAGE = "docs/how-to/add-a-family.md", "docs/how-to/bases.md"

_ALL_BIASES = dict.fromkeys(ATTENTION_ROLES, "attention_bias") | dict.fromkeys(FFN_ROLES, "mlp_bias")
_HEAD_NORMS = (Norm("self_attn.q_norm", "attention", "query"), Norm("self_attn.k_norm", "attention", "key"))
# A Mistral without a window has Llama's tensors and computes the same, and takes any head count; LlamaConfig refuses
# those that do not divide the hidden size since transformers 5.4. A Mistral config with layer_types is read as another
# architecture.
_LLAMA_AS_MISTRAL = StockClass(
    "mistral",
    unless=("attention_bias", "mlp_bias"),
    without=("attention_bias", "mlp_bias", "pretraining_tp", "layer_types"),
    fields={"sliding_window": None},
)

_WHOLE_QUERIES = "llama.cpp normalises OLMo 2's queries and keys over the heads of the whole model"

_GEMMA_NORMS = (
    Norm("input_layernorm", "attention"),
    Norm("post_attention_layernorm", "attention", after=True),
    Norm("pre_feedforward_layernorm", "mlp"),
    Norm("post_feedforward_layernorm", "mlp", after=True),
)
_GEMMA: dict[str, Any] = {
    "norm_offset": 1.0,
    "logit_cap": "final_logit_softcapping",
    "embedding_root": True,
    "score_size": "query_pre_attn_scalar",
    "activation": "hidden_activation",
    "activations": ("gelu_pytorch_tanh",),
    "requires": {"use_bidirectional_attention": (False, None)},
}

FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family(
            "llama",
            stock=(StockClass("llama", heads_divide_hidden=True), _LLAMA_AS_MISTRAL),
            gguf=("llama", "deci"),
            gguf_base=True,
            biases=_ALL_BIASES,
        ),
        Family(
            "mistral",
            stock=(StockClass("mistral"),),
            gguf=("llama", "deci"),
            gguf_base=True,
            windows="sliding_window",
        ),
        Family(
            "qwen2",
            stock=(StockClass("qwen2"),),
            gguf=("qwen2", "deci"),
            gguf_base=True,
            remarks=("llama.cpp's `qwen2` takes only heads that make up the hidden size; others go as `llama`.",),
            biases=dict.fromkeys(("query", "key", "value"), ALWAYS),
        ),
        Family(
            "qwen3",
            stock=(StockClass("qwen3"),),
            gguf=("qwen3", "openelm"),
            gguf_base=True,
            remarks=("`openelm` holds tied heads only; with a head of their own models go as `qwen3`, with zeros.",),
            refused={"gguf:qk_pairs": "llama.cpp normalises whole heads, which it cannot do without some rotary pairs"},
            biases=dict.fromkeys(ATTENTION_ROLES, "attention_bias"),
            norms=(Norm("input_layernorm", "attention"), *_HEAD_NORMS, Norm("post_attention_layernorm", "mlp")),
        ),
        Family(
            "smollm3",
            stock=(StockClass("smollm3"),),
            gguf=("smollm3", "smollm3"),
            biases=_ALL_BIASES,
            unrotated="no_rope_layers",
        ),
        Family(
            "granite",
            stock=(StockClass("granite"),),
            gguf=("granite", "granite"),
            biases=_ALL_BIASES,
            logit_divisor="logits_scaling",
            gguf_fields={
                "embedding_scale": "embedding_multiplier",
                "residual_scale": "residual_multiplier",
                "attention.scale": "attention_multiplier",
                "logit_scale": "logits_scaling",
            },
        ),
        Family(
            "olmo2",
            stock=(StockClass("olmo2"),),
            gguf=("olmo2", "olmo2"),
            gguf_own_head=True,
            biases=dict.fromkeys(ATTENTION_ROLES, "attention_bias"),
            norms=(
                Norm("self_attn.q_norm", "attention", "query", across_heads=True),
                Norm("self_attn.k_norm", "attention", "key", across_heads=True),
                Norm("post_attention_layernorm", "attention", after=True),
                Norm("post_feedforward_layernorm", "mlp", after=True),
            ),
            refused={
                **dict.fromkeys(("gguf:heads", "gguf:query_heads", "gguf:qk_pairs"), _WHOLE_QUERIES),
                "gguf:hidden": "llama.cpp takes OLMo 2's heads to be as wide together as the residual stream",
            },
        ),
        Family(
            "gemma3_text",
            stock=(StockClass("gemma3_text", heads_divide_hidden=True),),
            gguf=("gemma3", "gemma3"),
            biases=dict.fromkeys(ATTENTION_ROLES, "attention_bias"),
            norms=(*_GEMMA_NORMS, *_HEAD_NORMS),
            gguf_fields={
                "attention.sliding_window": "sliding_window",
                "final_logit_softcapping": "final_logit_softcapping",
            },
            gguf_window_step=6,
            gguf_wide_layers=62,
            refused={"gguf:qk_pairs": "llama.cpp normalises whole heads, which it cannot do without some rotary pairs"},
            **_GEMMA,
        ),
        Family(
            "gemma2",
            stock=(StockClass("gemma2", heads_divide_hidden=True),),
            gguf=("gemma2", "gemma2"),
            biases=dict.fromkeys(ATTENTION_ROLES, "attention_bias"),
            norms=_GEMMA_NORMS,
            score_cap="attn_logit_softcapping",
            gguf_fields={
                "attention.sliding_window": "sliding_window",
                "attn_logit_softcapping": "attn_logit_softcapping",
                "final_logit_softcapping": "final_logit_softcapping",
            },
            gguf_window_step=2,
            gguf_wide_layers=46,
            gguf_tied_only=True,
            remarks=("`gemma2` holds tied heads only; GGUF of a model with a head of its own is refused.",),
            **_GEMMA,
        ),
    )
}
"""The rows, by ``model_type``."""

KNOWN_OTHERS = {
    "phi3": (
        "it holds query, key and value in one matrix, and gate and up in another. Where its rotary positions are plain "
        f"(Phi-4, Phi-3 with a context of 4k) it can be written as a Mistral: {BASES_PAGE}"
    ),
}
"""Families that are asked for and have no row, with what can be done."""


def family_of(config: Any) -> Family:
    """The row of a dense or pruned model's config.

    Args:
        config: A config, or anything with its ``model_type``.

    Raises:
        UserError: The model type is not in the table.
    """
    model_type = getattr(config, "model_type", None)
    name = str(model_type).removeprefix(PER_LAYER_PREFIX)
    if name in FAMILIES:
        return FAMILIES[name]
    if name in KNOWN_OTHERS:
        raise UserError(f"model_type={model_type!r} is not supported: {KNOWN_OTHERS[name]}")
    if (inner := getattr(config, "text_config", None)) is not None:
        raise UserError(_wrapper(model_type, getattr(inner, "model_type", None)))
    near = difflib.get_close_matches(name, FAMILIES, n=1, cutoff=0.5)
    nearest = f"; the nearest of them is {near[0]!r}" if near else ""
    raise UserError(
        f"model_type={model_type!r} is not supported: ATP prunes {', '.join(FAMILIES)}{nearest}. "
        "Use a checkpoint of one of these families (Llama 1/2/3 and their derivatives are 'llama'), or add the family: "
        f"{ADDING_PAGE}"
    )


def _wrapper(model_type: Any, inner: Any) -> str:
    """What to say of a model whose language model is a part of it."""
    told = f"model_type={model_type!r} is a model of more than text"
    if inner in FAMILIES:
        return (
            f"{told}, of which only the text part ({inner!r}) can be pruned; save that by itself, as "
            f"{BASES_PAGE} shows, and give its directory"
        )
    return f"{told}, and its text part ({inner!r}) is none of the families that ATP prunes: {', '.join(FAMILIES)}"


def is_stock(config: Any) -> bool:
    """Tells whether a config belongs to a class of transformers itself, so that loading it needs no code of ours."""
    return config.model_type in FAMILIES
