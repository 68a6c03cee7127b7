"""The training systems: LoRA tuning, and LoRA tuning with masks that are learnt at the same time.

Sits between the data module and removal. One forward and one backward pass per step update adapters, generator and
multipliers together, in parameter groups with rates of their own. Everything random in a step is seeded from (seed,
step), so a resumed run repeats what the uninterrupted one would have done. Checkpoints hold what trains and the frozen
masks, never the base weights. It knows nothing of Hydra, of files, or of how results are measured.

Shape suffixes: B batch, T tokens, U units.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from atp.compaction import can_compact, compact, unwrapped
from atp.criteria import lora_gradient
from atp.gates import Gates
from atp.generator import Generator, GradientScores
from atp.lora import MaskedModel, causal_loss, trainable_parameters
from atp.objective import Budget, Phase, SparsitySchedule, distillation_loss
from atp.restoration import restore
from atp.sampler import Sampler
from atp.selection import select

log = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]


class TrainingDiverged(RuntimeError):
    """Loss or weights stopped being finite; the message says at which step and what to try."""


class TuningModule(LightningModule):
    """LoRA tuning of a causal LM: the dense reference, two-stage baselines, and the base of :class:`PruningModule`.

    Args:
        model: Callable as a causal LM with ``labels``; only what requires gradients trains.
        total_steps: Optimiser steps of the whole run.
        lr: Peak learning rate of the adapters.
        weight_decay: AdamW weight decay of the adapters.
        warmup: Fraction of the run over which the rate rises.
        min_lr_ratio: Where the cosine ends, as a fraction of the peak.
        seed: Seed of everything random in the steps.
        base_id: Name of the base model; a checkpoint made from another base is refused.
        distill: Weight of distillation in the task loss, 0 to 1; the rest is cross entropy on the data.
        teacher: Model to distil from; needed with ``distill`` unless a subclass brings its own. It is not trained,
            moved with this module, or saved.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        warmup: float = 0.05,
        min_lr_ratio: float = 0.1,
        seed: int = 0,
        base_id: str = "",
        distill: float = 0.0,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.strict_loading = False
        self.model = model
        self.total_steps = total_steps
        self.lr, self.weight_decay, self.warmup, self.min_lr_ratio = lr, weight_decay, warmup, min_lr_ratio
        self.seed = seed
        self.base_id = base_id
        if not 0.0 <= distill <= 1.0:
            raise ValueError(f"optim.distill is {distill}; it is a weight between 0 and 1")
        self.distill = distill
        self._teacher = [teacher]  # in a list, so that it is no submodule of this one
        self.val_loss = MeanMetric()
        self.is_logged_step = False  # the first, every ``trainer.log_every_n_steps``-th, the last
        self.figures: dict[str, Tensor | float] = {}  # of the step at hand, where they are wanted

    # ---- steps

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the step's noise from (seed, step); see whether its figures are wanted."""
        if self._trainer is not None:
            number, every = self.global_step + 1, self._trainer.log_every_n_steps  # type: ignore[attr-defined]
            self.is_logged_step = number == 1 or number % every == 0 or number == self.total_steps
        self.figures = {}
        torch.manual_seed((self.seed * 1_000_003 + batch_idx) % 2**63)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One forward pass; returns the loss to descend."""
        loss = self.task_loss(batch)
        self._check_finite(loss)
        self.log_figures({"train/loss": loss})
        return loss

    def log_figures(self, figures: Mapping[str, Tensor | float]) -> None:
        """Note figures of the step at hand, if they are wanted."""
        if self.is_logged_step:
            self.figures |= {name: v.detach() if isinstance(v, Tensor) else v for name, v in figures.items()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Hand what step and callbacks have noted to the loggers, all at once.

        ``self.log`` would keep books on every figure at every step, and fetch each from the device by itself: more than
        the work of a small model's step. Validation is logged by it as usual.
        """
        if not self.figures or (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        tensors = {name: value.float() for name, value in self.figures.items() if isinstance(value, Tensor)}
        fetched = torch.stack(list(tensors.values())).tolist() if tensors else []
        figures = {name: float(v) for name, v in (self.figures | dict(zip(tensors, fetched, strict=True))).items()}
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
        for logger in self.loggers:
            logger.log_metrics({**figures, "epoch": self.current_epoch}, step=self.global_step - 1)
            logger.save()

    def task_loss(self, batch: Batch) -> Tensor:
        """Cross entropy on the data, mixed with distillation where that is asked for."""
        if self.distill == 0.0:
            return causal_loss(self.model, batch)
        output = self.model(**batch)
        divergence = distillation_loss(output.logits, self.teacher_logits(batch), batch["labels"])
        self.log_figures({"train/distillation_loss": divergence, "train/data_loss": output.loss})
        return (1.0 - self.distill) * output.loss + self.distill * divergence

    @torch.no_grad()
    def teacher_logits(self, batch: Batch) -> Tensor:
        """Logits to distil from, [B, T, V]."""
        (teacher,) = self._teacher
        assert teacher is not None
        return teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Accumulate the token-weighted loss behind ``val/perplexity``."""
        loss = causal_loss(self.model, batch)
        tokens = (batch["labels"][:, 1:] != -100).sum()
        self.val_loss.update(loss.float(), tokens)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss`` and ``val/perplexity``."""
        loss = self.val_loss.compute()
        self.val_loss.reset()
        self.log("val/loss", loss)
        self.log("val/perplexity", loss.exp(), prog_bar=True)

    def _check_finite(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise TrainingDiverged(
                f"the loss became {float(loss.detach())} at step {self.global_step}; try a lower optim.lr or "
                "prune.generator_lr, "
                "trainer.gradient_clip_val=1.0, or trainer.precision=32-true. The last checkpoint is from before "
                "this step"
            )

    # ---- optimiser

    def parameter_groups(self) -> list[dict[str, Any]]:
        """AdamW groups, each with a ``name``."""
        adapters = list(trainable_parameters(self.model).values())
        return [{"name": "lora", "params": adapters, "lr": self.lr, "weight_decay": self.weight_decay}]

    def rate_factor(self, group: str, step: int) -> float:
        """Factor on a group's peak rate at an optimiser step: linear warm-up, then cosine to ``min_lr_ratio``."""
        return self._cosine(step, self.total_steps)

    def _cosine(self, step: int, total: int) -> float:
        rise = max(round(total * self.warmup), 1)
        if step < rise:
            return (step + 1) / rise
        done = min((step - rise) / max(total - rise, 1), 1.0)
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * done))

    def configure_optimizers(self) -> Any:
        """One AdamW over all groups, with one schedule per group."""
        groups = self.parameter_groups()
        on_cpu = all(p.device.type == "cpu" for group in groups for p in group["params"])
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True if on_cpu else None)
        names = [group["name"] for group in optimizer.param_groups]
        factors: list[Callable[[int], float]] = [functools.partial(self.rate_factor, name) for name in names]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains and this module's own buffers; name the base they belong to."""
        wanted = self._own_state()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in wanted}
        checkpoint["atp"] = {"base_id": self.base_id, "total_steps": self.total_steps}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base or run length, or one that lacks something that trains."""
        meta = checkpoint.get("atp", {})
        for key, mine in (("base_id", self.base_id), ("total_steps", self.total_steps)):
            if meta.get(key) != mine:
                raise ValueError(
                    f"the checkpoint was made with {key} = {meta.get(key)!r}, this run has {mine!r}; resume with the "
                    "run's own "
                    "settings or start a new run"
                )
        missing = self._own_state() - set(checkpoint["state_dict"])
        if missing:
            raise ValueError(
                f"the checkpoint lacks {sorted(missing)[:3]}; lora or prune settings differ from the run that wrote it"
            )

    def _own_state(self) -> set[str]:
        return set(trainable_parameters(self))

    def find_divergence(self) -> str | None:
        """Name of a trainable tensor that holds a value which is not finite, if any."""
        return next((n for n, p in trainable_parameters(self).items() if not torch.isfinite(p).all()), None)


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
        shape: ``per_layer`` or ``uniform``, see :func:`atp.selection.select`.
        min_units: Units every layer keeps, by kind.
        compaction: Cut the live model to the final masks at the freeze; the remaining steps then cost what the small
            model costs. Not possible with ``distill``, whose teacher is the dense base.
        restore_ridge: Ridge of the least-squares restoration at the freeze, which happens when ``calibration`` is set
            to something that gives batches.
        round_to: Kept widths are multiples of this, see :func:`atp.selection.select`.
        gates: ``binary``, or what kept units are scaled by after the freeze, see :class:`atp.gates.Gates`.
        **tuning: Arguments of :class:`TuningModule`.
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
        restore_ridge: float = 1e-3,
        round_to: int = 1,
        gates: str = "binary",
        **tuning: Any,
    ) -> None:
        super().__init__(model, **tuning)
        self.masked = model
        self.space = model.space
        self.generator, self.sampler, self.budget, self.schedule = generator, sampler, budget, schedule
        self.generator_lr, self.multiplier_lr = generator_lr, multiplier_lr
        if compaction and self.distill:
            log.warning("prune.compact is ignored: optim.distill needs the dense base as its teacher")
        if compaction and not can_compact(self.space):
            log.info("the live model is not cut at the freeze: only heads and channels can be, not the whole space")
        self.compaction = compaction and not self.distill and can_compact(self.space) and gates == "binary"
        self.restore_ridge = restore_ridge
        self.calibration: Callable[[], Iterable[Batch]] | None = None
        self._restored: list[str] = []
        self.shape, self.min_units, self.round_to = shape, min_units, round_to
        self.gates = None if gates == "binary" else Gates(self.space.num_units, gates)
        self.register_buffer("final_masks_U", torch.ones(self.space.num_units))
        self.register_buffer("final_scores_U", torch.ones(self.space.num_units))
        self.register_buffer("is_frozen", torch.zeros((), dtype=torch.bool))
        self.register_buffer("is_compact", torch.zeros((), dtype=torch.bool))
        self.sampled_U: Tensor | None = None

    @property
    def phase(self) -> Phase:
        """Phase of the step that comes next."""
        return self.schedule.phase(self.global_step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the step; fix the masks once their time has come."""
        super().on_train_batch_start(batch, batch_idx)
        if self.phase is Phase.FROZEN and not self.is_frozen:
            self.freeze_masks()
            if self.calibration is not None:
                self._restored = restore(self.masked, self.final_masks_U, self.calibration, ridge=self.restore_ridge)
            if self.compaction:
                with unwrapped(self.trainer.strategy):
                    self.compact(self.trainer.optimizers)

    def freeze_masks(self) -> None:
        """Fix the deterministic architecture that meets the target; from here on only adapters train."""
        logits_U = self.logits()
        self.final_scores_U.copy_(self.sampler.confidence(self._shifted(logits_U, self.schedule.target)))
        masks_U = select(
            self.space,
            logits_U,
            self.schedule.target,
            shape=self.shape,
            min_units=self.min_units,
            round_to=self.round_to,
        )
        self.final_masks_U.copy_(masks_U)
        if self.gates is not None:
            soft_U = self.sampler.deterministic(self._shifted(logits_U, self.schedule.target))
            self.gates.start(soft_U, self.final_masks_U)
        self.is_frozen.fill_(True)
        self.sampled_U = None
        sparsity = float(self.space.sparsity(masks_U.double()))
        log.info(
            "masks frozen at step %d: block sparsity %.4f (target %.4f)",
            self.global_step,
            sparsity,
            self.schedule.target,
        )

    def compact(self, optimizers: Iterable[Optimizer] = ()) -> None:
        """Cut the live model, and the moments of its optimisers, to the final masks."""
        compact(self.masked, self.final_masks_U, optimizers)
        self.is_compact.fill_(True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give a compact checkpoint the shapes it was written with before anything is loaded."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        self._restored = [k.removeprefix("model.") for k in state if ".base_layer." in k]
        if bool(state["is_compact"]) and not self.is_compact:
            self.final_masks_U.copy_(state["final_masks_U"])
            self.compact()

    def frozen_masks(self) -> Tensor:
        """What the model is multiplied by once masks are final, [U]: masks times the kept units' gates."""
        return self.final_masks_U if self.gates is None else self.final_masks_U * self.gates()

    @torch.no_grad()
    def logits(self) -> Tensor:
        """The generator's noise-free logits [U]."""
        training = self.generator.training
        self.generator.eval()
        logits_U = self.generator().detach().float()
        self.generator.train(training)
        return logits_U

    def current_masks(self) -> Tensor:
        """Noise-free masks [U] as of now: the final ones once frozen, all ones during warm-up."""
        if self.is_frozen:
            return self.final_masks_U
        if self.phase is Phase.WARMUP:
            return torch.ones_like(self.final_masks_U)
        return self.sampler.deterministic(self._shifted(self.logits(), self.schedule.target_at(self.global_step)))

    def mask_state(self) -> tuple[Tensor, Tensor]:
        """Noise-free masks and how sure each unit is to stay, both [U] as of now: for records and pictures."""
        if self.is_frozen:
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
        self.log_figures({"train/loss": loss, "train/task_loss": task_loss, "train/budget_loss": budget_loss})
        return loss

    @torch.no_grad()
    def teacher_logits(self, batch: Batch) -> Tensor:
        """Logits of the dense base itself, masks and adapters off: a teacher that takes no memory."""
        with self.masked.base_only():
            output = self.masked(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return output.logits

    def on_after_backward(self) -> None:
        """Feed generators that score by the adapters' gradients."""
        if isinstance(self.generator, GradientScores) and not self.is_frozen:
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
        logits_U = self._shifted(self.generator().float(), target)
        masks_U = self.sampler(logits_U)
        self.sampled_U = masks_U.detach()
        self.masked.set_masks(masks_U)
        expected = self.space.reduction(self.sampler.keep_probability(logits_U))
        self._log_masks(expected, target)
        return self.budget(expected, self.space.reduction(masks_U), target)

    @torch.no_grad()
    def _shift(self, logits_U: Tensor, target: float) -> float:
        logits_U = logits_U.cpu()  # one copy, where bisection on a GPU would wait for it at every probe

        def sparsity_of(shift: float) -> float:
            return float(self.space.reduction(self.sampler.keep_probability(logits_U + shift)))

        return self.budget.shift(sparsity_of, target)

    def _shifted(self, logits_U: Tensor, target: float) -> Tensor:
        return logits_U + self._shift(logits_U.detach(), target)

    def _log_masks(self, sparsity: Tensor, target: float) -> None:
        if not self.is_logged_step:
            return
        kept_U = ((self.sampled_U if self.sampled_U is not None else self.current_masks()) > 0.5).float()
        figures: dict[str, Tensor | float] = {
            "mask/phase": float(list(Phase).index(self.phase)),
            "mask/sparsity": sparsity,
            "mask/target_sparsity": target,
            "mask/keep_ratio": 1.0 - sparsity,
            "mask/heads_kept": self.space.kept_heads(kept_U),
            "mask/channels_kept": self.space.kept_channels(kept_U),
        }
        self.log_figures(figures | {f"mask/lambda_{i}": value for i, value in enumerate(self.budget.multipliers(), 1)})

    def on_validation_start(self) -> None:
        """Validate with noise-free masks."""
        with torch.no_grad():
            self.masked.set_masks(self.frozen_masks() if self.is_frozen else self.current_masks())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Adapters, generator, and multipliers that ascend."""
        groups = super().parameter_groups()
        generator = [p for p in self.generator.parameters() if p.requires_grad]
        if generator:
            groups.append({"name": "generator", "params": generator, "lr": self.generator_lr, "weight_decay": 0.0})
        if self.gates is not None and self.gates.kind == "calibrated":
            groups.append({"name": "gates", "params": [self.gates.scale_U], "lr": self.lr, "weight_decay": 0.0})
        ascending = self.budget.multipliers()
        if ascending:
            groups.append(
                {
                    "name": "multipliers",
                    "params": ascending,
                    "lr": self.multiplier_lr,
                    "weight_decay": 0.0,
                    "maximize": True,
                }
            )
        return groups

    def rate_factor(self, group: str, step: int) -> float:
        """The generator's cosine ends at the freeze; multipliers keep their rate."""
        if group == "multipliers":
            return 1.0
        return self._cosine(step, self.schedule.freeze_step if group == "generator" else self.total_steps)

    def _own_state(self) -> set[str]:
        buffers = {"final_masks_U", "final_scores_U", "is_frozen", "is_compact"}
        buffers |= {f"model.{name}" for name in self._restored}
        if self.gates is not None:
            buffers |= {"gates.values_U", "gates.scale_U"}
        return super()._own_state() | buffers | {f"generator.{name}" for name, _ in self.generator.named_buffers()}
