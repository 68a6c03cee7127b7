"""``python -m atp.compare A B``: what two finished runs cut differently, and which of their figures differ.

Reads two run directories and nothing else. Masks are compared unit by unit (overlap and Jaccard index per layer, beside
what two random choices of the same sizes would share), figures with their difference and its interval where both have
one. It does not know how runs are made.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atp.config.moved import with_new_settings
from atp.errors import UserError
from atp.report.comparison import metric_names
from atp.report.pareto import short_number
from atp.report.record import RunRecord, number
from atp.report.runs import FIGURES, FinishedRun, data_differs, flatten, varied_settings
from atp.report.uncertainty import interval


@dataclass(frozen=True)
class Overlap:
    """Units kept by two runs in one layer.

    Attributes:
        kind: Kind of unit.
        layer: Index of the layer; -1 for all layers together.
        kept_a: Units that A keeps.
        kept_b: Units that B keeps.
        both: Units that both keep.
        units: Units of the dense model.
    """

    kind: str
    layer: int
    kept_a: int
    kept_b: int
    both: int
    units: int

    @property
    def jaccard(self) -> float:
        """Kept by both over kept by either; 1 where neither keeps any."""
        either = self.kept_a + self.kept_b - self.both
        return self.both / either if either else 1.0

    @property
    def jaccard_by_chance(self) -> float:
        """Jaccard index at the overlap that two random choices of these sizes have on average."""
        both = self.kept_a * self.kept_b / self.units if self.units else 0.0
        either = self.kept_a + self.kept_b - both
        return both / either if either else 1.0


@dataclass(frozen=True)
class Difference:
    """A figure in both runs, and B minus A with its 95% interval where both have intervals."""

    name: str
    a: float
    b: float
    low: float | None = None
    high: float | None = None

    @property
    def is_clear(self) -> bool | None:
        """Whether the interval leaves zero out; None without one."""
        return None if self.low is None or self.high is None else self.low > 0 or self.high < 0


def mask_overlaps(a: RunRecord, b: RunRecord) -> list[Overlap]:
    """Compare kept units per kind and layer, then over all layers.

    Raises:
        ValueError: The runs have masks of different shapes, so their units do not correspond.
    """
    found = []
    for kind in (kind for kind in a.masks if kind in b.masks):
        rows_a, rows_b = a.masks[kind], b.masks[kind]
        if [len(row) for row in rows_a] != [len(row) for row in rows_b]:
            raise UserError(
                f"{a.run_dir} and {b.run_dir} have {kind} of different numbers, so their units do not correspond; "
                "compare runs of one base model"
            )
        layers = [
            Overlap(kind, layer, sum(x), sum(y), sum(p & q for p, q in zip(x, y, strict=True)), len(x))
            for layer, (x, y) in enumerate(zip(rows_a, rows_b, strict=True))
        ]
        sums = (sum(getattr(o, name) for o in layers) for name in ("kept_a", "kept_b", "both", "units"))
        found += [*layers, Overlap(kind, -1, *sums)]
    return found


def figure_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """Figures that both runs have: sizes and costs, then quality of the pruned model with intervals.

    The interval of a difference is made from the two intervals (Newcombe 1998, method 10; Zou and Donner 2008): it
    treats the runs as independent, so where both were measured on the same records it is wider than need be.
    """
    found = []
    for name, keys in FIGURES.items():
        if keys[0] != "eval":
            x, y = number(a, *keys), number(b, *keys)
            if x is not None and y is not None:
                found.append(Difference(name, x, y))
    for metric in metric_names(a):
        x, y = number(a, "eval", "pruned", metric), number(b, "eval", "pruned", metric)
        if x is None or y is None:
            continue
        sure_a, sure_b = interval(a, "pruned", metric), interval(b, "pruned", metric)
        ends: tuple[float | None, float | None] = (None, None)
        if sure_a and sure_b:
            low = y - x - math.hypot(y - sure_b[0], sure_a[1] - x)
            ends = (low, y - x + math.hypot(sure_b[1] - y, x - sure_a[0]))
        found.append(Difference(metric, x, y, *ends))
    return found


def load(path: Path) -> tuple[RunRecord, FinishedRun]:
    """Read a run both ways that are needed here.

    Raises:
        ValueError: It is no finished run; the message says what is missing.
    """
    report = RunRecord.load(path)
    try:
        settings = flatten(with_new_settings(json.loads((path / "config.json").read_text(encoding="utf-8"))["config"]))
    except (OSError, ValueError, KeyError):
        settings = {}
    return report, FinishedRun(path, report.metrics, settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Args:
        argv: Arguments; the process' own when None.

    Returns:
        Exit code: 2 after a user's mistake.
    """
    parser = argparse.ArgumentParser(prog="python -m atp.compare", description="Compare two finished runs.")
    parser.add_argument("a", type=Path, metavar="A", help="run directory")
    parser.add_argument("b", type=Path, metavar="B", help="run directory to compare it with")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args(argv)
    try:
        (report_a, run_a), (report_b, run_b) = load(options.a), load(options.b)
        overlaps = mask_overlaps(report_a, report_b)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    differences = figure_differences(report_a.metrics, report_b.metrics)
    settings = {key: (run_a.settings.get(key), run_b.settings.get(key)) for key in varied_settings([run_a, run_b])}
    warning = data_differs([run_a, run_b])
    if warning:
        sys.stderr.write(f"warning: {warning}\n")
    for missing in (report for report in (report_a, report_b) if not report.masks):
        sys.stderr.write(f"warning: {missing.run_dir} has no readable masks.json; masks are not compared\n")
    console = Console()
    console.print(f"A: {options.a}", f"B: {options.b}", sep="\n", markup=False, highlight=False, soft_wrap=True)
    for table in (_settings_table(settings), _mask_table(overlaps), _figure_table(differences)):
        if table.row_count:
            console.print(table)
    if options.json:
        content: dict[str, Any] = {"a": str(options.a), "b": str(options.b), "warning": warning, "settings": settings}
        content["masks"] = [
            {**asdict(o), "jaccard": o.jaccard, "jaccard_by_chance": o.jaccard_by_chance} for o in overlaps
        ]
        content["figures"] = [{**asdict(d), "difference": d.b - d.a} for d in differences]
        options.json.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    return 0


