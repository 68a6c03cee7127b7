"""What columns mean: recognised by their names, said in a line, and changed by a setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atp.data.reading.bad_rows import write_bad_rows
from atp.data.records import ChatRecord, ChoiceRecord, CompletionRecord, TextRecord
from atp.data.records.columns import RowParser
from atp.data.sources import load_files

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "record", "shape"),
    [
        ({"text": "t", "label": 3}, TextRecord("t"), "text"),
        ({"prompt": "p", "completion": "c", "text": "t"}, CompletionRecord("p", "c"), "completion"),
        ({"prompt": "p", "choices": ["a", "b"], "label": 1}, ChoiceRecord("p", ("a", "b"), 1), "choice"),
        (
            {"question": "q", "choices": ["a", "b"], "answer": 1},
            ChoiceRecord("Question: q\nAnswer:", (" a", " b"), 1),
            "choice",
        ),
        (
            {"instruction": "Do.", "input": "it", "output": "done"},
            CompletionRecord("Do.\n\nit\n\n", "done"),
            "instruction",
        ),
        (
            {"instruction": "Do.", "input": "", "output": "done", "text": "x"},
            CompletionRecord("Do.\n\n", "done"),
            "instruction",
        ),
        ({"instruction": "Do.", "context": "c", "response": "r"}, CompletionRecord("Do.\n\nc\n\n", "r"), "instruction"),
        (
            {"system": "s", "instruction": "Do.", "output": "o"},
            CompletionRecord("s\n\nDo.\n\n", "o"),
            "instruction",
        ),
        (
            {"conversations": TURNS, "system": "s"},
            ChatRecord(({"role": "system", "content": "s"}, *TURNS)),
            "chat",
        ),
        ({"prompt": "p", "response": "r"}, CompletionRecord("p\n\n", "r"), "instruction"),
        ({"query": "p", "answer": "r"}, CompletionRecord("p\n\n", "r"), "instruction"),
        ({"question": "q", "answer": "a"}, CompletionRecord("Question: q\nAnswer:", " a"), "question"),
        (
            {"question": "q", "context": "c", "answer": "a"},
            CompletionRecord("c\n\nQuestion: q\nAnswer:", " a"),
            "question",
        ),
        ({"messages": TURNS, "text": "t", "prompt": "p"}, ChatRecord(tuple(TURNS)), "chat"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, ChatRecord(tuple(TURNS)), "chat"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            ChatRecord(tuple(TURNS)),
            "chat",
        ),
        ({"conversation": {"role": ["user", "assistant"], "content": ["q", "a"]}}, ChatRecord(tuple(TURNS)), "chat"),
    ],
)
def test_shapes_are_recognised_and_said(row: dict[str, Any], record: Any, shape: str) -> None:
    parse = RowParser()
    assert parse({**row, "id": 1}, "a.jsonl:1") == record
    [told] = parse.told()
    assert f"(from a.jsonl:1 on) are read as {shape}:" in told and "id" in told.partition("not used: ")[2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, r"x:1: preferences .*data\.shape=chosen"),
        ({"prompt": "p", "completion": "c", "label": True}, r"x:1: answers marked good or bad"),
        ({"question": "q", "answer": 4}, "x:1: answer must be a string, got int 4"),
        ({"question": "q", "choices": "a, b", "answer": 0}, "x:1: choices must be a list"),
        ({"body": "b"}, r"x:1: no valid record, got the keys \['body'\]"),
        ({"text": "a\0"}, "x:1: text holds a NUL character after 1"),
        ({"text": "a\udce9"}, r"x:1: text is not UTF-8 \(byte 0xe9\)"),
        ({"instruction": "a", "output": "\ud800"}, r"x:1: output is not valid text \(lone surrogate U\+D800"),
        ({"prompt": "p", "choices": ["a", "\ud800"], "label": 0}, r"x:1: choices\[1\] is not valid text"),
    ],
)
def test_what_is_not_learnt_from_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowParser()(row, "x:1")


def test_a_setting_changes_what_columns_mean() -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert RowParser(shape="chosen")(pair, "x") == CompletionRecord("p", "a")
    assert RowParser(shape="chosen")({"chosen": "whole", "rejected": "b"}, "x") == TextRecord("whole")
    assert RowParser(shape="chosen")({"prompt": "q", "chosen": TURNS, "rejected": TURNS}, "x") == ChatRecord(
        tuple(TURNS)
    )
    assert RowParser(shape="chosen")({"prompt": "q", "chosen": TURNS[1:], "rejected": []}, "x") == ChatRecord(
        tuple(TURNS)
    )
    assert RowParser({"prompt": "prompt", "completion": "rejected"})(pair, "x") == CompletionRecord("p", "b")
    assert RowParser(shape="text")({"text": "t", "instruction": "i", "output": "o"}, "x") == TextRecord("t")
    assert RowParser({"messages": "dialog"})({"dialog": TURNS, "text": "t"}, "x") == ChatRecord(tuple(TURNS))
    assert RowParser({"task": "kind"})({"question": "q", "answer": "a", "kind": "k"}, "x").task == "k"
    rated = {"prompt": "p", "completion": "c", "label": False}
    assert RowParser(shape="completion")(rated, "x") == CompletionRecord("p", "c")
    with pytest.raises(ValueError, match=r"x: data\.shape=chat needs the columns messages or conversations; .*'text'"):
        RowParser(shape="chat")({"text": "t"}, "x")
    with pytest.raises(ValueError, match=r"data\.shape='chats' is unknown; did you mean chat"):
        RowParser(shape="chats")


# ---- bad rows


def write(path: Path) -> Path:
    lines = [json.dumps({"text": f"number {i}"}) for i in range(40)]
    lines[3], lines[7], lines[9] = "{broken", json.dumps({"text": " "}), '{"text": "cut \\ud83d"}'
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("stream", [False, True])
def test_bad_rows_are_refused_or_skipped_counted_and_listed(
    tmp_path: Path, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl:4: not valid JSON"):
        load_files(file, seed=0, stream=stream)
    splits = load_files(file, seed=0, stream=stream, on_error="skip", validation_fraction=0.2, test_fraction=0.2)
    assert sum(splits.counts().values()) == 37
    assert "3 bad rows skipped" in caplog.text and "a.jsonl:4" in caplog.text
    write_bad_rows(tmp_path / "skipped.jsonl", splits.skipped)
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in listed] == [(str(file), 4), (str(file), 8), (str(file), 10)]
    assert listed[1]["reason"].startswith("text is empty") and "lone surrogate" in listed[2]["reason"]


def test_nothing_but_bad_rows_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 5)
    with pytest.raises(ValueError, match=r"holds no records \(5 bad rows skipped .*no valid record"):
        load_files(tmp_path / "a.jsonl", seed=0, on_error="skip")
    with pytest.raises(ValueError, match=r"data\.on_error='ignore' is unknown"):
        load_files(tmp_path / "a.jsonl", seed=0, on_error="ignore")


def test_a_text_file_with_a_nul_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\0\n")
    with pytest.raises(ValueError, match=r"a\.txt:2: holds a NUL"):
        load_files(tmp_path / "a.txt", seed=0)
