"""Before the first step: what it takes, and that an interrupted baseline goes on with the cut it began with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from atp.commands.train import compose_config
from atp.evaluate.measure import PeakMemory
from atp.run.directory import RunDirectory
from atp.run.stages import Stages
from atp.train.tuning import TuningModule


def make_stages(folder: Path) -> Stages:
    overrides = ["experiment=smoke", "trainer.checkpoint_every_n_steps=2", "evaluate.forgetting=[]"]
    config: Any = OmegaConf.to_object(compose_config([*overrides, "evaluate.max_generate=0"]))
    return Stages(config, RunDirectory(folder, {}, [], resume=True), {}, {})


@pytest.mark.parametrize("failing", [1, 4], ids=["before a checkpoint", "after one"])
def test_a_resumed_baseline_is_not_repaired_again(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning import seed_everything

    from atp.run import preparation

    repaired: list[int] = []
    real_repair, real_step = preparation.repair, TuningModule.training_step
    monkeypatch.setattr(preparation, "repair", lambda *a: repaired.append(1) or real_repair(*a))

    def begin(folder: Path) -> dict[str, Any]:
        seed_everything(0, verbose=False)
        return make_stages(folder).tune_baseline("uniform")

    whole = begin(tmp_path / "whole")

    def fails(module: TuningModule, batch: Any, index: int) -> Any:
        if index == failing:
            raise RuntimeError("killed")
        return real_step(module, batch, index)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(TuningModule, "training_step", fails)
        begin(tmp_path / "part")
    assert len(repaired) == 2
    resumed = begin(tmp_path / "part")
    assert len(repaired) == 2 and resumed["values"] == whole["values"] and resumed["sparsity"] == whole["sparsity"]
    assert not list((tmp_path / "part" / "checkpoints").glob("*_cut*"))


def test_the_peak_of_training_holds_what_came_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from atp.run import stages as module

    during: list[str] = []

    @contextmanager
    def peak_memory(device: Any) -> Iterator[PeakMemory]:
        peak = PeakMemory(kind="process_rss")
        during.append("")
        yield peak
        peak.mib = 900.0 if "warm_start" in during[-1] else 100.0

    def note(name: str) -> Callable[..., None]:
        return lambda *_: during.__setitem__(-1, during[-1] + name)

    monkeypatch.setattr(module, "peak_memory", peak_memory)
    stages = make_stages(tmp_path)
    monkeypatch.setattr(stages, "_warm_start", note("warm_start "))
    monkeypatch.setattr(stages.preparation, "repair_start", note("repair "))
    monkeypatch.setattr(stages, "_fit", note("fit "))
    expected = {"train_peak_mib": 900.0, "steps_peak_mib": 100.0, "train_peak_kind": "process_rss"}
    assert stages.fit_jointly() == expected
    assert during == ["warm_start repair ", "fit "]
    stages.directory.checkpoint("joint").parent.mkdir(parents=True, exist_ok=True)
    stages.directory.checkpoint("joint").touch()
    assert stages.fit_jointly() == expected, "a resumed run forgot what its preparation took"
