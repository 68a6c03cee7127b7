"""Repair of a cut before it is tuned: layer by layer, what is left learns to say what the whole layer said.

Sits between masks that are decided (or started from) and the steps that follow. :func:`repair` is what runs call: the
closed form of :mod:`atp.prepare.least_squares` alone, or, with epochs, that and then gradient steps on all kept
weights of one decoder layer after the other:

    minimise over W'_l   mean over tokens of  |f_l(h'; W'_l) - h_l|^2 / |h_l|^2

with h_l the dense model's hidden states after layer l and h' what the cut layers below make of the same tokens, so that
a layer also learns to mend what those left over (block-wise repair, as BRECQ, arXiv 2102.05426, does for
quantised layers; for pruned ones EBFT, arXiv 2402.12419). The weights are trained whole, which adapters of a low rank
cannot do later, and one layer at a time, so that gradients and moments of one layer are in memory. It knows masked
models and batches; nothing of how masks were chosen or what is trained afterwards.

Shape suffixes: B batch, T tokens, D hidden, U units.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from atp.cut.removal import kept_indices, remove
from atp.errors import UserError
from atp.masks.lora import MaskedModel, language_model
from atp.masks.loss import decode
from atp.masks.merging import merged_tensors
from atp.prepare.least_squares import BatchSource, Moments, OutputFits, cut_inputs, fit_kept, repair_outputs
from atp.space.space import LayerSpace

log = logging.getLogger(__name__)

_WARMUP_STEPS = 10
_FINAL_RATE = 0.05


@dataclass(frozen=True)
class Repair:
    """How a cut is repaired.

    Attributes:
        ridge: Of the least-squares fit of output projections: pull towards the present weights, relative to the inputs'
            mean square.
        epochs: Passes over the calibration batches for every layer after that fit; 0 for the fit alone.
        lr: Adam's peak rate in them, relative to a weight's root mean square.
    """

    ridge: float = 1e-3
    epochs: int = 0
    lr: float = 0.05

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise UserError(f"prune.repair.epochs is {self.epochs}; it cannot be negative (0: least squares alone)")
        if self.lr <= 0:
            raise UserError(f"prune.repair.lr is {self.lr}; it must be positive (0.05 is usual)")

    def modules(self, masked: MaskedModel) -> list[str]:
        """Linears whose base weights :func:`repair` may change."""
        if self.epochs:
            return [weight.module for weight in masked.space.weights]
        return [site.module for site in masked.space.sites if site.on == "input"]


def repair(
    masked: MaskedModel,
    masks_U: Tensor,
    batches: BatchSource,
    settings: Repair | None = None,
    fits: OutputFits | None = None,
) -> list[str]:
    """Change base weights, in place, so that the masked model does what the whole one did.

    Adapters count as part of their projections and stay as they are. Weights of removed units keep their values; masks
    hide them.

    Args:
        masked: The model, not yet compact.
        masks_U: Masks to repair for, 0 or 1, shape [U].
        batches: Gives the calibration batches, on the model's device, each time it is called.
        settings: How; the least-squares fit alone unless given.
        fits: Of output projections, made of these batches, where they are there already and the model has not changed
            since; used by the least-squares fit alone.

    Returns:
        Names of the changed base weights, as in the masked model's state dict.

    Raises:
        ValueError: No batch, a negative ridge, or activations that are not finite.
    """
    settings = settings or Repair()
    if not settings.epochs:
        return repair_outputs(masked, masks_U, batches, ridge=settings.ridge, fits=fits)
    training = masked.training
    masked.eval()
    try:
        return _Blockwise(masked, masks_U.detach(), list(batches()), settings).run()
    finally:
        masked.train(training)


class _Blockwise:
    """One run over the layers of a masked model and of the smaller model that its masks describe."""

    def __init__(
        self, masked: MaskedModel, masks_U: Tensor, batches: Sequence[Mapping[str, Tensor]], settings: Repair
    ) -> None:
        if not batches:
            raise UserError("prune.repair: no calibration batch; raise prune.repair.batches or add training data")
        self.masked, self.settings, self.batches = masked, settings, batches
        self.space, self.masks = masked.space, masked.space.split(masks_U.cpu())
        dense: Any = language_model(masked)
        self.device, self.dtype = dense.device, dense.dtype
        tensors = merged_tensors(masked.peft_model)
        self.small = remove(tensors, dense.config, self.space, masks_U.cpu(), device=self.device).eval()
        self.small.requires_grad_(False)
        self.cut = cut_inputs(self.space, self.masks)
        hidden = self.space.hidden
        self.kept_hidden = self.masks[hidden.name].nonzero().flatten() if hidden else None
        self.names: list[str] = []

    def run(self) -> list[str]:
        """Repair every layer; names of the changed base weights."""
        prefixes = [layer.prefix for layer in self.space.layers]
        with self.masked.unmasked():
            whole = _Inputs(self.masked, [self.masked.linear(name) for name in prefixes], self.batches)
        left = _Inputs(self.small, [self.small.get_submodule(name) for name in prefixes], self.batches)
        for index, layer in enumerate(self.space.layers):
            with self.masked.unmasked(), torch.no_grad():
                self._dense_layer(index, layer, whole, left)
            first, last = self._train(index, layer, whole, left)
            self._write_back(layer)
            if index + 1 < len(prefixes):
                with torch.no_grad():
                    left.advance(index, self.small.get_submodule(layer.prefix))
            log.info("repair: layer %d of %d, error %.3f -> %.3f", index + 1, len(prefixes), first, last)
        return self.names

    def _dense_layer(self, index: int, layer: LayerSpace, whole: _Inputs, left: _Inputs) -> None:
        """Advance the dense hidden states through a layer, and fit its output projections to the inputs kept."""
        modules = [name for name in self.cut if name.startswith(f"{layer.prefix}.")]
        with Moments(self.masked, modules) as moments:
            whole.advance(index, self.masked.linear(layer.prefix), moments.watch)
        for name, gram_DD in moments.checked().items():
            fitted = fit_kept(
                self.masked.effective_weight(name), gram_DD, self.cut[name].to(gram_DD.device), self.settings.ridge
            )
            weight: Any = self.small.get_submodule(name).weight
            if self.kept_hidden is not None:
                fitted = fitted[self.kept_hidden.to(fitted.device)]
            weight.copy_(fitted)

    def _weights(self, layer: LayerSpace) -> dict[str, nn.Parameter]:
        """Weights of the smaller layer that are left, by module name."""
        own: dict[str, Any] = dict(self.small.named_modules())
        modules = [weight.module for weight in self.space.weights if weight.module.startswith(f"{layer.prefix}.")]
        return {name: own[name].weight for name in modules if name in own}

    def _train(self, index: int, layer: LayerSpace, whole: _Inputs, left: _Inputs) -> tuple[float, float]:
        """Fit a layer's weights, in float32, to the dense hidden states; mean error of the first and last epoch."""
        block = self.small.get_submodule(layer.prefix).float()
        weights = list(self._weights(layer).values())
        if not weights:
            return math.nan, math.nan
        for weight in weights:
            weight.requires_grad_(True)
        rates = [self.settings.lr * float(weight.detach().square().mean().sqrt()) for weight in weights]
        optimizer = torch.optim.Adam(
            [{"params": [w], "lr": rate} for w, rate in zip(weights, rates, strict=True)], betas=(0.9, 0.99)
        )
        total = self.settings.epochs * len(self.batches)
        errors: list[float] = []
        order = torch.Generator().manual_seed(index)
        for _ in range(self.settings.epochs):
            seen: list[Tensor] = []
            for batch in torch.randperm(len(self.batches), generator=order).tolist():
                factor = _rate_factor(len(errors) * len(self.batches) + len(seen), total)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
                error = self._error(index, batch, block, whole, left)
                optimizer.zero_grad()
                error.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                seen.append(error.detach())
            errors.append(float(torch.stack(seen).mean()))
        for weight in weights:
            weight.requires_grad_(False)
        if not math.isfinite(errors[-1]):
            raise UserError(
                f"prune.repair: the error of {layer.prefix} is {errors[-1]}; lower prune.repair.lr "
                f"(now {self.settings.lr}) or set prune.repair.epochs=0"
            )
        block.to(self.dtype)
        return errors[0], errors[-1]

    def _error(self, index: int, batch: int, block: nn.Module, whole: _Inputs, left: _Inputs) -> Tensor:
        """Squared distance from the dense hidden states relative to their square, mean over real tokens."""
        real_BT = self.batches[batch]["attention_mask"].bool()
        wanted_BTD = whole.hidden[batch].to(self.device).float()
        if self.kept_hidden is not None:
            wanted_BTD = wanted_BTD[..., self.kept_hidden.to(self.device)]
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            made_BTD = left.call(index, batch, block, torch.float32)
        distance = (made_BTD.float() - wanted_BTD)[real_BT].square().sum(-1)
        return (distance / wanted_BTD[real_BT].square().sum(-1).clamp(min=1e-12)).mean()

    @torch.no_grad()
    def _write_back(self, layer: LayerSpace) -> None:
        """Put what the smaller layer learnt into the masked model's base weights."""
        sides = {weight.module: (weight.rows, weight.columns) for weight in self.space.weights}
        scales, _ = self.space.norm_scales(self.masks)  # which removal has given, and will give, the smaller weights
        for name, trained in self._weights(layer).items():
            base, whole = self.masked.base_weight(name), self.masked.effective_weight(name)
            rows, columns = (kept_indices(side, self.masks) for side in sides[name])
            rows = torch.arange(base.shape[0]) if rows is None else rows
            columns = torch.arange(base.shape[1]) if columns is None else columns
            at = (rows.to(base.device)[:, None], columns.to(base.device)[None, :])
            change = trained.to(whole) / scales.get(f"{name}.weight", 1.0) - whole[at]
            base[at] = (base[at].float() + change).to(base.dtype)
            self.names.append(self.masked.base_weight_name(name))


