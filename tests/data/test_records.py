"""Records and their sources: checking, reading, splitting by content."""

from __future__ import annotations

import json
import logging
import lzma
import re
import string
import types
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp.data import domains
from atp.data.domains import load_domain
from atp.data.records import (
    ChoiceRecord,
    CompletionRecord,
    Splits,
    TextRecord,
    carve,
    content_key,
    limit,
    parse_record,
    separate,
)
from atp.data.sources import load_embedded, load_files, read_records
from atp.data.tasks import find_task, load_tasks

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def casehold_row(i: int, label: object = 1) -> dict:
    return {
        "example_id": i,
        "citing_prompt": f"See Case {i} (<HOLDING>).",
        **{f"holding_{k}": f"holding that {i} is {k}" for k in range(5)},
        "label": label,
    }


def billsum_row(i: int, column: str = "text") -> dict:
    return {column: f"SECTION 1. Bill {i} may be cited.", "summary": f"Cites bill {i}.", "title": f"Bill {i}"}


def disjoint(splits: Splits) -> bool:
    keys = [{content_key(record) for record in part} for part in (splits.train, splits.validation, splits.test)]
    return not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])


# ---- one record


def test_each_shape_parses_and_extra_keys_are_ignored() -> None:
    assert parse_record({"text": "abc", "id": 7}, "x") == TextRecord("abc")
    assert parse_record({"prompt": "p", "completion": "c", "task": "t"}, "x") == CompletionRecord("p", "c", "t")
    choice = parse_record({"prompt": "p", "choices": ["a", "b"], "label": 1, "text": "more"}, "x")
    assert choice == ChoiceRecord("p", ("a", "b"), 1)
    assert parse_record({"text": "abc", "label": 3, "task": None}, "x") == TextRecord("abc")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (["a"], "must be a JSON object, got list"),
        ({"body": "a", "id": 1}, r"got the keys \['body', 'id'\]; valid shapes: .*text.*prompt.*choices"),
        ({"prompt": "p"}, r"got the keys \['prompt'\]"),
        ({"text": "  \n"}, "text is empty"),
        ({"text": 3}, "text must be a string, got int 3"),
        ({"text": "a", "task": ["t"]}, "task must be a string"),
        ({"prompt": "", "completion": "c"}, "prompt is empty"),
        ({"prompt": "p", "completion": None}, "completion must be a string, got NoneType"),
        ({"prompt": "p", "choices": ["a"], "label": 0}, "at least two"),
        ({"prompt": "p", "choices": "ab", "label": 0}, "list of at least two strings, got str"),
        ({"prompt": "p", "choices": ["a", ""], "label": 0}, r"choices\[1\] is empty"),
        ({"prompt": "p", "choices": ["a", 2], "label": 0}, r"choices\[1\] must be a string"),
        ({"prompt": "p", "choices": ["a", "b"], "label": 2}, r"label 2 is out of range for 2 choices \(0 to 1\)"),
        ({"prompt": "p", "choices": ["a", "b"], "label": -1}, "label -1 is out of range"),
        ({"prompt": "p", "choices": ["a", "b"], "label": True}, "label must be an integer"),
        ({"prompt": "p", "choices": ["a", "b"], "label": "1"}, "label must be an integer"),
    ],
)
def test_a_bad_record_is_named_with_its_place_and_fault(raw: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse_record(raw, "some.jsonl:4")
    assert str(error.value).startswith("some.jsonl:4: ")


# ---- one file


def test_reading_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"body": "one", "kind": "x"}\n\n{"body": "two", "kind": "y"}\n{"body": "three", "kind": "y"}'
    )
    fields = {"text": "body", "task": "kind"}
    assert read_records(file, fields=fields) == [
        TextRecord("one", "x"),
        TextRecord("two", "y"),
        TextRecord("three", "y"),
    ]
    assert len(read_records(str(file), fields=fields, most=2)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl:2: not valid JSON \(.*, character 14\)"),
        (b'{"text": "a"}\n\n{"txt": "b"}\n', r"a\.jsonl:3: no valid record, got the keys \['txt'\]"),
        (b'{"text": "a"}\n"text"\n', r"a\.jsonl:2: a record must be a JSON object, got str"),
        (b'{"text": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
        (b"", "holds no records"),
        (b"\n  \n", "holds no records"),
    ],
)
def test_a_bad_file_is_refused_with_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_records(file)


