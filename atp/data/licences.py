"""Licences and contracts from the package ``licensedcode-data`` (ScanCode's database): rows by split, with categories.

A set that comes as a Python package instead of from the hub or from files of the user's; tasks name it
(``package`` in ``tasks.toml``). It sits where :mod:`atp.data.reading` does: package -> rows -> :mod:`atp.data.tasks`.

Licences are copied, versioned and adapted, so a split at random would test memory. Texts that nearly equal another are
left out; versions, variants and adaptations of one licence form a family, by key and by shared wording; and a family
is in one split as a whole. Large families are trained on: a test of one family is no test of licences.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from atp.data.reading.files import Row
from atp.data.records.overlap import shingles, words_in
from atp.errors import UserError

log = logging.getLogger(__name__)

DISTRIBUTION, VERSION = "licensedcode-data", "32.1.0"
INSTALL = f"pip install --no-deps '{DISTRIBUTION}=={VERSION}'"
SUFFIX = ".LICENSE"

CATEGORIES = {
    "Permissive": "permissive",
    "Proprietary Free": "proprietary, free of charge",
    "Copyleft Limited": "limited copyleft",
    "Copyleft": "copyleft",
    "Commercial": "commercial",
    "Free Restricted": "free with restrictions",
    "Source-available": "source available",
    "Public Domain": "public domain",
}
"""ScanCode's categories that the task asks for -> their names in it, none of which begins with another."""

_SAME, _ADAPTED = 0.8, 0.5
"""Jaccard similarity of word five-grams from which two texts are near duplicates, or of one family."""
_NAMED = {"gpl": "gpl", "lgpl": "gpl", "agpl": "gpl", "bsd": "bsd", "mit": "mit", "apache": "apache", "mpl": "mpl"}
"""Words of a key that name its family wherever they stand; else its first word does."""
_LARGE = 0.02
_SHARES = {"test": 0.18, "validation": 0.11}  # of what is not in large families
_FEWEST_WORDS = 20
_FEWEST_TEXTS = 50


@dataclass(frozen=True)
class Licence:
    """One text: its key in ScanCode, its category there, and its words."""

    key: str
    category: str
    text: str

    @functools.cached_property
    def shingles(self) -> frozenset[int]:
        """Digests of its word five-grams."""
        return frozenset(shingles(words_in(self.text)))


def licence_rows(folder: Path | None = None) -> dict[str, list[Row]]:
    """Rows by split, each with ``key``, ``category``, ``answer`` (empty where the task does not ask for it), ``text``.

    Args:
        folder: Holds ``*.LICENSE`` files as the package does; None takes the installed package.

    Returns:
        Rows in the order of their keys, the same ones for every seed.

    Raises:
        ValueError: The package is missing or of another version, or a file is not as the package's are.
    """
    return _rows(folder or _installed())


def holds_licences(path: Any) -> bool:
    """Whether a path is a folder of ``*.LICENSE`` files."""
    return isinstance(path, (str, Path)) and any(Path(path).expanduser().glob(f"*{SUFFIX}"))


def _installed() -> Path:
    try:
        found = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the licences are the package {DISTRIBUTION}, which is not installed: {INSTALL}") from None
    if found.version != VERSION:
        raise UserError(f"{DISTRIBUTION} {found.version} is installed, but {VERSION} is needed: {INSTALL}")
    folder = Path(str(found.locate_file("licensedcode/data/licenses")))
    if not folder.is_dir():
        raise UserError(f"{folder} is missing from {DISTRIBUTION}: {INSTALL} --force-reinstall")
    return folder


@functools.cache
def _rows(folder: Path) -> dict[str, list[Row]]:
    licences = read_licences(folder)
    pairs = similar([licence.shingles for licence in licences], _ADAPTED)
    number = {licence.key: place for place, licence in enumerate(licences)}
    groups = clusters(len(licences), [(one, other) for one, other, likeness in pairs if likeness >= _SAME])
    kept = sorted(min(group) for group in groups)  # keys ascend
    by_key: dict[str, list[int]] = defaultdict(list)
    for place, licence in enumerate(licences):
        by_key[family_key(licence.key)].append(place)
    links = [(one, other) for one, other, _ in pairs]
    links += [(group[0], other) for group in by_key.values() for other in group[1:]]
    there = set(kept)
    families = [
        [licences[place] for place in sorted(group) if place in there] for group in clusters(len(number), links)
    ]
    splits = split_families([family for family in families if family])
    log.info(
        "licences: %d texts, %d near duplicates left out, %d families",
        len(kept),
        len(licences) - len(kept),
        len(families),
    )
    for split, chosen in splits.items():
        counts = Counter(licence.category for licence in chosen)
        log.info(
            "licences: %s %d (%s)", split, len(chosen), ", ".join(f"{n} {name}" for name, n in counts.most_common())
        )
    return {
        split: [(_row(licence), f"{folder.name}/{licence.key}{SUFFIX}") for licence in chosen]
        for split, chosen in splits.items()
    }


