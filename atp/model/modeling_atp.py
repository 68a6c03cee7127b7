"""LLaMA-family models whose layers differ in width: the file copied beside the weights of a pruned model.

Self-contained (torch and transformers only), so that a pruned model loads without atp installed:
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`. It holds only what differs from the stock
models: every layer is a stock decoder layer built from its own entry of transformers' `per_layer_config` (5.15 or
newer), and a layer whose entry says `skip: ["attention"]` or `skip: ["mlp"]` has that half left out, its norm included.
It knows nothing of masks, of pruning or of how the widths were chosen.

Shape suffixes: B batch, T tokens, D hidden.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2ForCausalLM
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3ForCausalLM
from transformers.models.granite.configuration_granite import GraniteConfig
from transformers.models.granite.modeling_granite import GraniteDecoderLayer, GraniteForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    apply_rotary_pos_emb,
)
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM
from transformers.models.olmo2.configuration_olmo2 import Olmo2Config
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer, Olmo2ForCausalLM
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM
from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer, SmolLM3ForCausalLM

ATTENTION, MLP = "attention", "mlp"


class PerLayerConfigMixin:
    """Replaces the checks of a stock config that read one width for all layers."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.validate()

    def validate(self: Any) -> None:
        """Runs the checks of the stock config, on the layers where they concern widths.

        Raises:
            ValueError: If the config describes a model that cannot be built.
        """
        self.validate_token_ids()
        self.validate_layer_type()
        self.validate_rope()
        self.validate_architecture()

    def validate_architecture(self: Any) -> None:
        """Checks that each layer's widths can be built.

        Raises:
            ValueError: If query heads do not divide among KV heads, a width is not positive, or `skip` holds an
                unknown name.
        """
        for index, layer in enumerate(self.per_layer_config):
            skip = getattr(layer, "skip", ())
            if unknown := set(skip) - {ATTENTION, MLP}:
                raise ValueError(f"layer {index}: skip holds {sorted(unknown)}; it may hold {ATTENTION!r} and {MLP!r}")
            heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
            if ATTENTION not in skip and (heads < 1 or kv_heads < 1 or heads % kv_heads):
                raise ValueError(
                    f"layer {index}: num_attention_heads={heads} must be a positive multiple of "
                    f"num_key_value_heads={kv_heads}, or the layer must list {ATTENTION!r} in its skip"
                )
            if MLP not in skip and layer.intermediate_size < 1:
                raise ValueError(
                    f"layer {index}: intermediate_size={layer.intermediate_size} must be positive, "
                    f"or the layer must list {MLP!r} in its skip"
                )


