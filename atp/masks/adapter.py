"""LoRA adapters: which unit owns which entries of their factors, and adapters stored apart from the base model.

Sits between the trained model and whatever cuts or ships it: compaction and removal ask for the sides of an adapter's
factors, export takes it off the model, writes it in PEFT's format, reads it back and merges it tensor by tensor. It
knows PEFT's file format and parameter names, and nothing of masks.

Shape suffixes: R rank, I and O inputs and outputs of a linear.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atp.errors import UserError
from atp.space.space import PruningSpace, Side, Weight

ADAPTER_FOLDER = "adapter"
_PREFIX = "base_model.model."
_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def owned_parameters(
    peft_model: PeftModel, weight: Weight
) -> Iterator[tuple[str, nn.Parameter, Side | None, Side | None]]:
    """Every parameter of a linear, base and adapter, with the sides of its dimensions.

    Yields:
        Name, parameter, and the side of its rows and its columns; None where a dimension is never cut (the rank) or
        does not exist.
    """
    module = peft_model.get_submodule(_PREFIX + weight.module)
    for name, parameter in module.named_parameters():
        kind = name.removeprefix("base_layer.")
        if kind == "weight":
            yield f"{weight.module}.{name}", parameter, weight.rows, weight.columns
        elif kind == "bias" or kind.startswith("lora_B."):
            yield f"{weight.module}.{name}", parameter, weight.rows, None
        elif kind.startswith("lora_A."):
            yield f"{weight.module}.{name}", parameter, None, weight.columns
        else:
            raise UserError(f"{weight.module}.{name}: no rule for cutting this adapter parameter; prune.compact=false")


def adapter_sides(space: PruningSpace) -> dict[str, tuple[Side | None, Side | None]]:
    """Map the endings of parameter names in a checkpoint to the sides of their two dimensions.

    A linear has its base weight under one name with an adapter and under another without, and not every linear needs
    one (``lora.target_modules``).
    """
    sides: dict[str, tuple[Side | None, Side | None]] = {}
    for weight in space.weights:
        sides[f"{weight.module}.lora_A.default.weight"] = (None, weight.columns)
        sides[f"{weight.module}.lora_B.default.weight"] = (weight.rows, None)
        for base in (weight.module, f"{weight.module}.base_layer"):
            sides[f".{base}.weight"] = (weight.rows, weight.columns)
            sides[f".{base}.bias"] = (weight.rows, None)
    return sides


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
        (directory / _CONFIG_FILE).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")

    def added_to(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor of this name with the adapter merged, in the tensor's dtype; the sum is taken in float32."""
        module, _, kind = name.rpartition(".")
        if kind != "weight" or module not in self.factors:
            return tensor
        down_RI, up_OR = (factor.to(tensor.device, torch.float32) for factor in self.factors[module])
        scale = float(self.config["lora_alpha"]) / int(self.config["r"])
        return (tensor.float() + (up_OR @ down_RI) * scale).to(tensor.dtype)


def extract_adapter(peft_model: PeftModel) -> Adapter:
    """The adapter of a PEFT model, its tensors shared with the model."""
    config = peft_model.peft_config["default"].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    config |= {"base_model_name_or_path": None, "inference_mode": True}
    layers = {
        name.removeprefix(_PREFIX): module
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraLayer)
    }
    factors: dict[str, Any] = {
        name: tuple(layer.get_submodule(f"lora_{kind}.default").weight for kind in "AB")  # type: ignore[attr-defined]
        for name, layer in layers.items()
    }
    plain = json.loads(json.dumps(config, default=lambda value: getattr(value, "value", str(value))))
    return Adapter(plain, factors)


def read_adapter(directory: str | Path) -> Adapter:
    """Read an adapter that :meth:`Adapter.save` wrote.

    Raises:
        ValueError: Files are missing or broken, or it is not a plain LoRA adapter.
    """
    folder = Path(directory)
    try:
        config = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / _WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the adapter in {folder} cannot be read: {error}; export it again") from error
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("use_rslora"):
        raise UserError(f"{folder} holds no plain LoRA adapter; merge it with PEFT (merge_and_unload) and save that")
    return Adapter(config, _paired(tensors, folder))


def has_adapter(directory: str | Path) -> bool:
    """Whether an adapter lies beside the weights of a directory, as in an unmerged export."""
    return (Path(directory) / ADAPTER_FOLDER / _CONFIG_FILE).is_file()


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
