"""The charts of one run: widths kept, how training went, how good the model is and what it costs.

Each function takes plain numbers and returns a `Panel` that says in words what it shows; `report` puts panels on a page
and into files. Marks differ in shape, dash or lightness as well as in colour, so that a grey print stays readable.

Pictures of masks are in `mask_panels`. It does not know run directories, record formats or pages.

Legend: L layers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.ticker import FuncFormatter, MaxNLocator

from atp.report.panel import Curve, Palette, Panel, legend

SMOOTH_ABOVE = 60  # points; curves with more get a running mean
MAX_POINTS = 600


def widths_panel(
    name: str,
    title: str,
    unit: str,
    kept: Sequence[int],
    dense: Sequence[int],
    dots: Sequence[int] | None = None,
    dots_label: str = "",
) -> Panel:
    """Chart of one width per layer against the dense model.

    Args:
        name: Panel identifier.
        title: Panel title.
        unit: What is counted, for the axis ("query heads").
        kept: Count per layer after pruning, length L.
        dense: Count per layer before pruning, length L.
        dots: A second count per layer drawn as diamonds, such as the KV heads left.
        dots_label: Legend text for `dots`.

    Returns:
        The panel.
    """

    def draw(ax: Axes, palette: Palette) -> None:
        layers = range(len(kept))
        ax.bar(layers, dense, 0.82, color=to_rgba(palette.faint, 0.35), label="dense")
        ax.bar(layers, kept, 0.82, color=palette.fill, label="kept")
        if dots is not None:
            ax.plot(layers, dots, "D", color=palette.series[1], markeredgecolor=palette.paper, ms=5, label=dots_label)
        if len(kept) <= 12:
            for layer, count in enumerate(kept):
                ax.text(layer, count, str(count), ha="center", va="bottom", fontsize=7.5)
        ax.set_ylim(0, max([*dense, *kept, 1]) * 1.08)
        ax.set_xlabel("layer (0 = first)")
        ax.set_ylabel(f"{unit} per layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        handles = ax.get_legend_handles_labels()[0]
        legend(ax, [*handles[-2:], *handles[:-2]])

    counts = "; ".join(f"layer {i}: {k} of {d}" for i, (k, d) in enumerate(zip(kept, dense, strict=True)))
    return Panel(name, title, f"Bar chart, {unit} kept of the dense model's. {counts}.", 2.5, draw)


def curves_panel(
    name: str,
    title: str,
    unit: str,
    curves: Mapping[str, Curve],
    marks: Sequence[tuple[float, str]] = (),
    percent: bool = False,
) -> Panel:
    """Chart of logged quantities over optimiser steps.

    Args:
        name: Panel identifier.
        title: Panel title.
        unit: Label of the vertical axis, with its unit.
        curves: Label to steps and values; values that are not finite are left out.
        marks: Step and name of each phase that starts during training.
        percent: Values are in percent: the axis starts at 0 and ends just above 100 or the largest value.

    Returns:
        The panel.
    """
    finite = {label: _finite(curve) for label, curve in curves.items()}
    finite = {label: curve for label, curve in finite.items() if curve[0]}

    def draw(ax: Axes, palette: Palette) -> None:
        for index, (label, (steps, values)) in enumerate(finite.items()):
            colour, dashes = palette.series[index % 5], ("-", "--", ":", "-.")[index % 4]
            marker = "o" if len(steps) < 3 else ""
            if len(steps) > SMOOTH_ABOVE and not percent:
                ax.plot(*_thin(steps, values), color=colour, linewidth=0.6, alpha=0.35)
                window = max(5, len(steps) // 30)
                values, label = _running_mean(values, window), f"{label}, mean of {window}"
            ax.plot(*_thin(steps, values), color=colour, linestyle=dashes, linewidth=1.7, marker=marker, label=label)
        if percent:
            ax.set_ylim(0, max([104.0, *(max(values) * 1.04 for _, values in finite.values())]))
            ax.set_yticks(range(0, 101, 20))
        ax.set_xlabel("optimiser step")
        ax.set_ylabel(unit)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        ax.grid(axis="y", color=palette.faint, linewidth=0.4, alpha=0.6)
        _phase_marks(ax, palette, marks)
        legend(ax)

    parts = [
        f"{label} from {v[0]:.4g} at step {s[0]:g} to {v[-1]:.4g} at step {s[-1]:g}" for label, (s, v) in finite.items()
    ]
    phases = "".join(f"; {label} from step {step:g}" for step, label in marks)
    return Panel(name, title, f"Line chart over steps, {unit}: {'; '.join(parts)}{phases}.", 2.5, draw)


def relative_panel(name: str, title: str, items: Sequence[tuple[str, float, str]]) -> Panel:
    """Bar chart of costs as a percentage of the dense model's.

    Args:
        name: Panel identifier.
        title: Panel title.
        items: Label, percent of the dense model's cost, and the figures in words, top to bottom.

    Returns:
        The panel.
    """

    def draw(ax: Axes, palette: Palette) -> None:
        ax.barh(range(len(items)), [percent for _, percent, _ in items], 0.5, color=palette.fill)
        ax.axvline(100, color=palette.ink, linewidth=1.0, linestyle="--")
        for row, (label, percent, text) in enumerate(items):
            ax.text(0.5, row - 0.3, f"{label}: {text}", va="bottom", fontsize=8)
            inside = percent > 12
            style: dict[str, Any] = {"ha": "right", "color": palette.paper} if inside else {"ha": "left"}
            ax.text(percent + (-1.2 if inside else 1.2), row, f"{percent:.0f}%", va="center", fontsize=8, **style)
        ax.set_yticks([])
        ax.set_ylim(len(items) - 0.4, -0.85)
        ax.set_xlim(0, max([100.0, *(percent for _, percent, _ in items)]) * 1.03)
        ax.set_xlabel("% of the dense base (dashed: 100%); shorter is cheaper")

    alt = "; ".join(f"{label} {percent:.1f}% ({text})" for label, percent, text in items)
    return Panel(
        name, title, f"Bar chart, pruned model in percent of the dense base: {alt}.", 0.8 + 0.42 * len(items), draw
    )


def quality_panel(
    name: str, title: str, unit: str, scores: Mapping[str, Mapping[str, float]], columns: Sequence[str]
) -> Panel:
    """Dot chart of measured quality: one row per metric, one mark per model.

    Args:
        name: Panel identifier.
        title: Panel title.
        unit: Label of the horizontal axis, saying which direction is better.
        scores: Metric to model label to value; values that are not finite are left out.
        columns: Model labels in the order of the legend.

    Returns:
        The panel. Its axis is logarithmic where the values span more than a factor of 20.
    """
    values = [v for row in scores.values() for v in row.values() if math.isfinite(v)]
    logarithmic = bool(values) and min(values) > 0 and max(values) / min(values) > 20

    def draw(ax: Axes, palette: Palette) -> None:
        _draw_scores(ax, palette, scores, columns)
        for row, metric in enumerate(scores):
            ax.text(0.012, row - 0.22, metric, transform=ax.get_yaxis_transform(), va="bottom", fontsize=8)
        ax.set_yticks(range(len(scores)), [])
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(len(scores) - 0.5, -0.75)
        ax.grid(axis="y", color=palette.faint, linewidth=0.4, alpha=0.6)
        ax.set_xlabel(unit)
        if logarithmic:
            ax.set_xscale("log", subs=[2, 5])
            for place in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
                place(FuncFormatter(lambda value, _: f"{value:g}"))
        legend(ax)

    parts = (f"{metric}: " + ", ".join(f"{c} {v:.4g}" for c, v in row.items()) for metric, row in scores.items())
    return Panel(name, title, f"Dot chart, {unit}. {'; '.join(parts)}.", 1.05 + 0.44 * len(scores), draw)


def _draw_scores(ax: Axes, palette: Palette, scores: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> None:
    """Marks of all models, a row per metric; references are hollow and of different sizes, as models often meet."""
    order = [column for column in columns if any(column in row for row in scores.values())]
    for index, column in enumerate(order):
        rows = enumerate(scores.values())
        points = [(row[column], y) for y, row in rows if math.isfinite(row.get(column, math.nan))]
        if not points:
            continue
        style: dict[str, Any] = {"color": palette.series[0], "markersize": 6.0, "zorder": 2}
        if column != "pruned":
            style = {"color": palette.series[(index + 2) % 5], "markersize": max(10.0 - 2.5 * index, 6.5), "zorder": 3}
            style |= {"markerfacecolor": "none", "markeredgewidth": 1.4}
        ax.plot(*zip(*points, strict=True), "osDv^"[index % 5], label=column, linestyle="", **style)


def _phase_marks(ax: Axes, palette: Palette, marks: Sequence[tuple[float, str]]) -> None:
    """Draw a line where each phase starts; names stand in two alternating rows above the curves."""
    if not marks:
        return
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top + 0.2 * (top - bottom))
    for index, (step, label) in enumerate(marks):
        ax.axvline(step, color=palette.ink, linewidth=0.8, linestyle=(0, (1, 2)))
        height = 0.99 - 0.085 * (index % 2)
        ax.text(step, height, f" {label}", transform=ax.get_xaxis_transform(), ha="left", va="top", fontsize=7.5)


def _finite(curve: Curve) -> tuple[list[float], list[float]]:
    pairs = [(step, value) for step, value in zip(*curve, strict=True) if math.isfinite(value)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _thin(steps: Sequence[float], values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    stride = math.ceil(len(steps) / MAX_POINTS)
    return (steps, values) if stride <= 1 else (steps[::stride], values[::stride])


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half = window // 2
    spans = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[b] - sums[a]) / (b - a) for a, b in spans]
