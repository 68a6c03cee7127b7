"""Speed of a model pruned to a share of its block parameters against the dense one, at a size where blocks dominate.

The weights are random: speed does not depend on their values. Dense and pruned run in alternation in one process.
``ideal`` is what the kept blocks alone would allow: dense over kept multiply-accumulates for prefill, dense over kept
bytes for decoding at batch 1; ``ideal, whole model`` counts output head and cache as well, which are not pruned.

    python -m benchmarks.inference [--sparsity 0.5] [--hidden 1024 --layers 12]
    python -m benchmarks.inference --device cuda --model llama2_7b --round-to 1 64
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from atp.cut.removal import remove, widths_after
from atp.cut.selection import select
from atp.evaluate.measure import compare_speed, count_parameters, macs_per_token
from atp.model.layers import block_parameters
from atp.model.widths import build_model
from atp.space.space import PruningSpace
from benchmarks.inference_graphs import compare_graphed
from benchmarks.training_systems import SHAPES

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, print a table, write JSON."""
    options = _options()
    torch.manual_seed(0)
    config = SHAPES[options.model].config() if options.model else _config(options)
    config.max_position_embeddings = max(4096, options.prompt_tokens + options.new_tokens)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    dense = build_model(config, dtype=dtype, device=options.device, initialize=True)
    space = PruningSpace.from_model(dense)
    scores_U = torch.randn(space.num_units)
    device = options.device if options.device == "cpu" else torch.cuda.get_device_name()
    result: dict[str, Any] = {"torch": torch.__version__, "device": device, "dense_parameters": count_parameters(dense)}
    result |= {"model": options.model or f"{options.hidden}x{options.layers}", "pruned": []}
    for round_to in options.round_to:
        masks_U = select(space, scores_U, options.sparsity, shape=options.shape, round_to=round_to)
        pruned = remove(dense.state_dict().items(), config, space, masks_U, device=options.device)
        found = _compare(dense, pruned, options)
        found |= {
            "round_to": round_to,
            "shape": options.shape,
            "block_sparsity": float(space.sparsity(masks_U.double())),
        }
        found["widths"] = [asdict(width) for width in widths_after(space, masks_U)]
        result["pruned"].append(found)
        _show(found)
        del pruned
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


def _compare(dense: PreTrainedModel, pruned: PreTrainedModel, options: argparse.Namespace) -> dict[str, Any]:
    lengths = {"prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens}
    blocks = block_parameters(dense) / block_parameters(pruned)
    macs = macs_per_token(dense, options.prompt_tokens) / macs_per_token(pruned, options.prompt_tokens)
    ideal = {"blocks": blocks, "whole_macs": macs, "whole_bytes": _read_bytes(dense) / _read_bytes(pruned)}
    rows = []
    for size in options.batch_sizes:
        row = compare_speed(dense, pruned, batch_size=size, repeats=options.repeats, **lengths)
        if options.device != "cpu":
            try:
                graphed = compare_graphed(
                    dense, pruned, batch=size, prompt=options.prompt_tokens, new_tokens=options.new_tokens
                )
            except RuntimeError as error:
                graphed = {"not_captured": str(error)[:300]}
            row["graphed"] = graphed
        rows.append(row)
    return {"parameters": count_parameters(pruned), "macs_ratio": macs, "ideal": ideal, "speed": rows}


def _read_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a decoding step reads: all linears, whatever they are tied to; no embedding table."""
    return sum(m.weight.numel() * m.weight.element_size() for m in model.modules() if isinstance(m, nn.Linear))


def _config(options: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=8192,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4 // 32 * 32,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 128,
        head_dim=64,
        tie_word_embeddings=True,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.5, help="fraction of block parameters to remove")
    parser.add_argument("--shape", choices=("per_layer", "uniform"), default="per_layer")
    parser.add_argument("--round-to", type=int, nargs="+", default=[1], help="kept widths are multiples of this")
    parser.add_argument("--model", choices=("llama2_7b", "llama3_8b"), help="instead of --hidden and --layers")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "inference.json")
    return parser.parse_args()


def _show(found: dict[str, Any]) -> None:
    ideal = found["ideal"]
    print(
        f"{found['parameters'] / 1e6:.0f} M parameters; block sparsity {found['block_sparsity']:.3f}; round_to", end=""
    )
    print(f" {found['round_to']}; ideal: blocks {ideal['blocks']:.2f}x, with head and cache", end="")
    print(f" {ideal['whole_macs']:.2f}x of arithmetic, {ideal['whole_bytes']:.2f}x of weights read")
    for row in found["speed"]:
        ratios = f"prefill {row['prefill_ratio']:.2f}x, decode {row['decode_ratio']:.2f}x"
        shares = f"{row['prefill_ratio'] / ideal['blocks']:.2f} and {row['decode_ratio'] / ideal['blocks']:.2f}"
        graphed = row.get("graphed", {})
        extra = f"; decode by CUDA graph {graphed['decode_ratio']:.2f}x" if "decode_ratio" in graphed else ""
        print(f"batch {row['batch_size']}: {ratios} the dense speed ({shares} of the blocks' ideal){extra}", flush=True)


if __name__ == "__main__":
    main()
