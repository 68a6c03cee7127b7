"""Exported directories: they load anywhere with the same logits, and no failure leaves half of one."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_architecture import CASES, LAYERS, SHAPES, VOCAB, dense_model, left_padded_batch, pruned_model, real_logits
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from atp.export.hf import writing as huggingface
from atp.export.hf.card import CardFacts, base_license, model_card
from atp.export.hf.loading import load_exported
from atp.export.hf.writing import export_hf
from atp.loading_lines import load_lines
from atp.model import modeling_atp
from atp.model.widths import LayerWidths, layer_widths

modeling_atp.register()

EXPORTS = {
    "stock-llama": ("llama-gqa-tied-rope3", "uniform"),
    "llama-as-mistral": ("llama-mha", "uniform-not-dividing"),
    "stock-qwen2": ("qwen2-gqa", "uniform-not-dividing"),
    "llama": ("llama-gqa-tied-rope3", "no-attention-first"),
    "llama-biases": ("llama-mqa-biases", "per-layer"),
    "mistral": ("mistral-mha-tied-window", "empty-layer"),
    "qwen2": ("qwen2-gqa", "per-layer"),
    "qwen3": ("qwen3-gqa-biases", "no-ffn"),
}


def pruned(name: str) -> PreTrainedModel:
    case, shape = EXPORTS[name]
    return pruned_model(dense_model(CASES[case]), CASES[case], SHAPES[shape])


def in_own_memory(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its weights out of the mapped file, whose offsets make some CPUs' kernels round otherwise."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(VOCAB - 4))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer) -> Path:
    """One directory with every entry of EXPORTS."""
    root = tmp_path_factory.mktemp("exports")
    for name in EXPORTS:
        export_hf(pruned(name), tokenizer, root / name)
    return root


@pytest.mark.parametrize("name", EXPORTS)
def test_reloaded_model_has_the_same_logits_bit_for_bit(exported, name):
    model, batch = pruned(name), left_padded_batch()
    expected = real_logits(model, batch)
    strict = load_exported(exported / name)
    assert layer_widths(strict.config) == layer_widths(model.config)
    assert torch.equal(real_logits(strict, batch), expected)
    auto = AutoModelForCausalLM.from_pretrained(exported / name).eval()  # atp is imported: no flag
    assert type(auto).__name__ == type(model).__name__
    torch.testing.assert_close(real_logits(auto, batch), expected, rtol=0, atol=1e-6)
    assert torch.equal(real_logits(in_own_memory(auto), batch), expected)


@pytest.mark.parametrize("name", EXPORTS)
def test_the_model_without_its_head_is_the_same_model(exported, name):
    """What inference engines build, such as vLLM's Transformers backend."""
    batch = left_padded_batch()
    whole = AutoModelForCausalLM.from_pretrained(exported / name).eval()
    inner = AutoModel.from_pretrained(exported / name).eval()
    assert type(inner).__name__ == type(whole.model).__name__ or type(inner).__name__.startswith("Atp")
    assert layer_widths(inner.config) == layer_widths(whole.config)
    with torch.no_grad():
        expected = whole(**batch, output_hidden_states=True)
        found = inner(**batch, output_hidden_states=True)
        assert torch.equal(whole.lm_head(found.last_hidden_state), expected.logits)
    assert len(found.hidden_states) == LAYERS + 1
    for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", EXPORTS)
def test_directory_holds_what_loading_needs_and_nothing_else(exported, name):
    files = {path.name for path in (exported / name).iterdir()}
    stock = "stock" in name or name == "llama-as-mistral"
    assert files == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("README.md", "atp_provenance.json"),
        *([] if stock else ["modeling_atp.py"]),
        *(["tokenization_atp.py"] if name == "stock-qwen2" else []),  # whose class would rewrite this tokenizer
    }
    assert len({path.stat().st_mode for path in (exported / name).iterdir()}) == 1, "some files are less readable"
    config = json.loads((exported / name / "config.json").read_text())
    assert ("auto_map" in config) == (not stock)
    assert config["architectures"] == [type(pruned(name)).__name__]


WITHOUT_ATP = """
import sys, json
sys.modules["atp"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
root, names, lines = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
batch, logits = load_file(root + "/batch.safetensors"), {}
for name in names:
    exec(lines[name])
    if name != "stock-qwen2":  # for this model type transformers insists on Qwen's own pre-tokenizer
        assert tokenizer("w3 w5")["input_ids"] == [7, 9], name
    with torch.no_grad():
        logits[name] = model(**batch).logits
        hidden = AutoModel.from_pretrained(root + "/" + name, trust_remote_code=True)(**batch).last_hidden_state
        assert torch.equal(model.lm_head(hidden), logits[name]), name
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cached, uncached = (model.generate(**batch, **options, use_cache=flag) for flag in (True, False))
    assert torch.equal(cached, uncached), name
assert not [name for name in sys.modules if name == "atp.model.widths"]
save_file(logits, root + "/logits.safetensors")
"""

