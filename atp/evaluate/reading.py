"""Reading token ids in batches: the state after what was read, and forward passes that continue from it.

Used by :mod:`atp.evaluate.scoring`. A beginning that many sequences share, such as a prompt's system part or a task's
template, is read once, and its keys and values are repeated for all of them. Several continuations of one beginning
are read as one row in which none sees another. It knows nothing of scores, text or tasks.

Shape suffixes: B batch, C rows of another batch, P places, Q tokens that ask, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache, DynamicLayer

from atp.evaluate.key_values import joined, with_room

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_LEAST_SHARED = 16
_FEWEST_SHARING = 4
_SHARE_WORTH_READING_ONCE = 0.2  # of the mean length; below, masks cost more than reading it again
_TOKENS_AT_ONCE_ON_CPU = 1024  # more in one pass only leave the processor's caches
_NEAR = 32  # tokens of padding that pay where what is read afterwards then needs less
_ADD_ANY_MASK = ("sdpa", "eager")


@dataclass(frozen=True)
class State:
    """A batch read so far.

    Attributes:
        cache: Keys and values.
        mask_BT: 1 for tokens, 0 for padding, over everything in the cache.
        lengths_B: Tokens read, without padding: the position of the next.
    """

    cache: Any
    mask_BT: Tensor
    lengths_B: Tensor

    def select(self, rows_C: Tensor) -> State:
        """Return a state with these rows, which may repeat, in a cache of its own."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.batch_select_indices(rows_C)
        return State(cache, self.mask_BT[rows_C], self.lengths_B[rows_C])

    def repeated(self, times: int) -> State:
        """Return a single row's state so many times."""
        return self.select(torch.zeros(times, dtype=torch.long, device=self.mask_BT.device))


