"""How much is to be pruned at each step, and the loss term that asks for it: sparsity schedule and budgets.

Sits in the training step: (expected or sampled) sparsity + target -> a scalar added to the task loss. It knows
fractions, not units, masks or models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from atp.errors import UserError


class Phase(Enum):
    """What a training step is for."""

    WARMUP = "warm-up"
    PRUNING = "pruning"
    FROZEN = "frozen"


@dataclass(frozen=True)
class SparsitySchedule:
    """Which phase a step is in and how much is to be pruned by then.

    Attributes:
        target: Final fraction of block parameters to remove.
        warmup_steps: Steps that tune adapters only, all units kept.
        ramp_steps: Steps over which the target rises from zero, after the warm-up.
        freeze_step: First step with fixed masks.
        shape: ``linear`` (Compresso) or ``cubic`` (Zhu and Gupta 2017, eq. 1: steep first, gentle at the end).
    """

    target: float
    warmup_steps: int
    ramp_steps: int
    freeze_step: int
    shape: str = "linear"

    def __post_init__(self) -> None:
        if not 0.0 < self.target < 1.0:
            raise UserError(f"prune.sparsity is {self.target}; it must lie between 0 and 1")
        if self.shape not in ("linear", "cubic"):
            raise UserError(f"prune.schedule.shape is {self.shape!r}; known: linear, cubic")
        if self.warmup_steps + self.ramp_steps > self.freeze_step:
            raise UserError(
                f"prune.schedule freezes masks at step {self.freeze_step}, before warm-up ({self.warmup_steps}) and "
                "ramp "
                f"({self.ramp_steps}) are over; raise prune.schedule.freeze_at or train longer"
            )

    @classmethod
    def from_fractions(
        cls, target: float, steps: int, *, warmup: float, ramp: float, freeze_at: float, shape: str = "linear"
    ) -> SparsitySchedule:
        """Schedule of a run of ``steps`` optimiser steps, its points given as fractions of the run."""
        for name, value in (("warmup", warmup), ("ramp", ramp), ("freeze_at", freeze_at)):
            if not 0.0 <= value <= 1.0:
                raise UserError(f"prune.schedule.{name} is {value}; it is a fraction of the run, between 0 and 1")
        if warmup + ramp > freeze_at:
            raise UserError(
                f"prune.schedule: warmup {warmup} + ramp {ramp} end after freeze_at {freeze_at}; raise freeze_at or "
                "lower them"
            )
        freeze_step = round(steps * freeze_at)
        warmup_steps = min(round(steps * warmup), freeze_step)
        return cls(target, warmup_steps, min(round(steps * ramp), freeze_step - warmup_steps), freeze_step, shape)

    def phase(self, step: int) -> Phase:
        """Return the phase of the optimiser step with this index."""
        if step >= self.freeze_step:
            return Phase.FROZEN
        return Phase.WARMUP if step < self.warmup_steps else Phase.PRUNING

    def target_at(self, step: int) -> float:
        """Target sparsity of the optimiser step with this index."""
        done = (step - self.warmup_steps + 1) / max(self.ramp_steps, 1)
        done = min(max(done, 0.0), 1.0) if self.ramp_steps else float(step >= self.warmup_steps)
        return self.target * (done if self.shape == "linear" else 1.0 - (1.0 - done) ** 3)


class Budget(nn.Module, ABC):
    """Base of all budget terms."""

    @abstractmethod
    def forward(self, expected: Tensor, sampled: Tensor, target: float) -> Tensor:
        """The term to add to the task loss.

        Args:
            expected: Sparsity expected from keep probabilities, differentiable scalar.
            sampled: Sparsity of the sampled masks, differentiable scalar.
            target: Sparsity wanted at this step.
        """

    def shift(self, sparsity_of: Callable[[float], float], target: float) -> float:
        """Return the number to add to every logit before sampling; zero for budgets that work through the loss.

        Args:
            sparsity_of: Expected sparsity as a (falling) function of the shift.
            target: Sparsity wanted at this step.
        """
        return 0.0

    def shift_on_device(self, sparsity_of: Callable[[Tensor], Tensor], zero: Tensor, target: float) -> Tensor:
        """:meth:`shift` as a scalar that stays on its device, so that nothing waits for it.

        Args:
            sparsity_of: Expected sparsity as a (falling) function of the shift.
            zero: A zero where the shift is to be.
            target: Sparsity wanted at this step.
        """
        return zero

    def multipliers(self) -> list[nn.Parameter]:
        """Return the Lagrange multipliers, over which the optimiser must maximise; none for other budgets."""
        return []


class L0Lagrangian(Budget):
    """``lambda1 (s - t) + lambda2 (s - t)^2`` on the expected sparsity (Compresso; section 2.2 of the methods note).

    Both multipliers start at zero and *ascend*; the optimiser must maximise over :meth:`multipliers`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lambda_1 = nn.Parameter(torch.zeros(()))
        self.lambda_2 = nn.Parameter(torch.zeros(()))

    def multipliers(self) -> list[nn.Parameter]:
        """The parameters to ascend."""
        return [self.lambda_1, self.lambda_2]

    def forward(self, expected: Tensor, sampled: Tensor, target: float) -> Tensor:
        """Lagrangian of the expected sparsity."""
        gap = expected - target
        return self.lambda_1 * gap + self.lambda_2 * gap.square()


