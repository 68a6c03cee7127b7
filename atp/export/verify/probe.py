"""Runs one exported format by itself and compares its logits with a reference: a script for a fresh process.

:mod:`atp.export.verify.verification` starts it; it imports nothing of atp, so that what it finds is what a user's own
engine finds. It reads a JSON task from standard input and prints one JSON line: largest logit difference, top-1
agreement, perplexity, decoding speed and the greedy continuation.

Shape suffixes: W windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from typing import Any

import numpy as np


def main() -> None:
    """Does the task on standard input."""
    task = json.load(sys.stdin)
    output = sys.stdout
    sys.stdout = sys.stderr  # libraries talk; the last line on standard output is the result
    engine = engine_class(*task["engine"])(task)
    ids_WT = np.load(task["ids"])
    reference_WTV = np.load(task["reference"], mmap_mode="r")
    result = {"spelling": spelling(engine, task.get("text"), task.get("text_ids")), "remark": engine.remark}
    result |= compare(engine, ids_WT, reference_WTV) | greedy(engine, ids_WT[0][: task["prompt"]], task["new_tokens"])
    output.write(json.dumps(result) + "\n")


def engine_class(file: str, name: str) -> Any:
    """The class of this name in a Python file, such as those of ``engines.py`` beside this one."""
    spec = importlib.util.spec_from_file_location("engines", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def compare(engine: Any, ids_WT: np.ndarray, reference_WTV: np.ndarray) -> dict[str, Any]:
    """Largest and mean difference, agreement of the likeliest token, and perplexity, over all windows."""
    largest, squares, agreeing, nll, scored = 0.0, 0.0, 0, 0.0, 0
    for ids_T, expected_TV in zip(ids_WT, reference_WTV, strict=True):
        logits_TV = engine.logits(ids_T)
        difference_TV = logits_TV - expected_TV
        difference = float(np.abs(difference_TV).max())
        squares += float(np.square(difference_TV, dtype=np.float64).mean())
        largest = difference if not difference <= largest else largest  # also when it is not a number
        agreeing += int((logits_TV.argmax(-1) == expected_TV.argmax(-1)).sum())
        shifted = logits_TV[:-1].astype(np.float64)
        shifted -= shifted.max(-1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        nll -= float(log_probabilities[np.arange(len(ids_T) - 1), ids_T[1:]].sum())
        scored += len(ids_T) - 1
    return {
        "max_abs": largest if np.isfinite(largest) else None,
        "rms": float(np.sqrt(squares / len(ids_WT))) if np.isfinite(squares) else None,
        "top1": agreeing / ids_WT.size,
        "perplexity": float(np.exp(min(nll / max(scored, 1), 700.0))),
        "tokens": int(ids_WT.size),
    }


def spelling(engine: Any, text: str | None, expected: list[int] | None) -> str:
    """How the engine's own tokenizer differs from the reference's on a text; empty if it does not, or has none."""
    if not text or expected is None or not hasattr(engine, "tokenize"):
        return ""
    found = engine.tokenize(text)
    if found is None or found == expected:
        return ""
    shared = min(len(found), len(expected))
    at = next((index for index in range(shared) if found[index] != expected[index]), shared)
    return f"its tokenizer differs from token {at} on: {found[at : at + 3]}, not {expected[at : at + 3]}"


def greedy(engine: Any, prompt_T: np.ndarray, new_tokens: int) -> dict[str, Any]:
    """Greedy continuation with the engine's own cache, and how fast it came."""
    engine.generate(prompt_T, 2)
    started = time.perf_counter()
    continuation = engine.generate(prompt_T, new_tokens)
    return {"greedy": continuation, "tokens_per_s": len(continuation) / (time.perf_counter() - started)}


if __name__ == "__main__":
    main()
