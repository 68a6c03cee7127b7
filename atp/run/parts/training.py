"""Training modules: masks and adapters over a base model, plain LoRA, and the two-stage baselines.

The builders' training side. It turns the ``prune``, ``lora`` and ``optim`` groups into the plain arguments of
:mod:`atp.train.joint` and what that is made of; it knows nothing of data or of the trainer.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from pydoc import locate
from typing import Any

from transformers import PreTrainedModel

from atp.config.names import class_path
from atp.config.prune import LassoConfig, PruneConfig, ScheduleConfig, WarmStartConfig
from atp.config.schema import TrainConfig
from atp.cut.progressive import ProgressiveCut
from atp.cut.selection import check_reachable
from atp.errors import UserError
from atp.masks.budget import SparsitySchedule
from atp.masks.generator import Generator
from atp.masks.lora import MaskedModel, add_lora
from atp.prepare.baselines import BASELINES, CALIBRATION_BATCHES, check_baselines
from atp.prepare.blockwise import Repair
from atp.run.parts.base import load_base
from atp.run.parts.components import component
from atp.space.cost import make_cost
from atp.space.space import PruningSpace
from atp.space.units import CostModel
from atp.train.aware import AwareModule
from atp.train.distillation import Distillation
from atp.train.joint import PruningModule
from atp.train.tuning import TuningModule


def pruning_space(config: PruneConfig, model: PreTrainedModel) -> PruningSpace:
    """The space of a model, with the target checked to be reachable in it."""
    space = PruningSpace.from_model(model, config.space, config.protect_layers)
    space.cost = cost_model(config, model)
    check_reachable(space, config.sparsity, min_units(config), round_to=config.round_to)
    return space


def check_start(prune: PruneConfig) -> None:
    """Refuse a start that cannot be made, before a model is loaded.

    Raises:
        ValueError: The generator takes no scores, or there are none to select by.
    """
    measured = prune.warm_start.batches > 0
    generator = locate(class_path(str(prune.generator.get("_target_", ""))))
    if measured and isinstance(generator, type) and issubclass(generator, Generator):
        generator.check_warm_start()
    if prune.repair.batches > 0 and prune.repair.at == "start" and not measured:
        raise UserError(
            "prune.repair.at is start, but there are no scores to select by before the first step; set "
            "prune.warm_start.batches above 0, or prune.repair.at=freeze"
        )


def cost_model(config: PruneConfig, model: PreTrainedModel) -> CostModel:
    """What the budget counts.

    Raises:
        ValueError: An unknown cost, or a context below 1.
    """
    table = Path(config.latency_table) if config.latency_table else None
    return make_cost(config.budget_of, context=config.budget_context, model=model, table=table)


def min_units(config: PruneConfig) -> dict[str, int]:
    """Units that every layer keeps."""
    for name, value in (("min_heads", config.min_heads), ("min_channels", config.min_channels)):
        if value < 0:
            raise UserError(f"prune.{name} is {value}; it is a number of units and cannot be negative")
    return {"heads": config.min_heads, "channels": config.min_channels}


def pruning_module(config: TrainConfig, model: PreTrainedModel) -> PruningModule:
    """Masks and adapters over a base model, ready to train."""
    prune = config.prune
    space = pruning_space(prune, model)
    schedule = SparsitySchedule.from_fractions(
        prune.sparsity,
        config.trainer.max_steps,
        warmup=prune.schedule.warmup,
        ramp=prune.schedule.ramp,
        freeze_at=prune.schedule.freeze_at,
        shape=prune.schedule.shape,
    )
    masked = MaskedModel(_with_lora(config, model), space)
    lasso = prune.lasso
    aware: dict[str, Any] = {
        "update": prune.update,
        "lora_aware": prune.lora_aware,
        "lasso": lasso.weight,
        "final_lasso": lasso.final_weight,
        "final_from": lasso.final_from,
    }
    is_plain = prune.update == "joint" and not prune.lora_aware and not lasso.weight and not lasso.final_weight
    make: Any = PruningModule if is_plain else functools.partial(AwareModule, **aware)
    module: PruningModule = make(
        masked,
        component("prune.generator", prune.generator, space=space),
        component("prune.sampler", prune.sampler),
        component("prune.budget", prune.budget),
        schedule,
        generator_lr=prune.generator_lr,
        multiplier_lr=prune.multiplier_lr,
        shape=prune.shape,
        min_units=min_units(prune),
        compaction=prune.compact and config.model.quantization is None,
        progressive=_progressive(prune, space) if config.model.quantization is None else None,
        repair=make_repair(prune),
        repair_at=prune.repair.at,
        round_to=prune.round_to,
        gates=prune.gates,
        distill=_distillation(config),
        dense=functools.partial(load_base, config.model) if config.model.quantization is None else None,
        **_tuning(config),
    )
    return module


def make_repair(prune: PruneConfig) -> Repair:
    """How cuts of the run, and of its two-stage baselines, are repaired."""
    return Repair(ridge=prune.repair.ridge, epochs=prune.repair.epochs, lr=prune.repair.lr)


def _progressive(prune: PruneConfig, space: PruningSpace) -> ProgressiveCut | None:
    cut = prune.progressive
    if not cut.cuts:
        return None
    return ProgressiveCut(space.num_units, cuts=cut.cuts, below=cut.below, patience=cut.patience)


def tuning_module(config: TrainConfig, model: PreTrainedModel, teacher: PreTrainedModel | None = None) -> TuningModule:
    """Plain LoRA over a model, distilled as the pruned model is where a teacher is given."""
    distill = _distillation(config) if teacher is not None else Distillation()
    return TuningModule(_with_lora(config, model), distill=distill, teacher=teacher, **_tuning(config))


def _distillation(config: TrainConfig) -> Distillation:
    own = config.prune.distill
    return Distillation(logits=own.logits, hidden=own.hidden, until=own.until)


def is_distilled(config: TrainConfig) -> bool:
    """Whether pruned models learn from the dense base too."""
    return bool(_distillation(config))


def two_stage(config: TrainConfig, name: str) -> TrainConfig:
    """The run's configuration with its method replaced by the two-stage baseline of that name.

    Raises:
        ValueError: An unknown baseline.
    """
    check_baselines([name])
    baseline = BASELINES[name]
    prune = replace(
        config.prune,
        name=name,
        gates="binary",
        update="joint",
        lora_aware=False,
        lasso=LassoConfig(),
        shape=baseline.shape,
        generator={"_target_": "fixed_scores"},
        sampler={"_target_": "threshold"},
        budget={"_target_": "projection"},
        warm_start=WarmStartConfig(
            batches=CALIBRATION_BATCHES, criterion=[baseline.criterion], ranking=baseline.ranking
        ),
        schedule=ScheduleConfig(warmup=0.0, ramp=0.0, freeze_at=0.0),
    )
    return replace(config, prune=prune)


def _with_lora(config: TrainConfig, model: PreTrainedModel) -> Any:
    lora = config.lora
    peft_model = add_lora(model, r=lora.r, alpha=lora.alpha, dropout=lora.dropout, target_modules=lora.target_modules)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return peft_model


def _tuning(config: TrainConfig) -> dict[str, Any]:
    optim = config.optim
    return {
        "total_steps": config.trainer.max_steps,
        "lr": optim.lr,
        "weight_decay": optim.weight_decay,
        "warmup": optim.warmup,
        "min_lr_ratio": optim.min_lr_ratio,
        "seed": config.seed,
        "base_id": config.model.path or "",
        "compile_model": config.trainer.compile,
    }
