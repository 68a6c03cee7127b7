"""ATP's own training scheme: LoRA-aware forward pass, group lasso, and masks that may learn on batches of their own.

Sits beside :mod:`atp.train.joint`, whose joint step it replaces where a preset asks for what the authors do (sections
1.3-1.6 of the methods note). Adapters train unmasked beside a masked frozen branch; the group lasso drives what they
add for pruned units to zero; validation and removal mask both branches, so removal is exact whatever the lasso left.

Shape suffixes: U units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from atp.errors import UserError
from atp.masks.budget import Phase
from atp.masks.lora import trainable_parameters
from atp.masks.loss import causal_loss
from atp.masks.sampler import GumbelSigmoid
from atp.train.joint import PruningModule
from atp.train.lasso import group_lasso
from atp.train.tuning import Batch

UPDATES = ("joint", "alternate")
_ADAPTERS = ("lora", "gates")
GENERATOR_CLIP = 3.0
"""Largest norm of the generator's gradient where gradients are clipped at all; the authors' value (section 1.6)."""


class AwareModule(PruningModule):
    """Joint or alternating training with ATP's forward pass and group lasso.

    Args:
        *parts: Parts of :class:`atp.train.joint.PruningModule`.
        update: ``joint`` sends one loss through masks and adapters; ``alternate`` gives the generator a pass of its own
            through the fully masked model on a calibration batch, with the relaxed gates, and the adapters another with
            the drawn masks. Both gradients then make one optimiser step, where the authors make two.
            Either way gradients of adapters, generator and lasso are clipped apart.
        lora_aware: Mask only the frozen branch while adapters train.
        lasso: Factor on the group lasso's gradient (beta; 0.3 or 0.03 in the authors' runs).
        final_lasso: The factor in the last part of the run (100 in the authors' code).
        final_from: Where the last part begins, as a fraction of the run.
        **options: Options of :class:`atp.train.joint.PruningModule`.

    Attributes:
        calibration_batch: Gives the batch of a step to ``alternate``; set before training.

    Raises:
        ValueError: An unknown scheme, or a factor or fraction out of range.
    """

    def __init__(
        self,
        *parts: Any,
        update: str = "joint",
        lora_aware: bool = True,
        lasso: float = 0.0,
        final_lasso: float = 0.0,
        final_from: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(*parts, **options)
        if update not in UPDATES:
            raise UserError(f"prune.update is {update!r}; known: {', '.join(UPDATES)}")
        if min(lasso, final_lasso) < 0 or not 0.0 <= final_from <= 1.0:
            raise UserError(
                f"prune.lasso is weight {lasso}, final_weight {final_lasso} from {final_from}; weights must not be "
                "negative and final_from lies between 0 and 1"
            )
        self.update, self.lora_aware = update, lora_aware
        if lora_aware or lasso or final_lasso:
            cause = "prune.lora_aware is true" if lora_aware else "prune.lasso is on"
            self.compaction, self.uncut = False, f"{cause}, so that adapters of pruned units go on training"
        self.lasso, self.final_lasso, self.final_from = lasso, final_lasso, final_from
        self.calibration_batch: Callable[[int], Batch] | None = None
        self._lasso_gradients: dict[nn.Parameter, Tensor] = {}  # summed over the step's micro-batches so far

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Task loss of the LoRA-aware model, group lasso, and what the generator learns by."""
        alternates = self.update == "alternate" and self.phase is Phase.PRUNING
        learnt = self._generator_pass(batch_idx) if alternates else None
        self.masked.aware = self.lora_aware
        if learnt is None:
            mask_loss = self._apply_masks()
            self.log_losses({"train/budget_loss": mask_loss})
        else:
            mask_loss, masks_U = learnt
            self.masked.set_masks(masks_U)
        task_loss = self.task_loss(batch)
        lasso = self._lasso()
        self._gather(lasso, batch_idx)
        loss = task_loss + mask_loss + lasso.detach()
        self.masked.aware = False
        self._check_finite(loss)
        self.log_losses({"train/loss": loss, "train/task_loss": task_loss, "train/group_lasso": lasso})
        return loss

    def lasso_factor(self, step: int) -> float:
        """Factor on the lasso's gradient at an optimiser step; the logged value carries none, as the authors log it."""
        return self.final_lasso if step >= self.final_from * self.total_steps and self.final_lasso else self.lasso

    def _lasso(self) -> Tensor:
        """Group lasso over what this step's masks prune."""
        masks_U = self.final_masks_U if self.frozen else self.sampled_U
        if masks_U is None or not (self.lasso or self.final_lasso):
            return self.final_masks_U.new_zeros(())
        return group_lasso(self.masked, (masks_U > 0.5).float())

    def _gather(self, lasso: Tensor, batch_idx: int) -> None:
        """Keep the lasso's gradient apart from the step's others until those are clipped."""
        every = 1 if self._trainer is None else self._trainer.accumulate_grad_batches
        if batch_idx % every == 0:
            self._lasso_gradients = {}
        factor = self.lasso_factor(self.global_step) / every
        if not lasso.requires_grad or not factor:
            return
        parameters = list(trainable_parameters(self.masked).values())
        gradients = torch.autograd.grad(lasso, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                before = self._lasso_gradients.get(parameter)
                self._lasso_gradients[parameter] = gradient * factor + (0.0 if before is None else before)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip adapters and generator each by itself; then add the lasso's gradient, itself clipped before its factor.

        One clip over all three would shrink the adapters' gradient by as much as the lasso's norm is above the limit:
        with a factor of 100 they stand still, since AdamW's second moments remember the larger gradients from before.
        """
        for group in optimizer.param_groups:
            limit = gradient_clip_val if group["name"] in _ADAPTERS else gradient_clip_val and GENERATOR_CLIP
            _clip([p.grad for p in group["params"] if p.grad is not None], limit, gradient_clip_algorithm)
        gathered, self._lasso_gradients = self._lasso_gradients, {}
        if gathered and self.is_logged_step:
            self.log_figures({"grad_norm/lasso": nn.utils.get_total_norm(list(gathered.values()))})
        limit = gradient_clip_val and gradient_clip_val * self.lasso_factor(self.global_step)
        _clip(gathered.values(), limit, gradient_clip_algorithm)
        for parameter, gradient in gathered.items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _generator_pass(self, batch_idx: int) -> tuple[Tensor, Tensor]:
        """The generator's pass through the fully masked model.

        Returns:
            A term of value zero whose gradient is the generator's, and the masks [U] that this step's adapters see.
        """
        if self.calibration_batch is None:
            raise UserError("prune.update is alternate, which needs calibration batches; none were given")
        batch = {key: value.to(self.device) for key, value in self.calibration_batch(batch_idx).items()}
        target = self.schedule.target_at(self.global_step)
        logits_U = self._shifted(self.generator().float(), target)
        if isinstance(self.sampler, GumbelSigmoid):
            soft_U = self.sampler.soft(logits_U)
            masks_U = (soft_U >= 0.5).float() + (soft_U - soft_U.detach())
        else:
            soft_U = masks_U = self.sampler(logits_U)
        self.sampled_U = masks_U.detach()
        training = self.masked.training
        self.masked.aware = False
        self.masked.eval().set_masks(soft_U)
        expected = self.space.reduction(self.sampler.keep_probability(logits_U))
        budget_loss = self.budget(expected, self.space.reduction(masks_U), target)
        calibration_loss = causal_loss(self.masked, batch)
        self.masked.train(training)
        self._log_masks(expected, target)
        self.log_losses({"train/calibration_loss": calibration_loss, "train/budget_loss": budget_loss})
        return self._carrier(calibration_loss + budget_loss), masks_U.detach()

    def _carrier(self, loss: Tensor) -> Tensor:
        """A term of value zero that hands a loss' gradient to generator and multipliers, and to nothing else."""
        parameters = [*trainable_parameters(self.generator).values(), *self.budget.multipliers()]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        total = loss.new_zeros(())
        for parameter, gradient in pairs:
            term = (parameter * gradient).sum()
            total = total + term - term.detach()
        return total


def _clip(gradients: Iterable[Tensor], limit: float | None, algorithm: str | None) -> None:
    """Clip gradients in place, by their common norm or, with ``value``, entry by entry; no limit leaves them."""
    found = list(gradients)
    if not limit or not found:
        return
    if algorithm == "value":
        for gradient in found:
            gradient.clamp_(-limit, limit)
        return
    norm = nn.utils.get_total_norm(found)
    scale = (limit / norm.clamp(min=1e-12)).clamp(max=1.0)
    for gradient in found:
        gradient.mul_(scale)
