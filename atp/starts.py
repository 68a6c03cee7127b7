"""Which scores masks start from: the candidate whose cut, once repaired, loses least.

Sits between importance and the generator's warm start. Every candidate's scores select an architecture; its output
projections are fitted by least squares, the loss on the calibration batches is taken, and the weights are put back.
The loss of the bare cut does not tell which architecture tunes best; that of the repaired cut does (docs/methods.md).
It knows masked models and scores, and nothing of how importance is measured.

Shape suffixes: U units.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from atp.lora import MaskedModel
from atp.restoration import restore
from atp.space import PruningSpace

log = logging.getLogger(__name__)

ATTENTION = ("heads", "query_heads", "qk_pairs", "value_dims")
"""Kinds that make up attention blocks."""


def candidates(space: PruningSpace, scores: Mapping[str, Tensor], attention: Sequence[float]) -> dict[str, Tensor]:
    """Scores to choose from, by name.

    Args:
        space: The pruning space.
        scores: Scores [U] by criterion.
        attention: What may be added to those of attention units.

    Raises:
        ValueError: Nothing to choose from.
    """
    if not attention:
        raise ValueError("prune.warm_start.attention is empty; [0.0] adds nothing")
    return {
        f"{criterion}, attention {raised:+g}": with_attention(space, scores_U, raised)
        for criterion, scores_U in scores.items()
        for raised in attention
    }


def with_attention(space: PruningSpace, scores_U: Tensor, raised: float) -> Tensor:
    """Scores with ``raised`` added to every unit of attention, so that more of it stays and fewer channels, [U]."""
    scores_U = scores_U.clone()
    for axis in space.axes:
        if axis.kind in ATTENTION:
            scores_U[axis.offset : axis.offset + axis.size] += raised
    return scores_U


@torch.no_grad()
def repaired_losses(
    masked: MaskedModel,
    candidates: Mapping[str, Tensor],
    select: Callable[[Tensor], Tensor],
    loss: Callable[[MaskedModel, Mapping[str, Tensor]], Tensor],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    ridge: float = 1e-3,
) -> dict[str, float]:
    """Loss of each candidate's cut after its output projections were fitted to it; the model is left as it was.

    Args:
        masked: The model, not yet compact.
        candidates: Scores [U] by name.
        select: From scores to masks, 0 or 1, [U].
        loss: Mean loss of a batch, under the model's masks.
        batches: Calibration batches on the model's device.
        ridge: Of the fit.

    Returns:
        Nats per token by name of the candidate.

    Raises:
        ValueError: No batch.
    """
    if not batches:
        raise ValueError("prune.warm_start: no calibration batch to choose by; raise prune.warm_start.batches")
    training, found, seen = masked.training, dict[str, float](), dict[bytes, float]()
    masked.eval()
    for name, scores_U in candidates.items():
        masks_U = select(scores_U)
        key = masks_U.cpu().bool().numpy().tobytes()
        if key not in seen:
            seen[key] = _repaired_loss(masked, masks_U.to(scores_U.device), loss, batches, ridge)
        found[name] = seen[key]
        log.info("starting scores %s: %.4f nats after repair", name, found[name])
    masked.train(training)
    return found


def _repaired_loss(
    masked: MaskedModel,
    masks_U: Tensor,
    loss: Callable[[MaskedModel, Mapping[str, Tensor]], Tensor],
    batches: Sequence[Mapping[str, Tensor]],
    ridge: float,
) -> float:
    outputs: Iterable[str] = (site.module for site in masked.space.sites if site.on == "input")
    kept = {module: masked.base_weight(module).detach().cpu().clone() for module in outputs}
    restore(masked, masks_U, lambda: batches, ridge=ridge)
    masked.set_masks(masks_U)
    total = sum(float(loss(masked, batch)) for batch in batches) / len(batches)
    masked.set_masks(None)
    for module, weight in kept.items():
        masked.base_weight(module).copy_(weight)
    return total
