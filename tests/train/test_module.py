"""Joint training: what moves when, the freeze, resume to the last bit, divergence, small checkpoints."""

from __future__ import annotations

import functools
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from lightning import Callback, Trainer
from transformers import AutoTokenizer

from atp import embedded
from atp.data.batches import PruningDataModule
from atp.data.sources import load_embedded
from atp.masks.budget import L0Lagrangian, LogRatio, Phase, Projection, SparsitySchedule
from atp.masks.generator import FreeLogits, TransformerGenerator
from atp.masks.lora import MaskedModel, add_lora
from atp.masks.sampler import GumbelSigmoid, HardConcrete, Threshold
from atp.space.space import PruningSpace
from atp.train.checkpoints import RunCheckpoint
from atp.train.distillation import Distillation
from atp.train.joint import PruningModule
from atp.train.tuning import TrainingDiverged, TuningModule

STEPS = 10
METHODS = {
    "l0": (FreeLogits, HardConcrete, L0Lagrangian),
    "atp_like": (TransformerGenerator, GumbelSigmoid, LogRatio),
    "exact": (FreeLogits, Threshold, Projection),
}


def make_module(
    method: str = "l0", seed: int = 0, dropout: float = 0.1, module_seed: int = 0, **options: Any
) -> PruningModule:
    model = tiny_model("llama", "gqa", vocabulary=2048)
    torch.manual_seed(seed)  # of adapters and generator; the base is always the same
    space = PruningSpace.from_model(model)
    generator, sampler, budget = METHODS[method]
    schedule = SparsitySchedule(0.5, warmup_steps=2, ramp_steps=2, freeze_step=6)
    masked = MaskedModel(add_lora(model, r=2, dropout=dropout), space)
    return PruningModule(
        masked,
        generator(space),
        sampler(),
        budget(),
        schedule,
        total_steps=STEPS,
        lr=1e-2,
        base_id="tiny",
        seed=module_seed,
        **options,
    )


@functools.cache
def records_and_tokenizer() -> tuple[Any, Any]:
    return load_embedded("legal", train=40, validation=4, test=4), AutoTokenizer.from_pretrained(embedded.base_dir())


def make_data(accumulate: int = 1) -> PruningDataModule:
    splits, tokenizer = records_and_tokenizer()
    return PruningDataModule(
        splits, tokenizer, max_length=48, batch_size=2, num_batches=STEPS * accumulate, seed=0, model_context=64
    )


def make_loader() -> Any:
    data = make_data()
    data.setup("fit")
    return data.train_dataloader()


