"""Around training steps: checkpoints that survive anything, progress, throughput, bad trials.

Sits beside the training module in the Lightning trainer. Nothing here changes what is learnt. It knows the training
modules' public state and nothing of Hydra or of the stages around training.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from atp.atomic import write_json
from atp.errors import UserError
from atp.masks.budget import Phase
from atp.train.joint import PruningModule
from atp.train.tuning import TrainingDiverged, TuningModule

_CONFIG = "config.json"  # of a run directory
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
            self._restore_signals()
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
        self._restore_signals()
        if not self.interrupted:
            self.save(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give signals back; what was saved stays."""
        self._restore_signals()

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

    def _restore_signals(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


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
        """Give it back."""
        gc.unfreeze()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give it back."""
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


class TrialStopped(Exception):
    """A run of a sweep was given up early; the message says on what grounds.

    Attributes:
        value: The metric's last value.
    """

    def __init__(self, message: str, value: float) -> None:
        super().__init__(message)
        self.value = value


class StopBadTrial(Callback):
    """Stops a run that does worse than the median of the sweep's other runs had done by the same step.

    The median rule of Vizier (Golovin et al. 2017, section 3.2.2) in the form Optuna uses: this run's value against the
    others' values at the same step. Compared are runs whose ``config.json`` names the same target, steps, base, data,
    prompt and metric, once masks are fixed; from then on each writes its values to ``trial.json``, for any sweeper.

    Args:
        run_dir: The run directory; the others lie beside it.
        metric: What to compare, lower is better.
        after: Fraction of the run before which nothing is stopped.
        min_trials: Other runs that must have got as far.
    """

    def __init__(self, run_dir: str, metric: str = "val/perplexity", after: float = 0.5, min_trials: int = 3) -> None:
        if not 0.0 <= after <= 1.0:
            raise UserError(f"callbacks.stop_bad_trials.after is {after}; it is a fraction of the run, from 0 to 1")
        if min_trials < 1:
            raise UserError(f"callbacks.stop_bad_trials.min_trials is {min_trials}; it must be at least 1")
        self.run_dir, self.metric, self.after, self.min_trials = Path(run_dir), metric, after, min_trials

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the value; give up if it is a bad one."""
        if trainer.sanity_checking or not isinstance(pl_module, PruningModule):
            return
        if self.metric not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise UserError(f"callbacks.stop_bad_trials.metric is {self.metric!r}, of what is logged: {known}")
        if not pl_module.frozen:
            return
        value, step = float(trainer.callback_metrics[self.metric]), str(trainer.global_step)
        own = self.run_dir / "trial.json"
        write_json(own, {**_trial_values(own), step: value})
        trials = [path for path in self.run_dir.parent.glob("*/trial.json") if path != own]
        mine = _compared(self.run_dir)
        others = [_trial_values(path) for path in trials if _compared(path.parent) == mine]
        there = [values[step] for values in others if step in values]
        if trainer.global_step < self.after * int(trainer.max_steps) or len(there) < self.min_trials:
            return
        median = statistics.median(there)
        if not value <= median:
            raise TrialStopped(
                f"{self.metric} is {value:.4g} at step {step}, above the median {median:.4g} of {len(there)} others",
                value,
            )


def _trial_values(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


_COMPARED = (
    *("prune.sparsity", "prune.budget_of", "prune.budget_context", "trainer.max_steps"),
    *("model.path", "model.revision", "model.dtype", "prompt"),
)
_HOW_DATA_ARE_READ = ("batch_size", "num_workers", "cache", "stream", "packing")


def _compared(run_dir: Path) -> list[Any]:
    """What must be equal for two runs' values to be compared; nothing of it for a run that recorded no settings."""
    config = _trial_values(run_dir / _CONFIG).get("config") or {}
    found = [functools.reduce(lambda node, key: (node or {}).get(key), n.split("."), config) for n in _COMPARED]
    data = {key: value for key, value in (config.get("data") or {}).items() if key not in _HOW_DATA_ARE_READ}
    own = ("StopBadTrial", "stop_bad_trial")
    rules = [n for n in (config.get("callbacks") or {}).values() if str(n.get("_target_")).endswith(own)]
    return [*found, data, [node.get("metric", "val/perplexity") for node in rules]]
