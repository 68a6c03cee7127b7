"""Sources: where records come from, and how a source becomes splits.

The user's own files and the embedded corpus; tasks are in :mod:`atp.data.domains`. It sits before :mod:`atp.data`:
source -> :class:`atp.data.records.Splits`. It knows nothing of tokens, models, torch or the network.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atp.data.reading.bad_rows import BadRows, OnBad, bad_rows_of, refuse
from atp.data.reading.files import parsed, paths_of
from atp.data.reading.folders import find_files
from atp.data.records import PathLike, Record, Splits, carve, parse_record, separate
from atp.data.records.columns import RowParser
from atp.data.records.overlap import check_overlap
from atp.data.streaming import StreamedRecords, stream_splits
from atp.errors import UserError

log = logging.getLogger(__name__)

Paths = PathLike | Sequence[PathLike]

HELD_OUT_SHARE = 0.05


def load_files(
    path: Paths,
    *,
    seed: int,
    validation_path: Paths | None = None,
    test_path: Paths | None = None,
    validation_fraction: float = HELD_OUT_SHARE,
    test_fraction: float = HELD_OUT_SHARE,
    fields: Mapping[str, Any] | None = None,
    shape: str = "auto",
    form: str | None = None,
    on_error: str = "raise",
    near_duplicates: str = "drop",
    stream: bool = False,
    check: Callable[[Record], None] | None = None,
    name: str = "files",
) -> Splits:
    """Read splits from the user's files, and carve off by content what has no file of its own.

    Args:
        path: File, folder or several of them: JSONL, JSON, CSV, TSV, Parquet, Arrow, text or Markdown. Of a folder the
            splits that it names are used (:func:`atp.data.reading.folders.find_files`).
        seed: Which carving (:func:`atp.data.records.carve`).
        validation_path: As ``path``; None takes the folder's validation split or carves ``validation_fraction`` off.
        test_path: As ``path``; None takes the folder's test split or carves ``test_fraction`` off.
        validation_fraction: Share of the distinct contents of ``path``, in (0, 1).
        test_fraction: Share of the distinct contents of ``path``, in (0, 1).
        fields: Record key to column or Jinja template (:class:`atp.data.records.columns.RowParser`).
        shape: What columns mean (:data:`atp.data.records.shapes.SHAPE_NAMES`); ``auto`` recognises it.
        form: Format of the files in place of their suffixes (:data:`atp.data.reading.files.FORMATS`).
        on_error: ``raise`` at the first bad row, or ``skip`` bad rows, which the splits then list.
        near_duplicates: ``drop``, ``report`` or ``ignore`` (:func:`atp.data.records.overlap.check_overlap`).
        stream: Read training records anew at every pass instead of holding them in memory.
        check: Raises UserError for a record that the model cannot take, which makes its row a bad one.
        name: Name of the data set.

    Returns:
        Splits that share no content.

    Raises:
        ValueError: A bad file, a fraction out of range, or too few distinct records to carve from.
    """
    bad = bad_rows_of(on_error)
    files, notes = _files({"train": path, "validation": validation_path, "test": test_path}, form)
    for note in notes:
        log.info("data: %s", note)
    parse = RowParser(fields, shape, check)
    how = _How(parse, bad, form)
    shares = {"validation": validation_fraction, "test": test_fraction}
    if stream:
        held_out = {split: how.read(some) for split, some in files.items() if split != "train"}
        records = StreamedRecords(files["train"], parse, bad=bad, form=form)
        splits = stream_splits(records, held_out, shares, seed=seed, near_duplicates=near_duplicates, name=name)
    else:
        read = {split: how.read(some) for split, some in files.items()}
        splits = complete(read, shares, seed=seed, where=str(path), name=name)
        if not splits.train:
            raise UserError(
                f"{path}: all {len(read['train'])} training records also stand in a later split; give other files as "
                "data.validation_path and data.test_path"
            )
        splits = check_overlap(splits, near_duplicates)
    for told in parse.told():
        log.info("data: %s", told)
    skipped = bad.reasons if isinstance(bad, BadRows) else {}
    if skipped:
        log.warning("%s: %s", name, bad)
    return replace(splits, notes=(*notes, *parse.told()), skipped=skipped)


def _files(given: Mapping[str, Paths | None], form: str | None) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of each split that has any, and what is to be said of them."""
    found = find_files(paths_of(given["train"] or []), form)
    files = found.by_split
    if "train" not in files:
        raise UserError(
            f"data.path={given['train']} names only files of {' and '.join(files)}; name those to train on: "
            "data.path=<file>"
        )
    notes = list(found.notes)
    for split in ("validation", "test"):
        paths = given[split]
        if paths is None:
            continue
        own = find_files(paths_of(paths, f"data.{split}_path"), form)
        chosen = own.by_split.get(split) or (None if own.named else own.by_split.get("train"))
        if chosen is None:
            raise UserError(f"data.{split}_path={paths} names no {split} files, only {', '.join(own.by_split)}")
        if split in files:
            notes.append(f"data.{split}_path={paths} is used in place of the {split} split of data.path")
        files[split] = chosen
        notes += own.notes
    return files, notes


