"""The weights of a GGUF file under transformers' names, de-quantised one tensor at a time.

After the config. Every tensor of the model must be in the file and every tensor of the file in the model; rows of
queries and keys come back from llama.cpp's order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from atp.errors import UserError
from atp.model.families import family_of
from atp.model.gguf.names import EMBEDDINGS, FINAL_NORM, HEAD, LINEARS, NEIGHBOURS, ROTARY_FACTORS, norm_name
from atp.model.gguf.reading import GgufFile
from atp.model.widths import build_model

_LISTED = 4


@dataclass(frozen=True)
class Source:
    """Where a tensor of the model is in the file.

    Attributes:
        name: Its name there.
        heads: Heads whose rows come back from neighbours to halves; 0 leaves the rows as they are.
    """

    name: str
    heads: int = 0


def sources(config: PreTrainedConfig, architecture: str) -> dict[str, Source]:
    """Where every tensor of a model is in a file of an architecture, by transformers' name."""
    family = family_of(config)
    embeddings, final_norm, head = family.embedding_tensors
    found = {embeddings: Source(EMBEDDINGS), final_norm: Source(FINAL_NORM)}
    if not config.tie_word_embeddings:
        found[head] = Source(HEAD)
    permuted = {}
    if architecture in NEIGHBOURS and family.rotary == "halves":
        permuted = {"query": config.num_attention_heads, "key": config.num_key_value_heads}
    for index in range(config.num_hidden_layers):
        layer, block = f"{family.layers}.{index}", f"blk.{index}"
        for role, module in family.linears.items():
            for kind in ("weight", "bias") if family.has_bias(config, role) else ("weight",):
                source = Source(f"{block}.{LINEARS[role]}.{kind}", permuted.get(role, 0))
                found[f"{layer}.{module}.{kind}"] = source
        for norm in family.norms:
            found[f"{layer}.{norm.module}.weight"] = Source(f"{block}.{norm_name(norm)}.weight")
    return found


def check_tensors(file: GgufFile, config: PreTrainedConfig, architecture: str) -> dict[str, Source]:
    """As :func:`sources`, every tensor there with the shape that the config gives it.

    Raises:
        ValueError: Tensors are missing, of another shape, or left over.
    """
    found = sources(config, architecture)
    state = build_model(config, dtype=torch.float32, device="meta").state_dict()
    shapes = {source.name: tuple(state[name].shape) for name, source in found.items()}
    kinds = {
        "missing": sorted(shapes.keys() - file.shapes.keys()),
        "left over": sorted(file.shapes.keys() - shapes.keys() - {ROTARY_FACTORS}),
        "misshapen": [
            f"{name} is {list(file.shapes[name])}, not {list(shape)}"
            for name, shape in shapes.items()
            if name in file.shapes and file.shapes[name] != shape
        ],
    }
    faults = [
        f"{kind}: {', '.join(names[:_LISTED])}{f' and {len(names) - _LISTED} more' * (len(names) > _LISTED)}"
        for kind, names in kinds.items()
        if names
    ]
    if faults:
        raise UserError(f"the tensors in {file.path} do not fit its metadata: {'; '.join(faults)}")
    return found


def read_tensors(file: GgufFile, found: dict[str, Source]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors by transformers' names, float32, one at a time."""
    for name, source in found.items():
        values = torch.from_numpy(file.tensor(source.name))
        yield name, _neighbours_to_halves(values, source.heads) if source.heads else values


def _neighbours_to_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders the rows of each head so that dimensions that rotate together are i and i + d/2."""
    paired = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return paired.transpose(1, 2).reshape(rows.shape)
