"""How a pruned model is laid out in GGUF: which llama.cpp architecture holds it, and which tensors the file has.

Decides and refuses, writes nothing: :mod:`atp.export.gguf_file` turns a layout into a file, and a run can ask for one
before it trains. It reads configs and tensor names only. What is said here of llama.cpp (names of keys and tensors,
what each architecture's loader accepts) was read in its sources and checked by running it. Its traps:

* ``llama``, ``qwen2`` and ``qwen3`` build every layer at the widths of the first. Widths per layer need ``deci``
  (Llama, Mistral and Qwen2 weights) or ``openelm`` (Qwen3 weights: it normalises queries and keys, but ties the output
  head).
* ``deci`` drops the attention of a layer without FFN and takes the head size from layer 0; ``openelm`` builds every
  block. Where a block is needed but absent, one unit of zeros stands for it.
* ``qwen2`` takes only as many heads as make up the hidden size; ``llama`` takes any, and Qwen2's biases too.
* ``llama`` and ``deci`` rotate neighbouring dimensions, transformers the two halves of a head, so that the rows of
  queries and keys are permuted; the other architectures rotate halves.
* All heads have one size, for keys and for values. Dimensions that were removed inside heads are written as zeros,
  which is exact, as the scale of the scores stays that of whole heads.
* Rotary scaling is written as frequency factors where the architecture reads them, which holds every static kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from transformers import PreTrainedConfig

from atp.architecture import LayerWidths, family, layer_widths

UNIFORM = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
PER_LAYER = {"llama": "deci", "mistral": "deci", "qwen2": "deci", "qwen3": "openelm"}
_NEIGHBOURS = ("llama", "deci")
_LONGEST_EXACT_CONTEXT = 1 << 30


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        name: Its name in GGUF.
        shape: Rows and columns, or length.
        sources: Stored tensors it is made of, one below the other; none means it is filled.
        heads: Heads whose rows are permuted from halves to neighbours; 0 leaves rows as they are.
        values: What it is filled with, where it has no source: one value for all, or each.
        kept: By source, the dimensions that its heads keep; the others are zero. Empty where heads are whole.
        head_dim: Size of a whole head, where heads keep only some dimensions.
        axis: The dimension along which heads lie.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    heads: int = 0
    values: tuple[float, ...] = (0.0,)
    kept: tuple[tuple[int, ...], ...] = ()
    head_dim: int = 0
    axis: int = 0


@dataclass(frozen=True)
class GgufLayout:
    """Everything about the file but the numbers and the vocabulary.

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

    Raises:
        ValueError: No architecture of llama.cpp computes this model; the message says what would.
    """
    name = family(config)
    if getattr(config, "hidden_act", "silu") != "silu":
        raise ValueError(f"GGUF: hidden_act={config.hidden_act!r} has no llama.cpp architecture here; only silu has")
    if name == "qwen3" and getattr(config, "attention_bias", False):
        raise ValueError("GGUF: llama.cpp's Qwen3 has no bias in its output projection; export without attention_bias")
    if name == "qwen3" and not uniform and not config.tie_word_embeddings:
        raise ValueError(
            "GGUF: widths per layer with Qwen3's query and key norms fit only llama.cpp's openelm, which ties the "
            "output head to the embeddings, and this model does not; prune with prune.shape=uniform, or leave GGUF out"
        )
    if name == "qwen3" and not uniform and _rope(config).get("rope_type", "default") not in ("default", "linear"):
        raise ValueError(
            f"GGUF: llama.cpp's openelm takes no {_rope(config)['rope_type']!r} rotary scaling; prune this Qwen3 with "
            "prune.shape=uniform, or leave GGUF out"
        )
    return (UNIFORM if uniform else PER_LAYER)[name]


def gguf_layout(config: PreTrainedConfig) -> GgufLayout:
    """Lays out a model.

    Args:
        config: Config of a dense or pruned model.

    Raises:
        ValueError: llama.cpp cannot compute this model; the message says why and what can be done.
    """
    widths = layer_widths(config)
    uniform = widths[0].has_attention and widths[0].has_mlp and len(set(widths)) == 1
    architecture = gguf_architecture(config, uniform=uniform)
    head_dim = _one_head_dim(config, widths)
    if architecture == "qwen2" and widths[0].num_attention_heads * head_dim != config.hidden_size:
        architecture = "llama"
    written = tuple(_padded(layer, index, architecture, head_dim) for index, layer in enumerate(widths))
    if architecture in ("qwen3", "openelm") and any(layer.rotary_pairs is not None for layer in widths):
        raise ValueError(
            "GGUF: Qwen3 normalises whole heads, so rotary pairs cannot be cut for llama.cpp; leave GGUF out"
        )
    factors, rope_fields = _rotary(config, architecture, head_dim)
    context, notes = _context(config)
    if any(layer.is_slim for layer in widths):
        notes += ("dimensions removed inside heads are zeros in this file, as llama.cpp knows one head size",)
    if len(set(written)) == 1 and uniform:
        counts: list[Any] = [written[0].num_attention_heads, written[0].num_key_value_heads]
        counts.append(written[0].intermediate_size)
    else:
        counts = [[layer.num_attention_heads for layer in written], [layer.num_key_value_heads for layer in written]]
        counts.append([layer.intermediate_size for layer in written])
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
    }
    tensors = [GgufTensor("token_embd.weight", (config.vocab_size, config.hidden_size), ("model.embed_tokens.weight",))]
    if factors:
        tensors.append(GgufTensor("rope_freqs.weight", (len(factors),), values=factors))
    for index, (kept, layer) in enumerate(zip(widths, written, strict=True)):
        tensors += _layer_tensors(config, architecture, index, kept, layer)
    tensors.append(GgufTensor("output_norm.weight", (config.hidden_size,), ("model.norm.weight",)))
    if not config.tie_word_embeddings:
        tensors.append(GgufTensor("output.weight", (config.vocab_size, config.hidden_size), ("lm_head.weight",)))
    return GgufLayout(architecture, written, fields, tuple(tensors), notes)


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _one_head_dim(config: PreTrainedConfig, widths: Sequence[LayerWidths]) -> int:
    """The head size of all layers; llama.cpp reads one."""
    dense = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = sorted({layer.head_dim for layer in widths if layer.has_attention}) or [dense]
    if len(sizes) > 1:
        raise ValueError(f"GGUF: layers have head sizes {sizes}, and llama.cpp reads one for all; leave GGUF out")
    return sizes[0]


def _padded(layer: LayerWidths, index: int, architecture: str, head_dim: int) -> LayerWidths:
    """The widths as written: one unit of zeros where llama.cpp needs a block that is not there."""
    heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
    if not layer.has_attention and (index == 0 or architecture != "deci"):
        heads = kv_heads = 1
    return LayerWidths(heads, kv_heads, head_dim if heads else 0, max(layer.intermediate_size, 1))


def _rotary(config: PreTrainedConfig, architecture: str, head_dim: int) -> tuple[tuple[float, ...], dict[str, Any]]:
    """Frequency factors (default over actual frequency, none where all are one) and the metadata of the rotary part."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind in ("dynamic", "longrope") or rope.get("partial_rotary_factor", 1.0) != 1.0 or "rope_theta" not in rope:
        raise ValueError(f"GGUF: rotary parameters {rope} change with the length or are partial; not supported")
    rotary: Any = LlamaRotaryEmbedding(cast(Any, config))
    actual = rotary.inv_freq.double()
    default = float(rope["rope_theta"]) ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if actual.shape != default.shape:
        raise ValueError(f"GGUF: {2 * len(actual)} rotary dimensions in heads of {head_dim} are not supported")
    ratios = default / actual
    fields: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if kind == "default":
        return (), fields
    if kind == "linear":
        return (), {**fields, "rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn" and architecture not in _NEIGHBOURS:
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        fields |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"])}
        return (), {**fields, "rope.scaling.original_context_length": int(original)}
    if architecture not in _NEIGHBOURS:
        raise ValueError(f"GGUF: llama.cpp's {architecture} takes no {kind!r} rotary scaling; leave GGUF out")
    fields |= {"rope.scaling.type": "none"} if kind == "yarn" else {}
    if rotary.attention_scaling != 1.0:
        fields["rope.scaling.attn_factor"] = float(rotary.attention_scaling)
    return tuple(float(ratio) for ratio in ratios), fields


def _context(config: PreTrainedConfig) -> tuple[int, tuple[str, ...]]:
    """Longest context that llama.cpp computes as transformers does; these architectures know no sliding window."""
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    windowed |= family(config) == "mistral" and getattr(config, "sliding_window", None) is not None
    window = config.sliding_window if windowed else _LONGEST_EXACT_CONTEXT
    if window >= config.max_position_embeddings:
        return int(config.max_position_embeddings), ()
    return int(window), (
        f"llama.cpp computes no sliding window here: the context is limited to the window of {window} tokens, within "
        "which both agree",
    )


_BLOCKS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _layer_tensors(
    config: PreTrainedConfig, architecture: str, index: int, kept: LayerWidths, written: LayerWidths
) -> list[GgufTensor]:
    """Tensors of one layer; those of a block that is written but absent are zero, its norms one."""
    hidden, prefix, block = config.hidden_size, f"model.layers.{index}.", f"blk.{index}."
    queries, keys = (count * written.head_dim for count in (written.num_attention_heads, written.num_key_value_heads))
    channels = written.intermediate_size
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (channels, hidden),
        "mlp.up_proj": (channels, hidden),
        "mlp.down_proj": (hidden, channels),
    }
    permuted = {"self_attn.q_proj": written.num_attention_heads, "self_attn.k_proj": written.num_key_value_heads}

    def norm(name: str, source: str, size: int, present: bool) -> GgufTensor:
        return GgufTensor(f"{block}{name}.weight", (size,), (f"{prefix}{source}.weight",) if present else (), 0, (1.0,))

    tensors = []
    if queries:
        tensors.append(norm("attn_norm", "input_layernorm", hidden, kept.has_attention))
    if queries and family(config) == "qwen3":
        tensors += [
            norm(f"attn_{part}_norm", f"self_attn.{part}_norm", written.head_dim, kept.has_attention) for part in "qk"
        ]
    tensors.append(norm("ffn_norm", "post_attention_layernorm", hidden, kept.has_mlp))
    if architecture == "openelm":
        fused = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        sources = tuple(f"{prefix}{module}.weight" for module in fused) if kept.has_attention else ()
        spread = _spread(kept, *fused) if sources else {}
        tensors.append(GgufTensor(f"{block}attn_qkv.weight", (queries + 2 * keys, hidden), sources, **spread))
        shapes = {module: shape for module, shape in shapes.items() if module not in fused}
    for module, shape in shapes.items():
        present = kept.has_attention if module.startswith("self_attn") else kept.has_mlp
        heads = permuted.get(module, 0) if architecture in _NEIGHBOURS else 0
        if 0 in shape:
            continue
        name = block + _BLOCKS[module]
        sources = (f"{prefix}{module}.weight",) if present else ()
        spread = _spread(kept, module) if present and module.startswith("self_attn") else {}
        tensors.append(GgufTensor(f"{name}.weight", shape, sources, heads, **spread))
        if present and _has_bias(config, module):
            spread = {} if module == "self_attn.o_proj" else spread
            tensors.append(GgufTensor(f"{name}.bias", shape[:1], (f"{prefix}{module}.bias",), heads, **spread))
    return tensors


def _spread(kept: LayerWidths, *modules: str) -> dict[str, Any]:
    """Where the dimensions of slim heads go in whole ones, for the weights of an attention block."""
    if not kept.is_slim:
        return {}
    half = kept.head_dim // 2
    pairs = kept.rotary_pairs or tuple(range(half))
    rotary = (*pairs, *(pair + half for pair in pairs))
    values = tuple(range(kept.value_dim or kept.head_dim))
    positions = tuple(rotary if module.endswith(("q_proj", "k_proj")) else values for module in modules)
    return {"kept": positions, "head_dim": kept.head_dim, "axis": int(modules[0].endswith("o_proj"))}


def _has_bias(config: PreTrainedConfig, module: str) -> bool:
    if family(config) == "qwen2":
        return module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return bool(getattr(config, "attention_bias" if module.startswith("self_attn") else "mlp_bias", False))
