"""A team's own domain through the command line: a look at the data, a run with prompt and packing, and its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_run import train

from atp.commands.train import main


def test_a_run_with_prompt_packing_and_further_tasks_says_so(tmp_path: Path) -> None:
    rows = [
        {"q": f"Section {i}: may party {i % 7} recover damages?", "a": f"Yes, party {i % 7} may.", "topic": "civil"}
        for i in range(120)
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(
        "experiment=smoke",
        "data=files",
        f"data.path={file}",
        "data.fields={prompt: '{{ q }} Answer:', completion: a, task: topic}",
        "data.near_duplicates=report",
        "data.packing=true",
        "data.max_length=128",
        "prompt=collaborative",
        "prompt.train=false",
        "evaluate=quick",
        "evaluate.forgetting=[health]",
        "evaluate.max_forgetting=2",
        "evaluate.bootstrap=20",
        "evaluate.tasks=[legal/clause]",
        "data.max_test=6",
        "threads=1",
        "run_dir=one",
        cwd=tmp_path,
    )
    run = tmp_path / "one"
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"civil/perplexity", "civil/rougeL"} <= metrics["intervals"]["pruned"].keys()
    assert metrics["paired"]["pruned_vs_dense"]["civil/perplexity"]["items"] == 6
    assert metrics["forgetting"]["pruned"]["health"]["perplexity"] > 1
    assert "accuracy" in metrics["tasks"]["dense"]["legal/clause"] and metrics["task_counts"]["legal/clause"]
    assert metrics["overlap"]["near"].keys() == {"validation_test", "train_test", "train_validation"}
    prompt = metrics["prompt"]
    assert prompt["tokens_added"] > 20 and prompt["train"] is False and prompt["inference"] is True
    assert json.loads((run / "pruned" / "prompt.json").read_text()) == json.loads((run / "prompt.json").read_text())
    assert "You are being made smaller" in (run / "pruned" / "README.md").read_text()
    page = (run / "report.html").read_text()
    for heading in ("on the same items", "What pruning forgot", "Further tasks", "Overlap between splits"):
        assert heading in page


def test_check_shows_the_data_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.csv"
    lines = [f'"Why is {i}?","Because of {i}."' for i in range(50)]
    file.write_text("\n".join(["question,answer", *lines]) + "\n")
    arguments = ["data=files", f"data.path={file}", "data.fields={prompt: question, completion: answer}", "--check"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "data.near_duplicates=ignore"])
    shown = capsys.readouterr().out
    assert not stopped.value.code and "train records" in shown and "of them learnt" in shown
    assert shown.count("example ") == 5 and "Because of" in shown
    file.write_text("\n".join(["question,answer", '"Why?",""', *lines, '"a","b","c"']) + "\n")
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    shown = capsys.readouterr().out
    assert stopped.value.code == 2 and "mine.csv:2: completion is empty" in shown
    assert "mine.csv:53: 3 cells" in shown and "2 bad rows, 50 good ones" in shown
    assert not list(tmp_path.glob("runs"))
