"""A flame picture of a run: ``python -m benchmarks.flame SAMPLES [--title TEXT] [--output FILE]``.

SAMPLES is what ``py-spy record --format raw --output SAMPLES -- python train.py ...`` writes: a stack and how often it
was seen on each line. Frames of this package and of model files are kept, and the innermost one of any library; the
rest would only repeat how calls are passed on. Written is one SVG without scripts: width is time, callers are on top,
the share of the whole stands in each frame's tooltip and, where there is room, beside its name.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

WIDTH, ROW = 1200, 18
SMALLEST = 0.004
"""Share of the whole below which a frame is not drawn."""
COLOURS = {"atp": "#f2b66d", "model": "#9cc3e6", "other": "#d9d9d9"}


@dataclass
class Frame:
    """A function under its callers.

    Attributes:
        name: What it is called.
        kind: ``atp``, ``model`` or ``other``.
        samples: How often it was seen.
        below: What it calls.
    """

    name: str
    kind: str = "other"
    samples: int = 0
    below: dict[str, Frame] = field(default_factory=dict)

    def add(self, stack: list[tuple[str, str]], samples: int) -> None:
        """Count a stack of (name, kind), outermost first."""
        self.samples += samples
        if stack:
            (name, kind), *rest = stack
            self.below.setdefault(name, Frame(name, kind)).add(rest, samples)

    def depth(self, least: float) -> int:
        """Rows that frames with more samples than ``least`` take."""
        return 1 + max((frame.depth(least) for frame in self.below.values() if frame.samples > least), default=0)


def read(file: Path) -> Frame:
    """The frames of a file of samples, below one for the whole."""
    whole = Frame("whole run")
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        stack, _, samples = line.rpartition(" ")
        if samples.isdigit():
            whole.add(_kept(stack.split(";")), int(samples))
    return whole


def _kept(stack: list[str]) -> list[tuple[str, str]]:
    """Name and kind of the frames that tell something; a function that calls itself once."""
    found: list[tuple[str, str]] = []
    for position, text in enumerate(stack):
        match = re.match(r"(.+) \((.+?)(?::\d+)?\)$", text)
        function, path = match.groups() if match else (text, "")
        ours = re.search(r"(?:^|/)atp/(\w+(?:/\w+)*)\.py$", path)
        model = re.search(r"modeling_\w+\.py$", path)
        last = position == len(stack) - 1
        if function.startswith("<") and not last:
            continue
        if ours:
            frame = (f"{ours.group(1).rpartition('/')[2]}.{function}", "atp")
        elif model and function == "forward":
            continue
        elif last:
            frame = (function, "model" if model else "other")
        else:
            continue
        if not found or found[-1] != frame:
            found.append(frame)
    return found


def draw(whole: Frame, title: str) -> str:
    """The picture as SVG."""
    least = SMALLEST * whole.samples
    height = (whole.depth(least) + 1) * ROW + 8
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="11" '
        f'viewBox="0 0 {WIDTH} {height}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="4" y="14" font-weight="bold">{escape(title)}</text>',
    ]

    def put(frame: Frame, left: float, row: int) -> None:
        share = frame.samples / whole.samples
        width = share * WIDTH
        top = row * ROW + 4
        label = f"{frame.name} {share:.1%}"
        shown = label if len(label) * 6.2 < width else frame.name if len(frame.name) * 6.2 < width else ""
        text = f'<text x="{left + 3:.1f}" y="{top + 13}">{escape(shown)}</text>' if shown else ""
        lines.append(
            f'<g><title>{escape(label)}</title><rect x="{left:.1f}" y="{top}" width="{max(width - 0.6, 0.4):.1f}" '
            f'height="{ROW - 1}" fill="{COLOURS[frame.kind]}"/>{text}</g>'
        )
        for one in sorted(frame.below.values(), key=lambda one: -one.samples):
            if one.samples > least:
                put(one, left, row + 1)
            left += one.samples / whole.samples * WIDTH

    put(whole, 0.0, 1)
    return "\n".join([*lines, "</svg>\n"])


def main(arguments: list[str] | None = None) -> None:
    """Read samples, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, help="what py-spy wrote with --format raw")
    parser.add_argument("--title", default="Where a run's time goes", help="written above the picture")
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/flame.svg"), help="the SVG to write")
    options = parser.parse_args(arguments)
    whole = read(options.samples)
    if not whole.samples:
        raise SystemExit(f"{options.samples} holds no samples; write it with py-spy record --format raw")
    options.output.write_text(draw(whole, options.title), encoding="utf-8")
    print(f"written: {options.output}, {whole.samples} samples")


if __name__ == "__main__":
    main()
