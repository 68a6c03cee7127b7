"""Sweeps as files: shared results, marks of jobs, folder names, and when a trial counts as bad."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from atp.atomic import write_json
from atp.commands.train import compose_config
from atp.config.schema import folder_name
from atp.run.results import _run, _seconds_by_part
from atp.run.stopwatch import Stopwatch
from atp.run.sweep import (
    SharedResults,
    clear_mark,
    lease_gpu,
    mark_job,
    read_job,
    read_jobs,
    start_sweep,
    summary_lines,
)
from atp.train.joint import PruningModule
from atp.train.trials import StopBadTrial, TrialStopped

CONFIG: dict[str, Any] = {
    "name": "a",
    "seed": 0,
    "data": {"max_length": 64},
    "prune": {"sparsity": 0.5},
    "lora": {"r": 8},
    "trainer": {"max_steps": 4, "accelerator": "cpu"},
    "evaluate": {"speed": True, "speed_repeats": 5, "max_generate": 4},
}


def changed(**groups: Any) -> dict[str, Any]:
    return {
        key: {**value, **groups.get(key, {})} if isinstance(value, dict) else groups.get(key, value)
        for key, value in CONFIG.items()
    }


def test_reference_is_shared_exactly_when_nothing_it_depends_on_differs(tmp_path: Path) -> None:
    key = SharedResults(tmp_path, CONFIG).key
    same = changed(name="b", prune={"sparsity": 0.2}, trainer={"accelerator": "gpu"}, evaluate={"speed_repeats": 9})
    assert SharedResults(tmp_path, same).key("dense_lora") == key("dense_lora")
    for other in (changed(seed=1), changed(data={"max_length": 32}), changed(evaluate={"max_generate": 8})):
        assert SharedResults(tmp_path, other).key("dense") != key("dense")
        assert SharedResults(tmp_path, other).key("dense_lora") != key("dense_lora")
    tuned = SharedResults(tmp_path, changed(lora={"r": 16}))
    assert tuned.key("dense") == key("dense") and tuned.key("dense_lora") != key("dense_lora")


def test_references_are_shared_only_by_runs_whose_prompts_and_callbacks_are_the_same(tmp_path: Path) -> None:
    """A prompt stands before all records; a callback may change how dense + LoRA trains, not the dense base."""

    def keys(**groups: Any) -> list[str]:
        shared = SharedResults(tmp_path, {"callbacks": {}, **changed(**groups), **groups.get("top", {})})
        return [shared.key(stage) for stage in SharedResults.STAGES]

    dense, dense_lora = keys()
    own = keys(top={"prompt": {"train": True, "inference": True}})
    assert own[0] != dense and own[1] != dense_lora
    assert keys(top={"prompt": {"train": True, "inference": True}}, prune={"sparsity": 0.3}) == own
    assert keys(prune={"distill": {"logits": 0.5}}) == [dense, dense_lora]  # the dense base has no teacher
    called = keys(top={"callbacks": {"average": {"_target_": "some.Average"}}})
    assert called[0] == dense and called[1] != dense_lora
    assert keys(trainer={"val_checks": 2})[1] != dense_lora  # when a callback that stops early is asked


def test_exact_and_compresso_in_one_sweep_share_no_reference(tmp_path: Path) -> None:
    exact, compresso, ratio = (
        SharedResults(tmp_path, OmegaConf.to_container(compose_config([f"prune={method}", sparsity])))  # type: ignore[arg-type]
        for method, sparsity in (
            ("exact", "prune.sparsity=0.5"),
            ("compresso", "prune.sparsity=0.5"),
            ("exact", "prune.sparsity=0.3"),
        )
    )
    for stage in SharedResults.STAGES:
        assert exact.key(stage) != compresso.key(stage) and exact.key(stage) == ratio.key(stage)


def test_shared_work_is_done_once_and_not_kept_when_it_fails(tmp_path: Path) -> None:
    shared, done = SharedResults(tmp_path / "shared", CONFIG), []

    def work() -> dict[str, Any]:
        done.append(1)
        if len(done) == 1:
            raise RuntimeError("first try")
        return {"values": {"perplexity": 2.0}}

    with pytest.raises(RuntimeError):
        shared.take("dense", work)
    assert shared.take("dense", work) == {"values": {"perplexity": 2.0}}
    again = SharedResults(tmp_path / "shared", changed(name="other")).take("dense", work)
    assert again["values"] == {"perplexity": 2.0} and "shared_from" in again and len(done) == 2


def test_seconds_of_a_shared_stage_are_not_this_runs() -> None:
    config = OmegaConf.to_object(compose_config([]))
    results = {
        "fit": {"seconds": 5.0, "train_peak_kind": "process_rss"},
        "dense": {"seconds": 90.0, "shared_from": "shared/dense_1.json"},
    }
    told = _run(results, config, "cpu")  # type: ignore[arg-type]
    assert told["seconds"] == {"fit": 5.0} and told["shared"] == {"dense": "shared/dense_1.json"}


def test_time_is_told_by_part_and_without_what_another_run_did() -> None:
    results = {
        "fit": {"parts": {"load": 1.0, "importance": 3.0, "training": 9.0, "fit": 0.5}},
        "dense": {"parts": {"load": 1.0, "evaluation": 50.0}, "shared_from": "shared/dense_1.json"},
        "pruned": {"parts": {"load": 0.5, "evaluation": 2.0, "pruned": 0.25}},
        "dense_lora": {"parts": {"training": 7.0, "evaluation": 2.0, "dense_lora": 1.0}},
        "wanda": {"parts": {"importance": 1.0, "reconstruction": 1.0, "training": 7.0}},
        "cost": {"parts": {"load": 0.5, "cost": 4.0}},
    }
    told = _seconds_by_part(results, {"load": 2.0, "data": 5.0})
    assert told["load"] == 4.0 and told["data"] == 5.0 and told["importance"] == 3.0
    assert told["training"] == 9.5 and told["evaluation"] == 4.25 and told["cost"] == 4.0
    assert told["dense_lora"] == 8.0 and told["wanda"] == 9.0 and "reconstruction" not in told


def test_a_second_counts_in_the_innermost_part(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 5.0, 6.0, 10.0, 10.0, 10.0])
    monkeypatch.setattr("atp.run.stopwatch.time.perf_counter", lambda: next(clock))
    watch = Stopwatch()
    with watch.part("training"):
        with watch.part("reconstruction"):
            pass
        with pytest.raises(RuntimeError), watch.part("training"):
            raise RuntimeError
    assert watch.take() == {"training": 7.0, "reconstruction": 3.0}


def test_jobs_are_told_with_their_reasons(tmp_path: Path) -> None:
    start_sweep(tmp_path, ["prune.sparsity=0.2,0.3"])
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "a" / "metrics.json").write_text("{}")
    mark_job(tmp_path / "b", "failed", "ValueError: too much")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "job.json").write_text("not json")
    jobs = read_jobs(tmp_path)
    assert [job.state for job in jobs] == ["finished", "failed", "unfinished", "failed"]
    text = "\n".join(summary_lines(tmp_path, jobs))
    assert "1 finished, 2 failed, 1 unfinished" in text and "failed: b: ValueError: too much" in text
    assert f"python -m atp.report {tmp_path}" in text
    clear_mark(tmp_path / "b")
    assert read_job(tmp_path / "b").state == "unfinished"


@pytest.mark.parametrize("preset", ["ratios", "optuna"])
def test_a_sweep_trains_no_baselines_unless_asked(preset: str) -> None:
    if preset == "optuna":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra 'sweep'")
    overrides = ["experiment=legal_50pct", f"sweep={preset}"]
    assert compose_config(overrides).evaluate.baselines == []
    assert compose_config([*overrides, "evaluate.baselines=[random]"]).evaluate.baselines == ["random"]
    assert compose_config(["experiment=legal_50pct"]).evaluate.baselines


def test_folder_names_hold_no_separators_and_stay_apart() -> None:
    assert folder_name("model.path=/a/b c,prune.sparsity=0.2") == "model.path=_a_b_c,prune.sparsity=0.2"
    long = [folder_name("x=" + "a" * 300 + end) for end in "12"]
    assert long[0] != long[1] and max(map(len, long)) <= 150


def test_one_gpu_needs_no_lease(tmp_path: Path) -> None:
    assert lease_gpu(tmp_path, 0) is None and lease_gpu(tmp_path, 1) is None
    assert not list(tmp_path.iterdir())


def validate(folder: Path, name: str, step: int, value: float, *, frozen: bool = True, **settings: Any) -> None:
    (folder / name).mkdir(exist_ok=True)
    metrics = {"val/perplexity": torch.tensor(value)}
    trainer: Any = SimpleNamespace(sanity_checking=False, callback_metrics=metrics, global_step=step, max_steps=10)
    module = PruningModule.__new__(PruningModule)
    module.frozen = frozen
    StopBadTrial(str(folder / name), **settings).on_validation_end(trainer, module)


def test_a_trial_worse_than_the_median_is_stopped(tmp_path: Path) -> None:
    for name, value in (("a", 2.0), ("b", 3.0), ("c", 4.0)):
        validate(tmp_path, name, 5, value)
    validate(tmp_path, "d", 3, 9.0)
    with pytest.raises(TrialStopped, match=r"val/perplexity is 9 at step 5, above the median 3 of 3 others") as stop:
        validate(tmp_path, "d", 5, 9.0)
    assert stop.value.value == 9.0 and json.loads((tmp_path / "d" / "trial.json").read_text()) == {"3": 9.0, "5": 9.0}
    validate(tmp_path, "e", 5, 2.5)
    validate(tmp_path, "f", 5, 9.0, min_trials=9)
    with pytest.raises(TrialStopped):
        validate(tmp_path, "g", 5, float("nan"))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("prune.sparsity", 0.6), ("model.path", "other"), ("data.domain", "health"), ("trainer.max_steps", 20)],
)
def test_a_trial_is_held_against_trials_of_its_own_target_base_and_data(
    tmp_path: Path, setting: str, value: Any
) -> None:
    def record(name: str, *overrides: str) -> None:
        config = OmegaConf.to_container(compose_config(["experiment=smoke", "callbacks=stop_bad_trials", *overrides]))
        write_json(tmp_path / name / "config.json", {"config": config})

    for name in "abc":
        record(name)
        validate(tmp_path, name, 5, 2.0)
    record("d", f"{setting}={value}")
    validate(tmp_path, "d", 5, 9.0)
    record("e", "optim.lr=0.1", "data.batch_size=1")
    with pytest.raises(TrialStopped, match="of 3 others"):
        validate(tmp_path, "e", 5, 9.0)


def test_a_trial_is_neither_stopped_nor_held_against_others_before_its_masks_are_fixed(tmp_path: Path) -> None:
    for name in "abc":
        validate(tmp_path, name, 5, 2.0, frozen=False)
    validate(tmp_path, "d", 5, 9.0)
    for name in "efg":
        validate(tmp_path, name, 5, 2.0)
    validate(tmp_path, "h", 5, 9.5, frozen=False)
    with pytest.raises(TrialStopped):
        validate(tmp_path, "h", 5, 9.5)


@pytest.mark.parametrize(
    ("settings", "field"), [({"after": 2.0}, "after is 2"), ({"min_trials": 0}, "min_trials is 0")]
)
def test_bad_settings_of_the_median_rule(settings: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=field):
        StopBadTrial(str(tmp_path), **settings)
