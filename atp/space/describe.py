"""A decoder layer in the words of units: which axes it has, and which rows and columns of its weights they own.

Between a Hugging Face model and the pruning space that is made of these parts. It reads module names and shapes and
knows nothing of masks, costs or scores.

Shape suffixes as in :mod:`atp.space.space`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from atp.space.units import WHOLE_MODEL, Axis, Factor, LayerSpace, Side, Site, Weight

OUTPUTS = {"heads": "self_attn.o_proj", "channels": "mlp.down_proj"}
"""Output projection of the block that each kind makes up."""


class Description:
    """Collects axes, weights and sites of a model, layer by layer.

    Args:
        kinds: Unit kinds to describe.
        model: The dense model.
    """

    def __init__(self, kinds: tuple[str, ...], model: nn.Module) -> None:
        self.kinds = kinds
        self.layers: list[LayerSpace] = []
        self.axes: list[Axis] = []
        self.weights: list[Weight] = []
        self.sites: list[Site] = []
        self.others: dict[str, tuple[Side, Side]] = {}
        self._offset = 0
        self.width = cast(nn.Embedding, model.get_submodule("model.embed_tokens")).embedding_dim
        self.hidden: Axis | None = None
        self.stream = Side(self.width)
        if "hidden" in kinds:
            self._add_stream(model)

    def _add_stream(self, model: nn.Module) -> None:
        """The axis of the residual stream, which embeddings, norms and the output head share."""
        self.hidden = self._axis(WHOLE_MODEL, "hidden", self.width)
        self.stream = Side(self.width, (Factor(self.hidden),))
        self.sites.append(Site("model.embed_tokens", self.stream, "output"))
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                self.others[name] = (Side(parameter.shape[0]), self.stream)
            elif name == "model.norm.weight" or name.endswith("layernorm.weight"):
                self.others[name] = (self.stream, Side(1))

    def add_layer(self, index: int, prefix: str, layer: nn.Module, *, prunable: bool = True) -> None:
        """Describe a decoder layer; one that is not prunable has weights and no axes."""
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        described = self._describe(index, prefix, layer, linears, self.kinds if prunable else ())
        self.layers.append(described)
        self._add_weights(described, linears)
        if "qk_pairs" in described.axes or (self.hidden and described.num_heads):
            per_head = Side(described.head_dim, _tiled(described, "qk_pairs", 2))
            for name in ("q_norm", "k_norm"):
                if f"self_attn.{name}" in dict(layer.named_modules()):
                    self.others[f"{prefix}.self_attn.{name}.weight"] = (per_head, Side(1))

    def _describe(
        self, index: int, prefix: str, layer: nn.Module, linears: Mapping[str, nn.Linear], kinds: tuple[str, ...]
    ) -> LayerSpace:
        q_proj, k_proj, down_proj = (linears.get(n) for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))
        attention: Any = layer.get_submodule("self_attn")
        head_dim = cast(int, attention.head_dim) if q_proj is not None else 0
        num_heads = q_proj.out_features // head_dim if q_proj is not None else 0
        num_kv_heads = k_proj.out_features // head_dim if k_proj is not None else 0
        value_dim = int(getattr(attention, "value_dim", head_dim))
        ffn_width = down_proj.in_features if down_proj is not None else 0
        sizes = {
            "heads": num_kv_heads,
            "query_heads": num_heads if num_heads > num_kv_heads else 0,
            "channels": ffn_width,
            "qk_pairs": head_dim // 2 if num_heads else 0,
            "value_dims": value_dim if num_heads else 0,
        }
        axes = {kind: self._axis(index, kind, size) for kind, size in sizes.items() if size and kind in kinds}
        if self.hidden:
            axes["hidden"] = self.hidden
        return LayerSpace(
            prefix,
            num_heads,
            num_kv_heads,
            head_dim,
            value_dim if num_heads else 0,
            ffn_width,
            self.width,
            rotary_dim=int(getattr(attention, "rotary_dim", head_dim)),
            rotary_pairs=tuple(getattr(attention, "rotary_pairs", None) or range(head_dim // 2)),
            axes=axes,
            biased=frozenset(name.rpartition(".")[2] for name, linear in linears.items() if linear.bias is not None),
            output_bias=tuple(k for k, name in OUTPUTS.items() if name in linears and linears[name].bias is not None),
        )

    def _axis(self, layer: int, kind: str, size: int) -> Axis:
        name = kind if layer == WHOLE_MODEL else f"layers.{layer}.{kind}"
        axis = Axis(name, kind, layer, size, self._offset)
        self.axes.append(axis)
        self._offset += size
        return axis

    def _add_weights(self, layer: LayerSpace, linears: Mapping[str, nn.Linear]) -> None:
        queries = Side(layer.num_heads * layer.head_dim, _head_factors(layer, "qk_pairs", shared=False))
        keys = Side(layer.num_kv_heads * layer.head_dim, _head_factors(layer, "qk_pairs", shared=True))
        values = Side(layer.num_kv_heads * layer.value_dim, _head_factors(layer, "value_dims", shared=True))
        outputs = Side(layer.num_heads * layer.value_dim, _head_factors(layer, "value_dims", shared=False))
        channels = Side(layer.ffn_width, (Factor(layer.axes["channels"]),) if "channels" in layer.axes else ())
        sides = {
            "self_attn.q_proj": (queries, self.stream),
            "self_attn.k_proj": (keys, self.stream),
            "self_attn.v_proj": (values, self.stream),
            "self_attn.o_proj": (self.stream, outputs),
            "mlp.gate_proj": (channels, self.stream),
            "mlp.up_proj": (channels, self.stream),
            "mlp.down_proj": (self.stream, channels),
        }
        for name, linear in linears.items():
            rows, columns = sides.get(name, (Side(linear.out_features), Side(linear.in_features)))
            module = f"{layer.prefix}.{name}"
            self.weights.append(Weight(module, rows, columns, linear.bias is not None))
            if name in OUTPUTS.values():
                if columns.factors:  # attention is linear in the values, so that their mask may act on them
                    by_value = name == "self_attn.o_proj" and "query_heads" not in layer.axes
                    source = (f"{layer.prefix}.self_attn.v_proj", values) if by_value else None
                    self.sites.append(Site(module, columns, source=source))
                if self.hidden:
                    self.sites.append(Site(module, self.stream, "output"))
            elif name in ("self_attn.q_proj", "self_attn.k_proj") and "qk_pairs" in layer.axes:
                tile = 2 * (layer.num_heads if name.endswith("q_proj") else layer.num_kv_heads)
                self.sites.append(Site(module, Side(linear.out_features, _tiled(layer, "qk_pairs", tile)), "output"))


def _head_factors(layer: LayerSpace, dims: str, *, shared: bool) -> tuple[Factor, ...]:
    """Factors of a side along the attention width: of query heads, or of KV heads (``shared``)."""
    size = layer.head_dim if dims == "qk_pairs" else layer.value_dim
    heads = layer.num_kv_heads if shared else layer.num_heads
    factors = []
    if "heads" in layer.axes:
        factors.append(Factor(layer.axes["heads"], repeat=size * (1 if shared else layer.group_size)))
    if "query_heads" in layer.axes and not shared:
        factors.append(Factor(layer.axes["query_heads"], repeat=size))
    return (*factors, *_tiled(layer, dims, heads * (2 if dims == "qk_pairs" else 1)))


def _tiled(layer: LayerSpace, kind: str, tile: int) -> tuple[Factor, ...]:
    """The pattern of an axis inside a head, repeated; rotary pairs lie half a head apart, hence twice per head."""
    return (Factor(layer.axes[kind], tile=tile),) if kind in layer.axes else ()
