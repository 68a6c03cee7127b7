"""The domains benchmark: finished cells are kept, and tables say what they hold; no model is trained here."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import domains, domains_report
from benchmarks.domains import Options
from benchmarks.domains_report import CELLS, PRESETS

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
    cells = domains.tailored(Options(tmp_path, seeds=(0, 1)))
    assert cells["tailored/tailored_joint_50pct_1"]["recovery_vs_dense"]["mean"] == 90.0
    lines = domains_report.tailored(cells)
    assert any(line.startswith("| `tailored_20pct` | 0, 1 | 80.0 ± 0.0 | 79.2 ± 0.0 |") for line in lines)
    assert sum("holding/accuracy, same items: +10 ±" in line for line in lines) == 2
    one = domains_report.tailored(domains.tailored(Options(tmp_path, ratios=(0.5,))))
    rows = [line.split("|")[1].strip(" `") for line in one[2:7]]
    assert rows == ["tailored_50pct", "its dense + LoRA", "tailored_joint_50pct", "its dense + LoRA", "dense"]
    assert any("| 90.0 (40.0 to 60.0) | 1.200 (0.400 to 0.600) | 86.6 |" in line for line in one)


def test_the_ablation_and_the_real_domains_say_what_is_sure(tmp_path: Path) -> None:
    for train in ("no", "yes"):
        for inference in ("no", "yes"):
            finished(tmp_path / "ablation" / f"train_{train}_inference_{inference}", 0.9 if train == "yes" else 0.8)
    lines = domains_report.ablation(domains.ablation(Options(tmp_path)))
    assert lines[2].startswith("| no | no | 1.2000 | 0.4000 to 0.6000 |  |")
    assert "| yes | yes | 1.2000 | 0.4000 to 0.6000 | -" in lines[-1] and lines[-1].endswith("| 90.0 | 72 |")
    for domain in ("legal", "health"):
        finished(tmp_path / "real" / f"{domain}_50pct", 0.8, ("dense", "dense_lora", "taylor", "pruned"))
        finished(tmp_path / "real" / f"{domain}_50pct_published", 0.7, ("dense", "dense_lora", "pruned"))
    lines = domains_report.real(domains.real(Options(tmp_path, ratios=(0.5,))))
    assert "| legal, 50% | dense | 0.500 | 0.400 to 0.600 |  |  |" in lines
    assert "|  | joint | 0.500 | 0.400 to 0.600 | -0.0036 ± 0.0000 | +0.0000 ± 0.0000 |" in lines
    assert "| health, 50% | holding/accuracy | 40 | 80.0 | 80.0 | 70.0 | 80.0 | 80.0 |  |" in lines


def test_a_table_grows_by_what_is_measured_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(*arguments: str) -> str:
        domains.main(["real", "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), *arguments])
        return (tmp_path / "results" / "domains_real.md").read_text()

    for domain in ("legal", "health"):
        finished(tmp_path / "runs" / "real" / f"{domain}_20pct", 0.8, ("taylor", "pruned"))
        finished(tmp_path / "runs" / "real" / f"{domain}_20pct_published", 0.8, ("pruned",))
    assert "50%" not in measure("--ratios", "0.2")
    shutil.rmtree(tmp_path / "runs")  # finished cells are lost, the table is not
    for domain in ("legal", "health"):
        finished(tmp_path / "runs" / "real" / f"{domain}_50pct", 0.8, ("taylor", "pruned"))
        finished(tmp_path / "runs" / "real" / f"{domain}_50pct_published", 0.8, ("pruned",))
    table = measure("--quick")
    order = [table.index(label) for label in ("| legal, 20%", "| legal, 50%", "| health, 20%", "| health, 50%")]
    assert order == sorted(order)
    capsys.readouterr()
    assert "20%" not in measure("--quick", "trainer.max_steps=9")  # other settings are never mixed in
    assert "other settings: real/legal_20pct, real/health_20pct" in capsys.readouterr().out


def test_the_matrix_is_a_table_and_a_picture(tmp_path: Path) -> None:
    scores = {column: {"rougeL" if column.endswith("bill") else "accuracy": 0.5} for column in CELLS}
    counts = {column: dict.fromkeys(values, 40) for column, values in scores.items()}
    for cell in CELLS:
        folder = tmp_path / "matrix" / cell.replace("/", "_")
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(
            json.dumps({"tasks": {"dense": scores, "pruned": scores}, "task_counts": counts})
        )
    domains.main(["matrix", "--out", str(tmp_path)])
    table = (tmp_path / "domains_matrix.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["dense", *CELLS, "items"]
    assert table[-2:] == ["| health/inference | 50.0 | 50.0 | 50.0 | **50.0** |", "| items | 40 | 40 | 40 | 40 |"]
    assert (tmp_path / "matrix.png").stat().st_size > 1000


def test_a_failed_cell_names_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(SystemExit, match=r"broken failed, see .*broken\.log"):
        Options(tmp_path).run("broken", "experiment=no_such_preset")
