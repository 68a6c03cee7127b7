"""The quality benchmark's findings: means and spreads over seeds, excess loss, targets, table and plot.

Reads finished cells only. Excess loss is nats per token above dense + LoRA on held-out text, the difference taken seed
by seed; every method stands at the rate with the lowest *validation* loss.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

TWO_STAGE = ("taylor", "taylor_global", "wanda", "fluctuation", "magnitude", "uniform", "random", "random_uniform")
Row = dict[str, Any]
_TITLE_INCHES = 0.4


def best_rate(cells: Iterable[Mapping[str, Any]]) -> float:
    """The rate with the lowest mean validation loss, among those that most seeds have."""
    by_rate: dict[float, list[float]] = defaultdict(list)
    for cell in cells:
        by_rate[cell["cell"]["lr"]].append(cell["validation_loss"])
    most = max(map(len, by_rate.values()))
    return min((r for r, losses in by_rate.items() if len(losses) == most), key=lambda r: statistics.mean(by_rate[r]))


def summarise(cells: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row per setting, sparsity, method and arm, at its best rate."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for cell in cells:
        of = cell["cell"]
        groups[of["setting"], of["sparsity"], of["method"], of["arm"], of["steps"]].append(cell)
    rows = [_row(key, found) for key, found in groups.items()]
    tuned = {(row["setting"], row["steps"]): row for row in rows if row["method"] == "dense_lora"}
    for row in rows:  # runs stretched to equal time stand against the reference of the usual length
        usual = [reference for (setting, _), reference in tuned.items() if setting == row["setting"]]
        reference = tuned.get((row["setting"], row["steps"]), usual[0] if usual else None)
        if reference is not None:
            shared = row["losses"].keys() & reference["losses"].keys()
            excess = [row["losses"][seed] - reference["losses"][seed] for seed in sorted(shared)]
            row["excess"], row["excess_sd"] = _mean_sd(excess)
            row["recovery"] = _recovery(row["values"], reference["values"])
    return sorted(rows, key=lambda r: (r["setting"], r["sparsity"], r.get("excess", 0.0)))


def targets(rows: Sequence[Row], default: str) -> list[str]:
    """How the default preset's excess loss stands to the best two-stage method's, in words.

    Each arm of the default is held against the two-stage methods of that arm; the preset as it comes is also held
    against those of every other arm, since some of what may be added to them is part of the preset.
    """
    lines = []
    for mine in (row for row in rows if row["method"] == default and "excess" in row):
        here = [r for r in two_stage_rows(rows, mine["setting"], mine["sparsity"]) if "excess" in r]
        for arm in sorted({r["arm"] for r in here} if not mine["arm"] else {mine["arm"]}):
            rivals = [r for r in here if r["arm"] == arm]
            for steps, how in ((True, "equal tokens"), (False, "other steps")):
                lines += _against(mine, [r for r in rivals if (r["steps"] == mine["steps"]) is steps], how)
    return lines


def _against(mine: Row, rivals: Sequence[Row], how: str) -> list[str]:
    """One line on a row and the best of its rivals; none without a rival."""
    if not rivals:
        return []
    best = min(rivals, key=lambda r: r["excess"])
    ratio = mine["excess"] / best["excess"] if best["excess"] > 0 else float("nan")
    speed = mine["fit_seconds"] / max(best["fit_seconds"], 1e-9)
    return [
        f"{mine['setting']} {mine['sparsity']:.0%}: {_name(mine)} {mine['excess']:.3f} vs best two-stage "
        f"{_label(best)} {best['excess']:.3f} nats = {ratio:.2f}x at {how} (its training took {speed:.2f}x the time)"
    ]


def _name(row: Row) -> str:
    return " + ".join(filter(None, [row["method"], row["arm"]]))


def _label(row: Row) -> str:
    return " + ".join(filter(None, [_name(row), f"{row['steps']} steps" if row["steps"] else ""]))


def two_stage_rows(rows: Sequence[Row], setting: str, sparsity: float) -> list[Row]:
    """The two-stage rows of a setting and sparsity, with whatever is added to them."""
    return [r for r in rows if is_two_stage(r["method"]) and (r["setting"], r["sparsity"]) == (setting, sparsity)]


def table(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    names = ("setting", "sparsity", "method", "lr", "seeds", "loss, nats/token", "excess", "bits/byte", "recovery %")
    head = "| " + " | ".join([*names, "M parameters", "fit, s"]) + " |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for row in rows:
        name = _label(row)
        excess = f"{row['excess']:.3f} ± {row['excess_sd']:.3f}" if "excess" in row else ""
        recovery = f"{row['recovery']:.1f}" if row.get("recovery") is not None else ""
        cells = [row["setting"], f"{row['sparsity']:.0%}", name, f"{row['lr']:g}", len(row["losses"])]
        cells += [
            f"{row['loss']:.3f} ± {row['loss_sd']:.3f}",
            excess,
            f"{row['values']['bits_per_byte']:.3f}",
            recovery,
        ]
        cells += [f"{row['parameters'] / 1e6:.2f}" if row["parameters"] else "", f"{row['fit_seconds']:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Excess loss of every method, one panel per setting and sparsity, bars of one standard deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if "excess" in row and row["method"] not in ("dense", "dense_lora")]
    panels = sorted({(row["setting"], row["sparsity"]) for row in shown})
    if not panels:
        return
    across = min(len(panels), 3)
    counts = [sum((r["setting"], r["sparsity"]) == panel for r in shown) for panel in panels]
    heights = [1.4 + 0.28 * max(counts[first : first + across]) for first in range(0, len(panels), across)]
    size = (4.9 * across, sum(heights) + _TITLE_INCHES)
    figure, axes = pyplot.subplots(len(heights), across, figsize=size, squeeze=False, height_ratios=heights)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, panel in zip(axes.flat, panels, strict=False):
        _panel(ax, [r for r in shown if (r["setting"], r["sparsity"]) == panel])
        ax.set(title=f"{panel[0]}, {panel[1]:.0%} removed", xlabel="excess loss, nats per token")
    figure.suptitle(
        "filled: joint, open: two-stage or control; in brackets: seeds; less is better; wide ranges on a log scale",
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - _TITLE_INCHES / size[1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(ax: Any, rows: Sequence[Row]) -> None:
    from matplotlib import ticker

    rows = sorted(rows, key=lambda r: -r["excess"])
    for place, row in enumerate(rows):
        style = {"color": "#2166ac", "marker": "o"}
        if is_two_stage(row["method"]) or row["method"] in ("shuffled", "scratch"):
            style = {"color": "#b2182b", "marker": "s", "mfc": "white"}
        ax.errorbar(row["excess"], place, xerr=row["excess_sd"], capsize=3, **style)
    ax.set_yticks(range(len(rows)), [f"{_label(r)} ({len(r['losses'])})" for r in rows])
    nearest = min(r["excess"] - r["excess_sd"] for r in rows)
    farthest = max(r["excess"] + r["excess_sd"] for r in rows)
    if nearest > 0 and 3 * rows[-1]["excess"] < farthest:  # one method far off would squeeze the others together
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        ax.set_xlim(min(0, 1.1 * nearest), 1.1 * farthest)
    ax.grid(axis="x", alpha=0.3)


def _row(key: tuple[Any, ...], cells: Sequence[Mapping[str, Any]]) -> Row:
    setting, sparsity, method, arm, steps = key
    rate = best_rate(cells)
    at_best = [cell for cell in cells if cell["cell"]["lr"] == rate]
    losses = {cell["cell"]["seed"]: cell["loss"] for cell in at_best}
    mean, spread = _mean_sd(list(losses.values()))
    names = set.intersection(*(set(cell["values"]) for cell in at_best))
    return {
        "setting": setting,
        "sparsity": sparsity,
        "method": method,
        "arm": arm,
        "steps": steps,
        "lr": rate,
        "losses": losses,
        "loss": mean,
        "loss_sd": spread,
        "values": {name: statistics.mean(cell["values"][name] for cell in at_best) for name in sorted(names)},
        "parameters": statistics.mean(cell["parameters"] for cell in at_best),
        "reached": statistics.mean(cell["sparsity"] for cell in at_best),
        "fit_seconds": statistics.mean(cell["fit_seconds"] for cell in at_best),
        "rates_tried": sorted({cell["cell"]["lr"] for cell in cells}),
    }


def _recovery(values: Mapping[str, float], reference: Mapping[str, float]) -> float | None:
    from atp.evaluate.metrics import recovery

    return recovery(values, reference).get("mean")


def is_two_stage(method: str) -> bool:
    """Whether a method cuts without training the choice jointly."""
    return method in TWO_STAGE or method == "loraprune"


def _mean_sd(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
