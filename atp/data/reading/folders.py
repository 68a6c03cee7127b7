"""Folders: which files of a data folder are data, and of which split.

A folder is read as a data set on the Hugging Face hub is (its documentation, "Data files configuration"): by the type
of its data files; splits by what the README's metadata says, or else by the names of shards, folders and files; README,
licence, metadata and hidden files are never data. Sits between :mod:`atp.data.reading.files` and
:mod:`atp.data.sources`. It knows names, and of contents only those of metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from atp.data.reading.files import FORMATS, ROW_SUFFIXES, TEXT_SUFFIXES, format_of, is_saved
from atp.data.reading.opening import PACKED
from atp.errors import UserError

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_PARTS = re.compile(r"[-._ 0-9]+")
_SHARD = re.compile(r"(?P<split>\w+(?:[.-]\w+)*?)-\d{5}-of-\d{5}")
_DOCUMENTS = re.compile(
    r"(readme|licen[cs]e|copying|notice|contributing|changelog|code_of_conduct|citation|security|authors|requirements)"
    r"([-_.].*)?",
    re.IGNORECASE,
)
_METADATA = (
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dummy_data.zip",
    "dataset_dict.json",
    "state.json",
    "croissant.json",
)
_SHOWN = 3


@dataclass
class DataFiles:
    """What a setting names, by split.

    Attributes:
        by_split: ``train``, ``validation`` and ``test`` to their files; a saved data set's folder counts as a file.
        notes: What was taken as which split, and what was left out, a line per folder.
        named: Whether any split was told by a name; without one, all is ``train``.
    """

    by_split: dict[str, list[Path]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    named: bool = False


def find_files(paths: Sequence[Path], form: str | None = None) -> DataFiles:
    """Return the data files of what is named: files as they are, for training, and those of folders by split.

    Args:
        paths: Files and folders.
        form: Only files of this format are taken from folders (:data:`atp.data.reading.files.FORMATS`).

    Raises:
        ValueError: A folder holds no data, mixes types of it, or its names leave open which split is meant.
    """
    if form is not None and form not in FORMATS:
        raise UserError(f"data.format={form!r} is unknown; choose one of {', '.join(FORMATS)}")
    found = DataFiles()
    for path in paths:
        if not path.is_dir() or is_saved(path):
            found.by_split.setdefault("train", []).append(path)
            continue
        files, named, left = _of_folder(path, form)
        found.named |= named
        for split, some in files.items():
            found.by_split.setdefault(split, []).extend(some)
        taken = "; ".join(f"{split} from {_shown(path, some)}" for split, some in files.items())
        found.notes.append(f"{path}: {taken}" + (f"; left out: {_shown(path, left)}" if left else ""))
    return found


def split_of_name(name: str) -> str | None:
    """Return the split that a name tells by one of the hub's keywords between its dots, dashes, spaces and digits.

    Raises:
        ValueError: It tells more than one.
    """
    words = set(_PARTS.split(name.casefold()))
    told = [split for split, keywords in SPLITS.items() if words & set(keywords)]
    if len(told) > 1:
        raise UserError(f"{name!r} names both {' and '.join(told)}")
    return told[0] if told else None


def _of_folder(root: Path, form: str | None) -> tuple[dict[str, list[Path]], bool, list[Path]]:
    """The files of a folder by split, whether names told them, and what was left out."""
    if (root / "dataset_dict.json").is_file():
        return _by_split(root, [root / name for name in _saved_splits(root)], []) if form is None else _no_saved(root)
    configured = _configured(root)
    if configured is not None:
        used = {file for some in configured.values() for file in some}
        return configured, True, [file for file in visible_files(root) if file not in used]
    files, left = _data_files(root)
    if form is not None:
        left += [file for file in files if format_of(file) != form]
        files = [file for file in files if format_of(file) == form]
    elif any(file.suffix.lower() in (".md", ".markdown") for file in files) and {format_of(file) for file in files} - {
        "text"
    }:
        left += [file for file in files if file.suffix.lower() in (".md", ".markdown")]
        files = [file for file in files if file not in set(left)]
    if not files:
        packed = [file for file in root.rglob("*") if file.suffix.lower() in PACKED]
        hint = f" (unpack {packed[0]} first)" if packed else ""
        wanted = ", ".join((*TEXT_SUFFIXES, *ROW_SUFFIXES) if form is None else FORMATS[form])
        beside = f", only {_shown(root, left)}" if left else ""
        raise UserError(f"{root} is a directory without {wanted} data files below it{beside}{hint}")
    _one_type(root, files)
    return _by_split(root, files, left)


def _no_saved(root: Path) -> tuple[dict[str, list[Path]], bool, list[Path]]:
    raise UserError(f"{root} is a data set saved by `datasets`; leave data.format out")


def _data_files(root: Path) -> tuple[list[Path], list[Path]]:
    """The files that may be data, in order, and what is none; hidden files are passed over."""
    files: list[Path] = []
    left: list[Path] = []
    for file in visible_files(root):
        if is_saved(file):
            files.append(file)
        elif format_of(file) is None or file.name in _METADATA or _DOCUMENTS.fullmatch(file.name):
            left.append(file)
        else:
            files.append(file)
    return files, left


def visible_files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that are not hidden, and saved data sets in place of theirs."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "__", "~$")):
            continue
        if path.is_dir() and not is_saved(path):
            yield from visible_files(path)
        else:
            yield path


def _one_type(root: Path, files: Sequence[Path]) -> None:
    types: dict[str, list[Path]] = {}
    for file in files:
        types.setdefault(str(format_of(file)), []).append(file)
    if len(types) > 1:
        told = "; ".join(f"{len(some)} {name} ({_shown(root, some)})" for name, some in types.items())
        choice = next(name for name in sorted(types, key=lambda name: -len(types[name])) if name in FORMATS)
        raise UserError(
            f"{root} mixes data files of several types: {told}; say which are meant with data.format={choice}, or name "
            "the files: data.path=[FILE, ...]"
        )


def _by_split(root: Path, files: Sequence[Path], left: list[Path]) -> tuple[dict[str, list[Path]], bool, list[Path]]:
    labels = {file: _label(root, file) for file in files}
    told = {file: split for file, (split, _) in labels.items() if split is not None}
    if not told:
        return {"train": list(files)}, False, left
    found: dict[str, list[Path]] = {}
    for split in SPLITS:
        some = [file for file in files if told.get(file) == split]
        names = sorted({labels[file][1] for file in some} - {""})
        if len(names) > 1:
            raise UserError(
                f"{root} holds several splits that may be {split}: {', '.join(names)}; name the files of one, for "
                f"example data.path='{some[0].parent}/{names[0]}*'"
                + ("" if split == "train" else f" or data.{split}_path")
            )
        if some:
            found[split] = some
    return found, True, [*left, *(file for file in files if file not in told)]


def _label(root: Path, file: Path) -> tuple[str | None, str]:
    """The split of a file by the name of its shard, its innermost folder that tells one, or its own name.

    The second part is the name that the data set itself gives the split, where that is more than a keyword.
    """
    names = file.relative_to(root).parts
    stem = names[-1].partition(".")[0] if not file.is_dir() else names[-1]
    shard = _SHARD.match(names[-1])
    try:
        if shard:
            return split_of_name(shard["split"]), shard["split"]
        for name in reversed(names[:-1]):
            if split_of_name(name):
                return split_of_name(name), ""
        return split_of_name(stem), names[-1] if file.is_dir() else ""
    except UserError as error:
        raise UserError(f"{file}: {error}; rename it, or name the files: data.path, data.test_path") from None


def _saved_splits(root: Path) -> list[str]:
    try:
        splits = json.loads((root / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        missing = [name for name in splits if not is_saved(root / name)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root}/dataset_dict.json: names no splits ({error}); save the data set again") from None
    if missing or not splits:
        raise UserError(f"{root}: the saved split {missing} is not there; save the data set again with save_to_disk")
    return list(splits)


def _configured(root: Path) -> dict[str, list[Path]] | None:
    """The files that the README's metadata names by split, as the hub has it; None if it names none."""
    from huggingface_hub.repocard import metadata_load

    card = root / "README.md"
    try:
        metadata = metadata_load(card) if card.is_file() else None
    # A README whose head is no YAML (whatever its parser says) is only a text.
    except Exception:
        return None
    configs = [one for one in (metadata or {}).get("configs") or [] if isinstance(one, dict) and one.get("data_files")]
    if not configs:
        return None
    chosen = [one for one in configs if one.get("default") or one.get("config_name") == "default"]
    if len(chosen) != 1 and len(configs) > 1:
        names = [str(one.get("config_name")) for one in configs]
        raise UserError(
            f"{root} holds several data sets, {', '.join(names)} (README.md); name the files of one: "
            "data.path=[FILE, ...]"
        )
    entries = (chosen or configs)[0]["data_files"]
    entries = entries if isinstance(entries, list) else [entries]
    patterns = [one if isinstance(one, dict) else {"split": "train", "path": one} for one in entries]
    found: dict[str, list[Path]] = {}
    for one in patterns:
        name = str(one.get("split", "train"))
        given = one.get("path", [])
        some = [
            f for pattern in ([given] if isinstance(given, str) else given) for f in sorted(root.glob(str(pattern)))
        ]
        split = split_of_name(name)
        if not some:
            raise UserError(f"{root}/README.md names the files {given!r} of the split {name!r}, which are not there")
        if split in found:
            raise UserError(f"{root} holds several splits that may be {split} (README.md); name the files: data.path")
        if split is not None:
            found[split] = some
    return found or None


def _shown(root: Path, files: Sequence[Path]) -> str:
    names = [str(file.relative_to(root)) for file in files[:_SHOWN]]
    return ", ".join(names) + (f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else "")
