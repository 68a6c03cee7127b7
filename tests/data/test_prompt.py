"""Prompts: what stands around a record, where it is used, what it costs, and that its keys and values are read once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from omegaconf import OmegaConf
from test_evaluate import CPU, RECORDS, TOKENIZER, VOCABULARY
from transformers import GenerationConfig

from atp.commands.train import compose_config
from atp.config.schema import TrainConfig
from atp.data.encoding import Encoder
from atp.data.prompt import Prompt, from_text
from atp.data.records import ChatRecord, ChoiceRecord, CompletionRecord, Splits, TextRecord
from atp.evaluate import reading, scoring
from atp.evaluate.quality import evaluate
from atp.run import parts

LONG = "You answer questions of law and of nothing else, and you take your time over each of them. "


def config(*overrides: str) -> TrainConfig:
    made = OmegaConf.to_object(compose_config(["experiment=smoke", *overrides]))
    assert isinstance(made, TrainConfig)
    return made


def test_a_prompt_stands_before_every_prompt_but_not_before_text() -> None:
    prompt = Prompt("x", system="Task {{ task }}: {{ instruction }}", instructions={"c": "choose.", "default": "do."})
    choice = ChoiceRecord("Q?", (" a", " b"), 0, "c")
    assert prompt.on(choice) == ChoiceRecord("Task c: choose.\n\nQ?", (" a", " b"), 0, "c")
    assert prompt.on(CompletionRecord("P", " C", "d")) == CompletionRecord("Task d: do.\n\nP", " C", "d")
    assert prompt.on(TextRecord("t")) == TextRecord("t")
    assert Prompt().is_empty and Prompt().on(choice) is choice
    wrapped = Prompt("y", template="<q>{{ prompt }}</q>")
    assert wrapped.on(choice).prompt == "<q>Q?</q>"  # type: ignore[union-attr]


def test_training_and_inference_switch_apart() -> None:
    records = [CompletionRecord("P", " C", "d")]
    splits = Splits(list(records), list(records), list(records), "s")
    for train in (True, False):
        for inference in (True, False):
            prompt = Prompt("x", system="S", train=train, inference=inference)
            done = prompt.on_splits(splits, TOKENIZER)
            assert [next(iter(part)).prompt.startswith("S") for part in (done.train, done.validation, done.test)] == [
                train,
                train,
                inference,
            ]


def test_bad_templates_name_the_variable_and_the_record() -> None:
    with pytest.raises(ValueError, match="names the undefined variable 'promt'; there are prompt, task, instruction"):
        Prompt("x", template="{{ promt }}")
    with pytest.raises(ValueError, match=r"lacks \{\{ prompt \}\}"):
        Prompt("x", template="{{ task }}")
    with pytest.raises(ValueError, match=r"prompt\.system:1: not valid Jinja"):
        Prompt("x", system="{{ task")
    with pytest.raises(ValueError, match=r"no instruction for the task 'c' \(task c, the record that begins 'Who"):
        Prompt("x", system="{{ instruction }}").on(CompletionRecord("Who is it?", " me", "c"))
    with pytest.raises(ValueError, match=r"prompt\.template:1: not valid Jinja \(No filter named 'shout'"):
        Prompt("x", template="{{ prompt | shout }}")
    with pytest.raises(ValueError, match=r"no attribute 'question' \(task c, the record that begins 'Who"):
        Prompt("x", template="{{ prompt.question }} {{ instruction }}").on(CompletionRecord("Who is it?", " me", "c"))
    with pytest.raises(ValueError, match=r"mine\.txt:2: not valid Jinja"):
        from_text("fine\n{{ prompt", "mine.txt")
    with pytest.raises(ValueError, match=r"mine\.txt names the undefined variable 'user'"):
        from_text("{{ user }}", "mine.txt")


def test_a_chat_template_takes_the_parts_as_turns() -> None:
    tokenizer = TOKENIZER
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    prompt = Prompt("x", system="S", chat=template)
    assert prompt.render("P", "t", tokenizer) == "<s>[system]S[user]P[assistant]"
    no_system = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}" + (
        "[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    asked = Prompt("x", system="S", chat=no_system).render("P", "t", tokenizer)
    assert asked == "[user]S\n\nP[assistant]", "what stands before the answer, also where generation would not begin so"


def test_presets_and_a_file_of_ones_own(tmp_path: Path) -> None:
    made = config()
    tokenizer = parts.load_tokenizer(made.model)
    assert parts.load_prompt(made, tokenizer).is_empty
    for name in ("task", "collaborative"):
        prompt = parts.load_prompt(config(f"prompt={name}"), tokenizer)
        assert prompt.render("Q", "holding").endswith("\n\nQ") and len(prompt.render("Q", "holding")) > 20
    file = tmp_path / "mine.txt"
    file.write_text("Be brief.\n")
    assert parts.load_prompt(config(f"prompt={file}"), tokenizer).render("Q", "t") == "Be brief.\n\nQ"
    file.write_text("Q: {{ prompt }} A:")
    assert parts.load_prompt(config(f"prompt={file}"), tokenizer).render("Q", "t") == "Q: Q A:"
    with pytest.raises(ValueError, match=r"prompt=\./nothing\.txt: there is no such file"):
        config("prompt=./nothing.txt")
    with pytest.raises(ValueError, match=r"prompt\.path is not set"):
        parts.load_prompt(config("prompt=file"), tokenizer)
    with pytest.raises(ValueError, match=r"has no chat template.*take an instruct model.*chat_template\.jinja"):
        parts.load_prompt(config("prompt.chat=always"), tokenizer)


def test_the_cost_is_counted_and_a_prompt_survives_its_file() -> None:
    prompt = Prompt("x", system=LONG)
    records = [CompletionRecord(f"the party {i}", " may", "t") for i in range(5)]
    cost = prompt.cost(records, TOKENIZER, 200)
    added = len(TOKENIZER(LONG.strip() + "\n\n", add_special_tokens=False)["input_ids"])
    assert cost["tokens_added"] == pytest.approx(added, abs=3) and cost["shared_prefix_tokens"] >= added - 1
    assert cost["share_of_context"] == pytest.approx(added / 200, abs=0.02)
    assert Prompt().cost(records, TOKENIZER, 200)["tokens_added"] == 0
    assert Prompt.from_plain(json.loads(json.dumps(prompt.plain())), "x") == prompt
    with pytest.raises(ValueError, match=r"p\.json: unknown keys \['sytem'\]"):
        Prompt.from_plain({"sytem": "x"}, "p.json")


def test_a_shared_prefix_is_read_once_and_changes_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """All three ways of scoring, with the prefix shared and not; and fewer tokens pass through the model."""
    torch.manual_seed(0)
    model = tiny_model("llama", "gqa", vocabulary=VOCABULARY)
    model.config.max_position_embeddings = 512
    prompt = Prompt("x", system=LONG)
    records = [prompt.on(record) for record in RECORDS if not isinstance(record, TextRecord)] * 2
    kwargs = {"max_length": 256, "batch_size": 4, "max_new_tokens": 6, "max_generate": 4}
    seen = [0]

    def count(module: object, args: object, kwargs: dict) -> None:
        seen[0] += kwargs["input_ids"].numel()

    model.register_forward_pre_hook(count, with_kwargs=True)
    shared = evaluate(model, TOKENIZER, records, **kwargs)
    tokens_shared, seen[0] = seen[0], 0
    monkeypatch.setattr(reading, "_FEWEST_SHARING", 10**9)
    apart = evaluate(model, TOKENIZER, records, **kwargs)
    assert tokens_shared < 0.7 * seen[0]
    assert shared.values == pytest.approx(apart.values, rel=1e-4)
    assert shared.counts == apart.counts


def test_sequences_that_are_one_prefix_of_another_are_scored_whole() -> None:
    model = tiny_model("llama", "gqa", vocabulary=VOCABULARY)
    encoder = Encoder(TOKENIZER, 64, close=False)
    ids = TOKENIZER("the court holds that the party may recover damages " * 2, add_special_tokens=False)["input_ids"]
    prompts = [[1, *ids[:n]] for n in (20, 24, 28, 20, 22)]
    how = {"batch_size": 2, "pad_id": encoder.pad_id, "device": CPU}
    with scoring.evaluating(model):
        together = scoring.greedy(model, prompts, stops=[], max_new_tokens=5, **how)
        alone = [scoring.greedy(model, [one], stops=[], max_new_tokens=5, **how)[0] for one in prompts]
    assert together == alone


def test_a_method_brings_its_prompt_along_unless_another_is_chosen() -> None:
    made = config("prune=compresso", "prompt.inference=false")
    tokenizer = parts.load_tokenizer(made.model)
    brought = parts.load_prompt(made, tokenizer)
    assert "made smaller" in brought.system and brought.train and not brought.inference
    assert parts.load_prompt(config("prompt=collaborative"), tokenizer).system == brought.system
    assert parts.load_prompt(config("prune=compresso", "prompt=task"), tokenizer).name == "task"
    assert parts.load_prompt(config("prune=compresso", "prompt=none"), tokenizer).is_empty
    with pytest.raises(ValueError, match=r"prompt\.system is empty"):
        parts.load_prompt(config("prune=compresso", "prompt.system=' '"), tokenizer)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "overrides", "used", "told"),
    [
        (CHATML.replace("<|im_end|>", "</s>"), [], True, "through the base's chat template (it is an instruct model)"),
        (CHATML.replace("<|im_end|>", "</s>"), ["prompt.chat=never"], False, ""),
        (CHATML, [], False, "does not stop where that ends a turn"),
        (CHATML, ["prompt=task"], True, "through the base's chat template (prompt=task)"),
        (CHATML, ["prompt.chat=always"], True, "through the base's chat template (prompt.chat=always)"),
        (CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif"), ["prompt=task"], False, "otherwise than"),
        (None, [], False, ""),
    ],
)
def test_whether_prompts_go_through_a_template_is_decided_and_told(
    template: str | None, overrides: list[str], used: bool, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = config(*overrides)
    tokenizer = parts.load_tokenizer(made.model)
    tokenizer.chat_template = template
    with caplog.at_level("INFO"):
        prompt = parts.load_prompt(made, tokenizer)
    assert prompt.chat == (template if used else None) and told in caplog.text
    assert (prompt.name == "chat template") == (used and "prompt=task" not in overrides)
    if "prompt.chat=never" in overrides:
        assert not caplog.text


def test_an_export_stops_at_the_end_of_the_turns_that_it_learnt() -> None:
    tokenizer = parts.load_tokenizer(config().model)
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<pad>")
    end, own = tokenizer.convert_tokens_to_ids("<pad>"), GenerationConfig(eos_token_id=1)
    chats = [ChatRecord(({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}))]
    texts = [TextRecord("t")]
    for prompt, records, stops in (
        (Prompt("x", chat=tokenizer.chat_template), texts, [1, end]),
        (Prompt(), chats, [1, end]),
        (Prompt("x", chat=tokenizer.chat_template, train=False), texts, 1),
        (Prompt(), texts, 1),
    ):
        splits = Splits(list(records), list(records), list(records), "s")
        made = parts.export_generation(own, prompt, splits, tokenizer)
        assert made is not None and made.eos_token_id == stops
    assert own.eos_token_id == 1 and parts.export_generation(None, Prompt(), splits, tokenizer) is None
