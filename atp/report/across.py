"""The page and the tables across runs: what `python -m atp.report` writes for a sweep or several run directories.

Brings together `runs` (reading, grouping, ranking), `pareto` (charts) and a template. It does not know how the figures
were measured.
"""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atp.atomic import write_bytes
from atp.errors import UserError
from atp.report import pareto, runs
from atp.report.comparison import lower_is_better, metric_names
from atp.report.html import render
from atp.report.panel import Panel, file_bytes
from atp.report.runs import FinishedRun, Group

LOSSES = (1.0, 2.0, 5.0, 10.0)
_COSTS = {
    "parameters": ("parameters of the whole model", ("parameters", "dense"), ("parameters", "pruned")),
    "latency": (
        "decoding (ms/token)",
        ("speed", "dense", "decode_latency_ms"),
        ("speed", "pruned", "decode_latency_ms"),
    ),
    "memory": ("weights in memory (MiB)", ("memory", "dense_weights_mib"), ("memory", "pruned_weights_mib")),
}


def write_across(
    found: Sequence[FinishedRun], left_out: Sequence[tuple[Path, str]], folder: Path, metric: str = "perplexity"
) -> Path:
    """Write `report.html`, `table.md`, `table.csv` and the charts as pictures.

    Args:
        found: Finished runs, at least one.
        left_out: Run directories that are not part of it, with the reason.
        folder: Where to write.
        metric: Quality metric of the charts.

    Returns:
        Path of the page.

    Raises:
        ValueError: If no run has the metric; the message names those there are.
    """
    known = list(dict.fromkeys(name for run in found for name in metric_names(run.metrics)))
    if metric not in known:
        raise UserError(f"--metric {metric}: no run has it; there are {', '.join(known) or 'none'}")
    groups = runs.group_runs(found)
    columns, rows = runs.table(groups, [metric])
    panels = across_panels(groups, metric)
    page = render(
        "across.html.j2",
        title=f"{folder.resolve().name}: {len(found)} runs",
        columns=columns,
        rows=rows,
        numbered=list(enumerate(groups, 1)),
        panels=panels,
        by_ratio=varies_in_ratio(groups),
        budgets=budget_lines(groups, metric),
        warning=runs.data_differs(found),
        links=[[(_told(run), _link(run.path, folder)) for run in group.runs] for group in groups],
        left_out=left_out,
        metric=metric,
    )
    write_bytes(folder / "table.md", _markdown(columns, rows).encode())
    write_bytes(folder / "table.csv", _csv(groups).encode())
    if panels:
        write_bytes(folder / "figures" / "pareto.png", file_bytes(panels, "png", columns=2))
    path = folder / "report.html"
    write_bytes(path, page.encode("utf-8"))
    return path


def across_panels(groups: Sequence[Group], metric: str) -> list[Panel]:
    """Charts across groups of runs: quality against each cost that was measured, and settings side by side."""
    panels, by_ratio = [], varies_in_ratio(groups)
    lower = lower_is_better(metric)
    direction = "lower" if lower else "higher"
    for name, (label, dense_keys, pruned_keys) in _COSTS.items():
        points = []
        for group in groups:
            cost, quality = group.figure(*pruned_keys), group.figure("eval", "pruned", metric)
            if cost and quality:
                deviations = (cost.deviation or 0.0, quality.deviation or 0.0)
                mark = f"{_mean(group, 'sparsity', 'target') or 0:.0%}" if by_ratio else ""
                points.append(pareto.Point(group.label, cost.mean, quality.mean, *deviations, quality.count, mark))
        if points:
            title, axis = f"Quality against {name}", f"{metric} ({direction} is better)"
            references = _references(groups, dense_keys, metric)
            panels.append(pareto.pareto_panel(f"pareto-{name}", title, label, axis, points, references, lower))
    return [*panels, *_parallel(groups, metric)]


def varies_in_ratio(groups: Sequence[Group]) -> bool:
    """Whether the groups differ in their target sparsity only, so that it names them."""
    return all(set(group.settings) == {"prune.sparsity"} for group in groups)


