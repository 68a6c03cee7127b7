"""What may be cut: the pruning space of a LLaMA-family model, described as data.

Sits between the loaded Hugging Face model and everything that makes, samples, counts or applies masks. It says which
modules of a decoder layer hold which units, in the words of :mod:`atp.space.units`. It knows nothing of how scores are
made, sampled or trained, and nothing of LoRA.

Shape suffixes: U units, D hidden, N query heads, K KV heads, H head dim, F FFN width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atp.errors import UserError
from atp.space.describe import OUTPUTS, Description
from atp.space.units import (
    KINDS,
    PARAMETERS,
    Axis,
    CostModel,
    Factor,
    LayerCosts,
    LayerSpace,
    Side,
    Site,
    Weight,
)

__all__ = [
    "FAMILIES",
    "KINDS",
    "Axis",
    "Factor",
    "LayerCosts",
    "LayerSpace",
    "PruningSpace",
    "Side",
    "Site",
    "Weight",
    "block_parameters",
]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Base ``model_type`` values whose decoder layers this file can describe; each also in its per-layer form
``atp_<family>``."""


class PruningSpace:
    """The units of a model, what each owns, and what each costs.

    Args:
        layers: One description per decoder layer.
        axes: All axes, in flat order.
        weights: Every prunable linear weight of the decoder blocks.
        sites: Where masks act in the forward pass.
        others: Sides of further tensors that shrink with units but are in no budget (norms, embeddings), by name.

    Attributes:
        cost: What the budget counts; parameters unless set otherwise.

    Use :meth:`from_model` to make one.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpace],
        axes: Sequence[Axis],
        weights: Sequence[Weight],
        sites: Sequence[Site],
        others: Mapping[str, tuple[Side, Side]] | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.axes = tuple(axes)
        self.weights = tuple(weights)
        self.sites = tuple(sites)
        self.others = dict(others or {})
        self.cost: CostModel = PARAMETERS
        self.num_units = sum(axis.size for axis in self.axes)
        self.total_parameters = sum(w.rows.size * w.columns.size + w.has_bias * w.rows.size for w in self.weights)
        self._shares: dict[tuple[CostModel, torch.dtype, torch.device], Tensor] = {}

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
            raise UserError(
                f"model_type is {model_type!r}, which has no pruning space; supported: {', '.join(FAMILIES)}"
            )
        wanted = tuple(kinds)
        for kind in wanted:
            if kind not in KINDS:
                raise UserError(f"prune.space holds {kind!r}; known kinds: {', '.join(KINDS)}")
        if hasattr(model, "peft_config"):
            raise UserError("the model is wrapped by PEFT already; describe its space before adding adapters")
        layers = list(model.get_submodule("model.layers").children())
        protected = _protected(protect, len(layers))
        builder = Description(wanted, model)
        for index, layer in enumerate(layers):
            builder.add_layer(index, f"model.layers.{index}", layer, prunable=index not in protected)
        space = cls(builder.layers, builder.axes, builder.weights, builder.sites, builder.others)
        if not space.num_units:
            raise UserError(f"prune.space is {list(wanted)}, which gives this {model_type} model no unit to prune")
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
        return self.remaining(flat_U, PARAMETERS)

    def remaining(self, flat_U: Tensor, cost: CostModel | None = None) -> Tensor:
        """Kept cost, the budget's unless given, for masks or probabilities [U], as :meth:`remaining_parameters`."""
        masks = self.split(flat_U)
        cost = cost or self.cost
        counts: dict[Side, Tensor | int] = {}

        def count(side: Side) -> Tensor | int:
            if side not in counts:
                counts[side] = side.count(masks)
            return counts[side]

        total = flat_U.new_zeros(())
        for weight in self.weights:
            rows, columns = count(weight.rows), count(weight.columns)
            per_entry = cost.attention if ".self_attn." in weight.module else cost.ffn
            total = total + per_entry * (rows * columns) + (cost.bias * rows if weight.has_bias else 0)
            name = weight.module.rpartition(".")[2]
            if cost.scores and name in ("q_proj", "o_proj"):
                total = total + cost.scores * (rows if name == "q_proj" else columns)
            if cost.cache and name in ("k_proj", "v_proj"):
                total = total + cost.cache * rows
        return total

    def sparsity(self, flat_U: Tensor) -> Tensor:
        """Fraction of decoder-block parameters removed (or its expectation)."""
        return self._removed(flat_U, PARAMETERS)

    def _removed(self, flat_U: Tensor, cost: CostModel) -> Tensor:
        """Fraction of a cost removed; one product where no two axes share a weight, for then it is linear in units."""
        if not self.is_additive:
            total = self.total_parameters if cost is PARAMETERS else self.cost_of(cost)
            return 1.0 - self.remaining(flat_U, cost) / total
        key = (cost, flat_U.dtype, flat_U.device)
        if key not in self._shares:
            shares_U = torch.zeros(self.num_units, dtype=torch.double)
            for layer in self.layers:
                nothing = layer.dense._replace(**dict.fromkeys(layer.axes, 0))
                for kind, axis in layer.axes.items():
                    one = layer.cost(nothing._replace(**{kind: 1}), cost) - layer.cost(nothing, cost)
                    shares_U[axis.offset : axis.offset + axis.size] = one / self.cost_of(cost)
            self._shares[key] = shares_U.to(flat_U.device, flat_U.dtype)
        return self._shares[key] @ (1.0 - flat_U)

    @property
    def is_additive(self) -> bool:
        """Whether every unit has a cost of its own: no two axes share a weight."""
        return {axis.kind for axis in self.axes} <= {"heads", "channels"}

    def reduction(self, flat_U: Tensor) -> Tensor:
        """Fraction of the budget's cost removed (or its expectation); :meth:`sparsity` unless :attr:`cost` is set."""
        return self._removed(flat_U, self.cost)

    @property
    def total_cost(self) -> float:
        """Cost of the dense model by the budget's measure."""
        return self.cost_of(self.cost)

    def cost_of(self, cost: CostModel) -> float:
        """Cost of the dense model."""
        return sum(layer.cost(layer.dense, cost) for layer in self.layers)

    @property
    def hidden(self) -> Axis | None:
        """Axis of the residual stream, where it is pruned."""
        return next((axis for axis in self.axes if axis.kind == "hidden"), None)

    def kept_heads(self, flat_U: Tensor) -> Tensor:
        """Query heads kept over all layers, from masks [U]."""
        masks = self.split(flat_U)
        total = flat_U.new_zeros(())
        for layer in self.layers:
            if not layer.num_heads:
                continue
            heads = masks[layer.axes["heads"].name] if "heads" in layer.axes else flat_U.new_ones(layer.num_kv_heads)
            heads = heads.repeat_interleave(layer.group_size)
            total = (
                total + (heads * masks[layer.axes["query_heads"].name] if "query_heads" in layer.axes else heads).sum()
            )
        return total

    def kept_channels(self, flat_U: Tensor) -> Tensor:
        """FFN channels kept over all layers, from masks [U]."""
        masks = self.split(flat_U)
        total = flat_U.new_zeros(())
        for layer in self.layers:
            axis = layer.axes.get("channels")
            total = total + (masks[axis.name].sum() if axis else layer.ffn_width)
        return total

    def gated_blocks(self) -> dict[str, Side | None]:
        """Names of the FFN blocks, and the side of their channels where those are pruned."""
        masked = {site.module: site.side for site in self.sites if site.on == "input"}
        names = [layer.prefix for layer in self.layers if layer.ffn_width]
        return {f"{name}.mlp": masked.get(f"{name}.{OUTPUTS['channels']}") for name in names}

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

    def norm_scales(self, masks: Mapping[str, Tensor]) -> tuple[dict[str, float], float]:
        """What keeps RMSNorms the same function once dimensions with mask zero are gone.

        A norm over D dimensions of which d are kept and the rest are zero equals one over d dimensions with weight
        times sqrt(D / d) and epsilon times D / d. There is one epsilon per model, so norms of queries and keys get
        theirs by scaling the projection before them.

        Returns:
            Factor by tensor name, and the factor of the model's epsilon.
        """
        factors: dict[str, float] = {}
        hidden = self.hidden
        ratio = hidden.size / float(masks[hidden.name].sum()) if hidden else 1.0
        for name, (rows, _) in self.others.items():
            if "norm" in name and any(f.axis.kind == "hidden" for f in rows.factors):
                factors[name] = ratio**0.5
        for layer in self.layers:
            for short in ("q", "k"):
                name = f"{layer.prefix}.self_attn.{short}_norm.weight"
                if name not in self.others:
                    continue
                axis = layer.axes.get("qk_pairs")
                own = axis.size / float(masks[axis.name].sum()) if axis else 1.0
                factors[name] = own**0.5
                for tensor in ("weight", "bias"):
                    factors[f"{layer.prefix}.self_attn.{short}_proj.{tensor}"] = (ratio / own) ** 0.5
        return {name: factor for name, factor in factors.items() if factor != 1.0}, ratio


def block_parameters(model: nn.Module) -> int:
    """Parameters of the linears of a model's decoder blocks: the denominator of sparsity."""
    layers = model.get_submodule("model.layers")
    return sum(p.numel() for m in layers.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False))


def _protected(protect: Iterable[int], num_layers: int) -> set[int]:
    indices = list(protect)
    for index in indices:
        if not -num_layers <= index < num_layers:
            raise UserError(
                f"prune.protect_layers holds {index}, but the model has {num_layers} layers; "
                f"give indices from {-num_layers} to {num_layers - 1}"
            )
    return {index % num_layers for index in indices}
