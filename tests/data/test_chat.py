"""Conversations: what the assistant says is learnt, all of it and nothing else, in the model's own chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from atp import embedded
from atp.data.batches.store import TokenStore
from atp.data.encoding import IGNORED, Encoder, Example
from atp.data.encoding import cache as cache_module
from atp.data.encoding.cache import TokenCache
from atp.data.encoding.chat import ChatTemplate
from atp.data.prompt import Prompt
from atp.data.records import ChatRecord, Splits
from atp.data.records.chat import chat_record
from atp.data.sources import load_files

CHATML = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
FORGETFUL = (  # leaves out the reasoning of earlier turns
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHERWISE = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does the court hold?"},
    {"role": "assistant", "content": "That the claim fails."},
    {"role": "user", "content": "Why so?"},
    {"role": "assistant", "content": "It was late."},
]


def tokenizer_with(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(embedded.base_dir())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.split_special_tokens = False  # as other bases have it: the template's control tokens are tokens
    tokenizer.chat_template = template
    return tokenizer


SHARED = {name: tokenizer_with(text) for name, text in {"plain": CHATML, "marked": MARKED}.items()}


def record(turns: list[dict[str, Any]] | None = None, **more: Any) -> ChatRecord:
    return chat_record({"messages": TURNS if turns is None else turns, **more}, "chat.jsonl:3")


def learnt(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The stretches that are learnt, as text."""
    marks = example.labels != IGNORED
    edges = np.flatnonzero(np.diff(np.concatenate([[0], marks.astype(int), [0]])))
    return [tokenizer.decode(example.input_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>\n"), (MARKED, "<|im_end|>")])
def test_the_assistants_turns_are_learnt_and_no_others(template: str, end: str) -> None:
    tokenizer = tokenizer_with(template)
    [[example]] = Encoder(tokenizer, 256).encode([record()])
    assert learnt(example, tokenizer) == [f"That the claim fails.{end}", f"It was late.{end}"]
    expected = tokenizer.apply_chat_template([dict(turn) for turn in TURNS], tokenize=True, return_dict=True)
    assert example.input_ids.tolist() == expected["input_ids"]
    assert example.loss_tokens == int((example.labels != IGNORED).sum())
    assert example.text_bytes == len("That the claim fails.It was late.") + 2 * end.count("\n")
    [[everything]] = Encoder(tokenizer, 256).encode([record()], "all")
    assert everything.loss_tokens == len(everything.input_ids) - 1
    [[scored]] = Encoder(tokenizer, 256, close=False).encode([record()])
    assert learnt(scored, tokenizer) == ["That the claim fails.", "It was late."]


words = st.text("abc de.\n<é日", min_size=1, max_size=20).filter(str.strip)
said = st.one_of(words, words.map(lambda text: text + "<|im_end|>"))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(said, said), min_size=1, max_size=4), st.booleans(), st.sampled_from(["plain", "marked"]))
def test_whatever_is_said_the_mask_is_what_the_assistant_says(
    pairs: list[tuple[str, str]], system: bool, name: str
) -> None:
    tokenizer = SHARED[name]
    turns = [{"role": "system", "content": "Be brief."}] if system else []
    for asked, answered in pairs:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    [[example]] = Encoder(tokenizer, 2048).encode([record(turns)])
    found = learnt(example, tokenizer)
    assert [text.removesuffix("\n").removesuffix("<|im_end|>") for text in found] == [answer for _, answer in pairs]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(example.input_ids) == whole
    # What stands in a turn is text: as many control tokens as the template has, whatever is said.
    control = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert example.input_ids.tolist().count(control) == len(turns)


def test_what_comes_before_a_turn_is_what_generation_sees() -> None:
    for template in (CHATML, MARKED, ALTERNATING):
        tokenizer = tokenizer_with(template)
        turns = TURNS[1:]
        encoder = Encoder(tokenizer, 256)
        [[example]] = encoder.encode([record(turns)])
        [prompt] = encoder.chat_prompts([record(turns)], 8)
        assert example.input_ids[: len(prompt)].tolist() == prompt
        assert (
            prompt == tokenizer.apply_chat_template(turns[:3], tokenize=True, add_generation_prompt=True)["input_ids"]
        )


