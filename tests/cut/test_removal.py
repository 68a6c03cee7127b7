"""Masked == removed, over every shape; and that removal is what it says."""

from __future__ import annotations

import pytest
import torch
from conftest import SHAPES, tiny_batch, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from atp.cut.removal import max_logit_difference, remove, slice_tensors, widths_after
from atp.cut.selection import select
from atp.masks.lora import MaskedModel, add_lora
from atp.masks.merging import merged_state
from atp.space.space import KINDS, PruningSpace

BATCH = tiny_batch()


def masked_model(model: torch.nn.Module, kinds: tuple[str, ...] = KINDS) -> MaskedModel:
    """A masked LoRA model whose adapters are far from zero."""
    space = PruningSpace.from_model(model, kinds)
    masked = MaskedModel(add_lora(model, r=2, alpha=4), space)
    torch.manual_seed(3)
    for name, parameter in masked.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.2)
    return masked.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(**{k: BATCH[k] for k in ("input_ids", "attention_mask")}).logits


@pytest.mark.parametrize(("family", "attention", "tied", "biased"), SHAPES)
@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_removed_model_equals_masked_model(
    family: str, attention: str, tied: bool, biased: bool, sparsity: float
) -> None:
    masked = masked_model(tiny_model(family, attention, tied=tied, biased=biased))
    config = masked.peft_model.get_base_model().config
    masks_U = select(masked.space, torch.randn(masked.space.num_units), sparsity)
    masked.set_masks(masks_U)
    small = remove(merged_state(masked.peft_model).items(), config, masked.space, masks_U)
    assert max_logit_difference(masked, small, [BATCH]) < 1e-4
    counted = sum(p.numel() for n, p in small.named_parameters() if ".layers." in n and "norm" not in n)
    assert counted == int(masked.space.remaining_parameters(masks_U.double()))


@given(seed=st.integers(0, 1000), sparsity=st.floats(0.05, 0.95))
@settings(max_examples=25, deadline=None)
def test_any_masks_remove_exactly(seed: int, sparsity: float) -> None:
    """Random budgets, blocks allowed to vanish: the removed model still computes what the masked one does."""
    masked = _MASKED
    scores_U = torch.randn(masked.space.num_units, generator=torch.Generator().manual_seed(seed))
    masks_U = select(masked.space, scores_U, sparsity, min_units={"heads": 0, "channels": 0})
    masked.set_masks(masks_U)
    small = remove(merged_state(masked.peft_model).items(), _CONFIG, masked.space, masks_U)
    assert max_logit_difference(masked, small, [BATCH]) < 1e-4


_MASKED = masked_model(tiny_model("llama", "gqa", layers=3))
_CONFIG = _MASKED.peft_model.get_base_model().config


@pytest.mark.parametrize(("family", "attention", "tied", "biased"), SHAPES)
def test_all_ones_masks_change_no_bit(family: str, attention: str, tied: bool, biased: bool) -> None:
    model = tiny_model(family, attention, tied=tied, biased=biased)
    dense = logits(model)
    space = PruningSpace.from_model(model, KINDS)
    masked = MaskedModel(add_lora(model, r=2), space).eval()
    masked.set_masks(torch.ones(masked.space.num_units))
    assert torch.equal(logits(masked), dense)
    small = remove(
        merged_state(masked.peft_model).items(), model.config, masked.space, torch.ones(masked.space.num_units)
    )
    assert torch.equal(logits(small), dense)
    assert type(small) is type(model)


def test_a_layer_without_any_unit_still_runs() -> None:
    masked = masked_model(tiny_model("llama", "gqa", layers=3), ("heads", "channels"))
    masks_U = torch.ones(masked.space.num_units)
    for axis in masked.space.layers[0].axes.values():
        masks_U[axis.offset : axis.offset + axis.size] = 0
    masked.set_masks(masks_U)
    config = masked.peft_model.get_base_model().config
    small = remove(merged_state(masked.peft_model).items(), config, masked.space, masks_U)
    assert max_logit_difference(masked, small, [BATCH]) < 1e-4
    assert not any(name.startswith("model.layers.0.") for name in small.state_dict())


def test_a_pruned_model_can_be_pruned_again() -> None:
    masked = masked_model(tiny_model("llama", "gqa", layers=3))
    config = masked.peft_model.get_base_model().config
    masks_U = select(masked.space, torch.randn(masked.space.num_units), 0.3)
    small = remove(merged_state(masked.peft_model).items(), config, masked.space, masks_U)
    again = masked_model(small, ("heads", "channels"))
    masks_U = select(again.space, torch.randn(again.space.num_units), 0.3)
    again.set_masks(masks_U)
    smaller = remove(merged_state(again.peft_model).items(), small.config, again.space, masks_U)
    assert max_logit_difference(again, smaller, [BATCH]) < 1e-4


def test_kept_weights_are_the_originals() -> None:
    """Removal copies rows and columns; it changes no number."""
    model = tiny_model("llama", "mha", layers=1)
    space = PruningSpace.from_model(model, ("channels",))
    masks_U = torch.zeros(space.num_units)
    masks_U[[2, 5, 11]] = 1
    sliced = dict(slice_tensors(model.state_dict().items(), space, masks_U))
    before = model.state_dict()
    assert torch.equal(
        sliced["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"][[2, 5, 11]]
    )
    assert torch.equal(
        sliced["model.layers.0.mlp.down_proj.weight"], before["model.layers.0.mlp.down_proj.weight"][:, [2, 5, 11]]
    )
    assert torch.equal(
        sliced["model.layers.0.self_attn.q_proj.weight"], before["model.layers.0.self_attn.q_proj.weight"]
    )


def test_soft_masks_and_unequal_groups_are_refused() -> None:
    space = PruningSpace.from_model(tiny_model("llama", "gqa"), KINDS)
    with pytest.raises(ValueError, match="exact zeros and ones"):
        widths_after(space, torch.full((space.num_units,), 0.5))
    masks_U = torch.ones(space.num_units)
    masks_U[space.layers[0].axes["query_heads"].offset] = 0
    with pytest.raises(ValueError, match="same positive number"):
        widths_after(space, masks_U)
