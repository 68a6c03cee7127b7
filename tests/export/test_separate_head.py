"""A base whose config ties its head and whose file has another: both are kept apart, from training to the export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_batch, tiny_model
from safetensors.torch import load_file, save_file

from atp.cut.removal import max_logit_difference, remove
from atp.cut.selection import select
from atp.export.gguf.layout import gguf_layout
from atp.export.hf.loading import load_exported
from atp.export.hf.writing import export_hf
from atp.masks.lora import MaskedModel, add_lora
from atp.masks.merging import merged_tensors
from atp.model.loading import load_model
from atp.space.space import PruningSpace


@pytest.mark.parametrize("kinds", [("heads", "channels"), ("heads", "channels", "hidden")], ids="-".join)
@pytest.mark.parametrize("targets", [None, ["q_proj", "lm_head"]], ids=["blocks", "head"])
def test_the_head_stays_apart(tmp_path: Path, kinds: tuple[str, ...], targets: list[str] | None) -> None:
    tiny_model(tied=True).save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, tmp_path / "base" / "model.safetensors")

    base = load_model(str(tmp_path / "base"))
    config, space = base.config, PruningSpace.from_model(base, kinds)
    masked = MaskedModel(add_lora(base, r=2, target_modules=targets), space).eval()
    for name, parameter in masked.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    masks_U = select(space, torch.rand(space.num_units, generator=torch.Generator().manual_seed(2)), 0.3)
    masked.set_masks(masks_U)
    removed = remove(merged_tensors(masked.peft_model), config, space, masks_U)
    assert max_logit_difference(masked, removed, [tiny_batch()]) < 1e-4
    export_hf(removed, None, tmp_path / "pruned")
    for reloaded in (load_exported(tmp_path / "pruned"), load_model(str(tmp_path / "pruned"))):
        assert max_logit_difference(masked, reloaded, [tiny_batch()]) < 1e-4
    if "hidden" not in kinds:
        assert "output.weight" in [tensor.name for tensor in gguf_layout(removed.config).tensors]
