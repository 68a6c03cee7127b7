"""Samplers: probabilities against frequencies, gradients, determinism; generators and budget terms beside them."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from atp.masks.budget import L0Lagrangian, LogRatio, Phase, SparsitySchedule
from atp.masks.generator import FreeLogits, Generator, TransformerGenerator
from atp.masks.sampler import GumbelSigmoid, HardConcrete, Sampler
from atp.space.space import PruningSpace

SAMPLERS = [HardConcrete(offset=0.0), HardConcrete(), GumbelSigmoid(), HardConcrete(slope=0.8)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["hard_concrete_0", "hard_concrete", "gumbel_sigmoid", "slope"])
@given(logit=st.floats(-8, 4))
@settings(max_examples=20, deadline=None)
def test_keep_probability_is_the_frequency(sampler: Sampler, logit: float) -> None:
    torch.manual_seed(0)
    logits_U = torch.full((20_000,), logit)
    kept = (sampler(logits_U) > 0).float().mean().item()
    probability = sampler.keep_probability(logits_U[:1]).item()
    assert abs(kept - probability) < 4 * math.sqrt(max(probability * (1 - probability), 1e-4) / 20_000) + 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
@given(logits=st.lists(st.floats(-30, 30), min_size=1, max_size=20))
@settings(max_examples=20, deadline=None)
def test_masks_and_gradients_stay_in_bounds(sampler: Sampler, logits: list[float]) -> None:
    logits_U = torch.tensor(logits, requires_grad=True)
    masks_U = sampler(logits_U)
    (masks_U.sum() + sampler.keep_probability(logits_U).sum()).backward()
    for values in (masks_U, sampler.deterministic(logits_U), sampler.keep_probability(logits_U)):
        assert bool(((values >= 0) & (values <= 1)).all())
    assert bool(torch.isfinite(logits_U.grad).all()) and bool((logits_U.grad >= 0).all())


def test_straight_through_masks_are_binary_with_a_soft_gradient() -> None:
    torch.manual_seed(0)
    logits_U = torch.full((100,), -3.37, requires_grad=True)
    masks_U = GumbelSigmoid()(logits_U)
    assert set(masks_U.tolist()) == {0.0, 1.0}
    masks_U.sum().backward()
    assert bool((logits_U.grad > 0).any())


def test_published_points_of_the_gumbel_sigmoid() -> None:
    """P(keep) at the logits quoted for ATP (temperature 0.4, offset 3): section 1.2 of the methods note."""
    probability = GumbelSigmoid().keep_probability(torch.tensor([0.0, -3.37, -1.90, -5.97]))
    torch.testing.assert_close(probability, torch.tensor([1.0, 0.5, 0.95, 0.05]), atol=5e-3, rtol=0)


def test_bad_sampler_settings() -> None:
    with pytest.raises(ValueError, match=r"temperature is 0"):
        GumbelSigmoid(temperature=0)
    with pytest.raises(ValueError, match=r"must enclose \[0, 1\]"):
        HardConcrete(lower=0.1)


def test_compressos_noise_free_gate() -> None:
    """sigma(0.8 a / T) of kept units, and as many of the lowest shut as are expected to be (note, section 2.1)."""
    sampler = HardConcrete(temperature=2 / 3, offset=0.0, slope=0.8)
    logits_U = torch.tensor([4.6, 1.0, -4.6, -3.0, 0.2])
    torch.testing.assert_close(sampler.gate(logits_U), torch.sigmoid(1.2 * logits_U))
    expected_zeros = round(float((1.0 - sampler.keep_probability(logits_U)).sum()))
    gates_U = sampler.deterministic(logits_U)
    assert expected_zeros == 2 and (gates_U == 0).tolist() == [False, False, True, True, False]
    torch.testing.assert_close(gates_U[gates_U > 0], sampler.gate(logits_U)[gates_U > 0])
    median = HardConcrete(temperature=2 / 3, offset=0.0)
    assert float(median.deterministic(logits_U)[0]) == 1.0
    assert torch.equal(median.gate(logits_U), median.deterministic(logits_U))
    with pytest.raises(ValueError, match=r"sampler\.slope is -1"):
        HardConcrete(slope=-1)


def space() -> PruningSpace:
    return PruningSpace.from_model(tiny_model("llama", "gqa"))


@pytest.mark.parametrize("make", [FreeLogits, TransformerGenerator])
def test_trainable_generators_reach_every_unit(make: type[Generator]) -> None:
    generator = make(space())
    logits_U = generator()
    assert logits_U.shape == (space().num_units,)
    weights_U = torch.randn(logits_U.shape)
    (logits_U * weights_U).sum().backward()
    gradients = [p.grad for p in generator.parameters() if p.requires_grad]
    assert gradients and all(g is not None and bool((g != 0).any()) for g in gradients)


def test_transformer_generator_tells_layers_apart_and_keeps_its_tokens() -> None:
    generator = TransformerGenerator(space()).eval()
    tokens = generator.tokens_LE
    torch.testing.assert_close(tokens @ tokens.T, torch.eye(2), atol=1e-5, rtol=0)
    assert "tokens_LE" not in dict(generator.named_parameters())
    assert torch.equal(generator(), generator())


def test_lagrangian_pushes_to_the_target_from_both_sides() -> None:
    """Multipliers ascend, so under the target sparsity becomes cheaper and above it dearer."""
    for start, direction in ((0.2, -1), (0.8, 1)):
        budget = L0Lagrangian()
        expected = torch.tensor(start, requires_grad=True)
        for _ in range(5):
            loss = budget(expected, expected, 0.5)
            gradients = torch.autograd.grad(loss, budget.multipliers())
            with torch.no_grad():
                for multiplier, gradient in zip(budget.multipliers(), gradients, strict=True):
                    multiplier += gradient
        budget(expected, expected, 0.5).backward()
        assert expected.grad.item() * direction > 0


def test_log_ratio_values() -> None:
    """R starts at ln 2 for half the parameters (author logs, section 1.6) and is symmetric in the ratio."""
    budget = LogRatio(alpha=1.0)
    assert budget(torch.tensor(0.0), torch.tensor(0.0), 0.5).item() == pytest.approx(math.log(2))
    assert budget(torch.tensor(0.0), torch.tensor(0.5), 0.5).item() == pytest.approx(0.0)
    above = budget(torch.tensor(0.0), torch.tensor(1 - 0.8), 0.6).item()
    below = budget(torch.tensor(0.0), torch.tensor(1 - 0.2), 0.6).item()
    assert above == pytest.approx(below)
    with pytest.raises(ValueError, match="alpha is 0"):
        LogRatio(alpha=0)


@given(
    steps=st.integers(1, 5000),
    fractions=st.lists(st.floats(0, 1), min_size=3, max_size=3).map(sorted),
    shape=st.sampled_from(["linear", "cubic"]),
)
@settings(max_examples=80, deadline=None)
def test_schedule_rises_to_the_target_and_never_falls(steps: int, fractions: list[float], shape: str) -> None:
    warmup, ramp, freeze_at = fractions[0], fractions[1] - fractions[0], fractions[2]
    schedule = SparsitySchedule.from_fractions(0.5, steps, warmup=warmup, ramp=ramp, freeze_at=freeze_at, shape=shape)
    targets = [schedule.target_at(step) for step in range(steps)]
    assert targets == sorted(targets)
    assert all(0.0 <= target <= 0.5 for target in targets)
    phases = [schedule.phase(step) for step in range(steps)]
    assert phases == sorted(phases, key=list(Phase).index)
    if schedule.freeze_step < steps and schedule.freeze_step >= schedule.warmup_steps + schedule.ramp_steps:
        assert schedule.target_at(schedule.freeze_step) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmup": 1.5}, r"schedule\.warmup is 1\.5"),
        ({"ramp": 0.9}, "end after freeze_at"),
        ({"shape": "square"}, "known: linear, cubic"),
    ],
)
def test_bad_schedules(change: dict[str, object], message: str) -> None:
    arguments = {"warmup": 0.1, "ramp": 0.2, "freeze_at": 0.5, "shape": "linear", **change}
    with pytest.raises(ValueError, match=message):
        SparsitySchedule.from_fractions(0.5, 100, **arguments)  # type: ignore[arg-type]


def test_projection_meets_any_target_exactly() -> None:
    from atp.masks.budget import Projection
    from atp.masks.sampler import Threshold

    units = space()
    torch.manual_seed(0)
    logits_U = torch.randn(units.num_units) * 3
    for sampler in (HardConcrete(), GumbelSigmoid(), Threshold()):
        for target in (0.1, 0.5, 0.8):
            shift = Projection().shift(
                lambda shift, s=sampler: float(units.sparsity(s.keep_probability(logits_U + shift))), target
            )
            reached = float(units.sparsity(sampler.keep_probability(logits_U + shift)))
            tolerance = units.layers[0].costs.key_value * 2 / units.total_parameters if sampler is not None else 0
            assert abs(reached - target) < 1e-3 + tolerance
