"""Which scores masks start from: the candidate whose cut, once repaired, loses least.

Sits between importance and the generator's warm start. Every candidate's scores select an architecture, and
:mod:`atp.prepare.comparison` tells what its repaired cut loses. The moments that the repair needs are read off the
passes that importance takes anyway, and are handed on for the repair of the cut that is chosen.
The loss of the bare cut does not tell which architecture tunes best; that of the repaired cut nearly does on text that
the base knows, and does not on a domain that is new to it (docs/methods.md). It knows masked models and
scores, and nothing of how importance is measured.

Shape suffixes: U units.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from atp.errors import UserError
from atp.masks.lora import MaskedModel
from atp.masks.loss import causal_loss
from atp.prepare.comparison import repaired_losses
from atp.prepare.criteria import CRITERIA, RANKINGS, importances, rank
from atp.prepare.least_squares import OutputFits, output_moments
from atp.space.space import PruningSpace

log = logging.getLogger(__name__)

COMPARED = 16
"""Calibration batches on which candidates are compared, at most."""

ATTENTION = ("heads", "query_heads", "qk_pairs", "value_dims")
"""Kinds that make up attention blocks."""


@dataclass(frozen=True)
class Start:
    """Scores to begin with.

    Attributes:
        name: Criterion, and what was added to attention.
        scores_U: The scores [U].
        losses: Nats per token of every candidate's repaired cut, by name, on as many batches as it was compared on;
            empty for a single one.
        batches: How many batches these are, by name.
        fits: Of output projections, to repair the chosen cut by; None where no moments were taken or they are too large
            to keep.
        fits_of: Batches that they are made of, the first so many.
    """

    name: str
    scores_U: Tensor
    losses: dict[str, float] = field(default_factory=dict)
    batches: dict[str, int] = field(default_factory=dict)
    fits: OutputFits | None = None
    fits_of: int = 0


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
    moments: int = 0,
    part: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> Start:
    """Return importance as starting logits; of several candidates, the one whose repaired cut has the lowest loss.

    Args:
        masked: The model, not yet compact, adapters at zero, on the device of the batches.
        batches: Calibration batches; importance reads all, the comparison at most the first :data:`COMPARED`.
        select: From scores to masks, 0 or 1, [U].
        criteria: Names of importances, see :func:`atp.prepare.criteria.importance`; several are alternatives.
        ranking: How scores become comparable, see :func:`atp.prepare.criteria.rank`.
        gain: Factor on ranked scores.
        attention: Alternatives of what is added to attention units.
        ridge: Of the repair.
        seed: Of random importance.
        moments: Batches whose moments are taken for a repair to come; where there is something to compare, these are at
            least :data:`COMPARED`.
        part: Entered with "importance" and "choice" while they are at work.

    Raises:
        ValueError: An unknown criterion or ranking, no batch, or no alternative.
    """
    _check(criteria, ranking)
    candidates(masked.space, {}, attention)  # refuses what it would refuse after minutes of measuring
    with part("importance"):
        several = len(criteria) * len(attention) > 1
        limit = min(max(moments, COMPARED if several else 0), len(batches))
        grams = output_moments(masked, limit) if limit else None
        measured = importances(criteria, masked, batches, seed, [grams] if grams else [])
        ranked = {name: gain * rank(ranking, masked.space, measured[name].cpu()) for name in criteria}
        fits = OutputFits(grams.checked(), ridge, several=several) if grams else None
    found = candidates(masked.space, ranked, attention)
    if len(found) == 1:
        ((name, scores_U),) = found.items()
        return Start(name, scores_U, fits=fits, fits_of=limit)
    with part("choice"):
        compared = repaired_losses(masked, found, select, causal_loss, batches[:COMPARED], ridge=ridge, fits=fits)
    log.info("masks start from %s", compared.best)
    return Start(compared.best, found[compared.best], compared.losses, compared.batches, fits, limit)


def _check(criteria: Sequence[str], ranking: str) -> None:
    """Refuse what has no meaning before anything is measured."""
    if not criteria:
        raise UserError(f"prune.warm_start.criterion is empty; name at least one: {', '.join(CRITERIA)}")
    unknown = [one for name in criteria for one in name.split("+") if one not in CRITERIA]
    if unknown:
        raise UserError(f"prune.warm_start.criterion is {unknown[0]!r}; known: {', '.join(CRITERIA)}")
    if ranking not in RANKINGS:
        raise UserError(f"prune.warm_start.ranking is {ranking!r}; known: {', '.join(RANKINGS)}")


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
