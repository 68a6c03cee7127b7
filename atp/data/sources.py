"""Sources: where records come from, and how a source becomes splits.

Three sources: JSONL files, the embedded corpus, and the two legal sets of the ATP paper (from the Hugging Face hub or
from local copies). It sits before :mod:`atp.data`: source -> :class:`atp.data.records.Splits`. It knows nothing of
tokens, models or torch, and reaches the network only in :func:`load_legal_hub`, and there only for sets without a local
file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from atp.data.records import (
    CompletionRecord,
    PathLike,
    Record,
    Splits,
    carve,
    kind,
    limit,
    parse_record,
    read_jsonl,
    separate,
    text_of,
)

log = logging.getLogger(__name__)

Paths = PathLike | Sequence[PathLike]
Parse = Callable[[Any, str], Record]

# Completions begin with a space, so that they tokenise as they would in running text.
CASEHOLD_PROMPT = (
    "Excerpt from a court opinion. It cites a case, and <HOLDING> stands where the holding of that case was stated.\n\n"
    "{citing_prompt}\n\nThe holding of the cited case:"
)
BILLSUM_PROMPT = "Text of a bill, to be summarised for the public.\n\n{text}\n\nSummary of the bill:"

_HELD_OUT_SHARE = 0.05
_BAD_ROWS_SHARE = 0.01


def load_jsonl(
    path: Paths,
    *,
    seed: int,
    validation_path: Paths | None = None,
    test_path: Paths | None = None,
    validation_fraction: float = _HELD_OUT_SHARE,
    test_fraction: float = _HELD_OUT_SHARE,
    fields: Mapping[str, str] | None = None,
    max_train: int | None = None,
    max_validation: int | None = None,
    max_test: int | None = None,
    name: str = "jsonl",
) -> Splits:
    """Read splits from JSONL files, and carve off by content what has no file of its own.

    Args:
        path: File or files to train on.
        seed: Which carving (:func:`atp.data.records.carve`) and which subset (:func:`atp.data.records.limit`).
        validation_path: File or files; None carves ``validation_fraction`` off.
        test_path: File or files; None carves ``test_fraction`` off.
        validation_fraction: Share of the distinct contents of ``path``, in (0, 1).
        test_fraction: Share of the distinct contents of ``path``, in (0, 1).
        fields: Record key to column, where columns are named otherwise (:func:`atp.data.records.read_jsonl`).
        max_train: Most records to keep in the split; None keeps all.
        max_validation: As ``max_train``.
        max_test: As ``max_train``.
        name: Name of the data set.

    Returns:
        Splits that share no content.

    Raises:
        ValueError: A bad file, a fraction out of range, or too few distinct records to carve from.
    """
    files = {"train": path, "validation": validation_path, "test": test_path}
    read = {split: _read_files(paths, parse_record, fields) for split, paths in files.items() if paths is not None}
    shares = {"validation": validation_fraction, "test": test_fraction}
    whole = _complete(read, shares, seed=seed, where=str(path), name=name)
    return Splits(
        limit(whole.train, max_train, seed),
        limit(whole.validation, max_validation, seed),
        limit(whole.test, max_test, seed),
        name,
    )


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
        raise ValueError(f"data.domain={domain!r} is not in the embedded corpus; choose one of {embedded.DOMAINS}")

    def read(split: str, count: int | None) -> list[Record]:
        rows = embedded.records(domain, split, count)
        return [parse_record(raw, f"embedded {domain}/{split} record {i}") for i, raw in enumerate(rows)]

    return separate(
        Splits(read("train", train), read("validation", validation), read("test", test), name=f"embedded_{domain}")
    )


def load_legal_hub(
    *,
    seed: int,
    casehold_train: int = 13000,
    billsum_train: int = 2000,
    max_validation: int = 250,
    max_test: int = 200,
    casehold_revision: str = "refs/convert/parquet",
    billsum_revision: str = "main",
    casehold_path: Paths | None = None,
    casehold_test_path: Paths | None = None,
    billsum_path: Paths | None = None,
    billsum_test_path: Paths | None = None,
    cache_dir: str | None = None,
) -> Splits:
    """Return the legal set of ATP: CaseHOLD as choices (task ``casehold``), BillSum as completions (task ``billsum``).

    Sizes follow ATP (arXiv 2412.14426, the authors' code: 13,000 + 2,000 to train on, 200 + 200 to test). Unlike there,
    nothing of the test sets is learnt from. The hub's CaseHOLD is read from its Parquet conversion, because its main
    branch needs a loading script, which ``datasets`` no longer runs. What has no validation or test split of its own
    (BillSum's validation; local files) is carved off the training records.

    Args:
        seed: Which subset and which carving.
        casehold_train: Most CaseHOLD records to train on; 0 leaves CaseHOLD out altogether.
        billsum_train: Most BillSum records to train on; 0 leaves BillSum out altogether.
        max_validation: Most validation records of each.
        max_test: Most test records of each.
        casehold_revision: Branch, tag or commit of ``casehold/casehold`` with a folder ``all`` of Parquet files.
        billsum_revision: Branch, tag or commit of ``FiscalNote/billsum``.
        casehold_path: Local JSONL in place of the hub (citing_prompt, holding_0 to holding_4, label).
        casehold_test_path: Local JSONL to test on, beside ``casehold_path``.
        billsum_path: Local JSONL in place of the hub (text or source; summary).
        billsum_test_path: Local JSONL to test on, beside ``billsum_path``.
        cache_dir: Where ``datasets`` keeps its files; None takes its default.

    Returns:
        Splits that share no content, named ``legal``.

    Raises:
        ValueError: A set cannot be fetched, a row lacks the expected columns, or both sets are left out.
    """
    if casehold_train == 0 and billsum_train == 0:
        raise ValueError("data.casehold_train and data.billsum_train are both 0: nothing is left to train on")
    legal = Splits([], [], [], name="legal")
    sources = (
        ("casehold/casehold", "all", casehold_revision, casehold_path, casehold_test_path, _casehold, casehold_train),
        ("FiscalNote/billsum", None, billsum_revision, billsum_path, billsum_test_path, _billsum, billsum_train),
    )
    for repo, folder, revision, path, test_path, parse, size in sources:
        if size == 0:
            continue
        if path is None:
            read = _read_hub(repo, folder, revision, cache_dir, parse)
        else:
            local = {"train": path, "test": test_path}
            read = {split: _read_files(paths, parse) for split, paths in local.items() if paths is not None}
        shares = {"validation": _HELD_OUT_SHARE, "test": _HELD_OUT_SHARE}
        part = _complete(read, shares, seed=seed, where=str(path or repo), name=repo)
        legal.train.extend(limit(part.train, size, seed))
        legal.validation.extend(limit(part.validation, max_validation, seed))
        legal.test.extend(limit(part.test, max_test, seed))
    return legal


def _complete(
    read: Mapping[str, list[Record]], shares: Mapping[str, float], *, seed: int, where: str, name: str
) -> Splits:
    """Carve the splits that are not among ``read`` off its training records, and make all of them disjoint."""
    missing = {split: share for split, share in shares.items() if split not in read}
    train, carved = carve(read["train"], missing, seed=seed, where=where)
    parts = {**read, **carved}
    return separate(Splits(train, parts["validation"], parts["test"], name))


def _read_files(paths: Paths, parse: Parse, fields: Mapping[str, str] | None = None) -> list[Record]:
    files = [paths] if isinstance(paths, str) or not isinstance(paths, Sequence) else list(paths)
    if not files:
        raise ValueError("data.path is an empty list; name at least one JSONL file")
    return [record for file in files for record in read_jsonl(file, fields=fields, parse=parse)]


def _read_hub(
    repo: str, folder: str | None, revision: str, cache_dir: str | None, parse: Parse
) -> dict[str, list[Record]]:
    try:
        from datasets import load_dataset

        found = load_dataset(repo, data_dir=folder, revision=revision, cache_dir=cache_dir)
        rows = {split: list(found[split]) for split in ("train", "validation", "test") if split in found}
    # Whatever the client raises (offline, gated, gone, moved, a script, a broken cache), the way out is the same.
    except Exception as error:
        raise ValueError(
            f"cannot fetch {repo} (revision {revision}) from the Hugging Face hub: {type(error).__name__}: {error}. "
            "If it should be reachable, go online or log in; otherwise use your own file with data=jsonl "
            "data.path=<file>, local copies with data.casehold_path and data.billsum_path, or data=embedded_legal, "
            "which needs no network"
        ) from error
    if "train" not in rows:
        raise ValueError(f"{repo} (revision {revision}) has the splits {sorted(found)} but none named train")
    return {split: _usable(some, parse, f"{repo}/{split}") for split, some in rows.items()}


def _usable(rows: Sequence[Any], parse: Parse, where: str) -> list[Record]:
    """Parse rows that the user cannot mend: leave a few bad ones out, and say so; raise the first error on many."""
    records: list[Record] = []
    errors: list[ValueError] = []
    for i, row in enumerate(rows):
        try:
            records.append(parse(row, f"{where} row {i}"))
        except ValueError as error:
            errors.append(error)
    if errors:
        if len(errors) > _BAD_ROWS_SHARE * len(rows):
            raise errors[0]
        log.warning("%s: left out %d of %d rows; the first: %s", where, len(errors), len(rows), errors[0])
    return records


def _columns(row: Any, needed: Sequence[str], where: str) -> None:
    if not isinstance(row, Mapping) or not set(needed) <= row.keys():
        found = sorted(map(str, row)) if isinstance(row, Mapping) else kind(row)
        raise ValueError(f"{where}: needs the columns {list(needed)}, got {found}")


def _casehold(row: Any, where: str) -> Record:
    """Make a row of CaseHOLD (Zheng et al. 2021, arXiv 2104.08671) a record; its label may be written as a string."""
    _columns(row, ["citing_prompt", *(f"holding_{i}" for i in range(5)), "label"], where)
    label = row["label"]
    raw = {
        "prompt": CASEHOLD_PROMPT.format(citing_prompt=text_of(row, "citing_prompt", where).strip()),
        "choices": [" " + text_of(row, f"holding_{i}", where).strip() for i in range(5)],
        "label": int(label) if isinstance(label, str) and label.isdecimal() else label,
        "task": "casehold",
    }
    return parse_record(raw, where)


def _billsum(row: Any, where: str) -> Record:
    """Make a row of BillSum (Kornilova and Eidelman 2019, arXiv 1910.00523) a record; the bill is text or source."""
    bill = "source" if isinstance(row, Mapping) and "text" not in row else "text"
    _columns(row, [bill, "summary"], where)
    prompt = BILLSUM_PROMPT.format(text=text_of(row, bill, where).strip())
    return CompletionRecord(prompt, " " + text_of(row, "summary", where).strip(), task="billsum")
