"""Bad trials of a sweep, stopped early by what finished trials with the same target had reached at that step.

Beside the training module in the Lightning trainer. It reads files of neighbouring run directories and knows nothing of
sweeps otherwise.
"""

from __future__ import annotations

import functools
import json
import logging
import statistics
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from atp.atomic import write_json
from atp.errors import UserError
from atp.train.joint import PruningModule

_CONFIG = "config.json"  # of a run directory
log = logging.getLogger(__name__)


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
