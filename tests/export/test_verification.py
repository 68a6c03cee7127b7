"""Verification, the command line and the formats beside GGUF: what users run on their own export."""

import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_batch, tiny_model
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_architecture import CASES, SHAPES, dense_model, left_padded_batch, pruned_model, real_logits
from test_removal import masked_model

from atp import embedded
from atp.commands.export import main
from atp.commands.generate import main as generate
from atp.cut.removal import max_logit_difference, remove, slice_adapter
from atp.cut.selection import select
from atp.data.prompt import Prompt
from atp.data.tasks import fill_prompt
from atp.export.bundle import check_formats, windows_of
from atp.export.formats import FORMATS
from atp.export.gguf.file import export_gguf
from atp.export.hf.loading import load_exported
from atp.export.hf.writing import export_hf
from atp.export.llama_cpp.engine import LlamaCppEngine
from atp.export.onnx_graph import export_onnx
from atp.export.verify.engines import OnnxEngine
from atp.export.verify.limits import verdict
from atp.export.verify.rounding import ROUNDINGS, rounding_error
from atp.export.verify.verification import mismatches, verify
from atp.masks.adapter import extract_adapter
from atp.masks.merging import base_tensors, merged_tensors
from atp.space.space import PruningSpace


@pytest.fixture
def model_dir(tmp_path) -> Path:
    """The embedded base as an exported directory."""
    return Path(shutil.copytree(embedded.base_dir(), tmp_path / "model"))


def unmerged(tmp_path: Path, *, empty_layer: bool = False) -> tuple[Path, torch.nn.Module]:
    """An export with an adapter beside the pruned base, and the merged model."""
    masked = masked_model(tiny_model("llama", "gqa", layers=3, vocabulary=2048))
    config = masked.peft_model.get_base_model().config
    generator = torch.Generator().manual_seed(5)
    masks_U = select(masked.space, torch.randn(masked.space.num_units, generator=generator), 0.4)
    if empty_layer:
        axis = masked.space.layers[1].axes["channels"]
        masks_U[axis.offset : axis.offset + axis.size] = 0
    merged = remove(merged_tensors(masked.peft_model), config, masked.space, masks_U)
    base = remove(base_tensors(masked.peft_model), config, masked.space, masks_U)
    adapter = slice_adapter(extract_adapter(masked.peft_model), masked.space, masks_U)
    export_hf(base, None, tmp_path / "model", adapter=adapter)
    return tmp_path / "model", merged


@pytest.mark.parametrize("empty_layer", [False, True])
def test_pruned_base_and_adapter_add_up_to_the_merged_model(tmp_path, empty_layer):
    directory, merged = unmerged(tmp_path, empty_layer=empty_layer)
    batch = tiny_batch()
    assert max_logit_difference(load_exported(directory), merged, [batch]) < 1e-4
    shutil.move(directory / "adapter", tmp_path / "adapter")
    base = load_exported(directory)
    assert max_logit_difference(base, merged, [batch]) > 1e-2, "the adapter was merged into the base"
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert max_logit_difference(adapted, merged, [batch]) < 1e-4
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None and str(tmp_path) not in json.dumps(config)


def test_every_door_takes_the_adapter_beside_the_weights_along(tmp_path):
    from atp.commands.evaluate import load
    from atp.config.schema import ModelConfig
    from atp.evaluate.measure import file_mib
    from atp.run import parts

    directory, merged = unmerged(tmp_path)
    assert "PeftModel.from_pretrained" in (directory / "README.md").read_text(encoding="utf-8")
    for file in embedded.base_dir().glob("tokenizer*"):
        shutil.copy(file, directory)
    scored, _ = load(str(directory), "float32")
    assert max_logit_difference(scored, merged, [tiny_batch()]) < 1e-4
    files = [directory / "model.safetensors", directory / "adapter" / "adapter_model.safetensors"]
    assert file_mib(directory) == pytest.approx(sum(file.stat().st_size for file in files) / 2**20)
    base = parts.load_base(ModelConfig(path=str(directory)))
    assert max_logit_difference(base, merged, [tiny_batch()]) < 1e-4


