"""Speed of a model pruned to a share of its block parameters against the dense one, at a size where blocks dominate.

The weights are random: speed does not depend on their values. Dense and pruned run in alternation in one process.

    python -m benchmarks.inference [--sparsity 0.5] [--hidden 1024 --layers 12] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from atp.architecture import build_model
from atp.evaluate.measure import compare_speed, count_parameters, macs_per_token
from atp.removal import remove, widths_after
from atp.selection import select
from atp.space import PruningSpace

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, print a table, write JSON."""
    options = _options()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4 // 32 * 32,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 128,
        head_dim=64,
        tie_word_embeddings=True,
    )
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    dense = build_model(config, dtype=dtype, device=options.device, initialize=True)
    space = PruningSpace.from_model(dense)
    masks_U = select(space, torch.randn(space.num_units), options.sparsity, shape=options.shape)
    pruned = remove(dense.state_dict().items(), config, space, masks_U, device=options.device)
    lengths = {"prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens, "repeats": options.repeats}
    result = {
        "torch": torch.__version__,
        "dense_parameters": count_parameters(dense),
        "pruned_parameters": count_parameters(pruned),
        "block_sparsity": float(space.sparsity(masks_U.double())),
        "macs_ratio": macs_per_token(dense, options.prompt_tokens) / macs_per_token(pruned, options.prompt_tokens),
        "widths": [asdict(width) for width in widths_after(space, masks_U)],
        "speed": [compare_speed(dense, pruned, batch_size=size, **lengths) for size in options.batch_sizes],
    }
    _show(result)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.5, help="fraction of block parameters to remove")
    parser.add_argument("--shape", choices=("per_layer", "uniform"), default="per_layer")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "inference.json")
    return parser.parse_args()


def _show(result: dict[str, Any]) -> None:
    sizes = [f"{name} {result[f'{name}_parameters'] / 1e6:.0f} M" for name in ("dense", "pruned")]
    print(f"{', '.join(sizes)} parameters;", end=" ")
    print(f"block sparsity {result['block_sparsity']:.3f}; MACs per token {result['macs_ratio']:.2f}x fewer")
    for row in result["speed"]:
        ratios = f"prefill {row['prefill_ratio']:.2f}x, decode {row['decode_ratio']:.2f}x"
        print(f"batch {row['batch_size']}: {ratios} the dense speed")


if __name__ == "__main__":
    main()
