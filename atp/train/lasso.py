"""Group lasso on the adapters of pruned units: what drives their rows and columns to zero (ATP).

Sits in the training step beside the budget term. A pruned unit whose LoRA rows are zero is gone in both branches, so
the model that trains with the adapters unmasked becomes the one that removal writes. It knows masks and adapters and
nothing of schedules.

Shape suffixes: U units, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atp.masks.lora import MaskedModel

_EPSILON = 1e-12


def group_lasso(masked: MaskedModel, masks_U: Tensor) -> Tensor:
    """``1 / (3 L)`` times the sum of norms of the adapter rows and columns of pruned units (section 1.5 of the note).

    For every projection, the rows of B where its row side is pruned and the columns of A where its column side is;
    ``||x|| = sqrt(sum x^2 + 1e-12)``, smaller than the authors' 1e-8, whose floor over all groups reads like a rest of
    unpruned weight. Entries of the residual stream are left out: nothing of them is a group of its own in ATP.

    Args:
        masked: The masked LoRA model.
        masks_U: 0/1 masks, [U]; no gradient flows to them.

    Returns:
        Scalar with gradients to the adapters.
    """
    masks = masked.space.split(masks_U.detach())
    total = masks_U.new_zeros(())
    for weight in masked.space.weights:
        factors = masked.adapter(weight.module)
        if factors is None:
            continue
        a_RI, b_OR, _ = factors
        for side, vectors in ((weight.rows, b_OR), (weight.columns, a_RI.T)):
            if side.factors and not any(f.axis.kind == "hidden" for f in side.factors):
                pruned = 1.0 - side.expand(masks).to(vectors.device)
                norms = torch.sqrt((vectors * pruned.unsqueeze(1)).square().sum(1) + _EPSILON)
                total = total + (norms * pruned).sum()
    return total / (3 * len(masked.space.layers))
