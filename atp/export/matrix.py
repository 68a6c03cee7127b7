"""What every family can lose, and what a model that lost it can be exported as: ``docs/how-to/families.md``.

Beside the formats, whose own checks fill the cells. ``python -m atp.export.matrix > docs/how-to/families.md`` writes
the page anew, and a test compares the two. It reads the table of families and default configs; it loads no weights.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import AutoConfig, PreTrainedConfig

from atp.errors import UserError
from atp.export.gguf.layout import PER_LAYER, check_layout
from atp.export.onnx_graph import check_graph
from atp.model.families import FAMILIES, KNOWN_OTHERS, Family
from atp.space.units import KINDS

INSIDE_HEADS = ("qk_pairs", "value_dims")
"""Kinds of which no stock class can be without some."""
COLUMNS = ("prune", "hf", "adapter", "gguf", "gguf_per_layer", "onnx")
_HEADINGS = {
    "prune": "masks and removal",
    "hf": "Hugging Face",
    "adapter": "adapter",
    "gguf": "GGUF, equal widths",
    "gguf_per_layer": "GGUF, widths per layer",
    "onnx": "ONNX",
}
_INTRODUCTION = """# Families: what they can lose, and what that can be exported as

Written by `python -m atp.export.matrix` from the table in `atp/model/families.py`; every cell is backed by a test. A
run asks for the kinds in `prune.space` and for the exports in `export`; what is refused here is refused before it
trains. A published model may be refused for more, such as an unusual activation or rotary scaling; the message says
which. `exact`: masked, removed and reloaded model give the same logits to float32 rounding.

- **stock**: opens in transformers' own class, without a flag, where all layers have equal widths
  (`prune.shape=uniform`); else through `modeling_atp.py` beside the weights.
- **modeling file**: always through `modeling_atp.py`.
- the name of an architecture of llama.cpp; **zeros**: removed units are zeros in the file, which is no smaller.
"""


@dataclass(frozen=True)
class Cell:
    """One cell: what a family without some units of a kind is in one column.

    Attributes:
        works: Whether it can be had.
        text: How, or why not.
    """

    works: bool
    text: str


def cell(family: Family, kind: str, column: str) -> Cell:
    """What the table and the formats' own checks say of a family that loses units of a kind.

    Args:
        family: Its row.
        kind: One of :data:`atp.space.units.KINDS`.
        column: One of :data:`COLUMNS`.
    """
    if kind in family.refused:
        return Cell(False, family.refused[kind])
    config = AutoConfig.for_model(family.model_type)
    try:
        return Cell(True, _how(family, config, kind, column))
    except UserError as error:
        return Cell(False, str(error).removeprefix("GGUF: ").split("; ")[0])


def _how(family: Family, config: PreTrainedConfig, kind: str, column: str) -> str:
    if column in ("gguf", "gguf_per_layer"):
        config.tie_word_embeddings = True
        uniform = column == "gguf"
        architecture = check_layout(config, uniform=uniform, axes=[kind])
        zeros = kind in INSIDE_HEADS or (not uniform and architecture not in PER_LAYER and kind != "hidden")
        return f"`{architecture}`{', zeros' * zeros}"
    if column == "onnx":
        check_graph(config)
        return "yes"
    if column == "hf":
        return "modeling file" if kind in INSIDE_HEADS else "stock"
    return "exact" if column == "prune" else "yes"


def page() -> str:
    """The page, in Markdown."""
    sections = (line for family in FAMILIES.values() for line in _section(family))
    others = (f"- `{name}`: {reason}." for name, reason in KNOWN_OTHERS.items())
    return "\n".join([_INTRODUCTION, *sections, "## Asked for, and in no row\n", *others]) + "\n"


def _section(family: Family) -> Iterator[str]:
    """Heading, table and reasons of one family."""
    yield f"## `{family.model_type}`\n"
    yield f"| units | {' | '.join(_HEADINGS[column] for column in COLUMNS)} |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    reasons: list[str] = []
    for kind in KINDS:
        shown = []
        for column in COLUMNS:
            found = cell(family, kind, column)
            if not found.works and found.text not in reasons:
                reasons.append(found.text)
            shown.append(found.text if found.works else f"refused ({reasons.index(found.text) + 1})")
        yield f"| `{kind}` | {' | '.join(shown)} |"
    yield ""
    yield from (f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    notes = list(_notes(family))
    yield from (f"- {note}" for note in notes)
    if reasons or notes:
        yield ""


def _notes(family: Family) -> Iterator[str]:
    """What holds for the family as a whole."""
    if any(stock.heads_divide_hidden for stock in family.stock) and len(family.stock) == 1:
        yield "The stock class takes only head counts that divide the hidden size; others go through the modeling file."
    if any(norm.across_heads for norm in family.norms):
        yield "Heads leave memory at the end of training, not before: a norm goes over all of them."
    if family.score_cap:
        yield "Attention runs in the kernel `eager`, as `sdpa` caps no scores; `data.packing` is refused."
    yield from family.remarks
    if not family.gguf_base:
        yield "As a base: Hugging Face directories; GGUF files of this family are not read."


if __name__ == "__main__":
    sys.stdout.write(page())
