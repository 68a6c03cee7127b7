"""The harness: EleutherAI's lm-evaluation-harness on any model in memory, as an optional extra.

For figures that compare with the literature: its tasks, prompts and normalisation, on dense, masked or exported models
alike. Our own protocols are in :mod:`atp.evaluate.quality`. It knows nothing of masks or of our records; the library is
imported only when it is asked for.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_RESAMPLES = 100  # for the standard errors that have no formula


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    folder: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Score a model with the harness.

    Args:
        model: A causal LM, where it is to run.
        tokenizer: Its tokenizer.
        tasks: Names of the harness' tasks, or of those described in ``folder``.
        folder: Folder of further task files (YAML); if it holds all the tasks, the harness' own are not looked up.
        batch_size: Sequences of a forward pass.
        limit: Most items of each task; None for all.

    Returns:
        Task to metric to value: the harness' names (``acc``, ``acc_norm``, ...), their standard errors as
        ``<metric>_stderr``, and ``items``.

    Raises:
        ValueError: As :func:`prepare`.
    """
    manager = prepare(tasks, folder)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    was_training, chatter = model.training, logging.getLogger("lm_eval")
    level = chatter.level
    chatter.setLevel(logging.ERROR)  # it explains its own workings at length, and warns of models in memory
    try:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        how: dict[str, Any] = {"bootstrap_iters": _RESAMPLES, "log_samples": False}
        found: Any = simple_evaluate(wrapped, tasks=list(tasks), task_manager=manager, limit=limit, **how)
    finally:
        chatter.setLevel(level)
        model.train(was_training)
    counts = found.get("n-samples", {})
    return {
        task: {**_figures(figures), "items": float(counts.get(task, {}).get("effective", 0))}
        for task, figures in found["results"].items()
    }


def prepare(tasks: Sequence[str], folder: str | None = None) -> Any:
    """Find the tasks and load their data, so that what is missing shows before anything is trained.

    Returns:
        The harness' task manager.

    Raises:
        ValueError: The library is not installed, no task is named, it does not know one, or a task cannot be
            loaded.
    """
    require(tasks)
    from lm_eval.tasks import TaskManager

    path = None if folder is None else Path(folder).expanduser()
    if path is not None and not path.is_dir():
        raise UserError(f"evaluate.harness_path={folder}: no such folder; give one that holds the harness' task files")
    manager = TaskManager(include_path=path, include_defaults=False) if path else TaskManager()
    if path and not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=path)
    for task in tasks:
        if task not in manager.all_tasks:
            close = difflib.get_close_matches(task, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise UserError(f"evaluate.tasks: the harness has no task {task!r}{hint}")
        try:
            manager.load(task)
        # Whatever reading a task's files or its data raises, the way out is the same.
        except Exception as error:
            raise UserError(
                f"evaluate.tasks: the harness cannot load {task} ({type(error).__name__}: {error}); go online, or "
                "describe it in a file of its own over local data: evaluate.harness_path=<folder>"
            ) from error
    return manager


def require(tasks: Sequence[str]) -> None:
    """Raise ValueError if no task is named or the library is not installed, without importing it."""
    if not tasks:
        raise UserError("evaluate=harness scores evaluate.tasks, which is empty; e.g. evaluate.tasks=[piqa,arc_easy]")
    try:
        found = importlib.util.find_spec("lm_eval") is not None
    except ValueError:  # it is there in name only
        found = False
    if not found:
        raise UserError("evaluate=harness needs lm-evaluation-harness; pip install 'atp[harness]'")


def _figures(figures: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of one task; their names lose the harness' filter."""
    return {
        name.split(",")[0]: float(value)
        for name, value in figures.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "," in name
    }
