"""Short names of the classes that the configuration can ask for, and the names they had before.

A YAML says ``_target_: free_logits``; a full path works as well, for classes of a user's own. Files of the package may
move: the table is the one place that follows, and what a finished run has written down under an older path still finds
its class. It imports none of them.
"""

from __future__ import annotations

from typing import Any

CLASSES = {
    "free_logits": "atp.masks.generator.FreeLogits",
    "transformer_generator": "atp.masks.generator.TransformerGenerator",
    "gru_generator": "atp.masks.generator.GRUGenerator",
    "gradient_scores": "atp.masks.generator.GradientScores",
    "fixed_scores": "atp.masks.generator.FixedScores",
    "gumbel_sigmoid": "atp.masks.sampler.GumbelSigmoid",
    "hard_concrete": "atp.masks.sampler.HardConcrete",
    "threshold": "atp.masks.sampler.Threshold",
    "l0_lagrangian": "atp.masks.budget.L0Lagrangian",
    "log_ratio": "atp.masks.budget.LogRatio",
    "projection": "atp.masks.budget.Projection",
    "stop_bad_trial": "atp.train.trials.StopBadTrial",
    "mlflow_logger": "atp.train.loggers.mlflow_logger",
    "tensorboard_logger": "atp.train.loggers.tensorboard_logger",
    "wandb_logger": "atp.train.loggers.wandb_logger",
}

_MOVED = {  # module before -> module now; the classes kept their names
    "atp.generator": "atp.masks.generator",
    "atp.sampler": "atp.masks.sampler",
    "atp.objective": "atp.masks.budget",
    "atp.callbacks": "atp.train.trials",
    "atp.loggers": "atp.train.loggers",
}
_SHORT = {path: name for name, path in CLASSES.items()}


def class_path(target: str) -> str:
    """Return the import path of a ``_target_``: of a short name, of an older path, or a path as it is."""
    module, _, name = target.rpartition(".")
    return CLASSES.get(target, f"{_MOVED[module]}.{name}" if module in _MOVED else target)


def with_short_names(node: Any) -> Any:
    """Replace every ``_target_`` by its short name, so that two spellings of one class are equal."""
    if isinstance(node, dict):
        return {
            key: _SHORT.get(class_path(value), value)
            if key == "_target_" and isinstance(value, str)
            else with_short_names(value)
            for key, value in node.items()
        }
    return [with_short_names(value) for value in node] if isinstance(node, list) else node
