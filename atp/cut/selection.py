"""From scores to the final architecture: which units stay, chosen deterministically to meet a budget.

Sits between the generator (which made the scores) and removal (which cuts). The selection is greedy from the lowest
score up, skips what would overshoot, and so ends within one unit's cost of the target; noise has no part in it. It
knows the costs through the pruning space and nothing of training.

Counts interact: dropping a KV head saves more while its group still has all its query heads, and a dimension of the
residual stream saves more while layers are wide. Query heads leave one per group at a time, because grouped-query
attention needs equal groups.

Shape suffixes: U units.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from atp.cut.ledger import DEFAULT_MIN_UNITS, FIELD, LayerLedger, ModelLedger
from atp.errors import UserError
from atp.space.space import PruningSpace
from atp.space.units import WHOLE_MODEL, Counts

__all__ = ["DEFAULT_MIN_UNITS", "check_reachable", "reachable_sparsity", "select"]


def select(
    space: PruningSpace,
    scores_U: Tensor,
    sparsity: float,
    *,
    shape: str = "per_layer",
    min_units: Mapping[str, int] | None = None,
    round_to: int = 1,
) -> Tensor:
    """Choose the units to keep.

    Args:
        space: The pruning space.
        scores_U: Higher means more worth keeping, comparable over all units, shape [U]. Ties go by position.
        sparsity: Fraction of the budget's cost (decoder-block parameters, unless ``space.cost`` is set) to remove.
        shape: ``per_layer`` ranks all units together; ``uniform`` keeps equal counts in every layer, ranked within
            layers.
        min_units: Units that each layer keeps, by kind; missing kinds take :data:`DEFAULT_MIN_UNITS`.
        round_to: Kept numbers of channels and of hidden dimensions are multiples of this.

    Returns:
        0/1 masks of shape [U], float32, whose sparsity is at most ``sparsity`` and less than one unit's cost below it
        (``uniform``: one unit in every layer; ``round_to``: that many units).

    Raises:
        ValueError: A sparsity that the space cannot reach, scores that are not finite, or an unknown shape.
    """
    if not torch.isfinite(scores_U).all():
        raise UserError(
            f"scores hold {int((~torch.isfinite(scores_U)).sum())} values that are not finite: training diverged"
        )
    ledger = ModelLedger(space, scores_U.detach().double().cpu(), min_units, round_to)
    _check_reachable(ledger, sparsity)
    budget = sparsity * space.total_cost
    if shape == "per_layer":
        _greedy(ledger, budget)
    elif shape == "uniform":
        _uniform(ledger, sparsity, budget)
    else:
        raise UserError(f"prune.shape is {shape!r}; known: per_layer, uniform")
    masks_U = torch.zeros(space.num_units)
    masks_U[ledger.kept_units()] = 1.0
    return masks_U


def reachable_sparsity(space: PruningSpace, min_units: Mapping[str, int] | None = None, *, round_to: int = 1) -> float:
    """Largest sparsity the space allows when every layer keeps ``min_units``."""
    scores_U = torch.zeros(space.num_units, dtype=torch.double)
    return ModelLedger(space, scores_U, min_units, round_to).removable() / space.total_cost


def check_reachable(
    space: PruningSpace, sparsity: float, min_units: Mapping[str, int] | None = None, *, round_to: int = 1
) -> None:
    """Raise ValueError when ``sparsity`` is outside (0, 1) or cannot be met; to be called before any training."""
    if not 0.0 < sparsity < 1.0:
        raise UserError(
            f"prune.sparsity is {sparsity}; it is the fraction of block parameters to remove, between 0 and 1"
        )
    scores_U = torch.zeros(space.num_units, dtype=torch.double)
    _check_reachable(ModelLedger(space, scores_U, min_units, round_to), sparsity)


def _check_reachable(ledger: ModelLedger, sparsity: float) -> None:
    most = ledger.removable() / ledger.space.total_cost
    if sparsity > most:
        kinds = sorted({axis.kind for axis in ledger.space.axes})
        raise UserError(
            f"prune.sparsity is {sparsity}, but cutting {' + '.join(kinds)} down to the units every layer keeps "
            f"removes at most {most:.4f} of the "
            f"block {ledger.space.cost.of}; lower it, add kinds to prune.space, or lower prune.min_heads / "
            "prune.min_channels"
        )


def _greedy(ledger: ModelLedger, budget: float) -> None:
    """Cut the lowest-scored unit of all layers that still fits the budget, until none fits."""
    # Every layer and kind has at most one entry, its next cut, since units of a kind go in the order of their scores.
    # Costs change with every cut, so an entry's saving is looked up when it is taken, never when it is pushed.
    heap = [(ledger.score(*cut), *cut) for cut in ledger.cuts() if ledger.saving(*cut) > 0]
    heapq.heapify(heap)
    too_big: set[tuple[int, str]] = set()
    removed = 0.0
    while heap:
        score, index, kind = heapq.heappop(heap)
        saving = ledger.saving(index, kind)
        if saving == 0:
            continue
        if removed + saving > budget + 1e-6 * max(budget, 1e-6):  # skipped, not the end: a smaller one may still fit
            too_big.add((index, kind))
            continue
        if ledger.score(index, kind) != score:  # the groups behind a query-head score have changed since it was pushed
            heapq.heappush(heap, (ledger.score(index, kind), index, kind))
            continue
        ledger.cut(index, kind)
        removed += saving
        # What was too big may fit now: after a KV head has gone, the next query head of its layer saves less. Sorted,
        # as the order of a set is not to decide anything.
        smaller_now = sorted(cut for cut in too_big if _touches((index, kind), cut, bool(ledger.space.hidden)))
        too_big.difference_update(smaller_now)
        for again in ((index, kind), *smaller_now):
            if ledger.saving(*again) > 0:
                heapq.heappush(heap, (ledger.score(*again), *again))


def _touches(done: tuple[int, str], other: tuple[int, str], has_hidden: bool) -> bool:
    """Whether a cut changes what another one saves: within an attention block, and any with the residual stream."""
    if has_hidden and WHOLE_MODEL in (done[0], other[0]):
        return True
    return done[0] == other[0] and done[1] != "channels" and other[1] != "channels"


def _uniform(ledger: ModelLedger, sparsity: float, budget: float) -> None:
    """Equal counts in every layer: head counts nearest to the kept fraction, channels to meet the budget.

    Where head dimensions or the residual stream are pruned too, all kinds keep about the same fraction, found by
    bisection, and counts around it are tried.
    """
    layers = [layer for layer in ledger.layers if layer.scores]
    first = layers[0] if layers else ledger.layers[0]
    if len({layer.layer.dense for layer in layers}) > 1:
        raise UserError(
            "prune.shape is 'uniform', but the layers of this model already differ in width; use prune.shape=per_layer"
        )
    share = _share(ledger, first, 1.0 - sparsity)
    step = first.steps.get("channels", 1)
    # Combinations are few enough to try all. Best is what leaves the least budget unused, in whole steps of channels,
    # as less than a step cannot be used; then what cuts heads and channels most alike.
    best: tuple[float, float, Counts] | None = None
    for tried in _tried_counts(ledger, first, share):
        trial, per_channel = _with_channels(ledger, layers, tried, budget)
        removed = _removed(ledger, layers, trial)
        if removed > budget + 1e-6:
            continue
        gap = (budget - removed) // max(per_channel * step, 1e-12) / ledger.space.total_cost
        uneven = abs(trial.heads * trial.queries / max(first.layer.num_heads, 1) - share)
        candidate = (gap, uneven, trial)
        best = min(best, candidate) if best else candidate
    if best is None:
        raise UserError(
            f"prune.shape is 'uniform', and no equal widths remove just {sparsity} with prune.round_to = {step}; lower "
            "prune.round_to or raise prune.sparsity"
        )
    if ledger.hidden:
        ledger.set_hidden(best[2].hidden)
    for layer in layers:
        layer.counts = best[2]


def _tried_counts(ledger: ModelLedger, first: LayerLedger, share: float) -> Iterator[Counts]:
    """Yield counts to try for every layer: all channels, any number of heads, about ``share`` of the other kinds."""
    dense = first.layer.dense

    def options(kind: str) -> range | list[int]:
        count = int(getattr(dense, FIELD[kind]))
        if kind == "hidden" and ledger.hidden:
            return _around(share * count, ledger.hidden_step, ledger.hidden_least, count)
        if kind not in first.scores:
            return [count]
        if kind in ("heads", "query_heads"):
            return range(first.least[kind], count + 1)
        return _around(share * count, 1, first.least[kind], count)

    kinds = ("heads", "query_heads", "qk_pairs", "value_dims", "hidden")
    for heads, queries, pairs, values, hidden in itertools.product(*map(options, kinds)):
        yield Counts(heads, queries, dense.channels, pairs, values, hidden)


def _with_channels(
    ledger: ModelLedger, layers: list[LayerLedger], trial: Counts, budget: float
) -> tuple[Counts, float]:
    """Cut as many channels as the budget still asks for; return the counts and the cost of a channel in all layers."""
    first = layers[0] if layers else ledger.layers[0]
    step, dense = first.steps.get("channels", 1), first.layer.dense
    per_channel = len(layers) * (ledger.size(first, trial) - ledger.size(first, trial._replace(channels=0)))
    per_channel /= max(dense.channels, 1)
    if "channels" not in first.scores or per_channel <= 0:
        return trial, per_channel
    cut = max(int((budget - _removed(ledger, layers, trial) + 1e-6) // per_channel), 0)
    channels = min(max(-(-(dense.channels - cut) // step) * step, first.least["channels"]), dense.channels)
    return trial._replace(channels=channels), per_channel


def _removed(ledger: ModelLedger, layers: list[LayerLedger], trial: Counts) -> float:
    """Cost removed when these layers keep ``trial``, and all layers its hidden width."""
    chosen = set(map(id, layers))
    kept = sum(
        ledger.size(layer, trial if id(layer) in chosen else layer.layer.dense._replace(hidden=trial.hidden))
        for layer in ledger.layers
    )
    return ledger.space.total_cost - kept


def _share(ledger: ModelLedger, first: LayerLedger, kept: float) -> float:
    """Fraction of every kind to keep so that a layer keeps ``kept`` of its cost; ``kept`` for heads and channels."""
    fine = [kind for kind in ("qk_pairs", "value_dims", "hidden") if kind in first.layer.axes]
    if not fine:
        return kept
    kinds = {FIELD[kind] for kind in first.layer.axes}
    dense = first.layer.dense
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        trial = Counts(*(n * middle if name in kinds else n for name, n in zip(Counts._fields, dense, strict=True)))  # type: ignore[arg-type]
        low, high = (middle, high) if ledger.size(first, trial) < kept * ledger.size(first, dense) else (low, middle)
    return high


def _around(wanted: float, step: int, least: int, count: int) -> list[int]:
    """Return counts near a wanted one: multiples of the step, or the whole count."""
    near = round(wanted / step) * step
    return sorted({min(max(near + i * step, least), count) for i in (-2, -1, 0, 1, 2)})
