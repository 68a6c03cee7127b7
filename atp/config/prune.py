"""The schema of the ``prune`` group: what is cut, how masks are made and sampled, the start, the repair, the schedule.

:mod:`atp.config.schema` includes this group beside the others. The code that uses a value checks its range.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from atp.config.option import option


@dataclass
class ScheduleConfig:
    """Lengths of warm-up and ramp, and the time of the freeze, as fractions of the run."""

    warmup: float = option(0.05, "tune adapters only")
    ramp: float = option(0.25, "raise the target sparsity from zero")
    freeze_at: float = option(0.4, "fix the masks; the rest tunes adapters on the small architecture")
    shape: str = option("cubic", "how the target rises: linear or cubic")


@dataclass
class WarmStartConfig:
    """Importance of the dense model's units: learnt scores start from it, fixed scores are it."""

    batches: int = option(0, "training batches to measure it on; 0 starts from the generator's own initialisation")
    criterion: list[str] = option(
        ["fisher"],
        "importance: fisher, taylor, wanda, fluctuation, magnitude or random; a+b joins two; of several in the list "
        "the one whose repaired cut loses least",
    )
    attention: list[float] = option(
        [0.0], "added to the starting logits of attention units; of several, the best likewise"
    )
    ranking: str = option(
        "layer",
        "compare units by: layer (standardised log), zscore (standardised), centred (less its mean: fluctuation) or "
        "global (raw, across layers)",
    )
    gain: float = option(1.0, "standard deviation of the starting logits within a layer")


@dataclass
class RepairConfig:
    """Repair of the cut: o_proj and down_proj by least squares and, with epochs, all kept weights, layer by layer."""

    batches: int = option(0, "calibration batches; 0 for none")
    at: str = option("freeze", "when: freeze, or start, for what warm-started scores select before the first step")
    ridge: float = option(1e-3, "pull towards the present weights, relative to the inputs' mean square")
    epochs: int = option(0, "passes over the batches in which each layer learns the dense layer's output; 0 for none")
    lr: float = option(0.05, "peak learning rate in them, relative to a weight's root mean square")


@dataclass
class DistillConfig:
    """Learning from the dense base; off at zero."""

    logits: float = option(0.0, "weight of its next-token distribution in the task loss, 0 to 1")
    hidden: float = option(0.0, "weight of the squared distance from its hidden states; falls linearly to zero")
    until: float = option(1.0, "fraction of the run over which it falls; every step until then asks the dense base")


@dataclass
class ProgressiveConfig:
    """Cuts before the freeze, of units that are as good as decided; off at zero."""

    cuts: int = option(0, "cuts between warm-up and freeze, evenly spaced; 0 cuts at the freeze alone")
    below: float = option(0.02, "keep probability that counts as negligible")
    patience: int = option(10, "optimiser steps in a row for which it must be")


@dataclass
class LassoConfig:
    """Group lasso on the LoRA rows and columns of pruned units (ATP); off at zero."""

    weight: float = option(0.0, "factor on its gradient")
    final_weight: float = option(0.0, "factor in the last part of the run, which drives pruned rows to zero")
    final_from: float = option(0.5, "where the last part begins, as a fraction of the run")


@dataclass
class PruneConfig:
    """What is pruned and how the decision is learnt: generator x sampler x budget."""

    name: str = option("l0", "short name for reports")
    sparsity: float = option(0.5, "fraction of decoder-block parameters to remove, in (0, 1)")
    space: list[str] = option(
        ["heads", "channels"], "unit kinds: heads, query_heads, channels, qk_pairs, value_dims, hidden"
    )
    shape: str = option("per_layer", "per_layer, or uniform: equal widths in every layer")
    round_to: int = option(1, "kept FFN channels and hidden dimensions are multiples of this")
    budget_of: str = option("parameters", "what sparsity counts: parameters, macs, latency (measured here) or memory")
    latency_table: str | None = option(None, "file of measured latencies; unset measures them once per run")
    budget_context: int = option(1024, "tokens in the key-value cache, for a budget of macs, latency or memory")
    protect_layers: list[int] = option([], "layers of which nothing is pruned; negative ones count from the end")
    min_heads: int = option(1, "KV heads every layer keeps; 0 lets attention blocks vanish")
    min_channels: int = option(1, "FFN channels every layer keeps; 0 lets FFN blocks vanish")
    generator: dict[str, Any] = option({}, "how scores are made (config group prune/generator)")
    sampler: dict[str, Any] = option({}, "scores to masks (config group prune/sampler)")
    budget: dict[str, Any] = option({}, "what drives sparsity to the target (config group prune/budget)")
    gates: str = option(
        "binary", "factors of kept units: binary (none), soft (kept as learnt) or calibrated (train after the freeze)"
    )
    update: str = option("joint", "joint: masks and adapters in one pass; alternate: masks on a batch of their own")
    lora_aware: bool = option(False, "mask the frozen weights only while training; evaluation masks both")
    lasso: LassoConfig = field(default_factory=LassoConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    repair: RepairConfig = field(default_factory=RepairConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    compact: bool = option(
        True, "cut the live model once masks are frozen: later steps cost what the small model costs"
    )
    progressive: ProgressiveConfig = field(default_factory=ProgressiveConfig)
    generator_lr: float = option(0.01, "peak learning rate of the generator")
    multiplier_lr: float = option(1.0, "ascent rate of Lagrange multipliers; ignored by budgets without any")
