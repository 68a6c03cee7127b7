"""Domains: tasks read from local files or the hub, and combined to one data set by weight.

It sits beside :mod:`atp.data.sources`: task and files or hub -> records -> :class:`atp.data.records.Splits`. Knows
nothing of tokens, models or torch.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from atp.data.hub import SPLIT_NAMES, filled, joined, read_hub
from atp.data.licences import holds_licences, licence_rows
from atp.data.reading.bad_rows import BadRows, OnBad, bad_rows_of, refuse
from atp.data.reading.files import made, paths_of, rows
from atp.data.reading.folders import find_files, visible_files
from atp.data.records import PathLike, Record, Splits, limit
from atp.data.records.overlap import check_overlap
from atp.data.sources import HELD_OUT_SHARE, complete, load_embedded
from atp.data.tasks import Task, find_task, load_tasks, nearest
from atp.errors import UserError

log = logging.getLogger(__name__)


def load_domain(
    weights: Mapping[str, float | None],
    *,
    seed: int,
    path: Any = None,
    tasks_file: PathLike | None = None,
    validation_fraction: float = HELD_OUT_SHARE,
    test_fraction: float = HELD_OUT_SHARE,
    max_train: int | None = None,
    max_validation: int | None = None,
    max_test: int | None = None,
    near_duplicates: str = "drop",
    on_error: str = "raise",
    name: str = "tasks",
) -> Splits:
    """Combine tasks to one data set.

    Args:
        weights: Task to its share of the training records, on any scale; None or 0 for all, which then goes for all.
        seed: Which subset and which carving.
        path: Local files in place of the hub (:func:`task_files`); None takes the hub for all.
        tasks_file: TOML file with tasks of the user's own.
        validation_fraction: Share carved off the training records where a task has no validation records.
        test_fraction: As ``validation_fraction``.
        max_train: Most training records, in the proportion of the weights; None for as many as the weights allow.
        max_validation: Most validation records, equally many of each task.
        max_test: As ``max_validation``.
        near_duplicates: ``drop``, ``report`` or ``ignore`` (:func:`atp.data.records.overlap.check_overlap`).
        on_error: ``raise`` at the first bad row of local files, or ``skip`` bad rows, which the splits then list.
        name: Name of the data set.

    Returns:
        Splits that share no content, each record with its task's name.

    Raises:
        ValueError: No task or an unknown one, or whatever a task's source complains of.
    """
    if not weights:
        raise UserError("data.tasks is empty; name at least one task, e.g. data.tasks={casehold: 1}")
    if any(weight is not None and weight < 0 for weight in weights.values()):
        raise UserError(f"data.tasks={dict(weights)}: a weight cannot be negative")
    known = load_tasks(tasks_file)
    shares = {"validation": validation_fraction, "test": test_fraction}
    parts = {}
    bad = bad_rows_of(on_error)
    for task_name in weights:
        task = find_task(task_name, known)
        read = read_task(task, path, alone=len(weights) == 1, bad=bad)
        parts[task_name] = complete(read, shares, seed=seed, where=task_name, name=task_name)
    sizes = _sizes({task: len(part.train) for task, part in parts.items()}, weights, max_train)
    each = {most: None if most is None else max(1, most // len(parts)) for most in (max_validation, max_test)}
    joined = _mixed(parts, sizes, each[max_validation], each[max_test], seed)
    skipped = bad.reasons if isinstance(bad, BadRows) else {}
    if skipped:
        log.warning("%s: %s", name, bad)
    return replace(check_overlap(replace(joined, name=name), near_duplicates), skipped=skipped)


def _mixed(
    parts: Mapping[str, Splits], sizes: Mapping[str, int], validation: int | None, test: int | None, seed: int
) -> Splits:
    """The tasks' records together: so many training records of each, and at most so many of the other splits."""
    joined = Splits([], [], [], "")
    dropped = {"train": 0, "validation": 0}
    for task_name, part in parts.items():
        assert isinstance(joined.train, list) and isinstance(part.train, list)
        joined.train.extend(limit(part.train, sizes[task_name], seed))
        joined.validation.extend(limit(part.validation, validation, seed))
        joined.test.extend(limit(part.test, test, seed))
        for split in dropped:
            dropped[split] += part.overlap["exact_dropped"][split]
    return replace(joined, overlap={"exact_dropped": dropped})


