"""What a run makes of its ``prune`` group, told before it trains: settings without effect, and the rates of the masks.

The builders' last look at a configuration. Presets set more than every variant of them needs, so only what the user
named is worth a warning; that the live model is not cut, which is a matter of time and memory, is told in any case.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from atp.config.schema import TrainConfig
from atp.train.joint import PruningModule

log = logging.getLogger(__name__)


def tell_settings(config: TrainConfig, module: PruningModule, overrides: Sequence[str]) -> None:
    """Say what masks learn at in this run; warn of settings that the user named and this run ignores.

    Args:
        config: The typed configuration.
        module: What was made of it.
        overrides: The command line's overrides.
    """
    if rates := _rates(config, module):
        log.info(rates)
    named = {name.lstrip("+"): value for name, _, value in (override.partition("=") for override in overrides)}
    if module.uncut and config.prune.compact:
        log.log(
            logging.WARNING if "prune.compact" in named else logging.INFO,
            "prune.compact is ignored, the live model is not cut at the freeze: %s",
            module.uncut,
        )
    for name, why in ignored(config, module):
        if f"prune.{name}" in named:
            log.warning("prune.%s=%s is ignored: %s", name, named[f"prune.{name}"], why)


def _rates(config: TrainConfig, module: PruningModule) -> str:
    """What masks learn at, which presets may make depend on the run's length; empty for scores that are fixed."""
    prune, steps = config.prune, config.trainer.max_steps
    if not any(parameter.requires_grad for parameter in module.generator.parameters()):
        return ""
    rates = [f"generator_lr {prune.generator_lr:g}"]
    rates += [f"multiplier_lr {prune.multiplier_lr:g}"] if module.budget.multipliers() else []
    lasso = prune.lasso
    if lasso.weight or lasso.final_weight:
        last = f", {lasso.final_weight:g} from step {round(lasso.final_from * steps)}" if lasso.final_weight else ""
        rates.append(f"lasso {lasso.weight:g}{last}")
    return f"masks learn until step {module.schedule.freeze_step} of {steps}: {'; '.join(rates)}"


def ignored(config: TrainConfig, module: PruningModule) -> Iterator[tuple[str, str]]:
    """Names, below ``prune``, of settings without effect on this run, each with the reason."""
    prune, kinds = config.prune, {axis.kind for axis in module.space.axes}
    if not module.budget.multipliers():
        yield "multiplier_lr", f"{type(module.budget).__name__} has no Lagrange multipliers"
    if not any(parameter.requires_grad for parameter in module.generator.parameters()):
        yield "generator_lr", f"{type(module.generator).__name__} has nothing to train"
    for name, kind in (("min_heads", "heads"), ("min_channels", "channels")):
        if kind not in kinds:
            yield name, f"prune.space has no {kind}, so that all of them stay"
    if not kinds & {"channels", "hidden"}:
        yield "round_to", "prune.space has neither channels nor hidden"
    if prune.repair.batches < 1:
        yield from ((f"repair.{name}", "prune.repair.batches is 0") for name in ("at", "epochs", "lr"))
        if prune.warm_start.batches < 1:
            yield "repair.ridge", "prune.repair.batches is 0"
    elif prune.repair.epochs < 1:
        yield "repair.lr", "prune.repair.epochs is 0"
    if prune.warm_start.batches < 1:
        own = ("criterion", "ranking", "attention", "gain")
        yield from ((f"warm_start.{name}", "prune.warm_start.batches is 0") for name in own)
    if prune.progressive.cuts < 1:
        yield from ((f"progressive.{name}", "prune.progressive.cuts is 0") for name in ("below", "patience"))
    if not prune.lasso.final_weight:
        yield "lasso.final_from", "prune.lasso.final_weight is 0"
    if not prune.schedule.ramp:
        yield "schedule.shape", "prune.schedule.ramp is 0"
    if not prune.distill.hidden:
        yield "distill.until", "prune.distill.hidden is 0"
    if prune.budget_of == "parameters":
        yield "budget_context", "prune.budget_of is parameters, which no context changes"
    if prune.budget_of != "latency":
        yield "latency_table", f"prune.budget_of is {prune.budget_of}"
