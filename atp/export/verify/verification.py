"""Checking an export: every format is loaded in a fresh process and compared with the reference on the same tokens.

The reference is the model as atp itself loads it (strictly, float32), or one that the caller brings along. Each format
runs in :mod:`atp.export.verify.probe`, a process of its own without atp, so that a wrong file, a missing tensor or a
permutation that only atp would undo shows. Weights must also be the files that were exported, by their digests. What
there is to check, and with which engine, is in the rows of :mod:`atp.export.formats`; what counts as a match in
:mod:`atp.export.verify.limits`. Knows no format by name, and nothing of training.

Shape suffixes: W windows, T tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from transformers import PreTrainedModel

from atp.errors import UserError
from atp.export.formats import FORMATS, QUANTISED, Format
from atp.export.hf.loading import StoredModel, load_exported
from atp.export.hf.writing import PROVENANCE_FILE, digest
from atp.export.verify import probe
from atp.export.verify.limits import verdict
from atp.export.verify.reference import Reference, spelled, token_windows, write_reference
from atp.model import modeling_atp

_SURE = 1e-3  # logits this near pick another token only where a cache gave others


@dataclass(frozen=True)
class Check:
    """How one format compared.

    Attributes:
        format: Name of the format, with the type or quantisation.
        file: Where it is, relative to the export.
        size_bytes: Size of the weights' files.
        max_abs: Largest absolute logit difference.
        rms: Root mean square of the logit differences.
        top1: Share of positions with the same likeliest token.
        perplexity: On the tokens compared.
        reference_perplexity: The reference's.
        tokens_per_s: Greedy decoding of one sequence.
        greedy_equal: Greedy tokens equal to the reference's before the first that differs, of how many.
        ok: Whether it matches; None where it could not be run.
        note: Why not, or what to know.
        load: The line that opens it from within the export; empty for a directory, which has lines of its own.
    """

    format: str
    file: str
    size_bytes: int
    max_abs: float | None = None
    rms: float | None = None
    top1: float | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    tokens_per_s: float | None = None
    greedy_equal: str = ""
    ok: bool | None = None
    note: str = ""
    load: str = ""


@dataclass(frozen=True)
class _Task:
    """One thing to check: a format's file or directory, and how it is quantised while loading."""

    form: Format
    path: Path
    quantised: str = ""

    @property
    def rounded_type(self) -> str | None:
        """The type that the weights are rounded to, None where they are kept."""
        return self.quantised or self.form.rounded(self.path)

    @property
    def title(self) -> str:
        return " ".join(filter(None, (self.form.name, self.form.variant(self.path), self.quantised)))


def verify(
    directory: str | Path,
    *,
    ids_WT: np.ndarray | None = None,
    text: str | None = None,
    tokens: int = 2048,
    quantised: Sequence[str] = (),
    reference_model: PreTrainedModel | None = None,
    threads: int | None = None,
) -> list[Check]:
    """Compares every format of an export with the reference.

    Args:
        directory: The exported directory.
        ids_WT: Token windows [W, T] to compare on; by default windows of `text`.
        text: Text to tokenise; random tokens where there is none or the export has no tokenizer.
        tokens: Most tokens to compare on.
        quantised: Also load the Hugging Face directory in these ways, of :data:`QUANTISED`.
        reference_model: The reference, if not the stored model itself.
        threads: Threads per process; torch's own number by default.

    Returns:
        One entry per format found.

    Raises:
        ValueError: The directory is damaged, or holds code that is not atp's.
    """
    stored = StoredModel(directory)
    _check_code(stored.directory)
    for kind in quantised:
        if kind not in QUANTISED:
            raise UserError(f"quantisation {kind!r} is not known; choose from {', '.join(QUANTISED)}")
    if ids_WT is None:
        ids_WT = token_windows(stored, text, tokens)
    spelling = spelled(stored, text)
    tasks = _tasks(stored.directory, quantised)
    types = dict.fromkeys(task.rounded_type for task in tasks if task.rounded_type)
    with tempfile.TemporaryDirectory(prefix="atp-verify-") as folder:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = reference_model or load_exported(directory, dtype=torch.float32, device=device)
        reference = write_reference(model, ids_WT, Path(folder), list(types))
        del model
        threads = threads or torch.get_num_threads()
        return [_check(stored, task, reference, {**spelling, "threads": threads}) for task in tasks]


def _check_code(directory: Path) -> None:
    """Refuses a modeling file that is not atp's: a fresh process would run it."""
    file = directory / "modeling_atp.py"
    names_code = "auto_map" in json.loads((directory / "config.json").read_text(encoding="utf-8"))
    same = file.is_file() and file.read_bytes() == Path(modeling_atp.__file__).read_bytes()
    if names_code and not same:
        raise UserError(
            f"{file} is missing or differs from this version of atp, and verifying would run it; export the directory "
            f"again (python -m atp.export {directory} --to hf --output NEW_DIRECTORY)"
        )


def _tasks(directory: Path, quantised: Sequence[str]) -> list[_Task]:
    """What there is to check, in the order of the table; ways of quantising after the directory itself."""
    found = [_Task(form, path) for form in FORMATS.values() for path in form.find(directory)]
    whole = next(task for task in found if task.form.is_directory)
    at = found.index(whole) + 1
    return [*found[:at], *(replace(whole, quantised=kind) for kind in quantised), *found[at:]]


