"""LoRA adapters as files: PEFT's format, read and written without PEFT, and added to the weights beside them.

At the bottom of the model room. An export that was not merged carries its adapter in ``adapter/``; whatever loads the
directory adds it, so that it is the tuned model to every command. Knows names and shapes, nothing of masks or training.

Shape suffixes: R rank, I and O inputs and outputs of a linear.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atp.errors import UserError
from atp.model.odd_places import ADAPTER_CONFIG, ADAPTER_FOLDER

_PREFIX = "base_model.model."
_WEIGHTS_FILE = "adapter_model.safetensors"
_NOT_PLAIN = (
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
)
"""Fields of PEFT's config by which an adapter is more, or scaled otherwise, than ``W + alpha / r B A``."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter apart from its base model.

    Attributes:
        config: PEFT's configuration, as JSON values.
        factors: Module name -> A [R, in] and B [out, R].
    """

    config: dict[str, Any]
    factors: dict[str, tuple[Tensor, Tensor]]

    def save(self, directory: Path) -> None:
        """Write the directory that ``PeftModel.from_pretrained`` reads."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for module, factors in self.factors.items():
            for kind, factor in zip("AB", factors, strict=True):
                tensors[f"{_PREFIX}{module}.lora_{kind}.weight"] = factor.detach().to("cpu").contiguous()
        save_file(tensors, directory / _WEIGHTS_FILE, metadata={"format": "pt"})
        (directory / ADAPTER_CONFIG).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")

    def added_to(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor of this name with the adapter merged, in the tensor's dtype; the sum is taken in float32."""
        module, _, kind = name.rpartition(".")
        if kind != "weight" or module not in self.factors:
            return tensor
        down_RI, up_OR = (factor.to(tensor.device, torch.float32) for factor in self.factors[module])
        scale = float(self.config["lora_alpha"]) / int(self.config["r"])
        return (tensor.float() + (up_OR @ down_RI) * scale).to(tensor.dtype)


def read_adapter(directory: str | Path) -> Adapter:
    """Read an adapter that :meth:`Adapter.save` wrote.

    Raises:
        ValueError: Files are missing or broken, or it is not a plain LoRA adapter.
    """
    folder = Path(directory)
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / _WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the adapter in {folder} cannot be read: {error}; export it again") from error
    special = [name for name in _NOT_PLAIN if config.get(name)]
    if config.get("peft_type") != "LORA" or special:
        kind = ", ".join(special) or f"peft_type {config.get('peft_type')!r}"
        raise UserError(
            f"{folder} holds no plain LoRA adapter ({kind}); merge it with PEFT (merge_and_unload) and save that"
        )
    if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"the adapter in {folder} holds values that are not finite ({broken[0]}); it cannot be used")
    return Adapter(config, _paired(tensors, folder))


def has_adapter(directory: str | Path) -> bool:
    """Whether an adapter lies beside the weights of a directory, as in an unmerged export."""
    return (Path(directory) / ADAPTER_FOLDER / ADAPTER_CONFIG).is_file()


def merge_beside(model: nn.Module, directory: str | Path) -> bool:
    """Merge the adapter of an unmerged export into the model loaded from its directory.

    Args:
        model: The model, with weights of the directory.
        directory: The exported directory; one without ``adapter/`` changes nothing.

    Returns:
        Whether an adapter was there.

    Raises:
        UserError: The adapter is broken or does not fit the model.
    """
    if not has_adapter(directory):
        return False
    folder = Path(directory) / ADAPTER_FOLDER
    adapter = read_adapter(folder)
    weights = dict(model.named_parameters())
    for module, (down_RI, up_OR) in adapter.factors.items():
        name, shape = f"{module}.weight", (up_OR.shape[0], down_RI.shape[1])
        if name not in weights or tuple(weights[name].shape) != shape:
            there = list(weights[name].shape) if name in weights else "absent"
            raise UserError(f"the adapter in {folder} does not fit the weights: {module} is {there}, it is of {shape}")
        with torch.no_grad():
            weights[name].copy_(adapter.added_to(name, weights[name].detach()))
    return True


def _paired(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    modules = {name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors}
    try:
        return {
            module: (tensors[f"{_PREFIX}{module}.lora_A.weight"], tensors[f"{_PREFIX}{module}.lora_B.weight"])
            for module in sorted(modules)
        }
    except KeyError as error:
        raise UserError(f"the adapter in {folder} lacks {error}; export it again") from error
