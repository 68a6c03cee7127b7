"""``python -m atp.report``: remake the page of one run, or compare the runs of a sweep or of several directories."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from atp.config.moved import with_new_settings
from atp.errors import UserError
from atp.report.across import write_across
from atp.report.page import write_report
from atp.report.runs import data_differs, find_runs


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Args:
        argv: Arguments; the process' own when None.

    Returns:
        Exit code: 2 after a user's mistake.
    """
    parser = argparse.ArgumentParser(prog="python -m atp.report", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="a run directory, a sweep's folder, or several of either")
    parser.add_argument("--out", type=Path, help="folder for the comparison (default: the sweep's folder, or .)")
    parser.add_argument("--metric", default="perplexity", help="quality metric of the charts (default: perplexity)")
    options = parser.parse_args(argv)
    try:
        return _report(options.paths, options.out, options.metric)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _report(paths: Sequence[Path], out: Path | None, metric: str) -> int:
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
    page = write_across(found, left_out, folder, metric)
    sys.stdout.write((folder / "table.md").read_text(encoding="utf-8"))
    sys.stdout.write(f"\nreport: {page}\ntables: {folder / 'table.md'}, {folder / 'table.csv'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
