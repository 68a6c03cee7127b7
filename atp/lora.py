"""PEFT LoRA with masks: the model that trains.

Sits between the loaded base model and the training module: wraps the seven linears with LoRA adapters, multiplies masks
into the forward pass at the pruning space's sites, and merges adapters back for removal. This is the only file that
knows PEFT's internals. It knows masks as tensors and nothing of how they come about.

A site's mask multiplies the *input* of its output projection, before base weight and adapter alike, so a zero removes
the unit's part in both branches. What the other projections compute for a removed unit then has no path to the output.

Shape suffixes: U units, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.space import PruningSpace, Side

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven linears of a LLaMA block, the default targets."""

_PREFIX = "base_model.model."


def add_lora(
    model: PreTrainedModel,
    *,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: Sequence[str] = ALL_LINEARS,
) -> PeftModel:
    """Wrap a model with trainable float32 LoRA adapters; everything else is frozen.

    Args:
        model: Base model; its linears are wrapped in place.
        r: Rank.
        alpha: Scale numerator; the adapter's output is multiplied by alpha / r.
        dropout: Dropout before the A factor.
        target_modules: Names of the linears to adapt.

    Raises:
        ValueError: A bad rank or dropout, or a target that matches no module.
    """
    if r < 1:
        raise ValueError(f"lora.r is {r}; the rank must be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"lora.dropout is {dropout}; it must lie in [0, 1)")
    linears = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    missing = [name for name in target_modules if name.rpartition(".")[2] not in linears]
    if missing or not target_modules:
        raise ValueError(
            f"lora.target_modules holds {missing or 'no name'}, which matches no linear layer of "
            f"{type(model).__name__}; "
            f"its linears are {', '.join(sorted(linears))}"
        )
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT annotates int but divides
        lora_dropout=dropout,
        target_modules=list(target_modules),
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
    assert isinstance(peft_model, PeftModel)
    return peft_model


class MaskedModel(nn.Module):
    """A PEFT model whose forward pass is multiplied by the current masks.

    Args:
        peft_model: From :func:`add_lora`.
        space: The pruning space of its base model.
    """

    def __init__(self, peft_model: PeftModel, space: PruningSpace) -> None:
        super().__init__()
        self.peft_model = peft_model
        self.space = space
        self._masks: dict[Side, Tensor] = {}
        for site in space.sites:
            module = peft_model.get_submodule(_PREFIX + site.module)
            module.register_forward_pre_hook(self._hook(site.side))

    def _hook(self, side: Side) -> Any:
        def multiply(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            mask = self._masks.get(side)
            if mask is None:
                return None
            return (inputs[0] * mask.to(inputs[0].dtype), *inputs[1:])

        return multiply

    def set_masks(self, masks_U: Tensor | None) -> None:
        """Masks for the forward passes to come, [U] in [0, 1]; None runs the unmasked model.

        Gradients flow to ``masks_U`` when it requires them, so masks must be set anew for every backward pass.
        """
        by_axis = self.space.split(masks_U) if masks_U is not None else None
        sides = {site.side for site in self.space.sites}
        self._masks = {side: side.expand(by_axis) for side in sides} if by_axis is not None else {}

    @contextmanager
    def unmasked(self) -> Iterator[None]:
        """Run the model without masks inside the block."""
        masks, self._masks = self._masks, {}
        try:
            yield
        finally:
            self._masks = masks

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Run the dense base model inside the block: no masks, adapters off."""
        with self.unmasked(), self.peft_model.disable_adapter():
            yield

    def forward(self, **batch: Tensor) -> Any:
        """The wrapped causal LM's output."""
        return self.peft_model(**batch)


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


def merged_state(peft_model: PeftModel) -> dict[str, Tensor]:
    """All of :func:`merged_tensors` at once."""
    return dict(merged_tensors(peft_model))


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def merge_in_place(peft_model: nn.Module) -> PreTrainedModel:
    """Merge the adapters into the base model and return it; the PEFT model is used up."""
    assert isinstance(peft_model, PeftModel)
    merged = peft_model.merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    return merged
