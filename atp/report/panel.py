"""One chart, drawn on demand: as an SVG element that follows a page's theme, or into a picture file on white paper.

A `Panel` holds what to draw and its text alternative. It is rendered with real colours for a PNG or SVG file, or with
placeholder colours that become CSS variables, so that a chart inside a page follows the reader's light or dark theme.
Figures are made without pyplot, so nothing here leaves state behind or needs a display.

It does not know what the charts show (`charts` does), nor pages and run directories.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH_IN = 4.6  # narrow on purpose: scaled to a phone's width the 9 pt labels stay readable

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

Curve = tuple[Sequence[float], Sequence[float]]
"""Steps and values of one logged quantity, same length."""


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

    def _repr_png_(self) -> bytes:
        """Show the chart in a notebook."""
        return file_bytes([self], "png")


@dataclass(frozen=True)
class Gallery:
    """Several charts as one picture, for notebooks.

    Attributes:
        panels: Charts in reading order, at least one.
        columns: Charts side by side.
    """

    panels: Sequence[Panel]
    columns: int = 2

    def _repr_png_(self) -> bytes:
        """Show the charts in a notebook."""
        return file_bytes(list(self.panels), "png", self.columns)


def legend(ax: Axes, handles: Sequence[Artist] = ()) -> None:
    """Put a legend above the axes: of some artists, or of what carries a label; nothing where there is neither."""
    if handles or ax.get_legend_handles_labels()[0]:
        extra: dict[str, Any] = {"handles": handles} if handles else {}
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, columnspacing=1.4, **extra)


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


def _render(panels: Sequence[Panel], file_format: str, palette: Palette, columns: int, titles: bool) -> bytes:
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(panel.height_in for panel in row) + 0.25 * titles for row in rows]
    ink = {
        key: palette.ink for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    }
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
        options: dict[str, Any] = {"dpi": 160, "facecolor": palette.paper, "transparent": False} if titles else {}
        metadata = {"Date": None} if file_format == "svg" else None
        figure.savefig(buffer, format=file_format, metadata=metadata, **options)
    return buffer.getvalue()


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
