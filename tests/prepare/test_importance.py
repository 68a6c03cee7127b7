"""Importance of units: against what closing their gates does to the loss, and its standardisation."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_batch, tiny_model

from atp.masks.lora import MaskedModel, add_lora
from atp.prepare.importance import fisher_importance, standardise
from atp.space.space import PruningSpace


def masked_model() -> MaskedModel:
    model = tiny_model("llama", "gqa")
    space = PruningSpace.from_model(model)
    return MaskedModel(add_lora(model, r=2), space)


def test_importance_is_the_mean_squared_gate_gradient() -> None:
    masked = masked_model()
    batches = [tiny_batch(seed=seed) for seed in (1, 2)]
    found = fisher_importance(masked, batches)
    squares = []
    for batch in batches:
        gates = torch.ones(masked.space.num_units, requires_grad=True)
        masked.set_masks(gates)
        masked(**batch).loss.backward()
        squares.append(gates.grad.square())
    torch.testing.assert_close(found, (squares[0] + squares[1]) / 2)


def test_a_dead_unit_has_none_and_nothing_is_left_changed() -> None:
    masked = masked_model()
    down = masked.peft_model.get_submodule("base_model.model.model.layers.0.mlp.down_proj.base_layer")
    with torch.no_grad():
        down.weight[:, 3] = 0.0
    masked.train()
    scores = masked.space.split(fisher_importance(masked, [tiny_batch()]))
    assert float(scores["layers.0.channels"][3]) == 0.0
    assert float(scores["layers.0.channels"][4]) > 0.0
    assert masked.training
    assert all(parameter.grad is None for parameter in masked.parameters())


def test_standardised_scores_are_comparable_across_layers() -> None:
    masked = masked_model()
    importance = torch.rand(masked.space.num_units) + 1e-3
    by_axis = masked.space.split(importance)
    by_axis["layers.1.channels"] *= 1e6
    scores = masked.space.split(standardise(masked.space, importance))
    for name, values in scores.items():
        assert values.mean().abs() < 1e-5 and values.std() == pytest.approx(1.0, abs=1e-4)
        assert torch.equal(values.argsort(), by_axis[name].argsort())


def test_no_batches_and_broken_gradients_are_refused() -> None:
    masked = masked_model()
    with pytest.raises(ValueError, match=r"0 batches gave no finite gradients.*warm_start\.batches=0"):
        fisher_importance(masked, [])
    with torch.no_grad():
        next(masked.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="no finite gradients"):
        fisher_importance(masked, [tiny_batch()])
