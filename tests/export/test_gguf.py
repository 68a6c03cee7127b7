"""GGUF files: their structure read back by the gguf reader, and their logits, text and types in llama.cpp."""

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_architecture import CASES, LAYERS, SHAPES, VOCAB, dense_model, pruned_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from atp import embedded
from atp.commands.export import embedded_text
from atp.export.extras import Package
from atp.export.formats import FORMATS
from atp.export.gguf.file import QUANTISER_TYPES, WRITTEN_TYPES, check_types, export_gguf
from atp.export.gguf.k_quants import tensor_types
from atp.export.gguf.layout import FILLED_NOTE, gguf_architecture, gguf_layout
from atp.export.gguf.tensors import GgufTensor
from atp.export.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, gguf_vocabulary
from atp.export.hf.loading import load_exported
from atp.export.hf.writing import export_hf
from atp.export.llama_cpp.engine import LlamaCppEngine
from atp.export.verify.limits import verdict
from atp.export.verify.rounding import ROUNDINGS, rounding_error
from atp.export.verify.verification import verify
from atp.model.widths import LayerWidths, build_model, pruned_config

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install 'atp[gguf]'")

CELLS = [
    ("llama-mha", "uniform", "llama"),
    ("llama-mha", "uniform-not-dividing", "llama"),
    ("llama-gqa-tied-rope3", "per-layer", "deci"),
    ("llama-gqa-tied-rope3", "no-attention-first", "deci"),
    ("llama-mqa-biases", "no-ffn", "deci"),
    ("mistral-gqa", "empty-layer", "deci"),
    ("qwen2-gqa", "dense", "qwen2"),
    ("qwen2-gqa", "uniform-not-dividing", "llama"),
    ("qwen2-gqa", "per-layer", "deci"),
    ("qwen3-mqa-tied", "uniform", "qwen3"),
    ("qwen3-mqa-tied", "no-attention-first", "openelm"),
    ("qwen3-gqa-untied", "per-layer", "qwen3"),
    ("qwen3-gqa-untied", "empty-layer", "qwen3"),
]
IDS = torch.arange(4, 28)[None] % VOCAB
TYPES = [*WRITTEN_TYPES, *QUANTISER_TYPES]


def exported(tmp_path: Path, case: str, shape: str) -> tuple[PreTrainedModel, Path]:
    model = pruned_model(dense_model(CASES[case]), CASES[case], SHAPES[shape])
    export_hf(model, None, tmp_path / "model")
    return model, tmp_path / "model"


def field(reader, name: str):
    return reader.get_field(name).contents()


