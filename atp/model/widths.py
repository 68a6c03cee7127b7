"""Layer widths and the Hugging Face architecture that can hold them.

Turns kept widths per layer into a config (a stock class wherever one can hold them, the per-layer classes of
modeling_atp otherwise), reads widths back from any such config, and builds the empty model for it. Sits between
removal, which decides the widths and slices the weights, and export, which writes them. Knows nothing of masks,
LoRA or files. Torch and transformers are imported on first use, so importing this module is cheap.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from atp.errors import UserError
from atp.model.families import Family, family_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

# Keys of a saved config that describe where it came from or how it was stored, not the architecture.
_NOT_ARCHITECTURE = (
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "per_layer_config",
    "quantization_config",
    "_name_or_path",
)


@dataclass(frozen=True)
class LayerWidths:
    """Widths of one decoder layer.

    Attributes:
        num_attention_heads: Query heads; 0 together with no KV heads means the layer has no attention.
        num_key_value_heads: KV heads; divides num_attention_heads.
        head_dim: Size of one head; stored as 0 where the layer has none.
        intermediate_size: FFN channels; 0 means the layer has no FFN.
        value_dim: Size of one head's values; None where it is head_dim.
        rotary_pairs: Rotary pairs that queries and keys of every head keep, of head_dim / 2; None for all.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    value_dim: int | None = None
    rotary_pairs: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if min(heads, kv_heads, self.head_dim, self.intermediate_size) < 0 or (heads and not self.head_dim):
            raise UserError(f"widths must not be negative, and heads need a positive head_dim, got {self}")
        if (heads == 0) != (kv_heads == 0) or (kv_heads and heads % kv_heads):
            raise UserError(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}: "
                "every KV head must keep the same number of query heads, or both counts must be 0"
            )
        if not heads:
            object.__setattr__(self, "head_dim", 0)
        if self.rotary_pairs is not None:
            object.__setattr__(self, "rotary_pairs", tuple(self.rotary_pairs))
            pairs = self.rotary_pairs
            if not pairs or sorted(set(pairs)) != list(pairs) or not 0 <= pairs[0] <= pairs[-1] < self.head_dim // 2:
                raise UserError(f"rotary_pairs={pairs} must ascend within the {self.head_dim // 2} pairs of a head")
        if self.value_dim is not None and self.value_dim < 1:
            raise UserError(f"value_dim={self.value_dim} must be positive; a layer without values has no heads either")

    @property
    def has_attention(self) -> bool:
        """Whether the layer keeps any head."""
        return self.num_attention_heads > 0

    @property
    def is_slim(self) -> bool:
        """Whether heads keep only some of their dimensions, which no stock attention can hold."""
        return self.value_dim is not None or self.rotary_pairs is not None

    @property
    def has_mlp(self) -> bool:
        """Whether the layer keeps any FFN channel."""
        return self.intermediate_size > 0


def layer_widths(config: PreTrainedConfig) -> list[LayerWidths]:
    """Reads the widths of every layer from a config.

    Args:
        config: A dense or pruned config of a supported family.

    Returns:
        One entry per layer.

    Raises:
        ValueError: If the model type is not supported.
    """
    family_of(config)
    widths = []
    for layer in config.per_layer_config:
        skip = getattr(layer, "skip", ())
        has_attention = "attention" not in skip
        head_dim = _head_dim(vars(layer)) if has_attention else 0
        value_dim, pairs = getattr(layer, "value_dim", None), getattr(layer, "rotary_pairs", None)
        widths.append(
            LayerWidths(
                num_attention_heads=layer.num_attention_heads if has_attention else 0,
                num_key_value_heads=layer.num_key_value_heads if has_attention else 0,
                head_dim=head_dim,
                intermediate_size=0 if "mlp" in skip else layer.intermediate_size,
                value_dim=value_dim if has_attention and value_dim != head_dim else None,
                rotary_pairs=pairs if has_attention and pairs and 2 * len(pairs) != head_dim else None,
            )
        )
    return widths


def pruned_config(
    base_config: PreTrainedConfig,
    widths: Sequence[LayerWidths],
    *,
    hidden_size: int | None = None,
    epsilon_factor: float = 1.0,
) -> PreTrainedConfig:
    """Makes the config of the base model cut to the given widths.

    Everything else is carried over: rotary parameters, tied embeddings, dtype, biases, special tokens, sliding window.

    Args:
        base_config: Config of the model that was pruned.
        widths: Kept widths, one entry per layer.
        hidden_size: Kept width of the residual stream; None keeps the base model's.
        epsilon_factor: What the epsilon of the norms is multiplied by.

    Returns:
        The base config unchanged if nothing was cut; the family's stock config if one size fits all layers and the
        stock class can hold it (Mistral for Llama head counts that do not divide the hidden size); otherwise the
        family's per-layer config. `base_config` is not modified.

    Raises:
        ValueError: If the family is not supported, or the widths do not fit the base model.
    """
    family = family_of(base_config)
    dense = layer_widths(base_config)
    _check_widths(dense, widths)
    if hidden_size is not None and not 0 < hidden_size <= base_config.hidden_size:
        raise UserError(f"hidden_size={hidden_size} must lie between 1 and the base model's {base_config.hidden_size}")
    is_narrower = hidden_size is not None and hidden_size != base_config.hidden_size
    if list(widths) == dense and not is_narrower:
        return copy.deepcopy(base_config)
    fields = {key: value for key, value in base_config.to_dict().items() if key not in _NOT_ARCHITECTURE}
    # Explicit, as it no longer follows from the head count. Qwen2 has no such field, but its attention honours it.
    fields["head_dim"] = _head_dim(fields)
    if is_narrower:
        fields["hidden_size"] = hidden_size
        fields["rms_norm_eps"] = fields["rms_norm_eps"] * epsilon_factor
    first = widths[0]
    if first.has_attention and first.has_mlp and not first.is_slim and all(layer == first for layer in widths):
        stock = _stock_config(family, fields, first)
        if stock is not None:
            return stock
    return _per_layer_config(family, fields, widths)


