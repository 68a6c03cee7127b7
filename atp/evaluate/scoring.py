"""Scoring: log-likelihoods and greedy continuations of token ids under any causal LM of transformers.

The forward passes behind :mod:`atp.evaluate`: right-padded sequences, choices that share the reading of their prompt,
and decoding with the KV cache. What many sequences begin with, such as a prompt's system part or a task's template, is
read once, and its keys and values are repeated for all of them. It sits between :mod:`atp.data.encoding` and the
metrics. It knows nothing of text, tasks or metrics. Inputs are sorted by length into batches; results come in the order
of the inputs.

Shape suffixes: B batch, T tokens, V vocabulary, C choices of a batch.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from atp.data.encoding import IGNORED, Choices, Example
from atp.data.padding import pad
from atp.evaluate.cache import with_room

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_LEAST_SHARED = 16
_FEWEST_SHARING = 4
_SHARE_WORTH_READING_ONCE = 0.2  # of the mean length; below, masks cost more than reading it again


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation and inference mode; every module's own mode is restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def sequence_nats(
    model: PreTrainedModel, examples: Sequence[Example], *, batch_size: int, pad_id: int, device: torch.device
) -> list[float]:
    """Return each example's negative log-likelihood over its learnt tokens, in nats."""
    found = [0.0] * len(examples)
    given = [example.input_ids[: example.context].tolist() for example in examples]
    for group, shared in _groups(model, given):
        prefix = _prefix(model, given[group[0]][:shared], device)
        for batch in _batches([len(examples[i].input_ids) for i in group], batch_size):
            chosen = [group[place] for place in batch]
            totals = _sequence_batch(model, [examples[i] for i in chosen], prefix, shared, pad_id, device)
            for i, total in zip(chosen, totals, strict=True):
                found[i] = total
    return found


def _sequence_batch(
    model: PreTrainedModel,
    examples: Sequence[Example],
    prefix: _State | None,
    shared: int,
    pad_id: int,
    device: torch.device,
) -> list[float]:
    arrays = pad(examples, pad_id)
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    labels_BT = tensors.pop("labels")[:, shared + 1 :]
    if prefix is None:
        logits_BTV = model(**tensors, use_cache=False).logits[:, :-1]
    else:
        rest = {name: tensor[:, shared:] for name, tensor in tensors.items()}
        state = prefix.repeated(len(examples))
        logits_BTV = _read_on(model, state, rest["input_ids"], rest["attention_mask"])[0][:, :-1]
    learnt_BT = labels_BT != IGNORED
    nats = functional.cross_entropy(logits_BTV[learnt_BT].float(), labels_BT[learnt_BT], reduction="none")
    sums_B = torch.zeros(len(examples), dtype=torch.float64, device=device)
    sums_B.index_add_(0, learnt_BT.nonzero()[:, 0], nats.double())
    return sums_B.tolist()


def choice_nats(
    model: PreTrainedModel, items: Sequence[Choices], *, batch_size: int, pad_id: int, device: torch.device
) -> list[list[list[float]]]:
    """Return the negative log-likelihood of each token of each item's choices, in nats.

    A prompt is read once, and its cache repeated for its choices. At most ``batch_size`` prompts or choices are read at
    a time, those of like length together.
    """
    found: list[list[list[float]]] = [[] for _ in items]
    for group, shared in _groups(model, [item.prompt for item in items]):
        prefix = _prefix(model, items[group[0]].prompt[:shared], device)
        for batch in _batches([len(items[i].prompt) for i in group], batch_size):
            chosen = [group[place] for place in batch]
            nats = _choice_batch(model, [items[i] for i in chosen], prefix, batch_size, pad_id, device)
            for i, of_item in zip(chosen, nats, strict=True):
                found[i] = of_item
    return found