def logits_of_file(path: Path, config, layers: int = LAYERS) -> torch.Tensor:
    """Logits of a PyTorch model made from nothing but the file's tensors and widths."""
    reader = gguf.GGUFReader(path)
    architecture = field(reader, "general.architecture")

    def per_layer(name: str) -> list[int]:
        value = field(reader, f"{architecture}.{name}")
        return value if isinstance(value, list) else [value] * layers

    head_dim = field(reader, f"{architecture}.attention.key_length")
    counts = zip(
        *(per_layer(n) for n in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")), strict=True
    )
    widths = [LayerWidths(heads, kv_heads, head_dim, channels) for heads, kv_heads, channels in counts]
    tensors = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    tensors.pop("rope_freqs.weight", None)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = {
        **{"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"},
        **{"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
        **{"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
        **{"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    }
    state = {}
    for name, tensor in tensors.items():
        stem, kind = name.rsplit(".", 1)
        if not stem.startswith("blk."):
            state[f"{names[stem]}.{kind}"] = tensor
            continue
        _, index, part = stem.split(".")
        layer = widths[int(index)]
        prefix = f"model.layers.{index}."
        if part == "attn_qkv":
            sizes = [count * head_dim for count in (layer.num_attention_heads, *[layer.num_key_value_heads] * 2)]
            for module, rows in zip("qkv", tensor.split(sizes), strict=True):
                state[f"{prefix}self_attn.{module}_proj.{kind}"] = rows
            continue
        if part in ("attn_q", "attn_k") and architecture in ("llama", "deci"):
            heads = layer.num_attention_heads if part == "attn_q" else layer.num_key_value_heads
            # neighbours back to halves
            tensor = tensor.reshape(heads, head_dim // 2, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        state[f"{prefix}{parts[part]}.{kind}"] = tensor
    model = build_model(pruned_config(config, widths), dtype=torch.float32)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    for name in missing:  # biases of a zeroed block that stands for an absent one
        assert name.endswith(".bias"), name
        model.get_parameter(name).data.zero_()
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(("case", "shape", "architecture"), CELLS)
def test_file_holds_the_models_function_in_the_architecture_llama_cpp_needs(tmp_path, case, shape, architecture):
    model, directory = exported(tmp_path, case, shape)
    (written,) = export_gguf(directory, types=["f32"], tokenizer=False)
    assert written.architecture == architecture
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of_file(written.path, CASES[case].config()), model(IDS).logits, atol=1e-5, rtol=0
        )
    reader = gguf.GGUFReader(written.path)
    assert field(reader, "tokenizer.ggml.model") == "no_vocab"
    assert field(reader, f"{architecture}.rope.dimension_count") == CASES[case].config().head_dim
    assert field(reader, f"{architecture}.block_count") == LAYERS
    assert field(reader, f"{architecture}.attention.value_length") == field(
        reader, f"{architecture}.attention.key_length"
    )


@pytest.mark.parametrize("name", ["f16", "bf16", "q8_0"])
def test_types_round_matrices_and_leave_vectors_alone(tmp_path, name):
    model = pruned_model(dense_model(CASES["llama-mha"]), CASES["llama-mha"], SHAPES["per-layer"])
    export_hf(model, None, tmp_path / "model")
    (written,) = export_gguf(tmp_path / "model", types=[name], tokenizer=False)
    assert written.path.name == f"model-{name}.gguf" and written.size_bytes == written.path.stat().st_size
    with torch.no_grad():
        difference = (logits_of_file(written.path, CASES["llama-mha"].config()) - model(IDS).logits).abs().max()
    assert 0 < difference < 0.3
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(written.path).tensors}
    assert types["output_norm.weight"] == types["blk.0.attn_norm.weight"] == "F32"
    assert types["token_embd.weight"] == name.upper()
    # blocks of 32 do not divide the 5 channels of layer 1
    assert types["blk.1.ffn_down.weight"] == ("F16" if name == "q8_0" else name.upper())


def unpermute(path: Path, name: str, heads: int) -> None:
    """Undoes the permutation of one tensor of a file, in place."""
    (tensor,) = (t for t in gguf.GGUFReader(path, "r+").tensors if t.name == name)
    rows = tensor.data.reshape(heads, -1, 2, *tensor.data.shape[1:])
    tensor.data[:] = np.swapaxes(rows, 1, 2).reshape(tensor.data.shape).copy()


def swap(path: Path, first: str, second: str) -> None:
    """Swaps the contents of two tensors of a file, in place."""
    tensors = {t.name: t.data for t in gguf.GGUFReader(path, "r+").tensors}
    kept = tensors[first].copy()
    tensors[first][:] = tensors[second]
    tensors[second][:] = kept


CORRUPTIONS = {
    "queries not permuted": lambda path: unpermute(path, "blk.0.attn_q.weight", 4),
    "keys not permuted": lambda path: unpermute(path, "blk.3.attn_k.weight", 4),
    "gate and up swapped": lambda path: swap(path, "blk.2.ffn_gate.weight", "blk.2.ffn_up.weight"),
    "norms swapped": lambda path: swap(path, "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"),
    "layers swapped": lambda path: swap(path, "blk.0.attn_output.weight", "blk.3.attn_output.weight"),
}


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_0"])
def test_limits_tell_rounding_from_a_misread_tensor_in_every_type(tmp_path, name):
    case = CASES["llama-mha"]
    model, directory = exported(tmp_path, "llama-mha", "per-layer")
    (written,) = export_gguf(directory, types=[name], tokenizer=False)
    with torch.no_grad():
        reference = model(IDS).logits
    rounding = None if name == "f32" else rounding_error(model, IDS.numpy(), reference.numpy(), ROUNDINGS[name])

    def found(path: Path) -> str:
        difference = logits_of_file(path, case.config()) - reference
        largest, rms = float(difference.abs().max()), float(difference.square().mean().sqrt())
        measured = {"max_abs": largest, "rms": rms, "top1": 1.0}
        return verdict(measured, FORMATS["gguf"].limit, float(reference.std()), rounding)

    assert found(written.path) == ""
    for fault, corrupt in CORRUPTIONS.items():
        broken = tmp_path / "broken.gguf"
        shutil.copy(written.path, broken)
        corrupt(broken)
        assert "rms" in found(broken), fault


def test_rotary_scaling_of_llama3_is_written_as_factors(tmp_path):
    _, directory = exported(tmp_path, "llama-gqa-tied-rope3", "per-layer")
    (written,) = export_gguf(directory, types=["f32"], tokenizer=False)
    factors = {t.name: t.data for t in gguf.GGUFReader(written.path).tensors}["rope_freqs.weight"]
    # Llama 3.1: wavelengths above 16 / 1 are stretched eightfold, those between 16 / 4 and 16 / 1 in part.
    smooth = (16 / (2 * np.pi) - 1.0) / (4.0 - 1.0)
    assert factors == pytest.approx([1 / ((1 - smooth) / 8 + smooth), 8.0], rel=1e-5)


def test_blocks_that_are_absent_are_zeroed_only_where_llama_cpp_needs_them():
    layout = gguf_layout(pruned_model_config("llama-mha", "empty-layer"))
    assert [layer.num_attention_heads for layer in layout.widths] == [4, 0, 2, 0]
    assert [layer.intermediate_size for layer in layout.widths] == [24, 1, 5, 1]
    assert layout.fields["feed_forward_length"] == [24, 1, 5, 1]
    first = gguf_layout(pruned_model_config("llama-mha", "no-attention-first"))
    assert first.widths[0].num_attention_heads == 1
    filled = {tensor.name: tensor.sources for tensor in first.tensors}
    assert filled["blk.0.attn_q.weight"] == () and filled["blk.1.attn_q.weight"] != ()


def test_a_model_that_only_a_uniform_architecture_computes_is_filled_up_and_says_so(tmp_path, caplog):
    _, directory = exported(tmp_path, "qwen3-gqa-untied", "per-layer")
    (written,) = export_gguf(directory, types=["f16"], tokenizer=False)
    assert written.notes == (FILLED_NOTE,) and FILLED_NOTE in caplog.text
    layout = gguf_layout(pruned_model_config("qwen3-gqa-untied", "per-layer"))
    assert layout.fields["attention.head_count"] == 8 and layout.fields["feed_forward_length"] == 24


def slim_export(tmp_path: Path, channels: list[int], heads: int = 4) -> tuple[Path, LlamaConfig]:
    """An export of random weights whose layers have these FFN channels and heads, and the config of its base."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=len(channels),
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=True,
    )
    small = pruned_config(config, [LayerWidths(heads, heads // 2, 32, count) for count in channels])
    export_hf(build_model(small, dtype=torch.float32, initialize=True), None, tmp_path / "slim")
    return tmp_path / "slim", config


@pytest.mark.parametrize(("name", "bytes_each"), [("f32", 4), ("f16", 2), ("bf16", 2), ("q8_0", 34 / 32)])
def test_tensors_take_the_kept_parameters_times_their_bytes(tmp_path, name, bytes_each):
    """Within 1%; what is over is norms in float32 and channels filled up to blocks of 32."""
    directory, _ = slim_export(tmp_path, [1021, 1024, 1007])
    (written,) = export_gguf(directory, types=[name], tokenizer=False)
    parameters = sum(p.numel() for p in load_exported(directory).parameters())
    assert parameters * bytes_each <= written.tensor_bytes <= 1.01 * parameters * bytes_each
    assert written.size_bytes - written.tensor_bytes < 6000


def test_channels_are_filled_up_to_blocks_where_that_is_smaller(tmp_path):
    directory, config = slim_export(tmp_path, [260, 40, 256])
    floats, blocks = export_gguf(directory, types=["f16", "q8_0"], tokenizer=False)
    assert field(gguf.GGUFReader(floats.path), "deci.feed_forward_length") == [260, 40, 256]
    reader = gguf.GGUFReader(blocks.path)
    assert field(reader, "deci.feed_forward_length") == [288, 40, 256]
    tensors = {t.name: t for t in reader.tensors}
    down = gguf.quants.dequantize(tensors["blk.0.ffn_down.weight"].data, tensors["blk.0.ffn_down.weight"].tensor_type)
    assert down.shape == (256, 288) and not down[:, 260:].any() and down[:, :260].any()
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == "F16"
    expected = load_exported(directory)
    with torch.no_grad():
        difference = logits_of_file(blocks.path, config, layers=3) - expected(IDS).logits
    assert difference.square().mean().sqrt() < 0.05 * expected(IDS).logits.std()


def pruned_model_config(case: str, shape: str):
    return pruned_model(dense_model(CASES[case]), CASES[case], SHAPES[shape]).config


def test_sliding_window_limits_the_context_and_says_so():
    layout = gguf_layout(pruned_model_config("mistral-mha-tied-window", "per-layer"))
    assert layout.fields["context_length"] == 4
    assert "sliding window" in layout.notes[0]


@pytest.mark.parametrize(
    ("case", "change", "uniform", "message"),
    [
        ("qwen3-gqa-biases", {}, True, "no bias in its output projection"),
        ("llama-mha", {"hidden_act": "gelu"}, True, "only silu"),
    ],
)
def test_models_that_llama_cpp_cannot_compute_are_refused_before_training(case, change, uniform, message):
    config = CASES[case].config()
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        gguf_architecture(config, uniform=uniform)


def test_unknown_type_and_a_file_in_the_way_are_refused(tmp_path):
    _, directory = exported(tmp_path, "llama-mha", "uniform")
    with pytest.raises(ValueError, match=r"'f8' is not known; choose from f32, f16, bf16, q8_0"):
        check_types(["f8"])
    export_gguf(directory, types=["f16"], tokenizer=False)
    with pytest.raises(ValueError, match="exists; overwrite it"):
        export_gguf(directory, types=["f16"], tokenizer=False)
    export_gguf(directory, types=["f16"], tokenizer=False, overwrite=True)


def test_missing_tokenizer_is_named_with_the_ways_out(tmp_path):
    _, directory = exported(tmp_path, "llama-mha", "uniform")
    with pytest.raises(ValueError, match=r"holds no tokenizer.*--no-tokenizer"):
        export_gguf(directory)
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer in .* cannot be read"):
        export_gguf(directory)
    assert not (directory / "gguf").exists()


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["full", "interrupt"])
def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path, monkeypatch, error):
    _, directory = exported(tmp_path, "llama-mha", "uniform")
    (written,) = export_gguf(directory, types=["f16"], tokenizer=False)
    before = written.path.read_bytes()

    def fails(tensor, read):
        raise error

    monkeypatch.setattr(GgufTensor, "values", fails)
    with pytest.raises(type(error)):
        export_gguf(directory, types=["f16"], tokenizer=False, overwrite=True)
    assert written.path.read_bytes() == before
    assert list((directory / "gguf").iterdir()) == [written.path]


def test_vocabulary_of_the_embedded_tokenizer(tmp_path):
    shutil.copytree(embedded.base_dir(), tmp_path / "model")
    (written,) = export_gguf(tmp_path / "model", tmp_path, types=["q8_0"])
    reader = gguf.GGUFReader(written.path)
    tokenizer = AutoTokenizer.from_pretrained(embedded.base_dir())
    assert field(reader, "tokenizer.ggml.model") == "gpt2"
    assert field(reader, "tokenizer.ggml.pre") == "smollm"
    assert field(reader, "tokenizer.ggml.tokens") == tokenizer.convert_ids_to_tokens(range(2048))
    assert field(reader, "tokenizer.ggml.token_type")[:4] == [CONTROL, CONTROL, CONTROL, NORMAL]
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    assert field(reader, "tokenizer.ggml.merges") == [" ".join(m) for m in rules["model"]["merges"]]
    for role in ("bos", "eos"):
        assert field(reader, f"tokenizer.ggml.{role}_token_id") == getattr(tokenizer, f"{role}_token_id")
    assert field(reader, "tokenizer.ggml.add_bos_token") is True
    matrices = sum(tensor.n_elements for tensor in reader.tensors if len(tensor.shape) > 1)
    assert sum(tensor.n_bytes for tensor in reader.tensors) < 1.1 * matrices  # 34 bytes per block of 32


def character_tokenizer(bytes_kept: int = 256) -> PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece makes them: characters, byte fallback, a space in front."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(bytes_kept))]
    tokens += ["▁", "a", "b", "ab", "▁ab", "abb"]
    merges = [("a", "b"), ("▁", "ab"), ("ab", "b")]
    core = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.ByteFallback()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_vocabulary_of_a_sentencepiece_like_tokenizer():
    vocabulary = gguf_vocabulary(character_tokenizer(), 270)
    assert (vocabulary.model, vocabulary.pre, vocabulary.add_bos, vocabulary.add_eos) == (
        "llama",
        "default",
        True,
        False,
    )
    assert vocabulary.add_space_prefix
    assert vocabulary.types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert vocabulary.types[-1] == UNUSED and len(vocabulary.tokens) == 270
    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    assert scores["ab"] > scores["▁ab"] > scores["abb"] > scores["a"]  # merges first to last, then characters
    with pytest.raises(ValueError, match="lacks 1 of the 256 byte tokens"):
        gguf_vocabulary(character_tokenizer(255), 270)
    with pytest.raises(ValueError, match="has id 264, but the model only 100"):
        gguf_vocabulary(character_tokenizer(), 100)


def test_the_end_of_a_turn_is_written_where_the_model_stops_there():
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for stops, written in (([2, end], end), ([2], None), ([], None)):
        assert gguf_vocabulary(tokenizer, 270, stops).special.get("eot") == written
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "</s>")  # eos says it already
    assert "eot" not in gguf_vocabulary(tokenizer, 270, [2]).special


def test_tokenizers_without_an_equal_in_llama_cpp_are_refused():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="a WordLevel tokenizer has no equal"):
        gguf_vocabulary(words, 4)
    split = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match=r"splits text by \['WhitespaceSplit'\]"):
        gguf_vocabulary(PreTrainedTokenizerFast(tokenizer_object=split), 4)


# --- in llama.cpp ---


@pytest.fixture(scope="module")
def llama_cpp():
    """Opens a GGUF file in llama.cpp, in this process."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'atp[llamacpp]'")

    @contextlib.contextmanager
    def opened(path: Path, context: int = 64):
        engine = LlamaCppEngine({"path": str(path), "context": context})
        try:
            yield engine
        finally:
            engine.close()

    return opened


def greedy(model: PreTrainedModel, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy continuation without a cache."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(new_tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", [name for name in CASES if "window" not in name and name != "qwen3-gqa-biases"])
def test_llama_cpp_computes_the_same_logits_and_text(tmp_path, llama_cpp, case, shape):
    model, directory = exported(tmp_path, case, shape)
    (written,) = export_gguf(directory, types=["f32"], tokenizer=False)
    with torch.no_grad():
        expected = model(IDS).logits[0]
    prompt = IDS[0, :8].tolist()
    with llama_cpp(written.path) as engine:
        found = torch.tensor(engine.logits(IDS[0].numpy()))
        torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), atol=1e-3, rtol=0)
        assert engine.generate(np.array(prompt), 6) == greedy(model, prompt, 6)
        assert engine.tokenize("text") is None


WHOLE = {"uniform": [512, 512, 512], "per-layer": [512, 256, 768]}


@pytest.fixture(scope="module")
def in_every_type(tmp_path_factory):
    """The same weights in every type, by shape: the model, and its files by type."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'atp[llamacpp]'")
    found = {}
    for shape, channels in WHOLE.items():
        torch.manual_seed(0)
        directory, _ = slim_export(tmp_path_factory.mktemp(shape), channels, heads=8)
        files = export_gguf(directory, types=TYPES, tokenizer=False)
        found[shape] = load_exported(directory, dtype=torch.float32), {file.type: file for file in files}
    return found


@pytest.mark.parametrize("shape", WHOLE)
@pytest.mark.parametrize("kind", TYPES)
def test_every_type_gives_in_llama_cpp_what_its_rounding_explains(llama_cpp, in_every_type, shape, kind):
    model, files = in_every_type[shape]
    with torch.no_grad():
        expected = model(IDS).logits.numpy()
    rounding = None if kind == "f32" else rounding_error(model, IDS.numpy(), expected, ROUNDINGS[kind])
    with llama_cpp(files[kind].path) as engine:
        difference = engine.logits(IDS[0].numpy()) - expected[0]
        if kind in ("f32", "f16"):
            prompt = IDS[0, :8].tolist()
            assert engine.generate(np.array(prompt), 8) == greedy(model, prompt, 8)
    measured = {"max_abs": np.abs(difference).max(), "rms": np.sqrt(np.square(difference).mean()), "top1": 1.0}
    assert verdict(measured, FORMATS["gguf"].limit, float(expected.std()), rounding) == ""
    if rounding is not None:
        assert measured["rms"] > 0.02 * rounding, "nothing was rounded"


def test_k_quants_mix_types_as_llama_cpp_does(in_every_type):
    """32 layers of q4_k_m: Q6_K in the first and the last four, and in every third between."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 32}
    config = LlamaConfig(vocab_size=64, num_attention_heads=8, head_dim=32, **sizes)
    layout = gguf_layout(config, block=32)
    types = dict(zip((tensor.name for tensor in layout.tensors), tensor_types(layout, "q4_k_m"), strict=True))
    finer = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    for part in ("attn_v", "ffn_down"):
        assert {i for i in range(32) if types[f"blk.{i}.{part}.weight"] == "Q6_K"} == finer
    assert {types[f"blk.{i}.ffn_up.weight"] for i in range(32)} == {"Q4_K"}
    assert (types["output.weight"], types["token_embd.weight"], types["output_norm.weight"]) == ("Q6_K", "Q4_K", "F32")
    for shape, (_, files) in in_every_type.items():
        stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(files["q4_k_m"].path).tensors}
        assert stored["blk.2.attn_v.weight"] == "Q6_K" and stored["blk.0.ffn_gate.weight"] == "Q4_K", shape
        assert files["q4_k_m"].size_bytes < 0.35 * files["f16"].size_bytes


