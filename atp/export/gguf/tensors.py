"""The tensors of a GGUF file: their names and shapes, and how their numbers come from the stored tensors.

What :mod:`atp.export.gguf.layout` decided for a layer is spelled out here: which tensors the layer has, which rows are
permuted, where zeros stand. Knows names and shapes, opens no file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from atp.model.families import ATTENTION_ROLES, Family, family_of
from atp.model.gguf.names import LINEARS, NEIGHBOURS, norm_name
from atp.model.widths import LayerWidths


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        name: Its name in GGUF.
        shape: Rows and columns, or length.
        sources: Stored tensors it is made of, one below the other; none means it is filled.
        heads: Heads whose rows are permuted from halves to neighbours; 0 leaves rows as they are.
        filling: What it is filled with, where it has no source: one value for all, or each.
        kept: By source, the dimensions that its heads keep; the others are zero. Empty where heads are whole.
        head_dim: Size of a whole head, where heads keep only some dimensions.
        axis: The dimension along which heads or channels lie.
        added: What is added to every number, where the file's norms multiply by another weight than the model's.
        grid: Where the file has more units along that axis than the model: the model's units (KV heads, queries of
            each, dimensions; or channels) and the file's; the rest is zero.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    heads: int = 0
    filling: tuple[float, ...] = (0.0,)
    kept: tuple[tuple[int, ...], ...] = ()
    head_dim: int = 0
    axis: int = 0
    added: float = 0.0
    grid: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def values(self, read: Callable[[str], torch.Tensor]) -> np.ndarray:
        """The numbers of the tensor, float32.

        Args:
            read: Gives a stored tensor by its name.
        """
        if not self.sources:
            filled = np.asarray(self.filling, np.float32)
            return np.broadcast_to(filled, self.shape).copy() if len(filled) == 1 else filled
        parts = [read(name).to(torch.float32) for name in self.sources]
        if self.kept:
            parts = [self._whole_heads(part, kept) for part, kept in zip(parts, self.kept, strict=True)]
        made = parts[0] if len(parts) == 1 else torch.cat(parts)
        made = made + self.added if self.added else made
        if self.grid:
            made = self._filled_up(made, *self.grid)
        if self.heads:
            made = _halves_to_neighbours(made, self.heads)
        assert tuple(made.shape) == self.shape, f"{self.name}: {tuple(made.shape)} is not {self.shape}"
        return made.contiguous().numpy()

    def _whole_heads(self, part: torch.Tensor, kept: tuple[int, ...]) -> torch.Tensor:
        """Puts the dimensions that heads keep back in their places, zeros in the others."""
        heads = part.shape[self.axis] // len(kept)
        places = torch.tensor([head * self.head_dim + dim for head in range(heads) for dim in kept])
        shape = list(part.shape)
        shape[self.axis] = heads * self.head_dim
        return part.new_zeros(shape).index_copy(self.axis, places, part)

    def _filled_up(self, part: torch.Tensor, have: tuple[int, ...], want: tuple[int, ...]) -> torch.Tensor:
        """Puts the model's units in front of zeros, at every level of the grid."""
        before, after = part.shape[: self.axis], part.shape[self.axis + 1 :]
        made = part.new_zeros(*before, *want, *after)
        corner: tuple[Any, ...] = (*[slice(None)] * len(before), *(slice(size) for size in have))
        made[corner] = part.reshape(*before, *have, *after)
        return made.reshape(*before, -1, *after)


