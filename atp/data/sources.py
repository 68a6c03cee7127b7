"""Sources: where records come from, and how a source becomes splits.

The user's own files and the embedded corpus; tasks are in :mod:`atp.data.domains`. It sits before :mod:`atp.data`:
source -> :class:`atp.data.records.Splits`. It knows nothing of tokens, models, torch or the network.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from atp.data.reading.files import paths_of, rows
from atp.data.records import PathLike, Record, Splits, carve, parse_record, separate
from atp.data.records.columns import record_parser
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
    near_duplicates: str = "drop",
    stream: bool = False,
    name: str = "files",
) -> Splits:
    """Read splits from the user's files, and carve off by content what has no file of its own.

    Args:
        path: File, folder or several of them to train on: JSONL, JSON, CSV, TSV, Parquet, text or Markdown.
        seed: Which carving (:func:`atp.data.records.carve`).
        validation_path: As ``path``; None carves ``validation_fraction`` off.
        test_path: As ``path``; None carves ``test_fraction`` off.
        validation_fraction: Share of the distinct contents of ``path``, in (0, 1).
        test_fraction: Share of the distinct contents of ``path``, in (0, 1).
        fields: Record key to column or Jinja template (:func:`atp.data.records.columns.record_parser`).
        near_duplicates: ``drop``, ``report`` or ``ignore`` (:func:`atp.data.records.overlap.check_overlap`).
        stream: Read training records anew at every pass instead of holding them in memory.
        name: Name of the data set.

    Returns:
        Splits that share no content.

    Raises:
        ValueError: A bad file, a fraction out of range, or too few distinct records to carve from.
    """
    parse = record_parser(fields)
    shares = {"validation": validation_fraction, "test": test_fraction}
    files = _files({"train": path, "validation": validation_path, "test": test_path})
    if stream:
        held_out = {split: _read(some, parse) for split, some in files.items() if split != "train"}
        records = StreamedRecords(files["train"], parse)
        return stream_splits(records, held_out, shares, seed=seed, near_duplicates=near_duplicates, name=name)
    read = {split: _read(some, parse) for split, some in files.items()}
    return check_overlap(complete(read, shares, seed=seed, where=str(path), name=name), near_duplicates)


def _files(given: Mapping[str, Paths | None]) -> dict[str, list[Path]]:
    """The files of each split that has any."""
    return {
        split: paths_of(paths, "data.path" if split == "train" else f"data.{split}_path")
        for split, paths in given.items()
        if paths is not None
    }


def read_records(path: Paths, *, fields: Mapping[str, Any] | None = None, most: int | None = None) -> list[Record]:
    """Read the records of files in file order, at most ``most``; ValueError names what is wrong with ``file:line``."""
    return _read(paths_of(path), record_parser(fields), most)


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


def _read(files: Iterable[Path], parse: Any, most: int | None = None) -> list[Record]:
    found = [parse(row, where) for file in files for row, where in itertools.islice(rows(file), most)]
    if not found:
        raise UserError(f"{', '.join(map(str, files))} holds no records; see the README for the shapes of a record")
    return found[:most]
