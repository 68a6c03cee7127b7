"""Examples: token ids of one sequence and which of them count in the loss, and several as the rows of a batch.

What encoding hands to batches and scoring. It knows nothing of records, tokenizers or torch.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

IGNORED = -100
"""Label of tokens that do not count, as in torch and transformers."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One sequence to train on or to score.

    Attributes:
        input_ids: Token ids, int32 [T].
        context: Leading tokens that are given, not learnt. The first token of a sequence never counts in the loss,
            since nothing precedes it.
        text_bytes: UTF-8 bytes of the text that the learnt tokens spell.
        given: Stretches of tokens after the context that are not learnt either, as (start, end), in order.
    """

    input_ids: np.ndarray
    context: int
    text_bytes: int
    given: tuple[tuple[int, int], ...] = ()

    @property
    def labels(self) -> np.ndarray:
        """Return the unshifted ids, int64 [T], with the given ones replaced by :data:`IGNORED`."""
        labels = self.input_ids.astype(np.int64)
        labels[: self.context] = IGNORED
        for start, end in self.given:
            labels[start:end] = IGNORED
        return labels

    @property
    def loss_tokens(self) -> int:
        """Return how many tokens count in the loss."""
        return len(self.input_ids) - max(1, self.context) - sum(end - start for start, end in self.given)


@dataclass(frozen=True, slots=True, eq=False)
class Choices:
    """One multiple-choice item to score.

    Attributes:
        prompt: Ids of beginning-of-sequence and prompt, the same for every choice.
        continuations: Ids of each choice.
        text_bytes: UTF-8 bytes of each choice's text.
    """

    prompt: list[int]
    continuations: list[list[int]]
    text_bytes: list[int]


class Sequenced(Protocol):
    """What can be padded into a batch: an example, or several packed into one."""

    @property
    def input_ids(self) -> np.ndarray:
        """Token ids, int32 [T]."""

    @property
    def labels(self) -> np.ndarray:
        """Unshifted labels, int64 [T]."""


def pad(examples: Sequence[Sequenced], pad_id: int) -> dict[str, np.ndarray]:
    """Pad examples on the right to the longest of them.

    Returns:
        ``input_ids``, ``attention_mask`` (1 for tokens, 0 for padding) and ``labels``, int64 [B, T].
    """
    longest = max(len(example.input_ids) for example in examples)
    shape = (len(examples), longest)
    ids_BT = np.full(shape, pad_id, dtype=np.int64)
    mask_BT = np.zeros(shape, dtype=np.int64)
    labels_BT = np.full(shape, IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        size = len(example.input_ids)
        ids_BT[row, :size] = example.input_ids
        mask_BT[row, :size] = 1
        labels_BT[row, :size] = example.labels
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}
