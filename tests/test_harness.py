"""lm-evaluation-harness: its figures and ours agree on tasks of the same data and prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from atp.evaluate import harness
from atp.evaluate.__main__ import load
from atp.evaluate.quality import evaluate

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: label
target_delimiter: " "
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


@pytest.mark.slow
def test_the_harness_agrees_with_us(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="the harness extra is not installed")
    from atp.data.domains import read_task
    from atp.data.tasks import load_tasks

    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, tokenizer = load(str(shared / "models" / "stories260K"), "float32")
    found = {}
    for name in ("arc_easy", "boolq"):
        records = read_task(load_tasks()[name], shared / "data" / "general", alone=False)["test"][:60]
        rows = [{"prompt": r.prompt, "options": [c.strip() for c in r.choices], "label": r.label} for r in records]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=f"local_{name}", file=file))
        found[name] = {
            way: evaluate(
                model, tokenizer, records, max_length=512, batch_size=16, max_generate=0, normalise=way
            ).values[f"{name}/accuracy"]
            for way in ("none", "characters")
        }
    theirs = harness.score(model, tokenizer, ["local_arc_easy", "local_boolq"], folder=str(tmp_path), batch_size=16)
    for name, ours in found.items():
        assert theirs[f"local_{name}"]["items"] == 60
        assert theirs[f"local_{name}"]["acc"] == pytest.approx(ours["none"])
        assert theirs[f"local_{name}"]["acc_norm"] == pytest.approx(ours["characters"])
    with pytest.raises(ValueError, match="no task 'local_arc_esy'; did you mean local_arc_easy"):
        harness.score(model, tokenizer, ["local_arc_esy"], folder=str(tmp_path))
