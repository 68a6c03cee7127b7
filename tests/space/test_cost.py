"""Costs that a budget may count, against counting by other means, and selection under each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from atp.cut.removal import remove
from atp.cut.selection import select
from atp.evaluate.measure import macs_per_token
from atp.space.cost import COSTS, make_cost
from atp.space.space import PruningSpace
from atp.space.units import KINDS, PARAMETERS


def test_macs_agree_with_counting_on_the_removed_model() -> None:
    model = tiny_model("llama", "gqa", layers=3)
    space = PruningSpace.from_model(model, ("heads", "channels", "qk_pairs", "value_dims"))
    space.cost = make_cost("macs", context=32, model=model)
    masks_U = select(space, torch.randn(space.num_units), 0.4)
    small = remove(model.state_dict().items(), model.config, space, masks_U)
    head = model.config.vocab_size * model.config.hidden_size
    counted = [macs_per_token(m, 32) - head for m in (model, small)]
    assert float(space.remaining(torch.ones(space.num_units).double())) == counted[0]
    assert float(space.remaining(masks_U.double())) == counted[1]
    assert 0.35 < 1 - counted[1] / counted[0] <= 0.4


def test_memory_counts_weights_and_cache() -> None:
    model = tiny_model("llama", "gqa", layers=2)
    space = PruningSpace.from_model(model, ("heads",))
    space.cost = make_cost("memory", context=100, model=model)
    cache = 2 * 2 * 3 * 8 * 100 * 4  # layers, keys and values, KV heads, head dimension, tokens, bytes
    assert space.total_cost == 4 * space.total_parameters + cache


@pytest.mark.parametrize("of", COSTS)
def test_selection_meets_any_budget(of: str) -> None:
    model = tiny_model("llama", "gqa", layers=2)
    space = PruningSpace.from_model(model, KINDS)
    space.cost = make_cost(of, context=16, model=model)
    assert space.total_cost > 0
    masks_U = select(space, torch.randn(space.num_units), 0.5)
    assert 0.3 < float(space.reduction(masks_U.double())) <= 0.5 + 1e-6


def test_latency_prices_are_positive_and_differ_from_parameters() -> None:
    model = tiny_model("llama", "gqa")
    cost = make_cost("latency", context=64, model=model)
    assert min(cost.attention, cost.ffn, cost.scores) > 0
    assert make_cost("parameters", context=64, model=model) is PARAMETERS


def test_prices_are_measured_once_and_kept(tmp_path: Path) -> None:
    model, table = tiny_model("llama", "gqa"), tmp_path / "run" / "latency.json"
    first = make_cost("latency", context=64, model=model, table=table)
    assert make_cost("latency", context=64, model=model, table=table) == first
    with pytest.raises(ValueError, match=r"was measured over 64 keys, prune\.budget_context is 32"):
        make_cost("latency", context=32, model=model, table=table)
    table.write_text("{}")
    with pytest.raises(ValueError, match="is no table of prices"):
        make_cost("latency", context=64, model=model, table=table)


def test_unknown_costs_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"budget_of is 'energy'; known: parameters"):
        make_cost("energy", context=1, model=model)
    with pytest.raises(ValueError, match=r"budget_context is 0"):
        make_cost("macs", context=0, model=model)