class StopAt(Callback):
    """Sends this process a signal at the start of the batch after ``step``, as Ctrl-C would."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)
            self.step = -1


def fit(
    module: TuningModule, path: Path, *callbacks: Callback, accumulate: int = 1, every: int = 3, resume: bool = False
) -> RunCheckpoint:
    checkpoint = RunCheckpoint(path, every_n_steps=every)
    trainer = Trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        val_check_interval=4,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[*callbacks, checkpoint],
    )
    trainer.fit(module, datamodule=make_data(accumulate), ckpt_path=path if resume else None, weights_only=True)
    return checkpoint


def trained_state(module: TuningModule) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items() if k in module._own_state()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def make_repaired_module(method: str, **options: Any) -> PruningModule:
    """With repair and compaction at the freeze."""
    module = make_module(method, compaction=True, **options)
    module.calibration = lambda: itertools.islice(make_loader(), 3)
    return module


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[dict[str, torch.Tensor], bool]]:
    """What a run ends with that nothing stops, and whether it is compact; each is trained once."""

    @functools.cache
    def end(make: Any, method: str) -> tuple[dict[str, torch.Tensor], bool]:
        whole = make(method)
        fit(whole, tmp_path_factory.mktemp("whole") / "whole.ckpt")
        return trained_state(whole), bool(whole.is_compact)

    return end


@pytest.mark.parametrize("make", [make_module, make_repaired_module], ids=["masked", "compact"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [1, 4, 5, 6, 8], ids=["warm-up", "pruning", "before-freeze", "at-freeze", "frozen"])
def test_resume_equals_uninterrupted_to_the_last_bit(
    make: Any, method: str, stop: int, uninterrupted: Callable[..., Any], tmp_path: Path
) -> None:
    whole, is_compact = uninterrupted(make, method)
    assert is_compact is (make is make_repaired_module)
    interrupted = make(method)
    assert fit(interrupted, tmp_path / "part.ckpt", StopAt(stop)).interrupted
    assert interrupted.global_step == stop + 1
    resumed = make(method, seed=99)  # other initial values: everything that matters must come from the file
    fit(resumed, tmp_path / "part.ckpt", resume=True)
    assert resumed.global_step == STEPS
    assert_same(whole, trained_state(resumed))


class Losses(Callback):
    """Collects what every forward pass loses, and what is logged of it at the end of a step."""

    def __init__(self) -> None:
        self.micro: list[float] = []
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        every = trainer.accumulate_grad_batches
        self.micro.append(float(outputs["loss"]) * every)  # Lightning divides it
        if (batch_idx + 1) % every == 0:
            self.steps.append({name: float(value) for name, value in pl_module.figures.items()})


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_logged_loss_is_that_of_all_micro_batches(accumulate: int, tmp_path: Path) -> None:
    losses = Losses()
    fit(make_module(), tmp_path / "a.ckpt", losses, accumulate=accumulate)
    logged = [(step, figures) for step, figures in enumerate(losses.steps) if "train/loss" in figures]
    assert [step for step, _ in logged] == [0, STEPS - 1]
    for step, figures in logged:
        own = losses.micro[step * accumulate : (step + 1) * accumulate]
        assert figures["train/loss"] == (own[0] if accumulate == 1 else pytest.approx(sum(own) / accumulate))
        assert figures["train/task_loss"] + figures["train/budget_loss"] == pytest.approx(figures["train/loss"])


def test_resume_with_accumulation_and_from_a_kill(tmp_path: Path) -> None:
    """A killed process leaves the last periodic checkpoint; going on from it reaches the same end."""
    whole = make_module()
    fit(whole, tmp_path / "whole.ckpt", accumulate=2)

    class Die(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 15:
                raise SystemExit

    with pytest.raises(SystemExit):
        fit(make_module(), tmp_path / "part.ckpt", Die(), accumulate=2)
    resumed = make_module(seed=99)
    fit(resumed, tmp_path / "part.ckpt", accumulate=2, resume=True)
    assert_same(trained_state(whole), trained_state(resumed))


@pytest.mark.parametrize("method", METHODS)
def test_freeze_meets_the_target_and_masks_stay(method: str, tmp_path: Path) -> None:
    module = make_module(method)
    seen: list[torch.Tensor] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            if pl_module.is_frozen:
                seen.append(pl_module.final_masks_U.clone())

    fit(module, tmp_path / "a.ckpt", Watch())
    assert len(seen) == STEPS - 6
    assert all(torch.equal(seen[0], masks) for masks in seen)
    sparsity = float(module.space.sparsity(seen[0].double()))
    assert 0.5 - module.space.layers[0].costs.channel / module.space.total_parameters <= sparsity <= 0.5


def test_each_phase_moves_what_it_should(tmp_path: Path) -> None:
    module = make_module()
    history: list[tuple[Phase, torch.Tensor, torch.Tensor]] = []

    class Watch(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            adapters = torch.cat([p.detach().flatten() for n, p in pl_module.model.named_parameters() if "lora_B" in n])
            phase = pl_module.schedule.phase(batch_idx)
            history.append((phase, pl_module.generator.logits_U.detach().clone(), adapters.clone()))

    fit(module, tmp_path / "a.ckpt", Watch())
    for (_, logits, adapters), (phase, new_logits, new_adapters) in itertools.pairwise(history):
        assert not torch.equal(adapters, new_adapters)
        assert torch.equal(logits, new_logits) is (phase is not Phase.PRUNING), phase
    assert module.budget.lambda_1.item() != 0.0


def test_same_seed_same_masks_other_seed_other_masks(tmp_path: Path) -> None:
    runs = []
    for seed in (0, 0, 1):
        module = make_module(generator_lr=0.5, module_seed=seed)
        fit(module, tmp_path / f"{len(runs)}.ckpt")
        runs.append(module.final_masks_U.clone())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_checkpoint_holds_only_what_trains(tmp_path: Path) -> None:
    module = make_module()
    fit(module, tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert not [name for name in saved["state_dict"] if "base_layer" in name or "embed_tokens" in name]
    assert not (tmp_path / "a.tmp").exists()


def test_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    fit(make_module(), tmp_path / "a.ckpt")
    other_base = make_module()
    other_base.base_id = "another"
    with pytest.raises(ValueError, match="base_id = 'tiny', this run has 'another'"):
        fit(other_base, tmp_path / "a.ckpt", resume=True)
    with pytest.raises(ValueError, match="checkpoint lacks"):
        fit(make_module("atp_like"), tmp_path / "a.ckpt", resume=True)


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    class Poison(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 7:
                next(p for n, p in pl_module.named_parameters() if "lora_B" in n).data.fill_(float("nan"))

    with pytest.raises(TrainingDiverged, match=r"loss became nan at step 7; try a lower optim\.lr"):
        fit(make_module(), tmp_path / "a.ckpt", Poison())
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    assert all(torch.isfinite(v).all() for v in saved["state_dict"].values() if v.is_floating_point())


def test_broken_weights_are_never_saved(tmp_path: Path) -> None:
    class Poison(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 6:
                next(p for n, p in pl_module.named_parameters() if "lora_B" in n).data.fill_(float("inf"))

    with pytest.raises(TrainingDiverged, match="not finite at step 6; the last good checkpoint is kept"):
        fit(make_module(), tmp_path / "a.ckpt", Poison())
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.parametrize(
    "logits", [torch.linspace(-3, 3, 40), torch.zeros(40), torch.randn(40) * 50], ids=["spread", "equal", "far"]
)
def test_the_shift_that_stays_on_a_device_is_the_shift(logits: torch.Tensor) -> None:
    sampler, budget = HardConcrete(), Projection(tolerance=1e-7)

    def sparsity_of(shift: torch.Tensor | float) -> torch.Tensor:
        return 1.0 - sampler.keep_probability(logits + shift).mean()

    here = budget.shift(lambda shift: float(sparsity_of(shift)), 0.4)
    there = budget.shift_on_device(sparsity_of, torch.tensor(0.0), 0.4)
    assert float(sparsity_of(there)) == pytest.approx(0.4, abs=1e-5)
    assert float(there) == pytest.approx(here, abs=1e-2)
    assert float(LogRatio().shift_on_device(sparsity_of, torch.tensor(0.0), 0.4)) == 0.0


def test_disk_full_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Trainer.save_checkpoint

    def full(self: Trainer, path: Any, *args: Any, **kwargs: Any) -> None:
        if self.global_step > 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        fit(make_module(), tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["global_step"] == 3


def test_distillation_teacher_is_the_dense_base_and_never_trains(tmp_path: Path) -> None:
    module = make_module(distill=Distillation(logits=1.0))
    dense = tiny_model("llama", "gqa", vocabulary=2048)
    batch = next(iter(make_loader()))
    module.masked.set_masks(torch.zeros(module.space.num_units))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad(), module.teaching() as taught:
        torch.testing.assert_close(taught(**inputs).logits, dense(**inputs).logits)
    fit(module, tmp_path / "a.ckpt")
    with torch.no_grad(), module.teaching() as taught:
        torch.testing.assert_close(taught(**inputs).logits, dense(**inputs).logits)
    teacher = tiny_model(seed=5, vocabulary=2048)
    tuned = TuningModule(
        add_lora(tiny_model(vocabulary=2048), r=2), total_steps=STEPS, distill=Distillation(logits=0.5), teacher=teacher
    )
    assert not [name for name in tuned.state_dict() if "teacher" in name]


def test_compaction_is_given_up_for_a_dense_teacher(caplog: pytest.LogCaptureFixture) -> None:
    module = make_module(compaction=True, distill=Distillation(logits=0.5))
    assert not module.compaction
    assert "prune.compact is ignored" in caplog.text


def test_plain_tuning_lowers_the_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = TuningModule(add_lora(tiny_model(vocabulary=2048), r=4), total_steps=STEPS, lr=3e-2, base_id="tiny")
    losses: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            losses.append(float(outputs["loss"]))

    fit(module, tmp_path / "a.ckpt", Watch())
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch looks at it while it traces
def test_compiled_training_is_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through freeze and cut, traced as ``torch.compile`` traces but run by the usual kernels, to be quick."""
    traced = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    ends = []
    for compiled in (False, True):
        monkeypatch.setattr(torch.nn.Module, "compile", traced)
        module = make_module("exact", dropout=0.0, compaction=True, compile_model=compiled)
        fit(module, tmp_path / f"{compiled}.ckpt")
        ends.append(trained_state(module))
        monkeypatch.undo()
    torch._dynamo.reset()
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.allclose(value.float(), ends[1][name].float(), atol=1e-4), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_kernels_train_alike(tmp_path: Path) -> None:
    ends = []
    for compiled in (False, True):
        module = make_module("exact", dropout=0.0, compaction=True, compile_model=compiled)
        fit(module, tmp_path / f"{compiled}.ckpt")
        ends.append(trained_state(module))
    torch._dynamo.reset()
    for name, value in ends[0].items():
        assert torch.allclose(value.float(), ends[1][name].float(), atol=1e-3), name
