"""A LoRA model's weights as plain tensors: with its adapters added to them, or without.

Between the masked model and whatever needs ordinary weights: removal, export, evaluation. It knows PEFT's layers and
nothing of masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.masks.lora import _PREFIX


@torch.no_grad()
def merged_tensors(peft_model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters of the base model with the adapters merged, one at a time, under the base model's own names.

    The sum W + (alpha / r) B A is taken in float32 and cast back to the base weight's dtype; the wrapped model is left
    unchanged.
    """
    adapted = {
        name.removeprefix(_PREFIX): module
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraLayer)
    }
    for name, tensor in peft_model.state_dict(keep_vars=False).items():
        plain = name.removeprefix(_PREFIX)
        if ".lora_" in plain:
            continue
        plain = plain.replace(".base_layer.", ".")
        owner, _, kind = plain.rpartition(".")
        if owner in adapted and kind == "weight":
            layer: Any = adapted[owner]
            delta = layer.get_delta_weight("default").to(tensor.device)
            tensor = (tensor.float() + delta.float()).to(tensor.dtype)
        yield plain, tensor


def base_tensors(peft_model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters of the base model without the adapters, under the base model's own names."""
    for name, tensor in peft_model.state_dict(keep_vars=False).items():
        plain = name.removeprefix(_PREFIX)
        if ".lora_" not in plain:
            yield plain.replace(".base_layer.", "."), tensor


def merged_state(peft_model: PeftModel) -> dict[str, Tensor]:
    """All of :func:`merged_tensors` at once."""
    return dict(merged_tensors(peft_model))


def merge_in_place(peft_model: nn.Module) -> PreTrainedModel:
    """Merge the adapters into the base model and return it; the PEFT model must not be used afterwards."""
    assert isinstance(peft_model, PeftModel)
    merged = peft_model.merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    return merged
