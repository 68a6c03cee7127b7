"""A larger sibling of the embedded base, grown from its weights.

What it is: a shape of twice the size, and a model of that shape which computes what the base computes.
Where it sits: the base -> growth -> pretrain, which trains all of it (`python -m atp.embedded.pretrain --larger`).
What it does NOT know: corpus, training, pruning.

The function is kept by weights that are zero where something new is written to the residual stream (Net2Net, Chen et
al. 2015, arXiv 1511.05641; identity blocks as in Gong et al. 2019, progressive stacking, with zeros instead of copies):
new heads and channels by zero columns of `o_proj` and `down_proj`, new layers by both being zero. What reads the
stream is drawn at random, so that all of it learns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from atp.embedded import base_dir
from atp.errors import UserError

LAYERS, HEADS, KV_HEADS, CHANNELS = 10, 8, 4, 768
_WRITERS = ("o_proj", "down_proj")


def sibling(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a model of twice the embedded base's size that computes what the base does.

    Args:
        tokenizer: of the text that it is to be trained on.

    Raises:
        ValueError: the base that ships was trained with other tokens.
    """
    stored = PreTrainedTokenizerFast.from_pretrained(base_dir())
    if stored.get_vocab() != tokenizer.get_vocab():
        raise UserError("--larger: the base in atp/embedded/base has other tokens than this corpus; make it anew")
    base = LlamaForCausalLM.from_pretrained(base_dir(), dtype=torch.float32)
    return grow(base, larger_config(base.config))


def larger_config(base: LlamaConfig) -> LlamaConfig:
    """Return the sibling's shape: more layers, heads and FFN channels, the same hidden width, head width and tokens."""
    fields = base.to_dict() | {
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": CHANNELS,
    }
    return LlamaConfig.from_dict(fields)


def grow(base: LlamaForCausalLM, config: LlamaConfig) -> LlamaForCausalLM:
    """Return a float32 model of the given shape that computes what the base does, with weights of its own.

    Base layers keep their order and are spread evenly; new layers stand after them.

    Args:
        base: what is grown.
        config: at least as many layers, heads and channels, query heads per group at least as many; the rest alike.

    Raises:
        ValueError: the shape is smaller than the base's somewhere, or differs in what cannot grow.
    """
    _check(base.config, config)
    model = LlamaForCausalLM(config)
    homes = [i * config.num_hidden_layers // base.config.num_hidden_layers for i in range(len(base.model.layers))]
    with torch.no_grad():
        for layer in model.model.layers:
            for name, weight in layer.named_parameters():
                if name.split(".")[-2] in _WRITERS:
                    weight.zero_()
        for old, home in zip(base.model.layers, homes, strict=True):
            for name, weight in model.model.layers[home].named_parameters():
                _place(name, old.get_parameter(name), weight, base.config, config)
        model.model.embed_tokens.weight.copy_(base.model.embed_tokens.weight)
        model.model.norm.weight.copy_(base.model.norm.weight)
        if not config.tie_word_embeddings:
            model.lm_head.weight.copy_(base.lm_head.weight)
    return model


def _groups(config: LlamaConfig) -> tuple[int, int]:
    """Return key-value heads and query heads for each of them."""
    heads = config.num_key_value_heads or config.num_attention_heads
    return heads, config.num_attention_heads // heads


def _place(name: str, old: Tensor, new: Tensor, base: LlamaConfig, config: LlamaConfig) -> None:
    """Copy a layer's weight into the larger one, query heads into the groups of the key-value heads they belong to."""
    projection = name.split(".")[-2]
    (kv, group), width = _groups(base), base.hidden_size
    if projection == "q_proj":
        new.view(*_groups(config), -1, width)[:kv, :group] = old.view(kv, group, -1, width)
    elif projection == "o_proj":
        new.view(width, *_groups(config), -1)[:, :kv, :group] = old.view(width, kv, group, -1)
    elif old.ndim == 1:
        new.copy_(old)
    else:
        new[: old.shape[0], : old.shape[1]] = old


def _check(base: LlamaConfig, config: LlamaConfig) -> None:
    for name in ("hidden_size", "head_dim", "vocab_size", "tie_word_embeddings", "attention_bias", "mlp_bias"):
        if getattr(base, name) != getattr(config, name):
            raise UserError(f"{name}={getattr(config, name)} differs from the base's {getattr(base, name)}; keep it")
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) < getattr(base, name):
            least = getattr(base, name)
            raise UserError(f"{name}={getattr(config, name)} is below the base's {least}; give at least that")
    (_, least), (_, group) = _groups(base), _groups(config)
    if group < least:
        raise UserError(
            f"num_attention_heads={config.num_attention_heads} leaves {group} query heads per key-value head where "
            f"the base has {least}; give at least as many"
        )
    if base.attention_bias or base.mlp_bias:
        raise UserError("attention_bias or mlp_bias is set: weights only are grown; take a base without biases")