def _parallel(groups: Sequence[Group], metric: str) -> list[Panel]:
    """Chart varied settings beside results, one line per group; none where nothing was varied."""
    settings = [key for key in dict.fromkeys(key for group in groups for key in group.settings) if key != "name"]
    with_result = [group for group in groups if group.figure("eval", "pruned", metric)]
    if not settings or len(with_result) < 2:
        return []
    outcomes = {"parameters": ("parameters", "pruned"), "decode_ms": ("speed", "pruned", "decode_latency_ms")}
    outcomes |= {"recovery_%": (runs.reference(groups)[0], "mean"), metric: ("eval", "pruned", metric)}
    outcomes = {name: keys for name, keys in outcomes.items() if all(group.figure(*keys) for group in with_result)}
    rows = [
        [*(group.settings.get(key) for key in settings), *(_mean(group, *keys) for keys in outcomes.values())]
        for group in with_result
    ]
    labels = [group.label for group in with_result]
    return [pareto.parallel_panel("parallel", "Settings and results", [*settings, *outcomes], rows, labels)]


def _references(groups: Sequence[Group], cost: tuple[str, ...], metric: str) -> list[tuple[str, float, float]]:
    """Dense models, as means over all runs that measured them."""
    everything = Group("", {}, tuple(run for group in groups for run in group.runs))
    x, found = everything.figure(*cost), []
    for key, label in (("dense", "dense base"), ("dense_lora", "dense + LoRA")):
        y = everything.figure("eval", key, metric)
        if x and y:
            found.append((label, x.mean, y.mean))
    return found


def budget_lines(groups: Sequence[Group], metric: str) -> list[tuple[str, str]]:
    """Say in sentences how small a model may get within a given loss, and which is best at each size."""
    _, against = runs.reference(groups)
    lines = []
    for loss in LOSSES:
        best = runs.smallest_within(groups, loss)
        answer = "none of these runs"
        if best is not None:
            answer = f"{best.label} ({pareto.short_number(_mean(best, 'parameters', 'pruned') or 0)} parameters)"
        lines.append((f"smallest model within {loss:g}% of {against} (mean recovery)", answer))
    for group in runs.best_per_size(groups, metric):
        target, quality = _mean(group, "sparsity", "target") or 0.0, _mean(group, "eval", "pruned", metric)
        lines.append((f"best {metric} at a target of {target:.0%}", f"{group.label} ({quality:.4g})"))
    return lines


def _mean(group: Group, *keys: str) -> float | None:
    spread = group.figure(*keys)
    return None if spread is None else spread.mean


def _told(run: FinishedRun) -> str:
    told: Mapping[str, Any] = run.metrics.get("run") or {}
    return f"{told.get('name') or run.path.name}, seed {told.get('seed', '?')}"


def _link(path: Path, folder: Path) -> str:
    page = path / "report.html"
    target = page if page.is_file() else path
    return Path(os.path.relpath(target.resolve(), folder.resolve())).as_posix()


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _csv(groups: Sequence[Group]) -> str:
    """One row per run, all figures unrounded: what a notebook or a spreadsheet reads."""
    settings = list(dict.fromkeys(key for group in groups for key in group.settings))
    figures = list(
        dict.fromkeys(key for group in groups for run in group.runs for key in runs.flatten(_numbers(run.metrics)))
    )
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["run", "group", "seed", *settings, *figures])
    for group in groups:
        for run in group.runs:
            flat = runs.flatten(_numbers(run.metrics))
            seed = (run.metrics.get("run") or {}).get("seed")
            own = [group.settings.get(key) for key in settings]
            writer.writerow([run.path, group.label, seed, *own, *(flat.get(key) for key in figures)])
    return buffer.getvalue()


def _numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    wanted = ("sparsity", "parameters", "eval", "recovery", "recovery_vs_dense", "macs", "memory", "files", "speed")
    return {key: _only_numbers(metrics[key]) for key in wanted if isinstance(metrics.get(key), Mapping)}


def _only_numbers(node: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _only_numbers(value) if isinstance(value, Mapping) else value
        for key, value in node.items()
        if isinstance(value, (Mapping, int, float)) and not isinstance(value, bool)
    }
