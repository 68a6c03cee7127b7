"""Many finished runs side by side: found on disk, grouped over seeds, ranked.

Reads run directories only. Runs that differ in nothing but the seed make one group, whose figures have a mean and a
spread. What cannot be read (half-finished, failed, of another version) is named with its reason and left out, so that
one bad directory does not cost the rest.

It does not know charts, pages or the command line.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atp.errors import UserError
from atp.report.comparison import lower_is_better
from atp.report.record import number, read_metrics

FIGURES: dict[str, tuple[str, ...]] = {
    "block sparsity": ("sparsity", "blocks"),
    "parameters": ("parameters", "pruned"),
    "MACs per token": ("macs", "pruned_per_token"),
    "weights (MiB)": ("memory", "pruned_weights_mib"),
    "file (MiB)": ("files", "pruned_mib"),
    "prefill (ms)": ("speed", "pruned", "prefill_latency_ms"),
    "decode (ms/token)": ("speed", "pruned", "decode_latency_ms"),
    "training peak (MiB)": ("memory", "train_peak_mib"),
    "perplexity": ("eval", "pruned", "perplexity"),
    "mean recovery (%)": ("recovery", "mean"),
    "recovery of dense (%)": ("recovery_vs_dense", "mean"),
}
"""What the table across runs shows, by where it lies in `metrics.json`."""

# Settings that say where and how, or that only name things: never a reason to tell runs apart.
_NOT_SETTINGS: tuple[str, ...] = (
    *("name", "run_dir", "resume", "experiment", "sweep", "seed", "threads", "optimized_metric", "logger", "callbacks"),
    *("export", "evaluate", "model.name", "data.name", "trainer.accelerator", "trainer.val_checks"),
    *("trainer.log_every_n_steps", "trainer.checkpoint_every_n_steps"),
)


@dataclass(frozen=True)
class FinishedRun:
    """One finished run.

    Attributes:
        path: Its directory.
        metrics: Content of `metrics.json`.
        settings: Its configuration, flat: dotted key to value; empty if it was not kept.
    """

    path: Path
    metrics: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """Mean of a figure over seeds, its sample standard deviation (None for one run), and the number of runs."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed only.

    Attributes:
        label: The settings that set it apart from the other groups.
        settings: Those settings, key to value.
        runs: Its runs.
    """

    label: str
    settings: dict[str, Any]
    runs: tuple[FinishedRun, ...]

    def figure(self, *keys: str) -> Spread | None:
        """A figure of `metrics.json` over the group's runs; None if no run has it."""
        found = (number(run.metrics, *keys) for run in self.runs)
        values = [value for value in found if value is not None and math.isfinite(value)]
        if not values:
            return None
        return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def find_runs(
    paths: Iterable[Path], of_now: Callable[[Any], dict[str, Any]] = dict
) -> tuple[list[FinishedRun], list[tuple[Path, str]]]:
    """Read all runs at or below some directories.

    Args:
        paths: Run directories, or folders (such as a sweep's) that hold run directories.
        of_now: Gives nested settings the names that they have now, so that runs of different versions compare.

    Returns:
        Finished runs in the order of their paths, and for every other run directory the reason why it is left out.

    Raises:
        ValueError: If a path does not exist.
    """
    runs, left_out, seen = [], [], set()
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such directory; give run directories or folders that hold some")
        for found in _run_dirs(path):
            if found.resolve() in seen:
                continue
            seen.add(found.resolve())
            try:
                runs.append(FinishedRun(found, read_metrics(found / "metrics.json"), _settings(found, of_now)))
            except ValueError as error:
                left_out.append((found, _why(found, error)))
    return runs, left_out


def _run_dirs(path: Path) -> list[Path]:
    marks = ("config.json", "metrics.json", "job.json")

    def is_run(folder: Path) -> bool:
        return any((folder / mark).is_file() for mark in marks) and not (folder / "model.safetensors").is_file()

    if is_run(path):
        return [path]
    found = {mark.parent for name in marks for depth in ("*", "*/*", "*/*/*") for mark in path.glob(f"{depth}/{name}")}
    inside = {folder for folder in found if any(parent in found for parent in folder.parents)}
    return sorted(folder for folder in found - inside if is_run(folder)) or [path]


def _why(path: Path, error: ValueError) -> str:
    """Return why a run is left out, as its directory tells it."""
    try:
        mark = json.loads((path / "job.json").read_text(encoding="utf-8"))
        return f"{mark['state']}: {mark['reason']}"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if (path / "metrics.json").exists():
        return str(error)
    if (path / "config.json").is_file():
        return f"unfinished, it has no metrics.json; go on with it: python train.py resume={path}"
    return "not a run directory: it holds neither config.json nor metrics.json"


def _settings(path: Path, of_now: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    try:
        return flatten(of_now(json.loads((path / "config.json").read_text(encoding="utf-8"))["config"]))
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys."""
    if not isinstance(node, Mapping):
        return {prefix: node}
    return {
        key: value
        for name, item in node.items()
        for key, value in flatten(item, f"{prefix}.{name}".lstrip(".")).items()
    }


def varied_settings(runs: Sequence[FinishedRun]) -> list[str]:
    """Settings in which the runs differ, other than the seed."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [
        key
        for key in keys
        if not any(key == name or key.startswith(f"{name}.") for name in _NOT_SETTINGS)
        and len({json.dumps(run.settings.get(key), sort_keys=True, default=str) for run in runs}) > 1
    ]


