"""Charts of one run: what was kept, where it was cut, how training went, what it costs.

Sits at level 0 beside `report`, which hands it plain numbers and puts the results into a page or into files. A `Panel` is one
chart that can be drawn twice: with real colours for a PNG or SVG file, or with placeholder colours that become CSS
variables, so that an SVG inside a page follows the reader's light or dark theme. Nothing here touches pyplot's state.

It does not know run directories, file formats of records, or HTML pages.

Legend: L layers, U units of one kind in a layer (heads or channels), F ffn width.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

WIDTH_IN = 4.6  # narrow on purpose: scaled to a phone's width the 9 pt labels stay readable
SHARE_BINS = 32
SMOOTH_ABOVE = 60  # points; noisier curves than this get a running mean
MAX_POINTS = 600

_STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "legend.borderpad": 0.0,
    "legend.handlelength": 2.2,
    "savefig.transparent": True,
    "text.parse_math": False,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Palette:
    """Colours of one rendering, as matplotlib colour strings.

    Attributes:
        ink: Text, axes and outlines that must be read.
        faint: Grid lines, outlines of what was cut.
        fill: What was kept.
        paper: Background behind marks.
        series: Line and marker colours, in order; they differ in lightness too.
    """

    ink: str
    faint: str
    fill: str
    paper: str
    series: tuple[str, ...]


PAPER = Palette("#1b1f24", "#8b949e", "#1f4e9c", "#ffffff", ("#1f4e9c", "#c2570c", "#6b7480", "#8a3f9e", "#2c8a66"))
THEMED = Palette("#010101", "#020202", "#030303", "#040404", ("#050505", "#060606", "#070707", "#080808", "#090909"))
CSS_COLOURS = {
    "#010101": "currentColor",
    "#020202": "var(--faint)",
    "#030303": "var(--fill)",
    "#040404": "var(--paper)",
    **{colour: f"var(--s{number})" for number, colour in enumerate(THEMED.series, start=1)},
}

Curve = tuple[Sequence[float], Sequence[float]]
"""Steps and values of one logged quantity, same length."""


@dataclass(frozen=True)
class Panel:
    """One chart, not yet drawn.

    Attributes:
        name: Identifier, unique within a page; letters, digits and hyphens.
        title: What the chart shows, in one line.
        alt: Text alternative that gives the figures in words.
        height_in: Height in inches; the width is `WIDTH_IN`.
        draw: Draws the chart, without its title, on axes in the colours of a palette.
    """

    name: str
    title: str
    alt: str
    height_in: float
    draw: Callable[[Axes, Palette], None]


def inline_svg(panel: Panel) -> str:
    """Render a panel as an SVG element for a page.

    Args:
        panel: The chart; its title is left to the page's caption.

    Returns:
        One `<svg>` element without prologue, namespaces or outside references. Text stays text, colours are the CSS
        variables named in `CSS_COLOURS`, identifiers are prefixed with the panel's name.
    """
    svg = _render([panel], "svg", THEMED, columns=1, titles=False).decode("utf-8")
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\sxmlns(:\w+)?=\"[^\"]*\"", "", svg).replace("xlink:href", "href")
    svg = re.sub(r"(?<=\bid=\")|(?<=\bhref=\"#)|(?<=url\(#)", f"{panel.name}-", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg role="img" aria-label="{_attribute(panel.alt)}" {box.group(0) if box else ""}>'
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg)
    for placeholder, css in CSS_COLOURS.items():
        svg = svg.replace(placeholder, css)
    return opening + svg[svg.index(">") + 1 :]


def file_bytes(panels: Sequence[Panel], file_format: str, columns: int = 1) -> bytes:
    """Render panels into one picture for a file, with titles, on white paper.

    Args:
        panels: Charts in reading order, at least one.
        file_format: "png" or "svg".
        columns: Charts side by side.

    Returns:
        The file's content.
    """
    return _render(panels, file_format, PAPER, columns=min(columns, len(panels)), titles=True)


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
        ax.bar(layers, dense, 0.82, facecolor="none", edgecolor=palette.ink, linewidth=0.7, label="dense")
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
        _legend(ax)

    counts = "; ".join(f"layer {i}: {k} of {d}" for i, (k, d) in enumerate(zip(kept, dense, strict=True)))
    return Panel(name, title, f"Bar chart, {unit} kept of the dense model's. {counts}.", 2.5, draw)


def mask_panel(name: str, title: str, unit: str, grid: Sequence[Sequence[int]]) -> Panel:
    """Picture of a mask: one row per layer, one cell per unit, filled if kept.

    Args:
        name: Panel identifier.
        title: Panel title.
        unit: What one cell is ("head").
        grid: 0 or 1 per unit and layer, L rows of U entries; rows may differ in length.

    Returns:
        The panel.
    """
    kept = [sum(row) for row in grid]
    alt = f"Grid of layers by {unit}s, a filled cell is kept. " + "; ".join(
        f"layer {i}: {k} of {len(row)} kept" for i, (k, row) in enumerate(zip(kept, grid, strict=True))
    )

    def draw(ax: Axes, palette: Palette) -> None:
        _cells(ax, palette, [[float(bit) for bit in row] for row in grid])
        ax.set_xlabel(f"{unit} (index in the dense model)")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(ax, [_swatch(palette, 1.0, "kept"), _swatch(palette, 0.0, "cut")])

    return Panel(name, title, f"{alt}.", _rows_height(len(grid)), draw)


def share_panel(name: str, title: str, unit: str, grid: Sequence[Sequence[int]]) -> Panel:
    """Picture of a wide mask: one row per layer, one cell per block of neighbouring units, shaded by the share kept.

    Args:
        name: Panel identifier.
        title: Panel title.
        unit: What is counted ("channel").
        grid: 0 or 1 per unit and layer, L rows of F entries; rows may differ in length.

    Returns:
        The panel.
    """
    shares = [_block_shares(row, SHARE_BINS) for row in grid]
    totals = [sum(row) / len(row) if row else 0.0 for row in grid]
    alt = f"Grid of layers by blocks of {unit}s, darker is a larger share kept. " + "; ".join(
        f"layer {i}: {100 * share:.0f}% kept" for i, share in enumerate(totals)
    )

    def draw(ax: Axes, palette: Palette) -> None:
        _cells(ax, palette, shares)
        if len(grid) <= 40:
            right = max((len(row) for row in shares), default=0)
            for layer, share in enumerate(totals):
                ax.text(right + 0.3, layer + 0.5, f"{100 * share:.0f}%", va="center", fontsize=7.5)
        ax.set_xlabel(f"{unit}s in index order, in {max((len(row) for row in shares), default=0)} blocks; % = row's share")
        ax.set_xticks([])
        _legend(ax, [_swatch(palette, level, f"{100 * level:.0f}% kept") for level in (0.0, 0.5, 1.0)])

    return Panel(name, title, f"{alt}.", _rows_height(len(grid)), draw)


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
        ax.set_xlabel("optimiser step")
        ax.set_ylabel(unit)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        ax.grid(axis="y", color=palette.faint, linewidth=0.4, alpha=0.6)
        _phase_marks(ax, palette, marks)
        _legend(ax)

    parts = [f"{label} from {v[0]:.4g} at step {s[0]:g} to {v[-1]:.4g} at step {s[-1]:g}" for label, (s, v) in finite.items()]
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
        rows = range(len(items))
        ax.barh(rows, [percent for _, percent, _ in items], 0.62, color=palette.fill)
        ax.axvline(100, color=palette.ink, linewidth=1.0, linestyle="--")
        for row, (_, percent, text) in enumerate(items):
            ax.text(2, row - 0.38, text, va="bottom", fontsize=7.5)
            ax.text(percent + 1.5, row, f"{percent:.0f}%", va="center", fontsize=8.5)
        ax.set_yticks(list(rows), [label for label, _, _ in items])
        ax.set_ylim(len(items) - 0.4, -0.8)
        ax.set_xlim(0, max([100.0, *(percent for _, percent, _ in items)]) * 1.12)
        ax.set_xlabel("% of the dense base (dashed line = 100%); shorter is cheaper")

    alt = "; ".join(f"{label} {percent:.1f}% ({text})" for label, percent, text in items)
    return Panel(name, title, f"Bar chart, pruned model in percent of the dense base: {alt}.", 0.75 + 0.42 * len(items), draw)


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
        order = [column for column in columns if any(column in row for row in scores.values())]
        for index, column in enumerate(order):
            points = [(row[column], y) for y, row in enumerate(scores.values()) if math.isfinite(row.get(column, math.nan))]
            if not points:
                continue
            colour, solid = palette.series[(index + 2) % 5], column == "pruned"
            style = {"color": palette.series[0] if solid else colour, "ms": 9.0 if solid else 6.5}
            ax.plot(*zip(*points, strict=True), "osDv^"[index % 5], label=column, **style, zorder=3 - solid)
        ax.set_yticks(range(len(scores)), list(scores))
        ax.set_ylim(len(scores) - 0.5, -0.5)
        ax.grid(axis="y", color=palette.faint, linewidth=0.4, alpha=0.6)
        ax.set_xlabel(unit)
        if logarithmic:
            ax.set_xscale("log")
        _legend(ax)

    parts = (f"{metric}: " + ", ".join(f"{c} {v:.4g}" for c, v in row.items()) for metric, row in scores.items())
    return Panel(name, title, f"Dot chart, {unit}. {'; '.join(parts)}.", 1.1 + 0.36 * len(scores), draw)


def _render(panels: Sequence[Panel], file_format: str, palette: Palette, columns: int, titles: bool) -> bytes:
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(panel.height_in for panel in row) + 0.25 * titles for row in rows]
    ink = {key: palette.ink for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    salt = {"svg.hashsalt": panels[0].name}
    with matplotlib.style.context(["default", {**_STYLE, **ink, **salt}]):
        figure = Figure(figsize=(WIDTH_IN * columns, sum(heights)), layout="constrained")
        axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        for panel, ax in zip(panels, axes.flat, strict=False):
            panel.draw(ax, palette)
            if titles:
                ax.set_title(panel.title, pad=20)
        buffer = io.BytesIO()
        options = {"dpi": 160, "facecolor": palette.paper, "transparent": False} if titles else {}
        metadata = {"Date": None} if file_format == "svg" else None
        figure.savefig(buffer, format=file_format, metadata=metadata, **options)
    return buffer.getvalue()


def _cells(ax: Axes, palette: Palette, grid: Sequence[Sequence[float]]) -> None:
    corners, colours = [], []
    gap = 0.08
    for layer, row in enumerate(grid):
        for unit, share in enumerate(row):
            left, right, top, bottom = unit + gap, unit + 1 - gap, layer + gap, layer + 1 - gap
            corners.append([(left, top), (right, top), (right, bottom), (left, bottom)])
            colours.append(to_rgba(palette.fill, share))
    ax.add_collection(PolyCollection(corners, facecolors=colours, edgecolors=palette.faint, linewidths=0.35))
    ax.set_xlim(0, max((len(row) for row in grid), default=1) or 1)
    ax.set_ylim(len(grid), 0)
    step = max(1, math.ceil(len(grid) / 16))
    ax.set_yticks([layer + 0.5 for layer in range(0, len(grid), step)], [str(n) for n in range(0, len(grid), step)])
    ax.set_ylabel("layer (0 = first)")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _swatch(palette: Palette, share: float, label: str) -> Patch:
    return Patch(facecolor=to_rgba(palette.fill, share), edgecolor=palette.faint, linewidth=0.6, label=label)


def _legend(ax: Axes, handles: list[Patch] | None = None) -> None:
    if handles or ax.get_legend_handles_labels()[0]:
        extra = {"handles": handles} if handles else {}
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, columnspacing=1.4, **extra)


def _phase_marks(ax: Axes, palette: Palette, marks: Sequence[tuple[float, str]]) -> None:
    for step, label in marks:
        ax.axvline(step, color=palette.ink, linewidth=0.8, linestyle=(0, (1, 2)))
        place = ax.get_xaxis_transform()
        ax.text(step, 0.99, f" {label}", transform=place, rotation=90, ha="left", va="top", fontsize=7.5)


def _rows_height(layers: int) -> float:
    return 1.0 + min(max(0.17 * layers, 0.7), 7.0)


def _block_shares(row: Sequence[int], bins: int) -> list[float]:
    count = min(bins, len(row))
    edges = [round(i * len(row) / count) for i in range(count + 1)] if count else []
    return [sum(row[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]


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


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
