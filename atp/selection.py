"""From scores to the final architecture: which units stay, chosen deterministically to meet a budget.

Sits between the generator (which made the scores) and removal (which cuts). The choice is greedy from the lowest score
up, skips what would overshoot, and so ends within one unit's cost of the target; noise has no part in it. It knows the
costs through the pruning space and nothing of training.

Within one layer the counts interact: dropping a KV head saves more while its group still has all its query heads. Query
heads leave one per group at a time, because grouped-query attention needs equal groups.

Shape suffixes: U units.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import torch
from torch import Tensor

from atp.space import LayerSpace, PruningSpace

DEFAULT_MIN_UNITS: Mapping[str, int] = {"heads": 1, "query_heads": 1, "channels": 1}
"""Units every layer keeps of each kind.

One head and one channel avoid the traps of caches and engines with empty blocks.
"""


def select(
    space: PruningSpace,
    scores_U: Tensor,
    sparsity: float,
    *,
    shape: str = "per_layer",
    min_units: Mapping[str, int] | None = None,
) -> Tensor:
    """Choose the units to keep.

    Args:
        space: The pruning space.
        scores_U: Higher means more worth keeping, comparable over all units, shape [U]. Ties go by position.
        sparsity: Fraction of decoder-block parameters to remove.
        shape: ``per_layer`` ranks all units together; ``uniform`` keeps equal counts in every layer, ranked within
            layers.
        min_units: Units that each layer keeps, by kind; missing kinds take :data:`DEFAULT_MIN_UNITS`.

    Returns:
        0/1 masks of shape [U], float32, whose sparsity is at most ``sparsity`` and less than one unit's cost below it
        (``uniform``: one unit in every layer).

    Raises:
        ValueError: A sparsity that the space cannot reach, scores that are not finite, or an unknown shape.
    """
    if not torch.isfinite(scores_U).all():
        raise ValueError(
            f"scores hold {int((~torch.isfinite(scores_U)).sum())} values that are not finite: training diverged"
        )
    layers = _layers(space, scores_U.detach().double().cpu(), min_units)
    budget = sparsity * space.total_parameters
    _check_reachable(layers, sparsity, space)
    if shape == "per_layer":
        _greedy(layers, budget)
    elif shape == "uniform":
        _uniform(layers, sparsity, budget)
    else:
        raise ValueError(f"prune.shape is {shape!r}; known: per_layer, uniform")
    masks_U = torch.zeros(space.num_units)
    for layer in layers:
        masks_U[layer.kept_units()] = 1.0
    return masks_U


def reachable_sparsity(space: PruningSpace, min_units: Mapping[str, int] | None = None) -> float:
    """Largest sparsity the space allows when every layer keeps ``min_units``."""
    layers = _layers(space, torch.zeros(space.num_units, dtype=torch.double), min_units)
    return sum(layer.removable() for layer in layers) / space.total_parameters


def check_reachable(space: PruningSpace, sparsity: float, min_units: Mapping[str, int] | None = None) -> None:
    """Raise ValueError when ``sparsity`` is outside (0, 1) or cannot be met; to be called before any training."""
    if not 0.0 < sparsity < 1.0:
        raise ValueError(
            f"prune.sparsity is {sparsity}; it is the fraction of block parameters to remove, between 0 and 1"
        )
    _check_reachable(_layers(space, torch.zeros(space.num_units, dtype=torch.double), min_units), sparsity, space)


def _check_reachable(layers: list[_LayerChoice], sparsity: float, space: PruningSpace) -> None:
    most = sum(layer.removable() for layer in layers) / space.total_parameters
    if sparsity > most:
        kinds = sorted({axis.kind for axis in space.axes})
        raise ValueError(
            f"prune.sparsity is {sparsity}, but cutting {' + '.join(kinds)} down to the units every layer keeps "
            f"removes at most {most:.4f} of the "
            "block parameters; lower it, add kinds to prune.space, or lower prune.min_heads / prune.min_channels"
        )


class _LayerChoice:
    """What is still kept of one layer, and what each possible next cut would save."""

    def __init__(self, layer: LayerSpace, scores: Mapping[str, Tensor], least: Mapping[str, int]) -> None:
        self.layer, self.least = layer, least
        self.heads = layer.num_kv_heads
        self.queries = layer.group_size
        self.channels = layer.ffn_width
        self.order: dict[str, list[int]] = {}
        self.scores = {kind: scores[axis.name] for kind, axis in layer.axes.items()}
        for kind in ("heads", "channels"):
            if kind in self.scores:
                self.order[kind] = torch.argsort(self.scores[kind], stable=True).tolist()
        if "query_heads" in self.scores:
            grouped = self.scores["query_heads"].view(layer.num_kv_heads, layer.group_size)
            self.query_order = torch.argsort(grouped, dim=1, stable=True)
            self.query_scores = grouped.sort(dim=1, stable=True).values

    def removable(self) -> int:
        heads = self.least["heads"] if "heads" in self.scores else self.heads
        queries = self.least["query_heads"] if "query_heads" in self.scores else self.queries
        channels = self.least["channels"] if "channels" in self.scores else self.channels
        return self.total() - self.size(
            min(heads, self.heads), min(queries, self.queries), min(channels, self.channels)
        )

    def total(self) -> int:
        return self.size(self.layer.num_kv_heads, self.layer.group_size, self.layer.ffn_width)

    def size(self, heads: int, queries: int, channels: int) -> int:
        return self.layer.parameters(heads, queries, channels)

    def saving(self, kind: str) -> int:
        """Parameters saved by the next cut of this kind; zero when the layer keeps its minimum."""
        now = getattr(self, _COUNT[kind])
        if kind not in self.scores or now <= self.least[kind] or (kind == "query_heads" and self.heads == 0):
            return 0
        after = {"heads": self.heads, "query_heads": self.queries, "channels": self.channels}
        after[kind] -= 1
        return self.size(self.heads, self.queries, self.channels) - self.size(*after.values())

    def score(self, kind: str) -> float:
        """Score of what the next cut of this kind removes; for query heads, the mean over kept groups."""
        cut = self.layer.group_size - self.queries
        if kind == "query_heads":
            kept = self.order.get("heads", list(range(self.layer.num_kv_heads)))[-self.heads :] if self.heads else []
            return float(self.query_scores[kept, cut].mean())
        done = len(self.order[kind]) - getattr(self, _COUNT[kind])
        return float(self.scores[kind][self.order[kind][done]])

    def cut(self, kind: str) -> None:
        setattr(self, _COUNT[kind], getattr(self, _COUNT[kind]) - 1)

    def kept_units(self) -> list[int]:
        """Flat indices of the kept units.

        Query heads of a removed KV head are not kept either.
        """
        kept: list[int] = []
        axes = self.layer.axes
        heads = self.order["heads"][len(self.order["heads"]) - self.heads :] if "heads" in axes else range(self.heads)
        if "heads" in axes:
            kept += [axes["heads"].offset + unit for unit in heads]
        if "query_heads" in axes:
            size = self.layer.group_size
            for head in heads:
                kept += [
                    axes["query_heads"].offset + head * size + int(q)
                    for q in self.query_order[head, size - self.queries :]
                ]
        if "channels" in axes:
            order = self.order["channels"]
            kept += [axes["channels"].offset + unit for unit in order[len(order) - self.channels :]]
        return kept


_COUNT = {"heads": "heads", "query_heads": "queries", "channels": "channels"}


def _layers(space: PruningSpace, scores_U: Tensor, min_units: Mapping[str, int] | None) -> list[_LayerChoice]:
    least = {**DEFAULT_MIN_UNITS, **(min_units or {})}
    if least["query_heads"] < 1:
        raise ValueError(
            "min_units query_heads must be at least 1: a KV head without query heads computes nothing; prune 'heads' "
            "instead"
        )
    for layer in space.layers:
        for kind in layer.output_bias:
            if least[kind] < 1:
                raise ValueError(
                    f"prune.min_{kind} is {least[kind]}, but the output projection of {layer.prefix} has a bias, "
                    "which a removed block would lose; "
                    f"set prune.min_{kind} to at least 1"
                )
    by_axis = space.split(scores_U)
    return [_LayerChoice(layer, by_axis, least) for layer in space.layers]


def _greedy(layers: list[_LayerChoice], budget: float) -> None:
    """Cut the lowest-scored unit of all layers that still fits the budget, until none fits."""
    heap = [
        (layer.score(kind), i, kind)
        for i, layer in enumerate(layers)
        for kind in layer.scores
        if layer.saving(kind) > 0
    ]
    heapq.heapify(heap)
    too_big: set[tuple[int, str]] = set()
    removed = 0
    while heap:
        score, index, kind = heapq.heappop(heap)
        layer = layers[index]
        saving = layer.saving(kind)
        if saving == 0:
            continue
        if removed + saving > budget + 1e-6:
            too_big.add((index, kind))
            continue
        if layer.score(kind) != score:  # the groups behind a query-head score have changed since it was pushed
            heapq.heappush(heap, (layer.score(kind), index, kind))
            continue
        layer.cut(kind)
        removed += saving
        smaller_now = [other for other in layer.scores if (index, other) in too_big and kind != "channels"]
        too_big.difference_update((index, other) for other in smaller_now)
        for again in (kind, *smaller_now):
            if layer.saving(again) > 0:
                heapq.heappush(heap, (layer.score(again), index, again))


def _uniform(layers: list[_LayerChoice], sparsity: float, budget: float) -> None:
    """Equal counts in every layer, head counts nearest to the kept fraction, channels to meet the budget."""
    layers = [layer for layer in layers if layer.scores]
    first = layers[0]
    if len({(x.layer.num_kv_heads, x.layer.group_size, x.layer.ffn_width) for x in layers}) > 1:
        raise ValueError(
            "prune.shape is 'uniform', but the layers of this model already differ in width; use prune.shape=per_layer"
        )

    def options(kind: str, count: int) -> range:
        return range(first.least[kind], count + 1) if kind in first.scores else range(count, count + 1)

    best: tuple[float, float, int, int, int] | None = None
    total = sum(layer.total() for layer in layers)
    for heads in options("heads", first.heads):
        for queries in options("query_heads", first.queries):
            for_attention = len(layers) * (first.total() - first.size(heads, queries, first.channels))
            per_channel = len(layers) * first.layer.costs.channel
            cut = max(int((budget - for_attention + 1e-6) // per_channel), 0) if "channels" in first.scores else 0
            channels = max(first.channels - cut, first.least["channels"])
            removed = for_attention + (first.channels - channels) * per_channel
            if removed > budget + 1e-6:
                continue
            kept_attention = heads * queries / max(first.layer.num_heads, 1)
            gap = (budget - removed) // max(per_channel, 1) / total
            candidate = (gap, abs(kept_attention - (1 - sparsity)), heads, queries, channels)
            best = min(best, candidate) if best else candidate
    assert best is not None  # cutting nothing always fits the budget
    for layer in layers:
        layer.heads, layer.queries, layer.channels = best[2:]
