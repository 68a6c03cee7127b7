"""The quality benchmark's own parts: overlap check, choice of rates, excess loss; no model is trained here."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.quality_cells import Cell
from benchmarks.quality_data import SETTINGS, overlap, prepare, without_overlap
from benchmarks.quality_report import best_rate, plot, summarise, table, targets

STORY = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"


def cell(method: str, lr: float, seed: int, loss: float, validation: float | None = None, **of: Any) -> dict[str, Any]:
    place = {"setting": "stories", "sparsity": 0.5, "arm": "", "steps": None, **of}
    return {
        "cell": {"method": method, "lr": lr, "seed": seed, **place},
        "loss": loss,
        "validation_loss": loss if validation is None else validation,
        "values": {"perplexity": 2.0, "bits_per_byte": loss},
        "parameters": 1_000_000,
        "sparsity": 0.5,
        "fit_seconds": 10.0,
    }


def test_equal_and_nearly_equal_texts_are_left_out_of_training() -> None:
    train = [{"text": STORY.upper()}, {"text": STORY + " seventeen"}, {"text": "another text altogether"}]
    kept, report = without_overlap(train, [{"text": STORY}])
    assert [row["text"] for row in kept] == ["another text altogether"]
    assert (report["equal"], report["near_duplicates"], report["left_out"]) == (1, 1, 2)
    assert overlap(kept, [{"text": STORY}])[0] == []
    with pytest.raises(ValueError, match="overlap"):
        without_overlap(train[:2], [{"text": STORY}])


def test_the_rate_is_chosen_by_validation_not_by_test_loss() -> None:
    cells = [cell("a", 1e-3, 0, loss=1.0, validation=3.0), cell("a", 1e-2, 0, loss=2.0, validation=2.0)]
    assert best_rate(cells) == 1e-2


def test_excess_loss_is_taken_seed_by_seed_against_dense_lora() -> None:
    cells = [cell("dense_lora", 1e-2, seed, 1.0 + seed, sparsity=0.0) for seed in (0, 1)]
    cells += [cell("exact", 1e-2, seed, 1.4 + seed) for seed in (0, 1)]
    cells += [cell("taylor", 1e-2, seed, 1.5 + seed) for seed in (0, 1)]
    cells += [cell("taylor", 1e-2, 0, 1.45, steps=700)]
    rows = {(row["method"], row["steps"]): row for row in summarise(cells)}
    assert rows["exact", None]["excess"] == pytest.approx(0.4)
    assert rows["exact", None]["excess_sd"] == pytest.approx(0.0)
    lines = targets(list(rows.values()), "exact")
    assert any("= 0.80x at equal tokens" in line for line in lines)
    assert any("taylor + 700 steps 0.450 nats = 0.89x at other steps" in line for line in lines)
    assert table(list(rows.values())).count("\n") == 5


def test_the_default_is_held_against_two_stage_methods_with_additions_too() -> None:
    cells = [cell("dense_lora", 1e-2, 0, 1.0, sparsity=0.0), cell("exact", 1e-2, 0, 1.4)]
    cells += [cell("wanda", 1e-2, 0, 1.5), cell("wanda", 1e-2, 0, 1.25, arm="least_squares")]
    cells += [cell("wanda", 1e-2, 0, 1.2, arm="blockwise"), cell("taylor", 1e-2, 0, 1.3, arm="blockwise")]
    cells += [cell("exact", 1e-2, 0, 1.3, arm="least_squares")]
    lines = targets(summarise(cells), "exact")
    assert [line.split(" at equal")[0].split(": ")[1] for line in lines] == [
        "exact + least_squares 0.300 vs best two-stage wanda + least_squares 0.250 nats = 1.20x",
        "exact 0.400 vs best two-stage wanda 0.500 nats = 0.80x",
        "exact 0.400 vs best two-stage wanda + blockwise 0.200 nats = 2.00x",
        "exact 0.400 vs best two-stage wanda + least_squares 0.250 nats = 1.60x",
    ]


def test_the_plot_is_written(tmp_path: Any) -> None:
    rows = summarise([cell("dense_lora", 1e-2, 0, 1.0, sparsity=0.0), cell("exact", 1e-2, 0, 1.2)])
    plot(rows, tmp_path / "figures" / "quality.png")
    assert (tmp_path / "figures" / "quality.png").stat().st_size > 5000


def test_cells_name_what_they_run() -> None:
    one = Cell("stories260K", 0.5, "exact", "distill", 0.01, 2)
    assert one.key == "stories260K-s0.5-exact-distill-lr0.01-seed2"
    overrides = one.overrides(["model=embedded"])
    assert overrides[:2] == ["model=embedded", "prune=exact"]
    assert {"prune.sparsity=0.5", "optim.lr=0.01", "prune.distill.logits=0.5", "seed=2"} <= set(overrides)
    assert not [o for o in Cell("stories260K", 0.0, "dense", "", 0.01, 0).overrides([]) if o.startswith("prune")]


def test_real_texts_do_not_overlap(shared: Any, tmp_path: Any) -> None:
    overrides, report = prepare(SETTINGS["stories260K"], tmp_path)
    assert report["train_texts"] > 1000 and report["held_out_texts"] == 300
    assert f"data.test_path={tmp_path}/stories_test.jsonl" in overrides


def test_the_sibling_must_be_named(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="--sibling DIR"):
        prepare(SETTINGS["sibling"], tmp_path)
