"""What is not of the table, or not as the table has it: one line that names the way out, before anything runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Phi3Config, Phi3ForCausalLM, PreTrainedConfig

from atp.commands.train import compose_config
from atp.errors import UserError
from atp.model.families import ADDING_PAGE, BASES_PAGE, family_of
from atp.model.loading import load_model
from atp.run import parts

ROOT = Path(__file__).parents[2]


def saved(directory: Path, **changes: Any) -> Path:
    tiny_model().save_pretrained(directory)
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return directory


@pytest.mark.parametrize(("name", "nearest"), [("smollm", "smollm3"), ("mixtral", "mistral"), ("qwen3_moe", "qwen3")])
def test_an_unknown_model_type_names_the_nearest_family_and_the_page(tmp_path: Path, name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"model_type='{name}'.*nearest of them is '{nearest}'.*{ADDING_PAGE}"):
        load_model(str(saved(tmp_path, model_type=name)))
    assert (ROOT / ADDING_PAGE).is_file()


def test_a_model_with_code_of_its_own_is_refused_without_running_it(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("raise RuntimeError('is never run')")
    directory = saved(tmp_path, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    with pytest.raises(UserError, match=r"needs Python code of its own \(auto_map in config.json\), which is not run"):
        load_model(str(directory))


def vision_model(directory: Path) -> Gemma3ForConditionalGeneration:
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 64, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
    eyes = {**sizes, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    tokens = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62, "mm_tokens_per_image": 4}
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=eyes, **tokens)).eval()
    model.save_pretrained(directory)
    return model


def test_the_text_part_of_a_vision_model_is_refused_with_the_way_to_it(tmp_path: Path) -> None:
    whole = vision_model(tmp_path / "DIRECTORY")
    with pytest.raises(UserError, match=f"'gemma3' is a model of more than text.*text part.*{BASES_PAGE}"):
        load_model(str(tmp_path / "DIRECTORY"))
    loaded, ids = load_model(run_shown("The text part", tmp_path, "TEXT_DIRECTORY")), torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, whole(ids).logits)


def run_shown(heading: str, folder: Path, made: str) -> str:
    """Run the lines that the page shows below a heading in a folder, without the tokenizer's; what they write."""
    shown = re.search(r"```python\n(.*?)```", (ROOT / BASES_PAGE).read_text().split(f"## {heading}")[1], re.DOTALL)
    assert shown
    code = "\n".join(line for line in shown[1].splitlines() if "Tokenizer.from" not in line)
    exec(re.sub(r'"((?:\w+_)?DIRECTORY)"', lambda name: repr(str(folder / name[1])), code), {})
    return str(folder / made)


@pytest.mark.parametrize("window", [None, 6])
def test_phi3_is_refused_with_the_way_to_a_mistral_that_computes_it(tmp_path: Path, window: int | None) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 20, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "sliding_window": window, "rope_theta": 500.0}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    whole = Phi3ForCausalLM(Phi3Config(**sizes, **heads, **tokens)).eval()
    whole.save_pretrained(tmp_path / "DIRECTORY")
    with pytest.raises(UserError, match=f"model_type='phi3' is not supported: .*written as a Mistral: {BASES_PAGE}"):
        load_model(str(tmp_path / "DIRECTORY"))
    loaded, ids = load_model(run_shown("Phi-3", tmp_path, "MISTRAL_DIRECTORY")), torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, whole(ids).logits)
    assert loaded.config.sliding_window == window and loaded.config.rope_parameters["rope_theta"] == 500.0


def test_a_text_part_of_no_family_is_said_to_be_none() -> None:
    config = PreTrainedConfig()
    config.model_type, config.text_config = "other_vision", PreTrainedConfig()  # type: ignore[attr-defined]
    config.text_config.model_type = "other_text"
    with pytest.raises(UserError, match=r"text part \('other_text'\) is none of the families"):
        family_of(config)


def test_a_config_of_another_family_than_the_weights_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"do not fit its config.json: missing: .*q_norm"):
        load_model(str(saved(tmp_path / "lacks", model_type="qwen3", architectures=["Qwen3ForCausalLM"])))
    tiny_model("qwen3").save_pretrained(tmp_path / "has")
    file = tmp_path / "has" / "config.json"
    file.write_text(file.read_text().replace("qwen3", "llama").replace("Qwen3", "Llama"))
    with pytest.raises(UserError, match=r"do not fit its config.json: unexpected: .*k_norm"):
        load_model(str(tmp_path / "has"))


def test_packing_beyond_a_window_is_refused_and_within_it_taken() -> None:
    base = tiny_model("mistral").config
    base.sliding_window = 16
    made: Any = compose_config(["experiment=smoke", "data.packing=true", "data.max_length=32"])
    with pytest.raises(
        UserError, match=r"data.packing: the base's attention reaches back 16 tokens.*data.max_length=16"
    ):
        parts.check_packing(made, base)
    made.data.max_length = 16
    parts.check_packing(made, base)


def test_a_soft_cap_on_scores_is_computed_by_eager_attention(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_model("gemma2").save_pretrained(tmp_path)
    with caplog.at_level("INFO"):
        model = load_model(str(tmp_path), attn_implementation="sdpa")
    assert model.config._attn_implementation == "eager" and "soft cap on scores" in caplog.text
    made: Any = compose_config(["experiment=smoke", "data.packing=true"])
    with pytest.raises(
        UserError, match=r"data.packing needs the attention kernel sdpa.*gemma2.*attn_logit_softcapping"
    ):
        parts.check_packing(made, model.config)


def test_attention_in_both_directions_is_refused(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text")
    model.config.use_bidirectional_attention = True
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config.json: the config sets use_bidirectional_attention=True"):
        load_model(str(tmp_path))
