"""What the budget counts: parameters, multiply-accumulates, memory, or latency measured on this machine.

Makes the :class:`atp.space.units.CostModel` that selection and the training budget share. Each cost is a sum over kept
weights, biases and attention entries, so it stays multilinear in the masks: its expectation is exact and its gradient
tells the generator what a unit costs by that measure. It knows model shapes and nothing of masks or training.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from atp.atomic import write_json
from atp.errors import UserError
from atp.model.families import family_of
from atp.model.layers import decoder_layers, layer_parts
from atp.space.units import PARAMETERS, CostModel

log = logging.getLogger(__name__)

COSTS = ("parameters", "macs", "latency", "memory")
_REPEATS = 15


def make_cost(of: str, *, context: int, model: PreTrainedModel, table: Path | None = None) -> CostModel:
    """The cost model of a name.

    * ``parameters``: weights and biases of the decoder blocks, as in ATP.
    * ``macs``: multiply-accumulates of one token that attends to ``context`` keys.
    * ``memory``: bytes of weights, and of one sequence's key-value cache of ``context`` tokens.
    * ``latency``: milliseconds of decoding one token, from timing the model's own projections and attention over
      ``context`` keys on the device it is on, with torch's current number of threads.

    Args:
        of: One of :data:`COSTS`.
        context: Keys in the key-value cache.
        model: The dense model.
        table: File of measured prices: read where it exists, otherwise measured and written, so that a run that goes
            on, or another run, counts by the same prices.

    Raises:
        ValueError: An unknown cost, a context below 1, or a table of something else.
    """
    if context < 1:
        raise UserError(f"prune.budget_context is {context}; it is a number of tokens and must be at least 1")
    if of == "parameters":
        return PARAMETERS
    if of == "macs":
        return CostModel(bias=0.0, scores=float(context), of=of)
    if of == "memory":
        size = float(model.dtype.itemsize)
        return CostModel(attention=size, ffn=size, bias=size, cache=size * context, of=of)
    if of == "latency":
        return _tabled(table, model, context)
    raise UserError(f"prune.budget_of is {of!r}; known: {', '.join(COSTS)}")


def _tabled(table: Path | None, model: PreTrainedModel, context: int) -> CostModel:
    """Latency by the prices of a file, made if it is not there."""
    if table is None:
        return measured_latency(model, context)
    if not table.is_file():
        cost = measured_latency(model, context)
        content = {**asdict(cost), "context": context, "threads": torch.get_num_threads(), "unit": "ms"}
        write_json(table, content)
        return cost
    try:
        content = json.loads(table.read_text(encoding="utf-8"))
        prices = {field.name: content[field.name] for field in fields(CostModel)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"prune.latency_table={table} is no table of prices: {error!r}; delete it or name another"
        ) from None
    if content.get("context") != context:
        raise UserError(
            f"prune.latency_table={table} was measured over {content.get('context')} keys, prune.budget_context is "
            f"{context}; name another file"
        )
    return CostModel(**prices)


@torch.inference_mode()
def measured_latency(model: PreTrainedModel, context: int) -> CostModel:
    """Milliseconds per kept weight and attention entry, from the first layer that has both blocks.

    Projections and attention are timed at the dense and at half their widths; the slope between the two is what a kept
    entry costs, which leaves out the overhead of launching an operation that no width changes.
    """
    family = family_of(model.config)
    layers = (layer_parts(family, layer) for layer in decoder_layers(model).values())
    parts = next((parts for parts in layers if {"output", "down"} <= set(parts.roles)), None)
    if parts is None:
        raise UserError("prune.budget_of is latency, but no layer of this model has both attention and FFN")
    down, output = cast(nn.Linear, parts.linear("down")), cast(nn.Linear, parts.linear("output"))
    attention = _slope_ms(output.in_features, lambda n: _linear(output, n)) / output.out_features
    ffn = _slope_ms(down.in_features, lambda n: _linear(down, n)) / down.out_features
    head_dim = parts.head_dim
    heads = output.in_features // head_dim

    def attend(kept: int) -> Any:
        query = torch.randn(1, kept, 1, head_dim, device=output.weight.device, dtype=output.weight.dtype)
        keys = torch.randn(1, kept, context, head_dim, device=query.device, dtype=query.dtype)
        return lambda: nn.functional.scaled_dot_product_attention(query, keys, keys)

    scores = _slope_ms(heads, attend) / (2 * head_dim)  # a query row and an output column per dimension
    cost = CostModel(attention, ffn, 0.0, scores, 0.0, "latency")
    log.info(
        "measured: %.3g ns per attention weight, %.3g per FFN weight, %.3g per attention entry over %d keys",
        1e6 * attention,
        1e6 * ffn,
        1e6 * scores,
        context,
    )
    return cost


def _linear(like: nn.Linear, width: int) -> Any:
    weight = torch.randn(like.out_features, width, device=like.weight.device, dtype=like.weight.dtype)
    x = torch.randn(1, width, device=weight.device, dtype=weight.dtype)
    return lambda: nn.functional.linear(x, weight)


def _slope_ms(width: int, make: Any) -> float:
    """Milliseconds per entry of a width, from timing all and half of it; at least a tenth of the mean per entry."""
    half = max(width // 2, 1)
    whole_ms, half_ms = _time_ms(make(width)), _time_ms(make(half))
    slope = (whole_ms - half_ms) / (width - half) if width > half else 0.0
    return max(slope, 0.1 * whole_ms / width)


def _time_ms(work: Any) -> float:
    """Median time of one call, in milliseconds, after warming up; many calls are timed at a time."""
    times: list[float] = []
    calls = 20
    for repeat in range(_REPEATS + 2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if repeat >= 2:
            times.append(1000.0 * (time.perf_counter() - start) / calls)
    return statistics.median(times)
