"""The two-stage baselines by name: which criterion, which ranking, which shape.

Read by the stages, which prune and tune each named baseline beside a run, and mirrored by the presets of
``conf/prune/``, which make one of them the run's own method. Plain data; it knows nothing of how importance is
computed or units are cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from atp.errors import UserError


@dataclass(frozen=True)
class Baseline:
    """A two-stage method.

    Attributes:
        criterion: Importance of a unit, one of :data:`atp.prepare.criteria.CRITERIA`.
        ranking: How units of different layers compare, one of :data:`atp.prepare.criteria.RANKINGS`; without effect at
            equal widths.
        shape: ``uniform`` ranks within each layer at equal widths, ``per_layer`` ranks all units together.
    """

    criterion: str
    ranking: str
    shape: str


CALIBRATION_BATCHES = 16
"""Training batches on which a baseline's importance is measured."""

BASELINES = {
    "taylor": Baseline("taylor", "layer", "uniform"),
    "taylor_global": Baseline("taylor", "global", "per_layer"),
    "wanda": Baseline("wanda", "layer", "uniform"),
    "fluctuation": Baseline("fluctuation", "centred", "per_layer"),
    "magnitude": Baseline("magnitude", "global", "per_layer"),
    "uniform": Baseline("magnitude", "layer", "uniform"),
    "random": Baseline("random", "global", "per_layer"),
    "random_uniform": Baseline("random", "layer", "uniform"),
}
"""Baselines that ``evaluate.baselines`` may name."""


def check_baselines(names: Iterable[str]) -> None:
    """Raise ValueError for a name that is not a baseline."""
    unknown = sorted(set(names) - set(BASELINES))
    if unknown:
        raise UserError(f"evaluate.baselines holds {unknown}; known: {', '.join(BASELINES)}")
