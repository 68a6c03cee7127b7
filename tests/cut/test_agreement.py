"""The verdict on masked, removed and reloaded model: which stage changed what is computed, and what rounding does."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny_batch, tiny_model

from atp.cut.agreement import Difference, allowed, verdict
from atp.cut.removal import logit_difference

SAME = Difference(1e-5, 3.0)


def judged(removed: float, reloaded: float, both: float, *, stored: str = "float32", rounded: bool = True) -> str:
    found = (Difference(value, 3.0) for value in (removed, reloaded, both))
    return verdict(*found, computed="float32", stored=stored, rounded=rounded)


@pytest.mark.parametrize(
    ("differences", "stage"),
    [
        ((1e-5, 0.0, 1e-5), ""),
        ((9.8, 0.0, 9.8), "masked -> removed: largest logit difference 9.8, allowed 0.003 (float32"),
        ((0.27, 0.0, 0.27), "masked -> removed"),
        ((1e-5, 0.5, 0.5), "removed -> reloaded"),
        ((2e-3, 2e-3, 4e-3), "masked -> reloaded"),
        ((math.inf, 0.0, 0.0), "masked -> removed: largest logit difference not a number"),
    ],
)
def test_the_stage_that_brings_the_difference_is_named(differences: tuple[float, float, float], stage: str) -> None:
    assert judged(*differences).startswith(stage)
    assert bool(judged(*differences)) is bool(stage)


def test_rounding_to_a_half_explains_what_it_does_and_no_more() -> None:
    assert judged(1e-5, 1e-5, 0.1, stored="float16") == ""
    assert judged(1e-5, 1e-5, 0.5, stored="float16").startswith("masked -> reloaded")
    assert judged(1e-5, 0.1, 0.1, stored="float16").startswith("removed -> reloaded")
    assert judged(1e-5, 0.1, 0.1, stored="float16", rounded=False) == ""
    assert allowed("bfloat16", 2.0) > allowed("float16", 2.0) > allowed("float32", 2.0)


def test_the_difference_of_real_models_is_far_within_and_of_broken_ones_infinite() -> None:
    model, same, broken = tiny_model(), tiny_model(), tiny_model()
    broken.model.norm.weight.data[0] = torch.nan
    exact = logit_difference(model, same, [tiny_batch()])
    assert exact.largest == 0.0 and exact.spread > 0
    for first, second in ((model, broken), (broken, model)):
        found = logit_difference(first, second, [tiny_batch(), tiny_batch(seed=2)])
        assert found.largest == math.inf
        assert verdict(found, SAME, SAME, computed="float32", stored="float32", rounded=True)
