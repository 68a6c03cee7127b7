"""The collaborative prompt: before prompts where it is switched on, nowhere else."""

from __future__ import annotations

import logging

import pytest

from atp.data.records import ChoiceRecord, CompletionRecord, Splits, TextRecord
from atp.prompting import with_prompt

SPLITS = Splits(
    [CompletionRecord("Q", "A"), TextRecord("running")],
    [CompletionRecord("V", "A")],
    [ChoiceRecord("T", ("a", "b"), 1)],
    "x",
)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_each_switch_reaches_its_own_records(train: bool, inference: bool) -> None:
    told = with_prompt(SPLITS, "Note.", train=train, inference=inference)
    before = "Note.\n" if train else ""
    assert told.train == [CompletionRecord(f"{before}Q", "A"), TextRecord("running")]
    assert told.validation == [CompletionRecord(f"{before}V", "A")]
    assert told.test == [ChoiceRecord("Note.\nT" if inference else "T", ("a", "b"), 1)]


def test_running_text_is_left_alone_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    plain = Splits([TextRecord("a")], [TextRecord("b")], [TextRecord("c")], "stories")
    with caplog.at_level(logging.WARNING):
        assert with_prompt(plain, "Note.", train=True, inference=True) == plain
    assert "prune.prompt is ignored: stories" in caplog.text


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prune\.prompt\.text is empty"):
        with_prompt(SPLITS, " ", train=True, inference=True)
