"""Joint training against plain LoRA at the sizes people use: randomly initialised Llama-2-7B and Llama-3-8B shapes.

Weights in bfloat16, sequences of 1024 and 4096 tokens, with and without gradient checkpointing and ``torch.compile``,
before and after the cut: tokens per second and peak memory, and a profile of the joint step. The systems of a cell run
twice, in alternating order. A cell that does not fit into the device's memory says so, and one for which the time
given has run out is listed as not run.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning import LightningModule

from atp.model.widths import build_model
from atp.run import parts
from atp.run.parts.quantization import is_installed
from benchmarks.training_memory import forward, peak_bytes
from benchmarks.training_systems import SHAPES, Shape, Workload, fit

MODELS = ("llama2_7b", "llama3_8b")
SYSTEMS = ("plain", "joint", "compact")
_STEPS, _WARM = 10, 4
Save = Callable[[dict[str, Any]], None]


@dataclass
class Section:
    """What is measured, and what was found so far.

    Attributes:
        device: Torch device.
        shapes: Model shapes.
        lengths: Tokens of a sequence.
        dtype: Of the frozen weights.
        compiled_too: Also measure ``trainer.compile``.
        quantized_too: Also measure an NF4 base, where bitsandbytes is installed.
        seconds: No further cell is begun after so long.
        found: Cells, cells not run, profiles.
        save: Called with ``found`` after every cell.
    """

    device: str
    shapes: Sequence[Shape] = tuple(SHAPES[name] for name in MODELS)
    lengths: Sequence[int] = (1024, 4096)
    dtype: torch.dtype = torch.bfloat16
    compiled_too: bool = True
    quantized_too: bool = True
    seconds: float = 3600.0
    found: dict[str, Any] = field(default_factory=lambda: {"cells": [], "not_run": [], "profiles": {}})
    save: Save = lambda found: None

    def run(self) -> dict[str, Any]:
        """All cells, the most wanted first, each printed as it is done."""
        started = time.perf_counter()
        for shape, cell in self._cells():
            if time.perf_counter() - started > self.seconds:
                self.found["not_run"].append(cell)
                continue
            results = self._measure(shape, cell)
            self.found["cells"] += results
            for result in results:
                print(result, flush=True)
            if cell == self._first(shape):
                work = Workload(replace(shape, tokens=self.lengths[0]), self.device, self.dtype)
                self.found["profiles"][shape.name] = profile(work)
            self.save(self.found)
        return self.found

    def _first(self, shape: Shape) -> dict[str, Any]:
        return _cell(shape, self.lengths[0])

    def _cells(self) -> Iterator[tuple[Shape, dict[str, Any]]]:
        plain = list(itertools.product(self.lengths, (False, True)))
        for shape in self.shapes:
            for tokens, checkpointing in plain:
                yield shape, _cell(shape, tokens, checkpointing=checkpointing)
            if self.quantized_too and is_installed():
                yield shape, _cell(shape, self.lengths[0], checkpointing=True, quantization="nf4")
        for shape, tokens in itertools.product(self.shapes, self.lengths if self.compiled_too else ()):
            yield shape, _cell(shape, tokens, compile=True)

    def _measure(self, shape: Shape, cell: dict[str, Any]) -> list[dict[str, Any]]:
        flags = [f"model.gradient_checkpointing={cell['checkpointing']}".lower()]
        flags.append(f"trainer.compile={cell['compile']}".lower())
        if cell["quantization"]:
            return [self._quantized(shape, cell, flags)]
        work = Workload(replace(shape, tokens=cell["tokens"]), self.device, self.dtype, tuple(flags))
        systems = (*SYSTEMS, "alternate") if cell == self._first(shape) else SYSTEMS
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        peaks: dict[str, float] = {}
        for name in (*systems, *reversed(systems)):
            if not math.isnan(peaks.get(name, 0.0)):  # what did not fit once is not tried again
                steps, peaks[name] = self._try(work, name)
                seconds[name] += steps
        return [
            {**cell, "system": name, **_figures(seconds[name], peaks.get(name), shape.batch * cell["tokens"])}
            for name in systems
        ]

    def _try(
        self, work: Workload, name: str, make: Callable[[], LightningModule] | None = None
    ) -> tuple[list[float], float]:
        """Seconds of the steps after the first ones, and peak GiB; no steps and no number where memory is short."""
        module = None
        try:
            module = (make() if make else work.system(name)).to(work.device)
            batches = work.batches(_STEPS)
            steps = fit(module, batches, work.device)[_WARM:]
            moved = {key: value.to(work.device) for key, value in batches[0].items()}
            return steps, peak_bytes(module.to(work.device), moved, work.device) / 2**30
        except torch.OutOfMemoryError:
            return [], float("nan")
        finally:
            module = None
            torch._dynamo.reset()
            gc.collect()
            if work.device != "cpu":
                torch.cuda.empty_cache()

    def _quantized(self, shape: Shape, cell: dict[str, Any], flags: list[str]) -> dict[str, Any]:
        """Joint training on an NF4 base, loaded from a checkpoint as a run loads it."""
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            base = build_model(shape.config(), dtype=self.dtype, device=self.device, initialize=True)
            base.save_pretrained(folder)
            del base
            flags += ["model=local", f"model.path={folder}", "model.quantization=nf4", "model.dtype=bfloat16"]
            flags += ["prune.warm_start.criterion=[fisher]", "prune.warm_start.attention=[0.0]", "prune.compact=false"]
            flags += ["prune.repair.batches=0"]
            work = Workload(replace(shape, tokens=cell["tokens"]), self.device, self.dtype, tuple(flags))
            steps, peak = self._try(work, "joint", lambda: _on_quantized(work))
        return {**cell, "system": "joint", **_figures(steps, peak, shape.batch * cell["tokens"])}


def _on_quantized(work: Workload) -> LightningModule:
    config = work.config("prune=exact")
    base = parts.load_base(config.model, quantized=True, device=work.device)
    return parts.pruning_module(config, base)


def _cell(
    shape: Shape, tokens: int, *, checkpointing: bool = False, compile: bool = False, quantization: str | None = None
) -> dict[str, Any]:
    return {
        "model": shape.name,
        "tokens": tokens,
        "checkpointing": checkpointing,
        "compile": compile,
        "quantization": quantization,
    }


def _figures(seconds: Sequence[float], peak: float | None, tokens: int) -> dict[str, Any]:
    if not seconds:
        return {"out_of_memory": True}
    step = statistics.median(seconds)
    return {"tokens_per_s": tokens / step, "step_s": step, "steps_s": list(seconds), "peak_gib": peak}


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
