"""LoRA tuning as a training system: the dense reference, two-stage baselines, and the base of joint training.

Sits between the data module and whatever follows training. Everything random in a step is seeded from (seed, step), so
a resumed run repeats what the uninterrupted one would have done. Checkpoints hold what trains, never the base weights.
It knows nothing of masks, of Hydra, of files, or of how results are measured.

Shape suffixes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from atp.errors import UserError
from atp.masks.lora import language_model, trainable_parameters
from atp.masks.loss import causal_loss, hidden_states, loss_and_states
from atp.train.distillation import Distillation, distillation_loss, hidden_state_loss, real_tokens

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
        distill: What is learnt from a teacher beside the data.
        teacher: Model to distil from; needed with ``distill`` unless a subclass brings its own. It is not trained,
            moved with this module, or saved.
        compile_model: Run the decoder through ``torch.compile``.
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
        distill: Distillation = Distillation(),  # noqa: B008  # frozen
        teacher: nn.Module | None = None,
        compile_model: bool = False,
    ) -> None:
        super().__init__()
        self.strict_loading = False
        self.model = model
        self.total_steps = total_steps
        self.lr, self.weight_decay, self.warmup, self.min_lr_ratio = lr, weight_decay, warmup, min_lr_ratio
        self.seed = seed
        self.base_id = base_id
        self.distill = distill
        self._teacher = [teacher]  # in a list, so that it is no submodule of this one
        self.compile_model = compile_model
        self.val_loss = MeanMetric()
        self.is_logged_step = False  # the first, every ``trainer.log_every_n_steps``-th, the last
        self.figures: dict[str, Tensor | float] = {}  # of the step at hand, where they are wanted
        self._losses: dict[str, list[Tensor]] = {}  # of the step's micro-batches so far
        self._learnt: int | None = None  # labels of the batch at hand, counted before it went to a device
        self._sum: Tensor | None = None  # of the losses whose being finite was not looked at yet

    def on_fit_start(self) -> None:
        """Compile the decoder, in place, so that parameters keep their names; it is compiled anew when it is cut."""
        decoder = getattr(language_model(self.model), "base_model", self.model)
        if self.compile_model and isinstance(decoder, nn.Module):
            decoder.compile()

    # ---- steps

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count what is learnt while the batch is still here, so that no step has to wait for a device's count."""
        labels = batch.get("labels") if isinstance(batch, dict) else None
        self._learnt = None
        if isinstance(labels, Tensor) and labels.device.type == "cpu" and self.device.type != "cpu":
            self._learnt = int((labels[:, 1:] != -100).sum())
        return batch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the step's noise from (seed, step); see whether its figures are wanted."""
        if self._trainer is not None:
            number, every = self.global_step + 1, self._trainer.log_every_n_steps  # type: ignore[attr-defined]
            self.is_logged_step = number == 1 or number % every == 0 or number == self.total_steps
        if self._trainer is None or batch_idx % self._trainer.accumulate_grad_batches == 0:
            self._losses = {}
        self.figures = {}
        torch.manual_seed((self.seed * 1_000_003 + batch_idx) % 2**63)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One forward pass; returns the loss to descend."""
        loss = self.task_loss(batch)
        self._check_finite(loss)
        self.log_losses({"train/loss": loss})
        return loss

    def _take_learnt(self) -> int | None:
        """Return how many tokens this batch learns and forget it; None if that was not counted."""
        learnt, self._learnt = self._learnt, None
        return learnt

    def log_figures(self, figures: Mapping[str, Tensor | float]) -> None:
        """Note figures of the step at hand, if they are wanted."""
        if self.is_logged_step:
            self.figures |= {name: v.detach() if isinstance(v, Tensor) else v for name, v in figures.items()}

    def log_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Note losses of the step at hand as means over its micro-batches, which weigh the same in its gradient."""
        if not self.is_logged_step:
            return
        for name, value in losses.items():
            seen = self._losses.setdefault(name, [])
            seen.append(value.detach())
            self.figures[name] = seen[0] if len(seen) == 1 else torch.stack(seen).mean()

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
        """Cross entropy on the data, with what the teacher adds where one is asked for."""
        if self.distill.is_over(self.global_step, self.total_steps):
            self._teacher = [None]
            return causal_loss(self.model, batch, self._take_learnt())
        weight = self.distill.hidden_weight(self.global_step, self.total_steps)
        if self.distill.logits == 0.0:
            loss, states = loss_and_states(self.model, batch, self._take_learnt())
            with torch.no_grad(), self.teaching() as teacher:
                wanted = hidden_states(teacher, batch)
            return loss + self._hidden_loss(states, wanted, batch, weight)
        output: Any = self.model(**batch, output_hidden_states=weight > 0.0)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad(), self.teaching() as teacher:
            taught: Any = teacher(**inputs, output_hidden_states=weight > 0.0)
        divergence = distillation_loss(output.logits, taught.logits, batch["labels"])
        self.log_losses({"train/distillation_loss": divergence, "train/data_loss": output.loss})
        loss = (1.0 - self.distill.logits) * output.loss + self.distill.logits * divergence
        if weight > 0.0:
            loss = loss + self._hidden_loss(output.hidden_states[1:], taught.hidden_states[1:], batch, weight)
        return loss

    def _hidden_loss(
        self, states: Sequence[Tensor], wanted: Sequence[Tensor], batch: Batch, weight: float
    ) -> Tensor | float:
        """The weighted distance from the teacher's hidden states; none where layers or widths have fallen out."""
        if [own.shape for own in states] != [other.shape for other in wanted]:
            log.warning(
                "prune.distill.hidden is ignored: this model has lost layers or hidden dimensions of its teacher"
            )
            self.distill = replace(self.distill, hidden=0.0)
            return 0.0
        distance = hidden_state_loss(states, wanted, real_tokens(batch["attention_mask"]))
        self.log_losses({"train/hidden_loss": distance})
        self.log_figures({"train/hidden_weight": weight})
        return weight * distance

    @contextmanager
    def teaching(self) -> Iterator[nn.Module]:
        """The model to learn from, ready for a forward pass inside the block."""
        (teacher,) = self._teacher
        assert teacher is not None
        yield teacher

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Accumulate the token-weighted loss behind ``val/perplexity``."""
        loss = causal_loss(self.model, batch, self._take_learnt())
        tokens = (batch["labels"][:, 1:] != -100).sum()
        self.val_loss.update(loss.float(), tokens)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss`` and ``val/perplexity``."""
        loss = self.val_loss.compute()
        self.val_loss.reset()
        self.log("val/loss", loss)
        self.log("val/perplexity", loss.exp(), prog_bar=True)

    def _check_finite(self, loss: Tensor) -> None:
        """Stop at a loss that is not finite: at once on a CPU, elsewhere where figures are fetched from it anyway."""
        self._sum = loss.detach() if self._sum is None else self._sum + loss.detach()
        if loss.device.type == "cpu" or self.is_logged_step:
            self._raise_unless_finite()

    def _raise_unless_finite(self) -> None:
        value, self._sum = 0.0 if self._sum is None else float(self._sum), None
        if not math.isfinite(value):
            since = "" if self.device.type == "cpu" else ", or in the steps since figures were last logged"
            raise TrainingDiverged(
                f"the loss became {value} at step {self.global_step}{since}; try a lower optim.lr or "
                "prune.generator_lr, trainer.gradient_clip_val=1.0, or trainer.precision=32-true. The last checkpoint "
                "is from before that"
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
        """Keep what trains and this module's own buffers; name the base they belong to.

        Raises:
            TrainingDiverged: A loss of the steps before was not finite: an earlier checkpoint is better than this one.
        """
        self._raise_unless_finite()
        wanted = self._own_state()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in wanted}
        checkpoint["atp"] = {"base_id": self.base_id, "total_steps": self.total_steps}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base or run length, or one that lacks something that trains."""
        meta = checkpoint.get("atp", {})
        for key, mine in (("base_id", self.base_id), ("total_steps", self.total_steps)):
            if meta.get(key) != mine:
                raise UserError(
                    f"the checkpoint was made with {key} = {meta.get(key)!r}, this run has {mine!r}; resume with the "
                    "run's own "
                    "settings or start a new run"
                )
        missing = self._own_state() - set(checkpoint["state_dict"])
        if missing:
            raise UserError(
                f"the checkpoint lacks {sorted(missing)[:3]}; lora or prune settings differ from the run that wrote it"
            )

    def _own_state(self) -> set[str]:
        return set(trainable_parameters(self))

    def find_divergence(self) -> str | None:
        """Name of a trainable tensor that holds a value which is not finite, if any."""
        return next((n for n, p in trainable_parameters(self).items() if not torch.isfinite(p).all()), None)