@dataclass(frozen=True)
class _How:
    """How files are read."""

    parse: Callable[[Any, str], Record]
    bad: OnBad = refuse
    form: str | None = None

    def read(self, files: Sequence[Path], most: int | None = None) -> list[Record]:
        found = list(itertools.islice(parsed(files, self.parse, self.bad, self.form), most))
        if not found:
            first = f" ({self.bad})" if isinstance(self.bad, BadRows) and len(self.bad) else ""
            raise UserError(
                f"{', '.join(map(str, files))} holds no records{first}; see docs/how-to/own-data.md for the shapes of "
                "a record"
            )
        return found


def read_records(path: Paths, *, fields: Mapping[str, Any] | None = None, most: int | None = None) -> list[Record]:
    """Read the records of files in order, at most ``most``; of a folder that names splits, those of its test split.

    Raises:
        ValueError: What is wrong, with ``file:line``.
    """
    found = find_files(paths_of(path))
    split = next(split for split in ("test", "validation", "train") if split in found.by_split)
    for note in found.notes:
        log.info("data: %s", note)
    return _How(RowParser(fields)).read(found.by_split[split] if found.named else found.by_split["train"], most)


def load_embedded(
    domain: str, *, train: int | None = None, validation: int | None = None, test: int | None = None
) -> Splits:
    """Return the splits of a domain of the embedded corpus.

    Args:
        domain: One of ``atp.embedded.DOMAINS``.
        train: Records of the split; None takes the corpus' own number.
        validation: As ``train``.
        test: As ``train``.

    Returns:
        Splits that share no content, named ``embedded_<domain>``.

    Raises:
        ValueError: The domain is unknown.
    """
    from atp import embedded

    if domain not in embedded.DOMAINS:
        raise UserError(f"data.domain={domain!r} is not in the embedded corpus; choose one of {embedded.DOMAINS}")

    def read(split: str, count: int | None) -> list[Record]:
        raw_records = embedded.records(domain, split, count)
        return [parse_record(raw, f"embedded {domain}/{split} record {i}") for i, raw in enumerate(raw_records)]

    return separate(
        Splits(read("train", train), read("validation", validation), read("test", test), name=f"embedded_{domain}")
    )


def complete(
    read: Mapping[str, list[Record]], shares: Mapping[str, float], *, seed: int, where: str, name: str
) -> Splits:
    """Return splits of what was read by split.

    What is not among ``read`` is carved off its training records, and all splits are made disjoint.
    """
    if "train" not in read:
        log.info("%s: there are no training records, only %s", where, ", ".join(read))
        return separate(Splits([], read.get("validation", []), read.get("test", []), name))
    missing = {split: share for split, share in shares.items() if split not in read}
    train, carved = carve(read["train"], missing, seed=seed, where=where) if missing else (read["train"], {})
    parts = {**read, **carved}
    return separate(Splits(train, parts["validation"], parts["test"], name))