@pytest.mark.parametrize(
    ("kind", "columns", "expected"),
    [
        ("q4_k_m", 256, "Q4_K"),
        ("q4_k_m", 64, "Q5_0"),
        ("q4_k_m", 40, "F16"),
        ("q2_k", 96, "Q4_0"),
        ("q6_k", 32, "Q8_0"),
    ],
)
def test_rows_that_blocks_do_not_fit_get_a_coarser_block_or_none(kind, columns, expected):
    sizes = {"hidden_size": columns, "intermediate_size": 256, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=64, num_attention_heads=8, head_dim=32, **sizes)
    layout = gguf_layout(config, block=32)
    types = dict(zip((tensor.name for tensor in layout.tensors), tensor_types(layout, kind), strict=True))
    assert types["blk.0.attn_q.weight"] == expected


@pytest.mark.llamacpp
@pytest.mark.parametrize("kind", QUANTISER_TYPES)
def test_k_quants_have_the_types_and_nearly_the_numbers_of_llama_cpps_own_quantiser(tmp_path, monkeypatch, kind):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: it takes minutes to build")
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'atp[llamacpp]'")
    directory, _ = slim_export(tmp_path, [512, 96, 768, 256, 40, 512, 512, 256], heads=8)
    (theirs,) = export_gguf(directory, tmp_path / "theirs", types=[kind], tokenizer=False)
    monkeypatch.setattr("atp.export.gguf.file._BUILD", Package("not_installed_anywhere"))
    (ours,) = export_gguf(directory, tmp_path / "ours", types=[kind], tokenizer=False)
    found, expected = ({t.name: t for t in gguf.GGUFReader(file.path).tensors} for file in (ours, theirs))
    assert {name: t.tensor_type.name for name, t in found.items()} == {
        name: t.tensor_type.name for name, t in expected.items()
    }
    for name, tensor in found.items():
        assert np.mean(tensor.data != expected[name].data) < 1e-3, name


def test_verification_finds_broken_files_of_every_type_and_passes_whole_ones(tmp_path, monkeypatch):
    """The base's own files; all but one with a tensor of one layer misread."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'atp[llamacpp]'")
    unread = replace(FORMATS["hf"].engine, package=Package("not_installed_anywhere"))  # spares the test a process
    monkeypatch.setitem(FORMATS, "hf", replace(FORMATS["hf"], engine=unread))
    directory = Path(shutil.copytree(embedded.base_dir(), tmp_path / "model"))
    whole, *broken = export_gguf(directory, types=["q8_0", "f32", "f16", "bf16", "q4_k_m"])
    for file, part in zip(broken, ("query", "gate", "query", "gate"), strict=True):
        if part == "query":
            unpermute(file.path, "blk.0.attn_q.weight", 6)
        else:
            swap(file.path, "blk.3.ffn_gate.weight", "blk.3.ffn_up.weight")
    checks = {check.format: check for check in verify(directory, tokens=512, text=embedded_text())}
    assert {name for name, check in checks.items() if check.ok is False} == {f"gguf {file.type}" for file in broken}
    assert checks[f"gguf {whole.type}"].ok and checks[f"gguf {whole.type}"].greedy_equal == "24/24"
