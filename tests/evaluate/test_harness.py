"""lm-evaluation-harness: its figures and ours agree on tasks of the same data and prompts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from atp.commands.evaluate import load
from atp.data.domains import read_task, scored_records
from atp.data.records import Record
from atp.data.tasks import load_tasks
from atp.evaluate import harness
from atp.evaluate.quality import evaluate

ROOT = Path(__file__).resolve().parents[2]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: label
target_delimiter: "{delimiter}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'atp\[harness\]'"):
        harness.score(None, None, ["piqa"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"evaluate\.tasks, which is empty"):
        harness.score(None, None, [])  # type: ignore[arg-type]


def offline(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    pytest.importorskip("lm_eval", reason="the harness extra is not installed")
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(folder / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def holding_task(folder: Path) -> list[Record]:
    """The embedded holding task as a task file of the harness."""
    records = scored_records("legal/holding", most=40, seed=0)
    rows = [{"prompt": r.prompt, "options": [c.strip() for c in r.choices], "label": r.label} for r in records]
    file = folder / "holding.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "holding.yaml").write_text(TASK.format(name="local_holding", file=file, delimiter=""))
    return records


@pytest.mark.slow
def test_a_run_scores_with_the_harness_which_also_reads_the_export_unmodified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per-layer widths, scored in the run, and by the harness' own command line on the exported directory."""
    offline(monkeypatch, tmp_path)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    records = holding_task(tasks)
    settings = ["evaluate=harness", "evaluate.tasks=[local_holding]", f"evaluate.harness_path={tasks}"]
    run = tmp_path / "run"
    command = [sys.executable, "train.py", "experiment=smoke", *settings, "evaluate.reference=false", f"run_dir={run}"]
    subprocess.run(command, cwd=ROOT, check=True)
    in_run = json.loads((run / "metrics.json").read_text())["harness"]
    assert in_run["dense"]["local_holding"]["acc"] > 0.9 and in_run["pruned"]["local_holding"]["items"] == 40
    assert "lm-evaluation-harness" in (run / "report.html").read_text()
    pruned = run / "pruned"
    assert json.loads((pruned / "config.json").read_text())["per_layer_config"]
    own = ["--model", "hf", "--model_args", f"pretrained={pruned},trust_remote_code=True", "--tasks", "local_holding"]
    paths = ["--include_path", str(tasks), "--output_path", str(tmp_path / "out"), "--device", "cpu"]
    subprocess.run([sys.executable, "-m", "lm_eval", *own, *paths], cwd=tmp_path, check=True)
    (found,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(found.read_text())["results"]["local_holding"]
    for metric, way in (("acc", "none"), ("acc_norm", "characters")):
        model, tokenizer = load(str(pruned), "float32")
        kwargs = {"max_length": 512, "batch_size": 16, "max_generate": 0, "normalise": way}
        ours = evaluate(model, tokenizer, records, **kwargs).values["holding/accuracy"]
        # Within one item: batches of another size differ in the last bit.
        assert theirs[f"{metric},none"] == pytest.approx(in_run["pruned"]["local_holding"][metric], abs=0.026)
        assert theirs[f"{metric},none"] == pytest.approx(ours, abs=0.026)


def test_what_the_harness_cannot_load_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="the harness extra is not installed")
    with pytest.raises(ValueError, match=r"evaluate\.harness_path=.*nowhere: no such folder"):
        harness.prepare(["x"], str(tmp_path / "nowhere"))
    (tmp_path / "broken.yaml").write_text(TASK.format(name="broken", file=tmp_path / "missing.jsonl", delimiter=""))
    with pytest.raises(ValueError, match=r"cannot load broken .*evaluate\.harness_path=<folder>"):
        harness.prepare(["broken"], str(tmp_path))


@pytest.mark.slow
def test_the_harness_agrees_with_us(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch, tmp_path)
    model, tokenizer = load(str(shared / "models" / "stories260K"), "float32")
    found = {}
    for name in ("arc_easy", "boolq"):
        records = read_task(load_tasks()[name], shared / "data" / "general", alone=False)["test"][:60]
        rows = [{"prompt": r.prompt, "options": [c.strip() for c in r.choices], "label": r.label} for r in records]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=f"local_{name}", file=file, delimiter=" "))
        found[name] = {
            way: evaluate(
                model, tokenizer, records, max_length=512, batch_size=16, max_generate=0, normalise=way
            ).values[f"{name}/accuracy"]
            for way in ("none", "characters")
        }
    theirs = harness.score(model, tokenizer, ["local_arc_easy", "local_boolq"], folder=str(tmp_path), batch_size=16)
    for name, ours in found.items():
        assert theirs[f"local_{name}"]["items"] == 60 and theirs[f"local_{name}"]["acc_stderr"] > 0
        assert theirs[f"local_{name}"]["acc"] == pytest.approx(ours["none"])
        assert theirs[f"local_{name}"]["acc_norm"] == pytest.approx(ours["characters"])
    with pytest.raises(ValueError, match="no task 'local_arc_esy'; did you mean local_arc_easy"):
        harness.score(model, tokenizer, ["local_arc_esy"], folder=str(tmp_path))
