"""Figures and pictures of masks while training, and loggers that are not installed."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_batch, tiny_model
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from test_module import fit, make_module
from torch.utils.data import DataLoader

from atp.masks.budget import Projection, SparsitySchedule
from atp.masks.generator import FreeLogits
from atp.masks.lora import MaskedModel, add_lora
from atp.masks.sampler import Threshold
from atp.report.mask_picture import block_shares, mask_picture
from atp.space.space import PruningSpace
from atp.train import loggers
from atp.train.joint import PruningModule
from atp.train.monitoring import MaskMonitor, TrainingHealth, binary_entropy, unit_rows
from atp.train.progress import QuietCollector, Throughput


def test_entropy_in_bits() -> None:
    assert binary_entropy(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([0.0, 1.0, 0.0])
    assert float(binary_entropy(torch.tensor([0.11]))) == pytest.approx(0.4999, abs=1e-3)


def test_blocks_average_every_unit_once() -> None:
    row = [float(i % 3 == 0) for i in range(100)]
    shares = block_shares(row, 32)
    assert len(shares) == 32 and sum(shares) / 32 == pytest.approx(sum(row) / 100, abs=0.02)
    assert block_shares([1.0, 0.0], 32) == [1.0, 0.0] and block_shares([], 32) == []


def test_picture_is_dark_where_kept() -> None:
    picture = mask_picture([[1.0, 0.0], [0.0, 1.0]], "two layers")
    assert picture.getpixel((34 + 9, 24 + 7)) == picture.getpixel((34 + 27, 24 + 21)) == (31, 78, 156)
    assert picture.getpixel((34 + 27, 24 + 7)) == (255, 255, 255)


class Recorder(Callback):
    """Remembers logits' decisions at every step, and what was logged."""

    def __init__(self) -> None:
        self.decisions: list[torch.Tensor] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PruningModule)
        self.decisions.append(pl_module.mask_state()[0].clone())
        self.logged.append({k: float(v) for k, v in pl_module.figures.items()})


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Recorder, Path, PruningModule]:
    model = tiny_model("llama", "gqa")
    space = PruningSpace.from_model(model)
    masked = MaskedModel(add_lora(model, r=2), space)
    schedule = SparsitySchedule.from_fractions(0.5, 8, warmup=0.0, ramp=0.5, freeze_at=0.75)
    module = PruningModule(
        masked, FreeLogits(space, initial_std=0.1), Threshold(), Projection(), schedule, total_steps=8, lr=1e-3
    )
    recorder = Recorder()
    monitor = MaskMonitor(tmp_path, tmp_path / "history.jsonl", pictures=3)
    trainer = Trainer(
        max_steps=8,
        accelerator="cpu",
        log_every_n_steps=2,
        logger=False,
        callbacks=[monitor, TrainingHealth(), recorder],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([tiny_batch(seed=seed) for seed in range(8)], batch_size=None))
    return recorder, tmp_path, module


def test_kept_units_and_flips_are_those_of_the_masks(trained: tuple[Recorder, Path, PruningModule]) -> None:
    recorder, _, module = trained
    decided, logged = recorder.decisions, recorder.logged
    flips = float((decided[3] != decided[1]).sum()) / 2
    assert flips > 0 and logged[3]["mask/flips"] == flips
    assert logged[7]["mask/flips"] == 0 and logged[7]["mask/entropy"] == 0 < logged[1]["mask/entropy"]
    for axis in module.space.axes:
        kept = float(module.space.split(decided[5])[axis.name].sum())
        assert logged[5][f"{axis.kind}_kept/layer_{axis.layer:02d}"] == kept


