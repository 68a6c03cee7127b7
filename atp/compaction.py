"""Cutting the model that is training: once masks are final, the rest of the run works on the smaller weights.

Sits between the freeze and the remaining steps. Base weights, biases, adapter factors and the optimiser's moments lose
the rows and columns of removed units; parameters keep their identity, so optimiser and schedule go on as if nothing
had happened. What it computes afterwards is what the masked model computed. It knows sides and parameters, and nothing
of why the masks are what they are.

A block whose units all went keeps one unit under a mask of zero: attention over no heads has no defined shape.

Shape suffixes: U units.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from atp.lora import MaskedModel, adapter_sides, owned_parameters
from atp.removal import kept_indices
from atp.space import PruningSpace

log = logging.getLogger(__name__)


def can_compact(space: PruningSpace) -> bool:
    """Whether the live model can be cut: head dimensions and the residual stream need other modules, not fewer rows."""
    return {axis.kind for axis in space.axes} <= {"heads", "query_heads", "channels"}


def live_units(space: PruningSpace, masks_U: Tensor) -> Tensor:
    """Units that stay in memory, [U] of 0 and 1: all kept ones, and the first of every axis that kept none."""
    live_U = masks_U.detach().float().cpu().clone()
    live = space.split(live_U)
    for layer in space.layers:
        for kind, axis in layer.axes.items():
            if kind == "query_heads" or live[axis.name].any():
                continue
            live[axis.name][0] = 1.0
            if kind == "heads" and "query_heads" in layer.axes:
                live[layer.axes["query_heads"].name][: layer.group_size] = 1.0
    return live_U


@torch.no_grad()
def compact(masked: MaskedModel, masks_U: Tensor, optimizers: Iterable[Optimizer] = ()) -> None:
    """Cut a masked model, and the state of its optimisers, to its final masks, in place.

    Gradients are dropped, so call it between optimiser steps. Afterwards the dense base is gone from memory and the
    masks of ``masked`` can no longer be changed.

    Args:
        masked: The model that trains.
        masks_U: Final masks, 0 or 1, shape [U].
        optimizers: Optimisers that hold its parameters; moments of a parameter's shape are cut with it.

    Raises:
        ValueError: Weights that cannot be sliced, such as quantised ones.
    """
    space = masked.space
    live_U = live_units(space, masks_U)
    live = space.split(live_U)
    states = [optimizer.state for optimizer in optimizers]
    owned = [found for weight in space.weights for found in owned_parameters(masked.peft_model, weight)]
    for name, parameter, *_ in owned:
        if not parameter.is_floating_point():
            raise ValueError(f"{name} is stored as {parameter.dtype} and cannot be cut; set prune.compact=false")
    for _, parameter, rows, columns in owned:
        kept = tuple(kept_indices(side, live) if side else None for side in (rows, columns))
        _cut_parameter(parameter, kept, states)
    masked.fix_masks(masks_U, live_U)
    log.info("live model cut to %.1f%% of its block parameters", 100 * (1 - float(space.sparsity(live_U.double()))))


def rewrap(strategy: object) -> None:
    """Let data-parallel wrappers take note of new parameter shapes; other strategies hold none."""
    wrapper = getattr(strategy, "model", None)
    if not isinstance(wrapper, DistributedDataParallel):
        return
    wrapper._remove_autograd_hooks()
    strategy.model = strategy._setup_model(wrapper.module)  # type: ignore[attr-defined]


def _cut_parameter(
    parameter: nn.Parameter, kept: tuple[Tensor | None, ...], states: Iterable[Mapping[Tensor, dict[str, Tensor]]]
) -> None:
    shape = parameter.shape
    for state in states:
        moments = state.get(parameter, {})
        for key, value in moments.items():
            if isinstance(value, Tensor) and value.shape == shape:
                moments[key] = _sliced(value, kept)
    parameter.data = _sliced(parameter.data, kept)
    parameter.grad = None


def _sliced(tensor: Tensor, kept: tuple[Tensor | None, ...]) -> Tensor:
    for dimension, indices in enumerate(kept):
        if indices is not None:
            tensor = tensor.index_select(dimension, indices.to(tensor.device))
    return tensor.contiguous()


def expanded_state(state: Mapping[str, Tensor], space: PruningSpace, masks_U: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Put a compact model's adapter factors back in the dense layout, zeros where units are gone.

    The dense model under the same masks computes the same function, so removal can start from the original base
    weights.

    Args:
        state: Names and tensors of a compact module; tensors that are no adapter factors pass unchanged.
        space: The pruning space of the dense model.
        masks_U: The masks it was cut to, [U].
    """
    live = space.split(live_units(space, masks_U))
    sides = adapter_sides(space)
    for name, tensor in state.items():
        found = next((pair for ending, pair in sides.items() if name.endswith(ending)), None)
        if found is None:
            yield name, tensor
            continue
        for dimension, side in enumerate(found):
            kept = kept_indices(side, live) if side else None
            if side is not None and kept is not None and tensor.shape[dimension] != side.size:
                shape = list(tensor.shape)
                shape[dimension] = side.size
                tensor = tensor.new_zeros(shape).index_copy(dimension, kept.to(tensor.device), tensor)
        yield name, tensor
