"""The dense, tuned and pruned models side by side: rows of figures, and the table on the terminal.

Takes the content of a `metrics.json` and turns it into text once; the terminal table and the page of `report` show the
same rows. Quantities that were not measured have no row.

It does not know run directories, charts or pages.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from atp.report.record import check_metrics, clean, number
from atp.report.uncertainty import interval

MODEL_LABELS = {
    "dense": "dense base",
    "dense_lora": "dense + LoRA",
    "pruned": "pruned",
    "taylor": "Taylor, equal widths",
    "taylor_global": "Taylor, all layers",
    "wanda": "Wanda, equal widths",
    "fluctuation": "fluctuation",
    "magnitude": "magnitude",
    "random": "random masks",
    "uniform": "uniform widths",
    "random_uniform": "random, equal widths",
}
_LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "loss")
_COUNTED = {"perplexity": " tokens", "bits_per_byte": " bytes"}


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a heading, or a quantity with one text per model.

    Attributes:
        label: Heading or quantity, with its unit.
        cells: Model key to figure.
        against: What the pruned model's figure means against its reference; in a heading, the name of that column.
        heading: Whether the line opens a section.
        ranges: Model key to the 95% interval of its figure, where there is one.
    """

    label: str
    cells: Mapping[str, str] = field(default_factory=dict)
    against: str = ""
    heading: bool = False
    ranges: Mapping[str, str] = field(default_factory=dict)


def comparison_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """Lay out the comparison.

    Args:
        metrics: Content of a run's `metrics.json`.

    Returns:
        Headings and rows in reading order.

    Raises:
        ValueError: If a value is of the wrong kind; the message names its key.
    """
    check_metrics(metrics, "metrics")
    sections = {
        ("Size", "vs dense"): _size_rows(metrics),
        ("Quality", "recovery"): _quality_rows(metrics),
        ("Cost", "vs dense"): _cost_rows(metrics),
    }
    return [
        clean_row
        for (label, against), rows in sections.items()
        if rows
        for clean_row in (Row(label, {}, against, heading=True), *rows)
    ]


def comparison_table(metrics: Mapping[str, Any]) -> Table:
    """Build the table printed at the end of a run.

    Args:
        metrics: Content of a run's `metrics.json`.

    Returns:
        A table with one column per model that was evaluated, for a console at least 80 columns wide. On a console that
        is not UTF-8 it prints characters of the console's encoding only.

    Raises:
        ValueError: If a value is of the wrong kind; the message names its key.
    """
    rows = comparison_rows(metrics)
    name = clean(str((metrics.get("run") or {}).get("name") or "this run"))
    table = _EncodableTable(
        title=Text(f"{name}: pruned against dense"),
        caption=Text(
            "; ".join(["recovery: pruned in % of dense + LoRA", "vs dense: pruned vs dense base", *speed_note(metrics)])
        ),
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        title_style="bold",
        caption_style="dim",
    )
    models = evaluated_models(metrics)
    table.add_column("", overflow="fold")
    for model in models:
        header = Text(model_label(model).replace(" ", "\n", 1))
        style = "bold" if model == "pruned" else ""
        table.add_column(header, justify="right", vertical="bottom", overflow="fold", no_wrap=True, style=style)
    table.add_column("", justify="right", vertical="bottom", overflow="fold", no_wrap=True)
    for row in rows:
        style = "bold cyan" if row.heading else ""
        label = Padding(Text(row.label, style), (0, 0, 0, 0 if row.heading else 1))
        cells = [Text(row.cells.get(model, "")) for model in models]
        table.add_row(label, *cells, Text(row.against, style))
    return table


