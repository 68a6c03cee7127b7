"""Least-squares repair: exact where it can be, never worse than the cut, visible to removal and resume."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from atp.cut.removal import max_logit_difference, remove
from atp.cut.selection import select
from atp.masks.lora import MaskedModel, add_lora
from atp.masks.merging import merged_tensors
from atp.prepare.least_squares import OutputFits, fit_kept, repair_outputs
from atp.space.space import PruningSpace


def masked_model() -> MaskedModel:
    model = tiny_model("llama", "gqa")
    space = PruningSpace.from_model(model)
    masked = MaskedModel(add_lora(model, r=3), space)
    torch.manual_seed(1)
    for name, parameter in masked.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    return masked


def batches() -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        ids = torch.randint(3, 64, (4, 16), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 5))
def test_a_copied_input_is_taken_over_exactly(seed: int, kept: int, copies: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, kept, generator=generator, dtype=torch.double)
    mixed = x @ torch.randn(kept, copies, generator=generator, dtype=torch.double)
    inputs = torch.cat([x, mixed], dim=1)
    weight = torch.randn(3, kept + copies, generator=generator, dtype=torch.double)
    keep = torch.arange(kept + copies) < kept
    fitted = fit_kept(weight, inputs.T @ inputs, keep, ridge=0.0)
    assert torch.allclose(x @ fitted.T, inputs @ weight.T, atol=1e-3)


@given(st.integers(0, 10_000), st.integers(1, 7), st.sampled_from([1e-5, 1e-3, 0.1]))
def test_one_factorisation_fits_every_cut(seed: int, kept: int, ridge: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(32, 8, generator=generator), torch.randn(3, 8, generator=generator)
    fits = OutputFits({"a": x.T @ x}, ridge, several=True)
    for _ in range(2):
        keep = torch.randperm(8, generator=generator) < kept
        torch.testing.assert_close(fits.fit("a", weight, keep), fit_kept(weight, x.T @ x, keep, ridge))


def test_moments_that_rounding_left_indefinite_are_fitted_one_by_one() -> None:
    gram = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.1]))
    weight, keep = torch.randn(2, 4), torch.tensor([True, True, False, True])
    fits = OutputFits({"a": gram}, 1e-3, several=True)
    torch.testing.assert_close(fits.fit("a", weight, keep), fit_kept(weight, gram, keep, 1e-3))


def test_a_large_ridge_changes_nothing() -> None:
    x, weight = torch.randn(50, 6), torch.randn(2, 6)
    keep = torch.tensor([True, True, False, True, False, True])
    assert torch.allclose(fit_kept(weight, x.T @ x, keep, ridge=1e9), weight[:, keep], atol=1e-4)


def test_repaired_projections_are_closer_to_the_dense_ones() -> None:
    masked = masked_model().eval()
    masks_U = select(masked.space, torch.rand(masked.space.num_units), 0.4)
    data = list(batches())
    outputs: list[torch.Tensor] = []
    module = masked.linear("model.layers.0.mlp.down_proj")
    hook = module.register_forward_hook(lambda _, inputs, output: outputs.append(output.detach()))
    with torch.no_grad():
        masked(**data[0])
        only_channels_U = torch.ones_like(masks_U)
        axis = next(a for a in masked.space.axes if a.name == "layers.0.channels")
        span = slice(axis.offset, axis.offset + axis.size)
        only_channels_U[span] = masks_U[span]
        masked.set_masks(only_channels_U)
        masked(**data[0])
        names = repair_outputs(masked, only_channels_U, lambda: data)
        masked.set_masks(only_channels_U)
        masked(**data[0])
    hook.remove()
    dense, cut, repaired = outputs[0], outputs[1], outputs[-1]
    assert (repaired - dense).norm() < 0.9 * (cut - dense).norm()
    assert names == ["peft_model.base_model.model.model.layers.0.mlp.down_proj.base_layer.weight"]
    assert set(names) <= set(masked.state_dict())


def test_removal_sees_the_repaired_weights() -> None:
    masked = masked_model().eval()
    masks_U = select(masked.space, torch.rand(masked.space.num_units), 0.4)
    repair_outputs(masked, masks_U, batches)
    masked.set_masks(masks_U)
    config = masked.peft_model.get_base_model().config
    removed = remove(merged_tensors(masked.peft_model), config, masked.space, masks_U)
    assert max_logit_difference(masked, removed, batches()) < 1e-5


def test_bad_input_is_named() -> None:
    masked = masked_model()
    masks_U = select(masked.space, torch.rand(masked.space.num_units), 0.4)
    with pytest.raises(ValueError, match=r"prune\.repair\.ridge is -1"):
        repair_outputs(masked, masks_U, batches, ridge=-1)
    with pytest.raises(ValueError, match=r"prune\.repair\.batches=0"):
        repair_outputs(masked, masks_U, lambda: [])
