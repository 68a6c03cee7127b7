"""The domains benchmark: finished cells are kept, and tables say what they hold; no model is trained here."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.domains import PRESETS, Options, ablation, real, tailored

METRICS = ("perplexity", "bits_per_byte", "holding/accuracy")


def finished(folder: Path, accuracy: float, stages: tuple[str, ...] = ("pruned",)) -> None:
    """A finished cell of 40 items, so many of which are right."""
    (folder / "stages").mkdir(parents=True)
    right = [float(i < 40 * accuracy) for i in range(40)]
    nats = [2.0 - accuracy + 0.01 * i for i in range(40)]
    items = {
        "holding/accuracy": {"statistic": "mean", "first": right, "second": []},
        "perplexity": {"statistic": "perplexity", "first": nats, "second": [10.0] * 40},
        "bits_per_byte": {"statistic": "bits", "first": nats, "second": [40.0] * 40},
    }
    for stage in stages:
        (folder / "stages" / f"{stage}.json").write_text(json.dumps({"items": items}))
    values = {"perplexity": 1.2, "bits_per_byte": 0.5, "holding/accuracy": accuracy}
    models = ("dense", "dense_lora", "taylor", "pruned")
    metrics = {
        "eval": {model: values for model in models},
        "intervals": {model: {name: [0.4, 0.6] for name in METRICS} for model in models},
        "eval_counts": {"holding/accuracy": 40},
        "recovery_vs_dense": {"mean": 100 * accuracy},
        "recovery": {"mean": 99 * accuracy},
        "prompt": {"name": "x", "tokens_added": 72.0},
        "overlap": {},
        "forgetting": {},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_few_shot_cells_are_averaged_over_seeds_and_compared_item_by_item(tmp_path: Path) -> None:
    for preset in PRESETS:
        for seed in (0, 1):
            finished(tmp_path / "tailored" / f"{preset}_{seed}", 0.9 if "joint" in preset else 0.8)
    found, lines = tailored(Options(tmp_path, seeds=(0, 1)))
    assert found["tailored_joint_50pct"]["recovery_vs_dense"] == [90.0, 90.0]
    assert any(line.startswith("| `tailored_20pct` | 80.0 ± 0.0 | 79.2 ± 0.0 |") for line in lines)
    assert sum("holding/accuracy, same items, by seed: +10 ±" in line for line in lines) == 2


def test_the_ablation_and_the_real_domains_say_what_is_sure(tmp_path: Path) -> None:
    for train in ("no", "yes"):
        for inference in ("no", "yes"):
            finished(tmp_path / "ablation" / f"train_{train}_inference_{inference}", 0.9 if train == "yes" else 0.8)
    _, lines = ablation(Options(tmp_path))
    assert "| yes | yes | 1.2000 | 0.4000 to 0.6000 | -" in lines[-1] and lines[-1].endswith("| 90.0 | 72 |")
    for domain in ("legal", "health"):
        finished(tmp_path / "real" / f"{domain}_50pct", 0.8, ("dense", "dense_lora", "taylor", "pruned"))
    _, lines = real(Options(tmp_path, quick=True))
    assert "| legal, 50% | dense | 0.500 | 0.400 to 0.600 |  |" in lines
    assert "|  | joint | 0.500 | 0.400 to 0.600 | +0.0000 ± 0.0000 |" in lines
    assert "| health, 50% | holding/accuracy | 40 | 80.0 | 80.0 | 80.0 | 80.0 |  |" in lines


def test_a_failed_cell_names_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(SystemExit, match=r"broken failed, see .*broken\.log"):
        Options(tmp_path).run("broken", "experiment=no_such_preset")
