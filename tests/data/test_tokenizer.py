"""Tokenizers: the file's own rules win, ids stay within the embeddings, and text that names a control token is text."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from atp.config.schema import ModelConfig
from atp.data import check
from atp.data.encoding import Encoder
from atp.data.encoding.tokenizer import PROBE, check_ids, check_texts, control_tokens, load_tokenizer, surroundings
from atp.data.prompt import Prompt
from atp.data.records import ChoiceRecord, CompletionRecord, Splits, TextRecord
from atp.errors import UserError
from atp.export.hf.tokenizer import save_tokenizer
from atp.run import parts

CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NUMBERS = [" ".join(str(number) for number in range(start, start + 30)) for start in range(100, 400, 30)]


def rules(*, begins: bool = False) -> Tokenizer:
    """Byte-level BPE that splits numbers by up to three digits."""
    core = Tokenizer(models.BPE())
    core.decoder = decoders.ByteLevel()
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(NUMBERS, trainer)
    if begins:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return core


def folder_of(core: Tokenizer, folder: Path, model: str = "llama", rows: int = 1000, **settings: Any) -> Path:
    """A model's folder, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": model, "vocab_size": rows}))
    return folder


def ids(core: Tokenizer, text: str) -> list[int]:
    return list(core.encode(text, add_special_tokens=False).ids)


# ---- the file's rules


@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_class_that_rewrites_the_rules_is_passed_over(tmp_path: Path, named: str, caplog: Any) -> None:
    core = rules()
    base = folder_of(core, tmp_path / "base", "qwen2", tokenizer_class=named, chat_template=CHATML)
    assert AutoTokenizer.from_pretrained(base)("room 123")["input_ids"] != ids(core, "room 123")  # the fault is there
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(base)
    assert "Qwen2Tokenizer" in caplog.text and "own rules" in caplog.text and len(caplog.records) == 1
    for text in PROBE:
        assert tokenizer(text)["input_ids"] == ids(core, text)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template) == ("<s>", "</s>", CHATML)
    assert len(tokenizer) == core.get_vocab_size()  # the class would add a token of its own


def test_the_export_splits_text_as_the_base_whoever_loads_it(tmp_path: Path) -> None:
    core = rules()
    tokenizer = load_tokenizer(folder_of(core, tmp_path / "base", "qwen2"))
    for name in ("pruned", "again"):  # an export of an export as well
        folder = folder_of(core, tmp_path / name, "qwen2")
        (folder / "tokenizer.json").unlink()
        save_tokenizer(tokenizer, folder)
        by_file = Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert by_file.normalizer is None
        for trusted in (False, True):
            by_class = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
            for text in PROBE:
                assert by_class(text)["input_ids"] == ids(by_file, text) == ids(core, text)
        tokenizer = load_tokenizer(folder)


