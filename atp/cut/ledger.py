"""What is still kept of a model while units are being chosen, and what the next cut of each kind would save.

The bookkeeping below :mod:`atp.cut.selection`: counts per layer and kind, the order in which units go, and costs that
change with every cut. It knows costs and scores and nothing of strategies.

Shape suffixes: U units.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from atp.errors import UserError
from atp.space.space import PruningSpace
from atp.space.units import WHOLE_MODEL, CostModel, Counts, LayerSpace

DEFAULT_MIN_UNITS: Mapping[str, int] = {
    "heads": 1,
    "query_heads": 1,
    "channels": 1,
    "qk_pairs": 1,
    "value_dims": 1,
    "hidden": 1,
}
"""Units every layer keeps of each kind.

With one head and one channel no block is empty, which caches and inference engines often cannot handle.
"""

FIELD = {
    "heads": "heads",
    "query_heads": "queries",
    "channels": "channels",
    "qk_pairs": "pairs",
    "value_dims": "values",
    "hidden": "hidden",
}
_ROUNDED = ("channels", "hidden")


class LayerLedger:
    """What is still kept of one layer, and in which order its units go."""

    def __init__(self, layer: LayerSpace, scores: Mapping[str, Tensor], least: Mapping[str, int], step: int) -> None:
        self.layer = layer
        self.counts = layer.dense
        self.order: dict[str, list[int]] = {}
        self.scores = {kind: scores[axis.name] for kind, axis in layer.axes.items() if axis.layer != WHOLE_MODEL}
        self._plain = {kind: values.tolist() for kind, values in self.scores.items()}
        self.steps = {kind: step if kind in _ROUNDED else 1 for kind in self.scores}
        self.least = {kind: _floor(least[kind], self.steps[kind], self.count(kind)) for kind in self.scores}
        for kind in self.scores:
            if kind != "query_heads":
                self.order[kind] = torch.argsort(self.scores[kind], stable=True).tolist()
        if "query_heads" in self.scores:
            grouped = self.scores["query_heads"].view(layer.num_kv_heads, layer.group_size)
            self.query_order = torch.argsort(grouped, dim=1, stable=True)
            self.query_scores = grouped.sort(dim=1, stable=True).values

    def count(self, kind: str) -> int:
        """Kept units of a kind."""
        return int(getattr(self.counts, FIELD[kind]))

    def smallest(self) -> Counts:
        """Counts at the minimum of every kind."""
        least = {FIELD[kind]: min(self.least[kind], self.count(kind)) for kind in self.scores}
        return self.layer.dense._replace(**least)

    def after(self, kind: str) -> Counts | None:
        """Counts after the next cut of this kind; None when the layer keeps its minimum."""
        now = self.count(kind)
        if now <= self.least[kind] or (kind not in ("heads", "channels") and self.counts.heads == 0):
            return None
        return self.counts._replace(**{FIELD[kind]: _next(now, self.steps[kind], self.least[kind])})

    def score(self, kind: str) -> float:
        """Score of what the next cut of this kind removes; for query heads, the mean over kept groups."""
        cut = self.layer.group_size - self.counts.queries
        if kind == "query_heads":
            kept = self.kept("heads")
            return float(self.query_scores[kept, cut].mean())
        count, step = self.count(kind), self.steps[kind]
        if step == 1:  # nearly always, and asked for every unit
            return float(self._plain[kind][self.order[kind][len(self.order[kind]) - count]])
        return _next_score(self.scores[kind], self.order[kind], count, step, self.least[kind])

    def kept(self, kind: str) -> list[int]:
        """Kept units of a kind, by position in their axis."""
        if kind not in self.order:
            return list(range(self.counts.heads)) if kind == "heads" else []
        return self.order[kind][len(self.order[kind]) - self.count(kind) :]

    def kept_units(self) -> list[int]:
        """Flat indices of the kept units.

        Query heads of a removed KV head are not kept either.
        """
        found = [self.layer.axes[kind].offset + unit for kind in self.order for unit in self.kept(kind)]
        if "query_heads" in self.scores:
            size, offset = self.layer.group_size, self.layer.axes["query_heads"].offset
            for head in self.kept("heads"):
                found += [offset + head * size + int(q) for q in self.query_order[head, size - self.counts.queries :]]
        return found


class ModelLedger:
    """What is still kept of the model, and what each possible next cut would save."""

    def __init__(
        self, space: PruningSpace, scores_U: Tensor, min_units: Mapping[str, int] | None, round_to: int
    ) -> None:
        if round_to < 1:
            raise UserError(f"prune.round_to is {round_to}; kept widths are multiples of it, so it must be at least 1")
        least = _least(space, min_units)
        scores = space.split(scores_U)
        self.space, self.cost = space, space.cost
        self.layers = [LayerLedger(layer, scores, least, round_to) for layer in space.layers]
        self.hidden_step = round_to
        self.hidden_scores = scores[space.hidden.name] if space.hidden else torch.zeros(0)
        self.hidden_order = torch.argsort(self.hidden_scores, stable=True).tolist()
        self.hidden = len(self.hidden_order)
        self.hidden_least = _floor(least["hidden"], round_to, self.hidden)
        self._sizes: dict[tuple[int, Counts], float] = {}

    def size(self, layer: LayerLedger, counts: Counts, cost: CostModel | None = None) -> float:
        """Cost of a layer that keeps so much, by the budget's measure unless another is given."""
        return layer.layer.cost(counts, cost or self.cost)

    def removable(self) -> float:
        """Return the cost saved when every layer is cut to its minimum."""
        hidden = {"hidden": self.hidden_least} if self.hidden else {}
        smallest = sum(self.size(layer, layer.smallest()._replace(**hidden)) for layer in self.layers)
        return self.space.total_cost - smallest

    def cuts(self) -> list[tuple[int, str]]:
        """List every pair of layer and kind that can be cut."""
        found = [(i, kind) for i, layer in enumerate(self.layers) for kind in layer.scores]
        return [*found, (WHOLE_MODEL, "hidden")] if self.hidden else found

    def saving(self, index: int, kind: str) -> float:
        """Cost saved by the next cut; zero when the minimum is kept."""
        if index == WHOLE_MODEL:
            if self.hidden <= self.hidden_least:
                return 0.0
            hidden = _next(self.hidden, self.hidden_step, self.hidden_least)
            return sum(
                self.size(layer, layer.counts) - self.size(layer, layer.counts._replace(hidden=hidden))
                for layer in self.layers
            )
        layer = self.layers[index]
        after = layer.after(kind)
        return 0.0 if after is None else self._size(index, layer.counts) - self._size(index, after)

    def _size(self, index: int, counts: Counts) -> float:
        """:meth:`size` of a layer, remembered: every count is asked for several times."""
        if (index, counts) not in self._sizes:
            self._sizes[index, counts] = self.size(self.layers[index], counts)
        return self._sizes[index, counts]

    def score(self, index: int, kind: str) -> float:
        """Score of what the next cut removes."""
        if index == WHOLE_MODEL:
            return _next_score(self.hidden_scores, self.hidden_order, self.hidden, self.hidden_step, self.hidden_least)
        return self.layers[index].score(kind)

    def cut(self, index: int, kind: str) -> None:
        """Make the next cut."""
        if index == WHOLE_MODEL:
            self.set_hidden(_next(self.hidden, self.hidden_step, self.hidden_least))
            return
        after = self.layers[index].after(kind)
        assert after is not None
        self.layers[index].counts = after

    def set_hidden(self, hidden: int) -> None:
        """Set the width of the residual stream in all layers."""
        self.hidden = hidden
        for layer in self.layers:
            layer.counts = layer.counts._replace(hidden=hidden)

    def kept_units(self) -> list[int]:
        """Flat indices of the kept units of the whole model."""
        kept = [unit for layer in self.layers for unit in layer.kept_units()]
        if self.space.hidden:
            order = self.hidden_order
            kept += [self.space.hidden.offset + unit for unit in order[len(order) - self.hidden :]]
        return kept


