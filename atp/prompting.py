"""The collaborative prompt: telling the model, in words, that it is being pruned (Compresso).

Sits between records and encoding. Compresso (arXiv 2310.05015; section 2.4 of the methods note) puts one fixed text
before every instruction, while it trains and whenever the pruned model is used; the wording here is this project's own.
It knows records and nothing of tokens or models.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from atp.data.records import Record, Splits, TextRecord

log = logging.getLogger(__name__)

COLLABORATIVE_PROMPT = (
    "Note to the model: parts of you that matter little are being removed while you learn. Lean on what is left, "
    "answer as well as before, and help to find what can go."
)
"""The text, used unless ``prune.prompt.text`` gives another."""

FILE = "collaborative_prompt.txt"
"""Where an exported model keeps the text that belongs before its prompts."""


def with_prompt(splits: Splits, text: str, *, train: bool, inference: bool) -> Splits:
    """Put the text before prompts.

    Args:
        splits: Records; running text has no prompt and stays as it is.
        text: What to put there, on a line of its own.
        train: Of training and validation records.
        inference: Of test records.

    Raises:
        ValueError: The text is empty.
    """
    if not text.strip():
        raise ValueError(
            "prune.prompt.text is empty; leave it out for the usual text, or switch train and inference off"
        )

    def told(records: Sequence[Record], wanted: bool) -> list[Record]:
        return [_told(record, text) if wanted else record for record in records]

    if all(isinstance(record, TextRecord) for record in splits.train):
        log.warning("prune.prompt is ignored: %s holds running text, and prompts are nowhere to be found", splits.name)
        return splits
    return Splits(told(splits.train, train), told(splits.validation, train), told(splits.test, inference), splits.name)


def _told(record: Record, text: str) -> Record:
    return record if isinstance(record, TextRecord) else replace(record, prompt=f"{text}\n{record.prompt}")