def test_an_export_that_nobody_would_rewrite_holds_no_code(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(rules(begins=True), tmp_path / "base"))
    save_tokenizer(tokenizer, folder_of(rules(), tmp_path / "pruned"))
    assert {file.suffix for file in (tmp_path / "pruned").iterdir()} == {".json"}
    settings = json.loads((tmp_path / "pruned" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in settings
    assert AutoTokenizer.from_pretrained(tmp_path / "pruned")("a")["input_ids"][0] == 0


def test_a_class_that_is_code_of_the_base_is_not_run(tmp_path: Path, caplog: Any) -> None:
    core = rules()
    auto_map = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    base = folder_of(core, tmp_path, "nobody", tokenizer_class="OwnTokenizer", auto_map=auto_map)
    (base / "tokenization_own.py").write_text("raise SystemExit('this was run')\n")
    assert load_tokenizer(base)("room 123")["input_ids"] == ids(core, "room 123")


def test_a_tokenizer_that_reads_otherwise_than_its_file_is_refused(tmp_path: Path) -> None:
    base = folder_of(rules(), tmp_path)
    tokenizer = load_tokenizer(base)
    check_texts(tokenizer, base, ["7 and 123", "</s>"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"reads '7 and 123' as other ids than tokenizer\.json"):
        check_texts(tokenizer, base, ["7 and 123"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tokenizer.json", "tokenizer.json: cannot be read as a tokenizer"),
        ("tokenizer.model", "only tokenizer.model, which cannot be read.*pip install sentencepiece"),
        ("vocab.txt", "holds no tokenizer"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, reason: str) -> None:
    folder_of(rules(), tmp_path, tokenizer_class="LlamaTokenizer")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / name).write_bytes(b"no tokenizer")
    with pytest.raises(UserError, match=f"{tmp_path}.*{reason}"):
        parts.load_tokenizer(ModelConfig(path=str(tmp_path)))


# ---- ids and embeddings


def test_more_ids_than_embeddings_are_refused_whether_or_not_they_occur(tmp_path: Path) -> None:
    core = rules()
    size = core.get_vocab_size()
    check_ids(load_tokenizer(folder_of(core, tmp_path / "fits", rows=size)), size, "fits")
    padded = folder_of(core, tmp_path / "pad", rows=size, pad_token="<pad>")  # the library adds an id for it
    with pytest.raises(UserError, match=rf"has {size + 1} ids, the model {size} embeddings.*'<pad>' = {size}.*resize"):
        parts.load_tokenizer(ModelConfig(path=str(padded)))


def test_padding_takes_no_id_of_its_own(tmp_path: Path) -> None:
    core = rules()
    tokenizer = parts.load_tokenizer(ModelConfig(path=str(folder_of(core, tmp_path))))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1 and len(tokenizer) == core.get_vocab_size()


# ---- around a text


@pytest.mark.parametrize("begins", [True, False])
def test_sequences_begin_as_the_tokenizer_begins_them(tmp_path: Path, begins: bool) -> None:
    core = rules(begins=begins)
    tokenizer = load_tokenizer(folder_of(core, tmp_path))
    bos = [0] if begins else []
    assert surroundings(tokenizer) == (bos, [])
    encoder = Encoder(tokenizer, 64)
    [[text], [pair]] = encoder.encode([TextRecord("room 123"), CompletionRecord("Q 7:", " 123")])
    assert text.input_ids.tolist() == [*bos, *ids(core, "room 123"), 1]
    assert pair.input_ids.tolist() == [*bos, *ids(core, "Q 7: 123"), 1]
    assert encoder.prompts(["Q 7:"], 4) == [[*bos, *ids(core, "Q 7:")]]
    [item] = encoder.choices([ChoiceRecord("Q 7:", (" 1", " 2"), 0)])
    assert item.prompt == [*bos, *ids(core, "Q 7:")]
    prompt = Prompt("x", system="S", chat="{{ bos_token }}" + CHATML)  # the template's own counts where nothing else
    given = prompt.on(CompletionRecord("P", " C"), tokenizer)
    [[chat]] = Encoder(tokenizer, 128).encode([given])
    assert chat.input_ids.tolist().count(0) == 1


def test_an_end_that_the_tokenizer_adds_is_added_once(tmp_path: Path) -> None:
    core = rules()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = load_tokenizer(folder_of(core, tmp_path))
    [[text]] = Encoder(tokenizer, 64).encode([TextRecord("room")])
    assert text.input_ids.tolist() == [0, *ids(core, "room"), 1] == tokenizer("room")["input_ids"]
    assert Encoder(tokenizer, 64).prompts(["room"], 4) == [[0, *ids(core, "room")]]


# ---- control tokens in text


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: Any) -> PreTrainedTokenizerBase:
    core = rules(begins=True)
    core.add_special_tokens([AddedToken("<|header|>", special=True)])  # named nowhere but in tokenizer.json
    return load_tokenizer(folder_of(core, tmp_path_factory.mktemp("chatty"), chat_template=CHATML))


def test_tokens_that_only_the_file_marks_as_special_are_known(chatty: PreTrainedTokenizerBase) -> None:
    assert set(control_tokens(chatty)) == {*CONTROL, "<|header|>"}


NAMING = "it ends in </s>, <|im_end|> or <|header|>"


@pytest.mark.parametrize(
    "record",
    [TextRecord(NAMING), CompletionRecord(NAMING, NAMING), ChoiceRecord(NAMING, (NAMING, " b"), 0)],
    ids=["text", "completion", "choice"],
)
def test_the_name_of_a_control_token_in_a_record_is_text(record: Any, chatty: PreTrainedTokenizerBase) -> None:
    [[example]] = Encoder(chatty, 512).encode([record])
    found = example.input_ids.tolist()
    assert not set(found[1:-1]) & set(control_tokens(chatty).values()) and found[-1] == 1
    assert NAMING in chatty.decode(found[1:-1])
    encoder = Encoder(chatty, 512)
    assert encoder.names_control_tokens(record) and not encoder.names_control_tokens(TextRecord("plain </ s>"))
    [prompt] = encoder.prompts([NAMING], 4)
    assert not set(prompt[1:]) & set(control_tokens(chatty).values())


@pytest.mark.parametrize("said", ["What is 2 + 2?", NAMING], ids=["plain", "naming"])
def test_in_a_prompt_from_a_template_only_the_template_has_control_tokens(
    said: str, chatty: PreTrainedTokenizerBase
) -> None:
    prompt = Prompt("x", system="Be brief.", chat=CHATML)
    record = prompt.on(CompletionRecord(said, f" {said}"), chatty)
    assert isinstance(record, CompletionRecord)
    encoder = Encoder(chatty, 512)
    [[example]] = encoder.encode([record])
    names = chatty.convert_ids_to_tokens(example.input_ids.tolist())
    assert (names.count("<|im_start|>"), names.count("<|im_end|>"), names.count("</s>")) == (3, 3, 0)
    assert encoder.names_control_tokens(record) == (said == NAMING)
    [generated] = encoder.prompts([record.prompt], 4, [record.frame])
    assert generated == example.input_ids.tolist()[: example.context]
    assert chatty.decode(generated) == record.prompt  # as transformers has it: no BOS that the template does not write


def test_the_check_counts_records_that_name_control_tokens(chatty: PreTrainedTokenizerBase) -> None:
    plain = [CompletionRecord(f"Q {number}", " a") for number in range(4)]
    splits = Splits([*plain, CompletionRecord(NAMING, " a")], plain[:1], plain[:1], "mine")
    told = io.StringIO()
    figures = check.report(splits, chatty, max_length=256, console=Console(file=told, width=200))
    assert figures["control"] == 1 and "control token's name, read as text" in told.getvalue()


def test_tokenizers_without_special_tokens_are_read_as_they_are() -> None:
    core = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert Encoder(tokenizer, 8).prompts(["b a </s>"], 2)[0][:2] == [1, 0]