def scored_records(
    name: str, *, most: int, seed: int, path: Any = None, tasks_file: PathLike | None = None
) -> list[Record]:
    """Return test records of an embedded domain (``health``), a task of it (``health/question``) or a known task.

    Args:
        name: What to score.
        most: At most so many, chosen by the seed.
        seed: Which records, where there are more or where a task has no test records of its own.
        path: Local files in place of the hub (:func:`task_files`).
        tasks_file: TOML file with tasks of the user's own.

    Raises:
        ValueError: There is no such domain or task (the nearest names are offered), or what its source complains of.
    """
    from atp import embedded

    domain, _, task = name.partition("/")
    if domain in embedded.DOMAINS:
        records = load_embedded(domain, train=1, validation=1, test=None if task else most).test
        there = sorted({record.task for record in records})
        if task and task not in there:
            raise UserError(f"{name}: the embedded domain {domain} has no task {task!r}; {nearest(task, there)}")
        return [record for record in records if not task or record.task == task][:most]
    known = load_tasks(tasks_file)
    if name not in known and domain not in known:
        raise UserError(f"there is no task or embedded domain {name!r}; {nearest(name, [*embedded.DOMAINS, *known])}")
    splits = load_domain(
        {name: None}, seed=seed, path=path, tasks_file=tasks_file, max_test=most, near_duplicates="ignore"
    )
    if not splits.test:
        raise UserError(f"the test split of {name} is empty; give a file of test records")
    return splits.test


def read_task(task: Task, path: Any = None, *, alone: bool = True, bad: OnBad = refuse) -> dict[str, list[Record]]:
    """Read the records of a task by split, from local files or from the hub.

    Args:
        task: The task.
        path: A folder, file, or mapping (:func:`task_files`); None takes the hub.
        alone: Whether ``path`` may name a file or folder of just this task.
        bad: Takes bad rows of local files.

    Raises:
        ValueError: There is nothing to read, a row is bad, or the hub cannot be reached or refuses.
    """
    packaged = _packaged(task, path)
    if packaged is not None:
        return packaged
    found = None if path is None else task_files(task, path, alone=alone)
    if found is None:
        if task.credentialed or not task.hub:
            why = "may be had only by agreement" if task.credentialed else "is not on the hub"
            raise UserError(
                f"{task.name} {why} (source: {task.source}); set data.path to your own copy: a folder with "
                f"{' or '.join(_stems(task, 'train'))}.jsonl, or data.path={{{task.name}: <file>}}"
            )
        return read_hub(task)
    raw = {
        split: list(itertools.chain.from_iterable(rows(p, header=_header(task, p), bad=bad) for p in some))
        for split, some in found.items()
    }
    raw = {split: filled(task, some) for split, some in raw.items()}
    bound = task.with_options_of(row for some in raw.values() for row, _ in some)
    return {split: joined(bound, list(made(some, bound.record, bad))) for split, some in raw.items()}


def _packaged(task: Task, path: Any) -> dict[str, list[Record]] | None:
    """The records of a task whose set is a package, unless the user names other files."""
    own = path.get(task.name) if isinstance(path, Mapping) else path
    if not task.package or not (own is None or holds_licences(own)):
        return None
    found = licence_rows(None if own is None else Path(own).expanduser())
    bound = task.with_options_of(row for some in found.values() for row, _ in some)
    return {split: list(made(filled(task, some), bound.record)) for split, some in found.items()}