WITH_ATP = """
import sys, json
import atp.model.widths, atp.model.registry
assert "torch" not in sys.modules, "importing atp.model.widths has become expensive"
atp.model.registry.register_on_demand()
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
root, names = sys.argv[1], json.loads(sys.argv[2])
batch, logits = load_file(root + "/batch.safetensors"), {}
for name in names:
    model = AutoModelForCausalLM.from_pretrained(root + "/" + name)
    assert type(model).__module__ == "atp.model.modeling_atp"
    with torch.no_grad():
        logits[name] = model(**batch).logits
save_file(logits, root + "/logits.safetensors")
"""


def run_python(code: str, home: Path, *arguments: str) -> None:
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    # With atp blocked nothing of ours may be on the path; with atp the repository has to be.
    isolated = ["-I"] if code is WITHOUT_ATP else []
    if not isolated:
        environment["PYTHONPATH"] = str(Path(huggingface.__file__).parents[3])
    command = [sys.executable, *isolated, "-c", code, *arguments]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("code", [WITHOUT_ATP, WITH_ATP], ids=["without-atp", "with-atp"])
def test_fresh_process_loads_every_export_with_the_same_logits(exported, tmp_path, code):
    names = [name for name in EXPORTS if code is WITHOUT_ATP or (exported / name / "modeling_atp.py").exists()]
    batch = left_padded_batch()
    save_file(batch, exported / "batch.safetensors")
    lines = {name: load_lines(exported / name, not (exported / name / "modeling_atp.py").exists()) for name in names}
    assert {len(text.splitlines()) for text in lines.values()} == {2}
    run_python(code, tmp_path, str(exported), json.dumps(names), json.dumps(lines))
    logits = load_file(exported / "logits.safetensors")
    for name in names:
        expected = real_logits(pruned(name), batch)
        torch.testing.assert_close(logits[name][batch["attention_mask"].bool()], expected, atol=1e-5, rtol=0)


PER_LAYER = [name for name in EXPORTS if "stock" not in name and name != "llama-as-mistral"]


@pytest.mark.parametrize("name", PER_LAYER)
def test_a_loaded_per_layer_export_is_placed_by_a_device_map(exported, tmp_path, name):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    expected = real_logits(pruned(name), left_padded_batch())
    parts = [
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in (0, 1, 3)),
    ]
    spread = {**dict.fromkeys(parts, "cpu"), "model.layers.2": "disk"}
    for device_map in ("auto", "cpu", spread):
        options = {"device_map": device_map, "offload_folder": str(tmp_path)}
        model = AutoModelForCausalLM.from_pretrained(exported / name, **options).eval()
        torch.testing.assert_close(real_logits(model, left_padded_batch()), expected, rtol=0, atol=1e-6)
        if device_map is not spread:  # what lies on disk is mapped anew at every call
            assert torch.equal(real_logits(in_own_memory(model), left_padded_batch()), expected), device_map
    assert model.hf_device_map["model.layers.2"] == "disk"


@pytest.mark.parametrize("name", PER_LAYER)
def test_a_loaded_per_layer_export_generates_with_every_cache_beams_and_left_padding(exported, name):
    model, batch = AutoModelForCausalLM.from_pretrained(exported / name).eval(), left_padded_batch()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    greedy = model.generate(**batch, **options, use_cache=False)
    for cache in ({}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(**batch, **options, **cache), greedy)
    beams = model.generate(**batch, **options, num_beams=3, use_cache=False)
    assert torch.equal(model.generate(**batch, **options, num_beams=3), beams)
    assert torch.equal(model.generate(batch["input_ids"][2:, 8:], **options), greedy[2:, 8:])


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_loaded_per_layer_export_is_tuned_further_with_peft_and_checkpointing(exported, tmp_path, name):
    model, batch = AutoModelForCausalLM.from_pretrained(exported / name), left_padded_batch()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = tuned(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(exported / name), str(tmp_path))
    assert torch.equal(real_logits(again.eval(), batch), real_logits(tuned.eval(), batch))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_per_layer_export_loads_in_eight_bits(exported, name):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    expected = real_logits(pruned(name), left_padded_batch())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bitsandbytes on the CPU
        config = BitsAndBytesConfig(load_in_8bit=True)
        model = AutoModelForCausalLM.from_pretrained(exported / name, quantization_config=config).eval()
        found = real_logits(model, left_padded_batch())
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.int8
    assert 0 < (found - expected).square().mean().sqrt() < 0.1 * expected.std()


