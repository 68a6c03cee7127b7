"""JSON and JSON Lines: what is written is read back, one object at a time, each with the line that it begins on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atp.data.reading.bad_rows import BadRows
from atp.data.reading.files import rows
from atp.errors import UserError

values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
objects = st.lists(st.dictionaries(st.text(max_size=5), values, min_size=1, max_size=3), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(objects, st.sampled_from([None, 1]), st.booleans())
def test_what_is_written_is_read_with_its_line(
    tmp_path: Path, found: list[dict[str, Any]], indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(found, indent=indent, ensure_ascii=ascii_only)
    array = tmp_path / "a.json"
    array.write_text(text, encoding="utf-8", newline="")
    read = list(rows(array))
    assert [row for row, _ in read] == found
    for row, where in read:
        line = text.split("\n")[int(where.rpartition(":")[2]) - 1]
        assert line.strip().startswith(("[", "{")) and json.dumps(next(iter(row)), ensure_ascii=ascii_only) in text
    for name in ("b.jsonl", "c.json"):
        (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in found), encoding="utf-8")
    assert list(rows(tmp_path / "b.jsonl")) == [(one, f"{tmp_path}/b.jsonl:{i}") for i, one in enumerate(found, 1)]
    if len(found) > 1:  # one object a line is JSON Lines, whatever the suffix
        assert [row for row, _ in rows(tmp_path / "c.json")] == found


def test_items_of_an_array_have_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\n[\n {"text": "a"},\n\n {"text":\n "b"}, {"text": "c"}]\n')
    assert [where.rpartition(":")[2] for _, where in rows(tmp_path / "a.json")] == ["3", "5", "6"]
    (tmp_path / "b.json").write_text("[]")
    assert list(rows(tmp_path / "b.json")) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1, "a": 2}\n', r"a\.jsonl:1: the key 'a' stands twice"),
        ("a.json", '[{"b": 1},\n{"a": 1, "a": 2}]', r"a\.json:2: the key 'a' stands twice"),
        ("a.json", '{"data": [{"text": "a"}]}', r"a\.json: .*list of objects.*an object with the keys \['data'\]"),
        ("a.json", '[{"a": 1}\n{"a": 2}]', r"a\.json:2: not valid JSON"),
        ("a.json", '[{"a": 1}] x', r"a\.json:1: not valid JSON \(something follows"),
        ("a.json", '[{"a": 1},', r"a\.json:1: not valid JSON"),
        ("a.jsonl", "[" * 100000, r"a\.jsonl:1: "),
    ],
)
def test_what_is_no_json_is_named_with_its_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        list(rows(tmp_path / name))


def test_reading_goes_on_after_a_bad_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"t": 1}\n{"t": \n{"t": 2, "t": 3}\n{"t": "\xff"}\n{"t": 4}\n')
    bad = BadRows()
    assert [row for row, _ in rows(tmp_path / "a.jsonl", bad=bad)] == [{"t": 1}, {"t": 4}]
    assert [where.rpartition(":")[2] for where in bad.reasons] == ["2", "3", "4"]
