"""The tables that ``atp evaluate`` prints: scores of one or two models with their intervals.

Figures in, tables out; scores nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from atp.evaluate.metrics import Metrics


def score_table(names: Sequence[str], found: Mapping[str, Mapping[str, Metrics]], result: Mapping[str, Any]) -> Table:
    """One row a metric, one column a model; with two models their difference and what the first keeps of the second.

    Args:
        names: The models as they were named.
        found: Model -> task -> metrics.
        result: What the command returns: intervals by model and task, and of two models ``paired`` and ``recovery``.
    """
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        caption=Text("± half of the 95% bootstrap interval over items"),
    )
    table.add_column("metric", no_wrap=True)
    for name in names:
        table.add_column(Text(title_of(name)), justify="right", overflow="fold")
    table.add_column("over", justify="right")
    if len(names) > 1:
        table.add_column("difference", justify="right")
        table.add_column("recovery", justify="right")
    for task, metrics in found[names[0]].items():
        table.add_row(Text(task, style="bold"))
        for key in metrics.values:
            if key == "perplexity" and sum(name.endswith("/perplexity") for name in metrics.values) == 1:
                continue  # the task's own says the same
            cells = [_with_interval(found[name][task].values[key], result["models"][name][task], key) for name in names]
            label = f"  {key.rpartition('/')[2] if key.partition('/')[0] in task else key}"
            row = [label, *cells, f"{metrics.counts[key]:,}"]
            if len(names) > 1:
                pair = result["paired"][task].get(key)
                row.append("" if pair is None else f"{pair['difference']:+.3g} ± {pair['half_width']:.2g}")
                kept = result["recovery"][task].get(key)
                row.append("" if kept is None else f"{kept:.1f}%")
            table.add_row(*map(Text, row))
    return table


def title_of(name: str) -> str:
    """What to call a model: its folder, or its run where the folder is the run's ``pruned``."""
    path = Path(name)
    return path.parent.name if path.name == "pruned" and path.parent.name else path.name or name


def _with_interval(value: float, scored: Mapping[str, Any], key: str) -> str:
    bounds = scored["intervals"].get(key)
    return f"{value:.4g}" + (f" ± {(bounds[1] - bounds[0]) / 2:.2g}" if bounds else "")


def harness_table(name: str, scored: Mapping[str, Mapping[str, float]]) -> Table:
    """The harness' figures of one model: task -> metric -> value."""
    heading = Text(f"lm-evaluation-harness: {title_of(name)}")
    table = Table(title=heading, box=SIMPLE_HEAD, show_edge=False, caption=Text("± standard error"))
    for column in ("task", "metric", "value"):
        table.add_column(column)
    for task, figures in scored.items():
        for metric in (name for name in figures if not name.endswith("_stderr")):
            error = figures.get(f"{metric}_stderr")
            told = f"{figures[metric]:.0f}" if metric == "items" else f"{figures[metric]:.4f}"
            table.add_row(task, metric, told + (f" ± {error:.4f}" if error is not None else ""))
    return table
