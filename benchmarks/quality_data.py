"""What the quality benchmark measures on: checkpoints, texts, and the proof that training and test do not overlap.

Each setting names a base model, a data set and the size of its runs. Texts are written once as JSONL into the
benchmark's folder, training documents that repeat held-out ones left out, so that every method reads the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED = Path(__file__).parent.parent.parent / "shared"
SHINGLE = 13
"""Words of a shingle; the length by which GPT-3's authors searched for overlap (Brown et al. 2020, appendix C)."""
NEAR_DUPLICATE = 0.5
"""Share of a training text's shingles that held-out texts hold, from which on it is left out."""

Text = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """A base model on a text.

    Attributes:
        name: Short name.
        model: Overrides that choose the model; ``{shared}`` and ``{sibling}`` stand for folders.
        text: ``stories``, ``legal``, or an embedded domain.
        run: Overrides for the size of the runs: steps, batch, length, adapters.
        rates: Learning rates of the grid.
    """

    name: str
    model: tuple[str, ...]
    text: str
    run: tuple[str, ...]
    rates: tuple[float, ...]


_STORIES = ("data.max_length=128", "lora.r=8", "lora.alpha=16")
_SMALL = (*_STORIES, "data.batch_size=16", "trainer.max_steps=400")
_MIDDLE = (*_STORIES, "data.batch_size=8", "trainer.max_steps=300")
_EMBEDDED = ("data.batch_size=8", "lora.r=32", "lora.alpha=32", "trainer.max_steps=400")
_260K = ("model=local", "model.path={shared}/models/stories260K")
_3M = ("model=local", "model.path={shared}/models/stories3M")
SETTINGS = {
    s.name: s
    for s in (
        Setting("stories260K", _260K, "stories", _SMALL, (3e-3, 1e-2)),
        Setting("stories3M", _3M, "stories", _MIDDLE, (2.5e-3, 5e-3, 1e-2)),
        Setting("stories3M_legal", _3M, "legal", _MIDDLE, (5e-3, 1e-2)),
        Setting("embedded", ("model=embedded",), "embedded", _EMBEDDED, (2.5e-3, 5e-3)),
        Setting("sibling", ("model=local", "model.path={sibling}"), "embedded", _EMBEDDED, (2.5e-3, 5e-3)),
    )
}


def shingles(text: str) -> set[str]:
    """Every run of :data:`SHINGLE` words, without regard to case and punctuation."""
    words = re.findall(r"\w+", text.casefold())
    return {" ".join(words[i : i + SHINGLE]) for i in range(max(len(words) - SHINGLE + 1, 1))}


def overlap(train: list[Text], held_out: Iterable[Text]) -> tuple[list[int], dict[str, Any]]:
    """Compare training with held-out texts.

    Returns:
        Positions of the training texts that equal or nearly repeat a held-out one, and figures: how many do either,
        and the share of held-out shingles that training texts hold at all (common phrases).
    """
    held = [str(row["text"]) for row in held_out]
    keys = {_key(text) for text in held}
    known = set().union(*map(shingles, held)) if held else set()
    repeated: list[int] = []
    equal, seen = 0, set()
    for position, row in enumerate(train):
        own = shingles(str(row["text"])) & known
        is_equal = _key(str(row["text"])) in keys
        if is_equal or len(own) > NEAR_DUPLICATE * len(shingles(str(row["text"]))):
            repeated.append(position)
            equal += is_equal
        else:
            seen |= own
    return repeated, {
        "train_texts": len(train),
        "held_out_texts": len(held),
        "equal": equal,
        "near_duplicates": len(repeated) - equal,
        "shared_shingles": len(seen) / max(len(known), 1),
    }


def without_overlap(train: list[Text], held_out: list[Text]) -> tuple[list[Text], dict[str, Any]]:
    """Leave out training texts that equal or nearly repeat held-out ones.

    Returns:
        What may be trained on, and the figures of :func:`overlap` with the number left out.

    Raises:
        ValueError: Nothing is left to train on, or the check found a repetition that it could not remove.
    """
    repeated, found = overlap(train, held_out)
    gone = set(repeated)
    kept = [row for position, row in enumerate(train) if position not in gone]
    again, after = overlap(kept, held_out)
    if again or not kept:
        raise ValueError(f"training and held-out texts overlap: {after}")
    return kept, {**found, "left_out": len(repeated)}


def prepare(setting: Setting, folder: Path, sibling: Path | None = None) -> tuple[list[str], dict[str, Any]]:
    """Overrides that choose a setting's model and data, and the figures of the overlap check.

    Args:
        setting: What to prepare.
        folder: Where the JSONL files go.
        sibling: Directory of the larger embedded model, for the setting of that name.

    Raises:
        ValueError: A folder that the setting needs is not there.
    """
    if any("{sibling}" in part for part in setting.model) and sibling is None:
        raise ValueError("the setting 'sibling' needs --sibling DIR, a base of the embedded corpus")
    model = [part.format(shared=SHARED, sibling=sibling) for part in setting.model]
    if setting.text == "embedded":
        from atp.embedded.corpus import records

        def texts(split: str) -> list[Text]:
            return [{"text": json.dumps(row, sort_keys=True)} for row in records("legal", split, None)]

        _, report = overlap(texts("train"), texts("test"))  # equal ones are left out by the loader itself
        return [*model, "data=embedded_legal", *setting.run], report
    if not SHARED.is_dir():
        raise ValueError(f"the setting {setting.name!r} needs {SHARED}, which is not there")
    train, held_out = _stories() if setting.text == "stories" else _legal()
    kept, report = without_overlap(train, held_out)
    for name, rows in (("train", kept), ("test", held_out)):
        path = folder / f"{setting.text}_{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = "".join(json.dumps({"text": row["text"]}, ensure_ascii=False) + "\n" for row in rows)
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
    data = ["data=jsonl", f"data.name={setting.text}", "data.max_test=null"]
    data += [f"data.path={folder}/{setting.text}_train.jsonl", f"data.test_path={folder}/{setting.text}_test.jsonl"]
    return [*model, *data, *setting.run], report


def _stories() -> tuple[list[Text], list[Text]]:
    general = SHARED / "data" / "general"
    return _read(general / "tinystories_train.jsonl"), _read(general / "tinystories_heldout.jsonl")


def _legal() -> tuple[list[Text], list[Text]]:
    """US Code by titles, so that no section of a held-out title is trained on, and CaseHOLD by its own split."""
    legal = SHARED / "data" / "legal"
    train: list[Text] = []
    held_out: list[Text] = []
    for row in _read(legal / "uscode_sections.jsonl"):
        title = re.match(r"/us/usc/(t\w+)", str(row["id"]))
        name = title[1] if title else str(row["id"])
        is_held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0
        (held_out if is_held_out else train).append({"text": row["text"]})
    for name, rows in (("casehold_train", train), ("casehold_test", held_out)):
        for row in _read(legal / f"{name}.jsonl"):
            rows.append({"text": f"{row['citing_prompt']}\nHolding: {row['holding_' + str(row['label'])]}"})
    return train, held_out[:400]


def _read(path: Path) -> list[Text]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _key(text: str) -> str:
    return " ".join(text.split()).casefold()
