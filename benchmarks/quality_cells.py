"""One cell of the quality benchmark: a method at a sparsity, a rate and a seed, from base model to held-out loss.

Every cell runs the stages of an ordinary run (fit, removal, export, evaluation of the reloaded model), so all methods
share data, steps, adapters, budget, removal and measure. A finished cell is a JSON file and is not run again.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import seed_everything
from omegaconf import OmegaConf
from torch import Tensor

from atp.atomic import write_json
from atp.commands.train import compose_config
from atp.config.schema import TrainConfig
from atp.cut.removal import widths_after
from atp.cut.selection import select
from atp.evaluate.measure import count_parameters
from atp.evaluate.quality import evaluate
from atp.model.widths import build_model, pruned_config
from atp.run.directory import RunDirectory
from atp.run.parts import two_stage
from atp.run.stages import Stages
from atp.train.joint import PruningModule
from atp.train.tuning import TuningModule

REFERENCES = ("dense", "dense_lora", "scratch")
CONTROL = "shuffled"
_LEAST_SQUARES = ("prune.repair.batches=16", "prune.repair.epochs=0")
_BLOCKWISE = ("prune.repair.batches=64", "prune.repair.epochs=5")
_TAUGHT = ("prune.distill.hidden=10", "prune.distill.until=0.4")

ARMS: dict[str, tuple[str, ...]] = {
    "": (),
    "distill": ("prune.distill.logits=0.5",),
    "least_squares": _LEAST_SQUARES,
    "uncut": ("prune.compact=false",),
    "least_squares_distill": (*_LEAST_SQUARES, "prune.distill.logits=0.5"),
    "hidden": _TAUGHT,
    "least_squares_hidden": (*_LEAST_SQUARES, *_TAUGHT),
    "blockwise": _BLOCKWISE,
    "blockwise_hidden": (*_BLOCKWISE, *_TAUGHT),
    "throughout": ("prune.distill.hidden=10", "prune.distill.until=1"),
    "bare": ("prune.repair.batches=0", "prune.repair.epochs=0", "prune.distill.hidden=0", "prune.distill.logits=0"),
}
"""What may be added to any method, by name."""


@dataclass(frozen=True)
class Cell:
    """What is run.

    Attributes:
        setting: Name of the setting.
        sparsity: Fraction of block parameters removed; 0 for references that remove nothing.
        method: A preset of ``conf/prune``, one of :data:`REFERENCES`, or :data:`CONTROL`.
        arm: One of :data:`ARMS`.
        lr: Peak rate of the adapters.
        seed: Seed of everything random.
        steps: Optimiser steps; None keeps the setting's.
    """

    setting: str
    sparsity: float
    method: str
    arm: str
    lr: float
    seed: int
    steps: int | None = None

    @property
    def key(self) -> str:
        """File name of the cell."""
        parts = [self.setting, f"s{self.sparsity:g}", self.method, self.arm, f"lr{self.lr:g}", f"seed{self.seed}"]
        return "-".join(filter(None, [*parts, f"steps{self.steps}" if self.steps else ""]))

    def overrides(self, base: list[str]) -> list[str]:
        """The run's command line."""
        own = [f"optim.lr={self.lr}", f"seed={self.seed}", *ARMS[self.arm]]
        own += ["evaluate.reference=false", "evaluate.speed=false", "evaluate.samples=0", "trainer.val_checks=0"]
        if self.method not in (*REFERENCES, CONTROL):
            own.insert(0, f"prune={self.method}")
        if self.sparsity:
            own.append(f"prune.sparsity={self.sparsity}")
        if self.steps:
            own.append(f"trainer.max_steps={self.steps}")
        return [*base, *own]


class ShuffledStages(Stages):
    """Stages whose warm start puts given masks in the place of importance."""

    masks_U: Tensor

    def _warm_start(self, module: PruningModule) -> None:
        module.generator.warm_start(self.masks_U)