def test_a_template_that_forgets_gives_a_sequence_a_turn(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_with(FORGETFUL)
    turns = [*TURNS[:2], {"role": "assistant", "content": "<think>so</think>Yes."}, *TURNS[3:]]
    [found] = Encoder(tokenizer, 256).encode([record(turns)])
    assert [learnt(one, tokenizer) for one in found] == [
        ["<think>so</think>Yes.<|im_end|>\n"],
        ["It was late.<|im_end|>\n"],
    ]
    assert "so</think>" not in tokenizer.decode(found[1].input_ids) and "sequence of its own" in caplog.text


def test_what_is_too_long_goes_on_in_further_sequences() -> None:
    tokenizer = tokenizer_with(CHATML)
    turns = [TURNS[0]]
    for i in range(8):
        turns += [
            {"role": "user", "content": f"Question {i}, please?"},
            {"role": "assistant", "content": f"Answer {i}."},
        ]
    whole = len(Encoder(tokenizer, 4096).encode([record(turns)])[0][0].input_ids)
    encoder = Encoder(tokenizer, whole // 3)
    [found] = encoder.encode([record(turns)])
    assert 3 <= len(found) <= 8 and all(len(one.input_ids) <= whole // 3 for one in found)
    assert [text for one in found for text in learnt(one, tokenizer)] == [f"Answer {i}.<|im_end|>\n" for i in range(8)]
    assert all("Be brief." in tokenizer.decode(one.input_ids) for one in found)
    assert encoder.truncated == {"prompts": 0, "completions": 0, "texts": 0, "chats": 1}


def test_a_single_long_exchange_is_cut_as_a_prompt_is(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_with(CHATML)
    asked = [{"role": "user", "content": "please " * 100}, {"role": "assistant", "content": "Yes."}]
    encoder = Encoder(tokenizer, 64)
    [[example]] = encoder.encode([record(asked)])
    assert len(example.input_ids) == 64 and learnt(example, tokenizer) == ["Yes.<|im_end|>\n"]
    assert encoder.truncated["prompts"] == 1
    [[example]] = encoder.encode([record([TURNS[1], {"role": "assistant", "content": "please " * 100}])])
    assert len(example.input_ids) == 64 and encoder.truncated["completions"] == 1
    encoder.check_answers("mine")
    assert "mine: 1 of 2 answers are longer than data.max_length=64" in caplog.text


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (None, TURNS, r"chat\.jsonl:3: this is a conversation.*no chat template.*instruct model.*data\.fields"),
        (
            ALTERNATING,
            [TURNS[1], TURNS[3], TURNS[2]],
            r"chat\.jsonl:3: the chat template refuses.*roles must alternate",
        ),
        (NO_SYSTEM, TURNS, r"chat\.jsonl:3: the chat template leaves out the system turn 'Be brief"),
        (
            OTHERWISE,
            TURNS,
            r"chat\.jsonl:3: the chat template writes an assistant's turn otherwise.*\{% generation %\}",
        ),
    ],
)
def test_what_the_template_cannot_write_is_refused(template: str | None, turns: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(tokenizer_with(template)).check(record(turns))


def test_tools_are_kept_or_refused() -> None:
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    calls = [{"type": "function", "function": {"name": "look_up", "arguments": '{"year": 1999}'}}]
    turns = [
        TURNS[1],
        {"role": "assistant", "content": None, "tool_calls": json.dumps(calls)},
        {"role": "tool", "content": "1999: nothing"},
        {"role": "assistant", "content": "Nothing."},
    ]
    tokenizer = tokenizer_with(CHATML)
    made = record(turns, tools=json.dumps(tools))
    [[example]] = Encoder(tokenizer, 512).encode([made])
    found = learnt(example, tokenizer)
    assert '"arguments": {"year": 1999}' in found[0] and found[1] == "Nothing.<|im_end|>\n"
    assert "look_up" in tokenizer.decode(example.input_ids[:60]) and "1999: nothing" not in "".join(found)
    legacy = [turns[0], {"role": "assistant", "content": None, "function_call": calls[0]["function"]}, *turns[2:]]
    assert record(legacy).messages[1]["tool_calls"][0]["function"]["arguments"] == {"year": 1999}
    with pytest.raises(ValueError, match="leaves out the tool 'look_up'"):
        ChatTemplate(tokenizer_with(FORGETFUL)).check(record(TURNS, tools=tools))


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "must be a list of turns"),
        ("hello", "must be a list of turns, got str 'hello'"),
        ([{"role": "bard", "content": "x"}], r"messages\[0\]: unknown role 'bard'; known: system"),
        ([TURNS[1], {"role": "assistant", "content": " "}], r"messages\[1\]: the assistant's turn is empty"),
        ([TURNS[1], {"role": "assistant"}], r"messages\[1\]: the assistant's turn is empty"),
        ([TURNS[1]], "no assistant's turn"),
        ([TURNS[2]], "speaks before any user"),
        ([TURNS[1], TURNS[0], TURNS[2]], r"messages\[1\]: a system turn stands at the beginning only"),
        ([TURNS[1], {"role": "assistant", "content": "a\ud83d"}], r"messages\[1\]\.content is not valid text"),
        ([TURNS[1], {"role": "assistant", "content": [{"type": "image_url"}]}], "image_url.*is not text"),
        ([TURNS[1], {**TURNS[2], "weight": 0}], r"weight, train"),
        ([TURNS[1], {**TURNS[2], "name": "a\ud83d"}], r"messages\[1\] is not valid text"),
    ],
)
def test_a_bad_conversation_is_named_with_its_place(turns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^chat\.jsonl:3: .*" + message):
        record(turns)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_messages_and_conversations_are_the_same_in_every_format(tmp_path: Path, kind: str) -> None:
    import pyarrow
    from pyarrow import parquet

    names = {"user": "human", "assistant": "gpt", "system": "system"}
    openai = [{"messages": [*TURNS[:1], {**TURNS[1], "content": f"Question {i}?"}, *TURNS[2:]]} for i in range(30)]
    sharegpt = [
        {"conversations": [{"from": names[t["role"]], "value": t["content"]} for t in row["messages"]]}
        for row in openai
    ]
    found = []
    for name, rows in (("a", openai), ("b", sharegpt)):
        file = tmp_path / f"{name}.{kind}"
        if kind == "parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        elif kind == "json":
            file.write_text(json.dumps(rows))
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        template = ChatTemplate(SHARED["plain"])
        found.append(load_files(file, seed=0, near_duplicates="ignore", check=template.check))
    assert found[0] == found[1] and found[0].counts() == {"train": 26, "validation": 2, "test": 2}
    assert "are read as chat" in found[0].notes[-1]


def test_masks_survive_the_cache_and_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "FEWEST_RECORDS", 1)
    records = [record(), record(TURNS[1:])]
    plain = [one for some in Encoder(SHARED["plain"], 256).encode(records) for one in some]
    stored = list(TokenStore(records, Encoder(SHARED["plain"], 256), "auto"))
    cached = [TokenCache(tmp_path).examples(records, Encoder(SHARED["plain"], 256), "auto") for _ in range(2)]
    for found in (stored, *cached):
        assert [(one.input_ids.tolist(), one.given, one.context) for one in found] == [
            (one.input_ids.tolist(), one.given, one.context) for one in plain
        ]
    other = TokenCache(tmp_path).examples(records, Encoder(SHARED["marked"], 256), "auto")
    assert other[0].given != plain[0].given  # another template is other data