def test_damaged_adapter_is_refused(tmp_path):
    directory, _ = unmerged(tmp_path)
    file = directory / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("o_proj.lora_A.weight"))
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, file)
    with pytest.raises(ValueError, match=r"does not fit the weights: .*o_proj"):
        load_exported(directory)
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(ValueError, match=r"lacks .*o_proj"):
        load_exported(directory)
    file.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        load_exported(directory)


@pytest.mark.parametrize(
    ("case", "shape"),
    [
        ("llama-gqa-tied-rope3", "no-attention-first"),
        ("llama-mqa-biases", "no-attention-at-all"),
        ("mistral-mha-tied-window", "per-layer"),
        ("qwen2-mha-tied-window", "empty-layer"),
        ("qwen3-gqa-biases", "uniform-not-dividing"),
    ],
)
def test_onnx_graph_gives_the_same_logits_with_and_without_its_cache(tmp_path, case, shape):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'atp[onnx]'")
    model = pruned_model(dense_model(CASES[case]), CASES[case], SHAPES[shape])
    export_hf(model, None, tmp_path / "model")
    graph = export_onnx(tmp_path / "model")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = runtime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    past = session.get_inputs()[2:]
    assert len(past) == 2 * sum(layer.startswith("past_key") for layer in (item.name for item in past))
    batch = left_padded_batch()
    ids, mask = batch["input_ids"].numpy(), batch["attention_mask"].numpy()
    empty = {item.name: np.zeros((3, item.shape[1], 0, item.shape[3]), np.float32) for item in past}
    whole = session.run(None, {"input_ids": ids, "attention_mask": mask, **empty})
    expected = real_logits(model, batch).numpy()
    np.testing.assert_allclose(whole[0][mask.astype(bool)], expected, atol=1e-4, rtol=0)
    first = session.run(None, {"input_ids": ids[:, :9], "attention_mask": mask[:, :9], **empty})
    cached = dict(zip(empty, first[1:], strict=True))
    rest = session.run(None, {"input_ids": ids[:, 9:], "attention_mask": mask, **cached})
    np.testing.assert_allclose(rest[0], whole[0][:, 9:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["llama-gqa-tied-rope3", "llama-mha"])
def test_onnx_graph_stores_every_parameter_once(tmp_path, case):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'atp[onnx]'")
    onnx = pytest.importorskip("onnx")
    model = pruned_model(dense_model(CASES[case]), CASES[case], SHAPES["per-layer"])
    export_hf(model, None, tmp_path / "model")
    path = export_onnx(tmp_path / "model", cache=False)
    prompt = np.array([5, 6, 7])
    expected = model.generate(torch.tensor(prompt[None]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert OnnxEngine({"path": str(path)}).generate(prompt, 6) == expected[0, 3:].tolist()
    graph = onnx.load(path).graph
    stored = sum(int(np.prod(tensor.dims)) for tensor in graph.initializer if len(tensor.dims))
    assert stored <= sum(p.numel() for p in model.parameters()) + 200  # and the few constants of the graph


SLIM = [("llama", ("qk_pairs", "value_dims")), ("qwen2", ("value_dims", "channels")), ("llama", ("hidden", "heads"))]


@pytest.mark.parametrize(("family", "kinds"), SLIM)
def test_dimensions_cut_inside_heads_and_along_the_residual_stream(tmp_path, family, kinds):
    """ONNX holds the small shapes; GGUF has zeros where heads lost dimensions, and the same logits in llama.cpp."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'atp[onnx]'")
    model = tiny_model(family, "gqa", layers=3)
    space = PruningSpace.from_model(model, kinds)
    masks_U = select(space, torch.randn(space.num_units, generator=torch.Generator().manual_seed(1)), 0.3)
    small = remove(model.state_dict().items(), model.config, space, masks_U)
    export_hf(small, None, tmp_path / "model")
    ids = tiny_batch()["input_ids"][1:2]
    with torch.no_grad():
        expected = small(input_ids=ids).logits.numpy()
    session = runtime.InferenceSession(str(export_onnx(tmp_path / "model")), providers=["CPUExecutionProvider"])
    past = {item.name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32) for item in session.get_inputs()[2:]}
    inputs = {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
    np.testing.assert_allclose(session.run(None, {**inputs, **past})[0], expected, atol=1e-4, rtol=0)
    (written,) = export_gguf(tmp_path / "model", types=["f32"], tokenizer=False)
    assert any("zeros" in note for note in written.notes) == ("hidden" not in kinds)
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'atp[llamacpp]'")
    engine = LlamaCppEngine({"path": str(written.path), "context": 64})
    np.testing.assert_allclose(engine.logits(ids[0].numpy()), expected[0], atol=1e-3, rtol=0)
    engine.close()


def test_every_format_is_loaded_in_a_fresh_process_and_compared(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'atp[onnx]'")
    case = CASES["llama-gqa-tied-rope3"]
    export_hf(pruned_model(dense_model(case), case, SHAPES["no-attention-first"]), None, tmp_path / "model")
    export_onnx(tmp_path / "model")
    checks = {check.format: check for check in verify(tmp_path / "model", tokens=96)}
    assert checks.keys() == {"hf", "onnx"}
    for check in checks.values():
        assert check.ok and check.top1 == 1.0 and check.max_abs < 1e-4
        assert check.perplexity == pytest.approx(check.reference_perplexity, rel=1e-4)
        assert check.greedy_equal == "24/24" and check.tokens_per_s > 0
    size = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    assert checks["hf"].size_bytes == size


@pytest.mark.slow
def test_an_unmerged_export_is_compared_through_peft(tmp_path, capsys):
    directory, merged = unmerged(tmp_path)
    (check,) = verify(directory, tokens=64, reference_model=merged)
    assert (check.format, check.ok) == ("adapter", True)
    file = directory / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("down_proj.lora_B.weight"))
    save_file({**tensors, name: tensors[name].flip(0).contiguous()}, file, metadata={"format": "pt"})
    (check,) = verify(directory, tokens=64, reference_model=merged)
    assert check.ok is False and "rms" in check.note and "adapter_model.safetensors changed" in check.note
    assert main([str(directory), "--verify", "--tokens", "64"]) == 1, "its own adapter is no reference for itself"
    assert "adapter: adapter/adapter_model.safetensors changed since the export" in capsys.readouterr().out


def swapped_in_graph(graph: Path, layer: int) -> None:
    """Swaps the gate and the up projection of a layer in an ONNX graph."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(graph)
    inputs = {}
    for node in model.graph.node:
        for part in ("gate_proj", "up_proj"):
            if node.op_type == "MatMul" and f"layers.{layer}/mlp/{part}" in node.name:
                inputs[part] = node
    first, second = inputs["gate_proj"].input, inputs["up_proj"].input
    first[1], second[1] = second[1], first[1]
    onnx.save(model, graph)


def test_a_format_that_differs_is_a_mismatch_and_the_exit_code_says_so(tmp_path, capsys):
    """A graph with two swapped weights, and a weight file changed after the export."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'atp[onnx]'")
    case = CASES["llama-mha"]
    export_hf(pruned_model(dense_model(case), case, SHAPES["per-layer"]), None, tmp_path / "model")
    swapped_in_graph(export_onnx(tmp_path / "model", cache=False), layer=1)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.norm.weight"] *= 1 + 1e-6
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert main([str(tmp_path / "model"), "--verify", "--tokens", "64"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("MISMATCH") == 2
    assert "hf: model.safetensors changed since the export" in shown and "onnx: rms" in shown


def test_an_exact_format_must_give_the_logits_and_a_rounded_one_may_differ_by_its_rounding():
    file, near = FORMATS["gguf"].limit, {"max_abs": 1e-3, "rms": 1e-4, "top1": 1.0}
    assert verdict(near, file, 2.0) == ""
    assert "top-1 90.00%" in verdict({**near, "top1": 0.9}, file, 2.0)
    assert "rms 0.0001, allowed 5e-05" in verdict(near, FORMATS["hf"].limit, 1.0)
    assert verdict({"max_abs": 0.5, "rms": 0.05, "top1": 0.9}, file, 2.0, rounding=0.04) == ""
    assert "rms 0.07, allowed 0.06" in verdict({"max_abs": 0.5, "rms": 0.07, "top1": 0.9}, file, 2.0, rounding=0.04)
    assert "largest 2" in verdict({"max_abs": 2, "rms": 0.05, "top1": 0.9}, file, 2.0, rounding=0.04)
    assert "not numbers" in verdict({"max_abs": None, "rms": None, "top1": 1.0}, file, 1.0, rounding=1.0)
    assert mismatches([]) == []


def test_other_text_from_the_same_logits_is_a_mismatch(model_dir, monkeypatch):
    """An engine whose cache is wrong: one pass is right, stepping is not."""
    right = {"max_abs": 0.0, "rms": 0.0, "top1": 1.0, "perplexity": 2.0, "tokens_per_s": 1.0}
    answer = {**right, "greedy": [-1] * 24, "spelling": "", "remark": ""}
    monkeypatch.setattr("atp.export.verify.verification._probe", lambda task, reference, threads: answer)
    (check,) = verify(model_dir, tokens=48)
    assert check.ok is False and check.note == "with its cache the greedy text differs from token 0"


@pytest.mark.parametrize("name", ROUNDINGS)
def test_rounding_is_measured_without_changing_the_model(name):
    model = tiny_model("llama", "gqa", layers=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids_WT = tiny_batch()["input_ids"].numpy()[:1]
    with torch.no_grad():
        reference_WTV = model(input_ids=torch.tensor(ids_WT)).logits.numpy()
    error = rounding_error(model, ids_WT, reference_WTV, ROUNDINGS[name])
    assert 0 < error < reference_WTV.std()
    assert rounding_error(model, ids_WT, reference_WTV, ROUNDINGS["f16"]) <= error
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_code_beside_the_weights_that_is_not_atps_is_never_run(tmp_path):
    case = CASES["llama-mha"]
    export_hf(pruned_model(dense_model(case), case, SHAPES["per-layer"]), None, tmp_path / "model")
    (tmp_path / "model" / "modeling_atp.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match="differs from this version of atp"):
        verify(tmp_path / "model", tokens=16)


USER_MISTAKES = [
    (["--to", "tflite"], "--to tflite: unknown; known: hf, adapter, gguf, onnx"),
    (["--to", "adapter"], "is not a run directory"),
    (["--to", "hf,adapter", "--output", "both"], "one at a time"),
    (["--to", "hf"], "needs --output"),
    ([], "nothing to do"),
    (["--to", "gguf", "--gguf-type", "q9"], "'q9' is not known"),
    (["--verify", "--quantised", "int3"], "--quantised int3: unknown"),
    (["--to", "gguf", "--output", "elsewhere", "--verify"], "leave --output out"),
]


@pytest.mark.parametrize(("arguments", "message"), USER_MISTAKES)
def test_mistakes_on_the_command_line_are_named(model_dir, capsys, arguments, message):
    assert main([str(model_dir), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_places_without_a_model_are_named(tmp_path, capsys):
    assert main([str(tmp_path), "--verify"]) == 2
    assert "holds no model" in capsys.readouterr().err
    (tmp_path / "stages").mkdir()
    assert main([str(tmp_path), "--verify"]) == 2
    assert "resume=" in capsys.readouterr().err


def test_a_damaged_model_is_named_by_the_command_line(model_dir, capsys):
    """Pickled and truncated weights, and a tokenizer that is gone: what is wrong, what to do, and nothing written."""
    whole = (model_dir / "model.safetensors").read_bytes()
    (model_dir / "tokenizer.json").rename(model_dir / "tokenizer.gone")
    assert main([str(model_dir), "--to", "gguf"]) == 2
    assert "holds no tokenizer" in capsys.readouterr().err
    assert generate([str(model_dir), "--prompt", "a"]) == 2
    assert "no tokenizer that can be read" in capsys.readouterr().err
    (model_dir / "model.safetensors").write_bytes(whole[:-1000])
    for command in (["--verify"], ["--to", "gguf", "--no-tokenizer"], ["--to", "onnx"]):
        assert main([str(model_dir), *command]) == 2
        assert "truncated or not a safetensors file" in capsys.readouterr().err
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    assert main([str(model_dir), "--verify"]) == 2
    assert "save_pretrained(NEW_DIRECTORY)" in capsys.readouterr().err
    assert not (model_dir / "gguf").exists() and not (model_dir / "onnx").exists()


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["full", "interrupt"])
def test_a_graph_that_could_not_be_written_leaves_the_earlier_one(model_dir, monkeypatch, capsys, error):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'atp[onnx]'")
    (model_dir / "onnx").mkdir()
    (model_dir / "onnx" / "model.onnx").write_bytes(b"earlier")

    def fails(graph, inputs, path, **options):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch.onnx, "export", fails)
    assert main([str(model_dir), "--to", "onnx", "--overwrite"]) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert ("No space left" in capsys.readouterr().err) == isinstance(error, OSError)
    assert (model_dir / "onnx" / "model.onnx").read_bytes() == b"earlier"
    assert not [path.name for path in model_dir.iterdir() if "partial" in path.name]


def test_generation_stops_quietly_when_its_reader_does_or_the_user_interrupts(model_dir, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr("atp.commands.generate.stream", lambda *arguments, **options: iter(["the ", "court"]))
    with os.fdopen(writing, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        assert generate([str(model_dir), "--prompt", "a"]) == 0
    assert capsys.readouterr().err == ""

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("atp.commands.generate.stream", interrupted)
    assert generate([str(model_dir), "--prompt", "a"]) == 130


def test_conversion_of_a_run_directory_and_no_silent_overwriting(tmp_path, model_dir, capsys):
    pytest.importorskip("gguf", reason="the gguf package is not installed: pip install 'atp[gguf]'")
    (tmp_path / "run").mkdir()
    shutil.move(model_dir, tmp_path / "run" / "pruned")
    command = [str(tmp_path / "run"), "--to", "gguf", "--gguf-type", "f16,q8_0"]
    assert main(command) == 0
    files = sorted(path.name for path in (tmp_path / "run" / "pruned" / "gguf").iterdir())
    assert files == ["model-f16.gguf", "model-q8_0.gguf"]
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_another_dtype_and_an_output_directory_in_use(tmp_path, model_dir, capsys):
    (model_dir / "README.md").write_text("---\nlicense: llama3\nbase_model: some-org/Base\n---\n# A card\n")
    (model_dir / "prompt.json").write_text("{}")
    command = [str(model_dir), "--to", "hf", "--output", str(tmp_path / "half"), "--dtype", "bfloat16"]
    assert main(command) == 0
    assert load_exported(tmp_path / "half").dtype == torch.bfloat16
    data = ModelCard.load(tmp_path / "half" / "README.md").data
    assert (data.license, data.base_model) == ("llama3", "some-org/Base")
    assert (tmp_path / "half" / "prompt.json").read_text() == "{}"
    assert main(command) == 2
    assert "not empty" in capsys.readouterr().err


def test_formats_a_run_asks_for_are_refused_before_it_trains(monkeypatch):
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(embedded.base_dir())
    tokenizer = AutoTokenizer.from_pretrained(embedded.base_dir())
    check_formats(config, tokenizer, uniform=False)
    with pytest.raises(ValueError, match="'f12' is not known"):
        check_formats(config, tokenizer, uniform=False, gguf=["f12"])
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="not logged in"):
        check_formats(config, tokenizer, uniform=False, push_to_hub="me/model")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"pip install 'atp\[onnx\]'"):
        check_formats(config, tokenizer, uniform=False, onnx=True)


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 10000.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0}
LONGROPE |= {"factor": 2.0, "original_max_position_embeddings": 32}
REFUSED = [
    ("qwen3", {}, {"gguf": ["f16"], "axes": ["qk_pairs", "channels"]}, r"qk_pairs out of prune\.space=.*export\.gguf"),
    ("llama", {"rope_parameters": DYNAMIC}, {"gguf": ["f16"]}, r"rope_parameters=.*'dynamic'.*export\.gguf"),
    ("llama", {"rope_parameters": LONGROPE}, {"onnx": True}, r"'longrope'.*export\.onnx=false"),
    ("qwen3", {"rope_parameters": LLAMA3}, {"gguf": ["f16"]}, r"qwen3 takes no 'llama3' rotary scaling"),
    ("llama", {}, {"dtype": "float8"}, r"export\.dtype is 'float8'"),
    ("llama", {}, {"max_shard_size": "5 giga"}, r"export\.max_shard_size is '5 giga'"),
]


@pytest.mark.parametrize(("family", "settings", "wanted", "message"), REFUSED)
def test_what_export_would_refuse_is_refused_before_training(family, settings, wanted, message):
    from transformers import AutoTokenizer

    pytest.importorskip("gguf", reason="the gguf package is not installed: pip install 'atp[gguf]'")
    config = type(tiny_model(family).config)(**{**tiny_model(family, vocabulary=4096).config.to_dict(), **settings})
    tokenizer = AutoTokenizer.from_pretrained(embedded.base_dir())
    check_formats(config, tokenizer, uniform=False, axes=["heads", "channels"])
    with pytest.raises(ValueError, match=message):
        check_formats(config, tokenizer, uniform=False, **{"axes": ["heads", "channels"], **wanted})


def test_a_graph_of_dynamic_scaling_says_how_far_it_goes(caplog):
    from atp.export.onnx_graph import check_graph

    config = tiny_model().config
    check_graph(config)
    assert not caplog.records
    config.rope_parameters = DYNAMIC
    check_graph(config)
    assert "up to 64 tokens only" in caplog.text


def test_a_scaled_qwen2_of_equal_widths_is_laid_out_as_llama():
    from atp.export.gguf.layout import check_layout, gguf_layout

    config = tiny_model("qwen2").config
    config.rope_parameters = LLAMA3
    check_layout(config, uniform=True)
    assert gguf_layout(config).architecture == "llama"


class FakeHub:
    """What the hub is asked; a repository that exists has a visibility of its own."""

    def __init__(self, private=None):
        self.private, self.made = private, None

    def __call__(self):
        return self

    def repo_exists(self, name):
        return self.private is not None

    def create_repo(self, name, *, private=None, exist_ok=False):
        self.made = private
        self.private = private if self.private is None else self.private

    def repo_info(self, name):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, repo_id, folder_path):
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}")


def test_uploads_are_private_unless_asked_otherwise(tmp_path, model_dir, monkeypatch, caplog, capsys):
    from atp.export.bundle import upload

    for options, private in (([], True), (["--public"], False)):
        hub = FakeHub()
        monkeypatch.setattr("huggingface_hub.HfApi", hub)
        assert main([str(model_dir), "--push-to-hub", "me/model", *options]) == 0
        assert hub.made is private and "https://hub/me/model" in capsys.readouterr().out
    assert not caplog.records
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub(private=False))
    upload(model_dir, "me/model")
    assert "me/model exists and stays public" in caplog.text
    assert main([str(model_dir), "--verify", "--public"]) == 2
    assert "--push-to-hub REPO" in capsys.readouterr().err


def test_a_run_uploads_as_its_configuration_says(tmp_path, monkeypatch):
    from atp.config.schema import ExportConfig
    from atp.run import pipeline

    hub = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    for public in (False, True):
        settings = ExportConfig(push_to_hub="me/model", public=public)
        pipeline._upload(settings, tmp_path, {"removal": {"not_verified": ""}})
        assert hub.made is not public
    monkeypatch.setattr(pipeline, "upload", lambda *arguments, **options: pytest.fail("uploaded what is not verified"))
    pipeline._upload(settings, tmp_path, {"removal": {"not_verified": "gguf f32: rms 0.3, allowed 0.001"}})


def test_windows_hold_the_real_tokens_in_order():
    batch = {"input_ids": torch.tensor([[1, 2, 0], [3, 4, 5]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    assert windows_of([batch], tokens=4, length=2).tolist() == [[1, 2], [3, 4]]
    assert windows_of([batch], tokens=99, length=99).tolist() == [[1, 2, 3, 4, 5]]


def test_generation_continues_the_prompt_as_the_model_does(model_dir, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert generate([str(model_dir), "--prompt", "A BILL to", "--max-new-tokens", "12"]) == 0
    written = capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer("A BILL to", return_tensors="pt")["input_ids"]
    made = AutoModelForCausalLM.from_pretrained(model_dir).generate(ids, max_new_tokens=12, do_sample=False)
    assert written == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True) + "\n"
    sampled = [str(model_dir), "--prompt", "A BILL to", "--max-new-tokens", "12", "--temperature", "2"]
    texts = []
    for seed in ("1", "1", "2"):
        assert generate([*sampled, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_generation_reads_a_pipe_and_fills_a_task_template(model_dir, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the court held\n"))
    assert generate([str(model_dir), "--max-new-tokens", "8", "--task", "casehold"]) == 0
    piped = capsys.readouterr().out
    prompt = fill_prompt("casehold", "the court held")
    assert generate([str(model_dir), "--max-new-tokens", "8", "--prompt", prompt]) == 0
    assert capsys.readouterr().out == piped


def test_generation_asks_with_the_prompt_that_the_model_was_evaluated_with(model_dir, capsys):
    own = Prompt("mine", system="{{ instruction }}", instructions={"holding": "Name it.", "default": "Do it."})
    (model_dir / "prompt.json").write_text(json.dumps(own.plain()))
    asked = [str(model_dir), "--max-new-tokens", "8", "--prompt"]
    for prompt, whole in (
        (["the court held"], own.render("the court held", "text")),
        (["the court held", "--task", "holding"], own.render("the court held", "holding")),
        (["the court held", "--task", "casehold"], own.render(fill_prompt("casehold", "the court held"), "casehold")),
    ):
        assert generate([*asked, *prompt]) == 0
        told = capsys.readouterr()
        assert generate([*asked, whole, "--plain"]) == 0
        assert capsys.readouterr().out == told.out and "--plain leaves it out" in told.err
    (model_dir / "prompt.json").write_text("{")
    assert generate([*asked, "a"]) == 2 and "cannot be read as a prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--chat"], "no chat template"),
        (["--prompt", "a", "--format", "gguf"], "no GGUF file; write one"),
        (["--prompt", "a", "--max-new-tokens", "0"], "must be at least 1"),
        (["--prompt", "a", "--max-new-tokens", "600"], "below the context of 512"),
        (["--prompt", "a", "--chat", "--task", "billsum"], "choose one"),
        (["--prompt", "a", "--task", "casehol"], "did you mean casehold"),
        (["--prompt", "a", "--task", "boolq"], "give the whole prompt instead"),
        (["--prompt", ""], "there is no prompt"),
    ],
)
def test_mistakes_in_generation_are_named(model_dir, capsys, arguments, message):
    assert generate([str(model_dir), *arguments]) == 2
    assert message in capsys.readouterr().err
