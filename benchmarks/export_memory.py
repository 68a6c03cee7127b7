"""Peak memory of removing and exporting a randomly initialised model of 1 B parameters.

Each step runs in a process of its own that imports everything first; what is reported is the largest resident set
beyond that start. The limit is that of streaming: 1.3 times the largest shard plus the pruned model.

    python benchmarks/export_memory.py [--layers 16] [--output benchmarks/results/export_memory.json]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SHARD_BYTES = 500_000_000
STEPS = ("removal and export", "gguf f16", "gguf q8_0", "load")
MIB = 2**20


def resident(key: str) -> int:
    """A value of this process' memory, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def base_config(layers: int):
    """The shape of Llama 3.2 1B with a vocabulary of 32000."""
    import torch
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        dtype=torch.bfloat16,
    )


def make_dense(folder: Path, layers: int) -> None:
    """Writes the dense model."""
    import torch

    from atp.export.hf.writing import export_hf
    from atp.model.widths import build_model

    model = build_model(base_config(layers), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    export_hf(model, None, folder / "dense", max_shard_size=SHARD_BYTES)


def step(name: str, folder: Path, layers: int) -> dict[str, float]:
    """Does one step and says what it took."""
    import torch

    from atp.cut.removal import remove
    from atp.cut.selection import select
    from atp.export.gguf.file import export_gguf
    from atp.export.hf.loading import StoredModel, load_exported
    from atp.export.hf.writing import export_hf
    from atp.model.widths import build_model
    from atp.space.space import PruningSpace

    build_model(base_config(1), dtype=torch.bfloat16, device="meta")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    start = resident("VmRSS")
    if name == "removal and export":
        stored = StoredModel(folder / "dense")
        space = PruningSpace.from_model(build_model(stored.config, dtype=torch.bfloat16, device="meta"))
        masks_U = select(space, torch.randn(space.num_units, generator=torch.Generator().manual_seed(0)), 0.5)
        small = remove(stored.tensors(), stored.config, space, masks_U)
        export_hf(small, None, folder / "pruned", max_shard_size=SHARD_BYTES)
    elif name.startswith("gguf"):
        export_gguf(folder / "pruned", types=[name.split()[1]], tokenizer=False)
    else:
        load_exported(folder / "pruned")
    return {"peak_mib": (resident("VmHWM") - start) / MIB}


def main() -> None:
    """Measures every step and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--step")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.step == "dense":
        return make_dense(arguments.folder, arguments.layers)
    if arguments.step:
        print(json.dumps(step(arguments.step, arguments.folder, arguments.layers)))
        return None
    with tempfile.TemporaryDirectory() as folder:
        results = {name: run(name, folder, arguments.layers) for name in ("dense", *STEPS)}
        pruned, dense = Path(folder) / "pruned", Path(folder) / "dense"
        shard = max(file.stat().st_size for file in pruned.glob("*.safetensors")) / MIB
        size = sum(file.stat().st_size for file in pruned.glob("*.safetensors")) / MIB
        report = {
            "dense_mib": round(sum(file.stat().st_size for file in dense.glob("*.safetensors")) / MIB, 1),
            "pruned_mib": round(size, 1),
            "largest_shard_mib": round(shard, 1),
            "limit_mib": round(1.3 * shard + size, 1),
            "peak_mib": {name: round(results[name]["peak_mib"], 1) for name in STEPS},
        }
    print(json.dumps(report, indent=2))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return None


def run(name: str, folder: str, layers: int) -> dict[str, float]:
    """One step in its own process."""
    command = [sys.executable, __file__, "--step", name, "--folder", folder, "--layers", str(layers)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1]) if done.stdout.strip() else {}


if __name__ == "__main__":
    main()
