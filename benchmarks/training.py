"""What learning to prune costs: steps, whole runs and memory against plain LoRA, alternation and two-stage pruning.

Everything compared runs in alternation in one process, under the same bare Lightning trainer; every figure is a ratio.
Prints a table, writes JSON and a plot. Sections:

* ``steps``: the joint step before the cut and after it, against a plain PEFT + Lightning LoRA step, the alternating
  scheme, and a step of a model that was halved before training;
* ``runs``: the whole default run at 50% (warm start, masks, cut, tuning) against plain LoRA and against two-stage
  Taylor pruning for as many steps;
* ``memory``: activations that a step keeps, and the peak of all tensors;
* ``growth``: step time and memory against layers, width, sequence length and number of units, fitted and plotted;
* ``gpu`` (with ``--device cuda``, and only there): shapes of Llama-2-7B and Llama-3-8B.

    python -m benchmarks.training [--quick] [--device cuda] [--sections steps runs memory growth gpu]
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning import LightningModule

from benchmarks.training_gpu import Section
from benchmarks.training_growth import growth_section
from benchmarks.training_memory import peak_bytes, saved_activations
from benchmarks.training_systems import CLOCKS, SHAPES, STEP_SYSTEMS, Workload, fit

RESULTS = Path(__file__).parent / "results"
SECTIONS = ("steps", "runs", "memory", "growth", "gpu")
TARGETS = {
    "joint step / plain LoRA step": 1.05,
    "joint step / alternating step": 0.5,
    "whole run / plain LoRA run": 0.75,
    "whole run / two-stage Taylor run": 1.25,
    "peak memory before the cut / plain LoRA": 0.98,
    "peak memory after the cut / plain LoRA": 0.75,
}
_MIB = 2**20


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = _options(arguments)
    _quiet()
    if options.threads:
        torch.set_num_threads(options.threads)
    result = json.loads(options.output.read_text()) if options.keep and options.output.is_file() else {}
    result |= {"torch": torch.__version__, "device": _device_name(options.device)}
    result |= {"threads": torch.get_num_threads(), "quick": options.quick}
    measured: dict[str, Callable[[Workload], dict[str, Any]]] = {
        "steps": lambda work: steps_section(work, options.rounds, options.steps, options.clock),
        "memory": memory_section,
        "runs": lambda work: runs_section(work, options.runs, options.run_steps, options.clock),
    }
    for section in filter(options.sections.__contains__, measured):
        for name in options.shapes if section != "runs" else ["embedded"]:
            found = measured[section](Workload(SHAPES[name], options.device))
            result.setdefault(section, {})[name] = found
            save(result, options.output)
    if "growth" in options.sections:
        picture = options.output.with_name("training_growth.png")
        result["growth"] = growth_section(picture, options.clock, quick=options.quick)
        save(result, options.output)
    if "gpu" in options.sections and options.device != "cpu":

        def keep(found: dict[str, Any]) -> None:
            save(result | {"gpu": found}, options.output)

        result["gpu"] = Section(options.device, seconds=options.gpu_seconds, save=keep).run()
        save(result, options.output)
    report(result)


def save(result: dict[str, Any], path: Path) -> None:
    """Write what is there so far: a benchmark that is stopped keeps its finished sections."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def steps_section(work: Workload, rounds: int, steps: int, clock: str) -> dict[str, Any]:
    """Seconds of every system for the same steps, each step at its fastest over the rounds, and their ratios.

    What else a machine does only ever adds time, so the fastest of several tries is the least disturbed.
    """
    systems = {name: work.system(name) for name in STEP_SYSTEMS}
    batches = work.batches(steps + 1)
    seconds: dict[str, list[list[float]]] = {name: [] for name in systems}
    for number in range(rounds + 1):
        for name in list(systems)[:: 1 if number % 2 else -1]:
            found = fit(systems[name], batches, work.device, clock)[1:]
            if number:  # the first round warms up
                seconds[name].append(found)
    fastest = {name: [min(tries) for tries in zip(*found, strict=True)] for name, found in seconds.items()}

    def ratio(a: str, b: str) -> float:
        return sum(fastest[a]) / sum(fastest[b])

    return {
        "step_s": {name: statistics.mean(values) for name, values in fastest.items()},
        "rounds_s": {name: [statistics.median(found) for found in values] for name, values in seconds.items()},
        "clock": clock,
        "ratios": {
            "joint step / plain LoRA step": ratio("joint", "plain"),
            "joint step with the dense base as teacher / plain LoRA step": ratio("taught", "plain"),
            "joint step / alternating step": ratio("joint", "alternate"),
            "step after the cut / plain LoRA step": ratio("compact", "plain"),
            "step after the cut / step of a model halved before": ratio("compact", "taylor"),
        },
    }


