"""What a run shows of itself while it trains: rates, gradients, memory, masks per layer, mask pictures.

Sits beside the other callbacks in the Lightning trainer. Scalars go with the figures that the module notes of a step,
so that every logger and the CSV file get the same names at the same steps; pictures of masks go to the loggers that can
show them and, as PNG and as data, into the run directory. Nothing here changes what is learnt. It knows the training
modules' public state; nothing of Hydra, stages or reports.

Shape suffixes: U units.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from atp.atomic import write_text
from atp.report.mask_picture import block_shares, mask_picture
from atp.train.joint import PruningModule
from atp.train.loggers import log_image, log_table
from atp.train.tuning import TuningModule

_MIB = 1024**2
_SHOWN_UNITS = 128  # units in a row; wider axes are pictured by the share kept in blocks


def is_due(trainer: Trainer, module: TuningModule, batch_idx: int) -> bool:
    """Whether a step just ended, and is one whose figures are logged."""
    return module.is_logged_step and (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class TrainingHealth(Callback):
    """Gradient norms before clipping and learning rates per parameter group, and memory held.

    Logged as ``grad_norm/<group>``, ``lr/<group>``, ``memory/process_mib`` and on a GPU ``memory/cuda_mib`` and
    ``memory/cuda_peak_mib``. Groups are those of the optimiser: ``lora``, ``generator``, ``multipliers``; a module that
    clips gradients apart notes further ones itself (``grad_norm/lasso``).
    """

    def __init__(self) -> None:
        self._norms: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take the norms while the gradients are there, at steps that will be logged."""
        self._norms = {}
        if not isinstance(pl_module, TuningModule) or not pl_module.is_logged_step:
            return
        for index, group in enumerate(optimizer.param_groups):
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if gradients:
                norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])
                self._norms[group.get("name", str(index))] = torch.linalg.vector_norm(norms)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log when due."""
        if not isinstance(pl_module, TuningModule) or not is_due(trainer, pl_module, batch_idx):
            return
        pl_module.figures |= {f"grad_norm/{name}": norm for name, norm in self._norms.items()}
        groups = trainer.optimizers[0].param_groups
        pl_module.figures |= {f"lr/{group.get('name', i)}": float(group["lr"]) for i, group in enumerate(groups)}
        memory = {"memory/process_mib": _resident_mib()}
        if pl_module.device.type == "cuda":
            memory["memory/cuda_mib"] = torch.cuda.memory_allocated(pl_module.device) / _MIB
            memory["memory/cuda_peak_mib"] = torch.cuda.max_memory_allocated(pl_module.device) / _MIB
        pl_module.figures |= {name: value for name, value in memory.items() if value}


class MaskMonitor(Callback):
    """Masks as figures at every logged step, and as pictures and data now and then.

    Figures: ``<kind>_kept/layer_<i>`` (units kept), ``mask/entropy`` (mean over units of the binary entropy of the
    keep probability, in bits; 0 is decided), ``mask/flips`` (units whose noise-free decision changed since the last
    logged step, per step), ``mask/sampled_flips`` (units whose drawn mask changed from one step to the next, mean over
    the steps since) and ``mask/temperature``.

    Pictures are taken before the first step, at most ``pictures`` times at logged steps until the masks are frozen,
    and at the freeze: ``figures/masks/<kind>_<step>.png``, a line each in the history file, and images and tables in
    the loggers.

    Args:
        folder: The run directory.
        history: JSON-lines file for the pictures' data; a resumed run goes on in it from its checkpoint's step.
        pictures: Most pictures between start and freeze.
    """

    def __init__(self, folder: Path, history: Path, pictures: int = 10) -> None:
        self.folder, self.history, self.pictures = folder, history, pictures
        self._decided_U: Tensor | None = None
        self._decided_at = 0
        self._drawn_U: Tensor | None = None
        self._drawn_flips: Tensor | float = 0.0
        self._drawn_steps = 0
        self._frozen_pictured = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Picture what training starts from."""
        if isinstance(pl_module, PruningModule):
            masks_U, sure_U = pl_module.mask_state()
            self._decided_U, self._decided_at = masks_U > 0.5, trainer.global_step
            self._frozen_pictured = trainer.global_step > 0 and pl_module.frozen
            if not self._forget_after(trainer) and not self._frozen_pictured:
                self._picture(trainer, pl_module, sure_U)

    def _forget_after(self, trainer: Trainer) -> bool:
        """Drop the history of steps that are about to be repeated; returns whether there is one up to here."""
        if not trainer.is_global_zero or not self.history.is_file():
            return False
        lines = self.history.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if 0 <= _step_of(line) <= trainer.global_step] if trainer.global_step else []
        write_text(self.history, "".join(f"{line}\n" for line in kept))
        return bool(kept)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count flips of drawn masks; log and picture when due."""
        if not isinstance(pl_module, PruningModule):
            return
        self._count_drawn(pl_module)
        step, frozen = trainer.global_step, pl_module.frozen
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        between = every * max(-(-pl_module.schedule.freeze_step // (every * max(self.pictures, 1))), 1)
        pictured = not self._frozen_pictured if frozen else step % between == 0
        if not is_due(trainer, pl_module, batch_idx) and not pictured:
            return
        masks_U, sure_U = pl_module.mask_state()
        if is_due(trainer, pl_module, batch_idx):
            pl_module.figures |= self._figures(pl_module, masks_U, sure_U, step)
        if pictured and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._picture(trainer, pl_module, sure_U)
            self._frozen_pictured = frozen

    def _count_drawn(self, module: PruningModule) -> None:
        drawn_U = None if module.sampled_U is None else module.sampled_U > 0.5
        if drawn_U is not None and self._drawn_U is not None:
            self._drawn_flips = self._drawn_flips + (drawn_U != self._drawn_U).sum()  # no wait for the device here
        self._drawn_steps += 1
        self._drawn_U = drawn_U

    def _figures(self, module: PruningModule, masks_U: Tensor, sure_U: Tensor, step: int) -> dict[str, float]:
        decided_U = masks_U > 0.5
        found: dict[str, float] = {"mask/entropy": float(binary_entropy(sure_U).mean())}
        if self._decided_U is not None and step > self._decided_at:
            found["mask/flips"] = float((decided_U != self._decided_U).sum()) / (step - self._decided_at)
        found["mask/sampled_flips"] = float(self._drawn_flips) / max(self._drawn_steps, 1)
        temperature = getattr(module.sampler, "temperature", None)
        if temperature is not None:
            found["mask/temperature"] = float(temperature)
        self._decided_U, self._decided_at = decided_U, step
        self._drawn_flips, self._drawn_steps = 0.0, 0
        kept = torch.stack([part.sum() for part in module.space.split(decided_U).values()]).tolist()  # one wait
        for axis, count in zip(module.space.axes, kept, strict=True):
            where = f"layer_{axis.layer:02d}" if axis.layer >= 0 else "all_layers"
            found[f"{axis.kind}_kept/{where}"] = float(count)
        return found

    def _picture(self, trainer: Trainer, module: PruningModule, sure_U: Tensor) -> None:
        if not trainer.is_global_zero:
            return
        step, rows = trainer.global_step, unit_rows(module.space.axes, module.space.split(sure_U))
        record: dict[str, Any] = {"step": step, "phase": module.phase.value, "kept": {}}
        for kind, by_layer in rows.items():
            wide = max(map(len, by_layer), default=0) > _SHOWN_UNITS
            shown = [block_shares(row) for row in by_layer] if wide else by_layer
            record["kept"][kind] = [[round(value, 4) for value in row] for row in shown]
            cell = f"a block of neighbouring {kind}" if wide else f"one of the {kind}"
            image = mask_picture(shown, f"{kind.replace('_', ' ')} kept by layer, step {step}")
            path = self.folder / "figures" / "masks" / f"{kind}_{step:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            caption = f"step {step}: rows are layers, a cell is {cell}, darker is likelier to stay"
            log_image(trainer.loggers, f"mask_picture/{kind}", image, step, caption)
            cells = [[layer, unit, value] for layer, row in enumerate(shown) for unit, value in enumerate(row)]
            log_table(trainer.loggers, f"mask_data/{kind}", ["layer", "block" if wide else "unit", "kept"], cells, step)
        self.history.parent.mkdir(parents=True, exist_ok=True)
        with self.history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _step_of(line: str) -> int:
    """Step of a line of the history; -1 for one that a kill has cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def unit_rows(axes: Sequence[Any], values: Mapping[str, Tensor]) -> dict[str, list[list[float]]]:
    """Values of units by kind: one row per layer, in layer order (an axis of no layer, at index -1, comes first)."""
    found: dict[str, dict[int, list[float]]] = {}
    for axis in axes:
        found.setdefault(axis.kind, {})[axis.layer] = [float(value) for value in values[axis.name].tolist()]
    return {
        kind: [rows.get(layer, []) for layer in range(min(0, *rows, 0), max(rows) + 1)] for kind, rows in found.items()
    }


def binary_entropy(probability_U: Tensor) -> Tensor:
    """Entropy of keep-or-cut in bits, [U]: 1 at one half, 0 where decided."""
    p_U = probability_U.double().clamp(0.0, 1.0)
    return -(torch.special.xlogy(p_U, p_U) + torch.special.xlogy(1 - p_U, 1 - p_U)) / torch.log(p_U.new_tensor(2.0))


def _resident_mib() -> float:
    """Resident memory of this process in MiB."""
    return psutil.Process().memory_info().rss / _MIB
