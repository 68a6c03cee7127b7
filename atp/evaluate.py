"""Quality: how well a causal language model does on records, and how much of it pruning has kept.

Perplexity over everything, accuracy and macro-F1 where there are choices, ROUGE where there are completions. It takes
any transformers causal LM, dense or pruned, and comes after training and export in the flow. It knows nothing of
masks, budgets or how a model was made; size, speed and memory are in :mod:`atp.measure`.

Everything is deterministic: greedy decoding, batches sorted by length, no dropout. ATP's authors sample their summaries
and D-Pruner's theirs, which makes ROUGE noisy; figures are therefore comparable within ATP, not with those papers.

Shape suffixes: B batch, T tokens, V vocabulary, C choices of a batch.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score
from torchmetrics.functional.text import rouge_score

from atp.encoding import IGNORED, Choices, Encoder, Example, pad
from atp.records import ChoiceRecord, CompletionRecord, Record, TextRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ROUGE = ("rouge1", "rouge2", "rougeL")
_HIGHER_IS_BETTER = ("accuracy", "macro_f1", *ROUGE)
_LOWER_IS_BETTER = ("perplexity", "bits_per_byte")
_SAMPLE_WORDS = 32


@dataclass(frozen=True)
class Metrics:
    """Quality of one model.

    Attributes:
        values: Metric to value: ``perplexity``, ``bits_per_byte``, and ``<task>/perplexity``, ``<task>/accuracy``,
            ``<task>/macro_f1``, ``<task>/rouge1``, ``<task>/rouge2``, ``<task>/rougeL``. All but the first two kinds
            lie in [0, 1].
        counts: Metric to what it is over: tokens for perplexity, bytes for bits per byte, records for the others.
    """

    values: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def put(self, name: str, value: float, count: int) -> None:
        """Add a metric."""
        self.values[name] = value
        self.counts[name] = count


class Sample(NamedTuple):
    """What a model makes of a prompt, beside what was to come."""

    prompt: str
    generated: str
    reference: str


@dataclass
class _Tally:
    """Negative log-likelihood in nats, and over how much."""

    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0

    def add(self, nats: float, tokens: int, text_bytes: int) -> None:
        self.nats += nats
        self.tokens += tokens
        self.text_bytes += text_bytes

    @property
    def perplexity(self) -> float:
        mean = self.nats / max(1, self.tokens)
        return math.inf if mean > 700 else math.exp(mean)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    max_length: int,
    batch_size: int,
    max_new_tokens: int = 96,
    max_generate: int | None = 64,
    device: torch.device | str | None = None,
) -> Metrics:
    """Score a model on records.

    * ``perplexity``: exp of the mean negative log-likelihood over the learnt tokens of all records: completions, right
      choices and running text, each closed by an end of sequence. Long texts are scored in windows of ``max_length``.
    * ``bits_per_byte``: the same sum in bits, over the UTF-8 bytes of the scored text; comparable across tokenizers.
    * ``accuracy``, ``macro_f1``: the choice of the highest log-likelihood given the prompt, per token of the choice
      (CaseHOLD in D-Pruner's protocol, Zhang et al. 2024, arXiv 2405.06275; labels are the choices' positions).
    * ``rouge*``: F-measure of greedy completions, lower case, without stemming (Lin 2004, W04-1013).

    Args:
        model: A causal LM; its mode is restored afterwards.
        tokenizer: Its tokenizer.
        records: What to score it on.
        max_length: Most tokens of a sequence, prompt and completion.
        batch_size: Sequences of a forward pass.
        max_new_tokens: Most tokens to generate per completion.
        max_generate: Most completions to generate per task, spread evenly over its records; None takes all, 0 none.
        device: Where to put batches; None takes the device of the model.

    Returns:
        The metrics and what they are over.

    Raises:
        ValueError: No records, or ``max_length`` exceeds the model's context.
    """
    if not records:
        raise ValueError("no records to evaluate on: the test split is empty; give data.test_path or more data")
    _check_context(model, max_length)
    place = _device(model, device)
    encoder = Encoder(tokenizer, max_length)
    tallies: dict[str, _Tally] = {record.task: _Tally() for record in records}
    metrics = Metrics()
    with _evaluating(model):
        _score_sequences(model, encoder, records, batch_size, place, tallies)
        picks = _score_choices(model, encoder, records, batch_size, place, tallies)
        texts = _complete(model, encoder, records, batch_size, place, max_new_tokens, max_generate)
    whole = _Tally()
    for tally in tallies.values():
        whole.add(tally.nats, tally.tokens, tally.text_bytes)
    metrics.put("perplexity", whole.perplexity, whole.tokens)
    metrics.put("bits_per_byte", whole.nats / math.log(2) / max(1, whole.text_bytes), whole.text_bytes)
    for task, tally in tallies.items():
        metrics.put(f"{task}/perplexity", tally.perplexity, tally.tokens)
        if task in picks:
            _put_choice_metrics(metrics, task, *picks[task])
        if task in texts:
            _put_rouge(metrics, task, *texts[task])
    if any(encoder.truncated.values()):
        log.info("evaluation cut to max_length=%d: %s", max_length, dict(encoder.truncated))
    return metrics


def recovery(pruned: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
    """Return how much of the reference model's quality the pruned model has, in percent, per metric.

    ATP reports the pruned model's score over the dense model's, averaged over its metrics. Here likewise: pruned over
    reference where higher is better (accuracy, F1, ROUGE), reference over pruned where lower is (perplexity, bits per
    byte). ``mean`` averages one figure per claim: every accuracy, every ROUGE-L, and the overall perplexity. Accuracy is
    not corrected for chance.

    Args:
        pruned: ``Metrics.values`` of the pruned model.
        reference: ``Metrics.values`` of the model to compare with.

    Returns:
        Percent per metric that both have and that is finite and positive where it divides, and ``mean`` if any counts.
    """
    percent: dict[str, float] = {}
    for name, was in reference.items():
        kind = name.rsplit("/", 1)[-1]
        if name not in pruned or kind not in _HIGHER_IS_BETTER + _LOWER_IS_BETTER:
            continue
        above, below = (pruned[name], was) if kind in _HIGHER_IS_BETTER else (was, pruned[name])
        if not (math.isfinite(above) and math.isfinite(below) and below > 0):
            log.warning("no recovery of %s: pruned %s, reference %s", name, pruned[name], was)
            continue
        percent[name] = 100.0 * above / below
    headline = [
        value
        for name, value in percent.items()
        if name == "perplexity" or name.rsplit("/", 1)[-1] in ("accuracy", "rougeL")
    ]
    if headline:
        percent["mean"] = sum(headline) / len(headline)
    return percent


def samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    count: int,
    max_new_tokens: int,
    max_length: int,
    batch_size: int = 8,
    device: torch.device | str | None = None,
) -> list[Sample]:
    """Generate greedily from a few records, spread evenly over them.

    Running text is continued from its first words (half of it at most). Args as in :func:`evaluate`.

    Returns:
        Prompt, generated text and reference of each.
    """
    _check_context(model, max_length)
    chosen = [_prompt_and_reference(record) for record in _spread(records, count)]
    encoder = Encoder(tokenizer, max_length)
    prompts = encoder.prompts([prompt for prompt, _ in chosen], max_new_tokens)
    with _evaluating(model):
        generated = generate(model, encoder, prompts, batch_size, max_new_tokens, _device(model, device))
    return [Sample(prompt, text, reference) for (prompt, reference), text in zip(chosen, generated, strict=True)]


def generate(
    model: PreTrainedModel,
    encoder: Encoder,
    prompts: Sequence[list[int]],
    batch_size: int,
    max_new_tokens: int,
    device: torch.device,
) -> list[str]:
    """Decode greedily from prompts of token ids, batched by length with the KV cache; stop at the end of sequence."""
    stops = _stop_ids(model, encoder)
    texts = [""] * len(prompts)
    for batch in _batches([len(prompt) for prompt in prompts], batch_size):
        state = _prefill(model, [prompts[i] for i in batch], encoder.pad_id, device)
        chosen: list[Tensor] = []
        done_B = torch.zeros(len(batch), dtype=torch.bool, device=device)
        while True:
            next_B = state.logits_BV.argmax(-1)
            chosen.append(next_B)
            done_B |= torch.isin(next_B, stops.to(device))
            if len(chosen) == max_new_tokens or bool(done_B.all()):
                break
            state = _extend(model, state, next_B[:, None], torch.ones_like(next_B[:, None]))
        for i, ids in zip(batch, torch.stack(chosen, dim=1).tolist(), strict=True):
            end = next((at for at, token in enumerate(ids) if token in stops), len(ids))
            texts[i] = str(encoder.tokenizer.decode(ids[:end], skip_special_tokens=True))
    return texts


@dataclass
class _State:
    """A batch that has been read so far: logits after its last token, and what reading on needs."""

    logits_BV: Tensor
    all_logits: Tensor
    cache: Any
    mask_BT: Tensor
    lengths_B: Tensor


def _prefill(model: PreTrainedModel, prompts: Sequence[list[int]], pad_id: int, device: torch.device) -> _State:
    """Read prompts, padded on the left, so that all of them end at the same place."""
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[pad_id] * (longest - len(ids)) + ids for ids in prompts], device=device)
    lengths_B = torch.tensor([len(ids) for ids in prompts], device=device)
    mask_BT = (torch.arange(longest, device=device) >= (longest - lengths_B)[:, None]).long()
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=True, **_options(model, positions_BT, keep=1))
    return _State(out.logits[:, -1], out.logits, out.past_key_values, mask_BT, lengths_B)


def _extend(model: PreTrainedModel, state: _State, ids_BT: Tensor, mask_BT: Tensor) -> _State:
    """Read on from a state; ``mask_BT`` is 0 on padding, which must be at the end."""
    mask = torch.cat([state.mask_BT, mask_BT], dim=1)
    positions = state.lengths_B[:, None] + torch.arange(ids_BT.shape[1], device=ids_BT.device)
    out = model(
        input_ids=ids_BT,
        attention_mask=mask,
        past_key_values=state.cache,
        use_cache=True,
        **_options(model, positions),
    )
    lengths = state.lengths_B + mask_BT.sum(-1)
    return _State(out.logits[:, -1], out.logits, out.past_key_values, mask, lengths)


def _score_sequences(
    model: PreTrainedModel,
    encoder: Encoder,
    records: Sequence[Record],
    batch_size: int,
    device: torch.device,
    tallies: Mapping[str, _Tally],
) -> None:
    plain = [record for record in records if not isinstance(record, ChoiceRecord)]
    examples = [(record.task, one) for record, found in zip(plain, encoder.encode(plain), strict=True) for one in found]
    for batch in _batches([len(example.input_ids) for _, example in examples], batch_size):
        nats_B = _sequence_nats(model, [examples[i][1] for i in batch], encoder.pad_id, device)
        for i, nats in zip(batch, nats_B, strict=True):
            task, example = examples[i]
            tallies[task].add(nats, example.loss_tokens, example.text_bytes)


def _sequence_nats(
    model: PreTrainedModel, examples: Sequence[Example], pad_id: int, device: torch.device
) -> list[float]:
    """Return each sequence's negative log-likelihood over its learnt tokens."""
    tensors = {name: torch.from_numpy(array).to(device) for name, array in pad(examples, pad_id).items()}
    labels_BT = tensors.pop("labels")[:, 1:]
    logits_BTV = model(**tensors, use_cache=False).logits[:, :-1]
    learnt_BT = labels_BT != IGNORED
    nats = functional.cross_entropy(logits_BTV[learnt_BT].float(), labels_BT[learnt_BT], reduction="none")
    rows = learnt_BT.nonzero()[:, 0]
    return torch.zeros(len(examples), dtype=torch.float64, device=device).index_add_(0, rows, nats.double()).tolist()


