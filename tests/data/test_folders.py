"""Data folders are read as data sets of the hub are: data files alone, and each as the split that its name tells."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from atp.data.domains import task_files
from atp.data.reading.folders import find_files, split_of_name
from atp.data.sources import load_files, read_records
from atp.data.tasks import load_tasks

CARD = "---\nlicense: mit\nconfigs:\n{configs}---\n# A card\n"


def put(root: Path, *names: str, content: str = '{"text": "x"}\n') -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def found(root: Path, form: str | None = None) -> dict[str, list[str]]:
    files = find_files([root], form).by_split
    return {split: [str(file.relative_to(root)) for file in some] for split, some in files.items()}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.jsonl", "README.md", "LICENSE.txt", "docs/format.md"], {"train": ["train.jsonl"]}),
        (["README.md", "data/train.jsonl"], {"train": ["data/train.jsonl"]}),
        (
            ["train.csv", "validation.csv", "test.csv"],
            {"train": ["train.csv"], "validation": ["validation.csv"], "test": ["test.csv"]},
        ),
        (["my_train_v2.csv", "my-dev.csv"], {"train": ["my_train_v2.csv"], "validation": ["my-dev.csv"]}),
        (["Training.csv", "eval 1.csv"], {"train": ["Training.csv"], "test": ["eval 1.csv"]}),
        (
            ["train/a.csv", "train/b.csv", "valid/test_a.csv"],
            {"train": ["train/a.csv", "train/b.csv"], "validation": ["valid/test_a.csv"]},
        ),
        (
            [
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/test-00000-of-00001-ab.parquet",
            ],
            {
                "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
                "test": ["data/test-00000-of-00001-ab.parquet"],
            },
        ),
        (["a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "__MACOSX/a.jsonl", "._a.jsonl"], {"train": ["a.jsonl"]}),
        (["a.jsonl", "dataset_infos.json", "config.json", "logo.png", "load.py"], {"train": ["a.jsonl"]}),
        (["trained.jsonl", "latest.jsonl"], {"train": ["latest.jsonl", "trained.jsonl"]}),
        (["a.txt", "b.md", "README.md", "deep/c.txt"], {"train": ["a.txt", "b.md", "deep/c.txt"]}),
        (["train.jsonl.gz", "test.jsonl.gz"], {"train": ["train.jsonl.gz"], "test": ["test.jsonl.gz"]}),
    ],
)
def test_files_of_a_folder_by_split(tmp_path: Path, names: list[str], expected: dict[str, list[str]]) -> None:
    put(tmp_path, *names)
    assert found(tmp_path) == expected


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    put(tmp_path, "train.jsonl", "test.jsonl", "more.jsonl", "README.md")
    [note] = find_files([tmp_path]).notes
    assert "train from train.jsonl; test from test.jsonl; left out: README.md, more.jsonl" in note


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["a.jsonl", "b.csv", "c.csv"],
            r"several types: 1 jsonl \(a\.jsonl\); 2 csv \(b\.csv, c\.csv\); .*data\.format=csv",
        ),
        (["train.jsonl", "notes.txt"], r"several types: .*1 text \(notes\.txt\)"),
        (["README.md", "LICENSE"], r"directory without .*data files below it, only LICENSE, README\.md"),
        (["data.zip"], r"unpack .*data\.zip first"),
        (["train_test.csv", "a.csv"], r"train_test\.csv: 'train_test' names both train and test"),
        (
            ["data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet"],
            r"several splits that may be train: train_gen, train_sft; .*data\.path=.*train_gen\*",
        ),
    ],
)
def test_what_is_not_clear_is_asked(tmp_path: Path, names: list[str], message: str) -> None:
    put(tmp_path, *names)
    with pytest.raises(ValueError, match=message):
        find_files([tmp_path])


def test_a_format_chooses_among_types(tmp_path: Path) -> None:
    put(tmp_path, "train.jsonl", "test.csv", "labels.csv")
    assert found(tmp_path, "jsonl") == {"train": ["train.jsonl"]}
    with pytest.raises(ValueError, match=r"data\.format='xml' is unknown"):
        find_files([tmp_path], "xml")
    put(tmp_path, "plain", content='{"text": "one"}\n{"text": "two"}\n')
    files = tmp_path / "plain"
    assert len(load_files([files, tmp_path / "train.jsonl"], seed=0, form="jsonl", near_duplicates="ignore").train) == 1


def test_the_card_names_files(tmp_path: Path) -> None:
    one = (
        "- config_name: default\n  data_files:\n  - split: train\n    path: data/part-*\n"
        "  - split: test\n    path: [held.jsonl]\n"
    )
    put(tmp_path, "data/part-1.jsonl", "data/part-2.jsonl", "held.jsonl", "other.csv")
    put(tmp_path, "README.md", content=CARD.format(configs=one))
    assert found(tmp_path) == {"train": ["data/part-1.jsonl", "data/part-2.jsonl"], "test": ["held.jsonl"]}
    assert "left out: README.md, other.csv" in find_files([tmp_path]).notes[0]
    two = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("de", "en"))
    put(tmp_path, "README.md", content=CARD.format(configs=two))
    with pytest.raises(ValueError, match=r"several data sets, de, en \(README\.md\)"):
        find_files([tmp_path])
    put(tmp_path, "README.md", content=CARD.format(configs="- config_name: default\n  data_files: gone/*\n"))
    with pytest.raises(ValueError, match=r"README\.md names the files 'gone/\*' of the split 'train', which are not"):
        find_files([tmp_path])


def test_saved_data_sets(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list([{"text": f"number {i}"} for i in range(40)])
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data.select(range(30)), test=data.select(range(30, 40))).save_to_disk(tmp_path / "two")
    assert len(load_files(tmp_path / "one", seed=0).train) == 36
    assert load_files(tmp_path / "two", seed=0, validation_fraction=0.1).counts() == {
        "train": 27,
        "validation": 3,
        "test": 10,
    }
    assert len(read_records(tmp_path / "two")) == 10
    (tmp_path / "three").mkdir()
    put(tmp_path / "three", "state.json", "dataset_info.json", content="{}")
    with pytest.raises(ValueError, match=r"three: cannot be read as a data set saved by `datasets`"):
        load_files(tmp_path / "three", seed=0)


def rows(start: int, end: int) -> str:
    return "".join(json.dumps({"text": f"number {i}"}) + "\n" for i in range(start, end))


def test_splits_of_a_folder_are_used_and_may_be_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, part in (("train", rows(0, 30)), ("validation", rows(30, 36)), ("test", rows(36, 40))):
        put(tmp_path / "d", f"{name}.jsonl", content=part)
    put(tmp_path, "own.jsonl", content=rows(40, 43))
    with caplog.at_level(logging.INFO):
        splits = load_files(tmp_path / "d", seed=0)
    assert splits.counts() == {"train": 30, "validation": 6, "test": 4}
    assert "validation from validation.jsonl" in caplog.text and "validation from" in splits.notes[0]
    replaced = load_files(tmp_path / "d", seed=0, test_path=tmp_path / "own.jsonl")
    assert replaced.counts()["test"] == 3 and "in place of the test split" in " ".join(replaced.notes)
    streamed = load_files(tmp_path / "d", seed=0, stream=True)
    assert streamed.counts() == splits.counts()
    assert read_records(tmp_path / "d") == splits.test
    only: dict[str, Any] = {"test_path": tmp_path / "d"}
    assert load_files(tmp_path / "own.jsonl", seed=0, validation_path=tmp_path / "d", **only).counts() == {
        "train": 3,
        "validation": 6,
        "test": 4,
    }
    with pytest.raises(ValueError, match="names only files of test"):
        put(tmp_path / "e", "test.jsonl", content=rows(0, 5))
        load_files(tmp_path / "e", seed=0)
    with pytest.raises(ValueError, match=r"data\.validation_path=.* names no validation files, only test"):
        load_files(tmp_path / "own.jsonl", seed=0, validation_path=tmp_path / "e")


@pytest.mark.parametrize("stream", [False, True])
def test_the_same_file_for_training_and_testing_is_refused(tmp_path: Path, stream: bool) -> None:
    put(tmp_path, "a.jsonl", content=rows(0, 20))
    with pytest.raises(ValueError, match="also stand in a later split"):
        load_files(tmp_path / "a.jsonl", seed=0, test_path=tmp_path / "a.jsonl", stream=stream, validation_fraction=0.1)


def test_patterns_name_files(tmp_path: Path) -> None:
    put(tmp_path, "a-1.jsonl", content=rows(0, 20))
    put(tmp_path, "a-2.jsonl", content=rows(20, 40))
    assert len(load_files(f"{tmp_path}/a-*.jsonl", seed=0).train) == 36
    with pytest.raises(ValueError, match=r"b-\*\.jsonl does not exist"):
        load_files(f"{tmp_path}/b-*.jsonl", seed=0)


def test_names_tell_splits_between_marks_only() -> None:
    told = {
        name: split_of_name(name) for name in ("train", "pre-train.v2", "contest", "DEV", "val_1", "strain", "evals")
    }
    assert told == {
        "train": "train",
        "pre-train.v2": "train",
        "contest": None,
        "DEV": "validation",
        "val_1": "validation",
        "strain": None,
        "evals": None,
    }


def test_a_tasks_files_are_found_without_hidden_ones_and_in_folders_by_split(tmp_path: Path) -> None:
    task = load_tasks()["casehold"]
    put(tmp_path, ".cache/casehold_train.jsonl", "data/casehold_train.jsonl", "data/casehold_test.jsonl")
    assert task_files(task, tmp_path) == {
        "train": [tmp_path / "data/casehold_train.jsonl"],
        "test": [tmp_path / "data/casehold_test.jsonl"],
    }
    put(tmp_path, "parts/train-1.jsonl", "parts/test-1.jsonl", "held/a.jsonl", "held/README.md")
    assert task_files(task, {"train": tmp_path / "parts", "test": tmp_path / "held"}) == {
        "train": [tmp_path / "parts/train-1.jsonl"],
        "test": [tmp_path / "held/a.jsonl"],
    }
    with pytest.raises(ValueError, match="holds no validation files, only train, test"):
        task_files(task, {"validation": tmp_path / "parts"})
