"""Every unit kind alone and together: masked == removed == reloaded, counts exact, generation with a cache the same."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import SHAPES, tiny_batch, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from atp.cut.removal import max_logit_difference, remove, widths_after
from atp.cut.selection import reachable_sparsity, select
from atp.export.hf.loading import load_exported
from atp.export.hf.writing import export_hf
from atp.masks.lora import MaskedModel, add_lora
from atp.masks.merging import merged_state
from atp.model.layers import block_parameters
from atp.space.space import PruningSpace
from atp.space.units import KINDS, CostModel

BATCH = tiny_batch()
SPACES = [
    ("qk_pairs",),
    ("value_dims",),
    ("hidden",),
    ("qk_pairs", "value_dims", "channels"),
    ("hidden", "heads"),
    KINDS,
]
MODELS = {
    "llama-gqa": tiny_model("llama", "gqa", layers=3),
    "llama-mha-biased": tiny_model("llama", "mha", biased=True),
    "qwen3-mqa-tied": tiny_model("qwen3", "mqa", tied=True),
    "qwen2-gqa-tied": tiny_model("qwen2", "gqa", tied=True),
}


def masked_model(model: nn.Module, kinds: tuple[str, ...], **options: object) -> MaskedModel:
    """A masked LoRA model whose adapters are far from zero."""
    space = PruningSpace.from_model(model, kinds, **options)  # type: ignore[arg-type]
    masked = MaskedModel(add_lora(model, r=2, alpha=4), space)  # type: ignore[arg-type]
    torch.manual_seed(3)
    for name, parameter in masked.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.2)
    return masked.eval()


def removed(masked: MaskedModel, masks_U: torch.Tensor) -> nn.Module:
    masked.set_masks(masks_U)
    config = masked.peft_model.get_base_model().config
    return remove(merged_state(masked.peft_model).items(), config, masked.space, masks_U)


@pytest.mark.parametrize(("family", "attention", "tied", "biased"), SHAPES)
@pytest.mark.parametrize("kinds", SPACES, ids="+".join)
def test_removed_equals_masked(family: str, attention: str, tied: bool, biased: bool, kinds: tuple[str, ...]) -> None:
    masked = masked_model(tiny_model(family, attention, tied=tied, biased=biased), kinds)
    sparsity = 0.6 * reachable_sparsity(masked.space)
    masks_U = select(masked.space, torch.randn(masked.space.num_units), sparsity)
    assert {axis.kind for axis in masked.space.axes if not masks_U[axis.offset : axis.offset + axis.size].all()}
    small = removed(masked, masks_U)
    assert max_logit_difference(masked, small, [BATCH]) < 1e-4
    assert block_parameters(small) == int(masked.space.remaining_parameters(masks_U.double()))


@given(
    name=st.sampled_from(sorted(MODELS)),
    kinds=st.sets(st.sampled_from(KINDS), min_size=1),
    seed=st.integers(0, 1000),
    share=st.floats(0.1, 0.95),
    round_to=st.sampled_from([1, 4]),
    shape=st.sampled_from(["per_layer", "uniform"]),
)
@settings(max_examples=60, deadline=None)
def test_any_space_meets_its_budget_and_removes_exactly(
    name: str, kinds: set[str], seed: int, share: float, round_to: int, shape: str
) -> None:
    try:
        masked = masked_model(copy.deepcopy(MODELS[name]), tuple(sorted(kinds)))
    except ValueError:
        assert kinds == {"query_heads"}  # a space without any unit in multi-head attention
        return
    space = masked.space
    sparsity = share * reachable_sparsity(space, round_to=round_to)
    if sparsity == 0.0:
        return
    scores_U = torch.randn(space.num_units, generator=torch.Generator().manual_seed(seed))
    masks_U = select(space, scores_U, sparsity, round_to=round_to, shape=shape)
    assert float(space.sparsity(masks_U.double())) <= sparsity + 1e-9
    small = removed(masked, masks_U)
    assert max_logit_difference(masked, small, [BATCH]) < 1e-4
    assert block_parameters(small) == int(space.remaining_parameters(masks_U.double()))
    for axis in space.axes:
        kept = int(masks_U[axis.offset : axis.offset + axis.size].sum())
        if axis.kind in ("channels", "hidden"):
            assert kept % round_to == 0 or kept == axis.size
    if shape == "uniform":
        assert (
            len({(w.num_key_value_heads, w.intermediate_size, w.value_dim) for w in widths_after(space, masks_U)}) == 1
        )


@pytest.mark.parametrize("kinds", SPACES, ids="+".join)
def test_selection_ends_within_the_cheapest_unit(kinds: tuple[str, ...]) -> None:
    space = PruningSpace.from_model(tiny_model("llama", "gqa", layers=3), kinds)
    sparsity = 0.5 * reachable_sparsity(space)
    masks_U = select(space, torch.randn(space.num_units), sparsity)
    reached = float(space.sparsity(masks_U.double()))
    assert reached <= sparsity + 1e-9
    ones, costs = torch.ones(space.num_units).double(), []
    for axis in space.axes:
        without = ones.clone()
        without[axis.offset] = 0
        costs.append(float(space.sparsity(without)))
    assert sparsity - reached < max(costs) + 1e-9


@pytest.mark.parametrize("kinds", SPACES, ids="+".join)
def test_reloaded_model_equals_the_removed_one(kinds: tuple[str, ...], tmp_path: Path) -> None:
    masked = masked_model(tiny_model("llama", "gqa", layers=3), kinds)
    masks_U = select(masked.space, torch.randn(masked.space.num_units), 0.6 * reachable_sparsity(masked.space))
    small = removed(masked, masks_U)
    export_hf(small, None, tmp_path / "pruned")
    again = load_exported(tmp_path / "pruned")
    assert max_logit_difference(small, again, [BATCH]) == 0.0
    by_auto = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert max_logit_difference(small, by_auto, [BATCH]) == 0.0
    ids = BATCH["input_ids"][1:]
    with torch.inference_mode():
        whole = small(input_ids=ids).logits[:, -1]
        cached = small(input_ids=ids[:, :-3], use_cache=True)
        for column in range(ids.shape[1] - 3, ids.shape[1]):
            step = ids[:, column : column + 1]
            cached = small(input_ids=step, past_key_values=cached.past_key_values, use_cache=True)
    torch.testing.assert_close(cached.logits[:, -1], whole, rtol=1e-4, atol=1e-4)


def test_hidden_dims_at_uniform_widths_make_a_stock_model() -> None:
    masked = masked_model(tiny_model("llama", "gqa"), ("heads", "channels", "hidden"))
    masks_U = select(masked.space, torch.randn(masked.space.num_units), 0.4, shape="uniform", round_to=4)
    small = removed(masked, masks_U)
    assert type(small).__name__ in ("LlamaForCausalLM", "MistralForCausalLM")
    assert small.config.hidden_size < 48 and small.config.hidden_size % 4 == 0


def test_a_slim_model_can_be_pruned_again() -> None:
    masked = masked_model(tiny_model("qwen3", "gqa", layers=3), KINDS)
    masks_U = select(masked.space, torch.randn(masked.space.num_units), 0.3)
    small = removed(masked, masks_U)
    again = masked_model(small, KINDS)
    masks_U = select(again.space, torch.randn(again.space.num_units), 0.3)
    assert max_logit_difference(again, removed(again, masks_U), [BATCH]) < 1e-4


def test_expected_cost_agrees_with_the_cost_of_counts() -> None:
    """The differentiable cost of masks and the cost of what they keep, which selection counts by, are one."""
    space = PruningSpace.from_model(tiny_model("llama", "gqa", biased=True), KINDS)
    for cost in (CostModel(), CostModel(bias=0.0, scores=16.0, of="macs"), CostModel(2.0, 2.0, 2.0, cache=64.0)):
        space.cost = cost
        ones = torch.ones(space.num_units).double()
        assert float(space.remaining(ones)) == pytest.approx(space.total_cost)
        masks_U = select(space, torch.randn(space.num_units), 0.5)
        reached = float(space.reduction(masks_U.double()))
        assert 0.35 < reached <= 0.5 + 1e-9


def test_round_to_must_be_positive_and_reachable() -> None:
    space = PruningSpace.from_model(tiny_model("llama", "gqa"), ("channels",))
    with pytest.raises(ValueError, match=r"prune\.round_to is 0"):
        select(space, torch.zeros(space.num_units), 0.2, round_to=0)
    with pytest.raises(ValueError, match="removes at most"):
        select(space, torch.zeros(space.num_units), 0.5, round_to=16)