def test_exported_tokenizer_and_generation_config_are_the_given_ones(tmp_path, tokenizer):
    model = pruned("qwen2")
    model.generation_config = GenerationConfig(eos_token_id=[2, 3], do_sample=True, temperature=0.6, max_new_tokens=7)
    export_hf(model, tokenizer, tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("w1 nowhere")["input_ids"] == [5, 3]
    assert load_exported(tmp_path / "model").generation_config.temperature == 0.6
    assert load_exported(tmp_path / "model").generation_config.eos_token_id == [2, 3]


def test_contradicting_generation_settings_are_kept_with_a_warning(tmp_path, tokenizer, caplog):
    model = pruned("qwen2")
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.6)
    export_hf(model, tokenizer, tmp_path / "model")
    assert "generation config" in caplog.text
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["temperature"] == 0.6


@pytest.mark.parametrize("name", ["llama-as-mistral", "llama"])
def test_shards_and_another_dtype(tmp_path, tokenizer, name):
    model = pruned(name)
    result = export_hf(model, tokenizer, tmp_path / "model", dtype=torch.bfloat16, max_shard_size=4000)
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 2
    assert model.dtype == torch.float32, "the exported model itself was converted"
    loaded = load_exported(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    stored = sum(parameter.numel() for parameter in loaded.parameters())  # tied weights count once
    assert result.parameters == stored
    assert stored * 2 <= result.weight_bytes <= stored * 2 + 20_000
    assert load_exported(tmp_path / "model", dtype=torch.float32).dtype == torch.float32
    batch = left_padded_batch()
    for parameter in model.parameters():  # model.to() would round the rotary frequencies too
        parameter.data = parameter.data.to(torch.bfloat16)
    expected = real_logits(model, batch)
    assert torch.equal(real_logits(loaded, batch), expected)
    assert torch.equal(real_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), batch), expected)


def test_a_loaded_export_can_be_exported_again(exported, tmp_path, tokenizer, monkeypatch):
    """Also with the classes of the file beside the weights instead of atp's own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    foreign = get_class_from_dynamic_module("modeling_atp.AtpLlamaForCausalLM", str(exported / "llama"))
    model = foreign.from_pretrained(exported / "llama")
    assert not isinstance(model, modeling_atp.AtpLlamaForCausalLM)
    export_hf(model, tokenizer, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["auto_map"] == json.loads((exported / "llama" / "config.json").read_text())["auto_map"]
    assert torch.equal(
        real_logits(load_exported(tmp_path / "again"), left_padded_batch()),
        real_logits(pruned("llama"), left_padded_batch()),
    )


def test_plain_save_pretrained_of_a_loaded_export_keeps_it_loadable_without_atp(exported, tmp_path):
    AutoModelForCausalLM.from_pretrained(exported / "qwen3").save_pretrained(tmp_path)
    assert (tmp_path / "modeling_atp.py").read_text() == (exported / "qwen3" / "modeling_atp.py").read_text()
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == json.loads((exported / "qwen3" / "config.json").read_text())["auto_map"]


def test_provenance_records_the_run_and_what_was_written(tmp_path, tokenizer):
    result = export_hf(pruned("llama"), tokenizer, tmp_path / "model", provenance={"seed": 3, "base": "some/base"})
    written = json.loads((tmp_path / "model" / "atp_provenance.json").read_text())
    assert written["run"] == {"seed": 3, "base": "some/base"}
    assert written["architecture"] == result.architecture == "AtpLlamaForCausalLM"
    assert [LayerWidths(**layer) for layer in written["widths"]] == layer_widths(pruned("llama").config)


class _Interrupted:
    """A tokenizer that fails while it is being written."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def save_pretrained(self, directory: str) -> None:
        (Path(directory) / "tokenizer.json").write_text("{")
        raise self.error


