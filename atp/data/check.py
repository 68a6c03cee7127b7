"""The check: what a model would see of a data set, before any training.

Counts, lengths, what is cut, duplicates, overlap, every bad row with its place, and a few records as they will be
learnt, given tokens dim and learnt ones in colour. It sits at the end of the data path, beside :mod:`atp.data.batches`.
It knows nothing of models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atp.data.encoding import IGNORED, Encoder, Example
from atp.data.reading.bad_rows import BadRows
from atp.data.reading.files import parsed
from atp.data.records import Record, Splits
from atp.data.records.overlap import duplicates
from atp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BINS = 10
MOST_FAULTS = 20
_BAR = 40
_SHOWN_TOKENS = 160
_MARKS = (">>>", "<<<")
_LEGEND = "given tokens are dim, learnt ones underlined in green"


@dataclass(frozen=True)
class Faults:
    """What is wrong with files.

    Attributes:
        lines: Each fault with the first place that has it, and how many more there are.
        count: How many rows or files are bad.
        good: How many rows are good.
    """

    lines: list[str]
    count: int
    good: int


def faults(files: Iterable[Path], parse: Callable[[Any, str], Record], form: str | None = None) -> Faults:
    """Return what is wrong with the rows of files; a file that cannot be read on ends with its fault."""
    bad = BadRows()
    broken: list[str] = []
    good = 0
    for file in files:
        try:
            good += sum(1 for _ in parsed([file], parse, bad, form))
        except UserError as error:
            broken.append(str(error))
    places: dict[str, list[str]] = {}
    for where, reason in bad.reasons.items():
        places.setdefault(reason, []).append(where)
    lines = [
        f"{some[0]}: {reason}" + (f" (and {len(some) - 1} more rows like it)" if len(some) > 1 else "")
        for reason, some in places.items()
    ]
    return Faults(lines + broken, len(bad) + len(broken), good)


def report(
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss_on: str = "auto",
    examples: int = 5,
    console: Console | None = None,
) -> dict[str, Any]:
    """Print what a model would see of the data.

    Args:
        splits: The data, with prompts around their records as training has them.
        tokenizer: The model's tokenizer.
        max_length: Most tokens of a sequence.
        loss_on: ``auto``, ``completion`` or ``all``.
        examples: How many training records to show.
        console: Where to print; None takes the standard output.

    Returns:
        The figures: ``records``, ``tasks``, ``tokens``, ``loss_tokens``, ``lengths`` (tokens of each training example),
        ``truncated``, ``duplicates``, ``overlap``, and ``control``: records that hold a control token's name.

    Raises:
        ValueError: No answer fits into a sequence; everything else is printed before.
    """
    console = console or Console()
    for note in splits.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    train = list(splits.train)
    if not train:
        raise UserError(f"{splits.name}: no training record is left; give more records, or another data.path")
    encoder = Encoder(tokenizer, max_length)
    encoded = encoder.encode(train, loss_on)
    lengths = [len(example.input_ids) for found in encoded for example in found]
    figures = {
        "records": splits.counts(),
        "tasks": dict(Counter(record.task for record in train)),
        "tokens": sum(lengths),
        "loss_tokens": sum(example.loss_tokens for found in encoded for example in found),
        "lengths": lengths,
        "truncated": dict(encoder.truncated),
        "duplicates": {name: duplicates(getattr(splits, name)) for name in ("train", "validation", "test")},
        "overlap": splits.overlap,
        "control": sum(map(encoder.names_control_tokens, train)),
    }
    console.print(_counts(splits.name, figures, max_length))
    console.print(histogram(lengths, max_length))
    _show(console, _spread(list(zip(train, encoded, strict=True)), examples), tokenizer)
    encoder.check_answers(splits.name)
    for split in ("validation", "test"):
        if not getattr(splits, split):
            raise UserError(f"{splits.name}: no {split} record is left; give more records, or data.{split}_path")
    return figures


def _show(console: Console, found: Sequence[tuple[Record, list[Example]]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print records as the model sees them; where there are no colours, with marks around what is learnt."""
    plain = console.color_system is None
    for number, (record, some) in enumerate(found, start=1):
        console.print(Text(f"\nexample {number} of the task {record.task}", style="bold"))
        console.print(coloured(some[0], tokenizer, marked=plain), soft_wrap=True)
    legend = f"learnt tokens stand between {_MARKS[0]} and {_MARKS[1]}" if plain else _LEGEND
    console.print(Text(f"\n{legend}", style="italic"))