class _Inputs:
    """What enters each layer of a model, batch by batch; hidden states wait in main memory.

    Only the first batch runs through the layers to find out how they are called. For the others they pass their input
    on: what they compute is computed by :meth:`advance`.

    Attributes:
        hidden: Input of the layer that comes next, [B, T, D] for each batch.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.batches = batches
        self.hidden: list[Tensor] = []
        self._options: list[list[dict[str, Any]]] = []
        self._as_tuple = False
        with ExitStack() as hooks, torch.no_grad():
            for layer in layers:
                hooks.callback(layer.register_forward_pre_hook(self._note, with_kwargs=True).remove)
            hooks.callback(layers[0].register_forward_hook(self._note_kind).remove)
            for number, batch in enumerate(batches):
                if number == 1:
                    for layer in layers:
                        hooks.enter_context(_passing_on(layer, as_tuple=self._as_tuple))
                self._options.append([])
                self._first = True
                decode(model, batch)

    def _note(self, _: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        if self._first:
            self.hidden.append((inputs[0] if inputs else options["hidden_states"]).cpu())
            self._first = False
        self._options[-1].append({name: value for name, value in options.items() if name != "hidden_states"})

    def _note_kind(self, _: nn.Module, inputs: object, output: object) -> None:
        self._as_tuple = isinstance(output, tuple)

    def call(self, index: int, batch: int, layer: nn.Module, dtype: torch.dtype) -> Tensor:
        """Output of layer ``index`` for a batch, all floating inputs in ``dtype``."""
        device = self.batches[batch]["input_ids"].device
        options = {name: _cast(value, dtype) for name, value in self._options[batch][index].items()}
        output = layer(self.hidden[batch].to(device, dtype), **options)
        made: Tensor = output[0] if isinstance(output, tuple) else output
        return made

    def advance(self, index: int, layer: nn.Module, watch: Callable[[Tensor], None] | None = None) -> None:
        """Put the hidden states of all batches through layer ``index``.

        Args:
            index: Position of the layer.
            layer: The layer.
            watch: Told the real tokens [B, T] of each batch before it passes.
        """
        for number, batch in enumerate(self.batches):
            if watch:
                watch(batch["attention_mask"].bool())
            self.hidden[number] = self.call(index, number, layer, self.hidden[number].dtype).cpu()


@contextmanager
def _passing_on(layer: Any, *, as_tuple: bool) -> Iterator[None]:
    """Let a decoder layer return what it is given, inside the block."""

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor]:
        return (hidden_states,) if as_tuple else hidden_states

    own = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return tuple(_cast(part, dtype) for part in value) if isinstance(value, tuple) else value


def _rate_factor(step: int, total: int) -> float:
    """Short warm-up, then a cosine to a twentieth."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / total))
    return min(1.0, (step + 1) / _WARMUP_STEPS) * (_FINAL_RATE + (1.0 - _FINAL_RATE) * cosine)
