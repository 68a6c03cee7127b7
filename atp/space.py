"""What may be cut: the pruning space of a LLaMA-family model, described as data.

Sits at the bottom of the flow, between the loaded Hugging Face model and everything that makes, samples, counts or
applies masks. This is the only file that knows how Hugging Face names the modules of a decoder layer.

The vocabulary:

* a *unit* is the smallest thing that is kept or removed (a KV head with its query heads, one query head, one FFN
  channel);
* an :class:`Axis` is the set of like units of one layer; all axes lie end to end in one flat vector of U units;
* a :class:`Side` is one dimension of a weight matrix, as a product of axes (the rows of ``q_proj`` belong to KV heads
  *and* query heads);
* a :class:`Weight` has a row side and a column side, from which its remaining size and its kept indices follow;
* a :class:`Site` is a place in the forward pass where multiplying by a side's mask has the effect of removing its
  units.

It knows nothing of how scores are made, sampled or trained, and nothing of LoRA.

Shape suffixes: U units, D hidden, N query heads, K KV heads, H head dim, F FFN width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Base ``model_type`` values whose decoder layers this file can describe; each also in its per-layer form
``atp_<family>``."""

KINDS = ("heads", "query_heads", "channels")
"""Unit kinds that a space can be made of."""

_OUTPUTS = {"heads": "self_attn.o_proj", "channels": "mlp.down_proj"}
"""Output projection of the block that each kind makes up."""


@dataclass(frozen=True)
class Axis:
    """Like units of one layer.

    Attributes:
        name: Unique name, ``layers.<i>.<kind>``.
        kind: One of :data:`KINDS`.
        layer: Index of the decoder layer.
        size: Number of units.
        offset: Position of the first unit in the flat unit vector.
    """

    name: str
    kind: str
    layer: int
    size: int
    offset: int


@dataclass(frozen=True)
class Factor:
    """How an axis lies along a side: each unit covers ``repeat`` entries in a row, the pattern ``tile`` times."""

    axis: Axis
    repeat: int = 1
    tile: int = 1


