"""What is wrong with a run's settings, found before anything is loaded.

The first thing a run does with its configuration. What a library would throw hours later, or in its own words, is said
here in one line that names our setting and the way out. Ranges and words that a room checks as it is built, before the
first step, are checked there alone. It knows settings and this machine, no models and no data.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from atp.config.schema import TrainConfig
from atp.data.tasks import NORMALISATIONS
from atp.errors import UserError
from atp.run.parts.base import DTYPES
from atp.run.parts.components import PRECISIONS, check_extra, device_of, nearest, try_trainer

log = logging.getLogger(__name__)

_NO_LIMIT = math.inf
_RANGES: dict[str, tuple[float, float]] = {  # lowest and highest value; null passes
    "seed": (0, 2**32 - 1),
    "threads": (1, 1024),
    **dict.fromkeys(("data.max_train", "data.max_validation", "data.max_test", "data.num_workers"), (0, _NO_LIMIT)),
    **dict.fromkeys(("data.validation_fraction", "data.test_fraction"), (0, 0.99)),
    **dict.fromkeys(("optim.lr", "optim.weight_decay", "trainer.gradient_clip_val"), (0, _NO_LIMIT)),
    **dict.fromkeys(("optim.warmup", "optim.min_lr_ratio"), (0, 1)),
    **dict.fromkeys(("data.batch_size", "trainer.max_steps", "trainer.accumulate_grad_batches"), (1, _NO_LIMIT)),
    **dict.fromkeys(("trainer.log_every_n_steps", "trainer.checkpoint_every_n_steps"), (1, _NO_LIMIT)),
    "trainer.val_checks": (0, _NO_LIMIT),
    **dict.fromkeys(("evaluate.batch_size", "evaluate.max_new_tokens", "evaluate.stride"), (1, _NO_LIMIT)),
    **dict.fromkeys(("evaluate.max_generate", "evaluate.samples", "evaluate.bootstrap"), (0, _NO_LIMIT)),
    **dict.fromkeys(
        ("evaluate.speed_prompt_tokens", "evaluate.speed_new_tokens", "evaluate.speed_repeats", "export.verify_tokens"),
        (1, _NO_LIMIT),
    ),
    **dict.fromkeys(("prune.generator_lr", "prune.multiplier_lr", "prune.warm_start.gain"), (0, _NO_LIMIT)),
    **dict.fromkeys(
        ("prune.warm_start.batches", "prune.repair.batches", "prune.progressive.cuts", "prune.lasso.weight"),
        (0, _NO_LIMIT),
    ),
    "prune.lasso.final_weight": (0, _NO_LIMIT),
    "prune.progressive.patience": (1, _NO_LIMIT),
    **dict.fromkeys(("prune.progressive.below", "prune.lasso.final_from"), (0, 1)),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": tuple(DTYPES),
    "trainer.precision": PRECISIONS,
    "trainer.accelerator": ("auto", "cpu", "gpu"),
    "evaluate.normalise": ("task", *NORMALISATIONS),
}
_ALSO = {"trainer.precision": ("32", "bf16", "16"), "trainer.accelerator": ("cuda",)}  # other names, which work too
_FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
ATTENTION = ("sdpa", "eager", *_FLASH)


def check_values(config: TrainConfig) -> None:
    """Refuse values that no machine takes.

    Args:
        config: The typed configuration.

    Raises:
        UserError: The setting, its value, and what it may be.
    """
    values = dict(_flat(config))
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} is {value}; it must be a finite number")
    for name, (low, high) in _RANGES.items():
        if values[name] is not None and not low <= values[name] <= high:
            wanted = f"at least {low:g}" if high == _NO_LIMIT else f"between {low:g} and {_shown(high)}"
            raise UserError(f"{name} is {values[name]}; it must be {wanted}")
    for name, known in _CHOICES.items():
        if values[name] not in (*known, *_ALSO.get(name, ())):
            raise UserError(f"{name} is {values[name]!r}; {nearest(values[name], known)}")
    if config.model.attn_implementation not in ATTENTION:
        raise UserError(
            f"model.attn_implementation is {config.model.attn_implementation!r}; "
            f"{nearest(config.model.attn_implementation, ATTENTION)}"
        )
    check_extra(config.trainer.extra)
    _check_metric(config)


def _check_metric(config: TrainConfig) -> None:
    """Refuse a model's figure that this run does not have, which would be found out at its end."""
    group, _, rest = config.optimized_metric.partition(".")
    model, _, figure = rest.partition(".")
    evaluate = config.evaluate
    models = ["dense", "pruned", *(["dense_lora"] if evaluate.reference else []), *evaluate.baselines]
    if group == "eval" and (model not in models or not figure):
        raise UserError(
            f"optimized_metric is {config.optimized_metric!r}; this run has eval.<model>.<figure> of the models "
            f"{', '.join(models)}, as eval.pruned.perplexity"
        )


def check_machine(config: TrainConfig) -> None:
    """Refuse what this machine cannot do, and tell what of its environment a run does not follow.

    Not for the machine that only hands out a sweep's jobs.

    Args:
        config: The typed configuration, with values that :func:`check_values` has passed.

    Raises:
        UserError: The setting, what the machine lacks, and the way out.
    """
    device = device_of(config)
    if config.trainer.accelerator in ("gpu", "cuda") and device.type != "cuda":
        raise UserError(
            f"trainer.accelerator={config.trainer.accelerator}, but {_no_gpu()}; "
            "take trainer.accelerator=cpu, or auto for whatever there is"
        )
    if config.trainer.precision in ("16-mixed", "16") and device.type != "cuda":
        raise UserError(
            f"trainer.precision={config.trainer.precision} needs a GPU, and this run is on the CPU; "
            "take trainer.precision=32-true or bf16-mixed"
        )
    emulates = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if emulates and config.trainer.precision.startswith("bf16"):
        log.warning("trainer.precision=%s: this GPU emulates bfloat16, slowly", config.trainer.precision)
    _check_attention(config.model.attn_implementation, device)
    _tell_processes(os.environ)
    try_trainer(config)


def _check_attention(name: str, device: torch.device) -> None:
    package = _FLASH.get(name)
    if package is None:
        return
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"model.attn_implementation={name} needs the package {package.replace('_', '-')}, which is not installed; "
            "install it, or take model.attn_implementation=sdpa"
        )
    if device.type != "cuda":
        raise UserError(
            f"model.attn_implementation={name} needs a GPU, and this run is on the CPU; "
            "take model.attn_implementation=sdpa"
        )


def _tell_processes(environment: Mapping[str, str]) -> None:
    """A run is one process; what a scheduler or launcher has left in the environment for more is not followed."""
    several = {
        name: environment[name]
        for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "WORLD_SIZE")
        if environment.get(name, "1") not in ("", "0", "1")
    }
    if several:
        told = ", ".join(f"{name}={value}" for name, value in several.items())
        log.warning("%s in the environment is ignored: a run is one process on one device", told)


def _no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "the installed torch is built for CPUs alone"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "torch finds no GPU here" + (f" (CUDA_VISIBLE_DEVICES={visible!r})" if visible is not None else "")


def _shown(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else f"{number:g}"


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for item in fields(node):
        value, name = getattr(node, item.name), f"{prefix}{item.name}"
        if is_dataclass(value):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value
