"""Users' mistakes: each gives a clear message and loses nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from atp import embedded
from atp.commands.train import compose_config
from atp.config.schema import TrainConfig
from atp.run import parts


def config(*overrides: str) -> TrainConfig:
    made = OmegaConf.to_object(compose_config(["experiment=smoke", *overrides]))
    assert isinstance(made, TrainConfig)
    return made


def broken_model(path: Path, **changes: object) -> Path:
    """A copy of the embedded base with another config."""
    shutil.copytree(embedded.base_dir(), path)
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**settings, **changes}))
    return path


def test_unknown_model_type(tmp_path: Path) -> None:
    path = broken_model(tmp_path / "m", model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"])
    with pytest.raises(ValueError, match=r"'gpt_neox'.*llama, mistral, qwen2, qwen3"):
        parts.load_base(config("model=local", f"model.path={path}").model)


def test_missing_model_directory_and_no_path() -> None:
    with pytest.raises(ValueError, match=r"model\.path=\./nowhere: no such directory"):
        parts.load_base(config("model=local", "model.path=./nowhere").model)
    with pytest.raises(ValueError, match=r"model\.path is not set"):
        parts.load_base(config("model=local").model)


def test_directory_without_weights(tmp_path: Path) -> None:
    path = broken_model(tmp_path / "m")
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.path: .*lacks weight files: model\.safetensors"):
        parts.load_base(config("model=local", f"model.path={path}").model)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    path = broken_model(tmp_path / "m")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.path: .*no \*\.safetensors: .*as pickle"):
        parts.load_base(config("model=local", f"model.path={path}").model)


def test_hub_without_network_says_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"cannot be fetched from the hub.*model=local model\.path.*log in"):
        parts.load_base(config("model=llama3_8b").model)


def test_unknown_dtype_and_source() -> None:
    with pytest.raises(ValueError, match=r"model.dtype is 'fp8'; known: float32"):
        parts.load_base(config("model.dtype=fp8").model)
    with pytest.raises(ValueError, match=r"data.source is 'sql'; known: embedded, files, tasks"):
        parts.load_splits(config("data.source=sql").data, 0)


def test_no_records_of_other_domains_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"evaluate\.max_forgetting is 0.*evaluate\.forgetting=\[\]"):
        parts.load_beyond(config("evaluate.max_forgetting=0"))
    assert parts.load_beyond(config("evaluate.max_forgetting=0", "evaluate.forgetting=[]"))[0] == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "one"}\n{"text": ', r"data\.jsonl:2"),
        ("", "holds no records"),
        ('{"prompt": "a"}\n', r"data\.jsonl:1.*prompt"),
        ('{"prompt": "a", "choices": ["b", "c"], "label": 5}\n', r"data\.jsonl:1.*label"),
    ],
)
def test_bad_jsonl_names_file_and_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        parts.load_splits(config("data=jsonl", f"data.path={path}").data, 0)


def test_missing_data_file_and_no_path() -> None:
    with pytest.raises(ValueError, match=r"nowhere\.jsonl does not exist.*data\.path"):
        parts.load_splits(config("data=jsonl", "data.path=nowhere.jsonl").data, 0)
    with pytest.raises(ValueError, match=r"data\.path is not set"):
        parts.load_splits(config("data=jsonl").data, 0)


def test_sequences_longer_than_the_context() -> None:
    made = config("data.max_length=4096")
    tokenizer = parts.load_tokenizer(made.model)
    splits = parts.load_splits(made.data, 0)
    with pytest.raises(ValueError, match=r"data\.max_length=4096 exceeds the model's context of 512"):
        parts.data_module(made, splits, tokenizer, 512)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prune.sparsity=0"], "between 0 and 1"),
        (["prune.sparsity=1.2"], "between 0 and 1"),
        (["prune.space=[heads]", "prune.sparsity=0.5"], r"removes at most 0\.\d+ of the block parameters"),
        (["prune.space=[neurons]"], "'neurons'; known kinds: heads, query_heads, channels"),
        (["prune.min_heads=-1"], r"prune\.min_heads is -1"),
        (["prune.schedule.ramp=0.9"], "raise freeze_at"),
        (["lora.target_modules=[c_attn]"], "matches no linear layer.*q_proj"),
        (["lora.r=0"], r"lora\.r is 0"),
        (["prune.generator._target_=atp.masks.generator.Missing"], "cannot be imported"),
        (["+prune.generator.initial_sd=1"], r"takes no such argument; did you mean 'initial_std'"),
        (["prune/generator=transformer", "prune.generator.width=30"], "multiple of num_heads"),
        (["prune.distill.logits=2"], r"prune\.distill\.logits is 2"),
    ],
)
def test_bad_pruning_settings(overrides: list[str], message: str) -> None:
    made = config(*overrides)
    with pytest.raises(ValueError, match=message):
        parts.pruning_module(made, parts.load_base(made.model))


def test_warm_start_needs_a_generator_that_can() -> None:
    import torch

    made = config("prune/generator=transformer")
    module = parts.pruning_module(made, parts.load_base(made.model))
    with pytest.raises(ValueError, match=r"TransformerGenerator cannot start from given scores.*prune/generator=free"):
        module.generator.warm_start(torch.zeros(module.space.num_units))
