"""The export of a run held against what was trained: masked, removed and reloaded model on the same batches.

Beside the stages, which say when. Limits and verdict are those of :mod:`atp.cut.agreement`; this runs the models.
It knows nothing of training or of files.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.cut.agreement import allowed, verdict
from atp.cut.removal import logit_difference

log = logging.getLogger(__name__)


class NotVerified(Exception):
    """A run whose export does not compute what was trained; all is written, and the message says where it parts."""


def compare_stages(
    masked: nn.Module,
    removed: PreTrainedModel,
    reloaded: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    stored: torch.dtype,
    rounded: bool,
) -> dict[str, Any]:
    """Largest logit differences of masked, removed and reloaded model, and what is wrong with them.

    Args:
        masked: The trained model under its final masks.
        removed: The smaller model; rounded in place to ``stored`` for the comparison with the file where ``rounded``.
        reloaded: The export read again.
        batches: Right-padded batches.
        stored: Type of the file.
        rounded: Whether the file holds the removed model's own tensors rounded, which holds unless an adapter was
            stored apart.

    Returns:
        Plain data; ``fault`` is empty where all is as it should be.
    """
    computed, named = _name(removed.dtype), _name(stored)
    masked_removed = logit_difference(masked, removed, batches)
    masked_reloaded = logit_difference(masked, reloaded, batches)
    if rounded and named != computed:
        with torch.no_grad():
            for parameter in removed.parameters():
                parameter.copy_(parameter.to(stored))
    removed_reloaded = logit_difference(removed, reloaded, batches)
    every = (masked_removed, removed_reloaded, masked_reloaded)
    fault = verdict(*every, computed=computed, stored=named, rounded=rounded)
    if fault:
        log.error("not verified: %s", fault)
    figures = [min(difference.largest, sys.float_info.max) for difference in every]  # JSON has no infinity
    return {
        "max_abs_logit_diff": max(figures),
        "masked_vs_removed": figures[0],
        "removed_vs_reloaded": figures[1],
        "masked_vs_reloaded": figures[2],
        "logit_spread": masked_removed.spread,
        "fault": fault,
        "dtype": computed,
        "stored_dtype": named,
    }


def compare_exports(
    first: PreTrainedModel, second: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], *, stored: torch.dtype
) -> tuple[float, str]:
    """Largest logit difference of two exports of one model, and what is wrong if it is too large."""
    found, dtype = logit_difference(first, second, batches), _name(stored)
    most = allowed(dtype, found.spread)
    return found.largest, "" if found.largest <= most else f"more than the {most:.2g} that {dtype} explains"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
