"""A finished run read back from its directory: figures, masks, training curves, samples, configuration.

Pages of one run read its directory through this file; `comparison` and `page` work on the
`RunRecord` made here. Everything but `metrics.json` is optional: what is missing or unreadable is left out and
named in a note, so that one damaged file does not cost the rest of the report.

It does not know how the figures were measured, nor how they are shown.
"""

import csv
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atp.errors import UserError

METRICS_FORMAT = 1
PHASES = ("warm-up", "pruning", "frozen")

Curve = tuple[list[float], list[float]]
"""Steps and values of one logged quantity, same length."""

_NUMBERS = {"*": "number"}
_WIDTHS = [dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"), "count")]
_SCHEMA: dict[str, Any] = {
    "run": {
        **dict.fromkeys(("name", "command"), "string"),
        "versions": {"*": "any"},
        **dict.fromkeys(("seconds", "parts"), _NUMBERS),
        "shared": {"*": "string"},
        "data": {"*": "any"},
    },
    **dict.fromkeys(("sparsity", "parameters"), _NUMBERS),
    "eval": {"*": _NUMBERS},
    "intervals": {"*": {"*": "any"}},
    **dict.fromkeys(("eval_counts", "recovery", "recovery_vs_dense"), _NUMBERS),
    "speed": {
        "dense": _NUMBERS,
        "pruned": _NUMBERS,
        "prefill_ratio": "number",
        "decode_ratio": "number",
        **dict.fromkeys(("prompt_tokens", "new_tokens", "batch_size", "repeats", "threads"), "count"),
        "device": "string",
    },
    **dict.fromkeys(("macs", "memory", "files"), _NUMBERS),
    "removal": {"max_abs_logit_diff": "number", "not_verified": "string"},
    **dict.fromkeys(("widths", "dense_widths"), _WIDTHS),
}
_KINDS: dict[str, tuple[type, ...]] = {"number": (int, float), "count": (int,), "string": (str,)}
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Sample:
    """One prompt, the reference answer and what each model wrote; None where it was not recorded."""

    prompt: str
    reference: str | None = None
    dense: str | None = None
    pruned: str | None = None


@dataclass(frozen=True)
class RunRecord:
    """Typed view of a run directory.

    Attributes:
        run_dir: The directory.
        metrics: Checked content of `metrics.json`, unprintable characters replaced.
        masks: Kind of unit ("heads", "channels") to one row of 0 or 1 per layer; empty without `masks.json`.
        scores: The same kinds to keep probabilities; empty if none were written.
        curves: Logged quantity to its curve, from `metrics/train.csv`; empty without it.
        phases: Step and name of each phase that starts during training.
        samples: Generated texts side by side.
        overrides: Raw text of `.hydra/overrides.yaml`, or None.
        config: Raw text of `.hydra/config.yaml`, or None.
        notes: One sentence per part that is missing or could not be read.
    """

    run_dir: Path
    metrics: dict[str, Any]
    masks: dict[str, list[list[int]]] = field(default_factory=dict)
    scores: dict[str, list[list[float]]] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    phases: tuple[tuple[float, str], ...] = ()
    samples: tuple[Sample, ...] = ()
    overrides: str | None = None
    config: str | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, run_dir: Path | str) -> "RunRecord":
        """Read a run directory.

        Args:
            run_dir: Directory of a run whose evaluation has been written.

        Returns:
            The view; parts that are missing or unreadable are empty and named in `notes`.

        Raises:
            ValueError: If `metrics.json` is missing, is not JSON, has another format version or holds a value of the
                wrong kind; the message names the file and the key.
        """
        run_dir = Path(run_dir)
        metrics = read_metrics(run_dir / "metrics.json")
        parts: dict[str, Any] = {}
        notes = []
        for name, reader in {"masks.json": _masks, "metrics/train.csv": _training, "samples.json": _samples}.items():
            try:
                text = (run_dir / name).read_text("utf-8", errors="replace")
                parts |= reader(text)
            except FileNotFoundError:
                notes.append(f"{name} is not in this run directory, so its part is left out.")
            except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
                notes.append(f"{name} could not be read, so its part is left out ({type(error).__name__}: {error}).")
        for key in ("overrides", "config"):
            path = run_dir / ".hydra" / f"{key}.yaml"
            parts[key] = clean(path.read_text("utf-8", errors="replace")) if path.is_file() else None
        absent = [key for key in _SCHEMA if key not in ("baselines", "intervals") and not metrics.get(key)]
        if absent:
            notes.append(f"metrics.json has nothing under: {', '.join(absent)}.")
        return cls(run_dir=run_dir, metrics=metrics, notes=tuple(map(clean, notes)), **parts)


def check_metrics(metrics: Any, source: str) -> None:
    """Check the kinds of all values that are read from a run's metrics; unknown keys and null values pass.

    Args:
        metrics: Content of a `metrics.json`.
        source: Where it comes from, for the message.

    Raises:
        ValueError: If a value is of the wrong kind or the format version is not `METRICS_FORMAT`; the message names the
            source and the key.
    """
    if not isinstance(metrics, Mapping):
        raise UserError(
            f"{source}: expected a JSON object, got {_shown(metrics)}; write it again by evaluating the run"
        )
    if metrics.get("format") != METRICS_FORMAT or isinstance(metrics["format"], bool):
        raise UserError(
            f"{source}: key 'format' is {_shown(metrics.get('format'))}, this version of atp reads format "
            f"{METRICS_FORMAT}; evaluate the run again or use the version that wrote it"
        )
    _check(metrics, _SCHEMA, "", source)


