"""Packing: several examples in one sequence, so that short records waste no computation on padding.

Each packed example attends only to itself (a block-diagonal causal mask), so a packed batch gives the same loss per
token as the examples apart, up to rounding; rotary positions are relative, so going on counting changes nothing. It
sits between :mod:`atp.data.encoding` and :mod:`atp.data.batches`. It knows nothing of torch or records.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atp.data.encoding import IGNORED, Example


@dataclass(frozen=True, slots=True, eq=False)
class PackedExample:
    """Several examples in a row.

    Attributes:
        input_ids: Token ids, int32 [T].
        labels: Unshifted ids, int64 [T], with :data:`atp.data.encoding.IGNORED` where nothing is learnt, which holds
            for the first token of each example.
        segments: Which example a token belongs to, int32 [T], from 0.
        text_bytes: UTF-8 bytes of the text that the learnt tokens spell.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    segments: np.ndarray
    text_bytes: int

    @property
    def loss_tokens(self) -> int:
        """Return how many tokens count in the loss."""
        return int((self.labels[1:] != IGNORED).sum())


def pack(examples: Sequence[Example], max_length: int) -> list[PackedExample]:
    """Pack examples into sequences of at most ``max_length`` tokens, longest first, each where it fits best."""
    rows: list[list[Example]] = []
    free: list[tuple[int, int]] = []  # room and row, in order
    for example in sorted(examples, key=lambda one: -len(one.input_ids)):
        size = len(example.input_ids)
        place = bisect.bisect_left(free, (size, -1))
        if place == len(free):
            rows.append([example])
            bisect.insort(free, (max_length - size, len(rows) - 1))
        else:
            room, row = free.pop(place)
            rows[row].append(example)
            bisect.insort(free, (room - size, row))
    return [_join(row) for row in rows]


def block_mask(rows: Sequence[PackedExample], length: int) -> np.ndarray:
    """Return which position may attend to which, bool [B, 1, T, T]: earlier ones of the same example.

    Padding is an example of its own, so that no position is left with nothing to attend to.
    """
    segments_BT = np.full((len(rows), length), -1, dtype=np.int32)
    for place, row in enumerate(rows):
        segments_BT[place, : len(row.segments)] = row.segments
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return (same_BTT & np.tri(length, dtype=bool))[:, None]


def _join(row: Sequence[Example]) -> PackedExample:
    labels = [example.labels for example in row]
    for part in labels:
        part[0] = IGNORED
    sizes = [len(example.input_ids) for example in row]
    return PackedExample(
        np.concatenate([example.input_ids for example in row]),
        np.concatenate(labels),
        np.repeat(np.arange(len(row), dtype=np.int32), sizes),
        sum(example.text_bytes for example in row),
    )