def test_a_missing_file_or_column_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.jsonl does not exist .*set data\.path"):
        read_records(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match=r"is a directory without \.txt"):
        read_records(tmp_path)
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: data\.fields names the columns \['body'\]"):
        read_records(file, fields={"text": "body"})
    with pytest.raises(ValueError, match=r"data\.fields maps 'txt'.*did you mean text"):
        read_records(file, fields={"txt": "text"})


# ---- splits

texts = st.text(string.ascii_letters + "  \n", min_size=1).filter(str.strip)
records = st.lists(
    st.one_of(
        st.builds(TextRecord, texts),
        st.builds(CompletionRecord, texts, texts),
        st.builds(ChoiceRecord, texts, st.tuples(texts, texts), st.integers(0, 1)),
    ),
    min_size=1,
    max_size=40,
)


@given(records, st.floats(0.01, 0.45), st.floats(0.01, 0.45), st.integers(0, 5))
def test_carving_keeps_every_record_and_never_splits_equal_content(found: list, a: float, b: float, seed: int) -> None:
    distinct = len({content_key(record) for record in found})
    shares = {"validation": a, "test": b}
    if distinct < 3:
        with pytest.raises(ValueError, match="too few"):
            carve(found, shares, seed=seed, where="here")
        return
    rest, parts = carve(found, shares, seed=seed, where="here")
    assert rest and all(parts.values())
    assert disjoint(Splits(rest, parts["validation"], parts["test"], "x"))
    assert sorted(map(repr, [*rest, *parts["validation"], *parts["test"]])) == sorted(map(repr, found))
    again, _ = carve(found[::-1], shares, seed=seed, where="here")
    assert again == rest[::-1]


def test_carving_takes_the_share_asked_for_and_depends_on_the_seed() -> None:
    found = [TextRecord(f"text {i}") for i in range(200)]
    rest, parts = carve(found, {"validation": 0.1, "test": 0.25}, seed=1, where="here")
    assert (len(rest), len(parts["validation"]), len(parts["test"])) == (130, 20, 50)
    assert carve(found, {"validation": 0.1, "test": 0.25}, seed=2, where="here")[1] != parts
    assert carve(found, {}, seed=1, where="here") == (found, {})


@pytest.mark.parametrize("shares", [{"test": 0.0}, {"test": 1.0}, {"test": -0.1}, {"a": 0.5, "b": 0.5}])
def test_fractions_out_of_range_are_refused(shares: dict) -> None:
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        carve([TextRecord(str(i)) for i in range(9)], shares, seed=0, where="here")


@given(records, records, records)
def test_separated_splits_share_nothing_and_test_stays_whole(train: list, validation: list, test: list) -> None:
    kept = separate(Splits(train, validation, test, "x"))
    assert disjoint(kept)
    assert kept.test == test
    gone = {content_key(record) for record in train} - {content_key(record) for record in kept.train}
    assert gone <= {content_key(record) for record in [*validation, *test]}


def test_content_ignores_case_space_and_the_order_of_choices() -> None:
    assert content_key(TextRecord("A  b\nc")) == content_key(TextRecord("a b C ", task="other"))
    assert content_key(ChoiceRecord("p", ("a", "b"), 0)) == content_key(ChoiceRecord("p", ("b", "a"), 1))
    assert content_key(CompletionRecord("p", "a")) != content_key(CompletionRecord("p", "b"))


def test_limit_is_a_seeded_subset_in_order() -> None:
    found = [TextRecord(f"text {i}") for i in range(50)]
    some = limit(found, 10, seed=3)
    assert len(some) == 10 and some == [record for record in found if record in some]
    assert some != found[:10] and some != limit(found, 10, seed=4)
    assert limit(found, None, 3) == found == limit(found, 99, 3)
    with pytest.raises(ValueError, match="limit of 0"):
        limit(found, 0, 3)


# ---- JSONL


