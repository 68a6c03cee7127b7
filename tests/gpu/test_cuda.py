"""What only a GPU can show: the fused functions, training on the device, and steps that never wait for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_batch, tiny_model
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from atp.masks.budget import Projection, SparsitySchedule
from atp.masks.fused import masked_gated
from atp.masks.generator import FreeLogits
from atp.masks.lora import MaskedModel, add_lora
from atp.masks.sampler import Threshold
from atp.space.space import PruningSpace
from atp.train.joint import PruningModule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 12


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 37, 1403), (1, 1, 4096), (3, 129, 256)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
def test_the_masked_product_and_its_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, masked: bool
) -> None:
    torch.manual_seed(0)
    gate, up, upstream = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
    mask = torch.rand(shape[-1], device="cuda") if masked else None
    inputs = [t.requires_grad_() for t in (gate, up, mask) if t is not None]
    found = masked_gated(gate, up, mask)
    gradients = torch.autograd.grad(found, inputs, upstream)
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    product = nn.functional.silu(exact_inputs[0]) * exact_inputs[1]
    exact = product * exact_inputs[2] if masked else product
    exact_gradients = torch.autograd.grad(exact, exact_inputs, upstream.double())
    assert found.dtype == dtype
    assert relative_error(found, exact) < tolerance
    for mine, wanted in zip(gradients, exact_gradients, strict=True):
        assert relative_error(mine, wanted) < tolerance


def joint_module() -> PruningModule:
    torch.manual_seed(0)
    model = tiny_model("llama", "gqa")
    space = PruningSpace.from_model(model, ("heads", "channels"))
    masked = MaskedModel(add_lora(model, r=4), space)
    generator = FreeLogits(space)
    generator.warm_start(torch.randn(space.num_units))
    return PruningModule(
        masked, generator, Threshold(), Projection(), SparsitySchedule(0.4, 2, 2, 8),
        compaction=True, total_steps=STEPS, lr=1e-2, base_id="tiny",
    )  # fmt: skip


class Watch(Callback):
    """Keeps every loss; lets no step wait for the device where nothing is logged."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.losses: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        cuts = trainer.global_step == 8
        if self.strict and trainer.global_step not in (0, STEPS - 1) and not cuts:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.losses.append(outputs["loss"].detach())


def losses(accelerator: str, strict: bool = False) -> list[float]:
    watch = Watch(strict)
    batches = DataLoader([tiny_batch(seed=i) for i in range(STEPS)], batch_size=None)
    trainer = Trainer(
        max_steps=STEPS, accelerator=accelerator, devices=1, logger=False, callbacks=[watch], gradient_clip_val=1.0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1000,
    )  # fmt: skip
    try:
        trainer.fit(joint_module(), train_dataloaders=batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [float(loss) for loss in watch.losses]


def test_training_on_the_device_is_training_on_the_processor() -> None:
    assert losses("gpu") == pytest.approx(losses("cpu"), rel=2e-3)


def test_no_step_waits_for_the_device() -> None:
    assert len(losses("gpu", strict=True)) == STEPS