class NoHeads(nn.Module):
    """Takes the place of a removed attention block: adds nothing to the residual stream.

    It still writes one zero per token to the cache, because generation reads the number of cached tokens from layer 0
    and the attention mask's length from another layer: every layer has to count tokens, with attention or without.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: torch.Tensor, past_key_values: Cache | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """Returns a zero that broadcasts over hidden_states (B, T, D), and no attention weights."""
        if past_key_values is not None:
            batch, tokens = hidden_states.shape[:2]
            layers: list[Any] = past_key_values.layers
            # A static cache may have allocated this layer already, from the config's head counts.
            kept = layers[self.layer_idx].keys if self.layer_idx < len(layers) else None
            heads, dims = (1, 1) if kept is None else (kept.shape[1], kept.shape[3])
            states = hidden_states.new_zeros(batch, heads, tokens, dims)
            past_key_values.update(states, states, self.layer_idx)
        return hidden_states.new_zeros(()), None


class NoChannels(nn.Module):
    """Takes the place of a removed FFN block: adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns a zero that broadcasts over hidden_states (B, T, D)."""
        return hidden_states.new_zeros(())


def build_layer(layer_class: type[nn.Module], config: PreTrainedConfig, layer_idx: int) -> nn.Module:
    """Builds one stock decoder layer at its own widths, without the halves it skips.

    Args:
        layer_class: The family's stock decoder layer.
        config: The model's config.
        layer_idx: Index of the layer.

    Returns:
        The layer; parameters of a skipped half and of its norm do not exist.
    """
    layer_config = copy.copy(config.per_layer_config[layer_idx])
    skip = getattr(layer_config, "skip", ())
    if ATTENTION in skip:
        layer_config.num_attention_heads = layer_config.num_key_value_heads = 1
    if MLP in skip:
        layer_config.intermediate_size = 1
    pairs, value_dim = getattr(layer_config, "rotary_pairs", None), getattr(layer_config, "value_dim", None)
    if ATTENTION not in skip and (pairs is not None or value_dim is not None):
        return build_slim_layer(layer_class, config, layer_config, layer_idx)
    layer: Any = layer_class(layer_config, layer_idx)
    # The forward pass reads the attention kernel from here: it must follow the model's setting, not a copy of it.
    layer.self_attn.config = config
    leave_out(layer, skip, layer_idx)
    return layer


def leave_out(layer: Any, skip: Any, layer_idx: int) -> None:
    """Takes the skipped halves out of a layer, and the norms before and after them."""
    norms = {name for name, _ in layer.named_children() if "norm" in name}
    beside_mlp = {name for name in norms if "feedforward" in name} or {"post_attention_layernorm"}
    if ATTENTION in skip:
        layer.self_attn = NoHeads(layer_idx)
    if MLP in skip:
        layer.mlp = NoChannels()
    for name in norms:
        if (MLP if name in beside_mlp else ATTENTION) in skip:
            setattr(layer, name, nn.Identity())


class SlimAttention(nn.Module):
    """Stock attention whose heads keep only some dimensions; mixed into the family's own attention class.

    Rotary pairs keep the frequencies they had (`rotary_pairs` of `rotary_dim` / 2) and scores their scale, so that the
    dimensions that are left compute what they did; values have a size of their own (`value_dim`).
    """

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the block's output (B, T, D) and the attention weights, where the kernel gives them."""
        shape = hidden_states.shape[:-1]
        queries, keys = self.q_proj(hidden_states), self.k_proj(hidden_states)
        norms = (self.q_norm, self.k_norm) if hasattr(self, "q_norm") else None
        if norms and self.norms_all_heads:
            queries, keys = norms[0](queries), norms[1](keys)
        queries, keys = (states.view(*shape, -1, self.head_dim) for states in (queries, keys))
        if norms and not self.norms_all_heads:
            queries, keys = norms[0](queries), norms[1](keys)
        queries, keys = queries.transpose(1, 2), keys.transpose(1, 2)
        values = self.v_proj(hidden_states).view(*shape, -1, self.value_dim).transpose(1, 2)
        if getattr(self, "use_rope", True):
            columns = torch.tensor(self.rotary_columns, device=hidden_states.device)
            cos, sin = (table.index_select(-1, columns) for table in position_embeddings)
            queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager_kernel)
        if (cap := getattr(self, "attn_logit_softcapping", None)) is not None:
            kwargs["softcap"] = cap
        output, weights = kernel(
            self,
            queries,
            keys,
            values,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights


def build_slim_layer(
    layer_class: type[nn.Module], config: PreTrainedConfig, layer_config: Any, layer_idx: int
) -> nn.Module:
    """Builds a layer whose heads keep only some of their dimensions; arguments as of `build_layer`."""
    rotary_dim = layer_config.head_dim
    with torch.device("meta"):  # what the family makes of a whole head's size is the scale of scores still
        whole: Any = layer_class(layer_config, layer_idx)
    pairs = getattr(layer_config, "rotary_pairs", None) or list(range(rotary_dim // 2))
    layer_config.head_dim = 2 * len(pairs)
    layer: Any = layer_class(layer_config, layer_idx)
    attention = layer.self_attn
    value_dim = getattr(layer_config, "value_dim", None) or rotary_dim
    hidden, has_bias = layer_config.hidden_size, (attention.v_proj.bias is not None, attention.o_proj.bias is not None)
    attention.v_proj = nn.Linear(hidden, layer_config.num_key_value_heads * value_dim, bias=has_bias[0])
    attention.o_proj = nn.Linear(layer_config.num_attention_heads * value_dim, hidden, bias=has_bias[1])
    attention.__class__ = type(f"Slim{type(attention).__name__}", (SlimAttention, type(attention)), {})
    attention.config = config
    attention.value_dim, attention.rotary_dim, attention.rotary_pairs = value_dim, rotary_dim, tuple(pairs)
    attention.rotary_columns = [*pairs, *(pair + rotary_dim // 2 for pair in pairs)]
    attention.scaling = whole.self_attn.scaling
    attention.norms_all_heads = hasattr(attention, "q_norm") and attention.q_norm.weight.numel() != 2 * len(pairs)
    attention.eager_kernel = sys.modules[layer_class.__module__].eager_attention_forward
    leave_out(layer, set(getattr(layer_config, "skip", ())) & {MLP}, layer_idx)
    return layer


class PerLayerCausalLMMixin(nn.Module):
    """Builds a stock causal language model without layers, then adds layers of different widths."""

    config_class: Any
    layer_class: type[nn.Module]
    model: Any
    post_init: Callable[[], None]

    def __init__(self, config: PreTrainedConfig) -> None:
        shell = copy.copy(config)
        shell.per_layer_config = None
        shell.num_hidden_layers = 0
        super().__init__(shell)
        config._attn_implementation = shell._attn_implementation
        for part in (self, self.model):
            part.config = config
        self.model.layers = nn.ModuleList(
            build_layer(self.layer_class, config, index) for index in range(config.num_hidden_layers)
        )
        self.post_init()


class AtpLlamaConfig(PerLayerConfigMixin, LlamaConfig):
    """Llama config with widths per layer."""

    model_type = "atp_llama"


class AtpMistralConfig(PerLayerConfigMixin, MistralConfig):
    """Mistral config with widths per layer."""

    model_type = "atp_mistral"


class AtpQwen2Config(PerLayerConfigMixin, Qwen2Config):
    """Qwen2 config with widths per layer."""

    model_type = "atp_qwen2"


class AtpQwen3Config(PerLayerConfigMixin, Qwen3Config):
    """Qwen3 config with widths per layer."""

    model_type = "atp_qwen3"


class AtpSmolLM3Config(PerLayerConfigMixin, SmolLM3Config):
    """SmolLM3 config with widths per layer."""

    model_type = "atp_smollm3"


class AtpGraniteConfig(PerLayerConfigMixin, GraniteConfig):
    """Granite config with widths per layer."""

    model_type = "atp_granite"


class AtpOlmo2Config(PerLayerConfigMixin, Olmo2Config):
    """OLMo 2 config with widths per layer."""

    model_type = "atp_olmo2"


class AtpGemma3TextConfig(PerLayerConfigMixin, Gemma3TextConfig):
    """Gemma 3 config with widths per layer."""

    model_type = "atp_gemma3_text"


class AtpGemma2Config(PerLayerConfigMixin, Gemma2Config):
    """Gemma 2 config with widths per layer."""

    model_type = "atp_gemma2"


class AtpLlamaForCausalLM(PerLayerCausalLMMixin, LlamaForCausalLM):
    """Llama with widths per layer."""

    config_class = AtpLlamaConfig
    layer_class = LlamaDecoderLayer


class AtpMistralForCausalLM(PerLayerCausalLMMixin, MistralForCausalLM):
    """Mistral with widths per layer."""

    config_class = AtpMistralConfig
    layer_class = MistralDecoderLayer


class AtpQwen2ForCausalLM(PerLayerCausalLMMixin, Qwen2ForCausalLM):
    """Qwen2 with widths per layer."""

    config_class = AtpQwen2Config
    layer_class = Qwen2DecoderLayer


class AtpQwen3ForCausalLM(PerLayerCausalLMMixin, Qwen3ForCausalLM):
    """Qwen3 with widths per layer."""

    config_class = AtpQwen3Config
    layer_class = Qwen3DecoderLayer


class AtpSmolLM3ForCausalLM(PerLayerCausalLMMixin, SmolLM3ForCausalLM):
    """SmolLM3 with widths per layer."""

    config_class = AtpSmolLM3Config
    layer_class = SmolLM3DecoderLayer


class AtpGraniteForCausalLM(PerLayerCausalLMMixin, GraniteForCausalLM):
    """Granite with widths per layer."""

    config_class = AtpGraniteConfig
    layer_class = GraniteDecoderLayer


class AtpOlmo2ForCausalLM(PerLayerCausalLMMixin, Olmo2ForCausalLM):
    """OLMo 2 with widths per layer."""

    config_class = AtpOlmo2Config
    layer_class = Olmo2DecoderLayer


class AtpGemma3ForCausalLM(PerLayerCausalLMMixin, Gemma3ForCausalLM):
    """Gemma 3 with widths per layer."""

    config_class = AtpGemma3TextConfig
    layer_class = Gemma3DecoderLayer


class AtpGemma2ForCausalLM(PerLayerCausalLMMixin, Gemma2ForCausalLM):
    """Gemma 2 with widths per layer."""

    config_class = AtpGemma2Config
    layer_class = Gemma2DecoderLayer


MODEL_CLASSES: tuple[Any, ...] = (
    AtpLlamaForCausalLM,
    AtpMistralForCausalLM,
    AtpQwen2ForCausalLM,
    AtpQwen3ForCausalLM,
    AtpSmolLM3ForCausalLM,
    AtpGraniteForCausalLM,
    AtpOlmo2ForCausalLM,
    AtpGemma3ForCausalLM,
    AtpGemma2ForCausalLM,
)
CONFIG_CLASSES: dict[str, type[PreTrainedConfig]] = {
    model_class.config_class.model_type: model_class.config_class for model_class in MODEL_CLASSES
}


def register() -> None:
    """Makes the Auto classes know these models, so that loading one needs no `trust_remote_code`. Repeatable.

    `save_pretrained` then copies this file beside the weights, also after further training.
    """
    for model_class in MODEL_CLASSES:
        config_class = model_class.config_class
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        config_class.register_for_auto_class("AutoConfig")
        model_class.register_for_auto_class("AutoModelForCausalLM")