def _choice_batch(
    model: PreTrainedModel,
    items: Sequence[Choices],
    prefix: _State | None,
    batch_size: int,
    pad_id: int,
    device: torch.device,
) -> list[list[list[float]]]:
    first_BV, state = _read(model, [item.prompt for item in items], pad_id, device, prefix)
    logs_BV = first_BV.float().log_softmax(-1)
    rows = [(owner, ids) for owner, item in enumerate(items) for ids in item.continuations]
    owners_R = torch.tensor([owner for owner, _ in rows], device=device)
    firsts_R = torch.tensor([ids[0] if ids else 0 for _, ids in rows], device=device)
    first_nats = (-logs_BV[owners_R, firsts_R]).tolist()
    found = [[nats] if ids else [] for nats, (_, ids) in zip(first_nats, rows, strict=True)]
    longer = [row for row, (_, ids) in enumerate(rows) if len(ids) > 1]
    for batch in _batches([len(rows[row][1]) for row in longer], batch_size):
        chosen = [longer[place] for place in batch]
        ids_CT, mask_CT = _right_padded([rows[row][1] for row in chosen], pad_id, device)
        logits_CTV, _ = _read_on(model, state.select(owners_R[chosen]), ids_CT[:, :-1], mask_CT[:, :-1])
        next_CT = ids_CT[:, 1:]
        # Flat, as the softmax over a dimension that is not the last takes ten times as long on a CPU.
        nats = functional.cross_entropy(logits_CTV.flatten(0, 1).float(), next_CT.flatten(), reduction="none")
        for row, values in zip(chosen, nats.view(next_CT.shape).tolist(), strict=True):
            found[row].extend(values[: len(rows[row][1]) - 1])
    in_order = iter(found)
    return [[next(in_order) for _ in item.continuations] for item in items]


def greedy(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    stops: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    pad_id: int,
    device: torch.device,
) -> list[list[int]]:
    """Return the most likely continuation of each prompt, token by token, up to a stop (left out) or the limit."""
    found: list[list[int]] = [[] for _ in prompts]
    for group, shared in _groups(model, prompts):
        prefix = _prefix(model, prompts[group[0]][:shared], device)
        for batch in _batches([len(prompts[i]) for i in group], batch_size):
            chosen = [group[place] for place in batch]
            rows = _greedy_batch(model, [prompts[i] for i in chosen], prefix, stops, max_new_tokens, pad_id, device)
            for i, ids in zip(chosen, rows, strict=True):
                found[i] = ids
    return found


def _greedy_batch(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    prefix: _State | None,
    stops: Sequence[int],
    max_new_tokens: int,
    pad_id: int,
    device: torch.device,
) -> list[list[int]]:
    stops_S = torch.tensor(list(stops), device=device, dtype=torch.long)
    logits_BV, state = _read(model, prompts, pad_id, device, prefix)
    stopped_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    steps: list[Tensor] = []
    while True:
        next_B = logits_BV.argmax(-1)
        steps.append(next_B)
        stopped_B |= torch.isin(next_B, stops_S)
        if len(steps) == max_new_tokens or bool(stopped_B.all()):
            break
        logits_B1V, state = _read_on(model, state, next_B[:, None], torch.ones_like(next_B[:, None]))
        logits_BV = logits_B1V[:, -1]
    rows = torch.stack(steps, dim=1).tolist()
    return [ids[: next((at for at, token in enumerate(ids) if token in stops), len(ids))] for ids in rows]


@dataclass(frozen=True)
class _State:
    """A batch read so far.

    Attributes:
        cache: Keys and values.
        mask_BT: 1 for tokens, 0 for padding, over everything in the cache.
        lengths_B: Tokens read, without padding: the position of the next.
    """

    cache: Any
    mask_BT: Tensor
    lengths_B: Tensor

    def select(self, rows_C: Tensor) -> _State:
        """Return a state with these rows, which may repeat, in a cache of its own."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.batch_select_indices(rows_C)
        return _State(cache, self.mask_BT[rows_C], self.lengths_B[rows_C])

    def repeated(self, times: int) -> _State:
        """Return a single row's state so many times."""
        return self.select(torch.zeros(times, dtype=torch.long, device=self.mask_BT.device))