class Reader:
    """A model that reads tokens, padded as its attention needs it.

    Attributes:
        model: Any causal LM of transformers.
        pad_id: What fills the rest of a row.
        device: Where the model is.
        windowed: Whether its attention reaches back only so far. Such a model counts padding between tokens: it is
            padded on the left, and shares no beginnings.
        packs: Whether its attention follows any mask, so that continuations of one beginning fit into one row.
        tokens_at_once: How many tokens to read in one pass; None for as many as there are.
    """

    def __init__(self, model: PreTrainedModel, pad_id: int, device: torch.device) -> None:
        self.model, self.pad_id, self.device = model, pad_id, device
        outer: Any = model
        base = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
        self._named = frozenset(inspect.signature(base.forward).parameters)
        self.windowed = getattr(model.config, "sliding_window", None) is not None
        self.packs = not self.windowed and "position_ids" in self._named and _follows_any_mask(model.config)
        self.tokens_at_once = _TOKENS_AT_ONCE_ON_CPU if device.type == "cpu" else None

    def prefix(self, ids: list[int]) -> State | None:
        """Read what a group of sequences begins with."""
        if not ids:
            return None
        ids_BT = torch.tensor([ids], device=self.device)
        return self.on(None, ids_BT, torch.ones_like(ids_BT), keep=1)[1]

    def prompts(self, prompts: Sequence[list[int]], prefix: State | None) -> tuple[Tensor, State]:
        """Read prompts after the state of their shared beginning; return the logits [B, V] of the next token."""
        shared = 0 if prefix is None else int(prefix.lengths_B[0])
        state = None if prefix is None else prefix.repeated(len(prompts))
        pad = left_padded if self.windowed else right_padded
        ids_BT, mask_BT = pad([ids[shared:] for ids in prompts], self.pad_id, self.device)
        last_B = torch.full_like(mask_BT[:, 0], ids_BT.shape[1] - 1) if self.windowed else mask_BT.sum(-1) - 1
        kept_P, places_B = torch.unique(last_B, return_inverse=True)
        logits_BPV, state = self.on(state, ids_BT, mask_BT, keep=kept_P)
        if logits_BPV.shape[1] != len(kept_P):  # a model that gives all
            logits_BPV = logits_BPV[:, kept_P]
        return logits_BPV[torch.arange(len(prompts), device=self.device), places_B], state

    def prompts_in_portions(self, prompts: Sequence[list[int]], prefix: State | None) -> tuple[Tensor, State]:
        """Do the same in several passes where one would hold too many tokens; prompts come longest first."""
        most = self.tokens_at_once if self.packs else None
        portions = batches([len(ids) for ids in prompts], len(prompts), most)
        logits, states = zip(
            *(self.prompts([prompts[i] for i in portion], prefix) for portion in portions), strict=True
        )
        if len(states) == 1:
            return logits[0], states[0]
        longest = max(state.mask_BT.shape[1] for state in states)
        masks = [functional.pad(state.mask_BT, (0, longest - state.mask_BT.shape[1])) for state in states]
        lengths_B = torch.cat([state.lengths_B for state in states])
        return torch.cat(logits), State(joined([state.cache for state in states]), torch.cat(masks), lengths_B)

    def step(self, state: State, next_B: Tensor) -> tuple[Tensor, State]:
        """Read one further token of each row; return the logits [B, V] of the next one."""
        logits_B1V, state = self.on(state, next_B[:, None], torch.ones_like(next_B[:, None]))
        return logits_B1V[:, -1], state

    def on(self, state: State | None, ids_BT: Tensor, mask_BT: Tensor, keep: int | Tensor = 0) -> tuple[Tensor, State]:
        """Read further tokens, padded on either side; return logits: of the places ``keep``, the last ones, or (0) all.

        The first reading needs no mask: no token sees the padding to its right, and later readings mask it. Plain
        causal attention is the fastest.
        """
        lengths_B = mask_BT.sum(-1)
        if state is None and not self.windowed:
            out = self._forward(ids_BT, torch.ones_like(mask_BT), logits_to_keep=keep)
            return out.logits, State(with_room(out.past_key_values), mask_BT, lengths_B)
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        options: dict[str, Any] = {"logits_to_keep": keep}
        if state is not None:
            mask_BT = torch.cat([state.mask_BT, mask_BT], dim=1)
            positions_BT = positions_BT + state.lengths_B[:, None]
            lengths_B = lengths_B + state.lengths_B
            options["past_key_values"] = state.cache
        seen = mask_BT
        if state is not None and self.packs and ids_BT.shape[1] == 1 and self.device.type == "cpu":
            # With a mask of its own, transformers reads the keys of a KV head once for all of its queries.
            seen = _bias(mask_BT[:, None, :].bool(), state)
        out = self._forward(ids_BT, seen, position_ids=positions_BT, **options)
        return out.logits, State(out.past_key_values, mask_BT, lengths_B)

    def apart(self, state: State, rows: Sequence[Sequence[list[int]]]) -> Tensor:
        """Read each row's parts as continuations that do not see each other; return the logits [B, T, V] of all.

        The state must not be used afterwards. Only a model that :attr:`packs` reads rows of more than one part.
        """
        ids_BQ, mask_BQ = right_padded([list(chain(*parts)) for parts in rows], self.pad_id, self.device)
        if not self.packs:
            return self.on(state, ids_BQ, mask_BQ)[0]
        numbers = [[number for number, ids in enumerate(parts) for _ in ids] for parts in rows]
        places = [[place for ids in parts for place in range(len(ids))] for parts in rows]
        numbers_BQ, _ = right_padded(numbers, -1, self.device)
        places_BQ, _ = right_padded(places, 0, self.device)
        # Every part continues the same beginning: it has the positions it would have alone, sees the beginning, and of
        # the row's other tokens only its own earlier ones. Padding has number -1 and sees padding, which nobody reads.
        queries = ids_BQ.shape[1]
        earlier_QQ = torch.ones(queries, queries, dtype=torch.bool, device=self.device).tril()
        own_BQQ = (numbers_BQ[:, :, None] == numbers_BQ[:, None, :]) & earlier_QQ
        before_BQT = state.mask_BT.bool()[:, None, :].expand(-1, queries, -1)
        bias = _bias(torch.cat([before_BQT, own_BQQ], dim=-1), state)
        positions_BQ = places_BQ + state.lengths_B[:, None]
        out = self._forward(ids_BQ, bias, position_ids=positions_BQ, past_key_values=state.cache)
        return out.logits

    def _forward(self, ids_BT: Tensor, mask: Tensor, **options: Any) -> Any:
        """Call the model with those of the options that its forward names."""
        named = {name: value for name, value in options.items() if name in self._named}
        return self.model(input_ids=ids_BT, attention_mask=mask, use_cache=True, **named)

    def groups(self, sequences: Sequence[list[int]]) -> list[tuple[list[int], int]]:
        """Group sequences by their first tokens; return each group and how many tokens all its members share.

        The shared part is shorter than every member. Sequences that share little form a group with 0.
        """
        if self.windowed:
            return [(list(range(len(sequences))), 0)] if sequences else []
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, ids in enumerate(sequences):
            alike.setdefault(tuple(ids[:_LEAST_SHARED]) if len(ids) > _LEAST_SHARED else (), []).append(i)
        groups: list[tuple[list[int], int]] = []
        alone: list[int] = []
        for start, members in alike.items():
            if not start or len(members) < _FEWEST_SHARING:
                alone.extend(members)
                continue
            # What the first and the last in order share, all between them share.
            first, last = (pick(sequences[i] for i in members) for pick in (min, max))
            most = min(len(sequences[i]) for i in members) - 1  # one token is left to read, for its logits
            same = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), most)
            if min(same, most) * len(members) < _SHARE_WORTH_READING_ONCE * sum(len(sequences[i]) for i in members):
                alone.extend(members)
            else:
                groups.append((members, min(same, most)))
        return [*groups, *([(sorted(alone), 0)] if alone else [])]


