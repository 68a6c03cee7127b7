"""Tasks, formats of files, overlap and streaming: what a team's own domain goes through before training."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from test_data import make_tokenizer

from atp.data.batches import PruningDataModule
from atp.data.domains import load_domain, read_task, scored_records
from atp.data.encoding import Encoder
from atp.data.reading.files import rows
from atp.data.records import ChoiceRecord, CompletionRecord, Record, Splits, TextRecord, content_key, few_shot
from atp.data.records.columns import RowParser as record_parser
from atp.data.records.overlap import check_overlap
from atp.data.sources import load_files, read_records
from atp.data.streaming import MAX_HELD_OUT, StreamedRecords, _fraction
from atp.data.tasks import Task, find_task, load_tasks

TASKS = load_tasks()


def write_jsonl(path: Path, found: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


# ---- one row of each task, as the hub's set has it

HUB_ROWS = {
    "pubmedqa": ({"question": "Q?", "context": {"contexts": ["a", "b"]}, "final_decision": "maybe"}, " maybe"),
    "mednli": ({"sentence1": "s", "sentence2": "t", "gold_label": "neutral"}, " neutral"),
    "meqsum": ({"CHQ": "long", "Summary": "short?"}, " short?"),
    "medquad": ({"question": "Q?", "answer": "A."}, " A."),
    "medqa": ({"question": "Q?", "options": {"A": "w", "B": "x", "C": "y"}, "answer_idx": "C"}, " y"),
    "medmcqa": ({"question": "Q?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 3}, " z"),
    "mmlu/law": ({"question": "Q?", "choices": ["w", "x"], "answer": 1}, " x"),
    "boolq": ({"question": "is it", "passage": "P", "answer": True}, " yes"),
    "piqa": ({"goal": "g", "sol1": "a", "sol2": "b", "label": 0}, " a"),
    "hellaswag": ({"ctx": "c", "activity_label": "A", "endings": ["a", "b"], "label": "1"}, " b"),
    "winogrande": ({"sentence": "Ann saw _ leave.", "option1": "Bo", "option2": "Cy", "answer": "2"}, " Cy leave."),
    "arc_easy": ({"question": "Q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}, " b"),
    "openbookqa": (
        {"question_stem": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
        " a",
    ),
    "billsum": ({"text": "bill", "summary": "sum"}, " sum"),
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_rows_of_the_hub_become_records(name: str) -> None:
    row, answer = HUB_ROWS[name]
    record = find_task(name, TASKS).record(row, "row 0")
    assert isinstance(record, CompletionRecord | ChoiceRecord) and record.task == name
    assert (record.choices[record.label] if isinstance(record, ChoiceRecord) else record.completion) == answer


def test_every_task_says_where_it_comes_from() -> None:
    for name, task in TASKS.items():
        assert task.about and task.source and task.domain in ("legal", "health", "general"), name
        assert task.protocol or set(task.metrics) <= {"perplexity", "rouge"}, name


SHARED_FILES = [
    ("legal", "casehold", {"train": 2000, "test": 200}),
    ("legal", "billsum", {"train": 200}),
    ("legal", "uscode", {"train": 3200}),
    ("legal", "legalbench_texts", {"train": 14682}),
    ("health", "pubmedqa", {"train": 500, "test": 500}),
    ("health", "meqsum", {"train": 1000, "test": 100}),
    ("health", "medquad", {"train": 4000}),
    ("general", "boolq", {"train": 9427, "test": 3270}),
    ("general", "arc_easy", {"train": 2251, "test": 2376}),
    ("general", "arc_challenge", {"train": 1119, "test": 1172}),
    ("general", "openbookqa", {"train": 4957, "test": 500}),
    ("general", "tinystories", {"train": 2016, "test": 300}),
    ("general", "wikitext2", {"test": 1, "validation": 1}),
]


@pytest.mark.parametrize(("domain", "name", "counts"), SHARED_FILES)
def test_every_real_file_loads(shared: Path, domain: str, name: str, counts: dict[str, int]) -> None:
    found = read_task(TASKS[name], shared / "data" / domain, alone=False)
    assert {split: len(records) for split, records in found.items()} == counts


def test_the_two_leaked_questions_of_the_real_test_set_are_found(shared: Path) -> None:
    """MeQSum's training set holds items 276 and 318 of HQS."""
    folder = shared / "data" / "health"
    ids = {TASKS["meqsum"].record(row, "x"): row["q_id"] for row, _ in rows(folder / "hqs_test.jsonl")}
    found = read_task(TASKS["meqsum"], folder)
    test = [record for record in found["test"] if ids[record] in (276, 318)]
    splits = check_overlap(Splits(found["train"], [], test, "meqsum"))
    assert splits.overlap["near"]["train_test"] >= 2 and len(splits.train) <= 998


