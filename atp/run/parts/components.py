"""What the configuration names by ``_target_``, and the Lightning trainer.

Generator, sampler, budget, loggers and callbacks are instantiated here and nowhere else. It knows nothing of models or
data.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from atp.config.names import CLASSES, class_path
from atp.config.schema import TrainConfig
from atp.errors import UserError


def component(place: str, node: Mapping[str, Any], **provided: Any) -> Any:
    """Instantiate a ``_target_`` node, handing over those of ``provided`` that its constructor takes.

    Raises:
        ValueError: No target, an unknown one, or an argument it does not take, with the nearest that it does.
    """
    target = node.get("_target_")
    if not target:
        raise UserError(f"{place} has no _target_; choose one with {place.replace('.', '/')}=<name> (see --help)")
    try:
        factory = get_object(class_path(str(target)))
    except Exception as error:
        close = difflib.get_close_matches(str(target), [*CLASSES, *CLASSES.values()], n=1)
        hint = f"did you mean {close[0]!r}? Short names: " if close else "short names: "
        raise UserError(
            f"{place}._target_ is {target!r}, which cannot be imported: {error}; {hint}{', '.join(CLASSES)}"
        ) from error
    parameters = inspect.signature(factory).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in node:
        if name not in parameters and not name.startswith("_") and not takes_any:
            close = difflib.get_close_matches(name, list(parameters), n=1)
            hint = (
                f"did you mean {close[0]!r}?"
                if close
                else f"it takes {', '.join(p for p in parameters if p != 'space')}"
            )
            raise UserError(f"{place}.{name}: {target} takes no such argument; {hint}")
    wanted = {name: value for name, value in provided.items() if name in parameters}
    try:
        return instantiate({**node, "_target_": class_path(str(target))}, _convert_="all", **wanted)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):
            raise UserError(str(error.__cause__)) from error
        raise


def make_loggers(config: TrainConfig, run_dir: Path) -> list[Logger]:
    """Loggers chosen by ``logger=``, besides the CSV file."""
    return [
        component(f"logger.{name}", node, save_dir=str(run_dir / name), name=config.name)
        for name, node in config.logger.items()
    ]


def make_trainer(
    config: TrainConfig,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
    num_batches: int,
    run_dir: Path = Path(),
) -> Trainer:
    """The Lightning trainer of one fit."""
    settings = config.trainer
    for name in ("max_steps", "accumulate_grad_batches", "log_every_n_steps"):
        if getattr(settings, name) < 1:
            raise UserError(f"trainer.{name} is {getattr(settings, name)}; it must be at least 1")
    own = [component(f"callbacks.{name}", node, run_dir=str(run_dir)) for name, node in config.callbacks.items()]
    validates = settings.val_checks > 0
    return Trainer(
        max_steps=settings.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        precision=settings.precision,  # type: ignore[arg-type]
        gradient_clip_val=settings.gradient_clip_val,
        accelerator=settings.accelerator,
        devices=1,
        log_every_n_steps=settings.log_every_n_steps,
        val_check_interval=max(num_batches // settings.val_checks, 1) if validates else None,
        limit_val_batches=None if validates else 0,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, *own],
        logger=list(loggers),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **settings.extra,
    )


def device_of(config: TrainConfig) -> torch.device:
    """Return the device of evaluation: the one that training uses."""
    return torch.device(
        "cuda" if config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"
    )