@dataclass(frozen=True)
class Side:
    """One dimension of a weight.

    An entry is kept where the masks of all ``factors`` are one; a side without factors is never cut.
    """

    size: int
    factors: tuple[Factor, ...] = ()

    def expand(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Mask of every entry of this side, shape [size]; differentiable in ``masks``."""
        parts = [masks[f.axis.name].repeat_interleave(f.repeat).repeat(f.tile) for f in self.factors]
        return torch.stack(parts).prod(0) if len(parts) > 1 else parts[0]

    def count(self, masks: Mapping[str, Tensor]) -> Tensor | int:
        """Sum of :meth:`expand`: kept entries, or expected ones for independent keep probabilities."""
        if not self.factors:
            return self.size
        if len(self.factors) == 1:
            factor = self.factors[0]
            return masks[factor.axis.name].sum() * (factor.repeat * factor.tile)
        return self.expand(masks).sum()


@dataclass(frozen=True)
class Weight:
    """A linear layer's weight [rows, columns] (and bias [rows]) with the sides that decide what is left of it."""

    module: str
    rows: Side
    columns: Side
    has_bias: bool

    def count(self, masks: Mapping[str, Tensor]) -> Tensor | int:
        """Kept (or expected) parameters, bias included."""
        rows = self.rows.count(masks)
        return rows * self.columns.count(masks) + (rows if self.has_bias else 0)


@dataclass(frozen=True)
class Site:
    """Multiplying the input (or output) of ``module`` by the mask of ``side`` removes the side's units."""

    module: str
    side: Side
    on: str = "input"


@dataclass(frozen=True)
class LayerCosts:
    """Parameters owned by one KV head (without query heads), one query head, one channel; ``fixed`` never goes."""

    key_value: int = 0
    query: int = 0
    channel: int = 0
    fixed: int = 0


@dataclass(frozen=True)
class LayerSpace:
    """One decoder layer: its shape, and its axes by kind (absent where nothing of a kind is pruned).

    Attributes:
        prefix: Module name of the layer.
        num_heads: Query heads N of the dense layer; zero when it has no attention.
        num_kv_heads: KV heads K.
        head_dim: Head dimension H.
        ffn_width: FFN channels F; zero when it has no FFN.
        axes: Axes by kind.
        costs: What each unit costs.
        output_bias: Kinds whose output projection carries a bias, so that the block may not vanish as a whole.
    """

    prefix: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_width: int
    axes: Mapping[str, Axis] = field(default_factory=dict)
    costs: LayerCosts = LayerCosts()
    output_bias: tuple[str, ...] = ()

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads if self.num_kv_heads else 0

    def parameters(self, heads: int, queries: int, channels: int) -> int:
        """Parameters of the linears with so many KV heads, query heads per KV head, and channels."""
        costs = self.costs
        return heads * (costs.key_value + queries * costs.query) + channels * costs.channel + costs.fixed

    @property
    def absent_blocks(self) -> dict[str, tuple[str, ...]]:
        """Parameter name prefixes that go when a kind has no unit left, by kind."""
        return {
            "heads": (f"{self.prefix}.self_attn.", f"{self.prefix}.input_layernorm."),
            "channels": (f"{self.prefix}.mlp.", f"{self.prefix}.post_attention_layernorm."),
        }


class PruningSpace:
    """The units of a model, what each owns, and what each costs.

    Args:
        layers: One description per decoder layer.
        axes: All axes, in flat order.
        weights: Every prunable linear weight of the decoder blocks.
        sites: Where masks act in the forward pass.

    Use :meth:`from_model` to make one.
    """

    def __init__(
        self, layers: Sequence[LayerSpace], axes: Sequence[Axis], weights: Sequence[Weight], sites: Sequence[Site]
    ) -> None:
        self.layers = tuple(layers)
        self.axes = tuple(axes)
        self.weights = tuple(weights)
        self.sites = tuple(sites)
        self.num_units = sum(axis.size for axis in self.axes)
        self.total_parameters = sum(w.rows.size * w.columns.size + w.has_bias * w.rows.size for w in self.weights)

    @classmethod
    def from_model(
        cls, model: nn.Module, kinds: Iterable[str] = ("heads", "channels"), protect: Iterable[int] = ()
    ) -> PruningSpace:
        """Describe a Hugging Face causal LM, dense or already pruned.

        Args:
            model: A model of one of :data:`FAMILIES`, not yet wrapped by PEFT.
            kinds: Unit kinds to prune. ``query_heads`` needs grouped-query attention: every group keeps the same
                number.
            protect: Layers of which nothing is pruned; negative indices count from the end.

        Raises:
            ValueError: Unknown family or kind, a protected layer that is not there, or no unit to prune.
        """
        model_type = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
        if model_type.removeprefix("atp_") not in FAMILIES:
            raise ValueError(
                f"model_type is {model_type!r}, which has no pruning space; supported: {', '.join(FAMILIES)}"
            )
        wanted = tuple(kinds)
        for kind in wanted:
            if kind not in KINDS:
                raise ValueError(f"prune.space holds {kind!r}; known kinds: {', '.join(KINDS)}")
        if hasattr(model, "peft_config"):
            raise ValueError("the model is wrapped by PEFT already; describe its space before adding adapters")
        layers = list(model.get_submodule("model.layers").children())
        protected = _protected(protect, len(layers))
        builder = _Builder(wanted)
        for index, layer in enumerate(layers):
            builder.add_layer(index, f"model.layers.{index}", layer, prunable=index not in protected)
        space = cls(builder.layers, builder.axes, builder.weights, builder.sites)
        if not space.num_units:
            raise ValueError(f"prune.space is {list(wanted)}, which gives this {model_type} model no unit to prune")
        return space

    def split(self, flat_U: Tensor) -> dict[str, Tensor]:
        """Views of a flat [U] vector by axis name."""
        sizes = [axis.size for axis in self.axes]
        return dict(zip((axis.name for axis in self.axes), flat_U.split(sizes), strict=True))

    def remaining_parameters(self, flat_U: Tensor) -> Tensor:
        """Kept decoder-block parameters for masks, or their expectation for independent keep probabilities.

        Multilinear in the units of different axes, hence exact for 0/1 masks. Embeddings, lm_head and norms are not
        counted (ATP's denominator).

        Args:
            flat_U: Masks or probabilities in [0, 1], shape [U].

        Returns:
            Scalar, differentiable in ``flat_U``; double precision when ``flat_U`` is.
        """
        masks = self.split(flat_U)
        counts: dict[Side, Tensor | int] = {}

        def count(side: Side) -> Tensor | int:
            if side not in counts:
                counts[side] = side.count(masks)
            return counts[side]

        total = flat_U.new_zeros(())
        for weight in self.weights:
            rows = count(weight.rows)
            total = total + rows * count(weight.columns) + (rows if weight.has_bias else 0)
        return total

    def sparsity(self, flat_U: Tensor) -> Tensor:
        """Fraction of decoder-block parameters removed (or its expectation)."""
        return 1.0 - self.remaining_parameters(flat_U) / self.total_parameters

    def kept_heads(self, flat_U: Tensor) -> Tensor:
        """Query heads kept over all layers, from masks [U]."""
        masks = self.split(flat_U)
        total = flat_U.new_zeros(())
        for layer in self.layers:
            total = total + (_head_side(layer).count(masks) // max(layer.head_dim, 1) if layer.num_heads else 0)
        return total

    def kept_channels(self, flat_U: Tensor) -> Tensor:
        """FFN channels kept over all layers, from masks [U]."""
        masks = self.split(flat_U)
        total = flat_U.new_zeros(())
        for layer in self.layers:
            axis = layer.axes.get("channels")
            total = total + (masks[axis.name].sum() if axis else layer.ffn_width)
        return total

    def refit_groups(self, module_named: Callable[[str], nn.Module], live: Mapping[str, Tensor]) -> None:
        """Tell attention modules how many query heads per KV head are left after their weights were cut.

        Args:
            module_named: Finds a module of the base model by name.
            live: Masks of what is left, by axis name.
        """
        for layer in self.layers:
            axis = layer.axes.get("query_heads")
            if axis is None:
                continue
            queries_KG = live[axis.name].view(layer.num_kv_heads, layer.group_size)
            left = queries_KG[live[layer.axes["heads"].name] > 0] if "heads" in layer.axes else queries_KG
            attention: Any = module_named(f"{layer.prefix}.self_attn")
            attention.num_key_value_groups = int(left.sum(1).max())


def _protected(protect: Iterable[int], num_layers: int) -> set[int]:
    indices = list(protect)
    for index in indices:
        if not -num_layers <= index < num_layers:
            raise ValueError(
                f"prune.protect_layers holds {index}, but the model has {num_layers} layers; "
                f"give indices from {-num_layers} to {num_layers - 1}"
            )
    return {index % num_layers for index in indices}


def _head_side(layer: LayerSpace, *, key_value: bool = False) -> Side:
    """Side along the attention width: query heads (rows of q, columns of o), or KV heads (rows of k and v)."""
    factors = []
    if "heads" in layer.axes:
        factors.append(Factor(layer.axes["heads"], repeat=layer.head_dim * (1 if key_value else layer.group_size)))
    if "query_heads" in layer.axes and not key_value:
        factors.append(Factor(layer.axes["query_heads"], repeat=layer.head_dim))
    heads = layer.num_kv_heads if key_value else layer.num_heads
    return Side(heads * layer.head_dim, tuple(factors))


def _costs(linears: Mapping[str, nn.Linear], num_heads: int, num_kv_heads: int, ffn_width: int) -> LayerCosts:
    def owned(names: Iterable[str], units: int) -> int:
        """Parameters per unit of the named linears, without the output biases, which no unit owns."""
        total = 0
        for name in names:
            if name in linears:
                linear = linears[name]
                total += linear.weight.numel() + (
                    0 if linear.bias is None or name in _OUTPUTS.values() else linear.bias.numel()
                )
        return total // units if units else 0

    return LayerCosts(
        key_value=owned(("self_attn.k_proj", "self_attn.v_proj"), num_kv_heads),
        query=owned(("self_attn.q_proj", "self_attn.o_proj"), num_heads),
        channel=owned(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), ffn_width),
        fixed=sum(
            linears[name].bias.numel()
            for name in _OUTPUTS.values()
            if name in linears and linears[name].bias is not None
        ),
    )


class _Builder:
    """Collects axes, weights and sites layer by layer."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        self.kinds = kinds
        self.layers: list[LayerSpace] = []
        self.axes: list[Axis] = []
        self.weights: list[Weight] = []
        self.sites: list[Site] = []
        self._offset = 0

    def add_layer(self, index: int, prefix: str, layer: nn.Module, *, prunable: bool = True) -> None:
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        q_proj, k_proj, down_proj = (linears.get(n) for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))
        head_dim = cast(int, layer.get_submodule("self_attn").head_dim) if q_proj is not None else 0
        num_heads = q_proj.out_features // head_dim if q_proj is not None else 0
        num_kv_heads = k_proj.out_features // head_dim if k_proj is not None else 0
        ffn_width = down_proj.in_features if down_proj is not None else 0
        axes: dict[str, Axis] = {}
        kinds = self.kinds if prunable else ()
        if num_kv_heads and "heads" in kinds:
            axes["heads"] = self._axis(index, "heads", num_kv_heads)
        if num_heads > num_kv_heads and "query_heads" in kinds:
            axes["query_heads"] = self._axis(index, "query_heads", num_heads)
        if ffn_width and "channels" in kinds:
            axes["channels"] = self._axis(index, "channels", ffn_width)
        biased = [kind for kind, name in _OUTPUTS.items() if name in linears and linears[name].bias is not None]
        costs = _costs(linears, num_heads, num_kv_heads, ffn_width)
        described = LayerSpace(prefix, num_heads, num_kv_heads, head_dim, ffn_width, axes, costs, tuple(biased))
        self.layers.append(described)
        self._add_weights(described, linears)

    def _axis(self, layer: int, kind: str, size: int) -> Axis:
        axis = Axis(f"layers.{layer}.{kind}", kind, layer, size, self._offset)
        self.axes.append(axis)
        self._offset += size
        return axis

    def _add_weights(self, layer: LayerSpace, linears: Mapping[str, nn.Linear]) -> None:
        heads, kv_heads = _head_side(layer), _head_side(layer, key_value=True)
        channel_axis = layer.axes.get("channels")
        channels = Side(layer.ffn_width, (Factor(channel_axis),) if channel_axis else ())
        cut_rows = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads, "self_attn.v_proj": kv_heads}
        cut_rows |= {"mlp.gate_proj": channels, "mlp.up_proj": channels}
        cut_columns = {"self_attn.o_proj": heads, "mlp.down_proj": channels}
        for name, linear in linears.items():
            rows = cut_rows.get(name, Side(linear.out_features))
            columns = cut_columns.get(name, Side(linear.in_features))
            self.weights.append(Weight(f"{layer.prefix}.{name}", rows, columns, linear.bias is not None))
            if name in cut_columns and columns.factors:
                self.sites.append(Site(f"{layer.prefix}.{name}", columns))
