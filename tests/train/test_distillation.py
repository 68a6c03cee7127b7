"""Learning from the dense base: the losses, their schedule, and who the teacher is before and after changes to it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from test_module import STEPS, assert_same, fit, make_loader, make_module, trained_state

from atp.masks.lora import add_lora
from atp.masks.loss import causal_loss, hidden_states, loss_and_states
from atp.prepare.blockwise import Repair
from atp.run import parts
from atp.train.distillation import Distillation, distillation_loss, hidden_state_loss, real_tokens
from atp.train.joint import PruningModule
from atp.train.tuning import TuningModule


def dense() -> Any:
    return tiny_model("llama", "gqa", vocabulary=2048)


def make_taught(compaction: bool = True, epochs: int = 0) -> PruningModule:
    """A module that repairs its cut at the start and learns from the dense base's hidden states."""
    module = make_module(
        "exact",
        distill=Distillation(hidden=3.0, until=0.9),
        dense=dense,
        compaction=compaction,
        repair=Repair(epochs=epochs),
        repair_at="start",
    )
    module.calibration = lambda: itertools.islice(make_loader(), 3)
    return module


def test_logit_distillation_is_zero_for_equal_models_and_ignores_unlearnt_positions() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    labels = torch.full((2, 5), -100)
    labels[0, 2:4] = 1
    assert distillation_loss(teacher, teacher, labels).item() == pytest.approx(0.0, abs=1e-6)
    by_hand = [
        (teacher[0, t].softmax(-1) * (teacher[0, t].log_softmax(-1) - student[0, t].log_softmax(-1))).sum()
        for t in (1, 2)
    ]
    assert distillation_loss(student, teacher, labels).item() == pytest.approx(float(sum(by_hand)) / 2, rel=1e-4)


def test_hidden_states_are_compared_layer_by_layer_and_without_padding() -> None:
    torch.manual_seed(0)
    teacher = [torch.randn(2, 4, 6), 1000 * torch.randn(2, 4, 6)]
    real = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    padded = [states + 9 * (1 - real).unsqueeze(-1) for states in teacher]
    assert hidden_state_loss(padded, teacher, real) == 0.0
    zeros = [torch.zeros_like(states) for states in teacher]
    assert hidden_state_loss(zeros, teacher, real).item() == pytest.approx(1.0)
    one_layer = hidden_state_loss([teacher[0], zeros[1]], teacher, real)
    assert one_layer.item() == pytest.approx(0.5)  # however large the other layer's states are


def test_masks_of_packed_sequences_tell_where_tokens_are() -> None:
    examples = torch.tensor([0, 0, 1, 1])
    packed = (examples[:, None] == examples) & torch.ones(4, 4).tril().bool()
    assert real_tokens(packed[None, None]).tolist() == [[True] * 4]


def test_the_weight_falls_to_zero_and_stays_there() -> None:
    distill = Distillation(hidden=4.0, until=0.5)
    assert [distill.hidden_weight(step, 8) for step in (0, 2, 4, 7)] == [4.0, 2.0, 0.0, 0.0]
    assert not distill.is_over(3, 8) and distill.is_over(4, 8)
    assert not Distillation(logits=0.5, hidden=4.0, until=0.5).is_over(7, 8)
    assert not Distillation() and Distillation().is_over(0, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logits": 2.0}, r"prune\.distill\.logits is 2"),
        ({"hidden": -1.0}, r"prune\.distill\.hidden is -1"),
        ({"hidden": 1.0, "until": 0.0}, r"prune\.distill\.until is 0"),
    ],
)
def test_bad_weights(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(**settings)


@pytest.mark.parametrize("trains_head", [False, True])
def test_states_come_with_the_loss_of_the_same_pass(trains_head: bool) -> None:
    model, batch = dense(), next(iter(make_loader()))
    model.requires_grad_(trains_head)
    loss, states = loss_and_states(model, batch)
    assert loss.item() == pytest.approx(causal_loss(model, batch).item(), rel=1e-6)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    expected = model(**inputs, output_hidden_states=True).hidden_states[1:]
    assert len(states) == model.config.num_hidden_layers
    for own, wanted in zip(states, expected, strict=True):
        torch.testing.assert_close(own, wanted)


@pytest.mark.parametrize("epochs", [0, 1], ids=["fitted", "blockwise"])
def test_the_teacher_stays_the_dense_base_through_repair_training_and_cut(epochs: int, tmp_path: Path) -> None:
    module, batch = make_taught(epochs=epochs), next(iter(make_loader()))
    wanted = hidden_states(dense(), batch)

    def assert_dense() -> None:
        with torch.no_grad(), module.teaching() as teacher:
            for own, other in zip(hidden_states(teacher, batch), wanted, strict=True):
                torch.testing.assert_close(own, other)

    assert_dense()
    before = {name: p.clone() for name, p in module.masked.named_parameters() if "base_layer" in name}
    module.repair_start()
    changed = {
        name for name, p in module.masked.named_parameters() if "base_layer" in name and (p != before[name]).any()
    }
    assert changed and (epochs or all("o_proj" in name or "down_proj" in name for name in changed))
    assert_dense()
    assert changed == {
        name for name, p in module.masked.named_parameters() if "base_layer" in name and (p != before[name]).any()
    }
    fit(module, tmp_path / "a.ckpt")
    assert module.is_compact
    assert_dense()
    assert not [name for name in module.state_dict() if "teacher" in name]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, int], dict[str, torch.Tensor]]:
    """What a run ends with that nothing stops; each is trained once."""

    @functools.cache
    def end(compaction: bool, epochs: int) -> dict[str, torch.Tensor]:
        whole = make_taught(compaction, epochs)
        whole.repair_start()
        fit(whole, tmp_path_factory.mktemp("whole") / "whole.ckpt")
        return trained_state(whole)

    return end


