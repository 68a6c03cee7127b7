"""Quality metrics against plain recomputation, one sequence at a time."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from atp.data.encoding import Choices, Encoder
from atp.data.records import ChoiceRecord, CompletionRecord, Record, TextRecord, limit
from atp.data.sources import load_files
from atp.evaluate.metrics import Metrics, is_headline, recovery
from atp.evaluate.quality import evaluate, samples
from atp.evaluate.scoring import choice_nats, evaluating, greedy, sequence_nats
from atp.model.widths import LayerWidths, build_model, pruned_config

CPU = torch.device("cpu")
VOCABULARY = 300


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the court holds that the party may recover damages"] * 9, trainer)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, add_bos_token=True, **names)


TOKENIZER = make_tokenizer()
RECORDS: list[Record] = [
    TextRecord("the court holds that the party may recover damages, the court may", "statute"),
    TextRecord("the party " * 40, "statute"),  # longer than a window
    *(CompletionRecord("the court holds " * n, " that the party" + " may" * n + "é", "bill") for n in (1, 2, 5, 3)),
    *(
        ChoiceRecord("the party " * n + ":", (" may", " may recover damages", " court" * n), n % 3, "holding")
        for n in (1, 4, 2, 7, 3, 5)
    ),
    ChoiceRecord("the court", (" a", " b", " c", " d"), 3, "clause"),
    ChoiceRecord("court", (" a", " damages"), 0, "clause"),
]
FAMILIES = {
    "llama-gqa": lambda: tiny_model("llama", "gqa", vocabulary=VOCABULARY),
    "llama-mqa-tied-biased": lambda: tiny_model("llama", "mqa", tied=True, biased=True, vocabulary=VOCABULARY),
    "qwen3-mha": lambda: tiny_model("qwen3", "mha", vocabulary=VOCABULARY),
    "per-layer": lambda: per_layer_model(),
    "gpt2": lambda: gpt2(),
    "bloom": lambda: bloom(),
}


def per_layer_model() -> PreTrainedModel:
    """Widths that differ by layer, no attention in the first and no FFN in the last."""
    base = tiny_model("llama", "gqa", layers=3, vocabulary=VOCABULARY).config
    widths = [LayerWidths(0, 0, 8, 12), LayerWidths(4, 2, 8, 20), LayerWidths(2, 1, 8, 0)]
    torch.manual_seed(3)
    model = build_model(pruned_config(base, widths), dtype=torch.float32, initialize=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def gpt2() -> PreTrainedModel:
    torch.manual_seed(4)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def bloom() -> PreTrainedModel:
    """A model whose forward takes no positions."""
    torch.manual_seed(5)
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
    return BloomForCausalLM(config).eval()


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return FAMILIES[request.param]()


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def naive_nats(model: PreTrainedModel, context: list[int], continuation: list[int]) -> list[float]:
    """Negative log-likelihood of each token, from one forward pass over one sequence."""
    logits = model(input_ids=torch.tensor([context + continuation])).logits[0].double().log_softmax(-1)
    return [-logits[len(context) + i - 1, token].item() for i, token in enumerate(continuation)]


def naive_answers(model: PreTrainedModel) -> dict[str, list[list[float]]]:
    """Per task, the nats of each record's scored tokens."""
    found: dict[str, list[list[float]]] = {}
    for record in RECORDS:
        if isinstance(record, TextRecord):
            stream = [1, *ids_of(record.text)]
            nats = naive_nats(model, stream[:1], stream[1:64])
            for start in range(64, len(stream), 62):
                nats += naive_nats(model, [1, stream[start - 1]], stream[start : start + 62])
        else:
            answer = record.choices[record.label] if isinstance(record, ChoiceRecord) else record.completion
            nats = naive_nats(model, [1, *ids_of(record.prompt)], ids_of(answer))
        found.setdefault(record.task, []).append(nats)
    return found


