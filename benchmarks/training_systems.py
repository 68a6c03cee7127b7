"""What the training benchmark compares: plain LoRA, joint training before and after the cut, alternation, two-stage.

Every system trains the same base model with the same adapters, optimiser, batches and bare Lightning trainer. The plain
one is written out here, in nothing but PEFT and Lightning, so that it owes nothing to this package.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from atp.commands.train import compose_config
from atp.config.prune import WarmStartConfig
from atp.config.schema import TrainConfig
from atp.cut.removal import remove
from atp.masks.budget import SparsitySchedule
from atp.masks.merging import merged_tensors
from atp.model.widths import build_model
from atp.prepare.starts import starting_scores
from atp.run import parts
from atp.train.aware import AwareModule
from atp.train.joint import PruningModule
from atp.train.tuning import TuningModule

Batch = dict[str, Tensor]
STEP_SYSTEMS = ("plain", "joint", "taught", "alternate", "compact", "taylor")
"""Systems whose single steps are compared; ``compact`` and ``taylor`` train half of the blocks, ``taught`` learns from
the dense base's hidden states as well."""
_BARE = (
    "prune.repair.batches=0",
    "prune.repair.epochs=0",
    "prune.warm_start.criterion=[taylor]",
    "prune.warm_start.attention=[0.0]",
)
"""The preset without choice of its start and repair of the cut: mask learning alone."""
_TAUGHT = ("prune.distill.hidden=10", "prune.distill.until=0.4")
_NEVER = 10**9


@dataclass(frozen=True)
class Shape:
    """A randomly initialised LLaMA and the batches it trains on.

    Attributes:
        name: Short name.
        hidden: Width D.
        layers: Decoder layers L.
        heads: Query heads N of 64 dimensions, or fewer where D / N is less.
        kv_heads: KV heads K.
        channels: FFN channels F.
        vocabulary: Vocabulary V.
        batch: Sequences B of a step.
        tokens: Tokens T of a sequence.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    channels: int
    vocabulary: int
    batch: int
    tokens: int

    def config(self) -> LlamaConfig:
        """The model's configuration."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.channels,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=max(self.tokens, 512),
            tie_word_embeddings=self.vocabulary < 100_000 and self.hidden < 4096,
        )


EMBEDDED = Shape("embedded", 192, 6, 6, 3, 512, 2048, 4, 256)
"""The model that ships with the package, on the batches of ``experiment=legal_50pct``."""
SHAPES = {
    shape.name: shape
    for shape in (
        EMBEDDED,
        Shape("15M", 384, 8, 6, 3, 1024, 4096, 4, 256),
        Shape("llama2_7b", 4096, 32, 32, 32, 11008, 32000, 1, 1024),
        Shape("llama3_8b", 4096, 32, 32, 8, 14336, 128256, 1, 1024),
    )
}


