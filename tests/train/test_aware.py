"""ATP's scheme: what the LoRA-aware pass masks, the group lasso by hand, and who learns from which batch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_batch, tiny_model
from test_module import METHODS, STEPS, StopAt, assert_same, fit, make_data, trained_state

from atp.masks.budget import Phase, SparsitySchedule
from atp.masks.lora import MaskedModel, add_lora
from atp.space.space import PruningSpace
from atp.train.aware import AwareModule
from atp.train.lasso import group_lasso

BATCH = tiny_batch()


def masked_model(kinds: tuple[str, ...] = ("heads", "channels")) -> MaskedModel:
    model = tiny_model("llama", "gqa")
    space = PruningSpace.from_model(model, kinds)
    masked = MaskedModel(add_lora(model, r=2, alpha=2), space)
    torch.manual_seed(3)
    for name, parameter in masked.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.2)
    return masked.eval()


def test_the_aware_pass_masks_the_frozen_branch_alone() -> None:
    masked = masked_model(("channels",))
    masks_U = (torch.arange(masked.space.num_units) % 2).float()
    seen: dict[str, Any] = {}
    up: Any = masked.linear("model.layers.0.mlp.up_proj")
    hook = up.register_forward_hook(lambda m, x, y: seen.update(x=x[0], y=y))
    masked.aware = True
    masked.set_masks(masks_U)
    masked(**BATCH)
    hook.remove()
    mask = masks_U[:20]
    a, b, scale = masked.adapter("model.layers.0.mlp.up_proj") or pytest.fail("no adapter")
    expected = (seen["x"] @ masked.base_weight("model.layers.0.mlp.up_proj").T) * mask + scale * (seen["x"] @ a.T @ b.T)
    torch.testing.assert_close(seen["y"], expected, rtol=1e-4, atol=1e-4)


def test_with_zero_rows_for_pruned_units_both_passes_agree() -> None:
    """What the group lasso is for: then the model that trains is the one that removal writes."""
    masked = masked_model(("qk_pairs", "value_dims", "channels"))
    masks_U = (torch.rand(masked.space.num_units, generator=torch.Generator().manual_seed(0)) > 0.4).float()
    by_axis = masked.space.split(masks_U)

    def logits(aware: bool) -> torch.Tensor:
        masked.aware = aware
        masked.set_masks(masks_U)
        with torch.no_grad():
            return masked(input_ids=BATCH["input_ids"]).logits

    assert not torch.allclose(logits(True), logits(False), atol=1e-3)
    for weight in masked.space.weights:
        if weight.rows.factors:
            factors = masked.adapter(weight.module)
            assert factors is not None
            factors[1].data *= weight.rows.expand(by_axis).unsqueeze(1)
    torch.testing.assert_close(logits(True), logits(False), rtol=1e-4, atol=1e-4)


def test_group_lasso_is_the_sum_of_norms_of_pruned_rows_and_columns() -> None:
    masked = masked_model(("channels",))
    masks_U = torch.ones(masked.space.num_units)
    masks_U[[2, 23]] = 0
    by_hand = torch.zeros(())
    for layer, unit in ((0, 2), (1, 3)):
        for name in ("gate_proj", "up_proj", "down_proj"):
            factors = masked.adapter(f"model.layers.{layer}.mlp.{name}")
            assert factors is not None
            a, b, _ = factors
            by_hand = by_hand + (a[:, unit] if name == "down_proj" else b[unit]).norm()
    torch.testing.assert_close(group_lasso(masked, masks_U), by_hand / 6)
    assert float(group_lasso(masked, torch.ones_like(masks_U)).detach()) == 0.0


def make_module(seed: int = 0, update: str = "alternate", **options: Any) -> AwareModule:
    model = tiny_model("llama", "gqa", vocabulary=2048)
    torch.manual_seed(seed)
    space = PruningSpace.from_model(model, ("qk_pairs", "value_dims", "channels"))
    generator, sampler, budget = METHODS["atp_like"]
    module = AwareModule(
        MaskedModel(add_lora(model, r=2, dropout=0.1), space),
        generator(space),
        sampler(),
        budget(),
        SparsitySchedule(0.4, warmup_steps=1, ramp_steps=1, freeze_step=6),
        update=update,
        total_steps=STEPS,
        lr=1e-2,
        base_id="tiny",
        **options,
    )
    data = make_data()
    module.calibration_batch = data.calibration_batch
    return module


@pytest.mark.parametrize("update", ["joint", "alternate"])
def test_aware_runs_resume_to_the_last_bit(update: str, tmp_path: Path) -> None:
    make = functools.partial(make_module, update=update, lasso=0.3, final_lasso=100.0)
    whole = make()
    fit(whole, tmp_path / "whole.ckpt")
    fit(make(), tmp_path / "part.ckpt", StopAt(4))
    resumed = make(seed=99)
    fit(resumed, tmp_path / "part.ckpt", resume=True)
    assert_same(trained_state(whole), trained_state(resumed))
    assert 0.3 < float(whole.space.sparsity(whole.final_masks_U.double())) <= 0.4


def test_alternating_gradients_stay_apart() -> None:
    """The generator's pass leaves no gradient on adapters, and the adapters' pass none on the generator."""
    module = make_module(lasso=0.0)
    module.log = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    type(module).phase = property(lambda self: Phase.PRUNING)  # type: ignore[assignment,method-assign]
    try:
        torch.manual_seed(0)
        carrier, masks_U = module._generator_pass(0)
        assert float(carrier.detach()) == 0.0 and not masks_U.requires_grad
        carrier.backward()
        assert all(p.grad is None for n, p in module.model.named_parameters())
        assert any(p.grad is not None for p in module.generator.parameters())
    finally:
        del type(module).phase


def clipped(module: AwareModule, limit: float | None, lasso_of: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Gradients after the clip of a step whose own are all ten, by group; with the lasso over what these masks cut."""
    optimizer = module.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 10.0)
    if lasso_of is not None:
        module._gather(group_lasso(module.masked, lasso_of), 0)
    module.configure_gradient_clipping(optimizer, limit, "norm")
    return {
        str(group["name"]): torch.cat([parameter.grad.flatten() for parameter in group["params"]])
        for group in optimizer.param_groups
    }


