"""What the configuration names by ``_target_``, and the Lightning trainer.

Generator, sampler, budget, loggers and callbacks are instantiated here and nowhere else. It knows nothing of models or
data.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from atp.config.names import CLASSES, class_path
from atp.config.schema import TrainConfig
from atp.errors import UserError

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")
_OURS = {  # arguments of Lightning's trainer that a run sets -> where their value comes from
    **{name: f"trainer.{name}" for name in ("max_steps", "accumulate_grad_batches", "precision")},
    **{name: f"trainer.{name}" for name in ("gradient_clip_val", "accelerator", "log_every_n_steps")},
    **dict.fromkeys(("max_epochs", "min_epochs", "min_steps"), "trainer.max_steps"),
    **dict.fromkeys(("max_time", "fast_dev_run", "overfit_batches", "limit_train_batches"), "trainer.max_steps"),
    **dict.fromkeys(("val_check_interval", "limit_val_batches", "num_sanity_val_steps"), "trainer.val_checks"),
    "check_val_every_n_epoch": "trainer.val_checks",
    "callbacks": "callbacks",
    **dict.fromkeys(("logger", "enable_autolog_hparams"), "logger"),
    "enable_checkpointing": "trainer.checkpoint_every_n_steps",
}
_ONE_DEVICE = ("devices", "num_nodes", "strategy", "sync_batchnorm", "use_distributed_sampler")
_OWN_OUTPUT = ("enable_progress_bar", "enable_model_summary", "barebones")
_REFUSALS = (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError, KeyError, AttributeError)


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name nearest to a mistaken one, and all of them."""
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


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
        cause = error.__cause__
        if isinstance(cause, ValueError):
            raise UserError(str(cause)) from error
        if isinstance(cause, (TypeError, ImportError, OSError, MisconfigurationException)):
            raise UserError(f"{place}: {target} cannot be made: {first_line(cause)}") from error
        raise


def first_line(error: BaseException) -> str:
    """The first line of a library's message, for one of ours; the error's name where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def make_loggers(config: TrainConfig, run_dir: Path) -> list[Logger]:
    """Loggers chosen by ``logger=``, besides the CSV file."""
    alone()
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
    own = [component(f"callbacks.{name}", node, run_dir=str(run_dir)) for name, node in config.callbacks.items()]
    validates = config.trainer.val_checks > 0
    return _trainer(
        config,
        val_check_interval=max(num_batches // config.trainer.val_checks, 1) if validates else None,
        limit_val_batches=None if validates else 0,
        callbacks=[*callbacks, *own],
        logger=list(loggers),
    )


def try_trainer(config: TrainConfig) -> None:
    """Build a trainer and drop it, so that what Lightning refuses is known before anything is loaded.

    Raises:
        UserError: Lightning's reason, with the settings it was given.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # told when the run's own is built
        _trainer(config, logger=False)


def check_extra(extra: Mapping[str, Any]) -> None:
    """Refuse arguments of ``trainer.extra`` that a run sets itself, or that Lightning's trainer does not have.

    Raises:
        UserError: The argument, and the setting to use instead or the nearest argument.
    """
    known = list(inspect.signature(Trainer.__init__).parameters)[1:]
    free = [name for name in known if name not in (*_OURS, *_ONE_DEVICE, *_OWN_OUTPUT)]
    for name in extra:
        if name in _OURS:
            raise UserError(f"trainer.extra.{name}: a run sets this itself; use {_OURS[name]}")
        if name in _ONE_DEVICE:
            raise UserError(
                f"trainer.extra.{name}={extra[name]}: a run takes one device; leave it out. Runs side by side, one per "
                "GPU, are a sweep: -m hydra/launcher=joblib"
            )
        if name in _OWN_OUTPUT:
            raise UserError(f"trainer.extra.{name}: a run prints its own progress; leave it out")
        if name not in known:
            raise UserError(f"trainer.extra.{name}: lightning.Trainer has no such argument; {nearest(name, free)}")


def _trainer(config: TrainConfig, **arguments: Any) -> Trainer:
    """A trainer on one device, with Lightning's complaints in our words."""
    settings = config.trainer
    extra = dict(settings.extra)
    given = ", ".join(f"{name}={value}" for name, value in extra.items())
    plugins = extra.pop("plugins", None) or []
    alone()
    try:
        return Trainer(
            max_steps=settings.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=settings.accumulate_grad_batches,
            precision=settings.precision,  # type: ignore[arg-type]
            gradient_clip_val=settings.gradient_clip_val,
            accelerator=device_of(config).type,
            devices=1,
            log_every_n_steps=settings.log_every_n_steps,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            plugins=[*(plugins if isinstance(plugins, list) else [plugins]), LightningEnvironment()],
            **arguments,
            **extra,
        )
    except _REFUSALS as error:
        what = f"trainer.extra ({given})" if given else "trainer"
        raise UserError(f"{what}: lightning refuses this: {first_line(error)}; change it or leave it out") from error


def alone() -> None:
    """Let Lightning know that this process is the only one, whatever a scheduler has left in the environment.

    A rank above zero, as ``SLURM_PROCID`` or ``RANK`` would give it, keeps loggers from writing.
    """
    rank_zero_only.rank = 0  # type: ignore[attr-defined]


def device_of(config: TrainConfig) -> torch.device:
    """Return the device of evaluation: the one that training uses."""
    return torch.device(
        "cuda" if config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"
    )
