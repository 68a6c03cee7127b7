"""What counts as a match of an exported format with its reference.

A format that stores the weights as they are must give the reference's logits; one that rounds them may differ by what
rounding does to this very model, and little more. Plain numbers in, a verdict out; measures nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MARGIN = 1.5
"""How much more than rounding by itself a rounded file may differ; see docs/how-to/export.md for what was measured."""
PEAK = 25.0
"""How far the largest difference of a rounded file may lie above the root mean square that it is allowed."""


@dataclass(frozen=True)
class Limit:
    """Bounds of an exact format.

    Attributes:
        max_abs: Largest logit difference, in units of the logits' deviation where that is above 1.
        top1: Least share of positions with the same likeliest token.
        rms: Largest root mean square of the differences, in the same units.
    """

    max_abs: float
    top1: float
    rms: float


def verdict(result: Mapping[str, Any], limit: Limit, deviation: float, rounding: float | None = None) -> str:
    """Says what is wrong with a result; empty if it matches.

    Args:
        result: What the probe measured.
        limit: The format's bounds, for weights that are stored as they are.
        deviation: Standard deviation of the reference's logits.
        rounding: Root mean square that rounding to this type causes; None for an exact format.
    """
    if result["max_abs"] is None or result["rms"] is None:
        return "logits are not numbers"
    if rounding is None:
        unit = max(deviation, 1.0)
        allowed, peak, least_top1 = limit.rms * unit, limit.max_abs * unit, limit.top1
    else:
        allowed, peak, least_top1 = MARGIN * rounding, PEAK * MARGIN * rounding, 0.0
    found = []
    if result["rms"] > allowed:
        found.append(f"rms {result['rms']:.2g}, allowed {allowed:.2g}")
    if result["max_abs"] > peak:
        found.append(f"largest {result['max_abs']:.2g}, allowed {peak:.2g}")
    if result["top1"] < least_top1:
        found.append(f"top-1 {result['top1']:.2%}, at least {least_top1:.1%}")
    return "; ".join(found)
