"""How much each unit matters to the loss before anything is cut: the start of learnt scores.

Sits between the masked model and the generator, before training. One backward pass per batch through gates of one gives
each gate's gradient; its mean square is the diagonal Fisher information of the gate, to second order the loss of
closing it (Kwon et al. 2022, arXiv 2204.09656, eq. 10-13). It knows nothing of budgets or schedules.

Shape suffixes: U units.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from atp.errors import UserError
from atp.masks.lora import MaskedModel
from atp.masks.loss import causal_loss
from atp.space.space import PruningSpace


def fisher_importance(masked: MaskedModel, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Mean squared gradient of the loss by every gate.

    Args:
        masked: The model with all gates open; adapters are left as they are.
        batches: Batches with labels, on the model's device.

    Returns:
        Importance [U], float32, not negative.

    Raises:
        ValueError: No batch, or a gradient that is not finite.
    """
    training = masked.training
    masked.eval()
    device = next(masked.parameters()).device
    total_U = torch.zeros(masked.space.num_units, device=device)
    number = 0
    for batch in batches:
        gates_U = torch.ones(masked.space.num_units, device=device, requires_grad=True)
        masked.set_masks(gates_U)
        (gradient_U,) = torch.autograd.grad(causal_loss(masked, batch), gates_U)
        total_U += gradient_U.float().square()
        number += 1
    masked.set_masks(None)
    masked.train(training)
    if not number or not torch.isfinite(total_U).all():
        raise UserError(
            f"prune.warm_start: {number} batches gave no finite gradients; check the data, try model.dtype=float32, "
            "or set "
            "prune.warm_start.batches=0"
        )
    return total_U / number


def standardise(space: PruningSpace, importance_U: Tensor) -> Tensor:
    """Log importance with mean zero and unit deviation within each layer and kind, [U].

    Ranking raw importance over all layers starves whole layers; within a layer it is comparable, and where layers
    should differ in width is left to training.
    """
    parts = []
    for axis_importance in space.split(importance_U).values():
        logs = axis_importance.clamp(min=1e-30).log()
        spread = logs.std() if logs.numel() > 1 else logs.new_ones(())
        parts.append((logs - logs.mean()) / spread.clamp(min=1e-6))
    return torch.cat(parts)
