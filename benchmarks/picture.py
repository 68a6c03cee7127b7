"""The picture at the top of the README: ``python -m benchmarks.picture runs/sweeps/legal``.

Drawn from the finished runs of a sweep, so one command remakes it whenever the figures are new. Prints what the sweep
was, for the line below the picture.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from atp.atomic import write_bytes
from atp.report.across import across_panels
from atp.report.page import report_panels
from atp.report.panel import file_bytes
from atp.report.record import RunRecord
from atp.report.runs import FinishedRun, data_differs, find_runs, group_runs

TARGET = Path(__file__).parent.parent / "docs" / "pictures" / "result.png"
_COLOURS = 128  # flat charts look the same, at a third of the bytes


def draw(found: list[FinishedRun], shown: FinishedRun) -> bytes:
    """PNG: quality against size over all runs, then quality, widths and channels of one of them."""
    panels = report_panels(RunRecord.load(shown.path))
    chosen = [*across_panels(group_runs(found), "perplexity")[:1], *panels["quality"][-1:]]
    chosen += [*panels["widths"][:1], *panels["masks"][-1:]]
    picture = Image.open(io.BytesIO(file_bytes(chosen, "png", 2)))
    buffer = io.BytesIO()
    flat = picture.convert("RGB").quantize(_COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    flat.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, write, and say from what."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.picture", description=__doc__)
    parser.add_argument("sweep", type=Path, help="folder of a sweep over prune.sparsity")
    parser.add_argument("target", type=Path, nargs="?", default=TARGET, help="PNG file (default: the README's)")
    parser.add_argument("--sparsity", type=float, default=0.5, help="target of the run shown in detail (default: 0.5)")
    options = parser.parse_args(argv)
    try:
        found, left_out = find_runs([options.sweep])
    except ValueError as error:
        parser.error(str(error))
    at = [run for run in found if run.metrics["sparsity"]["target"] == options.sparsity]
    if not at:
        parser.error(f"{options.sweep} holds no finished run at a target of {options.sparsity}")
    write_bytes(options.target, draw(found, at[0]))
    for path, reason in left_out:
        sys.stderr.write(f"left out: {path}: {reason}\n")
    if data_differs(found):
        sys.stderr.write(f"warning: {data_differs(found)}\n")
    for group in group_runs(found):
        quality = group.figure("eval", "pruned", "perplexity")
        spread = "" if quality is None or quality.deviation is None else f" ± {quality.deviation:.3f}"
        mean = "not measured" if quality is None else f"{quality.mean:.3f}"
        print(f"{group.label}: {len(group.runs)} runs, perplexity {mean}{spread}")
    print(f"{options.target}: {options.target.stat().st_size / 1000:.0f} kB; in detail: {at[0].path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
