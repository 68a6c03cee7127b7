"""Tasks from the Hugging Face hub: rows of a task's set -> records by split.

Under :mod:`atp.data.domains`. The only part of the package that reaches the network for data, and only for tasks that
the user named without local files. It knows nothing of files, weights or tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atp.data.reading.files import Row
from atp.data.records import Record, TextRecord
from atp.data.tasks import Task
from atp.errors import UserError

log = logging.getLogger(__name__)

SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "heldout"),
}
"""Our splits -> what files and sets call them."""
_BAD_ROWS_SHARE = 0.01


def read_hub(task: Task) -> dict[str, list[Record]]:
    """Fetch a task from the hub, which the user asked for by naming it without local files.

    Raises:
        ValueError: The hub cannot be reached or refuses, or the set holds none of the splits.
    """
    where = f"{task.hub}{f' ({task.subset})' if task.subset else ''}, revision {task.revision}"
    given = set(task.splits.values())  # what one split takes is not taken once more by the split of that name
    wanted = {
        split: task.splits.get(split, split) for split in SPLIT_NAMES if split in task.splits or split not in given
    }
    try:
        found = _fetch(task)
        raw = {split: list(found[theirs]) for split, theirs in wanted.items() if theirs in found}
    # Whatever the client raises (offline, gated, gone, moved, a script, a broken cache), the way out is the same.
    except Exception as error:
        gated = "gated" in f"{type(error).__name__} {error}".lower()
        hint = (
            f"It is gated: accept its terms at https://huggingface.co/datasets/{task.hub} and log in with "
            "`hf auth login`"
            if gated
            else "If it should be reachable, go online or log in"
        )
        raise UserError(
            f"cannot fetch {where} from the Hugging Face hub: {type(error).__name__}: {error}. {hint}; otherwise use "
            f"local copies of the same columns with data.path=<folder or file>, your own file with data=files "
            "data.path=<file>, or data=embedded_legal, which needs no network"
        ) from error
    if not raw:
        raise UserError(f"{where} has the splits {sorted(found)} but none of {sorted(wanted.values())}")
    placed = {
        split: filled(task, [(row, f"{task.hub}/{split} row {i}") for i, row in enumerate(some)])
        for split, some in raw.items()
    }
    bound = task.with_options_of(row for some in placed.values() for row, _ in some)
    return {split: joined(bound, _usable(bound, some)) for split, some in placed.items()}


def _fetch(task: Task) -> Any:
    """The task's set as ``datasets`` gives it, by the set's own split names (ours for files that the task lists)."""
    from datasets import load_dataset

    if not task.hub_files:
        part = {"data_dir": task.subset} if task.revision.startswith("refs/convert") else {"name": task.subset}
        return load_dataset(task.hub, revision=task.revision, **part)
    folder = f"hf://datasets/{task.hub}@{task.revision}"
    files = {split: f"{folder}/{some.format(subset=task.subset)}" for split, some in task.hub_files.items()}
    suffixes = Path(next(iter(files.values()))).suffixes
    if ".jsonl" in suffixes:
        return load_dataset("json", data_files=files)
    if ".parquet" in suffixes:
        return load_dataset("parquet", data_files=files)
    # "None" and "N/A" are answers, not missing values.
    return load_dataset("csv", data_files=files, sep="\t" if ".tsv" in suffixes else ",", keep_default_na=False)


def _usable(task: Task, found: Sequence[Row]) -> list[Record]:
    """Parse rows that the user cannot mend: leave a few bad ones out, and say so; raise the first error on many."""
    records: list[Record] = []
    errors: list[ValueError] = []
    for row, where in found:
        if task.concatenate and isinstance(row, Mapping) and not str(row.get("text", "")).strip():
            continue
        try:
            records.append(task.record(row, where))
        except ValueError as error:
            errors.append(error)
    if errors:
        if len(errors) > _BAD_ROWS_SHARE * len(found):
            raise errors[0]
        log.warning("%s: left out %d of %d rows; the first: %s", task.name, len(errors), len(found), errors[0])
    return records


def filled(task: Task, found: Sequence[Row]) -> list[Row]:
    """The rows without those that the task skips."""
    kept = [(row, where) for row, where in found if not task.skips(row)]
    if len(kept) < len(found):
        empty = " or ".join(task.skip_empty)
        log.info("%s: left out %d of %d rows without %s", task.name, len(found) - len(kept), len(found), empty)
    return kept


def joined(task: Task, records: list[Record]) -> list[Record]:
    """The records, as one running text where the task says so."""
    if not task.concatenate:
        return records
    text = "\n\n".join(record.text.strip("\n") for record in records if isinstance(record, TextRecord))
    return [TextRecord(text, task.name)]