def test_adapters_and_generator_are_clipped_apart() -> None:
    found = clipped(make_module(), 1.0)
    assert float(found["lora"].norm()) == pytest.approx(1.0, rel=1e-3)
    assert float(found["generator"].norm()) == pytest.approx(3.0, rel=1e-3)
    assert all(bool((gradient == 10.0).all()) for gradient in clipped(make_module(), None).values())


def test_a_large_lasso_takes_no_room_from_what_the_adapters_learn() -> None:
    module = make_module(lasso=100.0)
    for weight in module.space.weights:
        factors = module.masked.adapter(weight.module)
        assert factors is not None
        factors[1].data.normal_(0.0, 0.2)
    plain = clipped(module, 1.0)["lora"]
    module.is_logged_step = True
    both = clipped(module, 1.0, torch.zeros(module.space.num_units))["lora"]
    assert float(module.figures["grad_norm/lasso"]) > 100.0
    lasso = both - plain
    assert float(lasso.norm()) == pytest.approx(100.0, rel=1e-3)  # clipped to one, then its factor
    untouched = lasso == 0  # A of inputs and B of outputs of the residual stream, of which the lasso has none
    assert int(untouched.sum()) > len(lasso) // 4
    assert float(plain[untouched].norm()) > 0.3  # where one clip over both would leave a hundredth


def test_the_lasso_of_micro_batches_is_their_mean() -> None:
    module = make_module(lasso=0.3)
    module._trainer = type("Trainer", (), {"accumulate_grad_batches": 2, "global_step": 0})()  # type: ignore[assignment]
    everything_U = torch.zeros(module.space.num_units)
    for batch_idx in (2, 3):
        module._gather(group_lasso(module.masked, everything_U), batch_idx)
    parameters = list(module._lasso_gradients)
    whole = torch.autograd.grad(group_lasso(module.masked, everything_U), parameters)
    for parameter, gradient in zip(parameters, whole, strict=True):
        torch.testing.assert_close(module._lasso_gradients[parameter], 0.3 * gradient)


def test_the_factor_rises_at_the_end() -> None:
    module = make_module(lasso=0.3, final_lasso=100.0)
    assert [module.lasso_factor(step) for step in (0, STEPS // 2 - 1, STEPS // 2)] == [0.3, 0.3, 100.0]


def test_descending_the_lasso_empties_pruned_rows_and_no_other() -> None:
    masked = masked_model(("channels",))
    masks_U = torch.ones(masked.space.num_units)
    masks_U[2] = 0
    factors = masked.adapter("model.layers.0.mlp.up_proj")
    assert factors is not None
    before = factors[1].detach().clone()
    optimizer = torch.optim.SGD([p for p in masked.parameters() if p.requires_grad], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        group_lasso(masked, masks_U).backward()
        optimizer.step()
    assert float(factors[1][2].detach().norm()) < 0.01 < float(before[2].norm())
    kept = torch.arange(20) != 2
    assert torch.equal(factors[1].detach()[kept], before[kept])


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prune\.update is 'both'; known: joint, alternate"):
        make_module(update="both")
    with pytest.raises(ValueError, match=r"prune\.lasso is weight -1"):
        make_module(lasso=-1.0)
