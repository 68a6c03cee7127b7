"""Quality: how well a causal language model does on records.

Perplexity over everything, accuracy and macro-F1 where there are choices, ROUGE where there are completions. It takes
any transformers causal LM, dense or pruned, and comes after training and export in the flow. It knows nothing of
masks, budgets or how a model was made; size, speed and memory are in :mod:`atp.evaluate.measure`.

Every metric comes with the number of items, and with what each item gave, from which :mod:`atp.evaluate.intervals`
makes intervals and paired comparisons. Everything is deterministic: greedy decoding, batches sorted by length, no
dropout. ATP and D-Pruner sample summaries, which makes ROUGE noisy; figures are therefore comparable within ATP, not
with those papers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score
from torchmetrics.functional.text import rouge_score

from atp.data.encoding import Encoder
from atp.data.encoding.chat import last_turn
from atp.data.encoding.turn import end_token
from atp.data.records import ChatRecord, ChoiceRecord, CompletionRecord, Record, TextRecord
from atp.data.records.types import spoken
from atp.errors import UserError
from atp.evaluate.intervals import Items, score
from atp.evaluate.metrics import ROUGE, Metrics, Tally
from atp.evaluate.scoring import choice_nats, evaluating, greedy, sequence_nats
from atp.model.stops import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


_SAMPLE_WORDS = 32
_T = TypeVar("_T")


class Sample(NamedTuple):
    """A prompt, the text that a model generated for it, and the reference text."""

    prompt: str
    generated: str
    reference: str


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    max_length: int,
    batch_size: int,
    max_new_tokens: int = 96,
    max_generate: int | None = 64,
    normalise: Mapping[str, str] | str = "tokens",
    stride: int | None = None,
    device: torch.device | str | None = None,
) -> Metrics:
    """Score a model on records.

    * ``perplexity``: exp of the mean negative log-likelihood over the tokens of all completions, right choices and
      running texts. The end of a sequence, though learnt, is not scored: it is no text, and some base models were
      never taught one. Long texts are scored in windows of ``max_length``.
    * ``bits_per_byte``: the same sum in bits, over the UTF-8 bytes of the scored text; comparable across tokenizers.
    * ``accuracy``, ``macro_f1``: picks the choice of highest log-likelihood given the prompt: per token of the choice
      (CaseHOLD in D-Pruner's protocol, Zhang et al. 2024, arXiv 2405.06275), per character of it (``acc_norm`` of the
      lm-evaluation-harness, where ARC and PIQA are reported so), or not normalised. Classes are choices' positions.
    * ``rouge*``: F-measure of greedy completions, lower case, without stemming (Lin 2004, W04-1013).

    Args:
        model: A causal LM; every module's mode is restored afterwards.
        tokenizer: Its tokenizer.
        records: What to score it on.
        max_length: Most tokens of a sequence, prompt and completion together.
        batch_size: Sequences of a forward pass.
        max_new_tokens: Most tokens to generate per completion.
        max_generate: Most completions to generate per task, spread evenly over its records; None for all, 0 for none.
        normalise: ``tokens``, ``characters`` or ``none``, for all tasks or by task (others then take ``tokens``).
        stride: Tokens by which windows of long text move on, at most ``max_length``; None moves by whole windows.
        device: Where to put batches; None takes the device of the model.

    Returns:
        The metrics and what they are over.

    Raises:
        ValueError: There are no records, ``max_length`` exceeds the model's context, or generating leaves no room for
            prompts.
    """
    if not records:
        raise UserError("there are no records to evaluate on; give more data, or a data.test_path")
    _check_context(model, max_length)
    encoder = Encoder(tokenizer, max_length, close=False, stride=stride)
    run = _Evaluation(model, encoder, batch_size, _device(model, device), normalise)
    tallies: dict[str, Tally] = {record.task: Tally() for record in records}
    with evaluating(model):
        run.tally_sequences(records, tallies)
        picks = run.pick(records, tallies)
        truncated = dict(encoder.truncated)
        texts = run.complete(records, max_new_tokens, max_generate)
    if any(truncated.values()):
        log.info("cut to max_length=%d while evaluating: %s", max_length, truncated)
        encoder.check_answers("evaluation", refuse=False)
    return _metrics(tallies, picks, texts, {record.task for record in records if isinstance(record, TextRecord)})


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
    """Continue a few records greedily.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer.
        records: What to take prompts from; running text gives its first words (half of them at most).
        count: How many, spread evenly over the records.
        max_new_tokens: Most tokens to generate.
        max_length: Most tokens of prompt and continuation together.
        batch_size: Prompts of a forward pass.
        device: Where to put batches; None takes the device of the model.

    Returns:
        Prompt, generated text and reference (the text, completion or right choice) of each.

    Raises:
        ValueError: ``max_length`` exceeds the model's context, or leaves no room for prompts.
    """
    _check_context(model, max_length)
    run = _Evaluation(model, Encoder(tokenizer, max_length), batch_size, _device(model, device))
    chosen = _spread(records, count)
    pairs = [_prompt_and_reference(record, run.encoder) for record in chosen]
    with evaluating(model):
        texts = run.generate(chosen, [prompt for prompt, _ in pairs], max_new_tokens)
    return [Sample(prompt, text, reference) for (prompt, reference), text in zip(pairs, texts, strict=True)]


class _Evaluation:
    """A model, its encoder and how to run it: the steps of an evaluation."""

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        batch_size: int,
        device: torch.device,
        normalise: Mapping[str, str] | str = "tokens",
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.batch_size = batch_size
        self.device = device
        self.normalise = normalise

    def tally_sequences(self, records: Sequence[Record], tallies: Mapping[str, Tally]) -> None:
        """Tally running text and completions."""
        plain = [(at, record) for at, record in enumerate(records) if not isinstance(record, ChoiceRecord)]
        found = zip(plain, self.encoder.encode([record for _, record in plain]), strict=True)
        owned = [(at, record.task, example) for (at, record), examples in found for example in examples]
        bytes_of: dict[int, int] = {}
        tokens_of: dict[int, int] = {}
        for at, _, example in owned:
            bytes_of[at] = bytes_of.get(at, 0) + example.text_bytes
            tokens_of[at] = tokens_of.get(at, 0) + example.loss_tokens
        all_nats = sequence_nats(self.model, [example for _, _, example in owned], **self._how)
        # A long text is several windows and one item: its bytes are shared out by tokens, so that they add up again.
        for (at, task, example), nats in zip(owned, all_nats, strict=True):
            share = example.loss_tokens / max(1, tokens_of[at])
            tallies[task].add(at, nats, example.loss_tokens, bytes_of[at] * share)

    def pick(self, records: Sequence[Record], tallies: Mapping[str, Tally]) -> dict[str, list[tuple[int, int, int]]]:
        """Tally right choices; return the picked choice, the right one and the number of choices, by task."""
        asked = [(at, record) for at, record in enumerate(records) if isinstance(record, ChoiceRecord)]
        items = self.encoder.choices([record for _, record in asked])
        picks: dict[str, list[tuple[int, int, int]]] = {}
        for (at, record), item, nats in zip(asked, items, choice_nats(self.model, items, **self._how), strict=True):
            scores = [sum(one) / size for one, size in zip(nats, self._sizes(record, nats), strict=True)]
            pick = min(range(len(scores)), key=scores.__getitem__)
            picks.setdefault(record.task, []).append((pick, record.label, len(scores)))
            right = nats[record.label]  # perplexity is over the right choice, whatever was picked
            tallies[record.task].add(at, sum(right), len(right), item.text_bytes[record.label])
        return picks

    def _sizes(self, record: ChoiceRecord, nats: Sequence[Sequence[float]]) -> list[int]:
        """Return the numbers by which the log-likelihoods of an item's choices are divided."""
        way = self.normalise if isinstance(self.normalise, str) else self.normalise.get(record.task, "tokens")
        if way == "tokens":
            return [max(1, len(one)) for one in nats]
        if way == "characters":
            return [max(1, len(choice.strip())) for choice in record.choices]
        if way == "none":
            return [1 for _ in nats]
        raise UserError(f"evaluate.normalise={way!r} is unknown; choose tokens, characters or none")

    def complete(
        self, records: Sequence[Record], max_new_tokens: int, max_generate: int | None
    ) -> dict[str, list[tuple[str, str]]]:
        """Return generated and true completions by task."""
        by_task: dict[str, list[CompletionRecord | ChatRecord]] = {}
        for record in records:
            if isinstance(record, CompletionRecord | ChatRecord):
                by_task.setdefault(record.task, []).append(record)
        chosen = [record for some in by_task.values() for record in _spread(some, max_generate)]
        texts: dict[str, list[tuple[str, str]]] = {}
        if chosen:
            pairs = [_prompt_and_reference(record, self.encoder) for record in chosen]
            generated = self.generate(chosen, [prompt for prompt, _ in pairs], max_new_tokens)
            for record, text, (_, reference) in zip(chosen, generated, pairs, strict=True):
                texts.setdefault(record.task, []).append((text, reference))
        return texts

    def generate(self, records: Sequence[Record], prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Return the greedy continuation of each record's prompt; of a conversation, the assistant's last turn."""
        tokenizer = self.encoder.tokenizer
        stops = {tokenizer.eos_token_id, *stop_ids(getattr(self.model, "generation_config", None))}
        if any(isinstance(record, ChatRecord) or getattr(record, "end", "") for record in records):
            stops.add(end_token(tokenizer))
        chats = iter(self.encoder.chat_prompts([r for r in records if isinstance(r, ChatRecord)], max_new_tokens))
        plain = iter(
            self.encoder.prompts(
                [text for text, r in zip(prompts, records, strict=True) if not isinstance(r, ChatRecord)],
                max_new_tokens,
                [getattr(r, "frame", ()) for r in records if not isinstance(r, ChatRecord)],
            )
        )
        prompt_ids = [next(chats) if isinstance(record, ChatRecord) else next(plain) for record in records]
        found = greedy(self.model, prompt_ids, stops=sorted(stops - {None}), max_new_tokens=max_new_tokens, **self._how)
        return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in found]

    @property
    def _how(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "pad_id": self.encoder.pad_id, "device": self.device}


def _metrics(
    tallies: Mapping[str, Tally],
    picks: Mapping[str, Sequence[tuple[int, int, int]]],
    texts: Mapping[str, Sequence[tuple[str, str]]],
    running: set[str],
) -> Metrics:
    """Compute the metrics over everything, then of each task; bits per byte for tasks of running text."""
    whole = Tally()
    for tally in tallies.values():
        whole.update(tally)
    metrics = Metrics()
    whole.put(metrics, "", bits=True)
    for task, tally in tallies.items():
        tally.put(metrics, f"{task}/", bits=task in running)
        if task in picks:
            _put_picks(metrics, task, picks[task])
        if task in texts:
            _put_rouge(metrics, task, texts[task])
    return metrics


def _put_picks(metrics: Metrics, task: str, picks: Sequence[tuple[int, int, int]]) -> None:
    picked, right = (torch.tensor([one[column] for one in picks]) for column in (0, 1))
    classes = max(choices for _, _, choices in picks)
    accuracy = multiclass_accuracy(picked, right, num_classes=classes, average="micro")
    macro_f1 = multiclass_f1_score(picked, right, num_classes=classes, average="macro")
    hits = Items("mean", [float(pick == label) for pick, label, _ in picks])
    classes_of = Items("macro_f1", [float(pick) for pick, _, _ in picks], [float(label) for _, label, _ in picks])
    metrics.put(f"{task}/accuracy", float(accuracy), len(picks), hits)
    metrics.put(f"{task}/macro_f1", float(macro_f1), len(picks), classes_of)


def _put_rouge(metrics: Metrics, task: str, texts: Sequence[tuple[str, str]]) -> None:
    # Without rougeLsum and stemming, torchmetrics needs neither nltk nor a download.
    scores = [rouge_score(generated, reference, rouge_keys=ROUGE) for generated, reference in texts]
    for name in ROUGE:
        items = Items("mean", [float(one[f"{name}_fmeasure"]) for one in scores])
        metrics.put(f"{task}/{name}", score(items), len(texts), items)


def _prompt_and_reference(record: Record, encoder: Encoder) -> tuple[str, str]:
    if isinstance(record, ChatRecord):
        return encoder.chats.prompt_text(record), spoken(record.messages[last_turn(record)])
    if isinstance(record, ChoiceRecord):
        return record.prompt, record.choices[record.label]
    if isinstance(record, CompletionRecord):
        return record.prompt, record.completion
    words = list(re.finditer(r"\S+", record.text))
    end = words[max(0, min(_SAMPLE_WORDS, len(words) // 2) - 1)].end()
    return record.text[:end], record.text[end:]


def _spread(records: Sequence[_T], most: int | None) -> list[_T]:
    if most is None or len(records) <= most:
        return list(records)
    return [records[i * len(records) // most] for i in range(most)]


def _check_context(model: PreTrainedModel, max_length: int) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise UserError(
            f"data.max_length={max_length} exceeds the model's context of {context} tokens; "
            f"set data.max_length={context} or less"
        )


def _device(model: PreTrainedModel, device: torch.device | str | None) -> torch.device:
    return next(model.parameters()).device if device is None else torch.device(device)