def test_a_prompt_becomes_the_system_turn() -> None:
    prompt = Prompt("mine", system="Work with what is left.")
    with_system = prompt.on(record())
    assert isinstance(with_system, ChatRecord)
    assert with_system.messages[0]["content"] == "Work with what is left.\n\nBe brief."
    without = prompt.on(record(TURNS[1:]))
    assert isinstance(without, ChatRecord) and without.messages[0] == {
        "role": "system",
        "content": "Work with what is left.",
    }
    splits = prompt.on_splits(Splits([record()], [record()], [record()], "x"), SHARED["plain"])
    assert splits.test == [with_system]


def test_a_model_is_scored_and_continued_on_conversations() -> None:
    from conftest import tiny_model

    from atp.evaluate.quality import evaluate, samples

    tokenizer = SHARED["plain"]
    model = tiny_model(vocabulary=len(tokenizer))
    metrics = evaluate(
        model, tokenizer, [record(TURNS[1:3]), record(TURNS[1:])], max_length=64, batch_size=2, max_new_tokens=4
    )
    assert metrics.values["chat/perplexity"] > 1 and metrics.counts["chat/rougeL"] == 2
    [sample] = samples(model, tokenizer, [record(TURNS[1:3])], count=1, max_new_tokens=4, max_length=64)
    assert sample.reference == "That the claim fails." and sample.prompt.endswith("<|im_start|>assistant\n")