def task_files(task: Task, path: Any, *, alone: bool = True) -> dict[str, list[Path]] | None:
    """Return a task's local files by split.

    Args:
        task: The task.
        path: A mapping of task (or of split) to file, files or such a mapping; or a folder, in and below which files
            are found by name (``<task>_train.jsonl``); or a file, for a single task.
        alone: Whether a file or list of files belongs to this task.

    Returns:
        Files by split, or None if a mapping leaves the task out, which then comes from the hub.

    Raises:
        ValueError: There is no such file, or none of the task's in the folder.
    """
    if isinstance(path, Mapping):
        if set(path) <= set(SPLIT_NAMES):
            return {split: _expanded(paths_of(some), split) for split, some in path.items()}
        return task_files(task, path[task.name]) if path.get(task.name) is not None else None
    given = paths_of(path)
    if len(given) > 1 or not given[0].is_dir():
        if not alone:
            raise UserError(
                f"data.path={path} is a file, but there are several tasks; give a folder, or "
                f"data.path={{{task.name}: <file>}}"
            )
        return {"train": given}
    files = [file for file in visible_files(given[0]) if file.is_file()]
    found: dict[str, list[Path]] = {}
    for split in SPLIT_NAMES:
        for stem in _stems(task, split):
            pattern = re.compile(re.escape(stem) + r"([_.-]v?\d+)?", re.IGNORECASE)
            matching = [file for file in files if pattern.fullmatch(_stem(file, stem))]
            if matching:
                found[split] = matching[:1]
                break
    if not found:
        stems = [stem for split in SPLIT_NAMES for stem in _stems(task, split)]
        raise UserError(
            f"data.path={path} holds no file of {task.name}; looked below it for {', '.join(dict.fromkeys(stems))} "
            f"with any known suffix; rename yours, or name it: data.path={{{task.name}: <file>}}"
        )
    return found


def _expanded(paths: Sequence[Path], split: str) -> list[Path]:
    """Files, and of folders those of a split, or all where names tell no splits."""
    found = find_files(paths)
    wanted = found.by_split.get(split, []) if found.named else found.by_split["train"]
    if not wanted:
        raise UserError(f"{', '.join(map(str, paths))} holds no {split} files, only {', '.join(found.by_split)}")
    return wanted


def _stem(file: Path, stem: str) -> str:
    """The name to compare: with its folder where the wanted one has a folder."""
    return f"{file.parent.name}/{file.stem}" if "/" in stem else file.stem


def _stems(task: Task, split: str) -> list[str]:
    own = list(task.files.get(split, []))
    base = task.name.partition("/")[2] or task.name
    named = [f"{base}_{alias}" for alias in SPLIT_NAMES[split]]
    foldered = [f"{base}/{alias}" for alias in SPLIT_NAMES[split]]
    return own or [*named, *foldered, *([base] if split == "train" else [])]


def _header(task: Task, path: Path) -> Sequence[str] | None:
    """The task's column names, unless the file's first line holds them."""
    if task.header is None or path.suffix.lower() not in (".csv", ".tsv"):
        return None
    with path.open(encoding="utf-8-sig") as file:
        first = file.readline().casefold()
    return None if all(column.casefold() in first for column in task.header) else task.header


def _sizes(counts: Mapping[str, int], weights: Mapping[str, float | None], most: int | None) -> dict[str, int]:
    """How many training records of each task: as many as the weights allow, at most ``most`` together."""
    if all(not weight for weight in weights.values()):
        total = sum(counts.values())
        share = {task: count / max(1, total) for task, count in counts.items()}
    else:
        positive = {task: float(weight or 0) for task, weight in weights.items()}
        if not all(positive.values()):
            raise UserError(f"data.tasks={dict(weights)}: give every task a weight, or none of them")
        share = {task: weight / sum(positive.values()) for task, weight in positive.items()}
        total = int(min(counts[task] / share[task] for task in counts))
    total = total if most is None else min(total, most)
    return {task: max(1, round(share[task] * total)) for task in counts}