def group_runs(runs: Sequence[FinishedRun]) -> list[Group]:
    """Group runs over seeds, in order of block sparsity.

    Runs without kept settings are told apart by name, base, method and target instead.
    """
    keys = varied_settings(runs)
    grouped: dict[str, list[FinishedRun]] = {}
    chosen: dict[str, dict[str, Any]] = {}
    for run in runs:
        settings = {key: run.settings.get(key) for key in keys} if run.settings else _told_apart(run)
        mark = json.dumps([bool(run.settings), settings], sort_keys=True, default=str)
        grouped.setdefault(mark, []).append(run)
        chosen[mark] = settings
    groups = [
        Group(_label(chosen[mark], members[0]), chosen[mark], tuple(members)) for mark, members in grouped.items()
    ]
    return sorted(groups, key=lambda group: (group.figure("sparsity", "blocks") or Spread(0, None, 0)).mean)


def _told_apart(run: FinishedRun) -> dict[str, Any]:
    told = run.metrics.get("run") or {}
    target = number(run.metrics, "sparsity", "target")
    return {"name": told.get("name"), "base": told.get("base"), "method": told.get("method"), "prune.sparsity": target}


def _label(settings: Mapping[str, Any], run: FinishedRun) -> str:
    parts = [f"{key.rpartition('.')[2]}={_short(value)}" for key, value in settings.items() if value is not None]
    return ", ".join(parts) or str((run.metrics.get("run") or {}).get("name") or run.path.name)


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:18]}...{text[-18:]}"


def data_differs(runs: Sequence[FinishedRun]) -> str:
    """Say so when runs were measured on different data; empty when they were not."""
    told = [(run.metrics.get("run") or {}).get("data") or {} for run in runs]
    settings = [{k: v for k, v in run.settings.items() if k.startswith("data.")} for run in runs if run.settings]
    if all(one == told[0] for one in told) and all(one == settings[0] for one in settings):
        return ""
    names = ", ".join(sorted({str(one.get("name")) for one in told}))
    return f"The runs use different data ({names}), or different amounts of it: their quality is not comparable."


def table(groups: Sequence[Group], metrics: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """One row per group.

    Args:
        groups: The groups.
        metrics: Further quality metrics of the pruned model to show.

    Returns:
        Column names and cells; a spread is written as mean ± standard deviation. Figures nobody has make no column.
    """
    wanted = {**FIGURES, **{metric: ("eval", "pruned", metric) for metric in metrics if metric not in FIGURES}}
    columns = {name: [group.figure(*keys) for group in groups] for name, keys in wanted.items()}
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    rows = [
        [group.label, str(len(group.runs)), *(_spread(name, cells[i]) for name, cells in columns.items())]
        for i, group in enumerate(groups)
    ]
    return ["settings", "runs", *columns], rows


def _spread(name: str, spread: Spread | None) -> str:
    if spread is None:
        return ""
    if name == "block sparsity":
        return f"{100 * spread.mean:.1f}%"
    large = abs(spread.mean) >= 1000
    told = f"{spread.mean:,.0f}" if large else f"{spread.mean:.4g}"
    if not spread.deviation:
        return told
    return told + (f" ± {spread.deviation:,.0f}" if large else f" ± {spread.deviation:.2g}")


def reference(groups: Sequence[Group]) -> tuple[str, str]:
    """Key of the recovery to judge by, and what it compares with: dense + LoRA where every group has it."""
    if groups and all(group.figure("recovery", "mean") for group in groups):
        return "recovery", "dense + LoRA"
    return "recovery_vs_dense", "the dense base"


def smallest_within(groups: Sequence[Group], percent: float) -> Group | None:
    """The group with the fewest parameters among those that lose at most so many percent of the reference's quality."""
    key, _ = reference(groups)
    able = []
    for group in groups:
        kept, size = group.figure(key, "mean"), group.figure("parameters", "pruned")
        if kept and size and kept.mean >= 100 - percent:
            able.append((size.mean, group))
    return min(able, key=lambda pair: pair[0])[1] if able else None


def best_per_size(groups: Sequence[Group], metric: str = "perplexity") -> list[Group]:
    """For each target sparsity, the group of best mean quality.

    Args:
        groups: The groups.
        metric: Quality metric of the pruned model.

    Returns:
        One group per target, by rising target; groups without the metric are passed over.
    """
    best: dict[float, tuple[float, Group]] = {}
    for group in groups:
        target, quality = group.figure("sparsity", "target"), group.figure("eval", "pruned", metric)
        if target is None or quality is None:
            continue
        score, key = quality.mean if lower_is_better(metric) else -quality.mean, round(target.mean, 4)
        if key not in best or score < best[key][0]:
            best[key] = (score, group)
    return [best[key][1] for key in sorted(best)]