def test_jsonl_carves_what_has_no_file(tmp_path: Path) -> None:
    parts = [[{"text": f"text {i}"} for i in range(n, n + 50)] for n in (0, 50)]
    files = [write_jsonl(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate(parts)]
    splits = load_files(files, seed=0, validation_fraction=0.1, test_fraction=0.2, near_duplicates="ignore")
    assert splits.counts() == {"train": 70, "validation": 10, "test": 20}
    assert disjoint(splits) and splits.name == "files"
    assert load_files(files, seed=0, validation_fraction=0.1, test_fraction=0.2) == splits


def test_jsonl_with_files_of_its_own_drops_and_counts_what_leaks(tmp_path: Path, caplog) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"text": f"text {i}"} for i in range(20)])
    validation = write_jsonl(tmp_path / "val.jsonl", [{"text": f"Text  {i}"} for i in range(15, 25)])
    test = write_jsonl(tmp_path / "test.jsonl", [{"text": f"text {i}"} for i in range(23, 30)])
    with caplog.at_level(logging.WARNING):
        splits = load_files(train, seed=0, validation_path=validation, test_path=test)
    assert splits.counts() == {"train": 15, "validation": 8, "test": 7} and disjoint(splits)
    assert "left out 5 training and 2 validation records" in caplog.text


def test_jsonl_of_too_few_records_says_so(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "same"}] * 10)
    with pytest.raises(ValueError, match=r"1 distinct records are too few .*data\.validation_path"):
        load_files(file, seed=0)
    with pytest.raises(ValueError, match="empty list"):
        load_files([], seed=0)


# ---- the embedded corpus


def test_embedded_corpus_becomes_typed_disjoint_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(domain: str, split: str, count: int | None = None) -> list[dict]:
        start = {"train": 0, "validation": 95, "test": 98}[split]
        return [{"text": f"{domain} {i}", "task": "t"} for i in range(start, start + (count or 10))]

    fake = types.SimpleNamespace(DOMAINS=("legal",), records=rows)
    monkeypatch.setattr("atp.embedded", fake, raising=False)
    monkeypatch.setitem(__import__("sys").modules, "atp.embedded", fake)
    splits = load_embedded("legal", train=100, validation=5, test=2)
    assert splits.name == "embedded_legal" and splits.counts() == {"train": 95, "validation": 3, "test": 2}
    assert splits.train[0] == TextRecord("legal 0", "t")
    with pytest.raises(ValueError, match=r"data\.domain='law' .*legal"):
        load_embedded("law")


def test_the_real_embedded_corpus_parses_in_every_domain() -> None:
    embedded = pytest.importorskip("atp.embedded")
    for domain in embedded.DOMAINS:
        splits = load_embedded(domain, train=200, validation=40, test=40)
        assert disjoint(splits) and len(splits.train) > 150 and splits.validation and splits.test


# ---- CaseHOLD and BillSum


LEGAL = {"casehold": None, "billsum": None}


@pytest.fixture
def legal_files(tmp_path: Path) -> dict[str, Path]:
    return {
        "casehold": write_jsonl(tmp_path / "c.jsonl", [casehold_row(i, str(i % 5)) for i in range(60)]),
        "billsum": write_jsonl(tmp_path / "b.jsonl", [billsum_row(i, "source") for i in range(40)]),
    }


def test_legal_set_from_local_files(legal_files: dict[str, Path], tmp_path: Path) -> None:
    test = write_jsonl(tmp_path / "ct.jsonl", [casehold_row(i) for i in range(55, 65)])
    path = {"casehold": {"train": legal_files["casehold"], "test": test}, "billsum": legal_files["billsum"]}
    splits = load_domain(LEGAL, seed=0, path=path, near_duplicates="ignore", name="legal")
    assert disjoint(splits) and splits.name == "legal"
    cases = [record for record in splits.train if isinstance(record, ChoiceRecord)]
    bills = [record for record in splits.train if isinstance(record, CompletionRecord)]
    assert {record.task for record in cases} == {"casehold"} and {record.task for record in bills} == {"billsum"}
    assert sum(record.task == "casehold" for record in splits.test) == 10
    number = int(cases[0].choices[0].split()[2])
    assert cases[0].label == number % 5 and f"See Case {number} (<HOLDING>)." in cases[0].prompt
    assert cases[0].choices[3] == f" holding that {number} is 3"
    assert bills[0].completion.startswith(" Cites bill") and "SECTION 1. Bill" in bills[0].prompt


def test_weights_set_the_mix(legal_files: dict[str, Path]) -> None:
    def mixed(**kwargs) -> Counter:
        splits = load_domain(
            {"casehold": 1, "billsum": 3}, seed=0, path=legal_files, near_duplicates="ignore", **kwargs
        )
        return Counter(record.task for record in splits.train)

    everything = mixed()
    assert everything["billsum"] == 36 and everything["casehold"] == 12
    assert mixed(max_train=8) == {"casehold": 2, "billsum": 6}


