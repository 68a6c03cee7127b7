"""LLaMA-family models whose layers differ in width: the file copied beside the weights of a pruned model.

Self-contained (torch and transformers only), so that a pruned model loads without atp installed:
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`; `AutoModel`, which inference engines build,
gives the model without its output head. It holds only what differs from the stock models: every layer is a stock
decoder layer built from its own entry of transformers' `per_layer_config` (5.15 or newer), and a layer whose entry says
`skip: ["attention"]` or `skip: ["mlp"]` has that half left out, its norm included. It knows nothing of masks, of
pruning or of how the widths were chosen.

Shape suffixes: B batch, T tokens, D hidden.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.granite import modeling_granite as granite
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.olmo2 import modeling_olmo2 as olmo2
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.smollm3 import modeling_smollm3 as smollm3

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
            queries, keys = llama.apply_rotary_pos_emb(queries, keys, cos, sin)
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
    """Builds a layer whose heads keep only some of their dimensions; arguments as of `build_layer`.

    Raises:
        ValueError: If vLLM builds the model, whose attention has one size for queries, keys and values.
    """
    if str(config._attn_implementation).startswith("vllm"):
        raise ValueError(
            f"layer {layer_idx}: heads keep only some of their dimensions (value_dim, rotary_pairs), which vLLM's "
            "attention cannot compute; serve this model with transformers, ONNX Runtime or as GGUF in llama.cpp"
        )
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


class PerLayerMixin(nn.Module):
    """Builds a stock model without layers, with or without its output head, then adds layers of different widths."""

    config_class: Any
    layer_class: type[nn.Module]
    base_model: Any
    post_init: Callable[[], None]

    def __init__(self, config: PreTrainedConfig) -> None:
        shell = copy.copy(config)
        shell.per_layer_config = None
        shell.num_hidden_layers = 0
        super().__init__(shell)
        config._attn_implementation = shell._attn_implementation
        for part in (self, self.base_model):
            part.config = config
        self.base_model.layers = nn.ModuleList(
            build_layer(self.layer_class, config, index) for index in range(config.num_hidden_layers)
        )
        self.post_init()


def per_layer(config: Any, base: Any, causal: Any, layer: type[nn.Module]) -> tuple[Any, Any, Any]:
    """Config, base model and causal language model of a family, with widths per layer.

    Args:
        config: The stock config class.
        base: The stock model without its output head.
        causal: The stock model with it.
        layer: The stock decoder layer.

    Returns:
        The three classes, named as the stock ones with Atp before, of this module.
    """

    def made(stock: Any, *mixins: type, **fields: Any) -> Any:
        about = {"__module__": __name__, "__doc__": f"{stock.__name__} with widths per layer."}
        return type(f"Atp{stock.__name__}", (*mixins, stock), {**about, **fields})

    own = made(config, PerLayerConfigMixin, model_type=f"atp_{config.model_type}")
    parts = {"config_class": own, "layer_class": layer}
    return own, made(base, PerLayerMixin, **parts), made(causal, PerLayerMixin, **parts)


AtpLlamaConfig, AtpLlamaModel, AtpLlamaForCausalLM = per_layer(
    llama.LlamaConfig, llama.LlamaModel, llama.LlamaForCausalLM, llama.LlamaDecoderLayer
)
AtpMistralConfig, AtpMistralModel, AtpMistralForCausalLM = per_layer(
    mistral.MistralConfig, mistral.MistralModel, mistral.MistralForCausalLM, mistral.MistralDecoderLayer
)
AtpQwen2Config, AtpQwen2Model, AtpQwen2ForCausalLM = per_layer(
    qwen2.Qwen2Config, qwen2.Qwen2Model, qwen2.Qwen2ForCausalLM, qwen2.Qwen2DecoderLayer
)
AtpQwen3Config, AtpQwen3Model, AtpQwen3ForCausalLM = per_layer(
    qwen3.Qwen3Config, qwen3.Qwen3Model, qwen3.Qwen3ForCausalLM, qwen3.Qwen3DecoderLayer
)
AtpSmolLM3Config, AtpSmolLM3Model, AtpSmolLM3ForCausalLM = per_layer(
    smollm3.SmolLM3Config, smollm3.SmolLM3Model, smollm3.SmolLM3ForCausalLM, smollm3.SmolLM3DecoderLayer
)
AtpGraniteConfig, AtpGraniteModel, AtpGraniteForCausalLM = per_layer(
    granite.GraniteConfig, granite.GraniteModel, granite.GraniteForCausalLM, granite.GraniteDecoderLayer
)
AtpOlmo2Config, AtpOlmo2Model, AtpOlmo2ForCausalLM = per_layer(
    olmo2.Olmo2Config, olmo2.Olmo2Model, olmo2.Olmo2ForCausalLM, olmo2.Olmo2DecoderLayer
)
AtpGemma3TextConfig, AtpGemma3TextModel, AtpGemma3ForCausalLM = per_layer(
    gemma3.Gemma3TextConfig, gemma3.Gemma3TextModel, gemma3.Gemma3ForCausalLM, gemma3.Gemma3DecoderLayer
)
AtpGemma2Config, AtpGemma2Model, AtpGemma2ForCausalLM = per_layer(
    gemma2.Gemma2Config, gemma2.Gemma2Model, gemma2.Gemma2ForCausalLM, gemma2.Gemma2DecoderLayer
)

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
BASE_CLASSES: tuple[Any, ...] = (
    AtpLlamaModel,
    AtpMistralModel,
    AtpQwen2Model,
    AtpQwen3Model,
    AtpSmolLM3Model,
    AtpGraniteModel,
    AtpOlmo2Model,
    AtpGemma3TextModel,
    AtpGemma2Model,
)
CONFIG_CLASSES: dict[str, type[PreTrainedConfig]] = {
    model_class.config_class.model_type: model_class.config_class for model_class in MODEL_CLASSES
}


def register() -> None:
    """Makes the Auto classes know these models, so that loading one needs no `trust_remote_code`. Repeatable.

    `save_pretrained` then copies this file beside the weights, also after further training.
    """
    for auto_class, classes in ((AutoModel, BASE_CLASSES), (AutoModelForCausalLM, MODEL_CLASSES)):
        for model_class in classes:
            config_class = model_class.config_class
            AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
            auto_class.register(config_class, model_class, exist_ok=True)
            config_class.register_for_auto_class("AutoConfig")
            model_class.register_for_auto_class(auto_class.__name__)