def clean(value: Any) -> Any:
    """Replace characters that neither a terminal nor a page can show in every string of a JSON value.

    Args:
        value: Anything `json.loads` returns.

    Returns:
        The same value, keys included, with control characters, direction overrides and lone surrogates as U+FFFD.
    """
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {clean(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value


def number(metrics: Mapping[str, Any], *keys: str) -> float | None:
    """Look up a figure.

    Args:
        metrics: Checked metrics.
        *keys: Path to the value.

    Returns:
        The figure, or None where any part of the path is missing or null.
    """
    value: Any = metrics
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def _check(value: Any, schema: Any, key: str, source: str) -> None:
    if value is None or schema == "any":
        return
    if isinstance(schema, str):
        fits, wanted = isinstance(value, _KINDS[schema]) and not isinstance(value, bool), f"a {schema}"
    else:
        shape, wanted = (list, "a list") if isinstance(schema, list) else (Mapping, "an object")
        fits = isinstance(value, shape)
    if not fits:
        raise UserError(
            f"{source}: key '{key}' must be {wanted}, got {_shown(value)}; correct it or evaluate the run again"
        )
    if isinstance(schema, dict):
        for name, item in value.items():
            _check(item, schema.get(name, schema.get("*", "any")), f"{key}.{name}".lstrip("."), source)
    elif isinstance(schema, list):
        for index, item in enumerate(value):
            _check(item, schema[0], f"{key}.{index}", source)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_metrics(path: Path) -> dict[str, Any]:
    """Read and check a `metrics.json`.

    Args:
        path: The file.

    Returns:
        Its content, unprintable characters replaced.

    Raises:
        ValueError: If it is missing, is not JSON, has another format version or holds a value of the wrong kind.
    """
    try:
        metrics = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is this the directory of a run that reached its evaluation?") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); evaluate the run again") from None
    check_metrics(metrics, str(path))
    return clean(metrics)


def _masks(text: str) -> dict[str, Any]:
    content = json.loads(text)
    axes = _by_layer(content["axes"])
    for kind, rows in axes.items():
        if not {bit for row in rows for bit in row} <= {0, 1}:
            raise UserError(f"axes of {kind} hold values other than 0 and 1")
    masks = {kind: [[int(bit) for bit in row] for row in rows] for kind, rows in axes.items()}
    scores = {
        kind: [[float(s) for s in row] for row in rows] for kind, rows in _by_layer(content.get("scores") or {}).items()
    }
    return {"masks": masks, "scores": scores}


def _by_layer(axes: Mapping[str, list[Any]]) -> dict[str, list[list[Any]]]:
    """Turn {"layers.0.heads": row, ...} into {"heads": [row per layer]}; axes that span layers are not pictured."""
    found: dict[str, dict[int, list[Any]]] = {}
    for name, row in axes.items():
        match = re.fullmatch(r"layers\.(\d{1,4})\.(.+)", name)
        if match:
            found.setdefault(clean(match[2]), {})[int(match[1])] = row
    return {kind: [rows.get(layer, []) for layer in range(max(rows) + 1)] for kind, rows in found.items()}


def _training(text: str) -> dict[str, Any]:
    """Read Lightning's sparse CSV; a step logged twice (a resumed run) keeps its last value."""
    columns: dict[str, dict[float, str]] = {}
    lines = csv.DictReader(text.replace("\0", "").splitlines())
    if "step" not in (lines.fieldnames or []):
        raise UserError(f"no column 'step' among {lines.fieldnames or []}")
    for row in lines:
        step = _float(row["step"] or "")
        if step is not None and math.isfinite(step):
            cells = (
                (name, cell) for name, cell in row.items() if isinstance(name, str) and isinstance(cell, str) and cell
            )
            for name, cell in cells:
                columns.setdefault(clean(name), {})[step] = cell
    curves: dict[str, Curve] = {}
    for name, cells_by_step in columns.items():
        points = [(step, value) for step, cell in sorted(cells_by_step.items()) if (value := _float(cell)) is not None]
        if points and name not in ("step", "epoch"):
            curves[name] = ([step for step, _ in points], [value for _, value in points])
    return {"curves": curves, "phases": _phases(columns, curves)}


def _phases(columns: Mapping[str, Mapping[float, str]], curves: Mapping[str, Curve]) -> tuple[tuple[float, str], ...]:
    """Find where phases start: a `phase` column (a name, or an index into `PHASES`), else the target's ramp."""
    for name, cells in columns.items():
        if name.rsplit("/", 1)[-1] == "phase":
            marks: list[tuple[float, str]] = []
            for step, cell in sorted(cells.items()):
                index = _float(cell)
                known = index is not None and index.is_integer() and 0 <= index < len(PHASES)
                label = PHASES[int(index)] if index is not None and known else clean(cell)
                if not marks or marks[-1][1] != label:
                    marks.append((step, label))
            return tuple(marks)
    steps, targets = curves.get("mask/target_sparsity", ([], []))
    marks = []
    if targets and max(targets) > targets[0]:
        rise = next(i for i, target in enumerate(targets) if target > targets[0])
        marks.append((steps[max(0, rise - 1)], "target rises"))
        marks.append((steps[targets.index(max(targets))], "full target"))
    return tuple(marks)


def _samples(text: str) -> dict[str, Any]:
    samples = []
    for item in json.loads(text):
        fields: dict[str, Any] = {key: item.get(key) for key in ("prompt", "reference", "dense", "pruned")}
        if not isinstance(fields["prompt"], str):
            raise UserError(f"a sample has no prompt text: {_shown(item)}")
        texts: dict[str, Any] = {key: None if value is None else clean(str(value)) for key, value in fields.items()}
        samples.append(Sample(**texts))
    return {"samples": tuple(samples)}


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
