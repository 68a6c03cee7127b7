"""Masks as small raster pictures, cheap enough to draw while training.

One row per layer, one cell per unit (or per block of neighbouring units), darker where more is kept. Drawn straight
into pixels, since a plotting library would take longer than the training steps between two pictures. The charts of
the finished page are in `figures`.

It knows numbers and names; nothing of models, masks' origin, loggers or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from PIL import Image, ImageDraw

SHARE_BINS = 32
_KEPT, _CUT, _GRID, _INK = (31, 78, 156), (255, 255, 255), (139, 148, 158), (27, 31, 36)
_MARGIN = 34


def block_shares(row: Sequence[float], bins: int = SHARE_BINS) -> list[float]:
    """Means of neighbouring entries.

    Args:
        row: One value per unit.
        bins: Most blocks to make.

    Returns:
        At most ``bins`` means of near-equal blocks, in order.
    """
    count = min(bins, len(row))
    edges = [round(i * len(row) / count) for i in range(count + 1)] if count else []
    return [sum(row[a:b]) / (b - a) for a, b in pairwise(edges)]


def mask_picture(rows: Sequence[Sequence[float]], title: str) -> Image.Image:
    """Draw a grid of shares.

    Args:
        rows: Shares in [0, 1], one row per layer; rows may differ in length.
        title: One line above the grid, saying what a cell is.

    Returns:
        An RGB picture: kept is blue and dark, cut is white, with layer numbers on the left.
    """
    columns = max(map(len, rows), default=0)
    cell_w = max(3, min(18, 600 // max(columns, 1)))
    cell_h = max(5, min(14, 800 // max(len(rows), 1)))
    width = max(_MARGIN + columns * cell_w + 8, 300)
    image = Image.new("RGB", (width, 24 + len(rows) * cell_h + 8), "white")
    draw = ImageDraw.Draw(image)
    draw.text((4, 5), title, fill=_INK)
    for layer, row in enumerate(rows):
        top = 24 + layer * cell_h
        if layer % max(1, 14 // cell_h) == 0:
            draw.text((6, top + cell_h // 2 - 6), str(layer), fill=_INK)
        for unit, share in enumerate(row):
            left = _MARGIN + unit * cell_w
            box = (left, top, left + cell_w, top + cell_h)
            draw.rectangle(box, fill=_shade(share), outline=_GRID if cell_w > 4 else None)
    return image


def _shade(share: float) -> tuple[int, int, int]:
    share = min(max(share, 0.0), 1.0)
    red, green, blue = (round(cut + (kept - cut) * share) for cut, kept in zip(_CUT, _KEPT, strict=True))
    return red, green, blue
