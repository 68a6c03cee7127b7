"""Near duplicates across splits: pairs that say the same go; records that share a template, and nothing else, stay."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import pytest

from atp.data.records import CompletionRecord, Record, Splits, TextRecord
from atp.data.records.overlap import check_overlap
from atp.data.sources import load_files

WORDS = [
    "river",
    "stone",
    "cloud",
    "lamp",
    "garden",
    "winter",
    "copper",
    "signal",
    "harbour",
    "meadow",
    "candle",
    "orbit",
    "thunder",
    "paper",
]


def say(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) + rng.choice("abcdefgh") for _ in range(count))


def templated(templates: int, each: int, *, template: int, given: int, suffix: bool = False) -> list[Record]:
    rng = random.Random(0)
    texts = [say(rng, template) for _ in range(templates)]
    found: list[Record] = []
    for k in range(templates):
        for _ in range(each):
            own = say(rng, given)
            found.append(CompletionRecord(f"{own} {texts[k]}" if suffix else f"{texts[k]} {own}", rng.choice(WORDS)))
    rng.shuffle(found)
    return found


def parted(records: list[Record]) -> Splits:
    size = max(1, len(records) // 20)
    return Splits(records[2 * size :], records[:size], records[size : 2 * size], "x")


@pytest.mark.parametrize(
    ("templates", "each", "template", "given", "suffix"),
    [
        (1, 80, 60, 6, False),
        (1, 400, 200, 3, True),
        (100, 30, 45, 5, False),
        (50, 8, 45, 8, True),
        (200, 3, 40, 9, False),
    ],
)
def test_records_that_share_a_template_stay(templates: int, each: int, template: int, given: int, suffix: bool) -> None:
    splits = parted(templated(templates, each, template=template, given=given, suffix=suffix))
    assert check_overlap(splits, "drop").counts() == splits.counts()


def test_near_duplicates_are_found_also_within_a_template() -> None:
    rng = random.Random(1)
    rows = [("Summarise: " + say(rng, 50), say(rng, 4)) for _ in range(300)]
    records: list[Record] = [CompletionRecord(prompt, answer) for prompt, answer in rows]
    leaks: list[Record] = [
        CompletionRecord(prompt.replace(prompt.split()[25], "changed", 1), answer) for prompt, answer in rows[:20]
    ]
    loud: list[Record] = [CompletionRecord(prompt.upper() + "!", answer) for prompt, answer in rows[20:25]]
    splits = Splits([*records[40:], *leaks, *loud], [], records[:40], "x")
    kept = check_overlap(splits)
    assert kept.train == records[40:]
    assert kept.overlap["near"] == {"validation_test": 0, "train_test": 25, "train_validation": 0}


def test_the_same_question_with_another_answer_is_one() -> None:
    rng = random.Random(5)
    asked = [say(rng, 20) for _ in range(100)]
    records: list[Record] = [CompletionRecord(prompt, say(rng, 12)) for prompt in asked]
    again: list[Record] = [CompletionRecord(prompt + "?", say(rng, 12)) for prompt in asked[:10]]
    assert check_overlap(Splits([*records[10:], *again], [], records[:10], "x")).train == records[10:]
    open_ended: list[Record] = [CompletionRecord(asked[0], say(rng, 12)) for _ in range(100)]
    assert len(check_overlap(Splits(open_ended[10:], [], open_ended[:10], "x")).train) == 90


def test_an_excerpt_of_a_held_out_text_is_one() -> None:
    rng = random.Random(2)
    long = say(rng, 300)
    others: list[Record] = [TextRecord(say(rng, 100)) for _ in range(20)]
    excerpt = TextRecord(" ".join(long.split()[100:160]))
    assert check_overlap(Splits([*others, excerpt], [], [TextRecord(long)], "x")).train == others


def test_formulas_that_differ_in_their_signs_are_not() -> None:
    def sums(signs: str) -> list[Record]:
        return [TextRecord(f"Let a be {i} and b be 7: what is a {sign} b, say?") for i, sign in enumerate(signs)]

    assert len(check_overlap(Splits(sums("+*/"), [], sums("*/+"), "x")).train) == 3


def test_validation_is_compared_with_the_test_also_where_training_is_not(caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(3)
    texts = [say(rng, 40) for _ in range(60)]
    validation = [TextRecord(text) for text in texts[:10]]
    test = [TextRecord(text + " more") for text in texts[:5]]
    splits = Splits([TextRecord(text) for text in texts[20:]], validation, test, "mine")
    with caplog.at_level(logging.WARNING):
        kept = check_overlap(splits)
    assert kept.counts() == {"train": 40, "validation": 5, "test": 5}
    assert "WARNING: 5 of 10 validation records (50%) ARE LEFT OUT" in caplog.text
    assert "'validation_test': 5" in caplog.text and texts[0][:30] in caplog.text
    assert check_overlap(splits, "report").counts() == splits.counts()


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_left_is_an_error_that_names_the_setting(tmp_path: Path, stream: bool) -> None:
    rng = random.Random(4)
    texts = [say(rng, 30) for _ in range(10)]
    for name, end in (("train", "."), ("validation", "?"), ("test", "!")):
        some = texts[:5] if name == "validation" else texts[5:] if name == "test" else texts
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t + end}) + "\n" for t in some))
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("train", "validation", "test")}
    kwargs = {"validation_path": paths["validation"], "test_path": paths["test"], "seed": 0, "stream": stream}
    with pytest.raises(ValueError, match=r"all 10 training records nearly equal.*for example.*data\.near_duplicates"):
        load_files(paths["train"], **kwargs)
    assert len(load_files(paths["train"], **kwargs, near_duplicates="report").train) == 10


def test_a_stream_keeps_templates_too(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = templated(20, 30, template=45, given=5)
    file.write_text("".join(json.dumps({"prompt": r.prompt, "completion": r.completion}) + "\n" for r in rows))  # type: ignore[union-attr]
    splits = load_files(file, seed=0, stream=True)
    assert splits.overlap["near"] == {"train_held_out": 0}
