"""What two finished runs cut differently, and which of their figures differ.

Masks are compared unit by unit: overlap and Jaccard index per layer, beside what two random choices of the same sizes
would share. Figures are compared with the interval of their difference where both have one. Records of runs in, plain
values out; ``atp compare`` shows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from atp.errors import UserError
from atp.report.comparison import metric_names
from atp.report.record import RunRecord, number
from atp.report.runs import FIGURES
from atp.report.uncertainty import interval


@dataclass(frozen=True)
class Overlap:
    """Units kept by two runs in one layer.

    Attributes:
        kind: Kind of unit.
        layer: Index of the layer; -1 for all layers together.
        kept_a: Units that A keeps.
        kept_b: Units that B keeps.
        both: Units that both keep.
        units: Units of the dense model.
    """

    kind: str
    layer: int
    kept_a: int
    kept_b: int
    both: int
    units: int

    @property
    def jaccard(self) -> float:
        """Kept by both over kept by either; 1 where neither keeps any."""
        either = self.kept_a + self.kept_b - self.both
        return self.both / either if either else 1.0

    @property
    def jaccard_by_chance(self) -> float:
        """Jaccard index at the overlap that two random choices of these sizes have on average."""
        both = self.kept_a * self.kept_b / self.units if self.units else 0.0
        either = self.kept_a + self.kept_b - both
        return both / either if either else 1.0


@dataclass(frozen=True)
class Difference:
    """A figure in both runs, and B minus A with its 95% interval where both have intervals."""

    name: str
    a: float
    b: float
    low: float | None = None
    high: float | None = None

    @property
    def is_clear(self) -> bool | None:
        """Whether the interval leaves zero out; None without one."""
        return None if self.low is None or self.high is None else self.low > 0 or self.high < 0


def mask_overlaps(a: RunRecord, b: RunRecord) -> list[Overlap]:
    """Compare kept units per kind and layer, then over all layers.

    Raises:
        ValueError: The runs have masks of different shapes, so their units do not correspond.
    """
    found = []
    for kind in (kind for kind in a.masks if kind in b.masks):
        rows_a, rows_b = a.masks[kind], b.masks[kind]
        if [len(row) for row in rows_a] != [len(row) for row in rows_b]:
            raise UserError(
                f"{a.run_dir} and {b.run_dir} have {kind} of different numbers, so their units do not correspond; "
                "compare runs of one base model"
            )
        layers = [
            Overlap(kind, layer, sum(x), sum(y), sum(p & q for p, q in zip(x, y, strict=True)), len(x))
            for layer, (x, y) in enumerate(zip(rows_a, rows_b, strict=True))
        ]
        sums = (sum(getattr(o, name) for o in layers) for name in ("kept_a", "kept_b", "both", "units"))
        found += [*layers, Overlap(kind, -1, *sums)]
    return found


def figure_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """Figures that both runs have: sizes and costs, then quality of the pruned model with intervals.

    The interval of a difference is made from the two intervals (Newcombe 1998, method 10; Zou and Donner 2008): it
    treats the runs as independent, so where both were measured on the same records it is wider than need be.
    """
    found = []
    for name, keys in FIGURES.items():
        if keys[0] != "eval":
            x, y = number(a, *keys), number(b, *keys)
            if x is not None and y is not None:
                found.append(Difference(name, x, y))
    for metric in metric_names(a):
        x, y = number(a, "eval", "pruned", metric), number(b, "eval", "pruned", metric)
        if x is None or y is None:
            continue
        sure_a, sure_b = interval(a, "pruned", metric), interval(b, "pruned", metric)
        ends: tuple[float | None, float | None] = (None, None)
        if sure_a and sure_b:
            low = y - x - math.hypot(y - sure_b[0], sure_a[1] - x)
            ends = (low, y - x + math.hypot(sure_b[1] - y, x - sure_a[0]))
        found.append(Difference(metric, x, y, *ends))
    return found
