"""Checkpoints that survive anything: written whole, at signals too, and never with values that are not finite.

Beside the training module in the Lightning trainer. Changes nothing of what is learnt, and knows the training modules'
public state alone.
"""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from atp.errors import UserError
from atp.train.tuning import TrainingDiverged, TuningModule

log = logging.getLogger(__name__)


class RunCheckpoint(Callback):
    """Writes the resumable state: every few steps, and at the end of the step in which Ctrl-C or SIGTERM arrives.

    The file is written under a temporary name and renamed, so a kill at any moment leaves the previous checkpoint
    whole. State that holds values which are not finite is never written. A second Ctrl-C stops at once.

    Args:
        path: The checkpoint file.
        every_n_steps: Optimiser steps between checkpoints.

    Attributes:
        interrupted: Whether a signal ended training early.
    """

    def __init__(self, path: Path, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise UserError(f"trainer.checkpoint_every_n_steps is {every_n_steps}; it must be at least 1")
        self.path = path
        self.every_n_steps = every_n_steps
        self.interrupted = False
        self._last_step = -1
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over SIGINT and SIGTERM while training."""
        self._last_step = trainer.global_step
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not in the main thread: signals stay with whoever runs us
                return

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            self._return_signals()
            raise KeyboardInterrupt
        self.interrupted = True
        log.warning("%s: finishing this step, then saving; once more stops at once", signal.Signals(number).name)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when due, at a step's boundary only."""
        step = trainer.global_step
        at_boundary = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not at_boundary or step == self._last_step:
            return
        if self.interrupted or step - self._last_step >= self.every_n_steps:
            self.save(trainer, pl_module)
        if self.interrupted:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of training."""
        self._return_signals()
        if not self.interrupted:
            self.save(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give signals back; what was saved stays."""
        self._return_signals()

    def save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint.

        Raises:
            TrainingDiverged: A trainable value is not finite; the previous checkpoint is kept.
        """
        assert isinstance(pl_module, TuningModule)
        broken = pl_module.find_divergence()
        if broken:
            raise TrainingDiverged(
                f"{broken} holds values that are not finite at step {trainer.global_step}; the last good checkpoint "
                "is kept. Try a "
                "lower optim.lr or prune.generator_lr, trainer.gradient_clip_val=1.0, or trainer.precision=32-true"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            os.replace(temporary, self.path)
        self._last_step = trainer.global_step

    def _return_signals(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
