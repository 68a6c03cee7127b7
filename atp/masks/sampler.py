"""From scores to masks: how logits become gates between zero and one.

Sits between the generator, which makes one logit per unit, and the masked model, which multiplies by the gates. A
sampler draws differentiable noisy masks for training, states how likely each unit is kept, and gives the noise-free
mask for validation. It knows neither units' costs nor where masks act.

Random numbers come from torch's global generator, which the training step seeds from (seed, step).

Shape suffixes: U units.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from atp.errors import UserError


class Sampler(nn.Module, ABC):
    """Base of all samplers.

    Args:
        temperature: Sharpness of the relaxation; lower is closer to 0/1. May be changed while training.
        offset: Added to every logit, so that a generator whose output starts near zero starts with (almost) everything
            kept.
    """

    def __init__(self, temperature: float, offset: float) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"prune.sampler.temperature is {temperature}; it must be positive")
        self.temperature = temperature
        self.offset = offset

    @abstractmethod
    def forward(self, logits_U: Tensor) -> Tensor:
        """Noisy masks [U] in [0, 1], differentiable in ``logits_U``."""

    @abstractmethod
    def keep_probability(self, logits_U: Tensor) -> Tensor:
        """P(mask > 0) of each unit, [U], differentiable."""

    @abstractmethod
    def deterministic(self, logits_U: Tensor) -> Tensor:
        """Noise-free masks [U] in [0, 1]."""

    def gate(self, logits_U: Tensor) -> Tensor:
        """Noise-free factor [U] that a unit has if it is kept, where gates stay soft after the freeze."""
        return self.deterministic(logits_U)

    def confidence(self, logits_U: Tensor) -> Tensor:
        """Return how sure each unit is to stay, [U] in [0, 1], for records and pictures; training does not use it."""
        return self.keep_probability(logits_U)

    def kept(self, confidence_U: Tensor) -> Tensor:
        """The keep probabilities [U] that a :meth:`confidence` stands for."""
        return confidence_U


class HardConcrete(Sampler):
    """Hard concrete gates (Louizos et al. 2018, eq. 10-12; used by Compresso, section 2.1 of the methods note).

    ``s = sigmoid((log u - log(1 - u) + log_alpha) / T)``, stretched to (lower, upper) and clamped to [0, 1].

    Args:
        temperature: T; 2/3 in the literature.
        offset: Start of log_alpha when the generator's output is zero.
        lower: Lower stretch limit, below zero.
        upper: Upper stretch limit, above one.
        slope: Of the noise-free gate ``sigmoid(slope * log_alpha / T)``, which is not stretched; as many of the lowest
            as are expected to be zero are shut, over all units (0.8 in Compresso's code, which shuts them layer by
            layer). None takes the gate at the median of the noise.
    """

    def __init__(
        self,
        temperature: float = 2 / 3,
        offset: float = 3.0,
        lower: float = -0.1,
        upper: float = 1.1,
        slope: float | None = None,
    ) -> None:
        super().__init__(temperature, offset)
        if slope is not None and slope <= 0:
            raise UserError(f"prune.sampler.slope is {slope}; it must be positive, or null for the median gate")
        self.slope = slope
        if not lower < 0.0 < 1.0 < upper:
            raise UserError(f"prune.sampler limits are ({lower}, {upper}); they must enclose [0, 1]")
        self.lower = lower
        self.upper = upper

    def _stretch(self, s_U: Tensor) -> Tensor:
        return (s_U * (self.upper - self.lower) + self.lower).clamp(0.0, 1.0)

    def forward(self, logits_U: Tensor) -> Tensor:
        """Noisy gates [U]; exactly 0 and exactly 1 have positive probability."""
        u_U = torch.rand_like(logits_U).clamp(1e-6, 1 - 1e-6)
        noise_U = u_U.log() - (-u_U).log1p()
        return self._stretch(torch.sigmoid((noise_U + logits_U + self.offset) / self.temperature))

    def keep_probability(self, logits_U: Tensor) -> Tensor:
        """P(z > 0) = sigmoid(log_alpha - T log(-lower / upper)), [U]."""
        shift = self.temperature * math.log(-self.lower / self.upper)
        return torch.sigmoid(logits_U + self.offset - shift)

    def gate(self, logits_U: Tensor) -> Tensor:
        """Gate at the median of the noise, or by :attr:`slope`, [U]."""
        if self.slope is None:
            return self._stretch(torch.sigmoid((logits_U + self.offset) / self.temperature))
        return torch.sigmoid(self.slope * (logits_U + self.offset) / self.temperature)

    def deterministic(self, logits_U: Tensor) -> Tensor:
        """:meth:`gate`, [U]; with a slope, the lowest are shut, as many as are expected to be zero."""
        gates_U = self.gate(logits_U)
        if self.slope is None:
            return gates_U
        shut = (1.0 - self.keep_probability(logits_U)).sum().round()
        return torch.where(logits_U.argsort().argsort() < shut, torch.zeros_like(gates_U), gates_U)


class GumbelSigmoid(Sampler):
    """Straight-through Gumbel-sigmoid with one Gumbel draw (ATP and DISP-LLM; section 1.2 of the methods note).

    ``o = sigmoid((z + g + b) / T)`` with ``g = -log(-log u)``; the mask is 1 where o >= 0.5 and its gradient is o's.
    The noise is asymmetric: P(keep) = 1 - exp(-exp(z + b)), so a unit is surely pruned only far below zero.

    Args:
        temperature: T; 0.4 in ATP.
        offset: b; 3 in ATP.
    """

    def __init__(self, temperature: float = 0.4, offset: float = 3.0) -> None:
        super().__init__(temperature, offset)

    def soft(self, logits_U: Tensor) -> Tensor:
        """The relaxed gate o [U] of one draw."""
        u_U = torch.rand_like(logits_U).clamp(1e-10, 1 - 1e-7)
        gumbel_U = -(-u_U.log()).log()
        return torch.sigmoid((logits_U + gumbel_U + self.offset) / self.temperature)

    def forward(self, logits_U: Tensor) -> Tensor:
        """0/1 masks [U] with the relaxed gate's gradient."""
        soft_U = self.soft(logits_U)
        hard_U = (soft_U >= 0.5).to(soft_U.dtype)
        # Straight through: the bracket is zero, so the value is the 0/1 mask; it is no constant to autograd, so the
        # gradient is the relaxed gate's. The order of the sum matters: (hard + soft) - soft would round away from 0/1.
        return hard_U + (soft_U - soft_U.detach())

    def keep_probability(self, logits_U: Tensor) -> Tensor:
        """1 - exp(-exp(z + b)), [U]."""
        return -torch.expm1(-torch.exp((logits_U + self.offset).clamp(max=20.0)))

    def deterministic(self, logits_U: Tensor) -> Tensor:
        """1 where keeping is at least as likely as not, [U]."""
        return (self.keep_probability(logits_U) >= 0.5).to(logits_U.dtype)


