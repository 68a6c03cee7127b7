"""One look at the calibration batches for everything that is read off them: importance and the inputs' moments.

Sits under the criteria and the least-squares fit. Each of them says what it wants to see (an observer); :func:`observe`
runs the dense base once over the batches and shows it to all of them. A backward pass is taken only where one of them
wants gradients of weights, and logits of the vocabulary only for a loss. It knows masked models and batches; nothing of
what observers make of what they see.

Shape suffixes: B batch, T tokens, I inputs and O outputs of a projection, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from atp.masks.lora import MaskedModel
from atp.masks.loss import causal_loss, decode

Batches = Sequence[Mapping[str, Tensor]]


class Observer(Protocol):
    """Watches the model run, inside its ``with`` block."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def watch(self, real_BT: Tensor) -> None:
        """Take the batch that comes next into account, at its real tokens (True), [B, T]."""


class InputObserver:
    """Sees the inputs of linears at the real tokens; what it makes of them is up to :meth:`add`.

    Args:
        masked: The model.
        modules: Names of the linears.
        limit: Batches that it looks at, the first ones; None for all.
    """

    def __init__(self, masked: MaskedModel, modules: Iterable[str], limit: int | None = None) -> None:
        self._masked, self._modules, self._limit = masked, list(modules), limit
        self._real_BT: Tensor | None = None
        self._seen = 0
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        for module in self._modules:
            hook = self._masked.linear(module).register_forward_pre_hook(self._reader(module))
            self._hooks.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def watch(self, real_BT: Tensor) -> None:
        """Count these tokens of the batch that comes next, True or False, [B, T]."""
        self._seen += 1
        self._real_BT = real_BT if self._limit is None or self._seen <= self._limit else None

    def _reader(self, module: str) -> Callable[..., None]:
        def read(_: object, inputs: tuple[Tensor, ...]) -> None:
            if self._real_BT is not None:
                self.add(module, inputs[0].detach()[self._real_BT])

        return read

    def add(self, module: str, x: Tensor) -> None:
        """Take in the inputs [tokens, I] of a linear for one batch."""
        raise NotImplementedError


class WeightGradients:
    """Mean gradient of the loss by base weights, summed up while the backward pass goes through the layers.

    A weight's gradient is added to its sum and freed before the next one is formed, so that the sums and one gradient
    are in memory, not two copies of the model.

    Args:
        masked: The model.
        modules: Names of the linears.
        number: Batches there will be.

    Attributes:
        mean: Gradients [O, I], float32, by module.
    """

    def __init__(self, masked: MaskedModel, modules: Iterable[str], number: int) -> None:
        self.weights = {module: masked.base_weight(module) for module in modules}
        self.mean = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in self.weights.items()}
        self._number = number
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        for module, weight in self.weights.items():
            weight.requires_grad_(True)
            self._hooks.callback(weight.requires_grad_, False)
            self._hooks.callback(weight.register_post_accumulate_grad_hook(self._adder(self.mean[module])).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _adder(self, total_OI: Tensor) -> Callable[[Tensor], None]:
        def add(weight: Tensor) -> None:
            assert weight.grad is not None
            total_OI.add_(weight.grad.float() / self._number)
            weight.grad = None

        return add


def observe(
    masked: MaskedModel, batches: Batches, observers: Sequence[Observer], gradients: WeightGradients | None = None
) -> None:
    """Run the dense base over the batches, once, for all who want to see it.

    Args:
        masked: The model; adapters and masks are off while it runs, and as they were afterwards.
        batches: Calibration batches, on the model's device; with labels where gradients are wanted.
        observers: Watch the forward passes.
        gradients: Gets a backward pass of every batch's loss; None: there is none.
    """
    with ExitStack() as stack:
        stack.enter_context(gates_open(masked))
        stack.enter_context(torch.set_grad_enabled(gradients is not None))
        for one in (*observers, gradients):
            if one is not None:
                stack.enter_context(one)
        for batch in batches:
            real_BT = batch["attention_mask"].bool()
            for observer in observers:
                observer.watch(real_BT)
            if gradients is None:
                decode(masked, batch)
            else:
                loss: Any = causal_loss(masked, batch)
                loss.backward()


@contextmanager
def gates_open(masked: MaskedModel) -> Iterator[None]:
    """Run the base model inside the block: evaluation mode, all gates open, adapters off."""
    training = masked.training
    masked.eval()
    masked.set_masks(None)
    try:
        with masked.base_only():
            yield
    finally:
        masked.train(training)
