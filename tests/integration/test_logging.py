"""What a run logs, read back from wandb's offline file and compared with the run directory's own files."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import wandb_file

from atp.commands import dashboard

ROOT = Path(__file__).parent.parent.parent
STEPS, EVERY = 12, 2


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with the wandb logger, without a login and without anyone to ask; and what it printed."""
    folder = tmp_path_factory.mktemp("logged")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [
        "experiment=smoke",
        "evaluate=quick",
        "prune=l0",
        "prune.lasso.weight=0.01",
        "prune.distill.logits=0.3",
    ]
    arguments += ["logger=wandb", "run_dir=w", "trainer.val_checks=3"]
    arguments += [f"trainer.max_steps={STEPS}", f"trainer.log_every_n_steps={EVERY}", "export.artifact=true"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "w", done.stdout


def test_every_scalar_is_there_with_the_right_number_of_points(logged: tuple[Path, str]) -> None:
    run, printed = logged
    (file,) = (run / "wandb").rglob("*.wandb")
    assert f"wandb sync {file.parent}" in printed
    history = wandb_file.read(file)["history"]
    names = ["train/loss", "train/task_loss", "train/budget_loss", "train/data_loss", "train/distillation_loss"]
    names += ["train/group_lasso", "mask/phase"]
    names += ["mask/sparsity", "mask/target_sparsity", "mask/lambda_1", "mask/lambda_2", "mask/temperature"]
    names += ["mask/entropy", "mask/flips", "mask/sampled_flips", "mask/heads_kept", "mask/channels_kept"]
    names += [f"{kind}/{group}" for kind in ("lr", "grad_norm") for group in ("lora", "generator")] + ["lr/multipliers"]
    names += [f"{kind}_kept/layer_{layer:02d}" for kind in ("heads", "channels") for layer in range(6)]
    names += ["train/tokens_per_second", "memory/process_mib"]
    steps = [0, *range(EVERY - 1, STEPS, EVERY)]  # the first step too: a big model's tenth may come after minutes
    pruning = [step for step in steps if 0 < step < 4]  # between warm-up and freeze, where the generator learns
    for name in names:
        logged_at = [step for step, _ in history[name]]
        assert logged_at == (pruning if name == "grad_norm/generator" else steps), name
    assert len(history["val/perplexity"]) == len(history["val/loss"]) == 3


def test_the_csv_file_holds_what_wandb_holds(logged: tuple[Path, str]) -> None:
    run, _ = logged
    (file,) = (run / "wandb").rglob("*.wandb")
    history = wandb_file.read(file)["history"]
    with (run / "metrics" / "train.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    for name in set(rows[0]) - {"step", "epoch"}:
        here = [(int(row["step"]), pytest.approx(float(row[name]), nan_ok=True)) for row in rows if row[name]]
        assert history[name] == here, name


def test_pictures_tables_and_final_figures(logged: tuple[Path, str]) -> None:
    run, _ = logged
    (file,) = (run / "wandb").rglob("*.wandb")
    found = wandb_file.read(file)
    pictured = [json.loads(line) for line in (run / "metrics/joint/mask_history.jsonl").read_text().splitlines()]
    for kind, columns in (("heads", 3), ("channels", 32)):
        files = found["history"][f"mask_picture/{kind}.filenames"]
        assert [step for step, _ in files] == [record["step"] for record in pictured]
        assert all((file.parent / "files" / name).is_file() for _, (name,) in files)
        assert found["history"][f"mask_data/{kind}.nrows"][0][1] == 6 * columns
        assert all((run / f"figures/masks/{kind}_{record['step']:06d}.png").is_file() for record in pictured)
        masks = json.loads((run / "masks.json").read_text())["axes"]
        last = [sum(row) / len(row) for row in pictured[-1]["kept"][kind]]
        exact = [sum(masks[f"layers.{layer}.{kind}"]) / len(masks[f"layers.{layer}.{kind}"]) for layer in range(6)]
        assert last == pytest.approx(exact, abs=1e-3)
    assert pictured[-1]["phase"] == "frozen" and len(pictured) == 4
    assert found["history"]["samples.nrows"] == [(STEPS - 1, 1)]
    table = list(csv.reader((run / "comparison.csv").read_text().splitlines()))
    assert found["history"]["comparison.nrows"][0][1] == len(table) - 1
    metrics = json.loads((run / "metrics.json").read_text())
    assert found["summary"]["final/sparsity.blocks"] == metrics["sparsity"]["blocks"]
    assert found["summary"]["final/eval.pruned.perplexity"] == metrics["eval"]["pruned"]["perplexity"]
    assert "smoke-pruned" in found["artifacts"]
    assert found["group"] == "smoke" and "sparsity 0.5" in found["tags"]
    assert found["config"]["prune"]["sparsity"] == 0.5


def test_the_dashboard_draws_what_is_logged(logged: tuple[Path, str]) -> None:
    run, _ = logged
    (file,) = (run / "wandb").rglob("*.wandb")
    found = wandb_file.read(file)
    names = {
        name.split(".")[0] if name.startswith(("mask_picture", "comp", "samp")) else name for name in found["history"]
    }
    names |= found["summary"].keys()
    unmeasured = {name for name in dashboard.logged_names() if "speed" in name or "recovery.mean" in name}  # quick run
    assert set(dashboard.logged_names()) - names == unmeasured
    for panel in (panel for panels in dashboard.SECTIONS.values() for panel in panels):
        if getattr(panel, "pattern", ""):
            assert any(re.fullmatch(panel.pattern, name) for name in names), panel.pattern


def test_lines_for_people_without_a_terminal(logged: tuple[Path, str]) -> None:
    _, printed = logged
    assert "joint: pruning from step" in printed and "joint: frozen from step" in printed
    assert "s left" in printed and "\x1b[" not in printed