def histogram(lengths: Sequence[int], max_length: int) -> Table:
    """Return the lengths of sequences as bars."""
    counts, edges = np.histogram(lengths, bins=BINS, range=(0, max_length))
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("tokens", justify="right")
    table.add_column("sequences", justify="right")
    table.add_column("")
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        table.add_row(f"{low:.0f} to {high:.0f}", f"{count:,}", "#" * round(_BAR * count / max(1, counts.max())))
    return table


def coloured(example: Example, tokenizer: PreTrainedTokenizerBase, *, marked: bool = False) -> Text:
    """Return the text of a sequence with its loss mask as colour; a long part of it loses its middle.

    Args:
        example: The sequence.
        tokenizer: Its tokenizer.
        marked: Put marks around what is learnt, for where there are no colours.
    """
    ids = example.input_ids.tolist()
    learnt = (example.labels != IGNORED).tolist()
    learnt[0] = False
    parts = [
        (mark, [token for token, _ in group]) for mark, group in groupby(zip(ids, learnt, strict=True), _is_learnt)
    ]
    cut = max(0, len(ids) - _SHOWN_TOKENS)
    keep = max(2, _SHOWN_TOKENS // max(2, len(parts)))
    text = Text()
    for mark, part in parts:
        style = "green underline" if mark else "dim"
        if mark and marked:
            text.append(_MARKS[0])
        if cut and len(part) > 2 * keep:
            text.append(str(tokenizer.decode(part[:keep])), style)
            text.append(f" ... {len(part) - 2 * keep} tokens ... ", "italic")
            text.append(str(tokenizer.decode(part[-keep:])), style)
        else:
            text.append(str(tokenizer.decode(part)), style)
        if mark and marked:
            text.append(_MARKS[1])
    return text


def _is_learnt(token: tuple[int, bool]) -> bool:
    return token[1]


def _counts(name: str, figures: Mapping[str, Any], max_length: int) -> Table:
    truncated, overlap = figures["truncated"], figures["overlap"]
    table = Table(title=Text(f"{name}, as a model would see it"), box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    table.add_column("", justify="right")
    facts = {
        **{f"{split} records": f"{count:,}" for split, count in figures["records"].items()},
        **{f"training records of {task}": f"{count:,}" for task, count in figures["tasks"].items()},
        "training tokens": f"{figures['tokens']:,}",
        "of them learnt": f"{figures['loss_tokens']:,}",
        f"prompts cut to {max_length} tokens": f"{truncated['prompts']:,}",
        "completions cut": f"{truncated['completions']:,}",
        "texts cut into windows": f"{truncated['texts']:,}",
        **({"conversations in several sequences": f"{truncated['chats']:,}"} if truncated["chats"] else {}),
        **(
            {"records with a control token's name, read as text": f"{figures['control']:,}"}
            if figures["control"]
            else {}
        ),
        **{f"repeated within {split}": f"{count:,}" for split, count in figures["duplicates"].items()},
        **{f"dropped from {split}, in a later split": str(n) for split, n in overlap.get("exact_dropped", {}).items()},
        **{f"near duplicates, {pair.replace('_', ' and ')}": str(n) for pair, n in overlap.get("near", {}).items()},
    }
    for key, value in facts.items():
        table.add_row(key, value)
    return table


def _spread(found: Sequence[Any], count: int) -> list[Any]:
    return list(found) if len(found) <= count else [found[i * len(found) // count] for i in range(count)]
