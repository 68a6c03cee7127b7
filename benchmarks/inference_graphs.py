"""Decoding without Python in the way: a step captured as a CUDA graph over a static cache.

At 7 B parameters and batch 1 a GPU finishes a layer's decoding kernels sooner than Python can launch them, so eager
decoding times the launches, which a pruned model has just as many of. Serving engines replay graphs; so does this.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

_WARM = 3


class GraphedDecoder:
    """One model's decoding step, captured after a prompt of random tokens.

    Args:
        model: On a CUDA device, in evaluation mode.
        batch: Sequences B.
        prompt: Tokens of the prompt.
        new_tokens: Steps that will be replayed.
    """

    def __init__(self, model: PreTrainedModel, batch: int, prompt: int, new_tokens: int) -> None:
        self.steps = new_tokens
        draw = torch.Generator().manual_seed(0)
        ids_BT = torch.randint(model.config.vocab_size, (batch, prompt), generator=draw).to(model.device)
        cache = StaticCache(config=model.config, max_cache_len=prompt + new_tokens + 2 * _WARM + 2)
        self.next_B1: Tensor = self._step(model, ids_BT, cache)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM):
                self.next_B1.copy_(self._step(model, self.next_B1, cache))
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.next_B1.copy_(self._step(model, self.next_B1, cache))
        self.cache = cache

    @staticmethod
    def _step(model: PreTrainedModel, ids: Tensor, cache: StaticCache) -> Tensor:
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1)

    def seconds(self) -> float:
        """Seconds of a token, the mean over all steps."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self.steps):
            self.graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / self.steps


@torch.inference_mode()
def compare_graphed(
    dense: PreTrainedModel, pruned: PreTrainedModel, *, batch: int, prompt: int, new_tokens: int, rounds: int = 3
) -> dict[str, Any]:
    """Milliseconds of a decoded token of both, and their ratio; models take turns, every round decodes anew."""
    found: dict[str, list[float]] = {"dense": [], "pruned": []}
    for number in range(rounds):
        turns: Sequence[tuple[str, PreTrainedModel]] = (("dense", dense), ("pruned", pruned))
        for name, model in turns[:: -1 if number % 2 else 1]:
            found[name].append(GraphedDecoder(model, batch, prompt, new_tokens).seconds())
    return {
        "dense_ms": 1000 * statistics.median(found["dense"]),
        "pruned_ms": 1000 * statistics.median(found["pruned"]),
        "decode_ratio": statistics.median(a / b for a, b in zip(found["dense"], found["pruned"], strict=True)),
    }
