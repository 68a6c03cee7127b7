"""Which scores masks start from: the candidate whose cut, once repaired, loses least.

Sits between importance and the generator's warm start. Every candidate's scores select an architecture; its output
projections are fitted by least squares, the loss on the calibration batches is taken, and the weights are put back.
The loss of the bare cut does not tell which architecture tunes best; that of the repaired cut nearly does on text that
the base knows, and does not on a domain that is new to it (docs/methods.md). It knows masked models and
scores, and nothing of how importance is measured.

Shape suffixes: U units.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atp.errors import UserError
from atp.masks.lora import MaskedModel
from atp.masks.loss import causal_loss
from atp.prepare.criteria import CRITERIA, RANKINGS, importances, rank
from atp.prepare.least_squares import repair_outputs, shared_moments
from atp.space.space import PruningSpace

log = logging.getLogger(__name__)

COMPARED = 16
"""Calibration batches on which candidates are compared."""

ATTENTION = ("heads", "query_heads", "qk_pairs", "value_dims")
"""Kinds that make up attention blocks."""


@dataclass(frozen=True)
class Start:
    """Scores to begin with.

    Attributes:
        name: Criterion, and what was added to attention.
        scores_U: The scores [U].
        losses: Nats per token of every candidate's repaired cut, by name; empty for a single one.
    """

    name: str
    scores_U: Tensor
    losses: dict[str, float]


def starting_scores(
    masked: MaskedModel,
    batches: Sequence[Mapping[str, Tensor]],
    select: Callable[[Tensor], Tensor],
    *,
    criteria: Sequence[str],
    ranking: str = "layer",
    gain: float = 1.0,
    attention: Sequence[float] = (0.0,),
    ridge: float = 1e-3,
    seed: int = 0,
) -> Start:
    """Return importance as starting logits; of several candidates, the one whose repaired cut has the lowest loss.

    Args:
        masked: The model, not yet compact, on the device of the batches.
        batches: Calibration batches; importance reads all, the comparison the first :data:`COMPARED`.
        select: From scores to masks, 0 or 1, [U].
        criteria: Names of importances, see :func:`atp.prepare.criteria.importance`; several are alternatives.
        ranking: How scores become comparable, see :func:`atp.prepare.criteria.rank`.
        gain: Factor on ranked scores.
        attention: Alternatives of what is added to attention units.
        ridge: Of the repair.
        seed: Of random importance.

    Raises:
        ValueError: An unknown criterion or ranking, no batch, or no alternative.
    """
    if not criteria:
        raise UserError(f"prune.warm_start.criterion is empty; name at least one: {', '.join(CRITERIA)}")
    unknown = [one for name in criteria for one in name.split("+") if one not in CRITERIA]
    if unknown:
        raise UserError(f"prune.warm_start.criterion is {unknown[0]!r}; known: {', '.join(CRITERIA)}")
    if ranking not in RANKINGS:
        raise UserError(f"prune.warm_start.ranking is {ranking!r}; known: {', '.join(RANKINGS)}")
    candidates(masked.space, {}, attention)  # refuses what it would refuse after minutes of measuring
    measured = importances(criteria, masked, batches, seed)
    ranked = {name: gain * rank(ranking, masked.space, measured[name].cpu()) for name in criteria}
    found = candidates(masked.space, ranked, attention)
    if len(found) == 1:
        ((name, scores_U),) = found.items()
        return Start(name, scores_U, {})
    losses = repaired_losses(masked, found, select, causal_loss, batches[:COMPARED], ridge=ridge)
    best = min(losses, key=losses.__getitem__)
    log.info("masks start from %s", best)
    return Start(best, found[best], losses)


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
        raise UserError("prune.warm_start.attention is empty; [0.0] adds nothing")
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
        raise UserError("prune.warm_start: no calibration batch to choose by; raise prune.warm_start.batches")
    training, found, seen = masked.training, dict[str, float](), dict[bytes, float]()
    masked.eval()
    moments = shared_moments(masked, batches)
    outputs = [site.module for site in masked.space.sites if site.on == "input"]
    dense = {module: masked.base_weight(module).detach().cpu().clone() for module in outputs}
    for name, scores_U in candidates.items():
        masks_U = select(scores_U)
        key = masks_U.cpu().bool().numpy().tobytes()
        if key not in seen:
            repair_outputs(masked, masks_U.to(scores_U.device), lambda: batches, ridge=ridge, moments=moments)
            seen[key] = _masked_loss(masked, masks_U.to(scores_U.device), loss, batches)
            for module, weight in dense.items():
                masked.base_weight(module).copy_(weight)
        found[name] = seen[key]
        log.info("starting scores %s: %.4f nats after repair", name, found[name])
    masked.train(training)
    return found


def _masked_loss(
    masked: MaskedModel,
    masks_U: Tensor,
    loss: Callable[[MaskedModel, Mapping[str, Tensor]], Tensor],
    batches: Sequence[Mapping[str, Tensor]],
) -> float:
    masked.set_masks(masks_U)
    total = sum(float(loss(masked, batch)) for batch in batches) / len(batches)
    masked.set_masks(None)
    return total
