"""What a finished run has to show: `report.html` and pictures in its directory, and the table on the terminal.

Last station of the flow. A run directory is the only input, so a report can be made again at any time, on any machine:
`record` reads the directory, `comparison` lays out the figures, `charts` draws them, and this file brings
them together on one self-contained page.

It does not know models, data sets, configuration classes or how any figure was measured.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atp.atomic import write_bytes
from atp.loading_lines import load_lines
from atp.report import charts, mask_panels, panel
from atp.report.comparison import (
    comparison_rows,
    comparison_table,
    evaluated_models,
    lower_is_better,
    metric_names,
    model_label,
    speed_note,
)
from atp.report.evidence import evidence
from atp.report.headlines import headlines, not_reached
from atp.report.html import render
from atp.report.panel import Panel
from atp.report.record import Curve, RunRecord, number

__all__ = ["RunRecord", "comparison_table", "write_report"]

_HEADS_PICTURED = 128  # units in a row; wider masks are pictured by the share kept in blocks
_WIDTH_NAMES = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
_COSTS = (
    ("Parameters", ("parameters", "dense"), ("parameters", "pruned"), "{:,.0f}"),
    ("MACs per token", ("macs", "dense_per_token"), ("macs", "pruned_per_token"), "{:,.0f}"),
    ("Prefill time", ("speed", "dense", "prefill_latency_ms"), ("speed", "pruned", "prefill_latency_ms"), "{:,.2f} ms"),
    (
        "Decode time",
        ("speed", "dense", "decode_latency_ms"),
        ("speed", "pruned", "decode_latency_ms"),
        "{:,.2f} ms/token",
    ),
    ("Weights in memory", ("memory", "dense_weights_mib"), ("memory", "pruned_weights_mib"), "{:,.1f} MiB"),
    ("Files", ("files", "dense_mib"), ("files", "pruned_mib"), "{:,.1f} MiB"),
)


def write_report(run_dir: Path | str) -> Path:
    """Write `report.html` and the pictures under `figures/` into a run directory.

    Args:
        run_dir: Directory of a run whose evaluation has been written.

    Returns:
        Path of the page: one file with nothing loaded from outside it.

    Raises:
        ValueError: If `metrics.json` is missing or malformed; the message names the file and the key.
    """
    report = RunRecord.load(run_dir)
    panels = report_panels(report)
    for name in ("masks", "evolution", "training", "widths"):
        for file_format in ("png", "svg"):
            if panels[name]:
                content = panel.file_bytes(panels[name], file_format, columns=2)
                write_bytes(report.run_dir / "figures" / f"{name}.{file_format}", content)
    page = render(
        "report.html.j2",
        report=report,
        metrics=report.metrics,
        run=report.metrics.get("run") or {},
        headlines=headlines(report.metrics),
        not_reached=not_reached(report.metrics),
        models=evaluated_models(report.metrics),
        rows=comparison_rows(report.metrics),
        evidence=evidence(report.metrics),
        panels=panels,
        layers=_layer_rows(report.metrics),
        certainty=_certainty(report),
        load_lines=_load_lines(report.run_dir),
        speed_note="".join(speed_note(report.metrics)),
    )
    path = report.run_dir / "report.html"
    write_bytes(path, page.encode("utf-8"))
    return path


def report_panels(report: RunRecord) -> dict[str, list[Panel]]:
    """Make the charts of a run.

    Args:
        report: The run.

    Returns:
        Charts per part of the page: "widths", "masks", "evolution", "training", "quality", "cost"; empty where data is
        missing.
    """
    return {
        "widths": _width_panels(report.metrics),
        "masks": [_mask_panel(kind, grid) for kind, grid in report.masks.items() if any(grid)],
        "evolution": _evolution_panels(report),
        "training": _training_panels(report),
        "quality": _quality_panels(report.metrics),
        "cost": _cost_panels(report.metrics),
    }


def _width_panels(metrics: Mapping[str, Any]) -> list[Panel]:
    columns = _width_columns(metrics)
    if not columns:
        return []
    heads, dense_heads = columns["num_attention_heads"]
    groups, dense_groups = columns["num_key_value_heads"]
    channels, dense_channels = columns["intermediate_size"]
    dots = (groups, "KV heads kept") if dense_groups != dense_heads else (None, "")
    return [
        charts.widths_panel(
            "width-heads", "Attention heads left in each layer", "query heads", heads, dense_heads, *dots
        ),
        charts.widths_panel("width-channels", "FFN channels left in each layer", "channels", channels, dense_channels),
    ]


def _width_columns(metrics: Mapping[str, Any]) -> dict[str, tuple[list[int], list[int]]]:
    pruned, dense = metrics.get("widths") or [], metrics.get("dense_widths") or []
    if not pruned or len(pruned) != len(dense):
        return {}
    return {
        key: ([int(w.get(key) or 0) for w in pruned], [int(w.get(key) or 0) for w in dense]) for key in _WIDTH_NAMES
    }


def _layer_rows(metrics: Mapping[str, Any]) -> list[list[tuple[int, int]]]:
    """Per layer, the kept and the dense figure of each width."""
    columns = _width_columns(metrics).values()
    return [
        list(layer) for layer in zip(*(list(zip(kept, dense, strict=True)) for kept, dense in columns), strict=True)
    ]


def _mask_panel(kind: str, grid: list[list[int]]) -> Panel:
    name, words = "mask-" + re.sub(r"\W+", "-", kind), kind.replace("_", " ")
    if kind != "channels" and max(map(len, grid)) <= _HEADS_PICTURED:
        return mask_panels.mask_panel(name, f"Which {words} were kept", words, grid)
    return mask_panels.share_panel(name, f"Share of {words} kept", words, grid)


def _training_panels(report: RunRecord) -> list[Panel]:
    def logged(columns: Mapping[str, str]) -> dict[str, Curve | None]:
        return {label: report.curves.get(column) for label, column in columns.items()}

    sparsity = {
        label: _times(100, curve)
        for label, curve in logged({"actual": "mask/sparsity", "target": "mask/target_sparsity"}).items()
    }
    kept = {kind: _kept_percent(report, kind) for kind in ("heads", "channels")}
    losses = [name for name in report.curves if re.fullmatch(r"train/(loss|.*_loss|group_lasso)", name)]
    parts = {name.removeprefix("train/").removesuffix("_loss"): name for name in losses if name != "train/budget_loss"}
    specs: list[tuple[str, str, dict[str, Curve | None], bool]] = [
        ("Training loss and its parts", "loss", logged(parts), False),
        ("Sparsity against its target", "removed from blocks (%)", sparsity, True),
        ("Heads and channels kept", "kept (% of dense)", kept, True),
        ("Budget term of the loss", "budget loss", logged({"budget": "train/budget_loss"}), False),
        ("Multipliers of the budget", "multiplier", _numbered(report, "mask/lambda_"), False),
        ("Perplexity on validation data", "perplexity", logged({"validation": "val/perplexity"}), False),
        ("Gradient norms before clipping", "norm", _numbered(report, "grad_norm/"), False),
        ("Learning rates", "learning rate", _numbered(report, "lr/"), False),
        ("Speed of training", "tokens per second", logged({"tokens per second": "train/tokens_per_second"}), False),
        ("Memory while training", "MiB", _numbered(report, "memory/"), False),
    ]
    panels: list[Panel] = []
    for title, unit, candidates, percent in specs:
        curves = {label: curve for label, curve in candidates.items() if curve and any(map(math.isfinite, curve[1]))}
        if curves and (unit != "budget loss" or any(any(values) for _, values in curves.values())):
            name = f"training-{len(panels)}"
            panels.append(charts.curves_panel(name, title, unit, curves, report.phases, percent))
    return panels


def _numbered(report: RunRecord, prefix: str) -> dict[str, Curve | None]:
    """Curves whose names start alike, by what follows."""
    found = {name.removeprefix(prefix): curve for name, curve in report.curves.items() if name.startswith(prefix)}
    return {name.removesuffix("_mib").replace("_", " "): curve for name, curve in found.items()}


def _evolution_panels(report: RunRecord) -> list[Panel]:
    """Share kept by layer and step, per kind of unit; then how undecided and how restless the masks were."""
    panels = []
    for kind, rows in report.masks.items():
        curves = [report.curves.get(f"{kind}_kept/layer_{layer:02d}") for layer in range(len(rows))]
        shares = [
            (curve[0], [value / len(row) for value in curve[1]])
            for curve, row in zip(curves, rows, strict=True)
            if curve is not None and row
        ]
        if shares and len(shares) == len(rows):
            words = kind.replace("_", " ")
            name = "evolution-" + re.sub(r"\W+", "-", kind)
            panels.append(mask_panels.evolution_panel(name, f"Share of {words} kept, by layer and step", words, shares))
    specs = {
        ("Indecision of the masks", "entropy (bits per unit)"): {"entropy": report.curves.get("mask/entropy")},
        ("Decisions changed", "units per step"): {
            "noise-free masks": report.curves.get("mask/flips"),
            "drawn masks": report.curves.get("mask/sampled_flips"),
        },
    }
    for (title, unit), candidates in specs.items():
        there = {label: curve for label, curve in candidates.items() if curve and any(map(math.isfinite, curve[1]))}
        if there:
            name = f"evolution-{len(panels)}"
            panels.append(charts.curves_panel(name, title, unit, there, report.phases))
    return panels


def _kept_percent(report: RunRecord, kind: str) -> Curve | None:
    """Scale a logged count of kept units to percent; what was logged as a fraction is read as one."""
    curve = report.curves.get(f"mask/{kind}_kept")
    if curve is None:
        return None
    peak = max((value for value in curve[1] if math.isfinite(value)), default=0.0)
    name = "num_attention_heads" if kind == "heads" else "intermediate_size"
    columns = _width_columns(report.metrics)
    dense = sum(columns[name][1]) if columns else 0
    total = 1.0 if peak <= 1.0 else max(dense, peak / 1.02)
    return _times(100 / total, curve)


def _times(factor: float, curve: Curve | None) -> Curve | None:
    return curve and (curve[0], [factor * value for value in curve[1]])


def _quality_panels(metrics: Mapping[str, Any]) -> list[Panel]:
    models = evaluated_models(metrics)
    scores: dict[str, dict[str, float]] = {}
    for metric in metric_names(metrics):
        found = {model_label(model): number(metrics, "eval", model, metric) for model in models}
        scores[metric] = {label: value for label, value in found.items() if value is not None}
    higher = {metric: row for metric, row in scores.items() if not lower_is_better(metric)}
    fractions = {metric: row for metric, row in higher.items() if all(0 <= v <= 1 + 1e-6 for v in row.values())}
    labels = [model_label(model) for model in models]
    panels: list[Panel] = []
    if fractions:
        unit = "score (higher is better)"
        panels.append(charts.quality_panel("quality-tasks", "Task metrics on held-out data", unit, fractions, labels))
    chosen = {metric: row for metric, row in scores.items() if metric.rsplit("/", 1)[-1] == "perplexity" and row}
    if chosen:
        unit = "perplexity (lower is better)"
        panels.append(charts.quality_panel("quality-perplexity", "Perplexity on held-out data", unit, chosen, labels))
    return panels


def _cost_panels(metrics: Mapping[str, Any]) -> list[Panel]:
    items = []
    for label, dense_keys, pruned_keys, form in _COSTS:
        dense, pruned = number(metrics, *dense_keys), number(metrics, *pruned_keys)
        if dense and pruned is not None and math.isfinite(dense) and math.isfinite(pruned):
            items.append((label, 100 * pruned / dense, f"{form.format(pruned)}, dense {form.format(dense)}"))
    return [charts.relative_panel("cost", "What the pruned model costs", items)] if items else []


def _certainty(report: RunRecord) -> str:
    """Say how decided the gates were, where the scores are probabilities."""
    flat = [score for rows in report.scores.values() for row in rows for score in row]
    if not flat or not all(0 <= score <= 1 for score in flat):
        return ""
    sure = sum(score < 0.1 or score > 0.9 for score in flat) / len(flat)
    return f"{100 * sure:.1f}% of the {len(flat):,} gates ended with a keep probability below 0.1 or above 0.9."


def _load_lines(run_dir: Path) -> str:
    """Python that loads the exported model; empty if the run directory has none."""
    pruned = run_dir / "pruned"
    try:
        own_code = "auto_map" in json.loads((pruned / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return ""
    where = Path(os.path.relpath(pruned)) if pruned.resolve().is_relative_to(Path.cwd()) else pruned
    return load_lines(where.as_posix(), not own_code, adapter=(pruned / "adapter" / "adapter_config.json").is_file())
