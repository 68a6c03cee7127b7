"""What happens to a module before its first step: starting scores, repair of the cut, the cut of two-stage baselines.

Sits between the builders, which make modules, and the stages, which train them. Everything here reads the training
batches set aside for calibration. It knows nothing of Hydra, of checkpoints or of what a run writes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from atp.atomic import appearing
from atp.config.prune import WarmStartConfig
from atp.config.schema import TrainConfig
from atp.cut.removal import remove
from atp.data.batches import PruningDataModule
from atp.errors import UserError
from atp.masks.generator import FixedScores
from atp.masks.merging import base_tensors, merged_tensors
from atp.prepare.blockwise import repair
from atp.prepare.starts import Start, starting_scores
from atp.run import parts
from atp.run.stopwatch import Stopwatch
from atp.train.joint import PruningModule

log = logging.getLogger(__name__)


class Preparation:
    """Prepares modules on the calibration batches of a run.

    Args:
        config: The typed configuration.
        data: The run's data.
        device: Where modules are prepared.
        watch: Told which part of a run is under way: importance, choice, reconstruction.
    """

    def __init__(
        self, config: TrainConfig, data: PruningDataModule, device: torch.device, watch: Stopwatch | None = None
    ) -> None:
        self.config, self.data, self.device = config, data, device
        self.watch = watch or Stopwatch()

    def batches(self, count: int) -> Iterator[dict[str, Tensor]]:
        """The first calibration batches, on the device; no more than the training data holds."""
        return to_device(self.data.calibration_dataloader(count), self.device)

    def calibration(self) -> Iterator[dict[str, Tensor]]:
        """The batches that cuts are repaired on."""
        return self.batches(self.config.prune.repair.batches)

    def warm_start(self, module: PruningModule, settings: WarmStartConfig) -> Start | None:
        """Let the generator begin with the importance of the dense model's units.

        Returns:
            What it begins with, and the fits where least squares on just their batches repairs the cut; None where
            settings ask for no importance.

        Raises:
            ValueError: No batches for scores that come from importance alone.
        """
        if settings.batches < 1:
            if isinstance(module.generator, FixedScores):
                raise UserError("prune.warm_start.batches is 0, but fixed scores come from importance; set it above 0")
            return None
        module.generator.check_warm_start()
        with self.watch.part("data"):
            self.data.setup("fit")
            batches = list(self.batches(settings.batches))
        repair = self.config.prune.repair
        start = starting_scores(
            module.masked.to(self.device),
            batches,
            module.selected,
            criteria=settings.criterion,
            ranking=settings.ranking,
            gain=settings.gain,
            attention=settings.attention,
            ridge=repair.ridge,
            seed=self.config.seed,
            moments=repair.batches if repair.epochs == 0 and repair.batches <= len(batches) else 0,
            part=self.watch.part,
        )
        module.generator.warm_start(start.scores_U)
        reused = repair.epochs == 0 and start.fits_of == repair.batches
        return start if reused else replace(start, fits=None)  # large, and of no use to what follows

    def repair_start(self, module: PruningModule, start: Start | None = None) -> None:
        """Repair the cut that the starting scores select.

        Args:
            module: The module, warm-started.
            start: What it was started with, whose fits need not be made again.

        Raises:
            ValueError: No starting scores to select by.
        """
        if self.config.prune.warm_start.batches < 1:
            raise UserError(
                "prune.repair.at is start, but there are no scores to select by before the first step; set "
                "prune.warm_start.batches above 0, or prune.repair.at=freeze"
            )
        log.info("repair: fitting what the starting scores select to the dense layers")
        module.masked.to(self.device)
        module.repair_start(start.fits if start else None)

    def cut(self, module: PruningModule, base_config: PreTrainedConfig, start: Start | None = None) -> PreTrainedModel:
        """The smaller model that a module's scores select, repaired as the run's own is."""
        module.freeze_masks()
        masks_U = module.final_masks_U.cpu()
        prune = self.config.prune
        if prune.repair.batches > 0:
            masked, masks = module.masked.to(self.device), module.final_masks_U.to(self.device)
            with self.watch.part("reconstruction"):
                repair(masked, masks, self.calibration, parts.make_repair(prune), start.fits if start else None)
        return remove(merged_tensors(module.masked.peft_model), base_config, module.space, masks_U)


def to_device(batches: Iterable[Mapping[str, Tensor]], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The batches, moved one at a time."""
    for batch in batches:
        yield {key: value.to(device) for key, value in batch.items()}


def write_cut(file: Path, model: PreTrainedModel, module: PruningModule) -> None:
    """Save a two-stage cut, whole or not at all, with the state of the random generator that tuning starts from."""
    state = {"masks_U": module.final_masks_U.cpu(), "model": model.state_dict(), "random": torch.get_rng_state()}
    with appearing(file) as stage:
        torch.save(state, stage)


def read_cut(file: Path, module: PruningModule, base_config: PreTrainedConfig) -> PreTrainedModel:
    """The cut that :func:`write_cut` kept, of the same module before its start."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    model = remove(base_tensors(module.masked.peft_model), base_config, module.space, state["masks_U"])
    model.load_state_dict(state["model"])
    torch.set_rng_state(state["random"])
    log.info("the cut was made before, taken from %s", file)
    return model