def _score_choices(
    model: PreTrainedModel,
    encoder: Encoder,
    records: Sequence[Record],
    batch_size: int,
    device: torch.device,
    tallies: Mapping[str, _Tally],
) -> dict[str, tuple[list[int], list[int]]]:
    """Return the picked and the right choices per task, and tally the right ones."""
    asked = [record for record in records if isinstance(record, ChoiceRecord)]
    items = encoder.choices(asked)
    most = max((len(item.continuations) for item in items), default=1)
    picks = [0] * len(asked)
    for batch in _batches([len(item.prompt) for item in items], max(1, batch_size // most)):
        nats = _choice_nats(model, [items[i] for i in batch], encoder.pad_id, device)
        for i, found in zip(batch, nats, strict=True):
            item, record = items[i], asked[i]
            closings = [1 if whole and len(ids) > 1 else 0 for whole, ids in zip(item.complete, item.continuations)]
            scores = [
                -sum(one[: len(one) - closing]) / (len(one) - closing)
                for one, closing in zip(found, closings, strict=True)
            ]
            picks[i] = max(range(len(scores)), key=scores.__getitem__)
            right = found[record.label]
            tallies[record.task].add(sum(right), len(right), item.text_bytes[record.label])
    by_task: dict[str, tuple[list[int], list[int]]] = {}
    for record, pick in zip(asked, picks, strict=True):
        picked, labels = by_task.setdefault(record.task, ([], []))
        picked.append(pick)
        labels.append(record.label)
    return by_task
