"""Choosing the starting scores: the model is left alone, the better architecture is found, mistakes are named."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from atp.commands.train import compose_config
from atp.cut.selection import select
from atp.masks.lora import MaskedModel, add_lora
from atp.masks.loss import causal_loss
from atp.prepare.comparison import repaired_losses, rounds
from atp.prepare.criteria import importance, importances
from atp.prepare.least_squares import OutputFits, output_moments, repair_outputs
from atp.prepare.passes import observe
from atp.prepare.starts import candidates, starting_scores, with_attention
from atp.run.pipeline import run
from atp.space.space import PruningSpace

SPACE = PruningSpace.from_model(tiny_model("llama", "gqa"), ("heads", "query_heads", "channels"))


def masked_model() -> MaskedModel:
    model = tiny_model("llama", "gqa")
    space = PruningSpace.from_model(model)
    return MaskedModel(add_lora(model, r=2), space).eval()


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(3):
        ids = torch.randint(3, 64, (4, 16), generator=generator)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return found


@given(st.floats(0.0, 4.0), st.integers(0, 1000))
def test_raised_attention_keeps_no_fewer_heads_and_no_more_channels(raised: float, seed: int) -> None:
    scores_U = torch.randn(SPACE.num_units, generator=torch.Generator().manual_seed(seed))
    before, after = select(SPACE, scores_U, 0.3), select(SPACE, with_attention(SPACE, scores_U, raised), 0.3)
    assert SPACE.kept_channels(after) <= SPACE.kept_channels(before) + 1
    assert torch.equal(with_attention(SPACE, scores_U, 0.0), scores_U)


def test_the_model_is_left_as_it_was_and_losses_are_those_of_the_repaired_cut() -> None:
    masked, data = masked_model(), batches()
    before = {name: value.clone() for name, value in masked.state_dict().items()}
    scores = {name: torch.rand(masked.space.num_units) for name in ("a", "b")}
    scores["c"] = scores["a"]

    def selected(scores_U: torch.Tensor) -> torch.Tensor:
        return select(masked.space, scores_U, 0.25)

    losses = repaired_losses(masked, scores, selected, causal_loss, data, halving=False).losses
    assert all(torch.equal(value, masked.state_dict()[name]) for name, value in before.items())
    assert losses["a"] == losses["c"] != losses["b"]
    repair_outputs(masked, selected(scores["b"]), lambda: data)
    masked.set_masks(selected(scores["b"]))
    with torch.no_grad():
        by_hand = sum(float(causal_loss(masked, batch)) for batch in data) / len(data)
    assert losses["b"] == pytest.approx(by_hand, rel=1e-5)


def test_units_that_matter_are_preferred() -> None:
    """Scores by weight keep what computes; their negatives keep channels that do next to nothing."""
    masked = masked_model()
    with torch.no_grad():
        for layer in range(2):
            masked.base_weight(f"model.layers.{layer}.mlp.down_proj")[:, 10:] *= 1e-3
    useful_U = torch.zeros(masked.space.num_units)
    for name, view in masked.space.split(useful_U).items():
        view[:10] = 1.0 if "channels" in name else 5.0
        view[10:] = -1.0 if "channels" in name else 5.0
    wrong_U = torch.where(useful_U < 2, -useful_U, useful_U)
    scores = candidates(masked.space, {"useful": useful_U, "wrong": wrong_U}, [0.0])
    found = repaired_losses(masked, scores, lambda scores_U: select(masked.space, scores_U, 0.1), distance, batches())
    losses = found.losses
    assert found.best == "useful, attention +0"
    assert losses["useful, attention +0"] < 0.1 * losses["wrong, attention +0"]


@pytest.mark.parametrize("halving", [True, False])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_smaller_model_by_shared_moments_loses_what_the_masked_model_loses(
    halving: bool, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    masked, data = masked_model(), batches()
    if adapted:
        for name, parameter in masked.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    scores = {str(seed): torch.rand(masked.space.num_units) for seed in range(5)}
    moments = output_moments(masked)
    assert moments is not None
    with moments, torch.no_grad():
        for batch in data:
            moments.watch(batch["attention_mask"].bool())
            masked(**batch)

    def selected(scores_U: torch.Tensor) -> torch.Tensor:
        return select(masked.space, scores_U, 0.25)

    with monkeypatch.context() as patch:
        patch.setattr("atp.prepare.comparison._LARGEST_CUT_BYTES", 0)
        fits = OutputFits(dict(moments.checked()), 1e-3)
        masked_found = repaired_losses(masked, scores, selected, causal_loss, data, fits=fits, halving=halving)
    before = {name: value.clone() for name, value in masked.state_dict().items()}
    shared = OutputFits(dict(moments.checked()), 1e-3, several=True)
    small_found = repaired_losses(masked, scores, selected, causal_loss, data, fits=shared, halving=halving)
    assert all(torch.equal(value, masked.state_dict()[name]) for name, value in before.items())
    assert small_found.best == masked_found.best and small_found.batches == masked_found.batches
    assert small_found.losses == pytest.approx(masked_found.losses, rel=1e-5)
    assert small_found.batches[small_found.best] == len(data)
    assert (min(small_found.batches.values()) < len(data)) == halving


def test_memory_that_is_short_costs_time_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    masked, data = masked_model(), batches()
    scores = {str(seed): torch.rand(masked.space.num_units) for seed in range(5)}
    moments = output_moments(masked)
    assert moments is not None
    observe(masked, data, [moments])

    def found() -> dict[str, float]:
        chosen = repaired_losses(
            masked,
            scores,
            lambda scores_U: select(masked.space, scores_U, 0.25),
            causal_loss,
            data,
            fits=OutputFits(dict(moments.checked()), 1e-3, several=True),
        )
        return chosen.losses

    plenty = found()
    monkeypatch.setattr("atp.prepare.comparison._LARGEST_FITS_BYTES", 0)
    assert found() == plenty, "weights that are fitted again are other weights"
    monkeypatch.setattr("atp.prepare.comparison._LARGEST_CUT_BYTES", 0)
    assert found() == pytest.approx(plenty, rel=1e-5)
    monkeypatch.setattr("atp.prepare.least_squares._LARGEST_GRAM_BYTES", 0)
    assert output_moments(masked) is None


def test_one_pass_tells_what_separate_passes_tell() -> None:
    masked, data = masked_model(), batches()
    names = ["taylor", "wanda", "fluctuation", "taylor+wanda"]
    shared, limited = output_moments(masked), output_moments(masked, 2)
    assert shared is not None and limited is not None
    together = importances(names, masked, data, observers=[shared, limited])
    for name in names:
        assert torch.equal(together[name], importance(name, masked, data))
    for alone, counted, number in ((output_moments(masked), shared, 3), (output_moments(masked), limited, 2)):
        assert alone is not None
        observe(masked, data[:number], [alone])
        assert all(torch.equal(value, alone.checked()[name]) for name, value in counted.checked().items())
    once, again = masked_model(), masked_model()
    masks_U = select(masked.space, together["taylor"], 0.25)
    repair_outputs(once, masks_U, lambda: data)
    repair_outputs(again, masks_U, lambda: data, fits=OutputFits(shared.checked(), 1e-3))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in once.state_dict().items())


@given(st.integers(1, 40), st.integers(1, 64))
def test_rounds_halve_candidates_and_double_batches(number: int, count: int) -> None:
    found = rounds(number, count)
    assert found[-1] == count and found == sorted(set(found)) and found[0] >= 1
    assert all(later <= 2 * earlier for earlier, later in itertools.pairwise(found))
    left = number
    for _ in found[:-1]:
        left = -(-left // 2)
    assert left <= 2 or count < number


def distance(model: MaskedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A loss that is the distance from the unmasked model's logits."""
    made = model(input_ids=batch["input_ids"]).logits
    with model.unmasked():
        return (made - model(input_ids=batch["input_ids"]).logits).square().mean()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criteria": ["taylor", "tailor"]}, "criterion is 'tailor'"),
        ({"criteria": []}, "criterion is empty"),
        ({"ranking": "best"}, "ranking is 'best'"),
        ({"attention": []}, "attention is empty"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_measured(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    monkeypatch.setattr("atp.prepare.starts.importances", lambda *_: measured.append(1) or {})
    with pytest.raises(ValueError, match=message):
        starting_scores(masked_model(), batches(), lambda scores_U: scores_U, **{"criteria": ["taylor"], **settings})
    assert not measured


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prune/generator=transformer"], "TransformerGenerator cannot start from given scores"),
        (["prune.warm_start.batches=0"], "prune.repair.at is start"),
    ],
)
def test_a_start_that_cannot_be_made_is_refused_before_a_model_is_loaded(
    overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []
    monkeypatch.setattr("atp.run.parts.load_base", lambda *_, **__: loaded.append(1))
    with pytest.raises(ValueError, match=message):
        run(compose_config(["experiment=smoke", *overrides]), tmp_path / "one", overrides=[])
    assert not loaded


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"prune\.warm_start\.attention is empty"):
        candidates(SPACE, {"a": torch.zeros(SPACE.num_units)}, [])
    with pytest.raises(ValueError, match=r"raise prune\.warm_start\.batches"):
        repaired_losses(masked_model(), {}, lambda scores_U: scores_U, causal_loss, [])