def test_mmlu_csv_and_legalbench_tsv_read(tmp_path: Path) -> None:
    with (tmp_path / "law_test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["What, then?", "a", "b", "c", "d", "B"], ["And?", "e", "f", "g", "h", "D"]])
    found = read_task(find_task("mmlu/law", TASKS), tmp_path)["test"]
    assert [record.choices[record.label] for record in found] == [" b", " h"]
    folder = tmp_path / "hearsay"
    folder.mkdir()
    for split, answers in (("train", ["Yes", "No"]), ("test", ["No", "Yes", "No"])):
        lines = ["index\ttext\tanswer", *(f"{i}\tFact {split} {i}\t{answer}" for i, answer in enumerate(answers))]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    found = read_task(find_task("legalbench/hearsay", TASKS), tmp_path)
    assert [record.choices[record.label] for record in found["test"]] == [" No", " Yes", " No"]
    assert {len(part) for part in found.values()} == {2, 3}


def test_tasks_of_ones_own_from_a_toml_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[claims]\nprompt = "{{ claim }} ->"\noptions = ["true", "false"]\nlabel = "verdict"\n')
    data = write_jsonl(tmp_path / "claims_train.jsonl", [{"claim": f"c {i}", "verdict": "false"} for i in range(40)])
    splits = load_domain({"claims": None}, seed=0, path=data, tasks_file=file, near_duplicates="ignore")
    assert splits.train[0].choices == (" true", " false") and splits.train[0].label == 1
    for text, message in (
        ("[claims]\nprompt = '{{ claim }}'\n", "give either text"),
        ("[claims]\ntext = 'x'\nmetrics = ['acuracy']\n", "'acuracy' is unknown; did you mean accuracy"),
        ("[claims]\ntext = 'x'\ntemplat = 'y'\n", "there is no key 'templat'"),
        ("[claims\n", "not valid TOML"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_tasks(file)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("casehold", {"citing_prompt": "x"}, r"f:3: .* of casehold: 'holding_0' is undefined"),
        (
            "pubmedqa",
            {"QUESTION": "q", "CONTEXTS": ["c"], "final_decision": "perhaps"},
            r"f:3: label 'perhaps' is none",
        ),
        ("boolq", {"question": "q", "passage": None, "answer": True}, r"f:3: prompt of boolq cannot be made.*null"),
        ("meqsum", {"CHQ": "x", "Summary": " "}, r"f:3: target is empty"),
        ("medmcqa", {"question": "q", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 7}, "label 7 is none"),
    ],
)
def test_bad_rows_are_named_with_their_place(task: str, row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TASKS[task].record(row, "f:3")


def test_missing_files_and_tasks_say_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mednli may be had only by agreement.*physionet.*data\.path"):
        read_task(TASKS["mednli"])
    with pytest.raises(ValueError, match="uscode is not on the hub"):
        read_task(TASKS["uscode"])
    with pytest.raises(ValueError, match=r"holds no file of piqa; looked below it for piqa_train"):
        read_task(TASKS["piqa"], tmp_path)
    with pytest.raises(ValueError, match=r"there is no task .* 'hellaswg'; did you mean hellaswag"):
        scored_records("hellaswg", most=5, seed=0)
    with pytest.raises(ValueError, match="the embedded domain health has no task 'qa'"):
        scored_records("health/qa", most=5, seed=0)


def test_a_task_with_only_test_records_is_scored_but_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "wikitext2_test.txt").write_text(" = One = \n\n a b c \n\n = Two = \n\n d e f \n")
    records = scored_records("wikitext2", most=5, seed=0, path=tmp_path)
    assert len(records) == 1 and isinstance(records[0], TextRecord) and "Two" in records[0].text
    splits = load_domain({"wikitext2": None}, seed=0, path=tmp_path)
    with pytest.raises(ValueError, match=r"the train split of 'tasks' is empty"):
        PruningDataModule(splits, make_tokenizer(), max_length=16, batch_size=1, num_batches=1, seed=0)


# ---- formats


def test_csv_parquet_json_and_folders_give_the_same_records(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    data = [{"body": f"Text, number {i}\nwith a line", "n": str(i)} for i in range(5)]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["body", "n"])
        writer.writeheader()
        writer.writerows(data)
    parquet.write_table(pyarrow.Table.from_pylist(data), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(data))
    write_jsonl(tmp_path / "a.jsonl", data)
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    for i, row in enumerate(data):
        (tmp_path / "texts" / "deep" / f"{i}.{'md' if i % 2 else 'txt'}").write_text(row["body"])
    expected = [TextRecord(row["body"]) for row in data]
    for name in ("a.csv", "a.parquet", "a.json", "a.jsonl"):
        assert read_records(tmp_path / name, fields={"text": "body"}) == expected, name
    assert read_records(tmp_path / "texts") == expected


def test_columns_map_by_name_template_and_list() -> None:
    row = {"q": "Why?", "ctx": "Since.", "one": "a", "two": "b", "right": "b"}
    parse = record_parser({"prompt": "{{ ctx }}\n{{ q }}", "choices": ["one", "two"], "label": "right"})
    assert parse(row, "x") == ChoiceRecord("Since.\nWhy?", ("a", "b"), 1)
    with pytest.raises(ValueError, match=r"f\.csv:4: data\.fields\.prompt: 'contex' is undefined; the columns are"):
        record_parser({"prompt": "{{ contex }}", "completion": "q"})(row, "f.csv:4")
    with pytest.raises(ValueError, match="not valid Jinja"):
        record_parser({"text": "{{ q"})
    with pytest.raises(ValueError, match=r"f\.csv:4: data\.fields names the columns \['contx'\]; the record has"):
        record_parser({"prompt": "contx", "completion": "q"})(row, "f.csv:4")
    with pytest.raises(ValueError, match=r"f\.csv:4: data\.fields\.prompt cannot be made.*is null"):
        record_parser({"prompt": "{{ ctx }}: {{ q }}", "completion": "one"})({**row, "ctx": None}, "f.csv:4")
    with pytest.raises(ValueError, match=r"label 'c' is none of the 2 choices"):
        record_parser({"prompt": "q", "choices": ["one", "two"], "label": "ctx"})({**row, "ctx": "c"}, "x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,n\none,1\ntwo\n", r"a\.csv:3: 1 cells, but the columns are"),
        ("a.csv", b"text\n\xff\xfe\n", r"a\.csv:2: text is not UTF-8 \(byte 0xff\)"),
        ("a.json", b'[{"text": "a"},\n{"text"', r"a\.json:2: not valid JSON"),
        ("a.json", b"{}", "must hold a list"),
        ("a.parquet", b"no", "not a Parquet file"),
        ("a.docx", b"no", r"unknown format '\.docx'"),
        ("a.txt", b"fine\n\xff", r"a\.txt:2: not UTF-8"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / name)


# ---- overlap


def test_near_duplicates_are_dropped_reported_or_ignored() -> None:
    def text(i: int) -> str:
        return " ".join(f"word{i}x{k}" for k in range(60))

    held = [TextRecord(text(i)) for i in range(10)]
    train: list[Record] = [TextRecord(text(i)) for i in range(20, 60)]
    leaked = TextRecord(text(3).replace("word3x30", "other") + " and more")
    boiler = TextRecord("the very same boilerplate text stands in every record " + text(99))
    splits = Splits([*train, leaked, boiler], [], held, "x")
    dropped = check_overlap(splits, "drop")
    assert dropped.overlap["near"]["train_test"] == 1 and leaked not in dropped.train and boiler in dropped.train
    assert dropped.overlap["examples"][0]["train"].startswith("word3x0")
    assert check_overlap(splits, "report").overlap["near"] == dropped.overlap["near"]
    assert len(check_overlap(splits, "report").train) == 42
    assert check_overlap(splits, "ignore").overlap == {}
    with pytest.raises(ValueError, match=r"data\.near_duplicates='maybe' is unknown"):
        check_overlap(splits, "maybe")


# ---- few shots, packing, streaming


def test_few_shots_are_per_task_and_spread_over_labels() -> None:
    found: list[Record] = [ChoiceRecord(f"p {i}", ("a", "b", "c"), i % 3 if i < 90 else 0, "c") for i in range(300)]
    found += [CompletionRecord(f"p {i}", "x", "d") for i in range(3)]
    some = few_shot(found, 9, seed=1)
    assert sorted(record.label for record in some if isinstance(record, ChoiceRecord)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert sum(record.task == "d" for record in some) == 3 and few_shot(found, 9, seed=1) == some
    assert few_shot(found, 9, seed=2) != some and few_shot(found, None, 0) == found
    with pytest.raises(ValueError, match=r"data\.shots is 0"):
        few_shot(found, 0, 0)


def test_packed_records_learn_what_they_learn_apart() -> None:
    import torch
    from conftest import tiny_model

    tokenizer = make_tokenizer()
    records: list[Record] = [CompletionRecord("a bill " * (1 + i % 4), "the act" * (1 + i % 3), "t") for i in range(12)]
    model = tiny_model(vocabulary=len(tokenizer)).eval()
    splits = Splits(records, records[:2], records[:2], "x")
    totals = []
    for packing in (False, True):
        data = PruningDataModule(
            splits, tokenizer, max_length=48, batch_size=3, num_batches=99, seed=0, packing=packing
        )
        data.setup()
        loader = data.train_dataloader()
        total, tokens, positions = 0.0, 0, 0
        for index, batch in zip(range(loader._order.batches_per_pass), loader, strict=False):
            assert index >= 0
            labels = batch.pop("labels")
            logits = model(**batch).logits[:, :-1]
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
            ).item()
            tokens += int((labels[:, 1:] != -100).sum())
            positions += labels.numel()
        totals.append((total, tokens, positions))
    assert totals[0][1] == totals[1][1] and totals[0][0] == pytest.approx(totals[1][0], rel=1e-5)
    assert len(data._train) < 12


def test_a_stream_gives_the_splits_and_batches_of_a_list(tmp_path: Path) -> None:
    data = [{"text": f"the court holds that party {i} may recover " + "damages " * (i % 7)} for i in range(300)]
    file = write_jsonl(tmp_path / "big.jsonl", [*data, *data[:30]])
    splits = load_files(file, seed=0, stream=True, validation_fraction=0.1, test_fraction=0.1, near_duplicates="ignore")
    assert isinstance(splits.train, StreamedRecords)
    held_out = {content_key(record) for record in [*splits.validation, *splits.test]}
    assert not held_out & {content_key(record) for record in splits.train}
    assert len({content_key(record) for record in splits.train}) + len(held_out) == 300
    tokenizer = make_tokenizer()
    sizes = {"max_length": 32, "batch_size": 4, "num_batches": 20, "seed": 3}
    streamed = PruningDataModule(splits, tokenizer, **sizes)
    listed = PruningDataModule(Splits(list(splits.train), splits.validation, splits.test, "x"), tokenizer, **sizes)
    for one, other in zip(streamed.train_dataloader(), listed.train_dataloader(), strict=True):
        assert all((one[key] == other[key]).all() for key in one)
    assert streamed.describe()["tokens"] == listed.describe()["tokens"]
    with pytest.raises(ValueError, match="exclude each other"):
        PruningDataModule(splits, tokenizer, packing=True, **sizes)


def test_of_a_large_stream_the_records_of_the_lowest_hashes_are_held_out(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "big.jsonl", [{"text": f"r{i}"} for i in [*range(9000), *range(500)]])
    splits = load_files(file, seed=3, stream=True, validation_fraction=0.6, test_fraction=0.1, near_duplicates="ignore")
    places = {record: _fraction(record, 3) for record in (TextRecord(f"r{i}") for i in range(9000))}
    lowest = sorted((record for record in places if places[record] < 0.6), key=places.__getitem__)[:MAX_HELD_OUT]
    assert len(lowest) == MAX_HELD_OUT and set(splits.validation) == set(lowest)
    assert len(splits.validation) == MAX_HELD_OUT and len(splits.test) == sum(
        0.6 <= place < 0.7 for place in places.values()
    )


def test_windows_with_a_stride_score_every_token_once_with_more_context() -> None:
    tokenizer = make_tokenizer()
    text = TextRecord("the court holds that the party may recover damages " * 30)
    plain, strided = (Encoder(tokenizer, 32, close=False, stride=stride).encode([text])[0] for stride in (None, 8))
    assert sum(e.loss_tokens for e in plain) == sum(e.loss_tokens for e in strided)
    assert min(e.context for e in strided[1:]) > max(e.context for e in plain[1:])
    with pytest.raises(ValueError, match=r"evaluate\.stride=40 must lie between"):
        Encoder(tokenizer, 32, stride=40)


def test_a_task_needs_one_shape() -> None:
    with pytest.raises(ValueError, match="give either text"):
        Task("x", text="a", target="b")
