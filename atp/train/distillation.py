"""Learning from the dense base: its next-token distribution and its hidden states.

Sits in the training step, beside the loss on the data: (student's output, teacher's output) -> a scalar. The teacher
of a pruned model is the frozen base itself, so it costs a forward pass and, until the live model is cut, no memory. It
knows tensors, and nothing of masks, adapters or who the teacher is.

Shape suffixes: B batch, T tokens, V vocabulary, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atp.errors import UserError


@dataclass(frozen=True)
class Distillation:
    """What is learnt from the dense base, and how much it counts.

    Attributes:
        logits: Weight of its next-token distribution in the task loss, 0 to 1; the rest is cross entropy on the data.
        hidden: Weight of its hidden states, added to the task loss; falls linearly to zero.
        until: Fraction of the run over which ``hidden`` falls.
    """

    logits: float = 0.0
    hidden: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.logits <= 1.0:
            raise UserError(f"prune.distill.logits is {self.logits}; it is a weight between 0 and 1")
        if self.hidden < 0.0:
            raise UserError(f"prune.distill.hidden is {self.hidden}; it is a weight and cannot be negative")
        if not 0.0 < self.until <= 1.0:
            raise UserError(f"prune.distill.until is {self.until}; it is a fraction of the run, above 0 and at most 1")

    def __bool__(self) -> bool:
        return self.logits > 0.0 or self.hidden > 0.0

    def hidden_weight(self, step: int, total: int) -> float:
        """Weight of the hidden states at an optimiser step of a run of ``total``."""
        return self.hidden * max(1.0 - step / (self.until * max(total, 1)), 0.0)

    def is_over(self, step: int, total: int) -> bool:
        """Whether no step from this one on has a teacher."""
        return self.logits == 0.0 and self.hidden_weight(step, total) == 0.0


def distillation_loss(student_BTV: Tensor, teacher_BTV: Tensor, labels_BT: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence of the student's next-token distribution from the teacher's, in nats per learnt token.

    The usual soft targets (Hinton et al. 2015), scaled by the squared temperature so that gradients keep their size.

    Args:
        student_BTV: Logits that learn.
        teacher_BTV: Logits to match.
        labels_BT: Unshifted labels; positions that predict -100 are left out.
        temperature: Softens both distributions.
    """
    learnt = labels_BT[:, 1:] != -100
    student = torch.log_softmax(student_BTV[:, :-1][learnt].float() / temperature, -1)
    teacher = torch.log_softmax(teacher_BTV[:, :-1][learnt].float() / temperature, -1)
    divergence = nn.functional.kl_div(student, teacher, log_target=True, reduction="sum")
    return divergence * temperature**2 / learnt.sum().clamp(min=1)


def hidden_state_loss(student_BTD: Sequence[Tensor], teacher_BTD: Sequence[Tensor], real_BT: Tensor) -> Tensor:
    """Squared distance of the residual streams after every layer, relative to the teacher's, averaged over layers.

    Layers are matched one to one, as structured pruning keeps them (the layer-wise objective of CoFi, Xia et al. 2022,
    arXiv 2204.00408, without its learnt match and its projection). Each layer is measured by its own mean square, so
    that late layers, whose streams are large, do not drown the early ones.

    Args:
        student_BTD: Hidden states that learn, one tensor per layer.
        teacher_BTD: Hidden states to match, as many and as wide.
        real_BT: 1 where there is a token, 0 for padding.

    Returns:
        Scalar, float32; 0 for equal states, 1 for a student of zeros.
    """
    weight_BT1 = real_BT.unsqueeze(-1).float()
    total = weight_BT1.new_zeros(())
    for own, wanted in zip(student_BTD, teacher_BTD, strict=True):
        wanted = wanted.float()
        distance = ((own.float() - wanted).square() * weight_BT1).sum()
        total = total + distance / (wanted.square() * weight_BT1).sum().clamp(min=1e-12)
    return total / max(len(student_BTD), 1)


def real_tokens(attention_mask: Tensor) -> Tensor:
    """Where there is a token, [B, T], from a mask [B, T] or of packed sequences [B, 1, T, T]; their padding counts."""
    if attention_mask.dim() == 2:
        return attention_mask
    return attention_mask.diagonal(dim1=-2, dim2=-1)[:, 0]