class PlainLora(LightningModule):
    """LoRA as its users write it: PEFT's model, Lightning's loop, AdamW, a cosine.

    Args:
        model: Base model; wrapped in place.
        config: The run whose adapters and rates are used.
    """

    def __init__(self, model: PreTrainedModel, config: TrainConfig) -> None:
        super().__init__()
        lora = config.lora
        targets = list(lora.target_modules)
        peft_config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM")  # type: ignore[arg-type]
        if config.model.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        self.model = get_peft_model(model, peft_config)
        if config.trainer.compile:
            self.model.compile()
        self.steps, self.lr = config.trainer.max_steps, config.optim.lr

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy of the batch."""
        loss = self.model(**batch).loss
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW under a cosine."""
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr, betas=(0.9, 0.99))

        def factor(step: int) -> float:
            return 0.1 + 0.45 * (1 + math.cos(math.pi * min(step / self.steps, 1.0)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@functools.cache
def run_config(*overrides: str) -> TrainConfig:
    """The configuration of the default run with overrides."""
    config = OmegaConf.to_object(compose_config(["experiment=legal_50pct", *overrides]))
    assert isinstance(config, TrainConfig)
    return config


@dataclass
class Workload:
    """A model, its batches and where they are.

    Attributes:
        shape: The shape.
        device: Torch device.
        dtype: Of the frozen weights.
        overrides: Further overrides of the run's configuration.
        seed: Of weights and tokens.
    """

    shape: Shape
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    overrides: tuple[str, ...] = ()
    seed: int = 0

    @property
    def real(self) -> bool:
        """Whether this is the model that ships with the package, on its own legal records, instead of random ones."""
        return self.shape is EMBEDDED

    def base(self) -> PreTrainedModel:
        """The base model; the same weights at every call."""
        if self.real:
            return parts.load_base(self.config().model)
        torch.manual_seed(self.seed)
        return build_model(self.shape.config(), dtype=self.dtype, device=self.device, initialize=True)

    def batch(self, index: int) -> Batch:
        """A batch of random tokens, all of them learnt; the same for the same index."""
        draw = torch.Generator().manual_seed(self.seed * 100_003 + index)
        ids = torch.randint(3, self.shape.vocabulary, (self.shape.batch, self.shape.tokens), generator=draw)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def batches(self, count: int) -> list[Batch]:
        """The first ``count`` batches; random ones go round after 64."""
        if self.real:
            config = self.config(f"trainer.max_steps={count}")
            splits = parts.load_splits(config.data, config.seed)
            data = parts.data_module(config, splits, parts.load_tokenizer(config.model), 512)
            data.setup("fit")
            return list(itertools.islice(data.train_dataloader(), count))
        made = [self.batch(index) for index in range(min(count, 64))]
        return [made[index % len(made)] for index in range(count)]

    def config(self, *overrides: str) -> TrainConfig:
        """The run's configuration."""
        return run_config(*self.overrides, *overrides)

    def system(self, name: str) -> LightningModule:
        """A module of :data:`STEP_SYSTEMS`, ready for steps of its kind.

        Raises:
            ValueError: An unknown system.
        """
        if name == "plain":
            return PlainLora(self.base(), self.config())
        if name in ("joint", "compact", "taught"):
            taught = _TAUGHT if name == "taught" else ()
            module = parts.pruning_module(self.config("prune=exact", *_BARE, *taught), self.base())
            if name == "compact":
                torch.manual_seed(1)
                module.generator.warm_start(torch.randn(module.space.num_units))
                module.freeze_masks()
                module.cut_live_model()
            else:
                module.schedule = SparsitySchedule(0.5, 0, 0, _NEVER)
            return module
        if name == "alternate":
            aware = parts.pruning_module(self.config("prune=atp"), self.base())
            assert isinstance(aware, AwareModule)
            aware.schedule = SparsitySchedule(0.5, 0, 0, _NEVER)
            calibration = self.batches(64)[::-1]
            aware.calibration_batch = lambda index: calibration[index % 64]
            return aware
        if name == "taylor":
            return self.two_stage()
        raise ValueError(f"no system {name!r}; known: {', '.join(STEP_SYSTEMS)}")

    def joint_run(self, calibration: Sequence[Batch], *, bare: bool = False) -> PruningModule:
        """The default run up to its first step: start and repair are made here, on as many batches as they ask for.

        Args:
            calibration: Batches of the start and of the repair.
            bare: Without the choice of a start and without repair.
        """
        config = self.config("prune=exact", *(_BARE if bare else ()))
        module = parts.pruning_module(config, self.base())
        module.load_dense = self.base
        self._warm_start(module, config.prune.warm_start, calibration)
        if not bare:
            module.calibration = lambda: self._placed(calibration[: config.prune.repair.batches])
            module.repair_start()
        return module

    def two_stage(self, calibration: Sequence[Batch] = ()) -> TuningModule:
        """Half of the blocks cut at once by Taylor importance (or by chance, without batches), adapters to be tuned."""
        config = parts.two_stage(self.config("prune=exact"), "taylor")
        base = self.base()
        base_config = base.config
        module = parts.pruning_module(config, base)
        if calibration:
            self._warm_start(module, config.prune.warm_start, calibration)
        else:
            torch.manual_seed(1)
            module.generator.warm_start(torch.randn(module.space.num_units))
        module.freeze_masks()
        tensors = merged_tensors(module.masked.peft_model)
        model = remove(tensors, base_config, module.space, module.final_masks_U.cpu(), device=self.device)
        return parts.tuning_module(config, model)

    def _warm_start(self, module: PruningModule, settings: WarmStartConfig, calibration: Sequence[Batch]) -> None:
        masked, batches = module.masked.to(self.device), self._placed(calibration[: settings.batches])
        start = starting_scores(
            masked,
            batches,
            module.selected,
            criteria=settings.criterion,
            ranking=settings.ranking,
            gain=settings.gain,
            attention=settings.attention,
        )
        module.generator.warm_start(start.scores_U)

    def _placed(self, batches: Sequence[Batch]) -> list[Batch]:
        return [{name: value.to(self.device) for name, value in batch.items()} for batch in batches]


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Ways to tell time; ``cpu``, with one thread, is not disturbed by what else the machine does."""


class StepClock(Callback):
    """Notes when each step begins and when the last one ends."""

    def __init__(self, device: str, clock: str = "wall") -> None:
        self.device, self.now = device, CLOCKS[clock]
        self.times: list[float] = []

    def _note(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()
        self.times.append(self.now())

    def on_train_batch_start(self, *_: Any) -> None:
        """Note the time."""
        self._note()

    def on_train_end(self, *_: Any) -> None:
        """Note the time."""
        self._note()


def fit(module: LightningModule, batches: Sequence[Batch], device: str = "cpu", clock: str = "wall") -> list[float]:
    """Train for one step per batch under a bare trainer.

    Returns:
        Seconds of each step, from its beginning to that of the next.
    """
    timer = StepClock(device, clock)
    trainer = Trainer(
        max_steps=len(batches),
        max_epochs=-1,
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        logger=False,
        callbacks=[timer],
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, train_dataloaders=_Loader(batches))
    return [after - before for before, after in zip(timer.times, timer.times[1:], strict=False)]


class _Loader:
    """Batches as a loader: what Lightning iterates over."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
