"""Charts across runs: quality against cost with error bars, and hyper-parameters side by side.

Same manner as `figures`: plain numbers in, a `Panel` with its text alternative out. It does not know where the numbers
come from.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.ticker import FuncFormatter, MaxNLocator

from atp.report.panel import Palette, Panel, legend

_MARKS = "osD^vP*X"


@dataclass(frozen=True)
class Point:
    """One group of runs in a chart: cost and quality with their deviations over seeds (0 for a single run).

    Attributes:
        mark: Text beside the point; its number where that is empty.
    """

    label: str
    cost: float
    quality: float
    cost_deviation: float = 0.0
    quality_deviation: float = 0.0
    count: int = 1
    mark: str = ""


def pareto_front(points: Sequence[Point], lower_is_better: bool) -> list[Point]:
    """Points that no other one beats in both cost and quality, by rising cost."""
    sign = 1.0 if lower_is_better else -1.0
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, sign * p.quality)):
        if not front or sign * point.quality < sign * front[-1].quality:
            front.append(point)
    return front


def pareto_panel(
    name: str,
    title: str,
    cost: str,
    quality: str,
    points: Sequence[Point],
    references: Sequence[tuple[str, float, float]] = (),
    lower_is_better: bool = True,
) -> Panel:
    """Chart of quality against a cost.

    Args:
        name: Panel identifier.
        title: Panel title.
        cost: Label of the horizontal axis, with its unit; less is cheaper.
        quality: Label of the vertical axis.
        points: One per group of runs.
        references: Label, cost and quality of models to compare with, such as the dense base.
        lower_is_better: Direction of the quality.

    Returns:
        The panel.
    """

    def draw(ax: Axes, palette: Palette) -> None:
        _draw_points(ax, palette, points, pareto_front(points, lower_is_better))
        for index, (label, x, y) in enumerate(references):  # hollow and of different sizes: they often meet
            style: dict[str, Any] = {"markerfacecolor": "none", "markeredgewidth": 1.4, "linestyle": ""}
            size, colour = max(10.0 - 2.5 * index, 6.5), palette.series[(index + 2) % 5]
            ax.plot(x, y, _MARKS[index % 8], color=colour, markersize=size, label=label, **style)
        ax.set_xlabel(cost)
        ax.set_ylabel(quality)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        ax.grid(color=palette.faint, linewidth=0.4, alpha=0.6)
        legend(ax)

    told = [
        f"{i}: {p.label}: {short_number(p.cost)}, {p.quality:.4g}"
        + (f" plus or minus {p.quality_deviation:.2g} over {p.count} seeds" if p.count > 1 else "")
        for i, p in enumerate(points, 1)
    ]
    told += [f"{label}: {short_number(x)}, {y:.4g}" for label, x, y in references]
    return Panel(name, title, f"Scatter chart of {quality} against {cost}. {'; '.join(told)}.", 2.9, draw)


def _draw_points(ax: Axes, palette: Palette, points: Sequence[Point], front: Sequence[Point]) -> None:
    """Numbered groups with their error bars, and a dashed line through the best of them."""
    style: dict[str, Any] = {"color": palette.series[0], "linewidth": 1.2, "label": "front"}
    ax.plot([point.cost for point in front], [point.quality for point in front], "--", **style)
    for index, point in enumerate(points, 1):
        errors: dict[str, Any] = {"xerr": point.cost_deviation or None, "yerr": point.quality_deviation or None}
        marks: dict[str, Any] = {"color": palette.series[0], "capsize": 3, "markersize": 6, "elinewidth": 1.1}
        ax.errorbar(point.cost, point.quality, fmt="o", **errors, **marks)
        ax.annotate(
            point.mark or str(index), (point.cost, point.quality), (5, 5), textcoords="offset points", fontsize=8
        )


def parallel_panel(
    name: str, title: str, axes: Sequence[str], rows: Sequence[Sequence[Any]], labels: Sequence[str]
) -> Panel:
    """Parallel coordinates: one vertical axis per setting or figure, one line per group.

    Args:
        name: Panel identifier.
        title: Panel title.
        axes: Names; the last is the result, by whose rank lines are dashed and shaded.
        rows: One value per axis and group; numbers, or anything else as a category.
        labels: Name of each group, for the text alternative.

    Returns:
        The panel.
    """
    columns = [_positions([row[i] for row in rows]) for i in range(len(axes))]

    def draw(ax: Axes, palette: Palette) -> None:
        for index, row in enumerate(rows):
            heights = [columns[i][0][index] for i in range(len(row))]
            strength = 0.45 + 0.55 * (1.0 - heights[-1])
            dashes = ("-", "--", ":", "-.")[index % 4]
            ax.plot(range(len(axes)), heights, dashes, color=to_rgba(palette.fill, strength), linewidth=1.6)
            ax.text(len(axes) - 0.97, heights[-1], str(index + 1), va="center", fontsize=7.5)
        for i, (_, ticks) in enumerate(columns):
            ax.axvline(i, color=palette.faint, linewidth=0.8)
            last = i == len(columns) - 1  # its right side holds the numbers of the lines
            for height, text in ticks:
                offset = (-3 if last else 3, 3 if height < 0.5 else -3)
                style: dict[str, Any] = {"ha": "right" if last else "left", "va": "bottom" if height < 0.5 else "top"}
                ax.annotate(text, (i, height), offset, textcoords="offset points", fontsize=7.5, **style)
        ax.set_xticks(range(len(axes)), [axis.rpartition(".")[2].replace("_", "\n", 1) for axis in axes])
        ax.set_yticks([])
        ax.set_xlim(-0.15, len(axes) - 0.6)
        ax.tick_params(length=0)
        ax.spines["left"].set_visible(False)

    told = [
        f"{i}: {label}: " + ", ".join(f"{a} {_text(v)}" for a, v in zip(axes, row, strict=True))
        for i, (label, row) in enumerate(zip(labels, rows, strict=True), 1)
    ]
    return Panel(name, title, f"Parallel coordinates, one line per group of runs. {'; '.join(told)}.", 2.9, draw)


def short_number(value: float) -> str:
    """A figure in few characters: 1.23M, 4.56k, 0.789."""
    for power, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.3g}{unit}"
    return f"{value:.3g}"


def _positions(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Height in [0, 1] of each value, and the ticks of the axis; missing numbers lie at the bottom."""
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)]
    if len(numbers) == len([v for v in values if v is not None]) and numbers:
        low, high = min(numbers), max(numbers)
        span = (high - low) or 1.0
        ticks = [(0.0, _text(low)), (1.0, _text(high))] if high > low else [(0.0, _text(low))]
        return [0.0 if v is None else (v - low) / span for v in values], ticks
    names = sorted({_text(v) for v in values})
    step = 1.0 / max(len(names) - 1, 1)
    return [names.index(_text(v)) * step for v in values], [(i * step, name) for i, name in enumerate(names)]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return short_number(value) if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)