FAILURES = [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), RuntimeError("no vocabulary")]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_failed_export_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        export_hf(pruned("llama"), _Interrupted(error), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_earlier_export_survives_a_failed_overwrite(tmp_path, tokenizer, error):
    export_hf(pruned("llama"), tokenizer, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(type(error)):
        export_hf(pruned("qwen2"), _Interrupted(error), tmp_path / "model", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_earlier_export_survives_a_failure_of_the_last_step(tmp_path, tokenizer, monkeypatch):
    export_hf(pruned("llama"), tokenizer, tmp_path / "model")
    rename = os.rename

    def rename_fails(source, destination):
        if ".partial-" in str(source):
            raise OSError("rename refused")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", rename_fails)
    with pytest.raises(OSError, match="rename refused"):
        export_hf(pruned("qwen2"), tokenizer, tmp_path / "model", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert load_exported(tmp_path / "model").config.model_type == "atp_llama"


def test_full_disk_is_noticed_before_anything_is_written(tmp_path, tokenizer, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="MiB free; nothing was written"):
        export_hf(pruned("llama"), tokenizer, tmp_path / "deep" / "model")
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_the_whole_directory(tmp_path, tokenizer):
    export_hf(pruned("llama"), tokenizer, tmp_path / "model", max_shard_size=8000)
    with pytest.raises(ValueError, match=r"not empty; pass overwrite=True"):
        export_hf(pruned("stock-qwen2"), tokenizer, tmp_path / "model")
    export_hf(pruned("stock-qwen2"), tokenizer, tmp_path / "model", overwrite=True)
    assert [path.name for path in (tmp_path / "model").glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "model" / "modeling_atp.py").exists()
    assert load_exported(tmp_path / "model").config.model_type == "qwen2"


def test_directories_that_hold_no_model_are_never_replaced(tmp_path, tokenizer):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not a model directory"):
        export_hf(pruned("llama"), tokenizer, tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        export_hf(pruned("llama"), tokenizer, tmp_path / "thesis.tex", overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_models_that_would_not_load_again_are_refused(tmp_path, tokenizer):
    adapted = get_peft_model(pruned("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="merge them first"):
        export_hf(adapted, tokenizer, tmp_path / "model")
    with pytest.raises(ValueError, match="merge them first"):
        export_hf(adapted.base_model.model, tokenizer, tmp_path / "model")
    cut = pruned("qwen2")
    cut.model.layers[0].mlp.gate_proj.weight.data = cut.model.layers[0].mlp.gate_proj.weight.data[:3]
    with pytest.raises(ValueError, match=r"layers.0.mlp.gate_proj.weight is \[3, 32\], not \[24, 32\]"):
        export_hf(cut, tokenizer, tmp_path / "model")
    untied = pruned("llama")
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight + 1)
    with pytest.raises(ValueError, match="tie_word_embeddings=False"):
        export_hf(untied, tokenizer, tmp_path / "model")
    with pytest.raises(ValueError, match="plain JSON"):
        export_hf(pruned("llama"), tokenizer, tmp_path / "model", provenance={"path": tmp_path})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def damaged(exported, tmp_path) -> Path:
    """A copy of one export, to be damaged."""
    return Path(shutil.copytree(exported / "llama", tmp_path / "model"))


def _edit_tensors(directory: Path, edit) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _missing(directory: Path) -> None:
    _edit_tensors(directory, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))


def _unexpected(directory: Path) -> None:
    _edit_tensors(directory, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(2)}))


def _misshapen(directory: Path) -> None:
    _edit_tensors(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))


def _truncated(directory: Path) -> None:
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[: len(content) // 2])


def _pickled(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def _pickle_in_disguise(directory: Path) -> None:
    torch.save({"weight": torch.ones(2)}, directory / "model.safetensors")


def _no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def _index(directory: Path, filename: str) -> None:
    index = {"weight_map": {"model.norm.weight": filename}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _lost_shard(directory: Path) -> None:
    _index(directory, "model-00002-of-00002.safetensors")


def _index_leading_elsewhere(directory: Path) -> None:
    shutil.copy(directory / "model.safetensors", directory.parent / "other.safetensors")
    _index(directory, "../other.safetensors")


def _no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def _broken_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "atp_llama",')


def _wrong_type_in_config(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))


def _other_family(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "gpt2"}')


DAMAGES = [
    (_missing, "do not fit its config.json: missing: model.layers.2.mlp.up_proj.weight"),
    (_unexpected, "unexpected: model.layers.0.self_attn.q_proj.weight"),
    (_misshapen, r"misshapen: model.norm.weight is \[31\], not \[32\]"),
    (_truncated, "truncated or not a safetensors file"),
    (_pickled, r"as pickle \(pytorch_model.bin\).*convert it once"),
    (_pickle_in_disguise, "truncated or not a safetensors file"),
    (_no_weights, "lacks weight files: model.safetensors"),
    (_lost_shard, "lacks weight files: model-00002-of-00002.safetensors"),
    (_index_leading_elsewhere, "lacks weight files: other.safetensors"),
    (_no_config, "not a model directory: it has no config.json"),
    (_broken_config, "config.json cannot be read"),
    (_wrong_type_in_config, "config.json cannot be read: .*hidden_size"),
    (_other_family, "model_type='gpt2' is not supported"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_damaged_directory_is_refused_with_its_fault(damaged, damage, message):
    damage(damaged)
    with pytest.raises(ValueError, match=message):
        load_exported(damaged)


CARD = {
    "title": "A smaller model",
    "architecture": "AtpLlamaForCausalLM",
    "stock": False,
    "widths": [LayerWidths(2, 1, 8, 6), LayerWidths(0, 0, 8, 24)],
    "dense_widths": [LayerWidths(4, 2, 8, 24)] * 2,
    "base_model": "some-org/Some-Model-7B",
    "license_id": "llama3",
    "datasets": ["some-org/laws", "my own cases"],
    "tags": ["legal"],
    "target_sparsity": 0.5,
    "block_sparsity": 0.5012,
    "model_sparsity": 0.4,
    "parameters": 1234,
    "dense_parameters": 2345,
    "metrics": {"dense": {"perplexity": 9.5}, "dense_lora": {"perplexity": 4.0}, "pruned": {"perplexity": 4.125}},
    "recovery": {"perplexity": 96.97},
    "limitations": ["Only clauses were tried."],
}


def test_card_has_hub_metadata_and_the_figures():
    text = model_card(CardFacts(**CARD))
    data = ModelCard(text).data
    assert (data.base_model, data.license, data.library_name) == ("some-org/Some-Model-7B", "llama3", "transformers")
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == ["some-org/laws"]
    assert {"pruning", "legal", "custom_code"} <= set(data.tags)
    assert "50.12% (target 50.00%)" in text
    assert "| removed, of all parameters | 40.00% |" in text
    assert "1,234 of 2,345" in text
    assert re.search(r"\| 0 \| `█{6}░{6}` 2 / 4 \| 1 / 2 \| `█{3}░{9}` 6 / 24 \|", text)
    assert re.search(r"\| 1 \| `░{12}` 0 / 4 \| 0 / 2 \| `█{12}` 24 / 24 \|", text)
    assert "| perplexity | 9.5 | 4 | 4.125 | 97.0% |" in text
    assert "trust_remote_code=True" in text
    assert "my own cases" in text
    assert "- Only clauses were tried." in text


def test_card_says_how_each_format_is_opened_and_how_it_compared():
    check = {"format": "gguf f16", "size_bytes": 3 * 2**20, "max_abs": 0.012, "top1": 0.9987}
    files = ["adapter/adapter_config.json", "gguf/model-f16.gguf", "onnx/model.onnx"]
    text = model_card(CardFacts(**CARD, files=files, checks=[check, {"format": "onnx", "top1": None}]))
    assert "| gguf f16 | 3.0 | 0.012 | 99.87% |" in text
    assert "llama-cli -m gguf/model-f16.gguf" in text
    assert "PeftModel.from_pretrained" in text and "`onnx/model.onnx` takes" in text
    assert "llama-cli" not in model_card(CardFacts(**CARD))


def test_card_of_a_stock_model_asks_for_no_flag():
    text = model_card(CardFacts(**{**CARD, "stock": True, "architecture": "LlamaForCausalLM"}))
    assert "trust_remote_code" not in text
    assert "custom_code" not in ModelCard(text).data.tags


def test_card_shows_of_a_local_base_only_its_name(tmp_path):
    text = model_card(CardFacts(**{**CARD, "base_model": str(tmp_path / "my-base"), "license_id": None}))
    assert str(tmp_path) not in text
    assert "`my-base`" in text
    assert ModelCard(text).data.base_model is None
    assert ModelCard(text).data.license is None


def test_card_names_a_licence_the_hub_does_not_list_as_other():
    data = ModelCard(model_card(CardFacts(**{**CARD, "license_id": "Acme Community License 2"}))).data
    assert (data.license, data.license_name) == ("other", "acme-community-license-2")


def test_licence_of_the_base_is_read_from_its_card(tmp_path):
    assert base_license(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    assert base_license(tmp_path) == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: acme\n---\n# A model\n")
    assert base_license(tmp_path) == "acme"
    (tmp_path / "README.md").write_text("# A model without a header\n")
    assert base_license(tmp_path) is None


def test_default_card_is_made_from_the_model(exported):
    text = (exported / "llama" / "README.md").read_text()
    assert ModelCard(text).data.library_name == "transformers"
    assert len(re.findall(r"^\| \d+ \|", text, re.MULTILINE)) == LAYERS
