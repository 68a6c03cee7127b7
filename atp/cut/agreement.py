"""Whether the masked, the removed and the reloaded model are one model, and where they part if not.

After removal and export. Differences of logits come in with the type they were computed or stored in; out comes a
verdict with the stage that is at fault. Plain numbers; it runs no model and knows no files.

Limits are shares of the logits' spread (their standard deviation). In float32 all compute the same sums in another
order, which stays far below a thousandth; a head that is not the trained one differs by several. Half precision rounds
weights by up to 2^-11 (float16) or 2^-8 (bfloat16) of themselves, which deep models add up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LIMITS = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.4}
"""Largest logit difference allowed, by type, as a share of the logits' spread."""
_LEAST_SPREAD = 1e-2  # logits of an untrained model are nearly equal, and rounding is not relative to that


@dataclass(frozen=True)
class Difference:
    """Largest logit difference of two models.

    Attributes:
        largest: The difference; infinite where a logit is not a number.
        spread: Standard deviation of the first model's logits.
    """

    largest: float
    spread: float


def allowed(dtype: str, spread: float) -> float:
    """Largest difference that computing or storing in a type explains."""
    return LIMITS.get(dtype, LIMITS["float32"]) * max(spread, _LEAST_SPREAD)


def verdict(
    masked_removed: Difference,
    removed_reloaded: Difference,
    masked_reloaded: Difference,
    *,
    computed: str,
    stored: str,
    rounded: bool,
) -> str:
    """Says which stage changed what the model computes; empty where none did.

    Args:
        masked_removed: Of the model with masks and the one without the units.
        removed_reloaded: Of the removed model, rounded as the file is where ``rounded``, and the file read again.
        masked_reloaded: Of the model with masks and the file read again.
        computed: Type that all were computed in.
        stored: Type of the file.
        rounded: Whether the removed model was rounded before it was compared.
    """
    looser = max(computed, stored, key=lambda name: LIMITS.get(name, 0.0))
    stages = (
        ("masked -> removed", masked_removed, computed),
        ("removed -> reloaded", removed_reloaded, computed if rounded else looser),
        ("masked -> reloaded", masked_reloaded, looser),
    )
    for stage, difference, dtype in stages:
        most = allowed(dtype, difference.spread)
        if not difference.largest <= most:
            found = f"{difference.largest:.3g}" if math.isfinite(difference.largest) else "not a number"
            return (
                f"{stage}: largest logit difference {found}, allowed {most:.2g} ({dtype}, logits' spread "
                f"{difference.spread:.2g})"
            )
    return ""
