"""The base of a run: what a half-precision or odd one is exported as, and refusals that name the setting."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from atp import embedded
from atp.commands.train import compose_config
from atp.config.schema import TrainConfig
from atp.errors import UserError
from atp.run import parts


def config(*overrides: str) -> TrainConfig:
    made = OmegaConf.to_object(compose_config(["experiment=smoke", *overrides]))
    assert isinstance(made, TrainConfig)
    return made


def stored_as(path: Path, *types: torch.dtype) -> Path:
    """The embedded base with its tensors in these types, by turns; norms and embeddings in the last."""
    shutil.copytree(embedded.base_dir(), path)
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(types[-1] if "norm" in name or "embed" in name else types[0])
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("types", "overrides", "exported"),
    [
        ((torch.float32,), (), torch.float32),
        ((torch.float16,), (), torch.float16),
        ((torch.bfloat16,), (), torch.bfloat16),
        ((torch.float16, torch.float32), (), torch.float16),
        ((torch.float64,), (), torch.float32),
        ((torch.float16,), ("export.dtype=float32",), torch.float32),
        ((torch.float32,), ("model.dtype=bfloat16",), torch.bfloat16),
    ],
)
def test_an_export_has_the_type_of_its_base(
    tmp_path: Path,
    types: tuple[torch.dtype, ...],
    overrides: tuple[str, ...],
    exported: torch.dtype,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = stored_as(tmp_path / "base", *types)
    made = config("model=local", f"model.path={path}", *overrides)
    with caplog.at_level(logging.INFO):
        assert parts.export_dtype(made) == exported
    assert ("export.dtype chooses" in caplog.text) is (types[0] != torch.float32 and not overrides)
    assert parts.load_base(made.model).dtype == parts.DTYPES[made.model.dtype]


def test_what_is_no_base_is_refused_by_the_name_of_its_setting(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"ONNX")
    for path, message in ((tmp_path / "model.onnx", "is an ONNX file"), (tmp_path, "no config.json; its weights are")):
        with pytest.raises(UserError, match=f"^model.path: .*{message}"):
            parts.load_base(config("model=local", f"model.path={path}").model)
