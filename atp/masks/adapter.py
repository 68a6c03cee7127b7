"""LoRA adapters of a live model: which unit owns which entries of their factors, and the adapter taken off.

Sits between the trained model and whatever cuts or ships it: compaction and removal ask for the sides of an adapter's
factors, export takes it off the model as an :class:`atp.model.adapter.Adapter`. It knows PEFT's parameter names, and
nothing of masks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from atp.errors import UserError
from atp.model.adapter import Adapter
from atp.space.space import PruningSpace, Side, Weight

_PREFIX = "base_model.model."


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