def _follows_any_mask(config: Any) -> bool:
    """Whether attention adds any mask it is given, and knows the place of a token from its position id alone."""
    if getattr(config, "_attn_implementation", None) not in _ADD_ANY_MASK or getattr(config, "alibi", False):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def _bias(seen_BQT: Tensor, state: State) -> Tensor:
    """Return what to add to the attention scores so that each query sees these tokens only."""
    dtype = state.cache.layers[0].keys.dtype
    bias_BQT = torch.zeros(seen_BQT.shape, dtype=dtype, device=seen_BQT.device)
    return bias_BQT.masked_fill_(~seen_BQT, torch.finfo(dtype).min)[:, None]


def right_padded(rows: Sequence[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad rows on the right to one length; return them and a mask that is 1 for the given tokens."""
    longest = max(map(len, rows))
    ids_BT = torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids in rows], device=device)
    lengths_B = torch.tensor([len(ids) for ids in rows], device=device)
    return ids_BT, (torch.arange(longest, device=device) < lengths_B[:, None]).long()


def left_padded(rows: Sequence[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad as :func:`right_padded` does, in front of the tokens."""
    return tuple(tensor.flip(1) for tensor in right_padded([ids[::-1] for ids in rows], pad_id, device))  # type: ignore[return-value]


def batches(
    lengths: Sequence[int], batch_size: int, tokens: int | None = None, after: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Yield positions in batches of similar length, longest first, so that a lack of memory shows at once.

    Args:
        lengths: Tokens of each sequence.
        batch_size: Most sequences of a batch.
        tokens: Most tokens of a batch with its padding, unless one sequence alone has more; None for any number.
        after: Tokens that are read after each sequence: alike too within a batch.
    """
    near = 1 if after is None else _NEAR
    rounded = [-(-length // near) * near for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (-rounded[i], 0 if after is None else -after[i]))
    start = 0
    while start < len(order):
        size = batch_size
        if tokens is not None:
            size = max(1, min(size, tokens // max(1, rounded[order[start]])))
        yield order[start : start + size]
        start += size