class Kept(DummyLogger):
    """A logger that remembers its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append((step, metrics))


def test_a_logged_step_is_one_call_with_all_its_figures() -> None:
    model = tiny_model("llama", "gqa")
    space = PruningSpace.from_model(model)
    schedule = SparsitySchedule.from_fractions(0.5, 5, warmup=0.0, ramp=0.5, freeze_at=0.8)
    parts = (FreeLogits(space), Threshold(), Projection(), schedule)
    module = PruningModule(MaskedModel(add_lora(model, r=2), space), *parts, total_steps=5)
    logger = Kept()
    trainer = Trainer(
        max_steps=5,
        accumulate_grad_batches=2,
        accelerator="cpu",
        log_every_n_steps=2,
        logger=logger,
        callbacks=[Throughput(), TrainingHealth()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([tiny_batch(seed=seed) for seed in range(10)], batch_size=None))
    assert [step for step, _ in logger.calls] == [0, 1, 3, 4]  # the first, every second, the last
    for _, figures in logger.calls:
        assert {"train/loss", "mask/sparsity", "lr/lora", "grad_norm/lora", "train/tokens_per_second"} <= figures.keys()
        assert all(isinstance(value, (int, float)) for value in figures.values())
    assert float(trainer.callback_metrics["train/loss"]) == float(module.figures["train/loss"])


@pytest.mark.parametrize("last", [2, 9], ids=["before the first checkpoint", "after the freeze"])
def test_a_resumed_run_writes_the_history_of_an_uninterrupted_one(last: int, tmp_path: Path) -> None:
    class Die(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == last:
                raise RuntimeError("killed")

    def history(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    fit(make_module(), tmp_path / "whole.ckpt", MaskMonitor(tmp_path, tmp_path / "whole.jsonl"))
    path, file = tmp_path / "part.ckpt", tmp_path / "part.jsonl"
    with pytest.raises(RuntimeError, match="killed"):
        fit(make_module(), path, MaskMonitor(tmp_path, file), Die())
    with file.open("a") as torn:
        torn.write('{"step": 8, "pha')
    fit(make_module(), path, MaskMonitor(tmp_path, file), resume=path.is_file())
    assert path.is_file() and history("part.jsonl") == history("whole.jsonl")
    assert [line["step"] for line in history("whole.jsonl")] == [0, 7]


@pytest.mark.parametrize("end", ["on_train_end", "on_exception"])
def test_what_is_loaded_is_collected_again_after_training(end: str) -> None:
    quiet: Any = QuietCollector()
    before = gc.get_freeze_count()
    quiet.on_train_start(None, None)
    assert gc.get_freeze_count() > before + 10_000
    getattr(quiet, end)(*[None] * (2 if end == "on_train_end" else 3))
    assert gc.get_freeze_count() == 0


def test_gradient_norms_and_rates_per_group(trained: tuple[Recorder, Path, PruningModule]) -> None:
    logged = trained[0].logged
    assert {"grad_norm/lora", "grad_norm/generator", "lr/lora", "lr/generator"} <= logged[1].keys()
    assert logged[1]["grad_norm/lora"] > 0 and logged[1]["grad_norm/generator"] > 0


def test_pictures_until_the_freeze_and_none_after(trained: tuple[Recorder, Path, PruningModule]) -> None:
    _, folder, module = trained
    records = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 2, 4, 6, 7]
    final = unit_rows(module.space.axes, module.space.split(module.final_masks_U))
    assert records[-1]["kept"] == final and records[-1]["phase"] == "frozen"
    assert (folder / "figures/masks/heads_000007.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("make", "extra"), [(loggers.tensorboard_logger, "tensorboard"), (loggers.mlflow_logger, "mlflow")]
)
def test_missing_logger_package_names_the_extra(
    make: object, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"logger={extra} needs.*pip install 'atp\[{extra}\]'"):
        make(str(tmp_path))  # type: ignore[operator]


def test_markdown_cells_cannot_break_the_table() -> None:
    text = loggers.markdown_table(["a", "b"], [["x|y", "one\ntwo"]])
    assert text.splitlines()[2] == "| x\\|y | one<br>two |"
