"""The door for models: what fits is loaded to the last bit, all else is refused by name with a way out."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from atp.errors import UserError
from atp.export.hf.loading import load_exported
from atp.model.families import FAMILIES
from atp.model.loading import load_model
from atp.model.stored import StoredModel

WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]


def saved(path: Path, *, family: str = "llama", tied: bool = False, **options: object) -> Path:
    tiny_model(family, tied=tied).save_pretrained(path, **options)  # type: ignore[arg-type]
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tmp_path / "base")


def edit(directory: Path, change: Callable[[Tensors], Tensors]) -> Path:
    tensors = change(load_file(directory / WEIGHTS))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)
    return directory


def configure(directory: Path, **changes: object) -> Path:
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, **changes}))
    return directory


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    first, second = found.state_dict(), expected.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves_loads_to_the_last_bit(tmp_path: Path, family: str, tied: bool) -> None:
    whole = saved(tmp_path / "whole", family=family, tied=tied)
    sharded = saved(tmp_path / "sharded", family=family, tied=tied, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    expected = AutoModelForCausalLM.from_pretrained(whole)
    for directory in (whole, sharded):
        assert_same(load_model(str(directory)), expected)
        assert_same(load_exported(directory), expected)


WRAPPED: dict[str, Callable[[str], str]] = {
    "peft": lambda name: f"base_model.model.{name}",
    "compile": lambda name: f"_orig_mod.{name}",
    "ddp": lambda name: f"module.{name}",
    "ddp of compile": lambda name: f"module._orig_mod.{name}",
    "peft of compile of ddp": lambda name: f"base_model.model._orig_mod.module.{name}",
    "compiled layers": lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
    "fsdp": lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
    "lightning": lambda name: f"model.{name}",
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_known_wrappers_are_taken_off_and_told(
    base: Path, wrap: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    expected = AutoModelForCausalLM.from_pretrained(base)
    edit(base, lambda tensors: {wrap(name): tensor for name, tensor in tensors.items()})
    with caplog.at_level(logging.INFO):
        assert_same(load_model(str(base)), expected)
    assert "taken off" in caplog.text
    assert_same(load_exported(base), expected)


def test_an_inner_model_saved_alone_is_the_model_where_its_head_is_tied(tmp_path: Path) -> None:
    tied, untied = (saved(tmp_path / str(tied), tied=tied) for tied in (True, False))
    expected = AutoModelForCausalLM.from_pretrained(tied)
    for directory in (tied, untied):
        inner = {name for name in load_file(directory / WEIGHTS) if name.startswith("model.")}
        edit(directory, lambda tensors, inner=inner: {name[6:]: tensors[name] for name in inner})  # type: ignore[misc]
    assert_same(load_model(str(tied)), expected)
    with pytest.raises(UserError, match=r"missing: lm_head\.weight.*tie_word_embeddings=true"):
        load_model(str(untied))


def test_stored_buffers_that_models_compute_are_no_fault(base: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(base)
    edit(base, lambda tensors: {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert_same(load_model(str(base)), expected)


def test_a_tied_head_may_be_stored_under_either_name_or_both(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", tied=True)
    expected = AutoModelForCausalLM.from_pretrained(base)
    edit(base, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert_same(load_model(str(base)), expected)
    edit(base, lambda tensors: {name: t for name, t in tensors.items() if "embed" not in name})
    assert_same(load_model(str(base)), expected)


def test_a_head_of_its_own_stays_apart_whatever_the_config_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = saved(tmp_path / "base", tied=True)
    edit(base, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * 0.5})
    with caplog.at_level(logging.INFO):
        model = load_model(str(base))
    assert "kept apart" in caplog.text
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight * 0.5)
    assert_same(load_exported(base), model)


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def _replace(name: str, tensor: torch.Tensor) -> Callable[[Path], object]:
    return lambda base: edit(base, lambda tensors: {**tensors, name: tensor})


def _adapter_state(tensors: Tensors) -> Tensors:
    wrapped = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    return {**wrapped, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 48)}


def _both_sets(base: Path) -> None:
    saved(base.parent / "sharded", max_shard_size="20KB")
    for file in (base.parent / "sharded").glob("model*"):
        shutil.copy(file, base)


def _twice(base: Path) -> None:
    tensors = load_file(base / WEIGHTS)
    for number in (1, 2):
        save_file(tensors, base / f"model-0000{number}-of-00002.safetensors")
    index = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    index["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (base / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    (base / WEIGHTS).unlink()


def _only(name: str, content: bytes = b"GGUF") -> Callable[[Path], object]:
    def change(base: Path) -> None:
        (base / WEIGHTS).unlink()
        (base / name).write_bytes(content)

    return change


def _adapter_folder(base: Path) -> None:
    for file in base.iterdir():
        file.unlink()
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "org/some-base"}')


def _emptied(base: Path) -> None:
    for file in base.iterdir():
        file.unlink()


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda base: (base / name).write_bytes(content)


def _cut(base: Path) -> None:
    (base / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes()[:9000])


def _quantised(base: Path) -> None:
    edit(base, lambda t: {**t, "model.layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"].char()})


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1044992\n"
ROWS = torch.zeros(72, 48)
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (
        lambda base: edit(base, without("model.norm.weight", "lm_head.weight")),
        r"missing: lm_head\.weight, model\.norm\.weight",
    ),
    "no head": (lambda base: edit(base, without("lm_head.weight")), r"missing: lm_head.*tie_word_embeddings=true"),
    "too few layers": (
        lambda base: configure(base, num_hidden_layers=4),
        r"missing: .* and 14 more\. The file holds 2",
    ),
    "too many layers": (lambda base: configure(base, num_hidden_layers=1), r"unexpected: model\.layers\.1.*num_hidden"),
    "embedding rows": (_replace("model.embed_tokens.weight", ROWS), r"is \[72, 48\], not \[64, 48\].*vocab_size=72"),
    "not finite": (_replace("model.norm.weight", torch.full((48,), torch.nan)), r"model\.norm\.weight holds values"),
    "unmerged": (lambda base: edit(base, _adapter_state), r"adapter is not merged \(.*lora_A.*merge_and_unload"),
    "wrapped and not": (_replace("module.model.norm.weight", torch.ones(48)), r"doubled: model\.norm\.weight"),
    "two sets": (_both_sets, r"two sets of weights"),
    "twice in shards": (_twice, r"doubled: .*model-00001-of-00002.safetensors and model-00002"),
    "int8": (_quantised, r"stored as I8.*original weights"),
    "gptq": (_replace("model.layers.0.mlp.up_proj.qweight", torch.ones(2)), r"quantised by another tool"),
    "bitsandbytes": (
        lambda base: configure(base, quantization_config={"quant_method": "bitsandbytes"}),
        r"quantised by bitsandbytes .*original weights",
    ),
    "git-lfs": (_write(WEIGHTS, LFS), r"git-lfs pointer.*git lfs pull"),
    "git-lfs config": (_write("config.json", LFS), r"config\.json is a git-lfs pointer"),
    "half a download": (_cut, r"truncated.*9000 bytes, of \d+ by its header.*download"),
    "empty file": (_write(WEIGHTS, b""), r"model\.safetensors is empty"),
    "web page": (_write(WEIGHTS, b"<html><body>Sign in</body></html>"), r"not a safetensors file"),
    "config of no model": (
        lambda base: configure(base, hidden_act="no-such"),
        r"config\.json describes no model.*no-such",
    ),
    "heads that do not divide": (lambda base: configure(base, num_key_value_heads=0), r"config\.json"),
    "empty config": (_write("config.json", b""), r"config\.json cannot be read: it is empty"),
    "config of something else": (_write("config.json", b"{}"), r"names no model_type"),
    "gguf": (_only("model-q4.gguf"), r"weights are model-q4\.gguf: GGUF.*Hugging Face directory"),
    "onnx": (_only("model.onnx"), r"weights are model\.onnx"),
    "pickle": (_only("pytorch_model.bin"), r"as pickle \(pytorch_model\.bin\).*save_pretrained"),
    "pth": (_only("consolidated.00.pth"), r"as pickle \(consolidated\.00\.pth\)"),
    "shards without index": (_only("model-00001-of-00002.safetensors"), r"lacks weight files: .*index\.json"),
    "adapter": (_adapter_folder, r"it is an adapter of org/some-base.*merge_and_unload"),
    "model and adapter": (_write("adapter_config.json", b"{}"), r"holds both a model .* and an adapter"),
    "empty folder": (_emptied, r"not a model directory: it is empty"),
    "no config": (lambda base: (base / "config.json").unlink(), r"no config\.json beside the weights; copy"),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_what_does_not_fit_is_refused_in_one_line(base: Path, change: Callable[[Path], object], message: str) -> None:
    change(base)
    for load in (load_model, load_exported):
        with pytest.raises(UserError, match=message) as refused:
            load(str(base))
        assert "\n" not in str(refused.value)


def test_places_that_are_no_directory_say_what_they_are(base: Path, tmp_path: Path) -> None:
    for place, message in (
        (base / WEIGHTS, f"is a weight file; give its directory.*{base}"),
        (tmp_path / "nowhere", "no such directory"),
        (tmp_path, r"it has no config\.json, but base in it has"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(str(place))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"is a GGUF file.*Hugging Face directory"):
        load_exported(tmp_path / "model.gguf")


def test_a_run_directory_is_its_pruned_model(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / ".hydra").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has exported no model yet.*resume="):
        load_model(str(run))
    shutil.copytree(base, run / "pruned")
    assert_same(load_model(str(run)), load_model(str(base)))


def test_the_type_of_a_model_is_that_of_most_of_its_weights(base: Path) -> None:
    edit(base, lambda t: {n: x if "norm" in n else x.half() for n, x in t.items()})
    assert StoredModel(base).dtype == torch.float16
    assert load_model(str(base), dtype=torch.float32).dtype == torch.float32
