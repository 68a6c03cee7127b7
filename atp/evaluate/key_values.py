"""A KV cache with room to grow: decoding a token writes its keys and values without copying those before it.

Used by :mod:`atp.evaluate.reading`. transformers' dynamic cache joins old and new keys at every step, which on a CPU is
the largest single cost of decoding a batch. It knows nothing of models or scores.

Shape suffixes: B batch, K KV heads, T tokens, H head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

_ROOM = 64  # tokens


class RoomyLayer(DynamicLayer):
    """A cache layer that keeps spare room behind its keys and values, so that appending copies nothing."""

    _buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, K, T, H]; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < after:
            self._buffers = tuple(  # type: ignore[assignment]
                states.new_empty((*states.shape[:-2], after + _ROOM, states.shape[-1]))
                for states in (key_states, value_states)
            )
            if before:
                assert self._buffers is not None and self.keys is not None and self.values is not None
                self._buffers[0][..., :before, :] = self.keys
                self._buffers[1][..., :before, :] = self.values
        assert self._buffers is not None
        keys, values = self._buffers
        keys[..., before:after, :] = key_states
        values[..., before:after, :] = value_states
        # Views, not copies: attention sees as many tokens as there are, and the next step writes behind them.
        self.keys, self.values = keys[..., :after, :], values[..., :after, :]
        return self.keys, self.values

    def take(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Replace the keys and values by these, [B, K, T, H] each, stacked along the batch."""
        rows, longest = sum(part.shape[0] for part in keys), max(part.shape[-2] for part in keys)
        self._buffers = tuple(  # type: ignore[assignment]
            # zeros: what is masked is multiplied by a weight of zero, and zero times an uninitialised NaN is NaN
            parts[0].new_zeros((rows, parts[0].shape[1], longest + _ROOM, parts[0].shape[-1]))
            for parts in (keys, values)
        )
        assert self._buffers is not None
        for buffer, parts in zip(self._buffers, (keys, values), strict=True):
            start = 0
            for part in parts:
                buffer[start : start + part.shape[0], :, : part.shape[-2]] = part
                start += part.shape[0]
        self.keys, self.values = (buffer[..., :longest, :] for buffer in self._buffers)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these indices, which may repeat."""
        super().batch_select_indices(indices)
        self._buffers = None  # they hold all rows; the next update makes new ones of the rows that are left


def with_room(cache: Any) -> Any:
    """Replace the plain layers of a cache by :class:`RoomyLayer`, in place; other kinds of layers stay."""
    layers = getattr(cache, "layers", [])
    for place, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            roomy = RoomyLayer()
            roomy.__dict__.update(layer.__dict__)
            layers[place] = roomy
    return cache


def joined(caches: Sequence[Any]) -> Any:
    """Join the rows of several caches into one, shorter ones padded with zeros; all layers must be roomy ones."""
    whole = copy.copy(caches[0])
    whole.layers = []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        layer = copy.copy(layers[0])
        layer.take([one.keys for one in layers], [one.values for one in layers])
        whole.layers.append(layer)
    return whole
