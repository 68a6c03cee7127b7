"""An unmerged export is the tuned model to whatever loads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_verification import unmerged

from atp import embedded
from atp.commands.evaluate import load
from atp.config.schema import ModelConfig
from atp.errors import UserError
from atp.export.hf.loading import load_exported
from atp.model.adapter import merge_beside
from atp.run import parts

IDS = torch.arange(3, 15)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture
def export(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    directory, merged = unmerged(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((embedded.base_dir() / name).read_bytes())
    return directory, merged


def test_evaluation_scores_the_tuned_model(export: tuple[Path, torch.nn.Module]) -> None:
    directory, merged = export
    model, _ = load(str(directory), "float32")
    torch.testing.assert_close(logits(model), logits(merged), rtol=0, atol=1e-5)


def test_a_run_on_it_begins_with_the_tuned_model(export: tuple[Path, torch.nn.Module]) -> None:
    directory, merged = export
    model = parts.load_base(ModelConfig(path=str(directory)))
    torch.testing.assert_close(logits(model), logits(merged), rtol=0, atol=1e-5)


def test_every_way_of_loading_adds_the_adapter_alike_to_half_precision(export: tuple[Path, torch.nn.Module]) -> None:
    directory, _ = export
    file = directory / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    as_base = parts.load_base(ModelConfig(path=str(directory)))
    assert torch.equal(logits(as_base), logits(load_exported(directory, dtype=torch.float32)))


def test_an_adapter_of_another_model_is_refused(export: tuple[Path, torch.nn.Module]) -> None:
    directory, merged = export
    merged.get_submodule("model.layers.0.self_attn").q_proj = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="does not fit the weights"):
        merge_beside(merged, directory)
