"""What a training step holds in memory: activations kept for the backward pass, and the peak of all tensors.

Both are exact sums over tensors, so neither Python, nor the memory allocator, nor the machine has a part in them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning import LightningModule
from torch import Tensor, nn


def saved_activations(module: LightningModule, batch: Mapping[str, Tensor]) -> int:
    """Bytes that one step's forward pass keeps for its backward pass, weights left out; a storage counts once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    known |= {tensor.untyped_storage().data_ptr() for tensor in batch.values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(module, batch)
    total = sum(kept.values())
    loss.backward()
    module.zero_grad(set_to_none=True)
    return total


def forward(module: LightningModule, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of a step outside a trainer."""
    log = module.log
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        return module.training_step(dict(batch), 0)  # type: ignore[return-value]
    finally:
        module.log = log  # type: ignore[method-assign]


def resident_bytes(module: nn.Module) -> int:
    """Bytes of weights, buffers, gradients and AdamW moments."""
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in module.parameters()}
    tensors |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in module.buffers()}
    return sum(tensors.values()) + sum(3 * 4 * p.numel() for p in module.parameters() if p.requires_grad)


def peak_bytes(module: LightningModule, batch: Mapping[str, Tensor], device: str = "cpu") -> int:
    """Most bytes in tensors during a step: what is resident plus the highest sum of what the step allocates.

    On a CPU every allocation of the step is read from torch's profiler, so that neither Python nor the memory
    allocator has a part in the figure; on CUDA it is the allocator's own mark.
    """

    def step() -> None:
        forward(module, batch).backward()

    step()
    module.zero_grad(set_to_none=True)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        step()
        moments = sum(8 * p.numel() for p in module.parameters() if p.requires_grad)
        module.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_allocated() + moments
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = highest = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    gradients = sum(4 * p.numel() for p in module.parameters() if p.requires_grad)
    module.zero_grad(set_to_none=True)
    return resident_bytes(module) - gradients + highest  # the step allocates its gradients itself