def _groups(model: PreTrainedModel, sequences: Sequence[list[int]]) -> list[tuple[list[int], int]]:
    """Group sequences by how they begin; each group with how many tokens all of it share, short of a whole sequence.

    Sequences that begin like few others, or share little, make one group that shares nothing; so do all for a model
    with a sliding window, which padding after a shared beginning would stretch.
    """
    if _has_window(model):
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
        first, last = (pick(sequences[i] for i in members) for pick in (min, max))
        most = min(len(sequences[i]) for i in members) - 1
        same = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), most)
        if min(same, most) * len(members) < _SHARE_WORTH_READING_ONCE * sum(len(sequences[i]) for i in members):
            alone.extend(members)
        else:
            groups.append((members, min(same, most)))
    return [*groups, *([(sorted(alone), 0)] if alone else [])]


def _prefix(model: PreTrainedModel, ids: list[int], device: torch.device) -> _State | None:
    """Read what a group of sequences begins with."""
    if not ids:
        return None
    ids_BT = torch.tensor([ids], device=device)
    return _read_on(model, None, ids_BT, torch.ones_like(ids_BT), keep=1)[1]


def _read(
    model: PreTrainedModel, prompts: Sequence[list[int]], pad_id: int, device: torch.device, prefix: _State | None
) -> tuple[Tensor, _State]:
    """Read prompts, what they share from its state; the logits [B, V] of what follows each."""
    shared = 0 if prefix is None else int(prefix.lengths_B[0])
    state = None if prefix is None else prefix.repeated(len(prompts))
    windowed = _has_window(model)
    ids_BT, mask_BT = (_left_padded if windowed else _right_padded)([ids[shared:] for ids in prompts], pad_id, device)
    last_B = torch.full_like(mask_BT[:, 0], ids_BT.shape[1] - 1) if windowed else mask_BT.sum(-1) - 1
    kept_P, places_B = torch.unique(last_B, return_inverse=True)
    logits_BPV, state = _read_on(model, state, ids_BT, mask_BT, keep=kept_P)
    if logits_BPV.shape[1] != len(kept_P):  # a model that gives all
        logits_BPV = logits_BPV[:, kept_P]
    return logits_BPV[torch.arange(len(prompts), device=device), places_B], state


def _read_on(
    model: PreTrainedModel, state: _State | None, ids_BT: Tensor, mask_BT: Tensor, keep: int | Tensor = 0
) -> tuple[Tensor, _State]:
    """Read further tokens, padded on either side; the logits of the positions ``keep``, of the last one or (0) of all.

    The first reading masks nothing: what is padded on the right is seen by nothing before it, and later readings mask
    it. Attention that is causal and nothing else is the fastest there is. A model with a sliding window, which counts
    padding between tokens, is padded on the left and given the mask.
    """
    options: dict[str, Any] = {"logits_to_keep": keep}
    lengths_B = mask_BT.sum(-1)
    if state is None and not _has_window(model):
        every_BT = torch.ones_like(mask_BT)
        out = model(input_ids=ids_BT, attention_mask=every_BT, use_cache=True, **_accepted(model, options))
        return out.logits, _State(with_room(out.past_key_values), mask_BT, lengths_B)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    if state is not None:
        mask_BT = torch.cat([state.mask_BT, mask_BT], dim=1)
        positions_BT = positions_BT + state.lengths_B[:, None]
        lengths_B = lengths_B + state.lengths_B
        options["past_key_values"] = state.cache
    options["position_ids"] = positions_BT
    out = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=True, **_accepted(model, options))
    return out.logits, _State(out.past_key_values, mask_BT, lengths_B)


def _has_window(model: PreTrainedModel) -> bool:
    return getattr(model.config, "sliding_window", None) is not None


def _accepted(model: PreTrainedModel, options: dict[str, Any]) -> dict[str, Any]:
    """Leave out the arguments that the model's forward does not name; a PEFT model is asked for its base."""
    outer: Any = model
    base = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
    named = inspect.signature(base.forward).parameters
    return {name: value for name, value in options.items() if name in named}


def _right_padded(rows: Sequence[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids_BT = torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids in rows], device=device)
    lengths_B = torch.tensor([len(ids) for ids in rows], device=device)
    return ids_BT, (torch.arange(longest, device=device) < lengths_B[:, None]).long()


def _left_padded(rows: Sequence[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(tensor.flip(1) for tensor in _right_padded([ids[::-1] for ids in rows], pad_id, device))  # type: ignore[return-value]


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield positions in batches of similar length, longest first, so that a lack of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