def runs_section(work: Workload, rounds: int, steps: int, clock: str) -> dict[str, Any]:
    """Seconds of whole runs: from the loaded base model to the last step, calibration and cut included."""
    batches = work.batches(steps)
    now = CLOCKS[clock]
    seconds: dict[str, list[float]] = {"plain": [], "bare": [], "default": [], "taylor": []}
    prepared: dict[str, list[float]] = {name: [] for name in seconds}
    work = replace(work, overrides=(*work.overrides, f"trainer.max_steps={steps}"))
    calibration = work.batches(64)
    for number in range(rounds):
        for name in list(seconds)[:: -1 if number % 2 else 1]:
            started = now()
            module: LightningModule
            if name == "plain":
                module = work.system("plain")
            elif name == "taylor":
                module = work.two_stage(calibration)
            else:
                module = work.joint_run(calibration, bare=name == "bare")
            prepared[name].append(now() - started)
            fit(module, batches, work.device)
            seconds[name].append(now() - started)

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    ratios = {
        "whole run without choice and repair / plain LoRA run": ratio("bare", "plain"),
        "whole run without choice and repair / two-stage Taylor run": ratio("bare", "taylor"),
        "whole run / plain LoRA run": ratio("default", "plain"),
        "whole run / two-stage Taylor run": ratio("default", "taylor"),
    }
    return {"steps": steps, "seconds": seconds, "before_training_s": prepared, "clock": clock, "ratios": ratios}


def memory_section(work: Workload) -> dict[str, Any]:
    """MiB that a step keeps and the most it holds, of every system."""
    batch = {key: value.to(work.device) for key, value in work.batches(1)[0].items()}
    kept, peak = {}, {}
    for name in ("plain", "joint", "compact", "taylor"):
        module = work.system(name).to(work.device)
        kept[name] = saved_activations(module, batch) / _MIB
        peak[name] = peak_bytes(module, batch, work.device) / _MIB
    ratios = {
        "activations kept before the cut / plain LoRA": kept["joint"] / kept["plain"],
        "activations kept after the cut / plain LoRA": kept["compact"] / kept["plain"],
        "peak memory before the cut / plain LoRA": peak["joint"] / peak["plain"],
        "peak memory after the cut / plain LoRA": peak["compact"] / peak["plain"],
    }
    measured = "saved_tensors_hooks; peak: every allocation of a step in torch's profiler on top of resident tensors"
    return {"activations_mib": kept, "peak_mib": peak, "ratios": ratios, "measured": measured}


def report(result: dict[str, Any]) -> None:
    """Print the table, and what growth was found."""
    print(f"{result['device']}, {result['threads']} threads, torch {result['torch']}")
    for section in ("steps", "runs", "memory"):
        for model, found in result.get(section, {}).items():
            for measure, value in found["ratios"].items():
                target = TARGETS.get(measure)
                verdict = "" if target is None else f"  at most {target:.2f}: {'met' if value <= target else 'MISSED'}"
                print(f"{model:10} {measure:60} {value:6.3f}{verdict}")
    for name, law in result.get("growth", {}).get("fits", {}).items():
        print(f"{name:40} ~ x^{law['exponent']:.2f}; linear fit R2 {law['linear_r2']:.3f}")


def _device_name(device: str) -> str:
    return (platform.processor() or platform.machine()) if device == "cpu" else torch.cuda.get_device_name()


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the embedded model, few rounds: some minutes on a laptop")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--shapes", nargs="+", choices=("embedded", "15M"), help="models of steps and memory")
    parser.add_argument("--rounds", type=int, help="rounds of single steps")
    parser.add_argument("--steps", type=int, default=8, help="steps of a system in a round")
    parser.add_argument("--runs", type=int, help="rounds of whole runs")
    parser.add_argument("--run-steps", type=int, help="steps of a whole run")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the process's own, for busy machines")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--gpu-seconds", type=float, default=3600.0, help="begin no cell of the gpu section after these"
    )
    parser.add_argument("--keep", action="store_true", help="keep sections of an earlier result that are not run now")
    parser.add_argument("--output", type=Path, default=RESULTS / "training.json")
    options = parser.parse_args(arguments)
    quick = {"shapes": ["embedded"], "rounds": 3, "runs": 1, "run_steps": 200}
    full = {"shapes": ["embedded", "15M"], "rounds": 5, "runs": 3, "run_steps": 700}
    for name, value in (quick if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    main()
