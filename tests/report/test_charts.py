"""Charts that stay readable where figures meet or span decades, and pages that need no display."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure
from test_report import make_metrics, make_run

from atp.report.charts import quality_panel
from atp.report.page import write_report
from atp.report.panel import PAPER, inline_svg


def test_a_logarithmic_axis_has_plain_labels() -> None:
    scores = {"perplexity": {"dense base": 1.5, "pruned": 60.0}}
    drawn = inline_svg(quality_panel("q", "Quality", "perplexity", scores, ["dense base", "pruned"]))
    assert "mathdefault" not in drawn and ">50</text>" in drawn and ">2</text>" in drawn


def test_references_stay_visible_where_models_meet() -> None:
    scores = {"accuracy": {"dense base": 1.0, "dense + LoRA": 1.0, "pruned": 1.0}}
    figure = Figure()
    quality_panel("q", "Quality", "score", scores, list(scores["accuracy"])).draw(figure.subplots(), PAPER)
    marks = figure.axes[0].lines
    assert [str(mark.get_markerfacecolor()) == "none" for mark in marks] == [True, True, False]
    assert marks[0].get_markersize() > marks[1].get_markersize() > marks[2].get_markersize()


def test_a_report_needs_no_display(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    code = "import sys; from atp.report.page import write_report; write_report(sys.argv[1])"
    code += "; sys.exit('matplotlib.pyplot' in sys.modules)"
    bare = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    bare["MPLBACKEND"] = "TkAgg"  # what a desktop's settings may ask for
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=True, env=bare)
    assert (tmp_path / "run" / "report.html").read_text().count("<svg") > 10


def test_an_unused_prompt_is_not_spelled_out(tmp_path: Path) -> None:
    unused = {"name": "none", "system": "", "template": "{{ prompt }}", "instructions": {"boolq": "Answer with yes."}}
    page = write_report(make_run(tmp_path / "unused", make_metrics() | {"prompt": unused})).read_text()
    assert "Answer with yes." not in page
    used = unused | {"name": "task", "system": "{{ instruction }}", "tokens_added": 7.5}
    page = write_report(make_run(tmp_path / "used", make_metrics() | {"prompt": used})).read_text()
    assert "Answer with yes." in page and "{{ instruction }}" in page and "7.5" in page
