"""Metrics: named figures of one model with what they are over, and how much of a reference another model has kept.

:mod:`atp.evaluate.quality` fills them; a run's results and reports read them. It knows nothing of models or records.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from atp.evaluate.intervals import RESAMPLES, Items, interval, score

log = logging.getLogger(__name__)

ROUGE = ("rouge1", "rouge2", "rougeL")
HIGHER_IS_BETTER = ("accuracy", "macro_f1", *ROUGE)
LOWER_IS_BETTER = ("perplexity", "bits_per_byte")

FEW_RECORDS = 20


@dataclass(frozen=True)
class Metrics:
    """Quality of one model.

    Attributes:
        values: Metric to value: ``perplexity``, ``bits_per_byte``, and per task ``<task>/perplexity``,
            ``<task>/accuracy``, ``<task>/macro_f1``, ``<task>/rouge1``, ``<task>/rouge2``, ``<task>/rougeL``. Accuracy,
            F1 and ROUGE lie in [0, 1].
        counts: Metric to what it is over: tokens for perplexity, bytes for bits per byte, records for the others.
        items: Metric to what each item gave: records, or windows of text where there are fewer than
            ``FEW_RECORDS`` records.
    """

    values: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    items: dict[str, Items] = field(default_factory=dict)

    def put(self, name: str, value: float, count: int, items: Items | None = None) -> None:
        """Add a metric."""
        self.values[name] = value
        self.counts[name] = count
        if items is not None:
            self.items[name] = items

    def intervals(self, resamples: int = RESAMPLES) -> dict[str, list[float]]:
        """Return the 95% bootstrap interval of every metric that has at least two items."""
        found = {name: interval(items, resamples=resamples) for name, items in self.items.items()}
        return {name: list(bounds) for name, bounds in found.items() if bounds is not None}


@dataclass
class Tally:
    """Sums of negative log-likelihood (nats), tokens and bytes, per record and per window of text."""

    records: dict[int, list[float]] = field(default_factory=dict)
    windows: list[tuple[float, float, float]] = field(default_factory=list)

    def add(self, record: int, nats: float, tokens: int, text_bytes: float) -> None:
        """Add one window of the record with this index."""
        row = self.records.setdefault(record, [0.0, 0.0, 0.0])
        for column, amount in enumerate((nats, tokens, text_bytes)):
            row[column] += amount
        self.windows.append((nats, tokens, text_bytes))

    def update(self, other: Tally) -> None:
        """Add another tally, of other records."""
        self.records.update(other.records)
        self.windows.extend(other.windows)

    def put(self, metrics: Metrics, prefix: str, *, bits: bool) -> None:
        """Add perplexity and, if asked, bits per byte to the metrics."""
        rows: Sequence[Sequence[float]] = [self.records[at] for at in sorted(self.records)]
        rows = self.windows if len(rows) < FEW_RECORDS else rows
        nats, tokens, text_bytes = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
        perplexity = Items("perplexity", nats, tokens)
        metrics.put(f"{prefix}perplexity", score(perplexity), int(sum(tokens)), perplexity)
        if bits:
            per_byte = Items("bits", nats, text_bytes)
            metrics.put(f"{prefix}bits_per_byte", score(per_byte), round(sum(text_bytes)), per_byte)


def recovery(pruned: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
    """Return how much of the reference model's quality the pruned model has, in percent, per metric.

    ATP (arXiv 2412.14426) reports the pruned model's score over the dense model's, averaged over metrics. Likewise
    here: pruned over reference where higher is better (accuracy, F1, ROUGE), reference over pruned where lower is
    (perplexity, bits per byte). ``mean`` takes one figure per claim: every accuracy, every ROUGE-L and the overall
    perplexity. Nothing is corrected for chance: at chance level, the accuracy of a five-way choice still recovers 20%
    of a perfect one.

    Args:
        pruned: ``Metrics.values`` of the pruned model.
        reference: ``Metrics.values`` of the model to compare with.

    Returns:
        Percent of each metric that both have and of which the reference has something, and ``mean`` if any of them
        counts in it. A pruned value that is not finite recovers nothing.
    """
    percent: dict[str, float] = {}
    for name, was in reference.items():
        measure = name.rsplit("/", 1)[-1]
        if name not in pruned or measure not in HIGHER_IS_BETTER + LOWER_IS_BETTER:
            continue
        if not (math.isfinite(was) and was > 0):
            log.warning("no recovery of %s: the reference has %s", name, was)
        elif not math.isfinite(pruned[name]):
            percent[name] = 0.0
        else:
            ratio = pruned[name] / was if measure in HIGHER_IS_BETTER else was / pruned[name]
            percent[name] = 100.0 * ratio
    headline = [percent[name] for name in percent if is_headline(name)]
    if headline:
        percent["mean"] = sum(headline) / len(headline)
    return percent


def is_headline(metric: str) -> bool:
    """Return whether a metric counts in the mean recovery."""
    return metric == "perplexity" or metric.rsplit("/", 1)[-1] in ("accuracy", "rougeL")
