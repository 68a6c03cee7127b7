"""Early cuts: units that have long been unlikely to stay are cut from the live model before the freeze.

Sits in joint training between the keep probabilities of every step and compaction. At the freeze everything that is not
kept is cut anyway; this brings part of that forward into the ramp, at the price that a unit once cut cannot come back.

The rule: at ``cuts`` evenly spaced steps between warm-up and freeze, a unit is cut for good if its keep probability was
below ``below`` at each of the last ``patience`` steps *and* the final selection, made on the scores of that step, would
drop it. The second condition keeps early cuts within the budget and the least number of units of every layer. Cut units
keep a score below all others, so that sampler, budget and selection count them as gone. (This project's.)

Shape suffixes: U units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atp.errors import UserError

CUT_SCORE = -1e4
"""Logit of units that were cut: below whatever a generator makes and a budget shifts."""


class ProgressiveCut(nn.Module):
    """Tracks which units are cut already, and for how many steps the others have been unlikely to stay.

    Args:
        num_units: U.
        cuts: Cuts before the freeze.
        below: Keep probability that counts as negligible.
        patience: Optimiser steps in a row for which it must be.

    Raises:
        ValueError: A number out of range.
    """

    live_U: Tensor
    quiet_U: Tensor

    def __init__(self, num_units: int, *, cuts: int, below: float = 0.02, patience: int = 10) -> None:
        super().__init__()
        if cuts < 1 or patience < 1 or not 0.0 < below < 1.0:
            raise UserError(
                f"prune.progressive is cuts {cuts}, below {below}, patience {patience}; cuts and patience must be at "
                "least 1 and below lies between 0 and 1 (cuts=0 switches it off)"
            )
        self.cuts, self.below, self.patience = cuts, below, patience
        self.register_buffer("live_U", torch.ones(num_units))
        self.register_buffer("quiet_U", torch.zeros(num_units, dtype=torch.int32))
        self._seen = self._cut = -1

    def observe(self, keep_U: Tensor, step: int) -> None:
        """Note the keep probabilities [U] of an optimiser step; of its forward passes only the first counts."""
        if step != self._seen:
            self._seen = step
            self.quiet_U.copy_(torch.where(keep_U.detach() < self.below, self.quiet_U + 1, 0))

    def is_due(self, step: int, start: int, stop: int) -> bool:
        """Whether an early cut is due before this step of the ramp from ``start`` to ``stop`` and not made yet."""
        due = {start + round((stop - start) * number / (self.cuts + 1)) for number in range(1, self.cuts + 1)}
        if step not in due or step == self._cut:
            return False
        self._cut = step
        return True

    def decided(self, selected_U: Tensor) -> Tensor:
        """Return the units that stay after this cut, [U] of 0 and 1.

        Args:
            selected_U: Masks of the final selection on the present scores, [U].
        """
        goes_U = (self.quiet_U >= self.patience) & (selected_U.to(self.live_U.device) < 0.5)
        return torch.where(goes_U, 0.0, self.live_U)

    def scores(self, logits_U: Tensor) -> Tensor:
        """Return the logits [U], with :data:`CUT_SCORE` for units that were cut."""
        return torch.where(self.live_U > 0, logits_U, CUT_SCORE)
