"""Tables and heat map of the domains benchmark, made from its cells alone: what was measured before is shown beside."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CELLS = ("legal/clause", "legal/holding", "legal/bill", "health/inference")
MODELS = {
    "dense": "dense",
    "dense_lora": "dense + LoRA",
    "published": "two-stage",
    "taylor": "two-stage, repaired alike",
    "pruned": "joint",
}
PRESETS = {  # preset -> Tailored-LLaMA's own recovery at that ratio, in percent
    "tailored_20pct": 95.7,
    "tailored_joint_20pct": 95.7,
    "tailored_50pct": 86.6,
    "tailored_joint_50pct": 86.6,
}
CHANCES = {"casehold/accuracy": 0.2, "pubmedqa/accuracy": 1 / 3}
COMPARED = {"holding/accuracy": 100, "perplexity": 1}  # metric -> factor it is shown with

Cells = Mapping[str, Mapping[str, Any]]


def real(cells: Cells) -> list[str]:
    """Bits per byte by domain, share removed and model, then the task scores."""
    beside = ("published", "taylor")
    head = ["domain, removed", "model", "bits per byte", "95% interval"]
    head += [f"joint against {MODELS[rival]}, same documents" for rival in beside]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    tasks: list[str] = []
    for name in sorted(cells, key=lambda one: (not one.startswith("real/legal"), one)):
        cell, (domain, percent) = cells[name], re.findall(r"real/(\w+)_(\d+)pct", name)[0]
        for model, shown in MODELS.items():
            value, bounds = cell["eval"][model]["bits_per_byte"], cell["intervals"][model]["bits_per_byte"]
            row = [f"{domain}, {percent}%" if model == "dense" else "", shown, f"{value:.3f}"]
            row += [f"{bounds[0]:.3f} to {bounds[1]:.3f}"]
            row += [_difference(cell["paired"][rival]) if model == "pruned" else "" for rival in beside]
            lines.append("| " + " | ".join(row) + " |")
        tasks += _task_lines(f"{domain}, {percent}%", cell)
    scored = ["| domain, removed | score | items | " + " | ".join(MODELS.values()) + " | |"]
    scored += ["|---" * (len(MODELS) + 4) + "|"]
    return [*lines, "", "Task scores, reported though they tell little at this size:", "", *scored, *tasks]


def _difference(pair: Mapping[str, Any] | None) -> str:
    return f"{pair['difference']:+.4f} ± {pair['half_width']:.4f}" if pair else ""


def _task_lines(label: str, cell: Mapping[str, Any]) -> list[str]:
    lines = []
    for task in (key for key in cell["eval"]["pruned"] if key.endswith(("accuracy", "rougeL"))):
        values = [cell["eval"][model][task] for model in MODELS]
        chance = CHANCES.get(task)
        near = chance is not None and all(abs(value - chance) < 0.07 for value in values)
        told = f"near chance ({chance:.0%})" if near else ""
        scores = " | ".join(f"{100 * value:.1f}" for value in values)
        lines.append(f"| {label} | {task} | {cell['eval_counts'][task]} | {scores} | {told} |")
    return lines


def tailored(cells: Cells) -> list[str]:
    """Recovery by preset: mean and deviation over seeds, or one seed with the intervals over its items."""
    lines = ["| preset | seeds | recovery of dense, % | of dense + LoRA, % | accuracy, % | perplexity | goal |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for preset, goal in PRESETS.items():
        runs = _seeds(cells, preset)
        if not runs:
            continue
        whole = [_spread([run[key]["mean"] for run in runs.values()], 1) for key in ("recovery_vs_dense", "recovery")]
        seeds, shown = ", ".join(map(str, runs)), _scores(list(runs.values()), "pruned")
        lines.append(f"| `{preset}` | {seeds} | {whole[0]} | {whole[1]} | {shown} | {goal} |")
        lines.append(f"| its dense + LoRA | {seeds} | | 100 | {_scores(list(runs.values()), 'dense_lora')} | |")
    lines.append(f"| dense | | 100 | | {_scores(list(cells.values())[:1], 'dense')} | |")
    lines += [
        "",
        "Several seeds: mean ± standard deviation; one: 95% interval over its items. Goal: Tailored-LLaMA's own, "
        "over accuracies alone.",
    ]
    for ratio in ("20", "50"):
        for metric, factor in COMPARED.items():
            pairs = {seed: run["paired"][metric] for seed, run in _seeds(cells, f"tailored_joint_{ratio}pct").items()}
            shown = [
                f"{factor * pair['difference']:+.3g} ± {factor * pair['half_width']:.2g} (seed {seed})"
                for seed, pair in pairs.items()
                if pair
            ]
            if shown:
                lines.append(f"Joint against two-stage at {ratio}%, {metric}, same items: {', '.join(shown)}.")
    return lines


def _seeds(cells: Cells, preset: str) -> dict[int, Mapping[str, Any]]:
    found = {int(name.rpartition("_")[2]): name for name in cells if name.rpartition("_")[0] == f"tailored/{preset}"}
    return {seed: cells[name] for seed, name in sorted(found.items())}


def _scores(runs: Sequence[Mapping[str, Any]], model: str) -> str:
    shown = []
    for metric, (factor, digits) in {"holding/accuracy": (100, 1), "perplexity": (1, 3)}.items():
        text = _spread([factor * run["eval"][model][metric] for run in runs], digits)
        if len(runs) == 1:
            low, high = runs[0]["intervals"][model][metric]
            text += f" ({factor * low:.{digits}f} to {factor * high:.{digits}f})"
        shown.append(text)
    return " | ".join(shown)


def _spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def matrix(cells: Cells) -> list[str]:
    """Rows trained on, columns tested on; a task's own row stands out."""
    rows = _scored(cells)
    lines = ["| trained on \\ tested on | " + " | ".join(CELLS) + " |", "|---" * (1 + len(CELLS)) + "|"]
    for row, values in rows.items():
        shown = [
            f"**{value:.1f}**" if row == cell else f"{value:.1f}" for cell, value in zip(CELLS, values, strict=True)
        ]
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    items = cells[f"matrix/{next(iter(rows))}"]["items"]
    return [*lines, "| items | " + " | ".join(str(items[column]) for column in CELLS) + " |"]


