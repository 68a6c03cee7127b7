"""How long the main job takes until it trains: ``python -m benchmarks.startup [--rounds 3] [--quick]``.

Starts ``train.py experiment=legal_50pct`` in fresh processes and stops each after its first training step. Reported are
the seconds from the start of the process to the end of that step, with and without the warm start (which reads training
batches to rank units), and the seconds of the imports: a fresh process that imports every module which was loaded by
the first step, in the same order, and does nothing else. Medians over rounds, in alternation; the token cache is empty
in the first run and full in the others. The aims are 8 s, of which imports 5 s, on two cores. Prints a table and the
slowest packages, writes ``benchmarks/results/startup.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

REPOSITORY = Path(__file__).parent.parent
AIMS_S = {"first step": 8.0, "imports": 5.0}
JOBS = {"first step": ["prune.warm_start.batches=0", "prune.repair.batches=0"], "first step after warm start": []}
_MARK = "ATP_STARTUP_MARK"
_IMPORT = """
import importlib, json, sys, time
from atp.imports import uncollected, without_plots
without_plots()
with uncollected():
    for name in json.load(open(sys.argv[1])):
        try:
            importlib.import_module(name)
        except ImportError:
            pass
print(time.time())
"""


class FirstStep(Callback):
    """Writes down what is imported after the first training step, and ends the process there."""

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop."""
        moment = time.time()
        mark = Path(os.environ[_MARK])
        mark.write_text(json.dumps({"moment": moment, "modules": [*sys.modules]}), encoding="utf-8")
        os._exit(0)


def first_step(overrides: list[str], folder: Path) -> tuple[float, list[str]]:
    """Seconds from the start of a run to the end of its first step, and the modules it has loaded by then."""
    mark = folder / "mark.json"
    mark.unlink(missing_ok=True)
    callback = "+callbacks.first_step={_target_: benchmarks.startup.FirstStep}"
    command = ["train.py", "experiment=legal_50pct", f"run_dir={folder / 'run'}", callback, *overrides]
    started = time.time()
    _python(command, {_MARK: str(mark)}, folder)
    found = json.loads(mark.read_text(encoding="utf-8"))
    return found["moment"] - started, found["modules"]


def imports(modules: list[str], folder: Path) -> float:
    """Seconds of a process that does nothing but import modules."""
    listed = folder / "modules.json"
    listed.write_text(json.dumps([name for name in modules if name != "__main__"]), encoding="utf-8")
    started = time.time()
    return float(_python(["-c", _IMPORT, str(listed)], {}, folder).stdout.split()[-1]) - started


def slowest(folder: Path, most: int = 12) -> dict[str, float]:
    """Seconds of the imports' own code by top-level package, the slowest first; tracing adds about a fifth."""
    traced = _python(["-X", "importtime", "-c", _IMPORT, str(folder / "modules.json")], {}, folder).stderr
    own: Counter[str] = Counter()
    for line in traced.splitlines():
        parts = line.removeprefix("import time:").split("|")
        if len(parts) == 3 and parts[0].strip().isdigit():
            own[parts[2].strip().split(".")[0]] += int(parts[0])
    return {name: round(micros / 1e6, 3) for name, micros in own.most_common(most)}


def _python(arguments: list[str], extra: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run this Python in the repository, with a token cache of its own."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "ATP_CACHE": str(folder.parent / "cache"), **extra}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments[:2]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/startup.json")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in (*JOBS, "imports")}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for number in range(1 if options.quick else options.rounds):
            modules: list[str] = []
            for name, overrides in JOBS.items():
                taken, modules = first_step(overrides, Path(tempfile.mkdtemp(dir=made)))
                seconds[name].append(taken)
            seconds["imports"].append(imports(modules, folder))
            print(f"round {number}: " + ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items()))
        packages = slowest(folder)
    result: dict[str, Any] = {
        "seconds": {name: round(statistics.median(values), 2) for name, values in seconds.items()},
        "rounds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "aims_s": AIMS_S,
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
        "own_seconds_by_package": packages,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name, value in result["seconds"].items():
        print(f"{name:30s} {value:6.2f} s" + (f"  (aim {AIMS_S[name]:.0f} s)" if name in AIMS_S else ""))
    print("packages:", ", ".join(f"{name} {value:.2f}" for name, value in packages.items()))


if __name__ == "__main__":
    main()
