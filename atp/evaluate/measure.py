"""Cost: parameters, multiply-accumulates, speed, memory and file size of a model.

Comes beside :mod:`atp.evaluate`, after training and export. Everything is read off the model as it stands, so dense and
pruned models, of equal or different widths per layer, go the same way. It knows nothing of masks, data or quality.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from atp.errors import UserError
from atp.model.layers import attention_widths

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

_MIB = 1024**2
_PROCESS_STATUS = Path("/proc/self/status")
_PROCESS_RESET = Path("/proc/self/clear_refs")


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs_per_token(model: PreTrainedModel | PreTrainedConfig, context: int) -> int:
    """Return the multiply-accumulates of one token's forward pass, counted from the shapes of the linear layers.

    Every linear layer counts in x out, the output layer included; looking up an embedding is free. Attention adds, in
    each layer, query and key products and the weighted sum of values over ``context`` keys, or over the sliding window
    if that is smaller. Norms, activations, softmax and rotary embeddings are left out, as is usual.

    Args:
        model: A model, or a config to build one from (without weights).
        context: Keys that the token attends to, itself included.
    """
    if not isinstance(model, nn.Module):
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model)
    module: Any
    macs = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            macs += module.in_features * module.out_features
        elif widths := attention_widths(module):
            window = getattr(module, "sliding_window", None)
            keys = min(context, window) if window else context
            macs += keys * sum(widths)
    return macs


def measure_speed(
    model: PreTrainedModel,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    batch_size: int = 1,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, float]:
    """Time reading a prompt and decoding with the KV cache, on random tokens.

    Args:
        model: A causal LM, on the device to measure.
        prompt_tokens: Tokens of each prompt.
        new_tokens: Tokens decoded after it.
        batch_size: Sequences at a time.
        repeats: Rounds; the first, which warms up, is run in addition and not counted.
        seed: Which random tokens.

    Returns:
        ``prefill_latency_ms`` (one prompt batch), ``prefill_tokens_per_s`` (over the batch) and ``decode_latency_ms``
        (one token of every sequence), medians.

    Raises:
        ValueError: A number is below 1, or the tokens exceed the model's context.
    """
    sizes = _Sizes(prompt_tokens, new_tokens, batch_size, repeats)
    return _summary(_time_rounds([model], sizes, seed)[0], sizes)


def compare_speed(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    batch_size: int = 1,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Time two models in alternation in one process, so that other load on the machine slows both alike.

    The order within a round alternates. A ratio is the median over rounds of dense time over pruned time in that
    round: above 1, the pruned model is faster. Args as in :func:`measure_speed`.

    Returns:
        ``dense`` and ``pruned`` as from :func:`measure_speed`, ``prefill_ratio``, ``decode_ratio``, and the settings
        ``prompt_tokens``, ``new_tokens``, ``batch_size``, ``repeats``, ``threads``, ``device``.

    Raises:
        ValueError: A number is below 1, or the tokens exceed a model's context.
    """
    sizes = _Sizes(prompt_tokens, new_tokens, batch_size, repeats)
    rounds = _time_rounds([dense, pruned], sizes, seed)
    pairs = list(zip(*rounds, strict=True))
    return {
        "dense": _summary(rounds[0], sizes),
        "pruned": _summary(rounds[1], sizes),
        "prefill_ratio": statistics.median(a.prefill_s / b.prefill_s for a, b in pairs),
        "decode_ratio": statistics.median(a.decode_s / b.decode_s for a, b in pairs),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "device": str(next(dense.parameters()).device),
    }


@dataclass
class PeakMemory:
    """The most memory held while a block ran; ``mib`` is set when the block ends.

    Attributes:
        mib: MiB.
        kind: What was measured. ``cuda_allocated``: most bytes in tensors on that device, without the allocator's
            reserve. ``process_rss``: most resident memory of the whole process, with Python, libraries and whatever
            else it holds, within the block. ``process_rss_since_start``: the same since the process began, where the
            system cannot reset the mark.
    """

    mib: float = 0.0
    kind: str = ""


@contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[PeakMemory]:
    """Measure the peak memory of the block under ``with``; read ``mib`` after it."""
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
        peak = PeakMemory(kind="cuda_allocated")
    else:
        peak = PeakMemory(kind="process_rss" if _reset_process_peak() else "process_rss_since_start")
    try:
        yield peak
    finally:
        peak.mib = peak_memory_mib(place)


