"""The pruning space: what units own and cost, against counting by hand."""

from __future__ import annotations

import pytest
import torch
from conftest import SHAPES, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from atp.cut.selection import reachable_sparsity, select
from atp.space.space import KINDS, PruningSpace


def block_parameters(model: nn.Module) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and "norm" not in n)


@pytest.mark.parametrize(("family", "attention", "tied", "biased"), SHAPES)
def test_total_is_what_the_blocks_hold(family: str, attention: str, tied: bool, biased: bool) -> None:
    model = tiny_model(family, attention, tied=tied, biased=biased)
    space = PruningSpace.from_model(model, KINDS)
    assert space.total_parameters == block_parameters(model)
    assert int(space.remaining_parameters(torch.ones(space.num_units))) == block_parameters(model)
    assert float(space.sparsity(torch.ones(space.num_units))) == 0.0


@pytest.mark.parametrize(("family", "attention", "tied", "biased"), SHAPES)
def test_unit_costs_agree_with_the_weights(family: str, attention: str, tied: bool, biased: bool) -> None:
    """Dropping one unit of each kind saves what the layer's cost table says."""
    model = tiny_model(family, attention, tied=tied, biased=biased)
    space = PruningSpace.from_model(model, ("heads", "channels"))
    full = int(space.remaining_parameters(torch.ones(space.num_units)))
    layer = space.layers[0]
    for axis in layer.axes.values():
        masks_U = torch.ones(space.num_units)
        masks_U[axis.offset] = 0
        saved = full - int(space.remaining_parameters(masks_U))
        expected = (
            layer.costs.channel
            if axis.kind == "channels"
            else layer.costs.key_value + layer.group_size * layer.costs.query
        )
        assert saved == expected


