"""Exports served by vLLM: the same answers as transformers gives, and dense against pruned speed.

Each directory is served on 127.0.0.1 by a vLLM in an environment of its own (`--python`, or `ATP_VLLM_PYTHON`), asked
through its OpenAI-compatible door, and compared with transformers in this process: greedy tokens and log-probabilities
of prompts and answers. With two directories or more the first is the dense one, the servers run at once and are asked
in turn, so that what else the machine does falls on all of them. Every speed is set beside its ideal: dense over kept
weights that a step reads, for decoding with the output head, for prefill without it.

    python -m benchmarks.serve_vllm DENSE PRUNED [--batch-sizes 1 8] [--prompt-tokens 256] [--new-tokens 64]
    python -m benchmarks.serve_vllm PRUNED --remote-code      # as a server without atp takes it
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atp.errors import UserError
from atp.export.verify.engines import TransformersEngine
from atp.model.adapter import has_adapter
from atp.model.stored import StoredModel
from benchmarks.vllm_server import PYTHON_VARIABLE, Server, Vllm, find_vllm

RESULTS = Path(__file__).parent / "results"
_COMPARED = 5  # likeliest tokens whose log-probabilities are compared at each position


def main() -> int:
    """Compares, measures, prints and writes JSON; 1 where an answer differs, 2 for what cannot be served."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers end with us
    try:
        vllm = find_vllm(options.python)
        with tempfile.TemporaryDirectory(prefix="atp-vllm-") as work:
            result = _measured(vllm, options, Path(work))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {options.output}")
    return int(not all(row["same_tokens"] for row in result["answers"]))


def _measured(vllm: Vllm, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"vllm": {name: value for name, value in asdict(vllm).items() if name != "python"}}
    result |= {"machine": platform.processor() or platform.machine(), "threads": options.threads}
    result |= {"dtype": options.dtype, "plugin": not options.remote_code, "answers": [], "speed": []}
    longest = max(options.prompt_tokens, 64) + options.new_tokens + 1
    with contextlib.ExitStack() as open_servers:
        servers = []
        for index, directory in enumerate(options.directories):
            server = Server(vllm, directory.resolve(), work / str(index), options.remote_code, options.dtype, longest)
            server.threads = options.threads
            servers.append(open_servers.enter_context(server))
        for server in servers:
            row = compare(server, prompts=options.prompts, prompt_tokens=32, new_tokens=min(32, options.new_tokens))
            result["answers"].append(row)
            print(
                f"{row['directory']}: greedy tokens {'equal' if row['same_tokens'] else 'DIFFER'} on {row['tokens']}, "
                f"largest log-probability difference {row['max_logprob_difference']:.2g}",
                flush=True,
            )
        for size in options.batch_sizes:
            rows = speeds(servers, size, options.prompt_tokens, options.new_tokens, options.repeats)
            result["speed"] += rows
            for row in rows:
                print(_line(row), flush=True)
    return result


def compare(server: Server, *, prompts: int, prompt_tokens: int, new_tokens: int, seed: int = 0) -> dict[str, Any]:
    """Asks a server for greedy continuations, and transformers for what they should be.

    Args:
        server: A running server.
        prompts: Prompts of random tokens.
        prompt_tokens: Their length.
        new_tokens: Tokens to make.
        seed: Of the prompts.

    Returns:
        Whether the tokens are the same, the largest difference of log-probabilities (of the prompts' tokens, the
        chosen ones and the likeliest ones at each position), and over how many tokens.
    """
    form = "adapter" if has_adapter(server.directory) else "hf"
    reference = TransformersEngine({"path": str(server.directory), "format": form})
    ids = random_prompts(reference.model.config.vocab_size, prompts, prompt_tokens, seed)
    wanted = {"logprobs": _COMPARED, "prompt_logprobs": _COMPARED}
    answers = server.ask([row.tolist() for row in ids], new_tokens, **wanted)
    differences, same, compared = [], [], 0
    for prompt_T, answer in zip(ids, sorted(answers, key=lambda choice: choice["index"]), strict=True):
        made = answer["token_ids"]
        same.append(made == reference.generate(prompt_T, new_tokens))
        logits_TV = torch.from_numpy(reference.logits(np.concatenate([prompt_T, made])))
        expected_TV = torch.log_softmax(logits_TV.double(), dim=-1)
        for position, values in enumerate(_said(answer, len(prompt_T)), start=1):
            differences += [abs(value - float(expected_TV[position - 1, token])) for token, value in values.items()]
            compared += 1
    return {
        "directory": server.directory.name,
        "architecture": reference.model.config.architectures[0],
        "same_tokens": all(same),
        "prompts_with_the_same_tokens": f"{sum(same)} of {len(same)}",
        "max_logprob_difference": max(differences),
        "tokens": compared,
    }


