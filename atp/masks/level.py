"""The level of logits: one number added to all of them, by which a budget meets its target at every step.

Used between generator and sampler. The shift is zero for budgets that work through the loss. On a GPU it is found
without waiting for the device.

Shape suffixes: U units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atp.masks.budget import Budget
from atp.masks.sampler import Sampler
from atp.space.space import PruningSpace


@torch.no_grad()
def level_shift(
    budget: Budget, sampler: Sampler, space: PruningSpace, logits_U: Tensor, target: float
) -> Tensor | float:
    """Return the number that the budget adds to all logits, such that the expected reduction is the target.

    Args:
        budget: Decides whether and how logits are shifted.
        sampler: Turns logits into keep probabilities.
        space: Turns keep probabilities into the share of the cost removed.
        logits_U: The generator's logits [U].
        target: The share to remove, 0 to 1.
    """
    on_device = logits_U.device.type != "cpu" and space.is_additive
    if not on_device:
        logits_U = logits_U.cpu()  # one copy, where bisection on a GPU would wait for it at every probe

    def sparsity_of(shift: Tensor | float) -> Tensor:
        return space.reduction(sampler.keep_probability(logits_U + shift))

    if on_device:
        return budget.shift_on_device(sparsity_of, logits_U.new_tensor(0.0), target)
    return budget.shift(lambda shift: float(sparsity_of(shift)), target)
