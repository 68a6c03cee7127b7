"""Intervals: how sure a score is, and how sure a difference between two models on the same items is.

Percentile bootstrap over items (Efron and Tibshirani 1993, chapter 13), seeded, with every figure's number of items. It
takes what :mod:`atp.evaluate.quality` kept of each item and gives plain data. It knows nothing of models, records or
what a metric means beyond its formula.

Shape suffixes: N items, S resamples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
_LARGEST_EXPONENT = 700.0
_CHUNK = 50


@dataclass(frozen=True)
class Items:
    """The values per item from which a metric is computed.

    Attributes:
        statistic: ``mean`` of ``first``; ``perplexity``: exp of the sum of ``first`` (nats) over that of ``second``
            (tokens); ``bits``: the sum of ``first`` (nats) in bits over that of ``second`` (bytes); ``macro_f1`` of
            picked (``first``) and right (``second``) classes, over the classes that occur.
        first: One number per item.
        second: One number per item; unused by ``mean``.
    """

    statistic: str
    first: Sequence[float]
    second: Sequence[float] = ()

    def plain(self) -> dict[str, Any]:
        """Return it as plain data, for a file."""
        return {"statistic": self.statistic, "first": list(self.first), "second": list(self.second)}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Items:
        """Return what :meth:`plain` gave."""
        return cls(data["statistic"], data["first"], data["second"])


def score(items: Items) -> float:
    """Return the metric over all items."""
    return float(_statistics(items, np.arange(len(items.first))[None])[0])


def interval(items: Items, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float] | None:
    """Return the bootstrap interval of a metric, or None where there are fewer than two items."""
    if len(items.first) < 2 or resamples < 1:
        return None
    return _bounds(np.concatenate([_statistics(items, draws) for draws in _draws(len(items.first), resamples, seed)]))


def paired(of: Items, against: Items, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any] | None:
    """Compare two models on the same items: each resample takes the same items of both.

    Args:
        of: Items of the model in question.
        against: Items of the model it is compared with, in the same order.
        resamples: Number of resamples.
        seed: Which resamples.

    Returns:
        ``difference`` (of minus against), ``low`` and ``high`` of its interval, ``half_width``, ``items``, and whether
        the interval leaves zero out (``significant``); None where there are fewer than two items or they do not match.
    """
    count = len(of.first)
    if count < 2 or count != len(against.first) or of.statistic != against.statistic or resamples < 1:
        return None
    differences = np.concatenate(
        [_statistics(of, draws) - _statistics(against, draws) for draws in _draws(count, resamples, seed)]
    )
    low, high = _bounds(differences)
    return {
        "difference": score(of) - score(against),
        "low": low,
        "high": high,
        "half_width": (high - low) / 2,
        "items": count,
        "significant": bool(low > 0 or high < 0),
    }


def _draws(count: int, resamples: int, seed: int) -> list[np.ndarray]:
    """Draw the resampled positions [S, N], in chunks; all metrics over N items get the same ones."""
    rng = np.random.default_rng((seed, count))
    sizes = [min(_CHUNK, resamples - start) for start in range(0, resamples, _CHUNK)]
    return [rng.integers(0, count, (size, count)) for size in sizes]


def _bounds(values: np.ndarray) -> tuple[float, float]:
    tail = 100 * (1 - LEVEL) / 2
    finite = values[np.isfinite(values)]
    if not len(finite):
        return math.nan, math.nan
    low, high = np.percentile(finite, [tail, 100 - tail])
    return float(low), float(high)


def _statistics(items: Items, draws_SN: np.ndarray) -> np.ndarray:
    first_SN = np.asarray(items.first, dtype=np.float64)[draws_SN]
    if items.statistic == "mean":
        return first_SN.mean(axis=1)
    second_SN = np.asarray(items.second, dtype=np.float64)[draws_SN]
    if items.statistic == "macro_f1":
        return _macro_f1(first_SN.astype(np.int64), second_SN.astype(np.int64))
    ratio_S = first_SN.sum(axis=1) / np.maximum(second_SN.sum(axis=1), 1)
    if items.statistic == "bits":
        return ratio_S / math.log(2)
    return np.where(ratio_S > _LARGEST_EXPONENT, np.inf, np.exp(np.minimum(ratio_S, _LARGEST_EXPONENT)))


def _macro_f1(picked_SN: np.ndarray, right_SN: np.ndarray) -> np.ndarray:
    """F1 per class that is picked or right in the resample, averaged over those classes, as torchmetrics does."""
    totals_S = np.zeros(len(picked_SN))
    counts_S = np.zeros(len(picked_SN))
    for label in range(int(max(picked_SN.max(), right_SN.max())) + 1):
        picked, right = picked_SN == label, right_SN == label
        both_S, sum_S = (picked & right).sum(axis=1), picked.sum(axis=1) + right.sum(axis=1)
        totals_S += np.where(sum_S > 0, 2 * both_S / np.maximum(sum_S, 1), 0.0)
        counts_S += sum_S > 0
    return totals_S / np.maximum(counts_S, 1)