def peak_memory_mib(device: torch.device | str = "cpu") -> float:
    """Return the peak so far in MiB: tensors on a CUDA device, resident memory of the process otherwise.

    See :class:`PeakMemory` for what that is; the count runs since the process began or since :func:`peak_memory` last
    reset it.
    """
    place = torch.device(device)
    if place.type == "cuda":
        return torch.cuda.max_memory_allocated(place) / _MIB
    if _PROCESS_STATUS.is_file():  # not psutil, which knows no peak here, let alone one that can be reset
        found = re.search(r"^VmHWM:\s+(\d+) kB", _PROCESS_STATUS.read_text(), re.MULTILINE)
        if found:
            return int(found.group(1)) / 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return float(getattr(memory, "peak_wset", memory.rss)) / _MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (_MIB if sys.platform == "darwin" else 1024)


def weights_mib(model: nn.Module) -> float:
    """Return the MiB that parameters and buffers take in memory; tied ones count once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / _MIB


def file_mib(path: str | os.PathLike[str]) -> float:
    """Return the size in MiB of a file, or of the safetensors files in a directory and of an adapter beside them.

    Raises:
        ValueError: There is no such file, or no safetensors file in the directory.
    """
    place = Path(path)
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"{place} is neither a file nor a directory with *.safetensors files; name an exported model")
    adapter = place.glob("adapter/*.safetensors")
    return sum(file.stat().st_size for file in (*files, *adapter)) / _MIB


@dataclass(frozen=True)
class _Sizes:
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repeats: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise UserError(f"speed measurement: {name}={value} must be at least 1")


@dataclass(frozen=True)
class _Round:
    """Seconds for the prompt, and the median for one decoded token."""

    prefill_s: float
    decode_s: float


def _time_rounds(models: Sequence[PreTrainedModel], sizes: _Sizes, seed: int) -> list[list[_Round]]:
    """Return the rounds of each model, the warm-up left out."""
    for model in models:
        context = getattr(model.config, "max_position_embeddings", None)
        if context is not None and sizes.prompt_tokens + sizes.new_tokens > context:
            raise UserError(
                f"evaluate.speed_prompt_tokens={sizes.prompt_tokens} plus speed_new_tokens={sizes.new_tokens} exceed "
                f"the model's context of {context} tokens; lower them"
            )
    rounds: list[list[_Round]] = [[] for _ in models]
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        for number in range(sizes.repeats + 1):
            order = range(len(models)) if number % 2 == 0 else reversed(range(len(models)))
            for i in order:
                timed = _time_round(models[i], sizes, seed)
                if number > 0:
                    rounds[i].append(timed)
    finally:
        for module, training in modes:
            module.training = training
    return rounds


@torch.inference_mode()
def _time_round(model: PreTrainedModel, sizes: _Sizes, seed: int) -> _Round:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    shape = (sizes.batch_size, sizes.prompt_tokens)
    ids_BT = torch.randint(model.config.vocab_size, shape, generator=generator).to(device)
    named = inspect.signature(model.forward).parameters
    options = {"logits_to_keep": 1} if "logits_to_keep" in named else {}
    start = _now(device)
    out = model(input_ids=ids_BT, use_cache=True, **options)
    next_B1: Tensor = out.logits[:, -1:].argmax(-1)
    prefill_s = _now(device) - start
    steps: list[float] = []
    for _ in range(sizes.new_tokens):
        start = _now(device)
        out = model(input_ids=next_B1, past_key_values=out.past_key_values, use_cache=True)
        next_B1 = out.logits[:, -1:].argmax(-1)
        steps.append(_now(device) - start)
    return _Round(prefill_s, statistics.median(steps))


def _summary(rounds: Sequence[_Round], sizes: _Sizes) -> dict[str, float]:
    prefill_s = statistics.median(one.prefill_s for one in rounds)
    return {
        "prefill_latency_ms": 1000 * prefill_s,
        "prefill_tokens_per_s": sizes.batch_size * sizes.prompt_tokens / prefill_s,
        "decode_latency_ms": 1000 * statistics.median(one.decode_s for one in rounds),
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_process_peak() -> bool:
    """Set the process' high-water mark of resident memory to what it holds now; Linux only (man 5 proc)."""
    try:
        _PROCESS_RESET.write_text("5")
    except OSError:
        return False
    return True
