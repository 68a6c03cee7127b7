"""Progress while training: a bar or lines, throughput, and a garbage collector that does not interrupt steps.

Beside the training module in the Lightning trainer. Changes nothing of what is learnt, and knows the training modules'
public state alone.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from atp.masks.budget import Phase
from atp.train.joint import PruningModule
from atp.train.tuning import TuningModule

log = logging.getLogger(__name__)


class QuietCollector(Callback):
    """Keeps what is loaded before training out of Python's garbage collection until training ends.

    Half a million objects of imported libraries make one full collection take about as long as several steps of a small
    model, and what is logged brings collections on. New objects are collected as ever.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect once, then set aside what is left."""
        gc.collect()
        gc.freeze()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put what was set aside back under garbage collection."""
        gc.unfreeze()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put what was set aside back under garbage collection."""
        gc.unfreeze()


class Throughput(Callback):
    """Tokens per second since the last logged step, as ``train/tokens_per_second``."""

    def __init__(self) -> None:
        self._tokens = 0
        self._since = 0.0
        self.tokens_per_second = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._tokens, self._since = 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step's padded tokens; log the rate at steps that are logged."""
        self._tokens += batch["input_ids"].numel() * trainer.world_size
        elapsed = time.perf_counter() - self._since
        if elapsed > 1.0 or not self.tokens_per_second:
            self.tokens_per_second = self._tokens / max(elapsed, 1e-9)
            self._tokens, self._since = 0, time.perf_counter()
        if isinstance(pl_module, TuningModule):
            pl_module.log_figures({"train/tokens_per_second": self.tokens_per_second})


class ProgressReport(Callback):
    """A Rich progress bar on a terminal, a line every so often elsewhere, and one line per phase.

    Args:
        title: What is being trained, shown first.
        console: Where the bar goes; standard error by default.
        lines: Number of lines over the run where there is no terminal.
    """

    def __init__(self, title: str, console: Console | None = None, lines: int = 10) -> None:
        self.title = title
        self.console = console or Console(file=sys.stderr)
        self.lines = lines
        self._bar: Progress | None = None
        self._task: Any = None
        self._phase: Phase | None = None
        self._started_at = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the step the run goes on from."""
        self._started_at, self._first_step, self._phase = time.perf_counter(), trainer.global_step, None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self.title, total=trainer.max_steps, completed=trainer.global_step, figures=""
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Announce a phase when it begins."""
        phase = pl_module.phase if isinstance(pl_module, PruningModule) else None
        if phase is not self._phase and phase is not None:
            log.info("%s: %s from step %d of %d", self.title, phase.value, trainer.global_step, trainer.max_steps)
        self._phase = phase

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar, or write a line."""
        step = trainer.global_step
        if self._bar is not None:
            description = f"{self.title} · {self._phase.value}" if self._phase else self.title
            self._bar.update(self._task, completed=step, description=description)
            if getattr(pl_module, "is_logged_step", True):
                self._bar.update(self._task, figures=_figures(trainer, pl_module))
        elif (
            step % max(int(trainer.max_steps) // self.lines, 1) == 0
            and (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        ):
            per_step = (time.perf_counter() - self._started_at) / max(step - self._first_step, 1)
            left = per_step * (int(trainer.max_steps) - step)
            log.info(
                "%s step %d/%d  %s  %.0f s left",
                self.title,
                step,
                trainer.max_steps,
                _figures(trainer, pl_module),
                left,
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _figures(trainer: Trainer, pl_module: LightningModule) -> str:
    """Loss, sparsity against target, kept heads and channels, tokens per second: what has been logged of them."""
    seen = {**trainer.callback_metrics, **getattr(pl_module, "figures", {})}

    def number(name: str, form: str) -> str:
        return format(float(seen[name]), form) if name in seen else ""

    parts = [f"loss {number('train/loss', '.3f')}"]
    if "mask/sparsity" in seen:
        parts.append(f"sparsity {number('mask/sparsity', '.3f')}/{number('mask/target_sparsity', '.3f')}")
        parts.append(f"heads {number('mask/heads_kept', '.0f')}")
        parts.append(f"channels {number('mask/channels_kept', '.0f')}")
    if "train/tokens_per_second" in seen:
        parts.append(f"{number('train/tokens_per_second', '.0f')} tok/s")
    return "  ".join(parts)