def test_expected_parameters_are_the_mean_over_masks() -> None:
    """The count is multilinear: over independent random masks its mean is its value at the probabilities."""
    space = PruningSpace.from_model(tiny_model("llama", "gqa", layers=1), KINDS)
    probability_U = torch.rand(space.num_units, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    draws = torch.Generator().manual_seed(1)
    counts = torch.stack(
        [space.remaining_parameters(torch.bernoulli(probability_U, generator=draws)) for _ in range(3000)]
    )
    expected = space.remaining_parameters(probability_U)
    assert abs(counts.mean() - expected) < 4 * counts.std() / 3000**0.5


def test_gradient_of_the_count_is_each_units_cost() -> None:
    space = PruningSpace.from_model(tiny_model("llama", "gqa", layers=1), ("channels",))
    probability_U = torch.full((space.num_units,), 0.5, requires_grad=True)
    space.remaining_parameters(probability_U).backward()
    assert torch.equal(probability_U.grad, torch.full((space.num_units,), 3.0 * 48))


@given(
    seed=st.integers(0, 10_000), sparsity=st.floats(0.02, 0.8), kinds=st.sampled_from([("heads", "channels"), KINDS])
)
@settings(max_examples=60, deadline=None)
def test_selection_meets_the_budget_within_one_unit(seed: int, sparsity: float, kinds: tuple[str, ...]) -> None:
    space = PruningSpace.from_model(_MODEL, kinds)
    if sparsity > reachable_sparsity(space):
        return
    scores_U = torch.randn(space.num_units, generator=torch.Generator().manual_seed(seed))
    masks_U = select(space, scores_U, sparsity)
    reached = float(space.sparsity(masks_U.double()))
    assert reached <= sparsity + 1e-9
    can_still_lose_a_channel = any(
        masks_U[a.offset : a.offset + a.size].sum() > 1 for a in space.axes if a.kind == "channels"
    )
    if can_still_lose_a_channel:
        assert sparsity - reached < space.layers[0].costs.channel / space.total_parameters + 1e-9
    for axis in space.axes:
        kept = masks_U[axis.offset : axis.offset + axis.size]
        assert kept.sum() >= 1
        if axis.kind == "query_heads":
            per_group = kept.view(3, 2).sum(1)
            assert len(set(per_group[per_group > 0].tolist())) == 1


_MODEL = tiny_model("llama", "gqa", layers=3)


@given(seed=st.integers(0, 10_000), sparsity=st.floats(0.05, 0.7))
@settings(max_examples=30, deadline=None)
def test_uniform_selection_keeps_equal_counts(seed: int, sparsity: float) -> None:
    space = PruningSpace.from_model(_MODEL, ("heads", "channels"))
    scores_U = torch.randn(space.num_units, generator=torch.Generator().manual_seed(seed))
    masks_U = select(space, scores_U, sparsity, shape="uniform")
    reached = float(space.sparsity(masks_U.double()))
    assert reached <= sparsity + 1e-9
    assert sparsity - reached < len(space.layers) * space.layers[0].costs.channel / space.total_parameters + 1e-9
    for kind in ("heads", "channels"):
        counts = {int(masks_U[a.offset : a.offset + a.size].sum()) for a in space.axes if a.kind == kind}
        assert len(counts) == 1


def test_selection_keeps_the_best_and_is_deterministic() -> None:
    space = PruningSpace.from_model(tiny_model(layers=2), ("channels",))
    scores_U = torch.arange(space.num_units).float()
    masks_U = select(space, scores_U, 0.2)
    assert torch.equal(masks_U, select(space, scores_U, 0.2))
    first_layer = masks_U[: space.axes[0].size]
    assert torch.equal(first_layer, first_layer.sort().values), "lower-scored channels of a layer go first"


def test_ties_leave_no_choice_to_chance() -> None:
    space = PruningSpace.from_model(_MODEL, KINDS)
    same = torch.zeros(space.num_units)
    assert torch.equal(select(space, same, 0.4), select(space, same.clone(), 0.4))


def test_blocks_may_vanish_only_when_asked() -> None:
    space = PruningSpace.from_model(_MODEL, ("heads", "channels"))
    scores_U = torch.ones(space.num_units)
    first = space.layers[0].axes
    for axis in first.values():
        scores_U[axis.offset : axis.offset + axis.size] = -1.0
    kept = space.split(select(space, scores_U, 0.34))
    assert all(kept[axis.name].sum() >= 1 for axis in first.values())
    gone = space.split(select(space, scores_U, 0.34, min_units={"heads": 0, "channels": 0}))
    assert all(gone[axis.name].sum() == 0 for axis in first.values())


def test_biased_output_projection_refuses_to_vanish() -> None:
    space = PruningSpace.from_model(tiny_model("llama", "mha", biased=True), ("heads", "channels"))
    with pytest.raises(ValueError, match=r"prune\.min_heads is 0.*bias"):
        select(space, torch.zeros(space.num_units), 0.5, min_units={"heads": 0})


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [(0.0, "between 0 and 1"), (1.0, "between 0 and 1"), (-0.5, "between 0 and 1"), (0.9, r"removes at most 0\.\d+")],
)
def test_impossible_sparsity_is_refused(sparsity: float, message: str) -> None:
    from atp.cut.selection import check_reachable

    space = PruningSpace.from_model(_MODEL, ("channels",))
    with pytest.raises(ValueError, match=message):
        check_reachable(space, sparsity)


def test_not_finite_scores_are_refused() -> None:
    space = PruningSpace.from_model(_MODEL)
    scores_U = torch.zeros(space.num_units)
    scores_U[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        select(space, scores_U, 0.5)


def test_unknown_family_kind_and_empty_space() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ValueError, match=r"'gpt2'.*ATP prunes llama"):
        PruningSpace.from_model(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16)))
    with pytest.raises(ValueError, match="'neurons'; known kinds"):
        PruningSpace.from_model(_MODEL, ("neurons",))
    with pytest.raises(ValueError, match="no unit to prune"):
        PruningSpace.from_model(tiny_model("llama", "mha"), ("query_heads",))
