"""How sure a quality figure is: intervals that a run recorded, and for proportions one computed from their count.

Works on the content of a `metrics.json`. It does not know how figures were measured, nor how they are shown.
"""

import math
from collections.abc import Mapping
from typing import Any

from atp.report.record import number

_Z95 = 1.959964


def interval(metrics: Mapping[str, Any], model: str, metric: str) -> tuple[float, float] | None:
    """The 95% interval of a model's quality figure.

    Args:
        metrics: Checked content of a `metrics.json`.
        model: Key under `eval`.
        metric: Metric name, such as "perplexity" or "clause/accuracy".

    Returns:
        Low and high: the bootstrap interval under `intervals` where the run recorded one; for an accuracy otherwise
        Wilson's score interval from the number of records; None where neither can be had.
    """
    recorded = ((metrics.get("intervals") or {}).get(model) or {}).get(metric)
    if isinstance(recorded, list | tuple) and len(recorded) == 2 and all(_is_number(end) for end in recorded):
        return float(recorded[0]), float(recorded[1])
    value, count = number(metrics, "eval", model, metric), number(metrics, "eval_counts", metric)
    if metric.rsplit("/", 1)[-1] == "accuracy" and value is not None and count and 0 <= value <= 1:
        return wilson(value, count)
    return None


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion (Wilson 1927), which stays within [0, 1] and works near its ends.

    Args:
        share: Observed proportion.
        count: Number of observations.

    Returns:
        Low and high.
    """
    z2 = _Z95**2 / count
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z95 / (1 + z2) * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
