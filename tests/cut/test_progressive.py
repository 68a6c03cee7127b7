"""Early cuts: what they may take, that nothing else changes, and that runs resume across them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from test_compaction import adapters, batch, masked_model, train
from test_module import StopAt, assert_same, fit, make_module, trained_state

from atp.cut.compaction import cut_live, expanded_state
from atp.cut.progressive import ProgressiveCut
from atp.cut.selection import select
from atp.train.joint import PruningModule


def test_a_unit_goes_after_enough_unlikely_steps_in_a_row_and_only_if_selection_drops_it() -> None:
    cut = ProgressiveCut(4, cuts=1, below=0.1, patience=2)
    for step, keep in enumerate([[0.0, 0.0, 0.0, 0.5], [0.05, 0.05, 0.2, 0.5], [0.01, 0.0, 0.0, 0.5]]):
        cut.observe(torch.tensor(keep), step)
        cut.observe(torch.tensor([1.0, 1.0, 1.0, 1.0]), step)  # another pass of the same step
    assert cut.quiet_U.tolist() == [3, 3, 1, 0]
    assert cut.decided(torch.tensor([0.0, 1.0, 0.0, 0.0])).tolist() == [0.0, 1.0, 1.0, 1.0]


def test_cuts_are_spaced_evenly_and_made_once() -> None:
    cut = ProgressiveCut(1, cuts=3)
    assert [step for step in range(50) for _ in range(2) if cut.is_due(step, 4, 44)] == [14, 24, 34]


@pytest.mark.parametrize("bad", [{"cuts": 0}, {"cuts": 1, "below": 1.0}, {"cuts": 1, "patience": 0}])
def test_numbers_out_of_range_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"prune\.progressive is cuts"):
        ProgressiveCut(3, **bad)


def test_training_goes_on_through_two_cuts_as_if_nothing_was_cut() -> None:
    masked, reference = (masked_model("llama", "gqa", ("heads", "channels")) for _ in range(2))
    space = masked.space
    scores_U = torch.rand(space.num_units, generator=torch.Generator().manual_seed(2))
    early_U, final_U = select(space, scores_U, 0.2), select(space, scores_U, 0.45)
    soft_U = early_U * (0.3 + 0.7 * scores_U)
    optimizers = []
    for model in (masked, reference):
        model.set_masks(soft_U)
        optimizers.append(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
        train(model, optimizers[-1], range(2))
    live_U = cut_live(masked, early_U, optimizers[:1], final=False)
    assert torch.equal(live_U, early_U)
    for model, steps in ((masked, range(2, 4)), (reference, range(2, 4))):
        model.set_masks(soft_U)
        train(model, optimizers[model is reference], steps)
    grads = []
    for model in (masked, reference):  # masks of what is left still learn
        masks_U = soft_U.clone().requires_grad_()
        model.set_masks(masks_U)
        model(**batch(7)).loss.backward()
        grads.append(masks_U.grad * early_U)
        model.zero_grad()
    assert torch.allclose(*grads, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"prune\.compact=false"), masked.unmasked():
        pass
    cut_live(masked, final_U, optimizers[:1])
    reference.set_masks(final_U)
    assert train(masked, optimizers[0], range(4, 7)) == pytest.approx(
        train(reference, optimizers[1], range(4, 7)), rel=1e-4
    )
    state = dict(expanded_state(adapters(masked), space, final_U, early_U))
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in adapters(reference).items()}


class Sizes(Callback):
    """Notes how many parameters the model has at every step."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.seen.append(sum(p.numel() for p in pl_module.model.parameters()))


def make_progressive(seed: int = 0, method: str = "exact", **options: Any) -> PruningModule:
    units = make_module(method).space.num_units
    cut = ProgressiveCut(units, cuts=1, below=0.5, patience=1)
    module = make_module(method, seed=seed, compaction=True, progressive=cut, **options)
    start_U = torch.randn(units, generator=torch.Generator().manual_seed(4 + seed))
    module.generator.warm_start(start_U)
    return module


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_model_shrinks_before_the_freeze_and_again_at_it(accumulate: int, tmp_path: Path) -> None:
    module, sizes = make_progressive(), Sizes()
    fit(module, tmp_path / "a.ckpt", sizes, accumulate=accumulate)
    changes = [i // accumulate for i in range(1, len(sizes.seen)) if sizes.seen[i] < sizes.seen[i - 1]]
    assert changes == [4, 6]
    assert bool(module.is_compact)
    assert float(module.space.sparsity(module.final_masks_U.double())) == pytest.approx(0.5, abs=0.02)
    assert module.progressive is not None
    assert not (module.final_masks_U[module.progressive.live_U == 0]).any()


@pytest.mark.parametrize("stop", [2, 3, 4, 5, 7], ids=["ramp", "at-cut", "after", "at-freeze", "frozen"])
def test_resume_across_early_cuts_to_the_last_bit(stop: int, tmp_path: Path) -> None:
    whole = make_progressive()
    fit(whole, tmp_path / "whole.ckpt")
    part = make_progressive()
    assert fit(part, tmp_path / "part.ckpt", StopAt(stop)).interrupted
    resumed = make_progressive(seed=99)
    fit(resumed, tmp_path / "part.ckpt", resume=True)
    assert_same(trained_state(whole), trained_state(resumed))


def test_where_it_cannot_work_it_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = make_progressive(round_to=2)
    fit(module, tmp_path / "a.ckpt")
    assert module.progressive is None
    assert "prune.progressive is ignored" in caplog.text
    fit(make_progressive(round_to=2), tmp_path / "a.ckpt", resume=True)


@pytest.mark.parametrize(
    ("options", "reason"), [({"gates": "soft"}, "prune.gates is soft"), ({"round_to": 2}, "prune.round_to is 2")]
)
def test_the_warning_names_what_stands_against_early_cuts(
    options: dict[str, Any], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(make_progressive(**options), tmp_path / "a.ckpt")
    assert f"prune.progressive is ignored: {reason}" in caplog.text