def comparison_cells(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Lay out the comparison as plain cells, for files and loggers.

    Args:
        metrics: Content of a run's `metrics.json`.

    Returns:
        Column names and rows: section, quantity, one cell per model, comparison.
    """
    models, section, cells = evaluated_models(metrics), "", []
    for row in comparison_rows(metrics):
        if row.heading:
            section = row.label
        else:
            cells.append([section, row.label, *(row.cells.get(model, "") for model in models), row.against])
    return ["section", "quantity", *map(model_label, models), "comparison"], cells


def evaluated_models(metrics: Mapping[str, Any]) -> list[str]:
    """List the models a run has quality figures for.

    Args:
        metrics: Checked content of a `metrics.json`.

    Returns:
        Keys under `eval`: the dense base, the tuned dense model and the pruned one first, baselines after them. The
        dense and the pruned model are always there.
    """
    present = {"dense": None, "pruned": None, **(metrics.get("eval") or {})}
    known = [model for model in MODEL_LABELS if model in present]
    return known + [model for model in present if model not in MODEL_LABELS]


def model_label(model: str) -> str:
    """Name a model for readers.

    Args:
        model: Key under `eval`.

    Returns:
        Its label.
    """
    return MODEL_LABELS.get(model, clean(model))


def metric_names(metrics: Mapping[str, Any]) -> list[str]:
    """List the quality metrics of a run.

    Args:
        metrics: Checked content of a `metrics.json`.

    Returns:
        Metric names, those where lower is better first, otherwise in the order they were written.
    """
    names = dict.fromkeys(metric for scores in (metrics.get("eval") or {}).values() for metric in scores or {})
    return sorted(names, key=lambda metric: not lower_is_better(metric))


def lower_is_better(metric: str) -> bool:
    """Say which direction of a metric is better.

    Args:
        metric: Name such as "perplexity" or "bill/rougeL".

    Returns:
        True for perplexity, bits per byte and losses.
    """
    return metric.rsplit("/", 1)[-1] in _LOWER_IS_BETTER


def speed_ratio(metrics: Mapping[str, Any], kind: str) -> float | None:
    """Read how many times faster the pruned model is.

    Args:
        metrics: Checked content of a `metrics.json`.
        kind: "prefill" or "decode".

    Returns:
        Dense latency over pruned latency, or None if not measured.
    """
    ratio = number(metrics, "speed", f"{kind}_ratio")
    dense, pruned = (number(metrics, "speed", model, f"{kind}_latency_ms") for model in ("dense", "pruned"))
    return dense / pruned if ratio is None and dense and pruned else ratio


def speed_note(metrics: Mapping[str, Any]) -> list[str]:
    """How speed was measured, in a sentence; none where it was not, or by a version that did not note it."""
    names = ("prompt_tokens", "new_tokens", "batch_size", "repeats")
    prompt, new, batch, repeats = (number(metrics, "speed", name) for name in names)
    if prompt is None or new is None or batch is None or repeats is None:
        return []
    device = clean(str((metrics.get("speed") or {}).get("device") or "unknown device"))
    return [
        f"speed: {prompt:.0f} prompt tokens, {new:.0f} decoded, batch {batch:.0f}, median of {repeats:.0f}, on {device}"
    ]


class _EncodableTable(Table):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in super().__rich_console__(console, options):
            if options.ascii_only and isinstance(part, Segment):
                part = Segment(_encodable(part.text, options.encoding), part.style, part.control)
            yield part


def _encodable(text: str, encoding: str) -> str:
    return text.encode(encoding, "replace").decode(encoding)


def _size_rows(metrics: Mapping[str, Any]) -> list[Row]:
    rows = []
    for label, suffix in (("parameters", ""), ("decoder-block parameters", "_blocks")):
        rows.append(
            _pair(label, [number(metrics, "parameters", f"{model}{suffix}") for model in ("dense", "pruned")], count)
        )
    target = number(metrics, "sparsity", "target")
    goal = "" if target is None else f", target {percent(target)}"
    for label, key in ((f"block sparsity{goal}", "blocks"), ("whole-model sparsity", "model")):
        value = number(metrics, "sparsity", key)
        if value is not None:
            cells = {"dense": percent(0.0), "pruned": percent(value)}
            if key == "blocks":
                others = {model: number(metrics, "baselines", model, "sparsity") for model in evaluated_models(metrics)}
                cells |= {model: percent(share) for model, share in others.items() if share is not None}
            rows.append(Row(label, cells))
    rows.append(_pair("file size (MiB)", [number(metrics, "files", f"{m}_mib") for m in ("dense", "pruned")], _decimal))
    return [row for row in rows if row.cells]


def _quality_rows(metrics: Mapping[str, Any]) -> list[Row]:
    rows = []
    for metric in metric_names(metrics):
        items, kept = number(metrics, "eval_counts", metric), number(metrics, "recovery", metric)
        unit = _COUNTED.get(metric.rsplit("/", 1)[-1], "")
        details = ["lower is better"] * lower_is_better(metric) + ([] if items is None else [f"n={items:,.0f}{unit}"])
        label = clean(metric) + (f" ({', '.join(details)})" if details else "")
        scores = {model: number(metrics, "eval", model, metric) for model in evaluated_models(metrics)}
        cells = {model: rounded(score) for model, score in scores.items() if score is not None}
        sure = {model: interval(metrics, model, metric) for model in cells}
        ranges = {model: between(ends) for model, ends in sure.items() if ends is not None}
        rows.append(Row(label, cells, "" if kept is None else f"{kept:.1f}%", ranges=ranges))
    baselines = {model: number(metrics, "baselines", model, "recovery", "mean") for model in evaluated_models(metrics)}
    reference = "recovery" if "dense_lora" in (metrics.get("eval") or {}) else "recovery_vs_dense"
    for label, key in (
        ("mean recovery of dense + LoRA", "recovery"),
        ("mean recovery of dense base", "recovery_vs_dense"),
    ):
        found = {**(baselines if key == reference else {}), "pruned": number(metrics, key, "mean")}
        cells = {model: f"{mean:.1f}%" for model, mean in found.items() if mean is not None}
        rows.append(Row(label, cells))
    return [row for row in rows if row.cells]


def _cost_rows(metrics: Mapping[str, Any]) -> list[Row]:
    both = ("dense", "pruned")
    rows = [_pair("MACs per token", [number(metrics, "macs", f"{model}_per_token") for model in both], _macs)]
    for kind, label in (("prefill", "prefill latency (ms)"), ("decode", "decode latency (ms/token)")):
        row = _pair(label, [number(metrics, "speed", model, f"{kind}_latency_ms") for model in both], rounded)
        ratio = speed_ratio(metrics, kind)
        rows.append(Row(label, row.cells, "" if ratio is None else f"{ratio:.2f}x speed"))
    rates = [number(metrics, "speed", model, "prefill_tokens_per_s") for model in both]
    rows.append(_pair("prefill (tokens/s)", rates, lambda rate: f"{rate:,.0f}"))
    weights = [number(metrics, "memory", f"{model}_weights_mib") for model in both]
    rows.append(_pair("weights in memory (MiB)", weights, _decimal))
    peak = number(metrics, "memory", "train_peak_mib")
    rows.append(Row("peak memory, training (MiB)", {} if peak is None else {"pruned": _decimal(peak)}))
    return [row for row in rows if row.cells or row.against]


def between(ends: tuple[float, float]) -> str:
    """An interval in words."""
    return f"{rounded(ends[0])} to {rounded(ends[1])}"


def _pair(label: str, values: Iterable[float | None], form: Callable[[float], str]) -> Row:
    dense, pruned = values
    cells = {model: form(value) for model, value in (("dense", dense), ("pruned", pruned)) if value is not None}
    change = f"{100 * (pruned / dense - 1):+.1f}%" if dense and pruned is not None else ""
    return Row(label, cells, change)


def percent(fraction: float) -> str:
    """Format a fraction in percent."""
    return f"{100 * fraction:.1f}%"


def _decimal(value: float) -> str:
    return f"{value:,.1f}"


def rounded(value: float) -> str:
    """A score or a time, with as many digits as tell something."""
    if abs(value) >= 1e5:
        return f"{value:.3g}"
    return f"{value:,.{3 if abs(value) < 10 else 2 if abs(value) < 100 else 1}f}"


def count(value: float) -> str:
    """Format a number of parameters, in k, M, B or T."""
    return _scaled(value, ("", "k", "M", "B", "T"))


def _macs(value: float) -> str:
    return _scaled(value, ("", "k", "M", "G", "T", "P"))


def _scaled(value: float, prefixes: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.{0 if not power else 1 if abs(value) >= 99.95 else 2}f}{' ' if power else ''}{prefixes[power]}"
