"""How far masks had come at the freeze: the two figures by hand, and the warning where they had not got there."""

from __future__ import annotations

import logging

import pytest
import torch
from test_module import make_module

from atp.masks.sampler import GumbelSigmoid, HardConcrete, Sampler, Threshold
from atp.train.decisions import decisions


@pytest.mark.parametrize("sampler", [HardConcrete(offset=0.0), GumbelSigmoid(offset=0.0)])
def test_undecided_units_and_expected_sparsity_of_drawn_masks(sampler: Sampler) -> None:
    space = make_module().space
    logits_U = torch.full((space.num_units,), 9.0)
    logits_U[:3] = -0.5  # kept about as often as not
    logits_U[3:5] = -20.0
    keep_U = sampler.keep_probability(logits_U)
    found = decisions(space, sampler, sampler.confidence(logits_U))
    assert found["undecided"] == pytest.approx(3 / space.num_units)
    assert found["expected"] == pytest.approx(float(space.sparsity(keep_U)), abs=1e-6)


def test_a_threshold_leaves_nothing_undecided() -> None:
    space = make_module().space
    torch.manual_seed(0)
    logits_U = 0.1 * torch.randn(space.num_units)
    found = decisions(space, Threshold(), Threshold().confidence(logits_U))
    assert found["undecided"] == 0.0
    assert found["expected"] == pytest.approx(float(space.sparsity((logits_U > 0).float())), abs=1e-6)


def test_masks_that_did_not_reach_their_target_are_told(caplog: pytest.LogCaptureFixture) -> None:
    module = make_module("l0")  # starts with everything kept; its target is one half
    with caplog.at_level(logging.INFO):
        module.freeze_masks()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("the masks were away from their target at the freeze: they expect a sparsity of 0.0")
    assert "the target is 0.500" in warning
    lines = [record.getMessage() for record in caplog.records if "units are undecided" in record.getMessage()]
    assert len(lines) == 1 and lines[0].endswith("0.0% of units are undecided")


def test_masks_that_did_are_not(caplog: pytest.LogCaptureFixture) -> None:
    module = make_module("l0")
    offset = module.sampler.offset
    reached_U = module.selected(torch.randn(module.space.num_units))
    module.generator.warm_start(torch.where(reached_U > 0, 9.0, -9.0) - offset)
    with caplog.at_level(logging.INFO):
        module.freeze_masks()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
