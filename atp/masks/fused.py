"""Forward passes that keep fewer tensors for the backward pass: masked SwiGLU and the loss over a vocabulary.

Sits under the masked model and the training module. Each function computes what the plain expression computes, to
rounding, and so do its gradients; what differs is what stays in memory between the passes. It knows tensors alone.

Shape suffixes: B batch, T tokens, M learnt tokens, D hidden, F FFN channels, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_CHUNK = {"cpu": 2**20, "cuda": 2**26}
"""Logits that are in memory at a time: what a core's cache holds, or enough rows to fill a GPU."""


class _MaskedSwiGLU(torch.autograd.Function):
    """``mask * silu(gate) * up``; keeps gate and up, and forms the products once more in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, mask)
        product = nn.functional.silu(gate).mul_(up)
        return product if mask is None else product.mul_(mask.to(product))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        # y = m s(g) u with s = silu:  dy/dg = m u s'(g),  dy/du = m s(g),  dy/dm = s(g) u summed over tokens.
        # s(g) is formed again: one pass over memory costs less than keeping a third tensor until here.
        (grad,) = gradients
        gate, up, mask = ctx.saved_tensors
        through, gated = grad * up, nn.functional.silu(gate)
        grad_mask = None
        if ctx.needs_input_grad[2]:
            # Before the mask multiplies in place: a channel whose mask is zero gets the gradient of what it would add.
            wide = torch.promote_types(mask.dtype, torch.float32)  # a sum over all tokens, which bfloat16 cannot hold
            grad_mask = (through * gated).flatten(0, -2).sum(0, dtype=wide).to(mask)
        if mask is not None:
            factor = mask.to(gate)
            through.mul_(factor)
            gated.mul_(factor)
        return torch.ops.aten.silu_backward(through, gate), gated.mul_(grad), grad_mask


def masked_swiglu(gate: Tensor, up: Tensor, mask_F: Tensor | None = None) -> Tensor:
    """``mask * silu(gate) * up`` with two tensors of that shape kept for the backward pass instead of four.

    Plain autograd keeps gate, silu(gate), up and the unmasked product. Not differentiable twice.

    Args:
        gate: Output of the gate projection, [..., F].
        up: Output of the up projection, [..., F].
        mask_F: Factor of every channel, differentiable; None for one.
    """
    result: Tensor = _MaskedSwiGLU.apply(gate, up, mask_F)
    return result


class _VocabularyLoss(torch.autograd.Function):
    """Sum of cross entropies; the gradient is formed chunk by chunk while a chunk's logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, head_VD: Tensor, labels_M: Tensor) -> Tensor:
        wants = ctx.needs_input_grad[0]
        chunk = max(_CHUNK.get(hidden_MD.device.type, 2**20) // head_VD.shape[0], 16)
        grad_MD = torch.empty_like(hidden_MD) if wants else None
        total = hidden_MD.new_zeros((), dtype=torch.promote_types(hidden_MD.dtype, torch.float32))
        for start in range(0, len(labels_M), chunk):
            part = slice(start, start + chunk)
            labels = labels_M[part].unsqueeze(1)
            logits = nn.functional.linear(hidden_MD[part], head_VD)
            log_p = torch.log_softmax(logits, -1, dtype=total.dtype)
            del logits
            total -= log_p.gather(1, labels).sum()
            if grad_MD is not None:  # d(-log p[label]) / d logits = p - onehot(label), while this chunk's p is there
                residual = log_p.exp_().scatter_add_(1, labels, -torch.ones_like(labels, dtype=log_p.dtype))
                grad_MD[part] = residual.to(head_VD.dtype) @ head_VD
        ctx.save_for_backward(grad_MD)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (grad_MD,) = ctx.saved_tensors  # formed for a gradient of one; the loss is linear in what comes from above
        return grad_MD * gradients[0].to(grad_MD.dtype), None, None


def vocabulary_loss(hidden_BTD: Tensor, head_VD: Tensor, labels_BT: Tensor, learnt: int | None = None) -> Tensor:
    """Mean cross entropy of the next token, in nats, without the logits of all tokens in memory at once.

    Logits are formed for a chunk of tokens at a time and only where there is something to learn; the same two matrix
    products as usual, but neither logits nor probabilities outlive their chunk.

    Args:
        hidden_BTD: Last hidden states, after the final norm.
        head_VD: Weight of the output head, which gets no gradient.
        labels_BT: Unshifted labels; positions that predict -100 are left out.
        learnt: How many tokens are learnt, where the caller knows: then nothing waits for the device to count them.

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
    total: Tensor = _VocabularyLoss.apply(hidden_MD, head_VD, labels_M)
    return total / len(labels_M) if len(labels_M) else total * float("nan")
