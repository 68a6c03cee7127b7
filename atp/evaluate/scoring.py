"""Scoring: log-likelihoods and greedy continuations of token ids under any causal LM of transformers.

It scores whole sequences, the choices of an item (their prompt is read once, and they follow it in one row), and
decodes with the KV cache, all through :mod:`atp.evaluate.reading`. It sits between :mod:`atp.data.encoding` and
the metrics. It knows nothing of text, tasks or metrics. Inputs are sorted by length into batches; results come in the
order of the inputs.

Shape suffixes: B batch, S steps, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from atp.data.encoding import IGNORED, Choices, Example, pad
from atp.evaluate.reading import Reader, State, batches, right_padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_PACK = (
    256  # tokens of choices that one row holds, or as many as the prompt has; more would mostly compute masked scores
)


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
    reader = Reader(model, pad_id, device)
    found = [0.0] * len(examples)
    given = [example.input_ids[: example.context].tolist() for example in examples]
    for group, shared in reader.groups(given):
        prefix = reader.prefix(given[group[0]][:shared])
        for batch in batches([len(examples[i].input_ids) for i in group], batch_size, reader.tokens_at_once):
            chosen = [group[place] for place in batch]
            totals = _sequence_batch(reader, [examples[i] for i in chosen], prefix, shared)
            for i, total in zip(chosen, totals, strict=True):
                found[i] = total
    return found


def _sequence_batch(reader: Reader, examples: Sequence[Example], prefix: State | None, shared: int) -> list[float]:
    arrays = pad(examples, reader.pad_id)
    tensors = {name: torch.from_numpy(array).to(reader.device) for name, array in arrays.items()}
    labels_BT = tensors.pop("labels")[:, shared + 1 :]
    if prefix is None:
        logits_BTV = reader.model(**tensors, use_cache=False).logits[:, :-1]
    else:
        rest = {name: tensor[:, shared:] for name, tensor in tensors.items()}
        state = prefix.repeated(len(examples))
        logits_BTV = reader.on(state, rest["input_ids"], rest["attention_mask"])[0][:, :-1]
    learnt_BT = labels_BT != IGNORED
    nats = functional.cross_entropy(logits_BTV[learnt_BT].float(), labels_BT[learnt_BT], reduction="none")
    sums_B = torch.zeros(len(examples), dtype=torch.float64, device=reader.device)
    sums_B.index_add_(0, learnt_BT.nonzero()[:, 0], nats.double())
    return sums_B.tolist()


def choice_nats(
    model: PreTrainedModel, items: Sequence[Choices], *, batch_size: int, pad_id: int, device: torch.device
) -> list[list[list[float]]]:
    """Return the negative log-likelihood of each token of each item's choices, in nats.

    A prompt is read once, and then its choices, as one row after it where the model's attention allows that. At most
    ``batch_size`` prompts or choices are read at a time, those of like length together.
    """
    reader = Reader(model, pad_id, device)
    found: list[list[list[float]]] = [[] for _ in items]
    for group, shared in reader.groups([item.prompt for item in items]):
        prefix = reader.prefix(items[group[0]].prompt[:shared])
        lengths = [len(items[i].prompt) for i in group]
        after = [sum(map(len, items[i].continuations)) for i in group]
        for batch in batches(lengths, batch_size, reader.tokens_at_once, after):
            chosen = [group[place] for place in batch]
            nats = _choice_batch(reader, [items[i] for i in chosen], prefix, batch_size)
            for i, of_item in zip(chosen, nats, strict=True):
                found[i] = of_item
    return found


def _choice_batch(
    reader: Reader, items: Sequence[Choices], prefix: State | None, batch_size: int
) -> list[list[list[float]]]:
    # The prompt's last logits score every choice's first token; only what follows that token has to be read. Choices of
    # one token need no further pass, and the others read all their tokens but the last.
    first_BV, state = reader.prompts([item.prompt for item in items], prefix)
    owners = [owner for owner, item in enumerate(items) for _ in item.continuations]
    firsts = [ids[0] if ids else 0 for item in items for ids in item.continuations]
    first_nats = iter((-first_BV.float().log_softmax(-1)[owners, firsts]).tolist())
    found = [[[next(first_nats)][: len(ids)] for ids in item.continuations] for item in items]
    packs = list(_packs(items, batch_size if reader.packs else 1))
    most = max((len(choices) for _, choices in packs), default=1)
    lengths = [sum(len(items[owner].continuations[choice]) - 1 for choice in choices) for owner, choices in packs]
    for batch in batches(lengths, max(1, batch_size // most), reader.tokens_at_once):
        rows = sorted(packs[place] for place in batch)
        of_rows = [owner for owner, _ in rows]
        whole = len(rows) == len(packs) and of_rows == list(range(len(items)))
        # Reading appends to the cache, so rows get a copy unless this batch is all of them and uses the state up.
        at = state if whole else state.select(torch.tensor(of_rows, device=reader.device))
        for (owner, choices), nats in zip(rows, _pack_nats(reader, at, items, rows), strict=True):
            values = iter(nats)
            for choice in choices:
                found[owner][choice].extend(next(values) for _ in items[owner].continuations[choice][1:])
    return found


def _packs(items: Sequence[Choices], most: int) -> Iterator[tuple[int, list[int]]]:
    """Yield an item and those of its choices that are read in one row: at most ``most``, of two tokens or more."""
    room = max(_PACK, *(len(item.prompt) for item in items))
    for owner, item in enumerate(items):
        pack: list[int] = []
        used = 0
        for choice, ids in enumerate(item.continuations):
            if len(ids) < 2:
                continue
            if pack and (len(pack) == most or used + len(ids) - 1 > room):
                yield owner, pack
                pack, used = [], 0
            pack.append(choice)
            used += len(ids) - 1
        if pack:
            yield owner, pack


def _pack_nats(
    reader: Reader, state: State, items: Sequence[Choices], rows: Sequence[tuple[int, list[int]]]
) -> list[list[float]]:
    """Return the nats of each row's choices, without their first tokens, in order; those of padding follow."""
    parts = [[items[owner].continuations[choice] for choice in choices] for owner, choices in rows]
    logits_BTV = reader.apart(state, [[ids[:-1] for ids in choices] for choices in parts])
    next_BT, _ = right_padded([[token for ids in choices for token in ids[1:]] for choices in parts], 0, reader.device)
    # Flat, as the softmax over a dimension that is not the last takes ten times as long on a CPU.
    nats = functional.cross_entropy(logits_BTV.flatten(0, 1).float(), next_BT.flatten(), reduction="none")
    return nats.view(next_BT.shape).tolist()


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
    reader = Reader(model, pad_id, device)
    found: list[list[int]] = [[] for _ in prompts]
    for group, shared in reader.groups(prompts):
        prefix = reader.prefix(prompts[group[0]][:shared])
        for batch in batches([len(prompts[i]) for i in group], batch_size):
            chosen = [group[place] for place in batch]
            rows = _greedy_batch(reader, [prompts[i] for i in chosen], prefix, stops, max_new_tokens)
            for i, ids in zip(chosen, rows, strict=True):
                found[i] = ids
    return found


def _greedy_batch(
    reader: Reader, prompts: Sequence[list[int]], prefix: State | None, stops: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    stops_S = torch.tensor(list(stops), device=reader.device, dtype=torch.long)
    logits_BV, state = reader.prompts_in_portions(prompts, prefix)
    written_BS = torch.zeros((len(prompts), max_new_tokens), dtype=torch.long, device=reader.device)
    rows_B = torch.arange(len(prompts), device=reader.device)
    going_B = torch.ones_like(rows_B, dtype=torch.bool)
    step = 0
    while True:
        next_B = logits_BV.argmax(-1)
        written_BS[rows_B, step] = next_B
        step += 1
        going_B &= ~torch.isin(next_B, stops_S)
        going = int(going_B.sum())
        if step == max_new_tokens or not going:
            break
        if going <= len(rows_B) // 2:  # what is kept is copied: not at every text that ends
            kept = going_B.nonzero()[:, 0]
            state, next_B, rows_B, going_B = state.select(kept), next_B[kept], rows_B[kept], going_B[kept]
        logits_BV, state = reader.step(state, next_B)
    texts = written_BS[:, :step].tolist()
    return [ids[: next((at for at, token in enumerate(ids) if token in stops), len(ids))] for ids in texts]
