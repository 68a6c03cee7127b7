"""The joint training system: LoRA tuning with masks that are learnt at the same time.

Sits between the data module and removal. One forward and one backward pass per step update adapters, generator and
multipliers together, in parameter groups with rates of their own. Checkpoints hold what trains and the frozen masks,
never the base weights. What it shares with plain tuning is in :mod:`atp.train.tuning`. It knows nothing of Hydra, of
files, or of how results are measured.

Shape suffixes: U units.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from atp.cut.compaction import cut_live, unwrapped
from atp.cut.progressive import ProgressiveCut
from atp.cut.selection import select
from atp.errors import UserError
from atp.masks.budget import Budget, Phase, SparsitySchedule
from atp.masks.gates import Gates
from atp.masks.generator import Generator, GradientScores
from atp.masks.level import level_shift
from atp.masks.lora import MaskedModel
from atp.masks.sampler import Sampler
from atp.prepare import blockwise
from atp.prepare.blockwise import Repair
from atp.prepare.criteria import lora_gradient
from atp.prepare.least_squares import OutputFits
from atp.train import decisions
from atp.train.cuttable import why_not_early, why_uncut
from atp.train.tuning import Batch, TuningModule

REPAIR_AT = ("freeze", "start")
"""When the cut is repaired."""

log = logging.getLogger(__name__)


class PruningModule(TuningModule):
    """Joint training of masks and adapters.

    Args:
        model: The masked LoRA model.
        generator: Makes logits.
        sampler: Makes masks of them.
        budget: The term that drives sparsity to its target.
        schedule: Phases and target by step.
        generator_lr: Peak learning rate of the generator; it falls along a cosine until the freeze.
        multiplier_lr: Rate at which Lagrange multipliers ascend.
        shape: ``per_layer`` or ``uniform``, see :func:`atp.cut.selection.select`.
        min_units: Units every layer keeps, by kind.
        compaction: Cut the live model to the final masks at the freeze; the remaining steps then cost what the small
            model costs. A teacher that is still needed then comes from ``dense``; without it nothing is cut.
        dense: Loads the dense base anew, to learn from once the live model is cut.
        repair: How the cut is repaired, which happens when ``calibration`` is set to something that gives batches.
        repair_at: ``freeze``, or ``start``: :meth:`repair_start` is called before the first step.
        round_to: Kept widths are multiples of this, see :func:`atp.cut.selection.select`.
        progressive: Cuts units before the freeze that are as good as decided; needs ``compaction`` of heads and
            channels, widths that need not be rounded and no repair, and is ignored with a warning otherwise.
        gates: ``binary``, or what kept units are scaled by after the freeze, see :class:`atp.masks.gates.Gates`.
        **tuning: Arguments of :class:`TuningModule`.

    Attributes:
        part: Entered with "reconstruction" while the cut is repaired, for whoever takes the time.
        uncut: Why the live model cannot be cut at the freeze, whatever ``compaction`` says; empty where it can.
    """

    final_masks_U: Tensor
    final_scores_U: Tensor
    is_frozen: Tensor
    is_compact: Tensor

    def __init__(
        self,
        model: MaskedModel,
        generator: Generator,
        sampler: Sampler,
        budget: Budget,
        schedule: SparsitySchedule,
        *,
        generator_lr: float = 0.05,
        multiplier_lr: float = 1.0,
        shape: str = "per_layer",
        min_units: Mapping[str, int] | None = None,
        compaction: bool = False,
        repair: Repair | None = None,
        repair_at: str = "freeze",
        round_to: int = 1,
        gates: str = "binary",
        progressive: ProgressiveCut | None = None,
        dense: Callable[[], nn.Module] | None = None,
        **tuning: Any,
    ) -> None:
        super().__init__(model, **tuning)
        self.masked = model
        self.space = model.space
        self.generator, self.sampler, self.budget, self.schedule = generator, sampler, budget, schedule
        self.generator_lr, self.multiplier_lr = generator_lr, multiplier_lr
        self.load_dense = dense
        taught = dense is None and not self.distill.is_over(schedule.freeze_step, self.total_steps)
        if compaction and taught:
            log.warning("prune.compact is ignored: distillation needs the dense base as its teacher")
        self.uncut = why_uncut(self.space, gates, taught=taught)
        self.compaction = compaction and not self.uncut
        if repair_at not in REPAIR_AT:
            raise UserError(f"prune.repair.at is {repair_at!r}; known: {', '.join(REPAIR_AT)}")
        self.repair, self.repair_at = repair or Repair(), repair_at
        self.calibration: Callable[[], Iterable[Batch]] | None = None
        self.part: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext()
        self._repaired: list[str] = []
        self.shape, self.min_units, self.round_to = shape, min_units, round_to
        self.gates = None if gates == "binary" else Gates(self.space.num_units, gates)
        self.register_buffer("final_masks_U", torch.ones(self.space.num_units))
        self.register_buffer("final_scores_U", torch.ones(self.space.num_units))
        self.register_buffer("is_frozen", torch.zeros((), dtype=torch.bool))
        self.register_buffer("is_compact", torch.zeros((), dtype=torch.bool))
        self.frozen = False  # what ``is_frozen`` says, without asking a device for it
        self.register_load_state_dict_post_hook(lambda *_: self._read_flag())
        self.sampled_U: Tensor | None = None
        self.progressive = progressive

    def on_fit_start(self) -> None:
        """Compile the decoder; switch early cuts off, with a warning, where they are impossible."""
        super().on_fit_start()
        if self.progressive and (why := why_not_early(self)):
            log.warning("prune.progressive is ignored: %s", why)
            self.progressive = None

    def _read_flag(self) -> None:
        self.frozen = bool(self.is_frozen)

    @property
    def phase(self) -> Phase:
        """Phase of the step that comes next."""
        return self.schedule.phase(self.global_step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the step; fix the masks once their time has come."""
        super().on_train_batch_start(batch, batch_idx)
        if self.phase is Phase.FROZEN and not self.frozen:
            self.freeze_masks()
            if self.calibration is not None and self.repair_at == "freeze":
                self._repair(self.final_masks_U)
            if self.compaction:
                with unwrapped(self.trainer.strategy):
                    self.cut_live_model(self.trainer.optimizers)
        elif self.progressive and self.progressive.is_due(
            self.global_step, self.schedule.warmup_steps, self.schedule.freeze_step
        ):
            with unwrapped(self.trainer.strategy):
                self._cut_early(self.progressive.decided(self.selected(self.logits())), self.trainer.optimizers)

    def repair_start(self, fits: OutputFits | None = None) -> None:
        """Repair the cut that the starting scores select, before anything trains.

        At the freeze adapters have already learnt what a refit would repair, and it counts twice; before the first step
        nothing has been learnt. Masks may still move away from this selection.

        Args:
            fits: Where they are there already, see :func:`atp.prepare.blockwise.repair`.
        """
        self._repair(self.selected(self.logits()), fits)

    def _repair(self, masks_U: Tensor, fits: OutputFits | None = None) -> None:
        assert self.calibration is not None
        if self.distill:
            self.masked.keep_dense(self.repair.modules(self.masked))
        with self.part("reconstruction"):
            self._repaired = blockwise.repair(self.masked, masks_U, self.calibration, self.repair, fits)

    def _cut_early(self, live_U: Tensor, optimizers: Iterable[Optimizer] = ()) -> None:
        """Cut the live model to ``live_U`` [U]; masks go on being learnt for what is left."""
        assert self.progressive is not None
        self.progressive.live_U.copy_(cut_live(self.masked, live_U, optimizers, final=False))

    def selected(self, logits_U: Tensor) -> Tensor:
        """Select final masks [U] of 0 and 1 by these logits."""
        return select(
            self.space,
            logits_U,
            self.schedule.target,
            shape=self.shape,
            min_units=self.min_units,
            round_to=self.round_to,
        )

    def freeze_masks(self) -> None:
        """Fix the deterministic architecture that meets the target; from here on only adapters train."""
        logits_U = self.logits()
        self.final_scores_U.copy_(self.sampler.confidence(self._shifted(logits_U, self.schedule.target)))
        masks_U = self.selected(logits_U)
        self.final_masks_U.copy_(masks_U)
        if self.gates is not None:
            soft_U = self.sampler.gate(self._shifted(logits_U, self.schedule.target))
            self.gates.start(soft_U, self.final_masks_U)
        self.is_frozen.fill_(True)
        self.frozen = True
        self.sampled_U = None
        decisions.tell(self.space, self.sampler, self.final_scores_U, masks_U, self.schedule.target, self.global_step)

    def cut_live_model(self, optimizers: Iterable[Optimizer] = ()) -> None:
        """Cut the live model, and the moments of its optimisers, to the final masks."""
        cut_live(self.masked, self.final_masks_U, optimizers)
        self.is_compact.fill_(True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give a compact checkpoint the shapes it was written with before anything is loaded."""
        state = checkpoint["state_dict"]
        if "progressive.live_U" not in state:  # early cuts were asked for where they are impossible
            self.progressive = None
        super().on_load_checkpoint(checkpoint)
        names = {self.masked.base_weight_name(module): module for module in self.repair.modules(self.masked)}
        self._repaired = [name for name in names if f"model.{name}" in state]
        if self.distill and not bool(state["is_compact"]):
            self.masked.keep_dense(names[name] for name in self._repaired)
        if self.progressive and self.masked.live_U is None and not state["progressive.live_U"].all():
            self._cut_early(state["progressive.live_U"])
        if bool(state["is_compact"]) and not self.is_compact:
            self.final_masks_U.copy_(state["final_masks_U"])
            self.cut_live_model()

    def frozen_masks(self) -> Tensor:
        """What the model is multiplied by once masks are final, [U]: masks times the kept units' gates."""
        return self.final_masks_U if self.gates is None else self.final_masks_U * self.gates()

    @torch.no_grad()
    def logits(self) -> Tensor:
        """The generator's noise-free logits [U]."""
        training = self.generator.training
        self.generator.eval()
        logits_U = self._scores().detach()
        self.generator.train(training)
        return logits_U

    def _scores(self) -> Tensor:
        logits_U = self.generator().float()
        return self.progressive.scores(logits_U) if self.progressive else logits_U

    def current_masks(self) -> Tensor:
        """Noise-free masks [U] as of now: the final ones once frozen, all ones during warm-up."""
        if self.frozen:
            return self.final_masks_U
        if self.phase is Phase.WARMUP:
            return torch.ones_like(self.final_masks_U)
        return self.sampler.deterministic(self._shifted(self.logits(), self.schedule.target_at(self.global_step)))

    def mask_state(self) -> tuple[Tensor, Tensor]:
        """Noise-free masks and how sure each unit is to stay, both [U] as of now: for records and pictures."""
        if self.frozen:
            return self.final_masks_U, self.final_masks_U
        shifted_U = self._shifted(self.logits(), self.schedule.target_at(self.global_step))
        masks_U = self.current_masks() if self.phase is Phase.WARMUP else self.sampler.deterministic(shifted_U)
        return masks_U, self.sampler.confidence(shifted_U)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Task loss of the masked model plus the budget term, in one forward pass."""
        budget_loss = self._apply_masks()
        task_loss = self.task_loss(batch)
        loss = task_loss + budget_loss
        self._check_finite(loss)
        self.log_losses({"train/loss": loss, "train/task_loss": task_loss, "train/budget_loss": budget_loss})
        return loss

    @contextmanager
    def teaching(self) -> Iterator[nn.Module]:
        """The dense base: masks and adapters off, which takes no memory; loaded anew once the live model is cut."""
        if self.masked.live_U is None:
            with self.masked.base_only():
                yield self.masked
            return
        if self._teacher[0] is None:
            assert self.load_dense is not None
            self._teacher = [self.load_dense().to(self.device).eval().requires_grad_(False)]
        with super().teaching() as teacher:
            yield teacher

    def on_after_backward(self) -> None:
        """Feed generators that score by the adapters' gradients."""
        if isinstance(self.generator, GradientScores) and not self.frozen:
            self.generator.observe(lora_gradient(self.masked))

    def _apply_masks(self) -> Tensor:
        """Set this step's masks; return the budget term."""
        phase, target = self.phase, self.schedule.target_at(self.global_step)
        nothing = self.final_masks_U.new_zeros(())
        if phase is not Phase.PRUNING:
            masks_U = self.current_masks()
            self.masked.set_masks(self.frozen_masks() if phase is Phase.FROZEN else None)
            self._log_masks(self.space.sparsity(masks_U), target if phase is Phase.FROZEN else 0.0)
            return nothing
        logits_U = self._shifted(self._scores(), target)
        masks_U = self.sampler(logits_U)
        self.sampled_U = masks_U.detach()
        self.masked.set_masks(masks_U)
        keep_U = self.sampler.keep_probability(logits_U)
        if self.progressive:
            self.progressive.observe(keep_U, self.global_step)
        expected = self.space.reduction(keep_U)
        self._log_masks(expected, target)
        return self.budget(expected, self.space.reduction(masks_U), target)

    def _shifted(self, logits_U: Tensor, target: float) -> Tensor:
        return logits_U + level_shift(self.budget, self.sampler, self.space, logits_U.detach(), target)

    def _log_masks(self, sparsity: Tensor, target: float) -> None:
        if not self.is_logged_step:
            return
        kept_U = ((self.sampled_U if self.sampled_U is not None else self.current_masks()) > 0.5).float()
        figures = decisions.mask_figures(self.space, kept_U, sparsity, target)
        phase = {"mask/phase": float(list(Phase).index(self.phase))}
        self.log_figures(figures | phase | {f"mask/lambda_{i}": x for i, x in enumerate(self.budget.multipliers(), 1)})

    def on_validation_start(self) -> None:
        """Validate with noise-free masks."""
        with torch.no_grad():
            self.masked.set_masks(self.frozen_masks() if self.frozen else self.current_masks())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Adapters, generator, and multipliers that ascend."""
        groups = super().parameter_groups()
        flat: dict[str, Any] = {"weight_decay": 0.0}
        if generator := [p for p in self.generator.parameters() if p.requires_grad]:
            groups.append({"name": "generator", "params": generator, "lr": self.generator_lr, **flat})
        if self.gates is not None and self.gates.kind == "calibrated":
            groups.append({"name": "gates", "params": [self.gates.scale_U], "lr": self.lr, **flat})
        if ascending := self.budget.multipliers():
            climb = {"lr": self.multiplier_lr, "maximize": True, **flat}
            groups.append({"name": "multipliers", "params": ascending, **climb})
        return groups

    def rate_factor(self, group: str, step: int) -> float:
        """The generator's cosine ends at the freeze; multipliers keep their rate."""
        if group == "multipliers":
            return 1.0
        return self._cosine(step, self.schedule.freeze_step if group == "generator" else self.total_steps)

    def _own_state(self) -> set[str]:
        buffers = {"final_masks_U", "final_scores_U", "is_frozen", "is_compact"}
        buffers |= {f"model.{name}" for name in self._repaired}
        buffers |= {"progressive.live_U", "progressive.quiet_U"} if self.progressive else set()
        if self.gates is not None:
            buffers |= {"gates.values_U", "gates.scale_U"}
        return super()._own_state() | buffers | {f"generator.{name}" for name, _ in self.generator.named_buffers()}
