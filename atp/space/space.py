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
from atp.model.families import ATTENTION_ROLES, Family, family_of
from atp.model.layers import decoder_layers, set_group_size
from atp.space.describe import Description
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
    "KINDS",
    "Axis",
    "Factor",
    "LayerCosts",
    "LayerSpace",
    "PruningSpace",
    "Side",
    "Site",
    "Weight",
]


class PruningSpace:
    """The units of a model, what each owns, and what each costs.

    Args:
        layers: One description per decoder layer.
        axes: All axes, in flat order.
        weights: Every prunable linear weight of the decoder blocks.
        sites: Where masks act in the forward pass.
        others: Sides of further tensors that shrink with units but are in no budget (norms, embeddings), by name.
        family: The model's row in the table of families.
        tied: Whether the output head is the embeddings.

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
        others: Mapping[str, tuple[Side, Side]],
        family: Family,
        *,
        tied: bool = False,
    ) -> None:
        self.layers = tuple(layers)
        self.axes = tuple(axes)
        self.weights = tuple(weights)
        self.sites = tuple(sites)
        self.others = dict(others)
        self.family = family
        self.tied = tied
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
            model: A model of a family of :data:`atp.model.families.FAMILIES`, not yet wrapped by PEFT.
            kinds: Unit kinds to prune. ``query_heads`` needs grouped-query attention: every group keeps the same
                number.
            protect: Layers of which nothing is pruned; negative indices count from the end.

        Raises:
            ValueError: Unknown family or kind, a protected layer that is not there, or no unit to prune.
        """
        family = family_of(getattr(model, "config", None))
        wanted = tuple(kinds)
        for kind in wanted:
            if kind not in KINDS:
                raise UserError(f"prune.space holds {kind!r}; known kinds: {', '.join(KINDS)}")
            if kind in family.refused:
                raise UserError(
                    f"prune.space holds {kind!r}, which {family.model_type} cannot lose: {family.refused[kind]}; "
                    "take it out"
                )
        if hasattr(model, "peft_config"):
            raise UserError("the model is wrapped by PEFT already; describe its space before adding adapters")
        layers = decoder_layers(model)
        protected = _protected(protect, len(layers))
        builder = Description(wanted, model)
        for index, (name, layer) in enumerate(layers.items()):
            builder.add_layer(index, name, layer, prunable=index not in protected)
        parts = (builder.layers, builder.axes, builder.weights, builder.sites, builder.others)
        config: Any = model.config
        space = cls(*parts, family, tied=bool(getattr(config, "tie_word_embeddings", False)))
        if not space.num_units:
            raise UserError(
                f"prune.space is {list(wanted)}, which gives this {family.model_type} model no unit to prune"
            )
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
            per_entry = cost.attention if weight.role in ATTENTION_ROLES else cost.ffn
            total = total + per_entry * (rows * columns) + (cost.bias * rows if weight.has_bias else 0)
            if cost.scores and weight.role in ("query", "output"):
                total = total + cost.scores * (rows if weight.role == "query" else columns)
            if cost.cache and weight.role in ("key", "value"):
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
        layers = [layer for layer in self.layers if layer.ffn_width]
        return {layer.blocks["channels"][0]: masked.get(layer.modules["down"]) for layer in layers}

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
            set_group_size(module_named(layer.blocks["heads"][0]), int(left.sum(1).max()))

    def norm_scales(self, masks: Mapping[str, Tensor]) -> tuple[dict[str, float], float]:
        """What keeps norms, and embeddings that the width scales, the same function once masked dimensions are gone.

        A norm over D dimensions of which d are kept and the rest are zero equals one over d dimensions with weight
        times sqrt(D / d) and epsilon times D / d. There is one epsilon per model, so norms of queries and keys get
        theirs by scaling the projection before them.

        Returns:
            Factor by tensor name, and the factor of the model's epsilon.
        """
        factors: dict[str, float] = {}
        hidden = self.hidden
        ratio = hidden.size / float(masks[hidden.name].sum()) if hidden else 1.0
        for name, (rows, columns) in self.others.items():
            if columns.size == 1 and any(f.axis.kind == "hidden" for f in rows.factors):
                factors[name] = ratio**0.5
        if self.family.embedding_root:  # embeddings are multiplied by sqrt(d) in place of sqrt(D)
            embeddings, final_norm, head = self.family.embedding_tensors
            factors[embeddings] = ratio**0.5
            if self.tied:  # the last norm takes back what the head gets with the embeddings
                factors[head], factors[final_norm] = ratio**0.5, 1.0
        for layer in self.layers:
            for role, norm in layer.norms.items():
                if f"{norm}.weight" not in self.others:
                    continue
                over, _ = self.others[f"{norm}.weight"]
                if not (kept := float(over.count(masks))):
                    continue  # a layer that loses its attention
                own = over.size / kept
                factors[f"{norm}.weight"] = own**0.5
                for tensor in ("weight", "bias"):
                    factors[f"{layer.modules[role]}.{tensor}"] = (ratio / own) ** 0.5
        return {name: factor for name, factor in factors.items() if factor != 1.0}, ratio


def _protected(protect: Iterable[int], num_layers: int) -> set[int]:
    indices = list(protect)
    for index in indices:
        if not -num_layers <= index < num_layers:
            raise UserError(
                f"prune.protect_layers holds {index}, but the model has {num_layers} layers; "
                f"give indices from {-num_layers} to {num_layers - 1}"
            )
    return {index % num_layers for index in indices}