def test_legal_set_refuses_other_columns_and_nothing(legal_files: dict[str, Path], tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: prompt of casehold: 'citing_prompt' is undefined.*\['text'\]"):
        load_domain(LEGAL, seed=0, path=legal_files | {"casehold": bad})
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: target of billsum: 'summary' is undefined"):
        load_domain(LEGAL, seed=0, path=legal_files | {"billsum": bad})
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [casehold_row(0, "five")])
    with pytest.raises(ValueError, match=r"wrong\.jsonl:1: label 'five' is none of the 5 choices"):
        load_domain(LEGAL, seed=0, path=legal_files | {"casehold": wrong})
    with pytest.raises(ValueError, match=r"data\.tasks is empty"):
        load_domain({}, seed=0)
    with pytest.raises(ValueError, match="did you mean casehold"):
        load_domain({"casehol": None}, seed=0)
    with pytest.raises(ValueError, match="several tasks"):
        load_domain(LEGAL, seed=0, path=bad)


def test_legal_set_from_the_hub_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layouts of the two repositories, on disk, through the real ``datasets``."""
    datasets = pytest.importorskip("datasets")
    real = datasets.load_dataset
    for split, rows in (("train", range(100)), ("validation", range(100, 120)), ("test", range(120, 150))):
        folder = tmp_path / "casehold" / "casehold" / "all" / split
        folder.mkdir(parents=True)
        datasets.Dataset.from_list([casehold_row(i) for i in rows]).to_parquet(str(folder / "0000.parquet"))
    folder = tmp_path / "FiscalNote" / "billsum" / "data"
    folder.mkdir(parents=True)
    for split, rows in (("train", range(100)), ("test", range(100, 120)), ("ca_test", range(120, 140))):
        table = datasets.Dataset.from_list([billsum_row(i) for i in rows])
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    asked: list[tuple] = []

    def load(repo: str, *, revision: str, data_dir: str | None = None, name: str | None = None) -> object:
        asked.append((repo, data_dir, name, revision))
        return real(str(tmp_path / repo), data_dir=data_dir, name=name, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    splits = load_domain(
        LEGAL, seed=0, max_train=95, max_validation=20, max_test=30, near_duplicates="ignore", name="legal"
    )
    assert asked == [
        ("casehold/casehold", "all", None, "refs/convert/parquet"),
        ("FiscalNote/billsum", None, None, "main"),
    ]
    by_task = {
        task: [sum(record.task == task for record in part) for part in (splits.train, splits.validation, splits.test)]
        for task in ("casehold", "billsum")
    }
    assert by_task == {"casehold": [49, 10, 15], "billsum": [46, 5, 15]} and disjoint(splits)


@pytest.mark.parametrize(
    ("fault", "hint"),
    [
        (ConnectionError("no route"), "go online"),
        (RuntimeError("Dataset scripts are no longer supported"), "go online"),
        (PermissionError("Dataset 'x' is a gated dataset on the Hub"), "accept its terms at https://huggingface.co"),
    ],
)
def test_an_unreachable_hub_gives_one_message_with_the_way_out(fault: Exception, hint: str, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load(*args: object, **kwargs: object) -> None:
        raise fault

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=r"cannot fetch casehold/casehold .*data=files data\.path=<file>") as error:
        load_domain(LEGAL, seed=0)
    assert str(fault) in str(error.value) and hint in str(error.value)


def test_a_few_bad_hub_rows_are_left_out_and_many_are_an_error(monkeypatch, caplog) -> None:
    datasets = pytest.importorskip("datasets")
    good = [casehold_row(i) for i in range(300)]
    rows = {"train": good, "validation": good[:5], "test": [casehold_row(i) for i in range(300, 320)]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    rows["train"][7]["holding_2"] = None
    only = {"casehold": None}
    with caplog.at_level(logging.WARNING):
        splits = load_domain(only, seed=0, near_duplicates="ignore")
    assert "left out 1 of 300 rows" in caplog.text and len(splits.train) == 294
    for row in rows["train"][:50]:
        row["holding_2"] = None
    with pytest.raises(ValueError, match=r"casehold/casehold/train row 0: choices\[2\] is empty"):
        load_domain(only, seed=0)
    rows.clear()
    with pytest.raises(ValueError, match="but none of"):
        load_domain(only, seed=0)


def test_files_of_the_hub_behind_a_loading_script_are_read_as_they_are(tmp_path: Path, monkeypatch) -> None:
    """LegalBench's TSV and MultiLegalPile's compressed JSONL, laid out as on the hub, through the real ``datasets``."""
    datasets = pytest.importorskip("datasets")
    real = datasets.load_dataset
    folder = tmp_path / "nguha" / "legalbench" / "data" / "hearsay"
    folder.mkdir(parents=True)
    for split, answers in (("train", ["Yes", "None"]), ("test", ["None", "Yes", "Yes"])):
        lines = ["index\ttext\tanswer", *(f"{i}\tFact {split} {i}\t{answer}" for i, answer in enumerate(answers))]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    folder = tmp_path / "joelniklaus" / "Multi_Legal_Pile" / "data" / "en" / "legislation"
    folder.mkdir(parents=True)
    for name in ("uk", "ch"):
        with lzma.open(folder / f"{name}.jsonl.xz", "wt") as file:
            file.write("".join(json.dumps({"type": "legislation", "text": f"{name} {i}"}) + "\n" for i in range(3)))

    def load(builder: str, data_files: dict[str, str], **kwargs: object) -> object:
        local = {
            split: re.sub(r"^hf://datasets/(.+?)@main", rf"{tmp_path}/\1", file) for split, file in data_files.items()
        }
        return real(builder, data_files=local, cache_dir=str(tmp_path / "cache"), **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", load)
    tasks = load_tasks()
    found = domains.read_task(find_task("legalbench/hearsay", tasks))
    assert [record.choices[record.label] for record in found["test"]] == [" None", " Yes", " Yes"]
    assert len(found["train"]) == 2
    assert len(domains.read_task(tasks["multilegalpile"])["train"]) == 6


def test_a_split_of_the_hub_is_not_taken_twice_and_empty_answers_are_left_out(monkeypatch, caplog) -> None:
    """BoolQ's validation set is our test set; MedQuAD's answers of some sources were removed."""
    datasets = pytest.importorskip("datasets")
    rows = [{"question": f"is {i} it", "passage": f"P {i}", "answer": i % 2 == 0} for i in range(60)]
    found = {"train": rows[:40], "validation": rows[40:]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: found)
    splits = load_domain({"boolq": None}, seed=0, near_duplicates="ignore")
    assert splits.counts() == {"train": 38, "validation": 2, "test": 20}
    asked = [{"question": f"Q {i}?", "answer": None if i % 3 else f"A {i}."} for i in range(90)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: {"train": asked})
    with caplog.at_level(logging.INFO):
        splits = load_domain({"medquad": None}, seed=0, near_duplicates="ignore")
    assert sum(splits.counts().values()) == 30 and "left out 60 of 90 rows without answer" in caplog.text


def test_nothing_of_the_network_is_touched_for_local_files(legal_files: dict[str, Path], monkeypatch) -> None:
    monkeypatch.setattr(domains, "read_hub", lambda *args: pytest.fail("asked the hub"))
    assert load_domain(LEGAL, seed=0, path=legal_files).train


# ---- real files


@pytest.mark.parametrize(
    ("file", "count"), [("legal/uscode_sections.jsonl", 3200), ("general/tinystories_heldout.jsonl", 300)]
)
def test_real_text_loads_as_it_is(file: str, count: int) -> None:
    if not (SHARED / file).is_file():
        pytest.skip(f"{SHARED / file} is not here")
    splits = load_files(SHARED / file, seed=0, near_duplicates="report")
    assert sum(splits.counts().values()) == count and disjoint(splits)
    assert splits.counts()["test"] == round(
        0.05 * len({content_key(r) for r in [*splits.train, *splits.validation, *splits.test]})
    )


def test_real_legal_sets_load() -> None:
    folder = SHARED / "legal"
    if not (folder / "casehold_train.jsonl").is_file():
        pytest.skip(f"{folder} is not here")
    splits = load_domain(LEGAL, seed=0, path=folder, near_duplicates="report")
    assert disjoint(splits)
    assert sum(record.task == "casehold" for record in splits.test) == 200
    assert sum(record.task == "casehold" for record in splits.train) == 1900
