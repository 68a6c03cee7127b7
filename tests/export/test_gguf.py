"""GGUF files: their structure read back by the gguf reader, and, where llama.cpp is installed, their logits in it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_architecture import CASES, LAYERS, SHAPES, VOCAB, dense_model, pruned_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from atp import embedded
from atp.commands.export import embedded_text, main
from atp.export.formats import FORMATS
from atp.export.gguf.file import check_types, export_gguf
from atp.export.gguf.layout import FILLED_NOTE, gguf_architecture, gguf_layout
from atp.export.gguf.tensors import GgufTensor
from atp.export.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, gguf_vocabulary
from atp.export.hf.loading import load_exported
from atp.export.hf.writing import export_hf
from atp.export.verify.limits import verdict
from atp.export.verify.rounding import ROUNDINGS, rounding_error
from atp.export.verify.verification import mismatches, verify
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


def slim_export(tmp_path: Path, channels: list[int]) -> tuple[Path, LlamaConfig]:
    """An export of random weights whose layers have these FFN channels, and the config of its base."""
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
    small = pruned_config(config, [LayerWidths(4, 2, 32, count) for count in channels])
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


def llama_cpp_logits(path: Path) -> np.ndarray:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install 'atp[llamacpp]'")
    options = {"n_ctx": 64, "logits_all": True, "verbose": False, "type_k": 0, "type_v": 0, "n_threads": 1}
    llama = llama_cpp.Llama(str(path), **options)
    llama.eval(IDS[0].tolist())
    return np.array(llama.scores[: IDS.shape[1]])


@pytest.mark.llamacpp
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", [name for name in CASES if "window" not in name and name != "qwen3-gqa-biases"])
def test_llama_cpp_computes_the_same_logits(tmp_path, case, shape):
    model, directory = exported(tmp_path, case, shape)
    (written,) = export_gguf(directory, types=["f32"], tokenizer=False)
    with torch.no_grad():
        expected = model(IDS).logits[0].numpy()
    np.testing.assert_allclose(llama_cpp_logits(written.path), expected, atol=1e-3, rtol=0)


@pytest.mark.llamacpp
def test_llama_cpps_quantiser_makes_k_quants(tmp_path):
    pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install 'atp[llamacpp]'")
    shutil.copytree(embedded.base_dir(), tmp_path / "model")
    small, full = export_gguf(tmp_path / "model", tmp_path, types=["q4_k_m", "f16"])
    assert small.size_bytes < 0.5 * full.size_bytes
    assert sorted(path.name for path in tmp_path.glob("*.gguf*")) == ["model-f16.gguf", "model-q4_k_m.gguf"]


@pytest.mark.llamacpp
def test_verification_of_a_broken_file_exits_non_zero_for_every_type(tmp_path, capsys):
    """The base's own files, each with one tensor of one layer misread."""
    pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install 'atp[llamacpp]'")
    directory = Path(shutil.copytree(embedded.base_dir(), tmp_path / "model"))
    files = export_gguf(directory, types=["f32", "f16", "bf16", "q8_0", "q4_k_m"])
    assert main([str(directory), "--verify", "--tokens", "512"]) == 0
    for fault in (
        lambda path: unpermute(path, "blk.0.attn_q.weight", 6),
        lambda path: swap(path, "blk.3.ffn_gate.weight", "blk.3.ffn_up.weight"),
    ):
        kept = {file.path: file.path.read_bytes() for file in files}
        for file in files:
            fault(file.path)
        assert [check.format for check in mismatches(verify(directory, tokens=512, text=embedded_text()))] == [
            f"gguf {name}" for name in ("bf16", "f16", "f32", "q4_k_m", "q8_0")
        ]
        for path, content in kept.items():
            path.write_bytes(content)
    swap(files[3].path, "blk.1.attn_k.weight", "blk.1.attn_v.weight")
    assert main([str(directory), "--verify", "--tokens", "512"]) == 1
    assert capsys.readouterr().out.count("MISMATCH") == 1