class LogRatio(Budget):
    """``alpha * log(max(x, y) / min(x, y))`` of kept fraction and kept target, on sampled masks (ATP; section 1.3).

    Args:
        alpha: Weight; 5 in the authors' code.
    """

    def __init__(self, alpha: float = 5.0) -> None:
        super().__init__()
        if alpha <= 0:
            raise UserError(f"prune.budget.alpha is {alpha}; it must be positive")
        self.alpha = alpha

    def forward(self, expected: Tensor, sampled: Tensor, target: float) -> Tensor:
        """Log ratio of the sampled kept fraction; zero at the target, symmetric around it on a log scale."""
        kept = (1.0 - sampled).clamp(min=1e-10)
        return self.alpha * (kept.log() - torch.log(kept.new_tensor(1.0 - target))).abs()


class Projection(Budget):
    """Meets the target at every step: all logits are shifted by one number such that the expected sparsity equals it.

    Only the units' order and distances are learnt; the level follows the schedule. No term is added to the loss and
    nothing needs tuning, where a Lagrangian lags behind its target and then overshoots in short runs. (This project's;
    the exact budgets of GRASPrune and of straight-through top-k share the idea.)

    Args:
        tolerance: Largest gap between expected sparsity and target that ends the bisection.
        reach: Largest shift tried.
    """

    def __init__(self, tolerance: float = 1e-4, reach: float = 200.0) -> None:
        super().__init__()
        self.tolerance = tolerance
        self.reach = reach

    def shift(self, sparsity_of: Callable[[float], float], target: float) -> float:
        """The shift, by bisection."""
        low, high = -self.reach, self.reach
        for _ in range(40):
            middle = (low + high) / 2
            gap = sparsity_of(middle) - target
            if abs(gap) <= self.tolerance:
                return middle
            low, high = (middle, high) if gap > 0 else (low, middle)
        return (low + high) / 2

    def shift_on_device(self, sparsity_of: Callable[[Tensor], Tensor], zero: Tensor, target: float) -> Tensor:
        """The shift, by bisection to the resolution of float32."""
        low, high = zero - self.reach, zero + self.reach
        for _ in range(32):
            middle = (low + high) / 2
            is_low = sparsity_of(middle) > target
            low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
        return (low + high) / 2

    def forward(self, expected: Tensor, sampled: Tensor, target: float) -> Tensor:
        """Return zero: the shifted logits meet the target already."""
        return torch.zeros_like(expected)
