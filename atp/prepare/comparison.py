"""What cuts lose once they are repaired: which of several candidates is the best, without judging all of them fully.

Sits under the choice of a start. Each candidate's masks are applied to the output projections' moments, which gives the
repaired weights of its cut, and the smaller model that results is run over calibration batches. Candidates are halved
round by round (successive halving: Jamieson and Talwalkar 2016, arXiv 1502.07943): all are compared on a few batches,
the better half on twice as many, and so on, so that only the best ones are run over all batches. It knows masked
models, masks and batches; nothing of scores' origin.

Shape suffixes: U units, K kept inputs, O outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from atp.cut.removal import remove
from atp.errors import UserError
from atp.masks.lora import MaskedModel, language_model
from atp.masks.merging import merged_tensors
from atp.prepare.least_squares import OutputFits, cut_inputs, repair_outputs

log = logging.getLogger(__name__)

Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]

_LARGEST_CUT_BYTES = 2**31
"""Bytes of a smaller model up to which one is made beside the dense one; beyond, the masked model is run instead."""

_LARGEST_FITS_BYTES = 2**30
"""Bytes of fitted weights that wait for the next round; beyond, they are fitted again."""


@dataclass
class Compared:
    """What a comparison found.

    Attributes:
        best: Name of the candidate that loses least.
        losses: Nats per token by name, each on the batches that the candidate was compared on.
        batches: How many batches these were, by name.
    """

    best: str = ""
    losses: dict[str, float] = field(default_factory=dict)
    batches: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def repaired_losses(
    masked: MaskedModel,
    candidates: Mapping[str, Tensor],
    select: Callable[[Tensor], Tensor],
    loss: Loss,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    ridge: float = 1e-3,
    fits: OutputFits | None = None,
    halving: bool = True,
) -> Compared:
    """Compare candidates by the loss of their cuts with refitted output projections; the model is left as it was.

    Args:
        masked: The model, not yet compact.
        candidates: Scores [U] by name.
        select: From scores to masks, 0 or 1, [U].
        loss: Mean loss of a batch: of the smaller model or, where that is too large to keep beside the dense one, of
            the masked model under the candidate's masks.
        batches: Calibration batches on the model's device.
        ridge: Of the fit, where ``fits`` are not given.
        fits: Fit output projections to any cut; None: moments are taken for every candidate anew, over these batches.
        halving: Drop the worse half of the candidates round by round, given ``fits``; otherwise all are run over all
            batches, as without ``fits`` every round would cost another repair.

    Raises:
        ValueError: No batch.
    """
    if not batches:
        raise UserError("prune.warm_start: no calibration batch to choose by; raise prune.warm_start.batches")
    training = masked.training
    masked.eval()
    cuts: dict[bytes, _Cut] = {}
    names: dict[str, bytes] = {}
    for name, scores_U in candidates.items():
        masks_U = select(scores_U)
        names[name] = key = masks_U.cpu().bool().numpy().tobytes()  # candidates that cut the same are judged once
        if key not in cuts:
            cuts[key] = _Cut(masked, masks_U.to(scores_U.device), ridge, fits, batches)
    numbers = rounds(len(cuts), len(batches)) if halving and fits is not None else [len(batches)]
    best = _best(cuts, loss, batches, numbers)
    masked.train(training)
    found = Compared()
    for name, key in names.items():
        found.losses[name], found.batches[name] = cuts[key].loss, len(cuts[key].seen)
        log.info(
            "starting scores %s: %.4f nats after repair, %d batches", name, found.losses[name], found.batches[name]
        )
    found.best = next(name for name, key in names.items() if key == best)
    return found


def _best(
    cuts: Mapping[bytes, _Cut], loss: Loss, batches: Sequence[Mapping[str, Tensor]], numbers: Sequence[int]
) -> bytes:
    """Key of the cut that loses least, half of those left being dropped after each number of batches."""
    left, room = list(cuts), _LARGEST_FITS_BYTES
    for number in numbers:
        for key in left:
            room -= cuts[key].run(loss, batches[:number], room)
        left = sorted(left, key=lambda key: cuts[key].loss)[: max(-(-len(left) // 2), 1)]
        for key in cuts.keys() - {*left}:
            room += cuts[key].forget()
    return left[0]


def rounds(candidates: int, batches: int) -> list[int]:
    """Batches that have been seen by the end of each round, at the last of which two candidates are left at most.

    Each round halves the candidates and doubles the batches, and the last one sees all of them.
    """
    number = max((candidates - 1).bit_length(), 1)
    return sorted({-(-batches // 2**halvings) for halvings in range(number)})


class _Cut:
    """One candidate's cut: its fitted weights, and what it has lost so far."""

    def __init__(
        self,
        masked: MaskedModel,
        masks_U: Tensor,
        ridge: float,
        fits: OutputFits | None,
        batches: Sequence[Mapping[str, Tensor]],
    ) -> None:
        self.masked, self.masks_U, self.ridge, self.fits = masked, masks_U, ridge, fits
        self.batches = batches
        self.seen: list[float] = []
        self._fitted: dict[str, Tensor] = {}

    @property
    def loss(self) -> float:
        """Mean loss of the batches so far."""
        return sum(self.seen) / len(self.seen)

    def run(self, loss: Loss, batches: Sequence[Mapping[str, Tensor]], room: int) -> int:
        """Take the loss of the batches not yet seen.

        Args:
            loss: Mean loss of a batch.
            batches: The batches to have seen.
            room: Bytes that fitted weights may take between rounds; without room they are fitted again.

        Returns:
            Bytes that are now taken in addition.
        """
        new = batches[len(self.seen) :]
        if not new:
            return 0
        had = bool(self._fitted)
        with self._repaired() as model:
            self.seen += [float(loss(model, batch)) for batch in new]
        taken = _bytes(self._fitted.values())
        if taken > room and not had:
            self._fitted = {}
        return 0 if had or not self._fitted else taken

    def forget(self) -> int:
        """Give the fitted weights up; return their bytes."""
        freed = _bytes(self._fitted.values())
        self._fitted = {}
        return freed

    @contextmanager
    def _repaired(self) -> Iterator[nn.Module]:
        """The repaired cut as a smaller model or, where memory is short, as the masked model for as long as it runs."""
        if self.fits is not None and self._small_bytes() <= _LARGEST_CUT_BYTES:
            yield self._small_model(self.fits)
            return
        masked = self.masked
        outputs = [site.module for site in masked.space.sites if site.on == "input"]
        dense = {module: masked.base_weight(module).detach().cpu().clone() for module in outputs}
        try:
            repair_outputs(masked, self.masks_U, lambda: self.batches, ridge=self.ridge, fits=self.fits)
            masked.set_masks(self.masks_U)
            yield masked
        finally:
            masked.set_masks(None)
            for module, weight in dense.items():
                masked.base_weight(module).copy_(weight)

    def _small_bytes(self) -> int:
        base: Any = language_model(self.masked)
        kept = float(self.masked.space.remaining_parameters(self.masks_U.double().cpu()))
        blocks = self.masked.space.total_parameters
        total = sum(weight.numel() for weight in {id(w): w for w in base.parameters()}.values())
        return int((total - blocks + kept) * base.dtype.itemsize)

    def _small_model(self, fits: OutputFits) -> nn.Module:
        space, base = self.masked.space, language_model(self.masked)
        cut = cut_inputs(space, space.split(self.masks_U.cpu()))
        if not self._fitted:
            self._fitted = {
                module: fits.fit(module, self.masked.effective_weight(module), kept_D) for module, kept_D in cut.items()
            }

        def repaired() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in merged_tensors(self.masked.peft_model):
                module = name.removesuffix(".weight")
                if module in self._fitted:
                    tensor = tensor.clone()
                    tensor[:, cut[module].to(tensor.device)] = self._fitted[module].to(tensor)
                yield name, tensor

        model: Any = base
        return remove(repaired(), model.config, space, self.masks_U.cpu(), device=model.device)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
