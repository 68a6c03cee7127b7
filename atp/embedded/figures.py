"""What the embedded base can do, in figures: held-out perplexity per domain and accuracy per choice task.

What it is: the small evaluator behind `pretraining.json`; small on purpose, so that the figures which ship with the
weights do not depend on the package's evaluation.
Where it sits: corpus, tokenizer -> figures -> pretrain, and the test that compares weights with their figures.
What it does NOT know: training, files, pruning.

Shapes: B batch, T tokens, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atp.embedded.drawing import Record

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """Token ids of one text, where the part that is scored begins, and where what follows the prompt begins."""

    ids: list[int]
    scored_from: int
    answer_from: int


def continuation(record: Record) -> str:
    """Return what follows the prompt: the completion, or the right choice."""
    return record["completion"] if "completion" in record else record["choices"][record["label"]]


def encode(record: Record, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Encode a whole record with `<s>` and `</s>`; all tokens after `<s>` are scored, as in pretraining."""
    if "text" in record:
        ids = [*tokenizer(record["text"])["input_ids"], tokenizer.eos_token_id]
        return Encoded(ids, 1, len(ids))
    prompt = tokenizer(record["prompt"])["input_ids"]
    answer = tokenizer(continuation(record), add_special_tokens=False)["input_ids"]
    return Encoded([*prompt, *answer, tokenizer.eos_token_id], 1, len(prompt))


def padded(batch: Sequence[Encoded], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad on the right and return ids_BT, mask_BT and labels_BT; positions that are not scored hold -100."""
    width = max(len(item.ids) for item in batch)
    ids_BT = torch.full((len(batch), width), pad_id, dtype=torch.long)
    labels_BT = torch.full((len(batch), width), IGNORED, dtype=torch.long)
    for row, item in enumerate(batch):
        length = len(item.ids)
        ids_BT[row, :length] = torch.tensor(item.ids)
        labels_BT[row, item.scored_from : length] = ids_BT[row, item.scored_from : length]
    lengths_B = torch.tensor([len(item.ids) for item in batch])
    mask_BT = (torch.arange(width)[None, :] < lengths_B[:, None]).long()
    return ids_BT, mask_BT, labels_BT


def bucketed(items: Sequence[Encoded], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the items' positions in batches of like length, none above `batch_tokens` with its padding."""
    order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
    batch: list[int] = []
    for position in order:
        if batch and len(items[position].ids) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel, items: Sequence[Encoded], pad_id: int, batch_tokens: int = 4096
) -> list[tuple[float, int]]:
    """Return the sum of log-likelihoods (nats) of each item's scored tokens and how many they are."""
    was_training = model.training
    model.eval()
    found: list[tuple[float, int]] = [(0.0, 0)] * len(items)
    for batch in bucketed(items, batch_tokens):
        ids_BT, mask_BT, labels_BT = padded([items[i] for i in batch], pad_id)
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1].float()
        wanted_BT = labels_BT[:, 1:]
        loss_BT = torch.nn.functional.cross_entropy(
            logits_BTV.transpose(1, 2), wanted_BT, ignore_index=IGNORED, reduction="none"
        )
        counts_B = (wanted_BT != IGNORED).sum(1).tolist()
        for i, total, count in zip(batch, loss_BT.sum(1).tolist(), counts_B, strict=True):
            found[i] = (-total, count)
    model.train(was_training)
    return found


def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Iterable[Record]) -> float:
    """Return exp of the mean loss over all tokens of the records, `</s>` included and `<s>` not."""
    items = [encode(record, tokenizer) for record in records]
    scores = log_likelihoods(model, items, tokenizer.pad_token_id)
    return math.exp(-sum(total for total, _ in scores) / sum(count for _, count in scores))


def accuracies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Iterable[Record]
) -> dict[str, float]:
    """Return per choice task the share (0-1) of records whose right choice has the best log-likelihood per token."""
    items: list[Encoded] = []
    chosen = [record for record in records if "choices" in record]
    for record in chosen:
        prompt = tokenizer(record["prompt"])["input_ids"]
        for choice in record["choices"]:
            ids = [*prompt, *tokenizer(choice, add_special_tokens=False)["input_ids"]]
            items.append(Encoded(ids, len(prompt), len(prompt)))
    means = iter([total / count for total, count in log_likelihoods(model, items, tokenizer.pad_token_id)])
    hits: dict[str, list[bool]] = {}
    for record in chosen:
        scores = [next(means) for _ in record["choices"]]
        hits.setdefault(record["task"], []).append(max(range(len(scores)), key=scores.__getitem__) == record["label"])
    return {task: sum(right) / len(right) for task, right in hits.items()}