def _row(licence: Licence) -> dict[str, str]:
    answer = CATEGORIES.get(licence.category, "")
    return {"key": licence.key, "category": licence.category, "answer": answer, "text": licence.text}


def read_licences(folder: Path) -> list[Licence]:
    """The licences of a folder by ascending key: English, in use, and texts rather than mentions of them.

    Raises:
        ValueError: A file has no YAML front matter with a key and a category, or there are too few texts.
    """
    read, left_out = [], Counter[str]()
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        front, text = _parts(path)
        if front.get("is_deprecated"):
            left_out["deprecated"] += 1
        elif front.get("is_generic") or front.get("is_unknown"):
            left_out["of no particular licence"] += 1
        elif front.get("language", "en") != "en":
            left_out["not English"] += 1
        elif len(text.split()) < _FEWEST_WORDS:
            left_out[f"under {_FEWEST_WORDS} words"] += 1
        else:
            read.append(Licence(str(front["key"]), str(front["category"]), text.strip("\n")))
    if len(read) < _FEWEST_TEXTS:
        raise UserError(f"{folder} holds {len(read)} licence texts ({SUFFIX}); at least {_FEWEST_TEXTS} are needed")
    log.info("licences: left out %s", ", ".join(f"{count} {why}" for why, count in left_out.items()) or "none")
    return sorted(read, key=lambda licence: licence.key)


def _parts(path: Path) -> tuple[Mapping[str, Any], str]:
    """The front matter and the text of a file."""
    try:
        pieces = re.split(r"^---[ \t]*\r?$", path.read_text(encoding="utf-8"), maxsplit=2, flags=re.MULTILINE)
        front = yaml.load(pieces[1], Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if len(pieces) == 3 else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: its front matter cannot be read ({reason}); install the package again: {INSTALL}"
        ) from None
    if not isinstance(front, Mapping) or not {"key", "category"} <= front.keys():
        raise UserError(f"{path}: no front matter between lines of --- with key and category; it is not ScanCode's")
    return front, pieces[2]


def family_key(key: str) -> str:
    """The family that a key names: ``gpl-2.0-plus``, ``lgpl-2.1`` and ``autoconf-simple-exception-gpl`` are one."""
    words = re.split(r"[-_.]", key)
    return next((_NAMED[word] for word in words if word in _NAMED), words[0])


def similar(texts: Sequence[frozenset[int]], threshold: float) -> list[tuple[int, int, float]]:
    """Pairs of sets with a Jaccard similarity of at least a threshold, and the similarity.

    Exact. Two such sets share one of the rarest elements of each, so only those are looked up (prefix filter:
    Chaudhuri et al. 2006, doi 10.1109/ICDE.2006.9).
    """
    frequency = Counter(element for text in texts for element in text)
    shared_by_some = sorted(
        (element for element, n in frequency.items() if n > 1), key=lambda one: (frequency[one], one)
    )
    rank = {element: place for place, element in enumerate(shared_by_some)}
    owners: dict[int, list[int]] = defaultdict(list)
    pairs = []
    for place in sorted(range(len(texts)), key=lambda place: (len(texts[place]), place)):
        text = texts[place]
        ranked = sorted(rank[element] for element in text if element in rank)
        alone = len(text) - len(ranked)  # rarer than all that are ranked
        rare = ranked[: max(0, len(text) - math.ceil(threshold * len(text)) + 1 - alone)]
        for other in sorted({other for element in rare for other in owners[element]}):
            if len(texts[other]) < threshold * len(text):
                continue
            shared = len(text & texts[other])
            likeness = shared / (len(text) + len(texts[other]) - shared)
            if likeness >= threshold:
                pairs.append((other, place, likeness))
        for element in rare:
            owners[element].append(place)
    return pairs


def clusters(count: int, links: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The connected parts of ``count`` places, each ascending."""
    parent = list(range(count))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for one, other in links:
        parent[root(other)] = root(one)
    found: dict[int, list[int]] = defaultdict(list)
    for place in range(count):
        found[root(place)].append(place)
    return list(found.values())


def split_families(families: Sequence[Sequence[Licence]]) -> dict[str, list[Licence]]:
    """Puts families into splits as wholes, each category's share of them alike, by a hash of their first keys."""
    total = sum(map(len, families))
    chosen: dict[str, list[Licence]] = {"train": [], "validation": [], "test": []}
    free: dict[str, list[Sequence[Licence]]] = defaultdict(list)
    for family in families:
        if len(family) > max(1, _LARGE * total):
            chosen["train"].extend(family)
        else:
            free[Counter(licence.category for licence in family).most_common(1)[0][0]].append(family)
    for some in free.values():
        ranked = sorted(some, key=lambda family: hashlib.sha256(family[0].key.encode()).hexdigest())
        wanted = {split: share * sum(map(len, some)) for split, share in _SHARES.items()}
        for family in ranked:
            split = next((split for split in wanted if wanted[split] >= 1), "train")
            chosen[split].extend(family)
            if split in wanted:
                wanted[split] -= len(family)
    return {split: sorted(some, key=lambda licence: licence.key) for split, some in chosen.items()}