def test_perplexity_and_bits_per_byte_match_a_plain_loop(model: PreTrainedModel) -> None:
    metrics = evaluate(model, TOKENIZER, RECORDS, max_length=64, batch_size=3, max_new_tokens=8)
    by_task = naive_answers(model)
    for task, found in by_task.items():
        nats = [nat for record in found for nat in record]
        assert metrics.values[f"{task}/perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=2e-4)
        assert metrics.counts[f"{task}/perplexity"] == len(nats)
    nats = [nat for found in by_task.values() for record in found for nat in record]
    assert metrics.values["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=2e-4)
    answers = [
        record.text
        if isinstance(record, TextRecord)
        else (record.choices[record.label] if isinstance(record, ChoiceRecord) else record.completion)
        for record in RECORDS
    ]
    size = sum(len(answer.encode()) for answer in answers)
    assert metrics.counts["bits_per_byte"] == size
    assert metrics.values["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / size, rel=1e-4)


def test_choices_are_scored_as_one_by_one(model: PreTrainedModel) -> None:
    asked = [record for record in RECORDS if isinstance(record, ChoiceRecord)]
    picked: dict[str, list[tuple[int, int]]] = {}
    for record in asked:
        prompt = [1, *ids_of(record.prompt)]
        means = [sum(naive_nats(model, prompt, ids_of(one))) / len(ids_of(one)) for one in record.choices]
        picked.setdefault(record.task, []).append((means.index(min(means)), record.label))
    metrics = evaluate(model, TOKENIZER, asked, max_length=64, batch_size=5)
    for task, pairs in picked.items():
        assert metrics.values[f"{task}/accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
        classes = {label for pair in pairs for label in pair}
        f1 = [
            2 * pairs.count((c, c)) / (sum(a == c for a, _ in pairs) + sum(b == c for _, b in pairs)) for c in classes
        ]
        assert metrics.values[f"{task}/macro_f1"] == pytest.approx(sum(f1) / len(f1))
        assert metrics.counts[f"{task}/accuracy"] == metrics.counts[f"{task}/macro_f1"] == len(pairs)


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_each_token_of_each_choice_matches_whatever_the_batches(model: PreTrainedModel, batch_size: int) -> None:
    encoder = Encoder(TOKENIZER, 64, close=False)
    items = encoder.choices([record for record in RECORDS if isinstance(record, ChoiceRecord)])
    with evaluating(model):
        found = choice_nats(model, items, batch_size=batch_size, pad_id=0, device=CPU)
    for item, nats in zip(items, found, strict=True):
        for continuation, one in zip(item.continuations, nats, strict=True):
            assert one == pytest.approx(naive_nats(model, item.prompt, continuation), abs=2e-4)


def test_single_token_choices_need_one_forward_pass() -> None:
    model = tiny_model(vocabulary=VOCABULARY)
    encoder = Encoder(TOKENIZER, 64, close=False)
    items = encoder.choices([ChoiceRecord("the", ("a", "b", "c"), 0), ChoiceRecord("court", ("d", "e"), 0)])
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *args: calls.append(1))
    found = choice_nats(model, items, batch_size=8, pad_id=0, device=CPU)
    handle.remove()
    assert len(calls) == 1 and [len(nats) for nats in found] == [3, 2]
    assert found[1][1] == pytest.approx(naive_nats(model, items[1].prompt, items[1].continuations[1]), abs=1e-4)


def test_generation_matches_generate_one_by_one(model: PreTrainedModel) -> None:
    prompts = [[1, *ids_of("the court holds " * n)] for n in (3, 1, 2, 6)]
    alone = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9, eos_token_id=[], pad_token_id=0
        )
        alone.append(out[0, len(prompt) :].tolist())
    stop = alone[0][4]  # a token that the model does write
    cut = [ids[: ids.index(stop)] if stop in ids else ids for ids in alone]
    with evaluating(model):
        how = {"max_new_tokens": 9, "pad_id": 0, "device": CPU}
        assert greedy(model, prompts, stops=[], batch_size=3, **how) == alone
        assert greedy(model, prompts, stops=[stop], batch_size=4, **how) == cut


def test_rouge_matches_its_definition() -> None:
    model = tiny_model(vocabulary=VOCABULARY)
    bills = [record for record in RECORDS if isinstance(record, CompletionRecord)]
    metrics = evaluate(model, TOKENIZER, bills, max_length=64, batch_size=2, max_new_tokens=12, max_generate=3)
    assert metrics.counts["bill/rouge1"] == metrics.counts["bill/rougeL"] == 3
    assert "nltk" not in sys.modules
    found = samples(model, TOKENIZER, bills, count=3, max_new_tokens=12, max_length=64)
    scores = []
    for sample in found:
        words = [
            Counter("".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split())
            for text in (sample.generated, sample.reference)
        ]
        hits = (words[0] & words[1]).total()
        scores.append(2 * hits / (words[0].total() + words[1].total()) if hits else 0.0)
    assert metrics.values["bill/rouge1"] == pytest.approx(sum(scores) / 3, abs=1e-6)


def test_rouge_of_a_model_that_is_right_is_one() -> None:
    class Parrot(torch.nn.Module):
        """Answers a fixed text, token by token, after any prompt of the given length."""

        def __init__(self, prompt: int, answer: list[int]) -> None:
            super().__init__()
            self.inner = tiny_model(vocabulary=VOCABULARY)
            self.config, self.generation_config = self.inner.config, self.inner.generation_config
            self.prompt, self.answer = prompt, answer

        def forward(self, input_ids, attention_mask, past_key_values=None, use_cache=False):
            out = self.inner(input_ids, attention_mask, past_key_values=past_key_values, use_cache=use_cache)
            wanted = [*self.answer, TOKENIZER.eos_token_id] + [0] * 64
            first = attention_mask.shape[1] - input_ids.shape[1]
            for column in range(input_ids.shape[1]):
                at = first + column - self.prompt + 1
                if at >= 0:
                    out.logits[:, column, wanted[at]] += 1e4
            return out

    record = CompletionRecord("the court holds", " that the party may recover damages", "bill")
    parrot = Parrot(1 + len(ids_of(record.prompt)), ids_of(record.completion))
    metrics = evaluate(parrot, TOKENIZER, [record], max_length=64, batch_size=2, max_new_tokens=30)
    assert [metrics.values[f"bill/{name}"] for name in ("rouge1", "rouge2", "rougeL")] == [1.0, 1.0, 1.0]
    assert metrics.values["bill/perplexity"] == pytest.approx(1.0)


def test_which_metrics_there_are_depends_on_the_records() -> None:
    model = tiny_model(vocabulary=VOCABULARY)
    metrics = evaluate(model, TOKENIZER, RECORDS, max_length=64, batch_size=4, max_new_tokens=4, max_generate=2)
    tasks = {
        "statute": ["bits_per_byte"],
        "bill": ["rouge1", "rouge2", "rougeL"],
        "holding": ["accuracy", "macro_f1"],
        "clause": ["accuracy", "macro_f1"],
    }
    names = {f"{task}/{name}" for task, found in tasks.items() for name in ["perplexity", *found]}
    assert set(metrics.values) == set(metrics.counts) == names | {"perplexity", "bits_per_byte"}
    none = evaluate(model, TOKENIZER, RECORDS, max_length=64, batch_size=4, max_generate=0)
    assert not any("rouge" in name for name in none.values)


def test_evaluation_is_repeatable_and_restores_the_mode_of_every_module() -> None:
    model = tiny_model(vocabulary=VOCABULARY)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first = evaluate(model, TOKENIZER, RECORDS, max_length=64, batch_size=4, max_new_tokens=4)
    assert evaluate(model, TOKENIZER, RECORDS, max_length=64, batch_size=4, max_new_tokens=4) == first
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_mode_is_restored_after_a_failure_too() -> None:
    model = tiny_model(vocabulary=VOCABULARY).train()
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        assert not model.training and torch.is_inference_mode_enabled()
        raise RuntimeError("stop")
    assert model.training and not torch.is_inference_mode_enabled()


def test_a_peft_model_scores_as_its_merged_self() -> None:
    torch.manual_seed(0)
    wrapped = get_peft_model(
        tiny_model(vocabulary=VOCABULARY),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    settings = {"max_length": 64, "batch_size": 4, "max_new_tokens": 6}
    before = evaluate(wrapped, TOKENIZER, RECORDS, **settings)
    merged = evaluate(wrapped.merge_and_unload(), TOKENIZER, RECORDS, **settings)
    assert before.values == pytest.approx(merged.values, rel=1e-4) and before.counts == merged.counts


def test_half_precision_is_scored_in_full() -> None:
    model = tiny_model(vocabulary=VOCABULARY)
    exact = evaluate(model, TOKENIZER, RECORDS, max_length=64, batch_size=4, max_generate=0)
    half = evaluate(model.to(torch.bfloat16), TOKENIZER, RECORDS, max_length=64, batch_size=4, max_generate=0)
    assert half.values["perplexity"] == pytest.approx(exact.values["perplexity"], rel=0.05)


def test_truncated_prompts_are_scored_alike_for_all_choices(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(vocabulary=VOCABULARY)
    record = ChoiceRecord("the party " * 30, (" may", " recover" * 6), 0)
    with caplog.at_level("INFO", logger="atp.evaluate.quality"):
        evaluate(model, TOKENIZER, [record], max_length=32, batch_size=4)
    assert "'prompts': 1" in caplog.text
    encoder = Encoder(TOKENIZER, 32, close=False)
    (item,) = encoder.choices([record])
    nats = choice_nats(model, [item], batch_size=4, pad_id=0, device=CPU)[0]
    assert nats[0] == pytest.approx(naive_nats(model, item.prompt, item.continuations[0]), abs=1e-4)


def test_sequences_are_returned_in_the_order_they_came() -> None:
    model = tiny_model(vocabulary=VOCABULARY)
    texts = [TextRecord("the party " * n) for n in (1, 5, 2, 9, 3)]
    examples = [found[0] for found in Encoder(TOKENIZER, 64, close=False).encode(texts)]
    with evaluating(model):
        together = sequence_nats(model, examples, batch_size=2, pad_id=0, device=CPU)
    alone = [sum(naive_nats(model, [1], example.input_ids[1:].tolist())) for example in examples]
    assert together == pytest.approx(alone, rel=1e-4)


def test_bad_input_is_refused() -> None:
    model = tiny_model(vocabulary=VOCABULARY)
    with pytest.raises(ValueError, match="no records to evaluate on"):
        evaluate(model, TOKENIZER, [], max_length=64, batch_size=4)
    with pytest.raises(ValueError, match=r"data\.max_length=65 exceeds the model's context of 64"):
        evaluate(model, TOKENIZER, RECORDS, max_length=65, batch_size=4)
    with pytest.raises(ValueError, match=r"evaluate\.max_new_tokens=64 leaves no room"):
        evaluate(model, TOKENIZER, RECORDS, max_length=64, batch_size=4, max_new_tokens=64)


# ---- recovery


def test_recovery_divides_the_right_way_and_averages_the_headlines() -> None:
    pruned = {
        "perplexity": 10.0,
        "bits_per_byte": 2.0,
        "a/accuracy": 0.4,
        "a/macro_f1": 0.2,
        "b/rouge1": 0.1,
        "b/rougeL": 0.3,
    }
    dense = {
        "perplexity": 8.0,
        "bits_per_byte": 1.0,
        "a/accuracy": 0.5,
        "a/macro_f1": 0.5,
        "b/rouge1": 0.4,
        "b/rougeL": 0.2,
    }
    percent = recovery(pruned, dense)
    assert percent == pytest.approx(
        {"perplexity": 80, "bits_per_byte": 50, "a/accuracy": 80, "a/macro_f1": 40, "b/rouge1": 25, "b/rougeL": 150}
        | {"mean": (80 + 80 + 150) / 3}
    )
    assert [name for name in dense if is_headline(name)] == ["perplexity", "a/accuracy", "b/rougeL"]
    assert recovery(dense, dense)["mean"] == 100.0


def test_recovery_of_nothing_and_from_nothing(caplog: pytest.LogCaptureFixture) -> None:
    percent = recovery(
        {"a/accuracy": 0.4, "b/accuracy": 0.1, "perplexity": math.inf, "c/perplexity": math.nan, "note": 1.0},
        {"a/accuracy": 0.0, "c/accuracy": 0.1, "perplexity": 5.0, "c/perplexity": 5.0, "note": 1.0},
    )
    assert percent == {"perplexity": 0.0, "c/perplexity": 0.0, "mean": 0.0}
    assert "no recovery of a/accuracy" in caplog.text
    assert recovery({}, {"perplexity": 5.0}) == {}


# ---- samples


def test_samples_show_prompt_continuation_and_reference() -> None:
    model = tiny_model(vocabulary=VOCABULARY)
    found = samples(model, TOKENIZER, RECORDS, count=4, max_new_tokens=5, max_length=64)
    assert len(found) == 4 and found == samples(model, TOKENIZER, RECORDS, count=4, max_new_tokens=5, max_length=64)
    text, *_, last = found
    assert text.prompt + text.reference == RECORDS[0].text and text.prompt == "the court holds that the party"
    assert isinstance(RECORDS[10], ChoiceRecord) and last.prompt == RECORDS[10].prompt
    assert last.reference == RECORDS[10].choices[RECORDS[10].label]
    assert len(samples(model, TOKENIZER, RECORDS[:2], count=9, max_new_tokens=5, max_length=64)) == 2


# ---- a real checkpoint


def test_a_real_checkpoint_reaches_its_known_quality(shared: Path) -> None:
    """Its card: 4.29 per token and 1.058 bits per byte over all 300 held-out stories."""
    folder = shared / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    stories = load_files(shared / "data" / "general" / "tinystories_heldout.jsonl", seed=0)
    stories = limit(list(stories.train), 40, seed=0)
    metrics = evaluate(model, tokenizer, stories, max_length=512, batch_size=8)
    assert isinstance(metrics, Metrics)
    assert metrics.values["perplexity"] == pytest.approx(4.29, rel=0.06)
    assert metrics.values["bits_per_byte"] == pytest.approx(1.058, rel=0.06)


@pytest.mark.parametrize("window", [None, 8])
def test_batched_reading_equals_one_by_one_also_beyond_a_sliding_window(window: int | None) -> None:
    model = tiny_model("mistral", seed=3).eval()
    model.config.sliding_window = window
    model = type(model)(model.config).eval()
    draw = random.Random(0)
    shared = [draw.randrange(3, 64) for _ in range(17)]
    sizes = (1, 2, 5, 9, 20, 20)
    prompts = [[draw.randrange(3, 64) for _ in range(size)] for size in sizes] + [
        [*shared, end] for end in range(5, 11)
    ]
    how: dict[str, Any] = {"batch_size": 4, "pad_id": 0, "device": torch.device("cpu")}
    items = [Choices(prompt, [[draw.randrange(3, 64)] * (1 + at) for at in range(3)], [1] * 3) for prompt in prompts]
    items[1] = Choices(items[1].prompt, [[], [7]], [0, 1])
    with evaluating(model):
        texts = greedy(model, prompts, stops=[2], max_new_tokens=12, **how)
        for prompt, text in zip(prompts, texts, strict=True):
            ids = list(prompt)
            while len(ids) < len(prompt) + 12 and ids[-1] != 2:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            assert text == [token for token in ids[len(prompt) :] if token != 2]
        for item, nats in zip(items, choice_nats(model, items, **how), strict=True):
            for ids, found in zip(item.continuations, nats, strict=True):
                logits = model(torch.tensor([item.prompt + ids])).logits[0, len(item.prompt) - 1 : -1]
                expected = torch.nn.functional.cross_entropy(
                    logits, torch.tensor(ids, dtype=torch.long), reduction="none"
                )
                torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=1e-4)
