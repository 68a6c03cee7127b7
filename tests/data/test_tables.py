"""CSV and TSV as people write them: every line is a row, or is named."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atp.data.reading.bad_rows import BadRows
from atp.data.reading.files import rows
from atp.errors import UserError

PAIRS = [(f"Item {i} a b", f"c {i}") for i in range(60)]


def read(path: Path, text: str | bytes, bad: BadRows | None = None) -> list[dict[str, str]]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return [row for row, _ in (rows(path) if bad is None else rows(path, bad=bad))]


def lines(pairs: list[tuple[str, str]], mark: str) -> str:
    return f"prompt{mark}completion\n" + "".join(f"{a}{mark}{b}\n" for a, b in pairs)


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
tables = st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables, st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
def test_what_csv_writes_is_read_or_refused_by_line(tmp_path: Path, table: list[tuple[str, ...]], quoting: int) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=quoting)  # type: ignore[arg-type]
        writer.writerow(["a", "b", "c"])
        writer.writerows(table)
    expected = [dict(zip("abc", row, strict=True)) for row in table if any(cell.strip() for cell in row)]
    try:
        assert [row for row, _ in rows(path)] == expected
    except UserError as error:
        assert "takes" in str(error) and "as one row" in str(error)  # only where each line is a row by itself
        assert any(cell.count("\n") + cell.count("\r") for row in table for cell in row)


plain = st.text(st.characters(codec="utf-8", exclude_characters="\0\t\r\n", exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(plain, plain), min_size=3, max_size=8))
def test_a_tsv_without_quoting_is_read_letter_by_letter(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    pairs = [("x" + a, "y" + b) for a, b in pairs]  # else a cell may stand in quotes by chance
    found = read(tmp_path / "a.tsv", lines(pairs, "\t"))
    assert [(row["prompt"], row["completion"]) for row in found] == pairs


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=8))
def test_a_tsv_that_is_quoted_throughout_is_read_so(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    path = tmp_path / "a.tsv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, "excel-tab", quoting=csv.QUOTE_ALL)
        writer.writerows([("prompt", "completion"), *pairs])
    try:
        found = [(row["prompt"], row["completion"]) for row, _ in rows(path)]
    except UserError as error:
        assert "as one row" in str(error)
    else:
        assert found == [pair for pair in pairs if any(cell.strip() for cell in pair)]


def test_a_double_quote_in_tsv_is_a_letter(tmp_path: Path) -> None:
    pairs = [*PAIRS[:10], ('"Item 10', "c"), *PAIRS[11:20], ('Item 20 he said"', '"c"'), *PAIRS[21:]]
    found = read(tmp_path / "a.tsv", lines(pairs, "\t"))
    assert [(row["prompt"], row["completion"]) for row in found] == pairs


def test_a_tsv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    pairs = [("a\tb", 'he said "no"'), ("two\nlines", "plain"), ("x", "y")]
    path = tmp_path / "a.tsv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, "excel-tab").writerows([("prompt", "completion"), *pairs])
    assert [(row["prompt"], row["completion"]) for row, _ in rows(path)] == pairs


def test_a_quote_that_takes_lines_is_found_where_it_opens(tmp_path: Path) -> None:
    opened = [*PAIRS[:10], ('"Item 10', "c 10"), *PAIRS[11:20], ('Item 20 he said"', "c 20"), *PAIRS[21:]]
    with pytest.raises(UserError, match=r"a\.csv:12: .*a quote that opens in this line takes 11 lines, up to line 22"):
        read(tmp_path / "a.csv", lines(opened, ","))
    single = [a for a, _ in PAIRS]
    single[10], single[20] = '"' + single[10], single[20] + '"'
    with pytest.raises(UserError, match=r"a\.csv:12: .*takes 11 lines, up to line 22"):
        read(tmp_path / "a.csv", "text\n" + "\n".join(single))
    never = [*PAIRS[:10], ('"Item 10', "c 10"), *PAIRS[11:]]
    with pytest.raises(UserError, match=r"a\.csv:12: .*a quote opens in this line and is not closed"):
        read(tmp_path / "a.csv", lines(never, ","))
    quoted = "prompt,completion\n" + "".join(f'"{a}","{b}"\n' for a, b in PAIRS)
    with pytest.raises(UserError, match=r"a\.csv:12: .*not closed properly up to line 13"):
        read(tmp_path / "a.csv", quoted.replace('"c 10"', '"c 10'))


@pytest.mark.parametrize("last", [('Item 20 he said"', "c 20"), ("Item 20", "c 20")])
def test_the_lines_after_a_bad_quote_are_not_lost(tmp_path: Path, last: tuple[str, str]) -> None:
    pairs = [*PAIRS[:10], ('"Item 10', "c 10"), *PAIRS[11:20], last, *PAIRS[21:]]
    bad = BadRows()
    found = read(tmp_path / "a.csv", lines(pairs, ","), bad)
    assert [(row["prompt"], row["completion"]) for row in found] == [*pairs[:10], *pairs[11:]]
    assert list(bad.reasons) == [f"{tmp_path / 'a.csv'}:12"]


def test_cells_of_several_lines_are_whole(tmp_path: Path) -> None:
    pairs = [("Dear Sir, hello\nyes, you", "c"), ("plain", "d, e"), ('she said "no"\n\nand left', "f")]
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("prompt", "completion"), *pairs])
    found = list(rows(path))
    assert [(row["prompt"], row["completion"]) for row, _ in found] == pairs
    assert [where.rpartition(":")[2] for _, where in found] == ["2", "4", "5"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,completion,completion\na,b,c\n", r"a\.csv:1: the column 'completion' stands twice"),
        ("a.tsv", "prompt\tprompt \na\tb\n", r"a\.tsv:1: the column 'prompt' stands twice"),
        ("a.csv", "prompt;completion\na;b\n", r"a\.csv:1: one column .*separated by ';'"),
        ("a.csv", "prompt\tcompletion\na\tb\n", r"a\.csv:1: one column .*separated by '\\t'"),
        ("a.csv", "a,b\n1,2\n\n3\n", r"a\.csv:4: 1 cells, but the columns are \['a', 'b'\]"),
        ("a.tsv", "a\tb\n1\t2\t3\n", r"a\.tsv:2: 3 cells"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), r"a\.csv:1: UTF-16"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"a\.csv: a git-lfs pointer"),
        ("a.csv.gz", b"no gzip", r"a\.csv\.gz: cannot be read"),
    ],
)
def test_what_is_no_table_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path / name, content)


def test_marks_at_the_beginning_spaces_in_the_header_and_compression(tmp_path: Path) -> None:
    expected = [{"prompt": "a", "completion": "b"}]
    assert read(tmp_path / "a.csv", "\ufeffprompt, completion\r\na,b\r\n") == expected
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(b"prompt\tcompletion\na\tb\n"))
    assert [row for row, _ in rows(tmp_path / "b.tsv.gz")] == expected
    assert read(tmp_path / "c.csv", ",prompt\n0,a\n1,b\n") == [
        {"Unnamed: 0": "0", "prompt": "a"},
        {"Unnamed: 0": "1", "prompt": "b"},
    ]