def _floor(least: int, step: int, count: int) -> int:
    """Least count that is a multiple of the step; the count itself where no such multiple is below it."""
    return min(-(-least // step) * step, count)


def _next(count: int, step: int, least: int) -> int:
    """The next smaller count: the nearest multiple of the step."""
    return max(count - (count % step or step), least)


def _next_score(scores: Tensor, order: list[int], count: int, step: int, least: int) -> float:
    """Mean score of the units that the next cut removes."""
    done = len(order) - count
    going = order[done : done + count - _next(count, step, least)]
    return float(scores[going].mean()) if len(going) > 1 else float(scores[going[0]])


def _least(space: PruningSpace, min_units: Mapping[str, int] | None) -> dict[str, int]:
    least = {**DEFAULT_MIN_UNITS, **(min_units or {})}
    if least["query_heads"] < 1:
        raise UserError(
            "min_units query_heads must be at least 1: a KV head without query heads computes nothing; prune 'heads' "
            "instead"
        )
    for layer in space.layers:
        for kind in layer.output_bias:
            if least[kind] < 1:
                raise UserError(
                    f"prune.min_{kind} is {least[kind]}, but the output projection of {layer.prefix} has a bias, "
                    "which a removed block would lose; "
                    f"set prune.min_{kind} to at least 1"
                )
    return least
