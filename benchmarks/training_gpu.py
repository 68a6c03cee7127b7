"""Joint training against plain LoRA at the sizes people use: randomly initialised Llama-2-7B and Llama-3-8B shapes.

Weights in bfloat16, sequences of 1024 and 4096 tokens, with and without gradient checkpointing and ``torch.compile``,
before and after the cut: tokens per second and peak memory, and a profile of the joint step. A cell that does not fit
into the device's memory says so.
"""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.training_memory import forward, peak_bytes
from benchmarks.training_systems import SHAPES, Shape, Workload, fit

MODELS = ("llama2_7b", "llama3_8b")
SYSTEMS = ("plain", "joint", "compact")


def gpu_section(
    device: str,
    shapes: Sequence[Shape] = tuple(SHAPES[name] for name in MODELS),
    lengths: Sequence[int] = (1024, 4096),
    dtype: torch.dtype = torch.bfloat16,
    compiled_too: bool = True,
) -> dict[str, Any]:
    """All cells, each printed as it is done, and one profile per shape."""
    cells: list[dict[str, Any]] = []
    profiles = {}
    for shape in shapes:
        for tokens, checkpointing, compiled in itertools.product(
            lengths, (False, True), (False, True) if compiled_too else (False,)
        ):
            flags = (f"model.gradient_checkpointing={checkpointing}".lower(), f"trainer.compile={compiled}".lower())
            work = Workload(replace(shape, tokens=tokens), device, dtype, flags)
            for name in SYSTEMS:
                cell = {"model": shape.name, "tokens": tokens, "checkpointing": checkpointing, "compile": compiled}
                cells.append({**cell, "system": name, **_measure(work, name)})
                print(cells[-1], flush=True)
        profiles[shape.name] = profile(Workload(replace(shape, tokens=lengths[0]), device, dtype))
    return {"cells": cells, "profiles": profiles}


def _measure(work: Workload, name: str) -> dict[str, Any]:
    try:
        module = work.system(name).to(work.device)
        batches = work.batches(8)
        seconds = statistics.median(fit(module, batches, work.device)[3:])
        moved = {key: value.to(work.device) for key, value in batches[0].items()}
        peak = peak_bytes(module.to(work.device), moved, work.device) / 2**30
        return {"tokens_per_s": work.shape.batch * work.shape.tokens / seconds, "step_s": seconds, "peak_gib": peak}
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    finally:
        module = None  # type: ignore[assignment]
        gc.collect()
        if work.device != "cpu":
            torch.cuda.empty_cache()


def profile(work: Workload, rows: int = 25) -> list[dict[str, Any]]:
    """Where the time of joint steps goes, by operator, longest first."""
    module = work.system("joint").to(work.device)
    batch = {key: value.to(work.device) for key, value in work.batches(1)[0].items()}
    activities = [torch.profiler.ProfilerActivity.CPU]
    if work.device != "cpu":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    forward(module, batch).backward()
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(3):
            forward(module, batch).backward()
    own = "self_cpu_time_total" if work.device == "cpu" else "self_device_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: getattr(event, own), reverse=True)[:rows]
    return [{"operator": event.key, "calls": event.count, "ms": getattr(event, own) / 1e3} for event in events]