def _table(title: str, columns: Sequence[str], note: str = "") -> Table:
    tight: dict[str, Any] = {"show_edge": False, "pad_edge": False, "collapse_padding": True}  # 80 columns are enough
    table = Table(title=title, caption=note or None, box=SIMPLE_HEAD, title_justify="left", **tight)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _settings_table(settings: Mapping[str, tuple[Any, Any]]) -> Table:
    table = _table("Settings that differ", ["setting", "A", "B"])
    for column in table.columns[1:]:
        column.no_wrap = False
    for key, values in settings.items():
        table.add_row(*(Text(str(cell)) for cell in (key, *values)))
    return table


def _mask_table(overlaps: Sequence[Overlap]) -> Table:
    note = "Jaccard: kept by both over kept by either; by chance: of random choices of the same sizes"
    columns = ["kept units", "layer", "A", "B", "both", "of", "Jaccard", "by chance"]
    table = _table("Masks", columns, note)
    for o in overlaps:
        layer = "all" if o.layer < 0 else str(o.layer)
        cells = (o.kind, layer, o.kept_a, o.kept_b, o.both, o.units, f"{o.jaccard:.2f}", f"{o.jaccard_by_chance:.2f}")
        table.add_row(*map(str, cells), style="bold" if o.layer < 0 else "")
    return table


def _figure_table(differences: Sequence[Difference]) -> Table:
    note = "Interval of a difference: from both figures' 95% intervals, runs taken as independent"
    table = _table("Figures", ["figure", "A", "B", "B - A", "95% interval", "verdict"], note)
    for d in differences:
        ends = "" if d.low is None or d.high is None else f"{d.low:+.3g} to {d.high:+.3g}"
        verdict = {None: "", True: "differs", False: "unclear"}[d.is_clear]
        sign = "+" if d.b > d.a else ""
        cells = (d.name, _told(d.a), _told(d.b), sign + _told(d.b - d.a), ends, verdict)
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _told(value: float) -> str:
    return short_number(value) if abs(value) >= 1e4 else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