def run_cell(cell: Cell, base: list[str], folder: Path, *, masks_of: Cell | None = None) -> dict[str, Any]:
    """Run a cell, or read its result if the same run has finished before.

    Args:
        cell: What to run.
        base: Overrides of its setting.
        folder: The benchmark's folder.
        masks_of: With :data:`CONTROL`, the finished cell whose masks are shuffled within each layer and kind.
    """
    overrides = cell.overrides(base)
    path = folder / "cells" / f"{cell.key}.json"
    if path.is_file():
        result = dict(json.loads(path.read_text(encoding="utf-8")))
        if result["overrides"] == overrides:
            return result
    work = folder / "work" / cell.key
    shutil.rmtree(work, ignore_errors=True)
    cfg = compose_config([*overrides, f"run_dir='{work}'"])
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, TrainConfig)
    if cell.method == CONTROL:
        config = two_stage(config, "random")
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    plain.pop("run_dir")
    seed_everything(cell.seed, workers=True, verbose=False)
    kind = ShuffledStages if cell.method == CONTROL else Stages
    stages = kind(config, RunDirectory(work, plain, overrides, resume=True), plain, {})
    if isinstance(stages, ShuffledStages):
        assert masks_of is not None
        stages.masks_U = shuffled(folder / "cells" / f"{masks_of.key}.masks.json", stages, cell.seed)
    started = time.perf_counter()
    result = _references(cell, stages) if cell.method in REFERENCES else _pruned(stages)
    result |= {"cell": asdict(cell), "overrides": overrides, "seconds": round(time.perf_counter() - started, 2)}
    path.parent.mkdir(parents=True, exist_ok=True)
    if (work / "masks.json").is_file():
        shutil.copyfile(work / "masks.json", folder / "cells" / f"{cell.key}.masks.json")
    write_json(path, result)
    shutil.rmtree(work, ignore_errors=True)
    return result


def shuffled(path: Path, stages: Stages, seed: int) -> Tensor:
    """Masks [U] read from a file, permuted within each layer and kind: the widths stay, the choice goes."""
    axes = json.loads(path.read_text(encoding="utf-8"))["axes"]
    draw = torch.Generator().manual_seed(seed)
    parts = [torch.tensor(axes[axis.name], dtype=torch.float32) for axis in stages.space.axes]
    return torch.cat([part[torch.randperm(len(part), generator=draw)] for part in parts])


def _pruned(stages: Stages) -> dict[str, Any]:
    """Fit, cut, export, and score the reloaded model."""
    started = time.perf_counter()
    stages.fit_jointly()
    fitted = time.perf_counter() - started
    export = stages.remove_and_export()
    model = stages.pruned()
    masks = json.loads((stages.directory.path / "masks.json").read_text(encoding="utf-8"))["axes"]
    return {
        **_score(stages, model),
        "fit_seconds": round(fitted, 2),
        "sparsity": export["sparsity"],
        "at_freeze": export["at_freeze"],
        "parameters": export["parameters"],
        "blocks": export["pruned_blocks"],
        "max_abs_logit_diff": export["max_abs_logit_diff"],
        "masks": hashlib.sha256(json.dumps(masks, sort_keys=True).encode()).hexdigest()[:16],
        "widths": {name: int(sum(bits)) for name, bits in masks.items()},
    }


def _references(cell: Cell, stages: Stages) -> dict[str, Any]:
    """Dense, dense with adapters, or a small model of the same budget at equal widths trained from nothing."""
    started = time.perf_counter()
    model = stages.dense()
    sparsity = 0.0
    if cell.method == "dense_lora":
        stages.tune("dense_lora", model)  # the adapters end up merged into the model itself
    elif cell.method == "scratch":
        masks_U = select(stages.space, torch.zeros(stages.space.num_units), cell.sparsity, shape="uniform")
        sparsity = float(stages.space.sparsity(masks_U.double()))
        config = pruned_config(stages.base_config, widths_after(stages.space, masks_U))
        model = build_model(config, dtype=torch.float32, initialize=True)
        optim = stages.config.optim
        module = TuningModule(
            model,
            total_steps=stages.config.trainer.max_steps,
            lr=cell.lr,
            warmup=optim.warmup,
            min_lr_ratio=optim.min_lr_ratio,
            seed=cell.seed,
        )
        stages._fit("scratch", module)
    fitted = time.perf_counter() - started
    size = {"parameters": count_parameters(model), "sparsity": sparsity}
    return {**_score(stages, model), "fit_seconds": round(fitted, 2), **size}


def _score(stages: Stages, model: Any) -> dict[str, Any]:
    """Held-out and validation loss in nats per token, and whatever else the test records give."""
    values = stages.evaluate_model(model)["values"]
    validation = evaluate(
        model,
        stages.tokenizer,
        stages.splits.validation,
        max_length=stages.config.data.max_length,
        batch_size=stages.config.evaluate.batch_size,
        max_generate=0,
        device=stages.device,
    )
    return {
        "loss": math.log(values["perplexity"]),
        "validation_loss": math.log(validation.values["perplexity"]),
        "values": values,
    }