def build_model(
    config: PreTrainedConfig, *, dtype: torch.dtype, device: str | torch.device = "cpu", initialize: bool = False
) -> PreTrainedModel:
    """Builds the causal language model of a config.

    Args:
        config: A dense or pruned config of a supported family.
        dtype: Type of the parameters.
        device: Where the parameters live; "meta" allocates nothing.
        initialize: Draw initial weights. By default the weights are left as they come, to be loaded over.

    Returns:
        The model, of a stock class or a class of modeling_atp, in evaluation mode.

    Raises:
        ValueError: If the model type is not supported.
    """
    import contextlib

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from atp.model import modeling_atp

    family_of(config)
    modeling_atp.register()
    config_class = modeling_atp.CONFIG_CLASSES.get(config.model_type)
    if config_class is not None and not isinstance(config, config_class):  # loaded through the file beside the weights
        config = config_class.from_dict(config.to_dict())
    with torch.device(device), contextlib.nullcontext() if initialize else no_init_weights():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    model.tie_weights()
    return model.eval()


def _head_dim(fields: Mapping[str, Any]) -> int:
    """Head size from a config's values: its own field, or what the model classes derive where there is none."""
    return fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]


def _check_widths(dense: Sequence[LayerWidths], widths: Sequence[LayerWidths]) -> None:
    """Raises ValueError unless `widths` can be cut out of a model of widths `dense`."""
    if len(widths) != len(dense):
        raise UserError(f"got widths for {len(widths)} layers, but the base model has {len(dense)}")
    for index, (full, kept) in enumerate(zip(dense, widths, strict=True)):
        if kept.has_attention and kept.head_dim != full.head_dim:
            raise UserError(
                f"layer {index}: head_dim={kept.head_dim} differs from the base model's {full.head_dim}; "
                "whole heads can be removed, dimensions inside a head cannot, as rotary frequencies depend on them"
            )
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            if getattr(kept, name) > getattr(full, name):
                raise UserError(
                    f"layer {index}: {name}={getattr(kept, name)} is larger than the base model's {getattr(full, name)}"
                )


def _stock_config(family: Family, fields: Mapping[str, Any], widths: LayerWidths) -> PreTrainedConfig | None:
    """Makes the stock config for one size in all layers, or None where no stock class holds it."""
    from transformers import AutoConfig

    for stock in family.stock:
        if stock.heads_divide_hidden and fields["hidden_size"] % widths.num_attention_heads:
            continue
        if any(fields.get(name) for name in stock.unless):
            continue
        values = {key: value for key, value in fields.items() if key not in stock.without} | dict(stock.fields)
        values["num_attention_heads"] = widths.num_attention_heads
        values["num_key_value_heads"] = widths.num_key_value_heads
        values["intermediate_size"] = widths.intermediate_size
        return AutoConfig.for_model(stock.model_type, **values)
    return None


def _per_layer_config(family: Family, fields: Mapping[str, Any], widths: Sequence[LayerWidths]) -> PreTrainedConfig:
    """Makes the per-layer config; its global widths stay those of the base model."""
    from atp.model import modeling_atp

    per_layer = {}
    for index, layer in enumerate(widths):
        overrides: dict[str, Any] = {
            "num_attention_heads": layer.num_attention_heads,
            "num_key_value_heads": layer.num_key_value_heads,
            "intermediate_size": layer.intermediate_size,
        }
        # What one layer says, transformers wants every layer to say, or the config as a whole.
        if any(other.value_dim is not None for other in widths):
            overrides["value_dim"] = layer.value_dim or fields["head_dim"]
        if any(other.rotary_pairs is not None for other in widths):
            overrides["rotary_pairs"] = list(layer.rotary_pairs or range(fields["head_dim"] // 2))
        absent = (("attention", layer.has_attention), ("mlp", layer.has_mlp))
        if skip := [name for name, present in absent if not present]:
            overrides["skip"] = skip
        per_layer[index] = overrides
    return modeling_atp.CONFIG_CLASSES[family.per_layer_type](**{**fields, "per_layer_config": per_layer})
