"""Pictures of masks for the page of a run: which units were kept, and how that came about over training.

One row per layer, one cell per unit, block of units or logged step, in the same manner as `figures`: plain numbers in,
a `Panel` with its text alternative out. Small rasters for the loggers are in `mask_picture`.

It does not know run directories, record formats or pages.

Legend: L layers, U units of one kind in a layer (heads or channels), F ffn width.
"""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as Outline

from atp.report.mask_picture import block_shares
from atp.report.panel import Curve, Palette, Panel, legend

SHADES = 20  # steps of lightness in the picture of shares
EVOLUTION_COLUMNS = 40


def mask_panel(name: str, title: str, unit: str, grid: Sequence[Sequence[int]]) -> Panel:
    """Picture of a mask: one row per layer, one cell per unit, filled if kept.

    Args:
        name: Panel identifier.
        title: Panel title.
        unit: What the cells are, in the plural ("heads").
        grid: 0 or 1 per unit and layer, L rows of U entries; rows may differ in length.

    Returns:
        The panel.
    """
    kept = [sum(row) for row in grid]
    alt = f"Grid of layers by {unit}, a filled cell is kept. " + "; ".join(
        f"layer {i}: {k} of {len(row)} kept" for i, (k, row) in enumerate(zip(kept, grid, strict=True))
    )

    def draw(ax: Axes, palette: Palette) -> None:
        _cells(ax, palette, [[float(bit) for bit in row] for row in grid])
        units = max(map(len, grid), default=0)
        step = max(1, math.ceil(units / 16))
        ax.set_xticks([unit + 0.5 for unit in range(0, units, step)], [str(n) for n in range(0, units, step)])
        ax.set_xlabel(f"{unit} (index in the dense model)")
        legend(ax, [_swatch(palette, 1.0, "kept"), _swatch(palette, 0.0, "cut")])

    return Panel(name, title, f"{alt}.", _rows_height(len(grid)), draw)


def share_panel(name: str, title: str, unit: str, grid: Sequence[Sequence[int]]) -> Panel:
    """Picture of a wide mask: one row per layer, one cell per block of neighbouring units, shaded by the share kept.

    Args:
        name: Panel identifier.
        title: Panel title.
        unit: What is counted, in the plural ("channels").
        grid: 0 or 1 per unit and layer, L rows of F entries; rows may differ in length.

    Returns:
        The panel.
    """
    shares = [block_shares(row) for row in grid]
    totals = [sum(row) / len(row) if row else 0.0 for row in grid]
    alt = f"Grid of layers by blocks of {unit}, a stronger shade is a larger share kept. " + "; ".join(
        f"layer {i}: {100 * share:.0f}% kept" for i, share in enumerate(totals)
    )

    def draw(ax: Axes, palette: Palette) -> None:
        _cells(ax, palette, shares)
        if len(grid) <= 40:
            right = max((len(row) for row in shares), default=0)
            for layer, share in enumerate(totals):
                ax.text(right + 0.3, layer + 0.5, f"{100 * share:.0f}%", va="center", fontsize=7.5)
        ax.set_xlabel(f"{unit} in index order, in blocks of neighbours" + "; right: whole layer" * (len(grid) <= 40))
        ax.set_xticks([])
        legend(ax, [_swatch(palette, level, f"{100 * level:.0f}% kept") for level in (0.0, 0.5, 1.0)])

    return Panel(name, title, f"{alt}.", _rows_height(len(grid)), draw)


def evolution_panel(name: str, title: str, unit: str, shares: Sequence[Curve]) -> Panel:
    """Picture of what each layer kept over training: one row per layer, one column per logged step.

    Args:
        name: Panel identifier.
        title: Panel title.
        unit: What is counted, in the plural.
        shares: Steps and shares in [0, 1] of each layer, L entries; all at the same steps.

    Returns:
        The panel.
    """
    steps = list(shares[0][0])
    count = min(len(steps), EVOLUTION_COLUMNS)
    chosen = [round(i * (len(steps) - 1) / max(count - 1, 1)) for i in range(count)]
    grid = [[values[i] if i < len(values) else 0.0 for i in chosen] for _, values in shares]

    def draw(ax: Axes, palette: Palette) -> None:
        _cells(ax, palette, grid)
        ticks = range(0, count, max(1, count // 5))
        ax.set_xticks([tick + 0.5 for tick in ticks], [f"{steps[chosen[tick]]:g}" for tick in ticks])
        ax.set_xlabel("optimiser step")
        legend(ax, [_swatch(palette, level, f"{100 * level:.0f}% kept") for level in (0.0, 0.5, 1.0)])

    told = "; ".join(
        f"layer {layer}: {100 * row[0]:.0f}% at step {steps[0]:g}, {100 * row[-1]:.0f}% at step {steps[-1]:g}"
        for layer, row in enumerate(grid)
    )
    alt = f"Grid of layers by logged steps, a stronger shade is a larger share of {unit} kept. {told}."
    return Panel(name, title, alt, _rows_height(len(grid)), draw)


def _cells(ax: Axes, palette: Palette, grid: Sequence[Sequence[float]]) -> None:
    """Draw one cell per entry, all cells of a shade as one shape: a page with 80 layers stays small."""
    shades: dict[int, list[Outline]] = {}
    gap = 0.08
    for layer, row in enumerate(grid):
        for unit, share in enumerate(row):
            left, right, top, bottom = unit + gap, unit + 1 - gap, layer + gap, layer + 1 - gap
            corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
            shades.setdefault(round(share * SHADES), []).append(Outline(corners, closed=True))
    for shade, cells in shades.items():
        colour = to_rgba(palette.fill, shade / SHADES)
        shape = Outline.make_compound_path(*cells)
        ax.add_patch(PathPatch(shape, facecolor=colour, edgecolor=palette.faint, linewidth=0.35))
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


def _rows_height(layers: int) -> float:
    return 1.0 + min(max(0.17 * layers, 0.7), 7.0)
