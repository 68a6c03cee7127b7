"""``atp compare A B``: what two finished runs cut differently, and which of their figures differ.

Reads two run directories and shows what :mod:`atp.report.differences` finds as tables. It does not know how runs are
made.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atp.atomic import write_text
from atp.commands.grammar import argument, option, run_command
from atp.commands.places import run_directory
from atp.config.moved import with_new_settings

if TYPE_CHECKING:
    from atp.report.differences import Difference, Overlap
    from atp.report.record import RunRecord
    from atp.report.runs import FinishedRun


@dataclass
class Options:
    """Compare two finished runs: which units each keeps, and which figures differ."""

    a: Path = argument("a run directory")
    b: Path = argument("the run directory to compare it with")
    json: Path | None = option(None, "also write everything to this file")


def load(path: Path) -> tuple[RunRecord, FinishedRun]:
    """Read a run both ways that are needed here.

    Raises:
        ValueError: It is no finished run; the message says what is missing.
    """
    from atp.report.record import RunRecord
    from atp.report.runs import FinishedRun, flatten

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
    return run_command(Options, _run, argv, name="compare")


def _run(options: Options) -> int:
    from atp.report.differences import figure_differences, mask_overlaps
    from atp.report.runs import data_differs, varied_settings

    (report_a, run_a), (report_b, run_b) = load(run_directory(options.a)), load(run_directory(options.b))
    overlaps = mask_overlaps(report_a, report_b)
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
        write_text(options.json, json.dumps(content, indent=2, default=str) + "\n")
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
    from atp.report.pareto import short_number

    return short_number(value) if abs(value) >= 1e4 else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
