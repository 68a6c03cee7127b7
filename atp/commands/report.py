"""``atp report``: the page of one run, made again, or the comparison of a sweep's runs or of several directories.

A thin command over :mod:`atp.report`; it knows nothing of how runs are made.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atp.commands.grammar import argument, option, run_command
from atp.commands.places import run_directory
from atp.config.moved import with_new_settings
from atp.errors import UserError


@dataclass
class Options:
    """Remake the page of one run, or compare the runs of a sweep or of several directories."""

    paths: list[Path] = argument("a run directory, a sweep's folder, or several of either")
    out: Path | None = option(None, "folder for the comparison; by default the sweep's folder, or .")
    metric: str = option("perplexity", "quality metric of the charts")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Args:
        argv: Arguments; the process' own when None.

    Returns:
        Exit code: 2 after a user's mistake.
    """
    return run_command(Options, _run, argv, name="report")


def _run(options: Options) -> int:
    from atp.report.across import write_across
    from atp.report.page import write_report
    from atp.report.runs import data_differs, find_runs

    paths, out = [run_directory(path) for path in options.paths], options.out
    found, left_out = find_runs(paths, with_new_settings)
    for path, reason in left_out:
        sys.stderr.write(f"left out: {path}: {reason}\n")
    if not found:
        raise UserError(f"there is no finished run in {', '.join(map(str, paths))}")
    if len(found) == 1 and len(paths) == 1 and found[0].path == paths[0] and out is None:
        sys.stdout.write(f"report: {write_report(paths[0])}\n")
        return 0
    warning = data_differs(found)
    if warning:
        sys.stderr.write(f"warning: {warning}\n")
    folder = out or (paths[0] if len(paths) == 1 else Path(os.curdir))
    page = write_across(found, left_out, folder, options.metric)
    sys.stdout.write((folder / "table.md").read_text(encoding="utf-8"))
    sys.stdout.write(f"\nreport: {page}\ntables: {folder / 'table.md'}, {folder / 'table.csv'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
