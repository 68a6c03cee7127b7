"""Scoring: log-likelihoods and greedy continuations of token ids under any causal LM of transformers.

The forward passes behind :mod:`atp.evaluate`: right-padded sequences, choices that share the reading of their prompt,
and decoding with the KV cache. It sits between :mod:`atp.data.encoding` and the metrics. It knows nothing of text,
tasks or metrics. Inputs are sorted by length into batches; results come in the order of the inputs.

Shape suffixes: B batch, T tokens, V vocabulary, C choices of a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from atp.data.encoding import IGNORED, Choices, Example, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    for batch in _batches([len(example.input_ids) for example in examples], batch_size):
        arrays = pad([examples[i] for i in batch], pad_id)
        tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        labels_BT = tensors.pop("labels")[:, 1:]
        logits_BTV = model(**tensors, use_cache=False).logits[:, :-1]
        learnt_BT = labels_BT != IGNORED
        nats = functional.cross_entropy(logits_BTV[learnt_BT].float(), labels_BT[learnt_BT], reduction="none")
        sums_B = torch.zeros(len(batch), dtype=torch.float64, device=device)
        sums_B.index_add_(0, learnt_BT.nonzero()[:, 0], nats.double())
        for i, total in zip(batch, sums_B.tolist(), strict=True):
            found[i] = total
    return found


def choice_nats(
    model: PreTrainedModel, items: Sequence[Choices], *, batch_size: int, pad_id: int, device: torch.device
) -> list[list[list[float]]]:
    """Return the negative log-likelihood of each token of each item's choices, in nats.

    A prompt is read once, and its cache repeated for its choices. At most ``batch_size`` choices are read at a time, or
    those of one item.
    """
    found: list[list[list[float]]] = [[] for _ in items]
    sizes = [len(item.prompt) + max(map(len, item.continuations)) for item in items]
    for batch in _batches(sizes, batch_size, [len(item.continuations) for item in items]):
        chosen = [items[i] for i in batch]
        state = _read(model, [item.prompt for item in chosen], pad_id, device)
        continuations = [ids for item in chosen for ids in item.continuations]
        owners_C = torch.tensor([row for row, item in enumerate(chosen) for _ in item.continuations], device=device)
        ids_CT, mask_CT = _right_padded(continuations, pad_id, device)
        logits_CTV = state.logits_BTV[owners_C, -1:]
        if ids_CT.shape[1] > 1:
            onward = _read_on(model, state.select(owners_C), ids_CT[:, :-1], mask_CT[:, :-1])
            logits_CTV = torch.cat([logits_CTV, onward.logits_BTV], dim=1)
        nats_CT = functional.cross_entropy(logits_CTV.transpose(1, 2).float(), ids_CT, reduction="none").tolist()
        rows = iter(zip(continuations, nats_CT, strict=True))
        for i, item in zip(batch, chosen, strict=True):
            found[i] = [nats[: len(ids)] for ids, nats in (next(rows) for _ in item.continuations)]
    return found


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
    stops_S = torch.tensor(list(stops), device=device, dtype=torch.long)
    for batch in _batches([len(prompt) for prompt in prompts], batch_size):
        state = _read(model, [prompts[i] for i in batch], pad_id, device)
        stopped_B = torch.zeros(len(batch), dtype=torch.bool, device=device)
        steps: list[Tensor] = []
        while True:
            next_B = state.logits_BTV[:, -1].argmax(-1)
            steps.append(next_B)
            stopped_B |= torch.isin(next_B, stops_S)
            if len(steps) == max_new_tokens or bool(stopped_B.all()):
                break
            state = _read_on(model, state, next_B[:, None], torch.ones_like(next_B[:, None]))
        for i, ids in zip(batch, torch.stack(steps, dim=1).tolist(), strict=True):
            found[i] = ids[: next((at for at, token in enumerate(ids) if token in stops), len(ids))]
    return found


@dataclass(frozen=True)
class _State:
    """A batch read so far.

    Attributes:
        logits_BTV: Of the latest tokens read, at least of the last.
        cache: Keys and values.
        mask_BT: 1 for tokens, 0 for padding, over everything in the cache.
        lengths_B: Tokens read, without padding: the position of the next.
    """

    logits_BTV: Tensor
    cache: Any
    mask_BT: Tensor
    lengths_B: Tensor

    def select(self, rows_C: Tensor) -> _State:
        """Return the state with these rows, which may repeat; the cache is changed in place."""
        self.cache.batch_select_indices(rows_C)
        return _State(self.logits_BTV[rows_C], self.cache, self.mask_BT[rows_C], self.lengths_B[rows_C])


def _read(model: PreTrainedModel, prompts: Sequence[list[int]], pad_id: int, device: torch.device) -> _State:
    """Read prompts, padded on the left, so that all of them end at the same place."""
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[pad_id] * (longest - len(ids)) + ids for ids in prompts], device=device)
    lengths_B = torch.tensor([len(ids) for ids in prompts], device=device)
    mask_BT = (torch.arange(longest, device=device) >= (longest - lengths_B)[:, None]).long()
    options: dict[str, Any] = {"logits_to_keep": 1, "position_ids": (mask_BT.cumsum(-1) - 1).clamp(min=0)}
    out = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=True, **_accepted(model, options))
    return _State(out.logits[:, -1:], out.past_key_values, mask_BT, lengths_B)


def _read_on(model: PreTrainedModel, state: _State, ids_BT: Tensor, mask_BT: Tensor) -> _State:
    """Read further tokens; padding, if any, is on the right."""
    mask = torch.cat([state.mask_BT, mask_BT], dim=1)
    positions_BT = state.lengths_B[:, None] + torch.arange(ids_BT.shape[1], device=ids_BT.device)
    options = _accepted(model, {"position_ids": positions_BT})
    out = model(input_ids=ids_BT, attention_mask=mask, past_key_values=state.cache, use_cache=True, **options)
    return _State(out.logits, out.past_key_values, mask, state.lengths_B + mask_BT.sum(-1))


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


def _batches(lengths: Sequence[int], batch_size: int, rows: Sequence[int] | None = None) -> Iterator[list[int]]:
    """Yield positions in batches of similar rows and length, longest first, so that a lack of memory shows at once.

    An item takes one row unless ``rows`` says otherwise; a batch has at most ``batch_size`` rows, or a single item.
    """
    rows = [1] * len(lengths) if rows is None else rows
    batch: list[int] = []
    taken = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-rows[i], -lengths[i])):
        if batch and taken + rows[i] > batch_size:
            yield batch
            batch, taken = [], 0
        batch.append(i)
        taken += rows[i]
    if batch:
        yield batch
