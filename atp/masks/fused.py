"""Forward passes that keep fewer tensors for the backward pass: masked gated FFNs and the loss over a vocabulary.

Sits under the masked model and the training module. Each function computes what the plain expression computes, to
rounding, and so do its gradients; what differs is what stays in memory between the passes. It knows tensors alone.

Shape suffixes: B batch, T tokens, M learnt tokens, D hidden, F FFN channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from atp.model.families import SILU

_CHUNK = {"cpu": 2**20, "cuda": 2**26}
"""Logits that are in memory at a time: what a core's cache holds, or enough rows to fill a GPU."""


def _gelu_tanh(gate: Tensor) -> Tensor:
    return nn.functional.gelu(gate, approximate="tanh")


def _gelu_tanh_backward(grad: Tensor, gate: Tensor) -> Tensor:
    through: Tensor = torch.ops.aten.gelu_backward(grad, gate, approximate="tanh")
    return through


_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    **dict.fromkeys(SILU, (nn.functional.silu, torch.ops.aten.silu_backward)),
    "gelu_pytorch_tanh": (_gelu_tanh, _gelu_tanh_backward),
}
FUSED = frozenset(_ACTIVATIONS)
"""Activations, as configs name them, that :func:`masked_gated` computes."""


class _MaskedGated(torch.autograd.Function):
    """``mask * act(gate) * up``; keeps gate and up, and forms the products once more in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, mask: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up, mask)
        ctx.activation = activation
        product = _ACTIVATIONS[activation][0](gate).mul_(up)
        return product if mask is None else product.mul_(mask.to(product))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        # y = m s(g) u:  dy/dg = m u s'(g),  dy/du = m s(g),  dy/dm = s(g) u summed over tokens.
        # s(g) is formed again: one pass over memory costs less than keeping a third tensor until here.
        (grad,) = gradients
        gate, up, mask = ctx.saved_tensors
        activate, activate_backward = _ACTIVATIONS[ctx.activation]
        through, gated = grad * up, activate(gate)
        grad_mask = None
        if ctx.needs_input_grad[2]:
            # Before the mask multiplies in place: a channel whose mask is zero gets the gradient of what it would add.
            wide = torch.promote_types(mask.dtype, torch.float32)  # a sum over all tokens, which bfloat16 cannot hold
            grad_mask = (through * gated).flatten(0, -2).sum(0, dtype=wide).to(mask)
        if mask is not None:
            factor = mask.to(gate)
            through.mul_(factor)
            gated.mul_(factor)
        return activate_backward(through, gate), gated.mul_(grad), grad_mask, None


def masked_gated(gate: Tensor, up: Tensor, mask_F: Tensor | None = None, activation: str = "silu") -> Tensor:
    """``mask * act(gate) * up`` with two tensors of that shape kept for the backward pass instead of four.

    Plain autograd keeps gate, act(gate), up and the unmasked product. Not differentiable twice.

    Args:
        gate: Output of the gate projection, [..., F].
        up: Output of the up projection, [..., F].
        mask_F: Factor of every channel, differentiable; None for one.
        activation: One of :data:`FUSED`.
    """
    result: Tensor = _MaskedGated.apply(gate, up, mask_F, activation)
    return result


class _VocabularyLoss(torch.autograd.Function):
    """Sum of cross entropies; the gradient is formed chunk by chunk while a chunk's logits are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, head_VD: Tensor, labels_M: Tensor, divisor: float, cap: float | None
    ) -> Tensor:
        wants = ctx.needs_input_grad[0]
        chunk = max(_CHUNK.get(hidden_MD.device.type, 2**20) // head_VD.shape[0], 16)
        grad_MD = torch.empty_like(hidden_MD) if wants else None
        total = hidden_MD.new_zeros((), dtype=torch.promote_types(hidden_MD.dtype, torch.float32))
        for start in range(0, len(labels_M), chunk):
            part = slice(start, start + chunk)
            labels = labels_M[part].unsqueeze(1)
            logits = nn.functional.linear(hidden_MD[part], head_VD)
            slope = _change(logits, divisor, cap)
            log_p = torch.log_softmax(logits, -1, dtype=total.dtype)
            del logits
            total -= log_p.gather(1, labels).sum()
            if grad_MD is not None:  # d(-log p[label]) / d logits = p - onehot(label), while this chunk's p is there
                residual = log_p.exp_().scatter_add_(1, labels, -torch.ones_like(labels, dtype=log_p.dtype))
                residual = residual if slope is None else residual.mul_(slope)
                grad_MD[part] = residual.to(head_VD.dtype) @ head_VD
        ctx.save_for_backward(grad_MD)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad_MD,) = ctx.saved_tensors  # formed for a gradient of one; the loss is linear in what comes from above
        return grad_MD * gradients[0].to(grad_MD.dtype), None, None, None, None


def _change(logits: Tensor, divisor: float, cap: float | None) -> Tensor | float | None:
    """Divide and cap logits in place; how much they change with what the head gave, None where they were left alone."""
    slope: Tensor | float | None = None
    if divisor != 1.0:
        logits /= divisor
        slope = 1.0 / divisor
    if cap is not None:
        tanh = logits.div_(cap).tanh_()
        slope = (1.0 - tanh.square()) * (1.0 if slope is None else slope)
        logits *= cap
    return slope


def vocabulary_loss(
    hidden_BTD: Tensor,
    head_VD: Tensor,
    labels_BT: Tensor,
    learnt: int | None = None,
    *,
    divisor: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """Mean cross entropy of the next token, in nats, without the logits of all tokens in memory at once.

    Logits are formed for a chunk of tokens at a time and only where there is something to learn; the same two matrix
    products as usual, but neither logits nor probabilities outlive their chunk.

    Args:
        hidden_BTD: Last hidden states, after the final norm.
        head_VD: Weight of the output head, which gets no gradient.
        labels_BT: Unshifted labels; positions that predict -100 are left out.
        learnt: How many tokens are learnt, where the caller knows: then nothing waits for the device to count them.
        divisor: What logits are divided by.
        cap: Of a soft cap on them, ``cap * tanh(logits / cap)``.

    Returns:
        Scalar, float32 at least; not a number where nothing is to be learnt.
    """
    learnt_BT = labels_BT[:, 1:] != -100
    if learnt is None:
        hidden_MD, labels_M = hidden_BTD[:, :-1][learnt_BT], labels_BT[:, 1:][learnt_BT]
    else:  # learnt positions first, in order
        places_M = torch.argsort(learnt_BT.flatten().logical_not(), stable=True)[:learnt]
        hidden_MD = hidden_BTD[:, :-1].flatten(0, 1).index_select(0, places_M)
        labels_M = labels_BT[:, 1:].flatten().index_select(0, places_M)
    total: Tensor = _VocabularyLoss.apply(hidden_MD, head_VD, labels_M, divisor, cap)
    return total / len(labels_M) if len(labels_M) else total * float("nan")