def _described(stored: StoredModel, task: _Task) -> Check:
    """What is known of a format before it is run."""
    path = task.path
    if task.form.is_directory:
        files = [*path.glob("*.safetensors"), *path.glob("adapter/*.safetensors")]
    else:
        files = list(path.parent.glob(path.name + "*"))
    file = os.path.relpath(path, stored.directory)
    size = sum(file.stat().st_size for file in files)
    return Check(task.title, file, size, load=task.form.loading(file) if task.form.loading else "")


def _check(stored: StoredModel, task: _Task, reference: Reference, settings: Mapping[str, Any]) -> Check:
    check = replace(_described(stored, task), reference_perplexity=reference.perplexity)
    for package in (task.form.engine.package, *([QUANTISED[task.quantised]] if task.quantised else [])):
        if package.fault:
            return replace(check, note=f"not run: {package.fault}")
    result = _probe(task, reference, settings)
    if "error" in result:
        # A quantiser that this platform lacks a kernel for says nothing about the export.
        return replace(check, ok=None if task.quantised else False, note=result["error"])
    rounding = reference.rounding[task.rounded_type] if task.rounded_type else None
    pairs = list(zip(result["greedy"], reference.greedy, strict=False))
    equal = next((i for i, (found, expected) in enumerate(pairs) if found != expected), len(pairs))
    faults = [verdict(result, task.form.limit, reference.deviation, rounding), result["spelling"]]
    faults += [_changed_weights(stored.directory)] if task.form.is_directory else []
    if not faults[0] and rounding is None and equal < len(pairs) and result["max_abs"] < _SURE:
        faults.append(f"with its cache the greedy text differs from token {equal}")
    note = "; ".join(filter(None, faults))
    measured = {name: result[name] for name in ("max_abs", "rms", "top1", "perplexity", "tokens_per_s")}
    greedy_equal = f"{equal}/{len(pairs)}"
    return replace(check, **measured, greedy_equal=greedy_equal, ok=not note, note=note or result["remark"])


def _changed_weights(directory: Path) -> str:
    """Names a weight file that is not the one that was exported; empty where all are, or nothing was noted of them."""
    try:
        noted = json.loads((directory / PROVENANCE_FILE).read_text(encoding="utf-8")).get("sha256") or {}
    except (OSError, ValueError, AttributeError):
        return ""
    changed = [
        name for name, value in noted.items() if not (directory / name).is_file() or digest(directory / name) != value
    ]
    return f"{', '.join(changed)} changed since the export (sha256 in {PROVENANCE_FILE})" if changed else ""


def _probe(task: _Task, reference: Reference, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Runs one format in a fresh process."""
    ids_WT = np.load(reference.folder / "ids.npy", mmap_mode="r")
    sent = {
        **settings,
        "format": task.form.name,
        "path": str(task.path),
        "quantised": task.quantised or None,
        "engine": [str(task.form.engine.file), task.form.engine.name],
        "ids": str(reference.folder / "ids.npy"),
        "reference": str(reference.folder / "reference.npy"),
        "context": int(ids_WT.shape[1]) + 1,
        "prompt": reference.prompt,
        "new_tokens": len(reference.greedy),
    }
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "GGML_NO_BACKTRACE": "1",
        "HF_MODULES_CACHE": str(reference.folder / "modules"),
        "OMP_NUM_THREADS": str(settings["threads"]),
    }
    command = [sys.executable, "-P", "-W", "ignore", probe.__file__]
    done = subprocess.run(command, input=json.dumps(sent), capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = lines[-1][:160] if lines else ""
    if done.returncode < 0:
        return {"error": ": ".join(filter(None, (f"the engine was killed by signal {-done.returncode}", said)))}
    return {"error": said or f"exit code {done.returncode}"}


def as_plain(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """The checks as JSON values."""
    return [asdict(check) for check in checks]


def mismatches(checks: Sequence[Check]) -> list[Check]:
    """The checks that failed; one that could not be run is not among them."""
    return [check for check in checks if check.ok is False]


def verification_table(checks: Sequence[Check], title: str = "") -> Table:
    """The checks as a table for the terminal."""
    table = Table(title=title or None)
    table.add_column("format", no_wrap=True)
    titles = ("size MiB", "max diff", "rms diff", "top-1", "perplexity", "reference", "greedy =", "tokens/s")
    for name in titles:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("result")
    for check in checks:
        state = {True: "ok", False: "MISMATCH", None: "not run"}[check.ok]
        numbers = (
            f"{check.size_bytes / 2**20:.2f}",
            "" if check.max_abs is None else f"{check.max_abs:.2g}",
            "" if check.rms is None else f"{check.rms:.2g}",
            "" if check.top1 is None else f"{check.top1:.2%}",
            "" if check.perplexity is None else f"{check.perplexity:.4g}",
            "" if check.reference_perplexity is None else f"{check.reference_perplexity:.4g}",
            check.greedy_equal,
            "" if check.tokens_per_s is None else f"{check.tokens_per_s:.1f}",
        )
        table.add_row(check.format, *numbers, state)
    return table


def notes(checks: Sequence[Check]) -> list[str]:
    """List remarks on the checks, one line each."""
    return [f"{check.format}: {check.note}" for check in checks if check.note]
