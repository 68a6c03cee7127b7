"""The vocabulary of pruning: units, axes, sides, weights, sites, and what a layer costs.

Sits below the pruning space, which describes a model in these words, and below everything that counts or cuts units.
It knows no module name, no mask and no method.

* a *unit* is the smallest thing that is kept or removed: a KV head with its query heads, one query head, one FFN
  channel, one rotary pair of the query and key dimensions of all heads of a layer, one value dimension of all its
  heads, or one dimension of the residual stream in all layers;
* an :class:`Axis` is the set of like units of one layer (or of the whole model); all axes lie end to end in one flat
  vector of U units;
* a :class:`Side` is one dimension of a weight matrix, as a product of axes (the rows of the query projection belong to
  KV heads, query heads *and* rotary pairs);
* a :class:`Weight` has a row side and a column side, from which its remaining size and its kept indices follow;
* a :class:`Site` is a place in the forward pass where multiplying by a side's mask has the effect of removing its
  units;
* a :class:`CostModel` says what the budget counts.

Shape suffixes: U units, D hidden, N query heads, K KV heads, H head dim, F FFN width, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("heads", "query_heads", "channels", "qk_pairs", "value_dims", "hidden")
"""Unit kinds that a space can be made of."""

WHOLE_MODEL = -1
"""Layer index of an axis that spans all layers."""


@dataclass(frozen=True)
class Axis:
    """Like units of one layer.

    Attributes:
        name: Unique name, ``layers.<i>.<kind>``, or the kind alone for an axis of the whole model.
        kind: One of :data:`KINDS`.
        layer: Index of the decoder layer; :data:`WHOLE_MODEL` for an axis that spans all layers.
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
    """A linear layer's weight [rows, columns] (and bias [rows]) with the sides that decide what is left of it.

    Attributes:
        module: Name of the linear.
        rows: Side of its outputs.
        columns: Side of its inputs.
        has_bias: Whether it has a bias.
        role: Which projection it is (:data:`atp.model.families.ROLES`); empty for any other linear.
    """

    module: str
    rows: Side
    columns: Side
    has_bias: bool
    role: str = ""

    def count(self, masks: Mapping[str, Tensor]) -> Tensor | int:
        """Kept (or expected) parameters, bias included."""
        rows = self.rows.count(masks)
        return rows * self.columns.count(masks) + (rows if self.has_bias else 0)


@dataclass(frozen=True)
class Site:
    """Multiplying the input (or output) of ``module`` by the mask of ``side`` removes the side's units.

    Attributes:
        module: Name of the linear or embedding.
        side: Whose mask it is.
        on: ``input`` or ``output``.
        source: A module whose output may be multiplied instead, to the same effect, and the side of its rows: a tensor
            no larger than this one.
    """

    module: str
    side: Side
    on: str = "input"
    source: tuple[str, Side] | None = None

    @property
    def cheapest(self) -> tuple[str, Side, str]:
        """Module, side and ``on`` of the smallest tensor that the mask may multiply."""
        return (*self.source, "output") if self.source else (self.module, self.side, self.on)


class Counts(NamedTuple):
    """What a layer keeps.

    KV heads, query heads of each, FFN channels, rotary pairs and value dimensions of each head, and dimensions of the
    residual stream.
    """

    heads: int
    queries: int
    channels: int
    pairs: int
    values: int
    hidden: int


@dataclass(frozen=True)
class CostModel:
    """What the budget counts, per entry of what is kept.

    Attributes:
        attention: Per weight of the attention projections.
        ffn: Per weight of the FFN projections.
        bias: Per bias.
        scores: Per row of the query projection and column of the output projection: what attention computes per token
            beside its projections.
        cache: Per row of the key and value projections: what a token leaves in the key-value cache.
        of: Name, for messages.
    """

    attention: float = 1.0
    ffn: float = 1.0
    bias: float = 1.0
    scores: float = 0.0
    cache: float = 0.0
    of: str = "parameters"


PARAMETERS = CostModel()
"""Decoder-block parameters: the denominator of ATP and of every ``sparsity`` here."""


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
        head_dim: Query and key dimensions H of a head.
        value_dim: Value dimensions of a head.
        ffn_width: FFN channels F; zero when it has no FFN.
        hidden: Width D of the residual stream.
        rotary_dim: Head dimension that rotary frequencies were made for; more than ``head_dim`` in a pruned model.
        rotary_pairs: Which of its pairs the layer has.
        axes: Axes by kind, that of the residual stream included.
        biased: Roles of the projections that carry a bias.
        output_bias: Kinds whose output projection carries a bias, so that the block may not vanish as a whole.
        modules: Module of each projection that the layer has, by role.
        norms: Modules of the norms of queries and keys, by what they normalise.
        blocks: Modules that go when a kind has no unit left, by kind; the block itself first.
    """

    prefix: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    ffn_width: int
    hidden: int
    rotary_dim: int = 0
    rotary_pairs: tuple[int, ...] = ()
    axes: Mapping[str, Axis] = field(default_factory=dict)
    biased: frozenset[str] = frozenset()
    output_bias: tuple[str, ...] = ()
    modules: Mapping[str, str] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads if self.num_kv_heads else 0

    @property
    def dense(self) -> Counts:
        """Counts of the dense layer."""
        pairs = self.head_dim // 2
        return Counts(self.num_kv_heads, self.group_size, self.ffn_width, pairs, self.value_dim, self.hidden)

    @property
    def costs(self) -> LayerCosts:
        """What single units own in the dense layer."""
        dense = self.dense
        nothing = dense._replace(heads=0, channels=0)
        fixed = self.cost(nothing)
        head = self.cost(nothing._replace(heads=1)) - fixed
        query = head - (self.cost(nothing._replace(heads=1, queries=dense.queries - 1)) - fixed) if dense.heads else 0.0
        channel = self.cost(nothing._replace(channels=1)) - fixed if dense.channels else 0.0
        return LayerCosts(round(head - dense.queries * query), round(query), round(channel), round(fixed))

    def cost(self, kept: Counts, model: CostModel = PARAMETERS) -> float:
        """Return the cost of the layer when it keeps ``kept``."""
        q_rows, k_rows = kept.heads * kept.queries * 2 * kept.pairs, kept.heads * 2 * kept.pairs
        v_rows, o_columns = kept.heads * kept.values, kept.heads * kept.queries * kept.values
        attention = kept.hidden * (q_rows + k_rows + v_rows + o_columns)
        rows = {"query": q_rows, "key": k_rows, "value": v_rows, "output": kept.hidden}
        rows |= {"gate": kept.channels, "up": kept.channels, "down": kept.hidden}
        bias = sum(rows[role] for role in self.biased)
        beside = model.scores * (q_rows + o_columns) + model.cache * (k_rows + v_rows)
        ffn = 3 * kept.hidden * kept.channels
        return model.attention * attention + model.ffn * ffn + model.bias * bias + beside

    @property
    def absent_blocks(self) -> dict[str, tuple[str, ...]]:
        """Parameter name prefixes that go when a kind has no unit left, by kind."""
        return {kind: tuple(f"{module}." for module in modules) for kind, modules in self.blocks.items()}
