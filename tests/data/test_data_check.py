"""``--check`` on the user's own data: what was read as what, what is learnt, and what is wrong, without training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from atp import embedded
from atp.commands.train import main

TEMPLATE = (
    "{% for m in messages %}## {{ m.role }}\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}## assistant\n{% endif %}"
)


def checked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["data=files", "data.max_length=128", *arguments, "--check"])
    shown = capsys.readouterr()
    return int(stopped.value.code or 0), shown.out + shown.err


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    folder = tmp_path / "chats"
    folder.mkdir()
    for name, numbers in (("train", range(30)), ("validation", range(30, 35)), ("test", range(35, 40))):
        turns = [
            [
                {"role": "user", "content": f"Is {i} even?"},
                {"role": "assistant", "content": f"{'yes' if i % 2 else 'no'} {i}"},
            ]
            for i in numbers
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    (folder / "README.md").write_text("# Chats")
    return folder


def test_a_conversation_is_shown_with_what_is_learnt(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown = checked(capsys, f"data.path={chats}")
    assert code == 2 and "train.jsonl:1: this is a conversation, and the tokenizer has no chat template" in shown
    base = tmp_path / "base"
    shutil.copytree(embedded.base_dir(), base)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    code, shown = checked(capsys, "model=local", f"model.path={base}", f"data.path={chats}")
    assert code == 0 and "train from train.jsonl; validation from validation.jsonl; test from test.jsonl" in shown
    assert "left out: README.md" in shown and "read as chat" in shown
    assert "## user\nIs 0 even?\n## assistant\n>>>no 0\n<<<" in shown
    assert "learnt tokens stand between >>> and <<<" in shown


def test_bad_rows_are_all_named_or_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    lines = [json.dumps({"instruction": f"Do {i}.", "output": f"Done {i}."}) for i in range(30)]
    lines[4], lines[8] = '{"instruction": "x", "output": "cut \\ud83d"}', "no"
    file.write_text("\n".join(lines))
    code, shown = checked(capsys, f"data.path={file}")
    assert code == 2 and "2 bad rows, 28 good ones" in shown and "data.on_error=skip" in shown
    assert "a.jsonl:5: output is not valid text (lone surrogate" in shown and "a.jsonl:9: not valid JSON" in shown
    assert "more rows like it" not in shown
    other = tmp_path / "b.jsonl"
    other.write_text('{"body": "x"}\n' * 30)
    code, shown = checked(capsys, f"data.path={other}")
    assert code == 2 and shown.count("no valid record") == 1 and "(and 29 more rows like it)" in shown
    code, shown = checked(capsys, f"data.path={file}", "data.on_error=skip")
    assert code == 0 and "skipped" in shown and "26" in shown and "are read as instruction" in shown


def test_nothing_left_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": " ".join(f"word{i}x{k}" for k in range(30))} for i in range(20)]
    for name, mark in (("train", "."), ("test", "!"), ("validation", "?")):
        some = rows if name == "train" else rows[:10] if name == "test" else rows[10:]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": r["text"] + mark}) + "\n" for r in some))
    code, shown = checked(capsys, f"data.path={tmp_path}")
    assert code == 2 and "all 20 training records nearly equal" in shown and "data.near_duplicates=report" in shown