def random_prompts(vocabulary: int, count: int, length: int, seed: int) -> np.ndarray:
    """Token ids [count, length]; the first few ids, which are special in most vocabularies, left out."""
    return np.random.default_rng(seed).integers(min(8, vocabulary // 2), vocabulary, (count, length))


def _said(answer: dict[str, Any], prompt_tokens: int) -> list[dict[int, float]]:
    """Log-probabilities by token id at each position after the first, of the prompt and of the answer."""
    prompt = [
        {int(token): entry["logprob"] for token, entry in position.items()}
        for position in answer["prompt_logprobs"][1:]
    ]
    assert len(prompt) == prompt_tokens - 1
    made = answer["logprobs"]["top_logprobs"]
    return prompt + [{int(name.removeprefix("token_id:")): value for name, value in row.items()} for row in made]


def speeds(
    servers: Sequence[Server], batch: int, prompt_tokens: int, new_tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """Tokens per second of each server, asked in turn.

    Args:
        servers: Running servers, the dense one first.
        batch: Prompts in one request.
        prompt_tokens: Length of the prompts that prefill is measured on; decoding starts from 8 tokens.
        new_tokens: Tokens to make.
        repeats: Times each is asked; medians are given, of ratios those of the rounds.
    """
    stored = [StoredModel(server.directory) for server in servers]
    weights = [read_weights(model) for model in stored]
    found: list[dict[str, list[float]]] = [{"prefill": [], "decode": []} for _ in servers]
    for turn in range(-1, repeats):  # the first one warms up
        for server, model, mine in zip(servers, stored, found, strict=True):
            vocabulary = model.config.vocab_size
            long, short = (random_prompts(vocabulary, batch, length, turn + 1) for length in (prompt_tokens, 8))
            prefill = _seconds(server, long, 1)
            decode = _seconds(server, short, new_tokens) - _seconds(server, short, 1)
            if turn >= 0:
                mine["prefill"].append(batch * prompt_tokens / prefill)
                mine["decode"].append(batch * (new_tokens - 1) / decode)
    rows = []
    for server, mine, (blocks, whole) in zip(servers, found, weights, strict=True):
        row: dict[str, Any] = {"directory": server.directory.name, "batch": batch}
        ideals = {"prefill": weights[0][0] / blocks, "decode": weights[0][1] / whole}
        for kind, ideal in ideals.items():
            ratio = statistics.median(own / dense for own, dense in zip(mine[kind], found[0][kind], strict=True))
            row[kind] = {"tokens_per_second": statistics.median(mine[kind]), "ratio": ratio}
            row[kind] |= {"ideal": ideal, "share_of_ideal": ratio / ideal, "rounds": mine[kind]}
        rows.append(row)
    return rows


def read_weights(model: StoredModel) -> tuple[int, int]:
    """Entries of the matrices that a step of decoding reads: in the blocks, and with the output head."""
    blocks = sum(int(np.prod(shape)) for name, shape in model.shapes.items() if ".layers." in name and len(shape) == 2)
    return blocks, blocks + model.config.vocab_size * model.config.hidden_size


def _seconds(server: Server, prompts: np.ndarray, new_tokens: int) -> float:
    start = time.perf_counter()
    server.ask([row.tolist() for row in prompts], new_tokens)
    return time.perf_counter() - start


def _line(row: dict[str, Any]) -> str:
    parts = [
        f"{kind} {row[kind]['tokens_per_second']:.0f} tokens/s ({row[kind]['ratio']:.2f}x the first, "
        f"{row[kind]['share_of_ideal']:.2f} of the ideal {row[kind]['ideal']:.2f}x)"
        for kind in ("prefill", "decode")
    ]
    return f"{row['directory']}, batch {row['batch']}: {', '.join(parts)}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="+", help="exported directories, the dense one first")
    parser.add_argument("--python", help=f"the Python that has vLLM; by default {PYTHON_VARIABLE}")
    parser.add_argument("--remote-code", action="store_true", help="--trust-remote-code and no plugin")
    parser.add_argument("--dtype", default="float32", help="type that vLLM computes in")
    parser.add_argument("--prompts", type=int, default=4, help="prompts whose answers are compared")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="length of prompts that prefill is measured on")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 8], help="none: answers alone")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="threads of each server")
    parser.add_argument("--output", type=Path, default=RESULTS / "serve_vllm.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
