"""Soft gates: folded into the weights they leave the function as it was, trained ones train, all resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import SHAPES, tiny_batch, tiny_model

from atp.cut.removal import max_logit_difference, remove
from atp.cut.selection import reachable_sparsity, select
from atp.masks.gates import Gates, fold
from atp.masks.lora import MaskedModel, add_lora
from atp.masks.merging import merged_state
from atp.space.space import PruningSpace
from atp.space.units import KINDS

BATCH = tiny_batch()


@pytest.mark.parametrize(("family", "attention", "tied", "biased"), SHAPES)
@pytest.mark.parametrize("kinds", [("heads", "channels"), ("heads", "channels", "hidden"), KINDS], ids=len)
def test_folded_and_removed_equals_gated(
    family: str, attention: str, tied: bool, biased: bool, kinds: tuple[str, ...]
) -> None:
    model = tiny_model(family, attention, tied=tied, biased=biased)
    config, space = model.config, PruningSpace.from_model(model, kinds)
    masked = MaskedModel(add_lora(model, r=2, alpha=4), space).eval()
    torch.manual_seed(3)
    for name, parameter in masked.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.2)
    masks_U = select(space, torch.randn(space.num_units), 0.5 * reachable_sparsity(space))
    gates_U = 0.5 + torch.rand(space.num_units)
    masked.set_masks(masks_U * gates_U)
    tensors = fold(merged_state(masked.peft_model).items(), space, gates_U, tied=tied)
    small = remove(tensors, config, space, masks_U)
    assert max_logit_difference(masked, small, [BATCH]) < 2e-4


def test_soft_gates_keep_what_they_had_and_shut_ones_start_at_one() -> None:
    gates = Gates(4, "soft")
    gates.start(torch.tensor([0.3, 0.0, 0.8, 0.9]), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    torch.testing.assert_close(gates(), torch.tensor([0.3, 1.0, 1.0, 0.9]))
    assert not gates.scale_U.requires_grad
    calibrated = Gates(4, "calibrated")
    calibrated.start(torch.full((4,), 0.3), torch.ones(4))
    assert torch.equal(calibrated(), torch.ones(4)) and calibrated.scale_U.requires_grad
    with pytest.raises(ValueError, match=r"prune\.gates is 'hard'; known: binary"):
        Gates(4, "hard")


@pytest.mark.parametrize("kind", ["soft", "calibrated"])
def test_gates_act_after_the_freeze_and_resume(kind: str, tmp_path: Path) -> None:
    from test_module import STEPS, StopAt, assert_same, fit, make_module, trained_state

    def make(seed: int = 0) -> object:
        return make_module("l0", seed=seed, gates=kind, compaction=True)

    whole = make()
    fit(whole, tmp_path / "whole.ckpt")
    assert not whole.is_compact
    factors_U = whole.frozen_masks().detach()
    kept_U = whole.final_masks_U > 0
    assert torch.equal(factors_U > 0, kept_U)
    assert kind == "soft" or bool((factors_U[kept_U] != 1.0).any())
    fit(make(), tmp_path / "part.ckpt", StopAt(8))
    resumed = make(seed=99)
    fit(resumed, tmp_path / "part.ckpt", resume=True)
    assert resumed.global_step == STEPS
    assert_same(trained_state(whole), trained_state(resumed))
