"""The evidence behind a run's figures, as tables: paired comparisons, other domains, further tasks, prompt, overlap.

Takes the content of a `metrics.json` and gives tables of text; the page and the terminal show the same ones. What was
not measured has no table.

It does not know run directories, charts or pages.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from atp.report.comparison import lower_is_better, model_label
from atp.report.record import clean

_POINTS = ("accuracy", "macro_f1", "rouge1", "rouge2", "rougeL")
_FEW = 30


@dataclass(frozen=True)
class Evidence:
    """One table: its title, what it says in a sentence, its column names and its rows of text."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def evidence(metrics: Mapping[str, Any]) -> list[Evidence]:
    """Lay out the tables.

    Args:
        metrics: Checked content of a run's `metrics.json`.

    Returns:
        The tables for which there are figures, in reading order.
    """
    tables = [*_paired(metrics), *_others(metrics), *_prompt(metrics), *_overlap(metrics)]
    return [table for table in tables if table.rows]


def evidence_tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Build those that tell most for the terminal: against the strongest reference, and off target."""
    made = []
    compared = [found for found in _paired(metrics) if found.rows]
    for found in [*compared[-1:], *(found for found in _others(metrics) if found.rows)]:
        table = Table(
            title=Text(found.title), caption=Text(found.note), box=SIMPLE_HEAD, show_edge=False, pad_edge=False
        )
        for place, column in enumerate(found.columns):
            table.add_column(Text(column), justify="left" if place == 0 else "right", no_wrap=place == 0)
        for row in found.rows:
            table.add_row(*(Text(str(clean(cell))) for cell in row))
        made.append(table)
    return made


def _paired(metrics: Mapping[str, Any]) -> Iterable[Evidence]:
    """Difference to each reference on the same items, with its interval."""
    intervals = metrics.get("intervals") or {}
    values = metrics.get("eval") or {}
    for pair, compared in (metrics.get("paired") or {}).items():
        of, _, against = pair.partition("_vs_")
        if of != "pruned":
            continue
        rows = []
        for name, found in compared.items():
            low, high = (intervals.get(of) or {}).get(name) or (None, None)
            scale = _scale(name)
            rows.append(
                (
                    name,
                    _figure(values.get(of, {}).get(name), scale),
                    "" if low is None else f"{_figure(low, scale)} to {_figure(high, scale)}",
                    _plus_minus(found, scale, _digits(name)),
                    _verdict(name, found),
                    f"{found['items']}",
                )
            )
        note = "95% bootstrap intervals over test items; accuracy, F1 and ROUGE in points"
        columns = ("metric", model_label(of), "95% interval", f"against {model_label(against)}", "verdict", "items")
        yield Evidence(
            f"{model_label(of)} against {model_label(against)}, on the same items", note, columns, tuple(rows)
        )


def _plus_minus(found: Mapping[str, Any], scale: float, digits: int) -> str:
    return f"{scale * found['difference']:+.{digits}f} ± {scale * found['half_width']:.{digits}f}"


def _verdict(name: str, found: Mapping[str, Any]) -> str:
    few = " (few items)" if found["items"] < _FEW else ""
    if not found["significant"]:
        return f"unclear{few}"
    better = (found["difference"] < 0) == lower_is_better(name)
    return f"{'better' if better else 'worse'}{few}"


def _others(metrics: Mapping[str, Any]) -> Iterable[Evidence]:
    """Other domains and further tasks, one column per model."""
    kinds = (
        ("forgetting", "What pruning forgot: perplexity off target", "the tuned models never saw these domains"),
        ("tasks", "Further tasks", "test records of tasks beside the target"),
        ("harness", "lm-evaluation-harness", "the harness' own prompts and metrics"),
    )
    for key, title, note in kinds:
        by_model = metrics.get(key) or {}
        models = list(by_model)
        rows = []
        for task in dict.fromkeys(task for found in by_model.values() for task in found):
            names = dict.fromkeys(name for found in by_model.values() for name in found.get(task, {}))
            for name in (n for n in names if key != "forgetting" or n == "perplexity"):
                cells = [_figure(by_model[model].get(task, {}).get(name), 1.0) for model in models]
                rows.append((task if key == "forgetting" else f"{task} {name}", *cells))
        yield Evidence(title, note, ("", *map(model_label, models)), tuple(rows))


def _prompt(metrics: Mapping[str, Any]) -> Iterable[Evidence]:
    prompt = metrics.get("prompt") or {}
    if not prompt.get("tokens_added"):
        return
    facts = {
        "name": prompt.get("name"),
        "used in training": prompt.get("train"),
        "used in evaluation": prompt.get("inference"),
        "chat template": "the tokenizer's own" if prompt.get("chat") else None,
        "tokens added per record": prompt.get("tokens_added"),
        "share of the context": f"{100 * prompt.get('share_of_context', 0):.1f}%",
        "shared prefix, computed once (tokens)": prompt.get("shared_prefix_tokens"),
        "its latency, dense (ms)": prompt.get("dense_prefix_latency_ms"),
        "its latency, pruned (ms)": prompt.get("pruned_prefix_latency_ms"),
        "text": prompt.get("system") or prompt.get("template"),
    }
    rows = tuple((key, _shown(value)) for key, value in facts.items() if value is not None)
    yield Evidence("Prompt", "what stands before each record's own prompt, and what it costs", ("", ""), rows)


def _overlap(metrics: Mapping[str, Any]) -> Iterable[Evidence]:
    overlap = metrics.get("overlap") or {}
    done = "dropped" if overlap.get("near_duplicates") == "drop" else "kept, only counted"
    rows = [
        (f"equal to a later split's, dropped from {k}", str(n)) for k, n in (overlap.get("exact_dropped") or {}).items()
    ]
    rows += [
        (f"nearly equal, {k.replace('_', ' against ')}: {done}", str(n)) for k, n in (overlap.get("near") or {}).items()
    ]
    yield Evidence(
        "Overlap between splits", "records that two splits share, whole or nearly so", ("", "records"), tuple(rows)
    )


def _scale(name: str) -> float:
    return 100.0 if name.rsplit("/", 1)[-1] in _POINTS else 1.0


def _digits(name: str) -> int:
    return 1 if _scale(name) > 1 else 3


def _figure(value: Any, scale: float) -> str:
    if not isinstance(value, (int, float)):
        return ""
    return f"{scale * value:,.{1 if scale > 1 else 3}f}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
