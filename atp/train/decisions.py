"""What masks come to in a step, and how far they had come when they were fixed: sparsity expected, units undecided.

Sits beside :mod:`atp.train.joint`, whose figures these are. The final architecture meets its target whatever the
probabilities say, so a run whose masks never got there would look like one whose masks did; the last two tell them
apart. It knows probabilities, samplers and costs, and nothing of steps, runs or reports.

Shape suffixes: U units.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from atp.masks.sampler import Sampler
from atp.space.space import PruningSpace

log = logging.getLogger(__name__)

OPEN = (0.1, 0.9)
"""Keep probabilities between which a unit counts as undecided."""

MOST_OFF = 0.02
"""Distance of the expected sparsity from its target from which on it is told as a warning."""


@torch.no_grad()
def decisions(space: PruningSpace, sampler: Sampler, scores_U: Tensor) -> dict[str, float]:
    """What the scores at the freeze come to.

    Args:
        space: The pruning space.
        sampler: What made masks of the scores' logits.
        scores_U: How sure each unit was to stay (:meth:`Sampler.confidence`), [U].

    Returns:
        ``expected``: share of the budget's cost that the keep probabilities remove; ``undecided``: share of
        the units whose probability lies within :data:`OPEN`.
    """
    keep_U = sampler.kept(scores_U).double()
    low, high = OPEN
    return {
        "expected": float(space.reduction(keep_U)),
        "undecided": float(((keep_U > low) & (keep_U < high)).double().mean()),
    }


def mask_figures(space: PruningSpace, kept_U: Tensor, sparsity: Tensor, target: float) -> dict[str, Tensor | float]:
    """What a step's masks come to, by the names of its scalars.

    Args:
        space: The pruning space.
        kept_U: 1 where a unit is there in this step, [U].
        sparsity: Share of the budget's cost that masks, or their probabilities, remove.
        target: The share to remove by now.
    """
    return {
        "mask/sparsity": sparsity,
        "mask/target_sparsity": target,
        "mask/keep_ratio": 1.0 - sparsity,
        "mask/heads_kept": space.kept_heads(kept_U),
        "mask/channels_kept": space.kept_channels(kept_U),
    }


def tell(space: PruningSpace, sampler: Sampler, scores_U: Tensor, masks_U: Tensor, target: float, step: int) -> None:
    """Log the freeze; warn where the masks had not reached their target by themselves.

    Args:
        space: The pruning space.
        sampler: What made masks of the scores' logits.
        scores_U: How sure each unit was to stay, [U].
        masks_U: The final masks, [U].
        target: Share of the budget's cost to remove.
        step: Optimiser steps done.
    """
    found = decisions(space, sampler, scores_U)
    expected, undecided = found["expected"], found["undecided"]
    sparsity = float(space.sparsity(masks_U.double()))
    log.info("masks frozen at step %d: block sparsity %.4f (target %.4f)", step, sparsity, target)
    log.info("at the freeze masks expect a sparsity of %.4f; %.1f%% of units are undecided", expected, 100 * undecided)
    if abs(expected - target) > MOST_OFF:
        log.warning(
            "the masks were away from their target at the freeze: they expect a sparsity of %.3f, the target is %.3f. "
            "The cut meets the target by the units' order alone; train longer, or change prune.generator_lr or "
            "prune.multiplier_lr",
            expected,
            target,
        )
