"""Cutting the model while it trains: removed units leave memory, and the remaining steps work on smaller weights.

Sits between the freeze, or an early cut (:mod:`atp.cut.progressive`), and the remaining steps. Base weights, biases,
adapter factors and optimiser moments lose the rows and columns of removed units; parameters keep their identity, so
optimiser and schedule go on as if nothing had happened. What it computes afterwards is what the masked model computed.
It knows sides and parameters, and nothing of why the masks are what they are.

A block whose units all went keeps one unit under a mask of zero: attention over no heads has no defined shape.

Shape suffixes: U units.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from atp.cut.removal import kept_indices
from atp.errors import UserError
from atp.masks.adapter import adapter_sides, owned_parameters
from atp.masks.lora import MaskedModel
from atp.space.space import PruningSpace, Side

log = logging.getLogger(__name__)


def can_cut_live(space: PruningSpace) -> bool:
    """Whether the live model can be cut: head dimensions and the residual stream need other modules, not fewer rows.

    Nor can heads that a norm goes over together, as it is no linear.
    """
    return {axis.kind for axis in space.axes} <= {"heads", "query_heads", "channels"} and not space.others


def live_units(space: PruningSpace, masks_U: Tensor, before_U: Tensor | None = None) -> Tensor:
    """Units that stay in memory, [U] of 0 and 1: all kept ones, and the first of every axis that kept none.

    Args:
        space: The pruning space.
        masks_U: Masks, 0 or 1, [U].
        before_U: Units that are still there, where the model was cut before, [U].
    """
    live_U = masks_U.detach().float().cpu().clone()
    live = space.split(live_U)
    before = space.split(torch.ones_like(live_U) if before_U is None else before_U.cpu())
    for layer in space.layers:
        for kind, axis in layer.axes.items():
            if kind == "query_heads" or live[axis.name].any():
                continue
            live[axis.name][int(before[axis.name].argmax())] = 1.0  # the first that is still in memory
            if kind == "heads" and "query_heads" in layer.axes:
                live[layer.axes["query_heads"].name][: layer.group_size] = 1.0
    return live_U


@torch.no_grad()
def cut_live(
    masked: MaskedModel, masks_U: Tensor, optimizers: Iterable[Optimizer] = (), *, final: bool = True
) -> Tensor:
    """Cut a masked model, and the state of its optimisers, to masks, in place.

    Gradients are dropped, so call it between optimiser steps. Afterwards the dense base is gone from memory and what
    was cut can no longer be unmasked.

    Args:
        masked: The model that trains.
        masks_U: Masks, 0 or 1, shape [U].
        optimizers: Optimisers that hold its parameters; moments of a parameter's shape are cut with it.
        final: Whether masks stay as they are; otherwise the units that are left can still be masked, and cut later.

    Returns:
        The units that are left in memory, [U] of 0 and 1.

    Raises:
        ValueError: Weights that cannot be sliced, such as quantised ones.
    """
    space = masked.space
    before_U = torch.ones(space.num_units) if masked.live_U is None else masked.live_U
    live_U = live_units(space, masks_U, before_U)
    live, before = space.split(live_U), space.split(before_U)
    states = [optimizer.state for optimizer in optimizers]
    owned = [found for weight in space.weights for found in owned_parameters(masked.peft_model, weight)]
    for name, parameter, *_ in owned:  # all before the first cut: a failure half way would leave shapes that disagree
        if not parameter.is_floating_point():
            raise UserError(f"{name} is stored as {parameter.dtype} and cannot be cut; set prune.compact=false")
    for _, parameter, rows, columns in owned:
        kept = tuple(_kept_of(side, live, before) if side else None for side in (rows, columns))
        _cut_parameter(parameter, kept, states)
    masked.refit(live_U)
    if final:
        masked.fix_masks(masks_U)
    log.info("live model cut to %.1f%% of its block parameters", 100 * (1 - float(space.sparsity(live_U.double()))))
    return live_U


def _kept_of(side: Side, live: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Tensor | None:
    """Return where the entries that stay lie among the entries still in memory."""
    # Sides speak of the dense layout, tensors may have been cut before: look up where the kept entries are by now.
    kept, there = kept_indices(side, live), kept_indices(side, before)
    return None if kept is None or there is None else torch.searchsorted(there, kept)


@contextmanager
def unwrapped(strategy: Any) -> Iterator[None]:
    """Remove a data-parallel wrapper inside the block, since it remembers parameters' shapes; otherwise do nothing.

    Args:
        strategy: The Lightning trainer's strategy.
    """
    wrapper = getattr(strategy, "model", None)
    if not isinstance(wrapper, DistributedDataParallel):
        yield
        return
    inner = wrapper.module
    wrapper._remove_autograd_hooks()
    strategy.model = inner
    del wrapper  # the reducer holds the parameters' gradient nodes; they must die before shapes change
    gc.collect()
    yield
    strategy.model = strategy._setup_model(inner)


def _cut_parameter(
    parameter: nn.Parameter, kept: tuple[Tensor | None, ...], states: Iterable[Mapping[Tensor, dict[str, Tensor]]]
) -> None:
    # The parameter object stays and only its data changes, for optimisers know parameters by identity. Moments are cut
    # with it rather than reset: what stays goes on with the step sizes it had.
    shape = parameter.shape
    for state in states:
        moments = state.get(parameter, {})
        for key, value in moments.items():
            if isinstance(value, Tensor) and value.shape == shape:  # the step count, a scalar, stays
                moments[key] = _sliced(value, kept)
    small = _sliced(parameter.data, kept)
    parameter.grad = None
    # Any graph still alive (a traceback, a traced model, garbage not yet collected) keeps the parameter's gradient
    # node, which remembers the old shape. Autograd drops it where the dtype changes, so change it for a moment.
    parameter.data = small.new_empty(0, dtype=torch.float32 if small.dtype == torch.float16 else torch.float16)
    parameter.data = small


def _sliced(tensor: Tensor, kept: tuple[Tensor | None, ...]) -> Tensor:
    for dimension, indices in enumerate(kept):
        if indices is not None:
            tensor = tensor.index_select(dimension, indices.to(tensor.device))
    return tensor.contiguous()


def expanded_state(
    state: Mapping[str, Tensor], space: PruningSpace, masks_U: Tensor, before_U: Tensor | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Put a compact model's adapter factors back in the dense layout, zeros where units are gone.

    The dense model under the same masks computes the same function, so removal can start from the original base
    weights.

    Args:
        state: Names and tensors of a compact module; tensors that are no adapter factors pass unchanged.
        space: The pruning space of the dense model.
        masks_U: The masks it was cut to, [U].
        before_U: Units that an earlier cut had left, [U].
    """
    live = space.split(live_units(space, masks_U, before_U))
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