@pytest.mark.parametrize("compaction", [True, False], ids=["compact", "masked"])
@pytest.mark.parametrize("stop", [1, 4, 8], ids=["warm-up", "pruning", "frozen"])
@pytest.mark.parametrize("epochs", [0, 1], ids=["fitted", "blockwise"])
def test_a_taught_and_repaired_run_resumes_to_the_last_bit(
    compaction: bool, stop: int, epochs: int, uninterrupted: Callable[..., Any], tmp_path: Path
) -> None:
    from test_module import StopAt

    interrupted = make_taught(compaction, epochs)
    interrupted.repair_start()
    assert fit(interrupted, tmp_path / "part.ckpt", StopAt(stop)).interrupted
    resumed = make_taught(compaction, epochs)
    fit(resumed, tmp_path / "part.ckpt", resume=True)
    assert_same(uninterrupted(compaction, epochs), trained_state(resumed))


def test_repaired_weights_without_adapters_stay_in_the_checkpoints_of_a_resumed_run() -> None:
    from atp.masks.lora import MaskedModel

    def make() -> PruningModule:
        module = make_taught()
        peft_model = add_lora(dense(), r=2, target_modules=["q_proj"])
        module.masked = module.model = MaskedModel(peft_model, module.space)
        return module

    first = make()
    first.repair_start()
    state = {name: value.clone() for name, value in first.state_dict().items() if name in first._own_state()}
    resumed = make()
    resumed.on_load_checkpoint({"state_dict": state, "atp": {"base_id": "tiny", "total_steps": STEPS}})
    assert resumed._own_state() == first._own_state()
    assert any("o_proj.weight" in name for name in state)


def test_the_hidden_states_are_learnt_until_the_weight_is_gone(tmp_path: Path) -> None:
    module = make_taught()
    asked: list[int] = []
    teaching = module.teaching

    def counted() -> Any:
        asked.append(module.global_step)
        return teaching()

    module.teaching = counted  # type: ignore[method-assign]
    fit(module, tmp_path / "a.ckpt")
    assert asked == list(range(9)) and STEPS == 10
    assert module._teacher == [None]  # its memory is given back


def test_a_student_with_fewer_layers_learns_from_the_data_alone(caplog: pytest.LogCaptureFixture) -> None:
    student = add_lora(tiny_model("llama", "gqa", vocabulary=2048, layers=1), r=2)
    module = TuningModule(student, total_steps=STEPS, distill=Distillation(hidden=1.0), teacher=dense())
    batch = next(iter(make_loader()))
    assert module.task_loss(batch).item() == pytest.approx(causal_loss(student, batch).item(), rel=1e-6)
    assert "prune.distill.hidden is ignored" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prune.repair.at=end"], r"prune\.repair\.at is 'end'; known: freeze, start"),
        (["prune.distill.hidden=-2"], r"prune\.distill\.hidden is -2"),
        (["prune.distill.until=1.5"], r"prune\.distill\.until is 1\.5"),
    ],
)
def test_bad_settings_name_their_field(overrides: list[str], message: str) -> None:
    from test_bad_input import config

    made = config(*overrides)
    with pytest.raises(ValueError, match=message):
        parts.pruning_module(made, parts.load_base(made.model))
