"""Time and memory of removal, merge and export against model size: ``python -m benchmarks.removal [--quick]``.

Models of the Llama 3.2 1B shape with more and fewer layers, randomly initialised in bfloat16, with a LoRA adapter of
rank 8 on all linears, lose half of their decoder blocks. Weights are read from safetensors, merged, sliced and written
one tensor at a time. Each size runs in a process of its own that imports everything first; its memory is the largest
resident set beyond that start. The whole model never is in memory; the aim is that of streaming, 1.3 times the largest
shard plus the pruned model. Beside it stands what loading the dense model for training takes: memory of its own, and
pages of the files, which are mapped and can be dropped. ``--device cuda`` builds the pruned model on the GPU. Prints a
table and writes ``benchmarks/results/removal.json``.
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
from pathlib import Path
from typing import Any

from benchmarks.export_memory import MIB, SHARD_BYTES, base_config, make_dense, resident

RANK = 8
REPOSITORY = Path(__file__).parent.parent


def make_adapter(folder: Path, layers: int) -> None:
    """Write a random adapter of all linears beside the dense model, where its reader merges it."""
    import torch

    from atp.masks.adapter import extract_adapter
    from atp.masks.lora import add_lora
    from atp.model.adapter import ADAPTER_FOLDER
    from atp.model.widths import build_model

    config = base_config(layers)
    with torch.device("meta"):
        wrapped = add_lora(build_model(config, dtype=torch.bfloat16, device="meta"), r=RANK, alpha=2 * RANK)
    adapter = extract_adapter(wrapped)
    for module, factors in adapter.factors.items():
        down, up = (torch.randn(factor.shape) * 0.01 for factor in factors)
        adapter.factors[module] = (down, up)
    adapter.save(folder / "dense" / ADAPTER_FOLDER)


def cut(folder: Path, device: str) -> dict[str, float]:
    """Remove half of the blocks of the dense model in ``folder``; seconds and memory."""
    import torch

    from atp.cut.removal import remove
    from atp.cut.selection import select
    from atp.export.hf.loading import StoredModel
    from atp.export.hf.writing import export_hf
    from atp.model.widths import build_model
    from atp.space.space import PruningSpace

    build_model(base_config(1), dtype=torch.bfloat16, device="meta")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    start, began = resident("VmRSS"), time.perf_counter()
    stored = StoredModel(folder / "dense")
    space = PruningSpace.from_model(build_model(stored.config, dtype=torch.bfloat16, device="meta"))
    masks_U = select(space, torch.randn(space.num_units, generator=torch.Generator().manual_seed(0)), 0.5)
    selected = time.perf_counter()
    small = remove(stored.tensors(), stored.config, space, masks_U, device=device)
    removed = time.perf_counter()
    export_hf(small, None, folder / "pruned", max_shard_size=SHARD_BYTES)
    done = time.perf_counter()
    return {
        "select_s": selected - began,
        "merge_and_removal_s": removed - selected,
        "export_s": done - removed,
        "peak_mib": (resident("VmHWM") - start) / MIB,
    }


def load(folder: Path) -> dict[str, float]:
    """Load the dense model for training as a run does; memory of its own, and pages that stay in its files."""
    import torch

    from atp.config.schema import ModelConfig
    from atp.run.parts import load_base

    config = ModelConfig(path=str(folder / "dense"), dtype="bfloat16")
    before = {key: resident(key) for key in ("RssAnon", "RssFile")}
    model = load_base(config)
    with torch.no_grad():
        total = sum(float(parameter.sum()) for parameter in model.parameters())  # reads every page
    assert total == total
    return {f"load_{key[3:].lower()}_mib": (resident(key) - value) / MIB for key, value in before.items()}


def measure(layers: int, device: str, rounds: int) -> dict[str, Any]:
    """One size: its files, and the medians over rounds."""
    with tempfile.TemporaryDirectory() as made:
        _child("dense", made, layers, device)
        found = [{**_child("cut", made, layers, device), **_child("load", made, layers, device)} for _ in range(rounds)]
        sizes = {
            name: [file.stat().st_size / MIB for file in (Path(made) / name).glob("*.safetensors")]
            for name in ("dense", "pruned")
        }
    figures = {key: round(statistics.median(one[key] for one in found), 2) for key in found[0]}
    return {
        "layers": layers,
        "dense_mib": round(sum(sizes["dense"]), 1),
        "pruned_mib": round(sum(sizes["pruned"]), 1),
        "limit_mib": round(1.3 * max(sizes["pruned"]) + sum(sizes["pruned"]), 1),
        **figures,
    }


def _child(step: str, folder: str, layers: int, device: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.removal", "--step", step, "--folder", folder]
    command += ["--layers", str(layers), "--device", device]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{step} with {layers} layers failed: {done.stderr[-2000:]}")
    return {} if step == "dense" else json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure every size, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="1 and 2 layers")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/removal.json")
    parser.add_argument("--step", choices=("dense", "cut", "load"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step == "dense":
        make_dense(options.folder, options.layers[0])
        make_adapter(options.folder, options.layers[0])
        return
    if options.step:
        print(json.dumps(load(options.folder) if options.step == "load" else cut(options.folder, options.device)))
        return
    rows = []
    print("layers  dense MiB pruned MiB  removal s  export s  peak MiB      aim  load: own  in files")
    for layers in [1, 2] if options.quick else options.layers:
        row = measure(layers, options.device, options.rounds)
        rows.append(row)
        print(
            f"{layers:6d} {row['dense_mib']:10.1f} {row['pruned_mib']:10.1f} {row['merge_and_removal_s']:10.2f} "
            f"{row['export_s']:9.2f} {row['peak_mib']:9.1f} {row['limit_mib']:8.1f} "
            f"{row['load_anon_mib']:10.1f} {row['load_file_mib']:9.1f}"
        )
    result = {"sizes": rows, "device": options.device, "threads": os.environ.get("OMP_NUM_THREADS", os.cpu_count())}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