def _scored(cells: Cells) -> dict[str, list[float]]:
    rows = [row for row in ("dense", *CELLS) if f"matrix/{row}" in cells]
    return {row: [cells[f"matrix/{row}"]["scores"][column] for column in CELLS] for row in rows}


def heat_map(cells: Cells, path: Path) -> None:
    """Draw the matrix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = _scored(cells)
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    image = axes.imshow(list(found.values()), cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(CELLS)), CELLS, rotation=20, ha="right")
    axes.set_yticks(range(len(found)), ["(dense, untuned)" if row == "dense" else row for row in found])
    axes.set_xlabel("tested on")
    axes.set_ylabel("pruned by half and tuned on")
    axes.set_title("Score by training task (%)")
    for row, line in enumerate(found.values()):
        for column, value in enumerate(line):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > 60 else "black")
    figure.colorbar(image, label="accuracy or ROUGE-L (%)")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def ablation(cells: Cells) -> list[str]:
    """The four combinations of the prompt."""
    lines = ["| prompt in training | at inference | perplexity | 95% interval | against neither, same items |"]
    lines[0] += " mean score, % | tokens added |"
    lines.append("|---" * 7 + "|")
    for name in sorted(cells):
        cell, (train, inference) = cells[name], re.findall(r"train_(\w+)_inference_(\w+)", name)[0]
        values, pair = cell["eval"], cell["paired"]
        scores = [value for key, value in values.items() if key.endswith(("accuracy", "rougeL"))]
        low, high = cell["intervals"]["perplexity"]
        tokens = cell["prompt"]["tokens_added"] if inference == "yes" else 0
        beside = f"{pair['difference']:+.4f} ± {pair['half_width']:.4f}" if pair else ""
        shown = f"{values['perplexity']:.4f} | {low:.4f} to {high:.4f} | {beside}"
        lines.append(f"| {train} | {inference} | {shown} | {100 * statistics.mean(scores):.1f} | {tokens:g} |")
    return lines