def _halves_to_neighbours(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders the rows of each head so that dimensions i and i + d/2, which rotate together, become neighbours."""
    paired = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return paired.transpose(1, 2).reshape(rows.shape)


_ROTATED = ("query", "key")
_FUSED = ("query", "key", "value")


def layer_tensors(
    config: PreTrainedConfig, architecture: str, index: int, kept: LayerWidths, written: LayerWidths
) -> list[GgufTensor]:
    """Tensors of one layer; those of a block that is written but absent are zero, its norms one."""
    family = family_of(config)
    layer = f"{family.layers}.{index}"
    queries, keys = (count * written.head_dim for count in (written.num_attention_heads, written.num_key_value_heads))
    channels, hidden = written.intermediate_size, config.hidden_size
    shapes = {
        "query": (queries, hidden),
        "key": (keys, hidden),
        "value": (keys, hidden),
        "output": (hidden, queries),
        "gate": (channels, hidden),
        "up": (channels, hidden),
        "down": (hidden, channels),
    }
    tensors = _norms(config, family, index, kept, written)
    if architecture == "openelm":
        sources = tuple(f"{layer}.{family.linears[role]}.weight" for role in _FUSED) if kept.has_attention else ()
        spread = _spread(kept, *_FUSED) if sources else {}
        tensors.append(GgufTensor(f"blk.{index}.attn_qkv.weight", (queries + 2 * keys, hidden), sources, **spread))
        shapes = {role: shape for role, shape in shapes.items() if role not in _FUSED}
    permuted = {"query": written.num_attention_heads, "key": written.num_key_value_heads}
    halves_become_neighbours = architecture in NEIGHBOURS and family.rotary == "halves"
    for role, shape in shapes.items():
        if 0 in shape:
            continue
        heads = permuted.get(role, 0) if halves_become_neighbours else 0
        present = kept.has_attention if role in ATTENTION_ROLES else kept.has_mlp
        name, source = f"blk.{index}.{LINEARS[role]}", f"{layer}.{family.linears[role]}"
        sources = (f"{source}.weight",) if present else ()
        places = _places(kept, written, role) if present else {}
        tensors.append(GgufTensor(f"{name}.weight", shape, sources, heads, **places))
        if present and family.has_bias(config, role):
            places = {} if places.get("axis") == 1 else places  # these rows are the residual stream
            tensors.append(GgufTensor(f"{name}.bias", shape[:1], (f"{source}.bias",), heads, **places))
    return tensors


def _norms(
    config: PreTrainedConfig, family: Family, index: int, kept: LayerWidths, written: LayerWidths
) -> list[GgufTensor]:
    """The norms of the blocks that are written."""
    tensors = []
    for norm in family.norms:
        is_attention = norm.block == "attention"
        if is_attention and not written.has_attention:
            continue
        size = config.hidden_size if norm.over == "stream" else written.head_dim
        if norm.across_heads:
            size *= written.num_attention_heads if norm.over == "query" else written.num_key_value_heads
        present = kept.has_attention if is_attention else kept.has_mlp
        sources = (f"{family.layers}.{index}.{norm.module}.weight",) if present else ()
        name = f"blk.{index}.{norm_name(norm)}.weight"
        tensors.append(GgufTensor(name, (size,), sources, filling=(1.0,), added=family.norm_offset))
    return tensors


def _places(kept: LayerWidths, written: LayerWidths, role: str) -> dict[str, Any]:
    """Where the units of a projection stand in the file's, if it has more of them, or whole heads for slim ones."""
    axis = int(role in ("output", "down"))
    if role not in ATTENTION_ROLES:
        have: tuple[int, ...] = (kept.intermediate_size,)
        want: tuple[int, ...] = (written.intermediate_size,)
        places: dict[str, Any] = {}
    else:
        grouped = role in ("query", "output")
        have, want = _head_grid(kept, grouped, written.head_dim), _head_grid(written, grouped, written.head_dim)
        places = _spread(kept, role)
    return {**places, "axis": axis, "grid": None if have == want else (have, want)}


def _head_grid(widths: LayerWidths, grouped: bool, head_dim: int) -> tuple[int, ...]:
    """KV heads, query heads of each, dimensions of each."""
    per_group = widths.num_attention_heads // widths.num_key_value_heads if grouped else 1
    return widths.num_key_value_heads, per_group, head_dim


def _spread(kept: LayerWidths, *roles: str) -> dict[str, Any]:
    """Where the dimensions of slim heads go in whole ones, for the weights of an attention block."""
    if not kept.is_slim:
        return {}
    half = kept.head_dim // 2
    pairs = kept.rotary_pairs or tuple(range(half))
    rotary = (*pairs, *(pair + half for pair in pairs))
    values = tuple(range(kept.value_dim or kept.head_dim))
    positions = tuple(rotary if role in _ROTATED else values for role in roles)
    return {"kept": positions, "head_dim": kept.head_dim}
