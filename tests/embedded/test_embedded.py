"""The embedded base, tokenizer and corpus: what the main job and every example rely on."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from atp.embedded import DEFAULT_COUNTS, DOMAINS, base_dir, corpus, figures, pretrain, records

MAX_TOKENS = 256
CHOICE_TASKS = {
    "legal": {"clause", "holding"},
    "health": {"abstract", "inference"},
    "finance": {"sentiment", "risk"},
    "narrative": {"moral", "title"},
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_dir(), local_files_only=True)


@pytest.fixture(scope="module")
def note():
    return json.loads((base_dir() / "pretraining.json").read_text(encoding="utf-8"))


def whole(record):
    return record["text"] if "text" in record else record["prompt"] + figures.continuation(record)


@pytest.mark.parametrize("domain", DOMAINS)
def test_records_are_the_same_in_every_process(domain):
    code = f"import json; from atp.embedded import records; print(json.dumps(records({domain!r}, 'train', 40)))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(corpus.__file__).parents[2])}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == records(domain, "train", 40)


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("split", DEFAULT_COUNTS)
def test_a_smaller_count_is_a_prefix_and_the_default_count_is_met(domain, split):
    default = records(domain, split)
    assert len(default) == DEFAULT_COUNTS[split]
    assert records(domain, split, 37) == default[:37]
    assert records(domain, split, 0) == []


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_record_is_in_two_splits(domain):
    splits = {
        split: {json.dumps(record, sort_keys=True) for record in records(domain, split, 3 * count)}
        for split, count in DEFAULT_COUNTS.items()
    }
    assert not splits["train"] & splits["validation"]
    assert not splits["train"] & splits["test"]
    assert not splits["validation"] & splits["test"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_records_seldom_repeat(domain):
    distinct = {whole(record) for record in records(domain, "train")}
    assert len(distinct) > 0.95 * DEFAULT_COUNTS["train"]


def test_held_out_combinations_are_not_in_training():
    def combination(record):
        words = record["prompt"].split("\n")[0].split(": Directs")[0]
        department = next(d for _, d in corpus.legal._AGENCIES if f"Directs the {d} to" in record["completion"])
        return department, words.split("A BILL to ")[1]

    seen = {combination(r) for r in records("legal", "train") if r["task"] == "bill"}
    unseen = {combination(r) for r in records("legal", "test") if r["task"] == "bill"}
    assert len(unseen) > 5
    assert not seen & unseen


@pytest.mark.parametrize("domain", DOMAINS)
def test_records_have_one_of_the_three_shapes(domain):
    shapes = {frozenset(("text", "task")), frozenset(("prompt", "completion", "task"))}
    shapes.add(frozenset(("prompt", "choices", "label", "task")))
    found = collections.defaultdict(set)
    for record in records(domain, "test"):
        assert frozenset(record) in shapes
        found[record["task"]].add(frozenset(record))
        if "prompt" in record:
            assert record["prompt"].endswith("\n")
            assert not figures.continuation(record)[0].isspace()
        assert "{" not in whole(record)
    assert set(found) == set(corpus.tasks(domain))
    assert all(len(kinds) == 1 for kinds in found.values())
    assert {task for task, kinds in found.items() if any("choices" in kind for kind in kinds)} == CHOICE_TASKS[domain]


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_are_balanced_and_choices_differ(domain, split):
    labels = collections.defaultdict(collections.Counter)
    for record in records(domain, split):
        if "choices" in record:
            assert len(set(record["choices"])) == len(record["choices"]), record
            labels[record["task"], len(record["choices"])][record["label"]] += 1
    for (task, choices), counts in labels.items():
        fair = sum(counts.values()) / choices
        assert len(counts) == choices, task
        assert max(counts.values()) < 1.6 * fair, (task, counts)


def test_the_right_holding_agrees_with_the_case():
    for record in records("legal", "test"):
        if record["task"] != "holding":
            continue
        prompt = record["prompt"].lower()
        claimants = [roles for roles in corpus.legal._ROLES if all(f" {role}" in prompt for role in roles)]
        right = record["choices"][record["label"]].lower()
        assert any(all(f" {role}" in right for role in roles) for roles in claimants), record
        outcomes = corpus.legal._WORDS["lost"]
        lost = any(form.format(c=c, r=r) in prompt for form in outcomes for c, r in claimants)
        assert ("not" in right.split(" under ")[0].split()) == lost, record


def test_the_summary_of_a_bill_takes_its_slots_from_the_bill():
    for record in records("legal", "test"):
        if record["task"] != "bill":
            continue
        millions = record["completion"].split("$")[1].split(" million")[0]
        last = record["completion"].rsplit(" ", 1)[1].rstrip(".")
        title = record["completion"].split(":")[0]
        assert f"${millions},000,000 for each year through {last}" in record["prompt"]
        assert f"cited as the {title}." in record["prompt"]


def test_bad_domain_split_or_count_is_named():
    with pytest.raises(ValueError, match=r"domain='law'.*legal"):
        records("law", "train")
    with pytest.raises(ValueError, match=r"split='dev'.*validation"):
        records("legal", "dev")
    with pytest.raises(ValueError, match="count=-1"):
        records("legal", "train", -1)


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, atp.embedded; print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(Path(corpus.__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("domain", DOMAINS)
def test_records_fit_the_length_they_promise(domain, tokenizer):
    longest = 0
    for split, count in (("train", 1500), ("validation", 200), ("test", 400)):
        for record in records(domain, split, count):
            prompt = record.get("prompt", "")
            endings = record.get("choices", [whole(record)[len(prompt) :]])
            longest = max(longest, *(len(tokenizer(prompt + ending)["input_ids"]) + 1 for ending in endings))
    assert longest <= MAX_TOKENS


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back_from_the_tokenizer(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids[1:])
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["", " ", "a  b", "don 't , . !", "</s><s> <pad>", "1,234.50", "\u4e2d\U0001f600\r\n"])
def test_known_traps_of_tokenizers(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert ids == [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_the_vocabulary_holds_every_byte_and_the_special_tokens(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert len(tokenizer) == len(vocabulary) == 2048
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(ByteLevel.alphabet()) <= set(vocabulary)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")


@pytest.mark.parametrize("domain", DOMAINS)
def test_prompt_and_continuation_have_the_same_tokens_apart_and_together(domain, tokenizer):
    for record in records(domain, "test", 100):
        if "prompt" in record:
            ending = figures.continuation(record)
            apart = [
                *tokenizer(record["prompt"])["input_ids"],
                *tokenizer(ending, add_special_tokens=False)["input_ids"],
            ]
            assert tokenizer(record["prompt"] + ending)["input_ids"] == apart


def test_the_base_is_what_it_says(note):
    model = AutoModelForCausalLM.from_pretrained(base_dir(), local_files_only=True, dtype="auto")
    config = model.config
    assert (config.model_type, model.dtype) == ("llama", torch.float32)
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (192, 6, 512)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 3, 32)
    assert (config.vocab_size, config.max_position_embeddings, config.tie_word_embeddings) == (2048, 512, True)
    assert model.num_parameters() == note["parameters"]
    assert model.generation_config.eos_token_id == config.eos_token_id
    assert (base_dir() / "model.safetensors").stat().st_size < 12 * 2**20


def test_weights_and_corpus_belong_together(note):
    assert corpus.digest() == note["corpus_digest"], "the corpus has changed: make the base anew"


def test_the_tokenizer_is_the_one_that_the_corpus_gives(tokenizer):
    assert pretrain.make_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_the_base_reaches_the_figures_beside_it(tokenizer, note):
    model = AutoModelForCausalLM.from_pretrained(base_dir(), local_files_only=True, dtype=torch.float32)
    for domain in DOMAINS:
        found = figures.perplexity(model, tokenizer, records(domain, "validation"))
        assert found == pytest.approx(note["figures"]["perplexity"][domain], rel=0.02)
        for task, share in figures.accuracies(model, tokenizer, records(domain, "test", 40)).items():
            assert share > 0.6, (domain, task)


def test_remaking_writes_a_base_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "_MEASURED", {"validation": 8, "test": 8})
    output = tmp_path / "base"
    pretrain.main(["--output", str(output), "--steps", "3", "--batch-tokens", "1024"])
    made = json.loads((output / "pretraining.json").read_text(encoding="utf-8"))
    assert made["command"] == "python -m atp.embedded.pretrain --steps 3 --batch-tokens 1024"
    assert made["step"] == 3 and made["tokens"] > 1500
    assert set(made["figures"]["perplexity"]) == set(DOMAINS)
    model = AutoModelForCausalLM.from_pretrained(output, local_files_only=True)
    again = AutoTokenizer.from_pretrained(output, local_files_only=True)
    assert model(**again("A tenant", return_tensors="pt")).logits.isfinite().all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    run = pretrain.Settings(steps=6, batch_tokens=1024)
    straight = pretrain.Trainer(run, tmp_path / "straight.safetensors")
    straight.fit()
    first = pretrain.Trainer(run, tmp_path / "cut.safetensors")
    halves = pretrain.batches(first.tokenizer, run.batch_tokens // 2, run.seed)
    for _ in range(3):
        first.step([next(halves), next(halves)])
    first.save_checkpoint()
    second = pretrain.Trainer(run, tmp_path / "cut.safetensors")
    second.resume()
    second.fit()
    assert second.done.step == straight.done.step == 6
    assert second.done.tokens == straight.done.tokens
    for (name, one), two in zip(straight.model.named_parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, msg=name)


def test_resuming_needs_a_checkpoint_of_the_same_settings(tmp_path, capsys):
    with pytest.raises(SystemExit):
        pretrain.main(["--output", str(tmp_path / "base"), "--steps", "2", "--resume"])
    assert "no checkpoint" in capsys.readouterr().err
    trainer = pretrain.Trainer(pretrain.Settings(steps=6, batch_tokens=1024), tmp_path / "cut.safetensors")
    halves = pretrain.batches(trainer.tokenizer, 512, 0)
    trainer.step([next(halves), next(halves)])
    trainer.save_checkpoint()
    other = pretrain.Trainer(pretrain.Settings(steps=7, batch_tokens=1024), tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="written with"):
        other.resume()


@pytest.mark.parametrize("flag", [("--steps", "0"), ("--minutes", "-1"), ("--batch-tokens", "100")])
def test_a_setting_that_cannot_work_is_named(flag, tmp_path, capsys):
    with pytest.raises(SystemExit):
        pretrain.main(["--output", str(tmp_path / "base"), *flag])
    assert flag[0] in capsys.readouterr().err
