"""The picture at the top of the README: ``python -m benchmarks.picture runs/sweeps/legal docs/pictures/result.png``.

Drawn from the runs of a sweep, so it is remade whenever the figures are.
"""

from __future__ import annotations

import sys
from pathlib import Path

from atp.report.across import across_panels
from atp.report.page import report_panels
from atp.report.panel import file_bytes
from atp.report.record import RunReport
from atp.report.runs import find_runs, group_runs


def main(sweep: Path, target: Path, sparsity: float = 0.5) -> int:
    """Draw quality against size over the sweep, then what the first run at ``sparsity`` kept."""
    found, _ = find_runs([sweep])
    at = [run for run in found if run.metrics["sparsity"]["target"] == sparsity]
    if not at:
        sys.stderr.write(f"error: {sweep} holds no finished run at a target of {sparsity}\n")
        return 2
    panels = report_panels(RunReport.load(at[0].path))
    chosen = [across_panels(group_runs(found), "perplexity")[0], panels["quality"][-1]]
    target.write_bytes(file_bytes([*chosen, panels["widths"][0], panels["masks"][-1]], "png", 2))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
