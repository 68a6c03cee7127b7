"""Padding: examples of different length as the rows of one batch.

Sits between :mod:`atp.data.encoding` and what batches are for, training and scoring. It knows nothing of torch.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from atp.data.encoding import IGNORED


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
