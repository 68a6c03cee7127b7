"""Training on a quantised base: what it refuses, that it is quantised, and that the export holds none of it."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from atp import embedded
from atp.commands.train import compose_config
from atp.config.schema import TrainConfig
from atp.cut.removal import slice_tensors
from atp.export.hf.loading import StoredModel
from atp.run import parts
from atp.run.directory import RunDirectory
from atp.run.stages import Stages

ALLOWED = (
    "prune.warm_start.criterion=[fisher]",
    "prune.warm_start.attention=[0]",
    "prune.warm_start.batches=2",
    "prune.repair.batches=0",
)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'atp[quantization]'"
)


def config(*overrides: str) -> TrainConfig:
    made = OmegaConf.to_object(compose_config(["experiment=smoke", *ALLOWED, *overrides]))
    assert isinstance(made, TrainConfig)
    return made


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atp.run.parts.quantization.is_installed", lambda: True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.quantization=fp4",), "fp4.*known: nf4, int8"),
        (
            ("model.quantization=nf4", "prune.warm_start.criterion=[taylor]"),
            r"criterion=\[taylor\]; set it to \[fisher\]",
        ),
        (("model.quantization=nf4", "prune.warm_start.criterion=[fisher+wanda]"), r"\[fisher.wanda\]; set it to"),
        (("model.quantization=int8", "prune.repair.batches=4"), r"repair\.batches=4"),
        (
            ("model.quantization=int8", "prune.warm_start.criterion=[fisher,random]"),
            r"set them to \[fisher\] and \[0\.0\]",
        ),
        (("model.quantization=int8", "prune.warm_start.attention=[0,1]"), r"set them to \[fisher\] and \[0\.0\]"),
        (("model.quantization=nf4", "prune=loraprune"), "gradient_scores.*generator=free"),
    ],
)
def test_what_needs_the_weights_is_refused(there: None, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parts.check_quantization(config(*overrides))


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atp.run.parts.quantization.is_installed", lambda: False)
    with pytest.raises(ValueError, match=r"atp\[quantization\]"):
        parts.check_quantization(config("model.quantization=nf4"))
    parts.check_quantization(config())


def test_compaction_is_switched_off_with_a_warning(there: None, caplog: pytest.LogCaptureFixture) -> None:
    made = config("model.quantization=nf4", "prune.compact=true")
    with caplog.at_level(logging.WARNING):
        parts.check_quantization(made)
    assert "prune.compact is ignored" in caplog.text
    assert not parts.pruning_module(made, parts.load_base(made.model)).compaction


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_the_export_is_the_original_weights_with_the_adapters(kind: str, tmp_path: Path) -> None:
    made = config(
        f"model.quantization={kind}", "trainer.max_steps=6", "prune.schedule.freeze_at=0.5", "export.verify=false"
    )
    stages = Stages(made, RunDirectory(tmp_path / "run", {}, [], resume=False), {}, {})
    trained = parts.load_base(made.model, quantized=True)
    projection: Any = trained.get_submodule("model.layers.0.mlp.up_proj")
    assert projection.weight.dtype in (torch.uint8, torch.int8)
    stages.fit_jointly()
    result = stages.remove_and_export()
    assert result["max_abs_logit_diff"] < 1e-3

    state = torch.load(stages.directory.checkpoint("joint"), weights_only=True)["state_dict"]
    base = load_file(embedded.base_dir() / "model.safetensors")
    scale = made.lora.alpha / made.lora.r
    for name in [name for name in base if name.endswith("_proj.weight")]:
        prefix = f"model.peft_model.base_model.model.{name.removesuffix('.weight')}"
        down, up = (state[f"{prefix}.lora_{factor}.default.weight"] for factor in "AB")
        assert down.dtype == up.dtype == torch.float32
        base[name] = base[name] + scale * up @ down
    expected = dict(slice_tensors(base.items(), stages.space, state["final_masks_U"]))
    exported = dict(StoredModel(tmp_path / "run" / "pruned").tensors())
    assert exported.keys() == expected.keys() - {"lm_head.weight"}
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5)


@needs_bitsandbytes
def test_the_quantised_model_is_near_the_one_that_is_exported() -> None:
    made = config("model.quantization=nf4")
    ids = torch.arange(5, 69).view(2, 32)
    with torch.no_grad():
        quantized, original = (parts.load_base(made.model, quantized=flag)(ids).logits for flag in (True, False))
    difference = float((quantized - original).norm() / original.norm())
    assert 1e-3 < difference < 0.5