class Threshold(Sampler):
    """Straight-through threshold without noise: a unit is kept when its logit is positive, with a sigmoid's gradient.

    With the projection budget this is top-k under the parameter budget: the adapters always train on a real, exactly
    sized architecture, and units leave and come back as gradients move their logits.

    Args:
        temperature: Width of the sigmoid whose slope passes the gradient.
        offset: Added to every logit.
    """

    def __init__(self, temperature: float = 1.0, offset: float = 0.0) -> None:
        super().__init__(temperature, offset)

    def forward(self, logits_U: Tensor) -> Tensor:
        """0/1 masks [U] with the sigmoid's gradient."""
        soft_U = torch.sigmoid((logits_U + self.offset) / self.temperature)
        return self.deterministic(logits_U) + (soft_U - soft_U.detach())  # straight through, as in GumbelSigmoid

    def keep_probability(self, logits_U: Tensor) -> Tensor:
        """0 or 1, with the sigmoid's gradient, [U]."""
        return self.forward(logits_U)

    def deterministic(self, logits_U: Tensor) -> Tensor:
        """1 where the shifted logit is positive, [U]."""
        return (logits_U + self.offset > 0).to(logits_U.dtype)

    def confidence(self, logits_U: Tensor) -> Tensor:
        """The sigmoid behind the threshold, [U]."""
        return torch.sigmoid((logits_U + self.offset) / self.temperature)

    def kept(self, confidence_U: Tensor) -> Tensor:
        """0 or 1: nothing is left to chance, [U]."""
        return (confidence_U > 0.5).to(confidence_U.dtype)
