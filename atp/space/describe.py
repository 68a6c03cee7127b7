"""A decoder layer in the words of units: which axes it has, and which rows and columns of its weights they own.

Between the model room, which reads a layer by roles, and the pruning space that is made of these parts. It knows no
module name by heart, and nothing of masks, costs or scores.

Shape suffixes as in :mod:`atp.space.space`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from atp.model.families import family_of
from atp.model.layers import LayerParts, layer_parts
from atp.space.units import WHOLE_MODEL, Axis, Factor, LayerSpace, Side, Site, Weight

OUTPUTS = {"heads": "output", "channels": "down"}
"""Role of the output projection of the block that each kind makes up."""


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
        self.family = family_of(getattr(model, "config", None))
        self._across_heads = {norm.over for norm in self.family.norms if norm.across_heads}
        self.width = cast(nn.Embedding, model.get_submodule(self.family.embeddings)).embedding_dim
        self.hidden: Axis | None = None
        self.stream = Side(self.width)
        if "hidden" in kinds:
            self._add_stream(model)

    def _add_stream(self, model: nn.Module) -> None:
        """The axis of the residual stream, which embeddings, norms and the output head share."""
        self.hidden = self._axis(WHOLE_MODEL, "hidden", self.width)
        self.stream = Side(self.width, (Factor(self.hidden),))
        self.sites.append(Site(self.family.embeddings, self.stream, "output"))
        embeddings, final_norm, head = self.family.embedding_tensors
        norms = tuple(f".{norm.module}.weight" for norm in self.family.norms if norm.over == "stream")
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in (embeddings, head):
                self.others[name] = (Side(parameter.shape[0]), self.stream)
            elif name == final_norm or name.endswith(norms):
                self.others[name] = (self.stream, Side(1))

    def add_layer(self, index: int, prefix: str, layer: nn.Module, *, prunable: bool = True) -> None:
        """Describe a decoder layer; one that is not prunable has weights and no axes."""
        parts = layer_parts(self.family, layer)
        described = self._describe(index, prefix, parts, self.kinds if prunable else ())
        self.layers.append(described)
        self._add_weights(described, parts.linears)
        for over, module in parts.norms.items():
            side = _normalised(described, over, across_heads=over in self._across_heads)
            if side.factors or (self.hidden and described.num_heads):
                self.others[f"{prefix}.{module}.weight"] = (side, Side(1))

    def _describe(self, index: int, prefix: str, parts: LayerParts, kinds: tuple[str, ...]) -> LayerSpace:
        query, key, down = (parts.linear(role) for role in ("query", "key", "down"))
        head_dim, value_dim = parts.head_dim, parts.value_dim
        num_heads = query.out_features // head_dim if query is not None else 0
        num_kv_heads = key.out_features // head_dim if key is not None else 0
        ffn_width = down.in_features if down is not None else 0
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
        biased = frozenset(role for role, name in parts.roles.items() if parts.linears[name].bias is not None)
        return LayerSpace(
            prefix,
            num_heads,
            num_kv_heads,
            head_dim,
            value_dim if num_heads else 0,
            ffn_width,
            self.width,
            rotary_dim=parts.rotary_dim,
            rotary_pairs=parts.rotary_pairs,
            axes=axes,
            biased=biased,
            output_bias=tuple(kind for kind, role in OUTPUTS.items() if role in biased),
            modules={role: f"{prefix}.{name}" for role, name in parts.roles.items()},
            norms={over: f"{prefix}.{name}" for over, name in parts.norms.items()},
            blocks={
                kind: tuple(f"{prefix}.{name}" for name in self.family.block_modules(block))
                for kind, block in (("heads", "attention"), ("channels", "mlp"))
            },
        )

    def _axis(self, layer: int, kind: str, size: int) -> Axis:
        name = kind if layer == WHOLE_MODEL else f"layers.{layer}.{kind}"
        axis = Axis(name, kind, layer, size, self._offset)
        self.axes.append(axis)
        self._offset += size
        return axis

    def _add_weights(self, layer: LayerSpace, linears: Mapping[str, nn.Linear]) -> None:
        queries, keys = _rotated(layer, "query"), _rotated(layer, "key")
        values = Side(layer.num_kv_heads * layer.value_dim, _head_factors(layer, "value_dims", shared=True))
        outputs = Side(layer.num_heads * layer.value_dim, _head_factors(layer, "value_dims", shared=False))
        channels = Side(layer.ffn_width, (Factor(layer.axes["channels"]),) if "channels" in layer.axes else ())
        sides = {
            "query": (queries, self.stream),
            "key": (keys, self.stream),
            "value": (values, self.stream),
            "output": (self.stream, outputs),
            "gate": (channels, self.stream),
            "up": (channels, self.stream),
            "down": (self.stream, channels),
        }
        roles = {module: role for role, module in layer.modules.items()}
        for name, linear in linears.items():
            module = f"{layer.prefix}.{name}"
            role = roles.get(module, "")
            rows, columns = sides.get(role, (Side(linear.out_features), Side(linear.in_features)))
            self.weights.append(Weight(module, rows, columns, linear.bias is not None, role))
            if role in OUTPUTS.values():
                if columns.factors:  # attention is linear in the values, so that their mask may act on them
                    by_value = role == "output" and "query_heads" not in layer.axes
                    source = (layer.modules["value"], values) if by_value else None
                    self.sites.append(Site(module, columns, source=source))
                if self.hidden:
                    self.sites.append(Site(module, self.stream, "output"))
            elif role in ("query", "key"):
                tile = 2 * (layer.num_heads if role == "query" else layer.num_kv_heads)
                pairs = Side(linear.out_features, _tiled(layer, "qk_pairs", tile))
                # A norm over all heads sees those that are gone unless their queries and keys are zero before it.
                side = rows if role in self._across_heads else pairs
                if side.factors:
                    self.sites.append(Site(module, side, "output"))


def _rotated(layer: LayerSpace, role: str) -> Side:
    """Rows of the query or the key projection."""
    heads = layer.num_heads if role == "query" else layer.num_kv_heads
    return Side(heads * layer.head_dim, _head_factors(layer, "qk_pairs", shared=role == "key"))


def _normalised(layer: LayerSpace, role: str, *, across_heads: bool) -> Side:
    """What a norm of queries or keys goes over: one head, or all of them."""
    return _rotated(layer, role) if across_heads else Side(layer.head_dim, _tiled(layer, "qk_pairs", 2))


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
