"""The embedded corpus: endless, disjoint streams of synthetic records per domain and split.

What it is: the place where the domain modules' tasks become splits.
Where it sits: legal, health, finance, narrative -> corpus -> `atp.embedded.records` -> `atp.data`, `pretrain`.
What it does NOT know: tokens, models, training.

A split belongs to a combination of slots, not to a record: the key of a record (for a case, who sues whom under which
doctrine) is hashed, and the hash names the split. So no record can be in two splits, and what a test record combines
has never been combined in training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice

from atp.embedded import finance, health, legal, narrative
from atp.embedded.drawing import Draw, Record, Task
from atp.errors import UserError

DOMAINS = ("legal", "health", "finance", "narrative")
DEFAULT_COUNTS = {"train": 6000, "validation": 200, "test": 400}
"""Records of a split when no count is asked for; every split goes on beyond it."""

_TASKS: dict[str, dict[str, Task]] = {
    "legal": legal.TASKS,
    "health": health.TASKS,
    "finance": finance.TASKS,
    "narrative": narrative.TASKS,
}
_BUCKETS = 24
_VALIDATION_BUCKETS = (0,)
_TEST_BUCKETS = (1, 2)


def split_of(key: tuple[str, ...]) -> str:
    """Return the split that a combination of slots belongs to."""
    digest = hashlib.blake2b("|".join(key).encode("utf-8"), digest_size=4).digest()
    bucket = int.from_bytes(digest, "big") % _BUCKETS
    if bucket in _VALIDATION_BUCKETS:
        return "validation"
    return "test" if bucket in _TEST_BUCKETS else "train"


def tasks(domain: str) -> tuple[str, ...]:
    """Return the names of a domain's tasks.

    Raises:
        ValueError: the domain is not one of `DOMAINS`.
    """
    if domain not in _TASKS:
        raise UserError(f"domain={domain!r} is not an embedded domain; use one of {', '.join(DOMAINS)}")
    return tuple(_TASKS[domain])


def stream(domain: str, split: str) -> Iterator[Record]:
    """Yield the records of a split without end, always in the same order.

    Tasks follow one another in a fixed round, so every stretch of the stream holds them in proportion to their weights.

    Args:
        domain: one of `DOMAINS`.
        split: `train`, `validation` or `test`.

    Raises:
        ValueError: the domain or the split does not exist.
    """
    names = tasks(domain)
    if split not in DEFAULT_COUNTS:
        raise UserError(f"split={split!r} is not a split of the corpus; use one of {', '.join(DEFAULT_COUNTS)}")
    return _endless(domain, split, names)


def _endless(domain: str, split: str, names: tuple[str, ...]) -> Iterator[Record]:
    draw = Draw(f"atp/{domain}/{split}")
    table = _TASKS[domain]
    rounds = _interleaved({name: table[name].weight for name in names})
    counts = dict.fromkeys(names, 0)
    while True:
        for name in rounds:
            number = counts[name]
            counts[name] += 1
            while True:
                record, key = table[name].make(draw, number)
                if split_of((domain, name, *key)) == split:
                    break
            record["task"] = name
            yield record


def _interleaved(weights: dict[str, int]) -> list[str]:
    """Spread each task evenly over one round of sum(weights) records."""
    slots = [((turn + 0.5) / weight, name) for name, weight in weights.items() for turn in range(weight)]
    return [name for _, name in sorted(slots)]


def records(domain: str, split: str, count: int | None = None) -> list[Record]:
    """Return the first `count` records of a split.

    Args:
        domain: one of `DOMAINS`.
        split: `train`, `validation` or `test`.
        count: how many; None for the split's entry in `DEFAULT_COUNTS`. A smaller count is a prefix of a larger one.

    Returns:
        Raw records: `{"text"}`, `{"prompt", "completion"}` or `{"prompt", "choices", "label"}`, each with `"task"`.

    Raises:
        ValueError: the domain or the split does not exist, or the count is negative.
    """
    if count is not None and count < 0:
        raise UserError(f"count={count} of embedded records is negative; give 0 or more, or None for the default")
    endless = stream(domain, split)
    return list(islice(endless, DEFAULT_COUNTS[split] if count is None else count))


def digest(count: int = 500) -> str:
    """Return a SHA-256 over the first `count` records of every domain's training split and the whole other splits.

    Args:
        count: training records per domain that go into the digest.
    """
    running = hashlib.sha256()
    for domain in DOMAINS:
        for split in DEFAULT_COUNTS:
            for record in records(domain, split, count if split == "train" else None):
                running.update(json.dumps(record, sort_keys=True).encode("utf-8"))
    return running.hexdigest()
