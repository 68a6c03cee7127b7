"""The figures a reader wants first, from the content of a `metrics.json`: the cards at the top of a run's page.

It does not know run directories, charts or pages.
"""

from collections.abc import Mapping
from typing import Any

from atp.report.comparison import (
    between,
    count,
    lower_is_better,
    metric_names,
    model_label,
    percent,
    rounded,
    speed_note,
    speed_ratio,
)
from atp.report.record import clean, number
from atp.report.uncertainty import interval

MOST_OFF = 0.02
"""Distance of the expected sparsity from its target from which on the page says so."""


def headlines(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Pick the figures a reader wants first.

    Args:
        metrics: Checked content of a `metrics.json`.

    Returns:
        Name, figure and explanation of each headline whose numbers are there.
    """
    found = []
    blocks, target, whole = (number(metrics, "sparsity", key) for key in ("blocks", "target", "model"))
    if blocks is not None:
        goal = [] if target is None else [f"target {percent(target)}"]
        told = [*goal, "of the decoder blocks' parameters removed", *_at_freeze(metrics)]
        found.append(("block sparsity", percent(blocks), "; ".join(told)))
    dense, pruned = number(metrics, "parameters", "dense"), number(metrics, "parameters", "pruned")
    if pruned is not None:
        share = "" if whole is None else f", {percent(whole)} fewer"
        found.append(("parameters", count(pruned), "" if dense is None else f"dense base {count(dense)}{share}"))
    recovery, versus = number(metrics, "recovery", "mean"), number(metrics, "recovery_vs_dense", "mean")
    if recovery is not None:
        other = "" if versus is None else f"; {versus:.1f}% of the untuned dense base"
        found.append(("mean recovery", f"{recovery:.1f}%", f"of dense + LoRA{other}"))
    for metric in metric_names(metrics):
        value = number(metrics, "eval", "pruned", metric)
        if value is not None and (metric == "perplexity" or metric.endswith("accuracy")):
            found.append((clean(metric), rounded(value), "; ".join(_beside(metrics, metric))))
    for kind in ("prefill", "decode"):
        ratio = speed_ratio(metrics, kind)
        if ratio is not None:
            remark = "; measured as noted below" if speed_note(metrics) else ""
            found.append((f"{kind} speed", f"{ratio:.2f}x", f"relative to the dense base{remark}"))
    return found


def not_reached(metrics: Mapping[str, Any]) -> str:
    """Say that the masks were still away from their target when they were fixed; empty where they had reached it.

    Args:
        metrics: Checked content of a `metrics.json`.
    """
    target, expected = (number(metrics, "sparsity", key) for key in ("target", "expected_at_freeze"))
    if target is None or expected is None or abs(expected - target) <= MOST_OFF:
        return ""
    return (
        f"When the masks were fixed, their probabilities came to a sparsity of {percent(expected)}; the target is "
        f"{percent(target)}. The cut meets it by the units' order alone."
    )


def _at_freeze(metrics: Mapping[str, Any]) -> list[str]:
    """What the masks' probabilities came to when they were fixed; nothing in runs that did not record it."""
    expected, undecided = (number(metrics, "sparsity", f"{name}_at_freeze") for name in ("expected", "undecided"))
    if expected is None or undecided is None:
        return []
    return [f"expected at the freeze {percent(expected)}, {percent(undecided)} of the units undecided"]


def _beside(metrics: Mapping[str, Any], metric: str) -> list[str]:
    """What stands below a score: its interval, the dense models' scores, the direction where it is not obvious."""
    ends = interval(metrics, "pruned", metric)
    others = [(model_label(model), number(metrics, "eval", model, metric)) for model in ("dense_lora", "dense")]
    told = ", ".join(f"{label} {rounded(value)}" for label, value in others if value is not None)
    remarks = [] if ends is None else [f"95% interval {between(ends)}"]
    return [*remarks, told, *["lower is better"] * lower_is_better(metric)]
