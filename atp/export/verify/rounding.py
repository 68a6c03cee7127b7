"""How far rounding alone moves a model's logits: what a file of a rounded type is judged by.

No fixed bound suits all models, as small or badly conditioned ones answer rounding more strongly. So the reference's
own matrices are rounded as the type rounds them, and the logits that this gives tell what the type must cost; a misread
tensor costs ten times that. Knows no files and no engines; :mod:`atp.export.verify.verification` asks it.

Shape suffixes: W windows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Rule = Callable[[Tensor], Tensor]
_WINDOWS = 2


def _cast(weight: Tensor, *, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).to(weight.dtype)


def _symmetric(weight: Tensor, *, bits: int, block: int | None) -> Tensor:
    """Whole multiples of the largest magnitude / (2^(bits-1) - 1), in each block of a row; None is the whole row."""
    blocks = _blocks(weight, block)
    scale = blocks.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return _rows(torch.round(blocks / scale.clamp(min=torch.finfo(weight.dtype).tiny)) * scale, weight)


def _asymmetric(weight: Tensor, *, bits: int, block: int) -> Tensor:
    """Evenly spaced levels between the least and the largest of each block of a row."""
    blocks = _blocks(weight, block)
    least = blocks.amin(-1, keepdim=True)
    scale = (blocks.amax(-1, keepdim=True) - least) / (2**bits - 1)
    return _rows(
        torch.round((blocks - least) / scale.clamp(min=torch.finfo(weight.dtype).tiny)) * scale + least, weight
    )


def _blocks(weight: Tensor, block: int | None) -> Tensor:
    """The rows of a matrix cut into blocks, the last one filled up with its last value."""
    block = block or weight.shape[-1]
    missing = -weight.shape[-1] % block
    filled = torch.cat([weight, weight[:, -1:].expand(-1, missing)], -1) if missing else weight
    return filled.reshape(weight.shape[0], -1, block)


def _rows(blocks: Tensor, weight: Tensor) -> Tensor:
    return blocks.reshape(weight.shape[0], -1)[:, : weight.shape[-1]]


@dataclass(frozen=True)
class Rounding:
    """How a storage type rounds weights and inputs.

    Attributes:
        weights: Rounds a matrix [rows, columns].
        inputs: Rounds what a matrix is multiplied with, [tokens, columns]; None where that stays float32.
    """

    weights: Rule
    inputs: Rule | None = None


_F16, _BF16 = partial(_cast, dtype=torch.float16), partial(_cast, dtype=torch.bfloat16)
_BYTES, _ROWS_OF_BYTES = partial(_symmetric, bits=8, block=32), partial(_symmetric, bits=8, block=None)

# llama.cpp rounds the inputs of a product to the type of its weights, to bytes for all types of fewer bits. K-quants
# keep a scale and a least value for every 16 or 32 weights, and some matrices at more bits.
ROUNDINGS: dict[str, Rounding] = {
    "f16": Rounding(_F16, _F16),
    "bf16": Rounding(_BF16, _BF16),
    "q8_0": Rounding(_BYTES, _BYTES),
    "q6_k": Rounding(partial(_symmetric, bits=6, block=16), _BYTES),
    "q5_k_m": Rounding(partial(_asymmetric, bits=5, block=32), _BYTES),
    "q5_k_s": Rounding(partial(_asymmetric, bits=5, block=32), _BYTES),
    "q4_k_m": Rounding(partial(_asymmetric, bits=4, block=32), _BYTES),
    "q4_k_s": Rounding(partial(_asymmetric, bits=4, block=32), _BYTES),
    "q3_k_m": Rounding(partial(_symmetric, bits=3, block=16), _BYTES),
    "q2_k": Rounding(partial(_asymmetric, bits=2, block=16), _BYTES),
    "q5_0": Rounding(partial(_symmetric, bits=5, block=32), _BYTES),
    "q4_0": Rounding(partial(_symmetric, bits=4, block=32), _BYTES),
    "bnb-int8": Rounding(_ROWS_OF_BYTES, _ROWS_OF_BYTES),
    "bnb-4bit": Rounding(partial(_symmetric, bits=4, block=64)),
    "torchao-int8": Rounding(_ROWS_OF_BYTES),
    "torchao-4bit": Rounding(partial(_symmetric, bits=4, block=32)),
}
"""By type of a GGUF file, or way of quantising while loading: what it does, in close imitation."""


@contextmanager
def rounded(model: nn.Module, rounding: Rounding) -> Iterator[None]:
    """Inside the block linears and embeddings compute with rounded weights and inputs; one weight is held at a time."""
    kept: dict[nn.Module, Tensor] = {}

    def before(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        kept[module] = module.weight.data
        module.weight.data = rounding.weights(kept[module].float()).to(kept[module].dtype)
        if rounding.inputs is None or isinstance(module, nn.Embedding):
            return None
        rows = inputs[0].reshape(-1, inputs[0].shape[-1])
        return (rounding.inputs(rows).reshape(inputs[0].shape),)

    def after(module: Any, inputs: object, output: object) -> None:
        module.weight.data = kept.pop(module)

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for interrupted, weight in kept.items():
            interrupted.weight.data = weight  # type: ignore[union-attr]


@torch.inference_mode()
def rounding_error(model: nn.Module, ids_WT: np.ndarray, reference_WTV: np.ndarray, rounding: Rounding) -> float:
    """Root mean square of what rounding changes in the logits, on the first windows.

    Args:
        model: The reference model; as it was when this returns.
        ids_WT: Token windows.
        reference_WTV: Its logits on them.
        rounding: One of :data:`ROUNDINGS`.
    """
    squares = []
    device = next(model.parameters()).device
    with rounded(model, rounding):
        for ids_T, expected_TV in zip(ids_WT[:_WINDOWS], reference_WTV[:_WINDOWS], strict=True):
            logits_TV = model(input_ids=torch.tensor(ids_T[None], device=device)).logits[0].float()
            squares.append(float((logits_TV.cpu() - torch.from_numpy(np.array(expected_TV))).square().mean()))
    return float(np.sqrt(np.mean(squares)))
