"""K-quants: which type each tensor of such a file has, after llama.cpp's own rule, and its rows in that type.

A K-quant's name stands for a mix: most matrices in one type, those that rounding harms most in a finer one. The rule is
that of llama.cpp's quantiser without an importance matrix (``llama_tensor_get_type`` in its sources), and the rows come
from llama.cpp's own routines in the wheel xllamacpp, which does not export the quantiser itself. Knows names and shapes
of tensors; :mod:`atp.export.gguf.file` writes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from atp.export.gguf.layout import GgufLayout
from atp.export.gguf.tensors import GgufTensor
from atp.export.llama_cpp.engine import quantise_rows
from atp.model.gguf.names import EMBEDDINGS, HEAD, LINEARS

Choice = Callable[[int, int], str]
"""A type, from a tensor's place among those of its kind and their number."""
_FUSED = "attn_qkv"
_SEVENTY_BILLION_LAYERS = 80
_MANY_QUERIES = 4


def _always(name: str) -> Choice:
    return lambda place, count: name


def _first(share: int, finer: str, otherwise: str) -> Choice:
    """A finer type in the first 1 / share of the layers."""
    return lambda place, count: finer if place < count // share else otherwise


def _some(finer: str, otherwise: str) -> Choice:
    """A finer type in the first and the last eighth of the layers, and in every third between."""

    def choose(place: int, count: int) -> str:
        eighth = count // 8
        outer = place < eighth or place >= 7 * count // 8
        return finer if outer or (place - eighth) % 3 == 2 else otherwise

    return choose


@dataclass(frozen=True)
class Mix:
    """Types of the matrices of a file: of most, of values, of FFN outputs and of attention outputs."""

    most: str
    value: Choice | None = None
    down: Choice | None = None
    output: str = ""


MIXES = {
    "q6_k": Mix("Q6_K"),
    "q5_k_m": Mix("Q5_K", _some("Q6_K", "Q5_K"), _some("Q6_K", "Q5_K")),
    "q5_k_s": Mix("Q5_K"),
    "q4_k_m": Mix("Q4_K", _some("Q6_K", "Q4_K"), _some("Q6_K", "Q4_K")),
    "q4_k_s": Mix("Q4_K", lambda place, count: "Q5_K" if place < 4 else "Q4_K", _first(8, "Q5_K", "Q4_K")),
    "q3_k_m": Mix(
        "Q3_K", lambda place, count: "Q5_K" if place < 2 else "Q4_K", _first(16, "Q5_K", "Q4_K"), output="Q4_K"
    ),
    "q2_k": Mix("Q2_K", _always("Q3_K"), _always("Q3_K"), output="Q3_K"),
    "q5_0": Mix("Q5_0"),
    "q4_0": Mix("Q4_0"),
}
"""By name of the file's type."""
COARSER_ROWS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What a matrix has instead where its rows are no multiple of 256; where they are none of 32 either, F16."""


def tensor_types(layout: GgufLayout, kind: str) -> list[str]:
    """The type of every tensor of a file, in its order.

    Args:
        layout: The file's layout.
        kind: One of :data:`MIXES`.
    """
    mix = MIXES[kind]
    tied = all(tensor.name != HEAD for tensor in layout.tensors)
    values = [tensor for tensor in layout.tensors if _part(tensor) in (LINEARS["value"], _FUSED)]
    downs = [tensor for tensor in layout.tensors if _part(tensor) == LINEARS["down"]]
    found = []
    for tensor in layout.tensors:
        if len(tensor.shape) == 1:
            found.append("F32")
            continue
        chosen = mix.most
        if tensor.name == HEAD or (tied and tensor.name == EMBEDDINGS):
            chosen = "Q6_K"
        elif tensor in values and mix.value:
            chosen = _for_values(layout, kind, mix.value(values.index(tensor), len(values)))
        elif tensor in downs and mix.down:
            chosen = mix.down(downs.index(tensor), len(layout.widths))
        elif _part(tensor) == LINEARS["output"] and mix.output:
            chosen = mix.output
        found.append(_fitting(chosen, tensor.shape[-1]))
    return found


def _part(tensor: GgufTensor) -> str:
    """The matrix's name within its layer; empty for others than a layer's matrices."""
    parts = tensor.name.split(".")
    return parts[2] if parts[0] == "blk" and parts[-1] == "weight" else ""


def _for_values(layout: GgufLayout, kind: str, chosen: str) -> str:
    """Values that many queries share are small, and finer for it."""
    first = layout.widths[0]
    shared = first.num_attention_heads // max(first.num_key_value_heads, 1)
    if kind == "q2_k" and shared >= _MANY_QUERIES:
        chosen = "Q4_K"
    large = len(layout.widths) == _SEVENTY_BILLION_LAYERS
    large = large and (layout.architecture in ("deci", "qwen2") or (layout.architecture == "llama" and shared > 1))
    return "Q5_K" if large and chosen in ("Q3_K", "Q4_K") else chosen


def _fitting(name: str, columns: int) -> str:
    """The type, or what it gives way to where its blocks do not fit the rows."""
    import gguf

    for candidate in (name, COARSER_ROWS.get(name, name)):
        block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[candidate]]
        if columns % block == 0:
            return candidate
    return "F16"


def quantised(values: np.ndarray, stored_type: Any) -> np.ndarray:
    """A matrix's rows in a type of ggml, as bytes [rows, bytes of a row].

    Args:
        values: Matrix [rows, columns], float32.
        stored_type: A ``gguf.GGMLQuantizationType``.
    """
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[stored_type]
    return quantise_rows(values, int(stored_type), values.shape[1] // block * size)


def described(types: Sequence[str]) -> str:
    """How many matrices have which type, from the types of all of them; the most frequent first."""
    return ", ".join(f"{count} {name}" for name, count in Counter(types).most_common())
