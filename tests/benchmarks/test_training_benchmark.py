"""The training benchmark measures what it says, at a size that takes no time; its GPU section runs anywhere."""

from __future__ import annotations

import pytest
import torch

from benchmarks.training import memory_section, runs_section, steps_section
from benchmarks.training_gpu import SYSTEMS, Section
from benchmarks.training_growth import fit_growth
from benchmarks.training_systems import Shape, Workload, fit

TINY = Shape("tiny", 32, 2, 4, 2, 64, 128, 2, 32)


def test_masks_cost_no_activations_and_the_cut_frees_some() -> None:
    ratios = memory_section(Workload(TINY))["ratios"]
    before, after = (ratios[f"activations kept {when} the cut / plain LoRA"] for when in ("before", "after"))
    assert before < 0.98
    assert after < 0.75


def test_a_whole_run_goes_through_calibration_freeze_and_cut() -> None:
    work = Workload(TINY, overrides=("trainer.max_steps=12", "prune.warm_start.batches=2"))
    module = work.joint_run(work.batches(2))
    seconds = fit(module, work.batches(12))
    assert len(seconds) == 12
    assert bool(module.is_compact)
    halved = work.two_stage(work.batches(2))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (work.system("plain"), halved)]
    assert sizes[1] < sizes[0]


def test_steps_and_runs_of_all_systems_are_timed() -> None:
    steps = steps_section(Workload(TINY), 1, 2, "cpu")
    assert set(steps["rounds_s"]) == {"plain", "joint", "taught", "alternate", "compact", "taylor"}
    assert all(ratio > 0 for ratio in steps["ratios"].values())
    runs = runs_section(Workload(TINY), 1, 12, "cpu")
    assert len(runs["seconds"]["default"]) == 1
    assert all(ratio > 0 for ratio in runs["ratios"].values())


def test_the_gpu_section_measures_every_system() -> None:
    saved: list[int] = []
    section = Section("cpu", [TINY], [16], torch.float32, compiled_too=False, quantized_too=False)
    section.save = lambda found: saved.append(len(found["cells"]))
    found = section.run()
    assert [cell["system"] for cell in found["cells"]] == [*SYSTEMS, "alternate", *SYSTEMS]
    assert all(cell["tokens_per_s"] > 0 and cell["peak_gib"] > 0 for cell in found["cells"])
    assert found["profiles"]["tiny"][0]["ms"] > 0
    assert saved == [4, 7]


def test_cells_that_time_does_not_allow_are_listed() -> None:
    found = Section("cpu", [TINY], [16], torch.float32, compiled_too=False, quantized_too=False, seconds=-1.0).run()
    assert not found["cells"]
    assert [cell["checkpointing"] for cell in found["not_run"]] == [False, True]


def test_growth_is_fitted() -> None:
    law = fit_growth([1.0, 2.0, 4.0], [3.0, 12.0, 48.0])
    assert law["exponent"] == pytest.approx(2.0)
    line = fit_growth([1.0, 2.0, 3.0], [5.0, 7.0, 9.0])
    assert (line["slope"], line["intercept"], line["linear_r2"]) == pytest.approx((2.0, 3.0, 1.0))
