"""``atp dashboard``: the project's wandb workspace as code.

One list of sections says which panels there are and which logged names they draw; from it the workspace is built with
``wandb-workspaces`` (an extra). A user who is logged in gets it saved on the server; everyone else gets the same
definition as JSON, so that it can be looked at, kept in git and saved later. With ``--sweep`` a report of one sweep is
built too, which needs the server. It knows the names that callbacks and modules log, and nothing of how they come
about.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atp.atomic import write_json
from atp.commands.grammar import option, run_command
from atp.errors import UserError

STEP = "trainer/global_step"


@dataclass
class Options:
    """Build the project's wandb workspace."""

    entity: str | None = option(None, "wandb user or team; needed to save it on the server")
    project: str = option("atp", "wandb project")
    sweep: str | None = option(None, "group of a sweep: also save a report of its runs on the server")
    json: Path | None = option(None, "write the definition here instead of saving it on the server")


@dataclass(frozen=True)
class Lines:
    """A line chart over optimiser steps: named metrics, or all whose name matches a pattern."""

    title: str
    metrics: tuple[str, ...] = ()
    pattern: str = ""
    log: bool = False


@dataclass(frozen=True)
class Media:
    """Logged pictures with a slider over steps."""

    title: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A logged table."""

    name: str


@dataclass(frozen=True)
class Cost:
    """Quality of the exported model against a cost, one dot per run."""

    title: str
    cost: str
    quality: str = "final/eval.pruned.perplexity"


@dataclass(frozen=True)
class Parallel:
    """Settings and results of all runs side by side: configuration keys, then summary metrics."""

    settings: tuple[str, ...]
    results: tuple[str, ...]


SECTIONS: dict[str, tuple[Any, ...]] = {
    "Training": (
        Lines("Loss", ("train/loss", "train/task_loss")),
        Lines("Parts of the loss", pattern="train/(budget_loss|data_loss|distillation_loss|group_lasso.*)"),
        Lines("Validation", ("val/perplexity",)),
        Lines("Gradient norms before clipping", pattern="grad_norm/.*", log=True),
        Lines("Learning rates", pattern="lr/.*", log=True),
    ),
    "Sparsity": (
        Lines("Sparsity against its target", ("mask/sparsity", "mask/target_sparsity")),
        Lines("Multipliers", pattern="mask/lambda_.*"),
        Lines("Temperature", ("mask/temperature",)),
        Lines("Entropy of the masks (bits per unit)", ("mask/entropy",)),
        Lines("Decisions changed per step", ("mask/flips", "mask/sampled_flips")),
        Lines("Heads and channels kept", ("mask/heads_kept", "mask/channels_kept")),
    ),
    "Layers": (
        Lines("KV heads kept by layer", pattern="heads_kept/layer_.*"),
        Lines("Channels kept by layer", pattern="channels_kept/layer_.*"),
        Media("Mask pictures: heads", ("mask_picture/heads",)),
        Media("Mask pictures: channels", ("mask_picture/channels",)),
    ),
    "Machine": (
        Lines("Tokens per second", ("train/tokens_per_second",)),
        Lines("Memory (MiB)", pattern="memory/.*"),
    ),
    "Result": (Table("comparison"), Table("samples")),
    "Across runs": (
        Cost("Perplexity against parameters", "final/parameters.pruned"),
        Cost("Perplexity against decoding time (ms/token)", "final/speed.pruned.decode_latency_ms"),
        Cost("Perplexity against weights in memory (MiB)", "final/memory.pruned_weights_mib"),
        Parallel(
            ("prune.sparsity", "prune.generator_lr", "prune.schedule.freeze_at", "lora.r"),
            ("final/recovery.mean", "final/eval.pruned.perplexity"),
        ),
    ),
}


def logged_names() -> list[str]:
    """Every metric, picture and table that the workspace draws by its full name."""
    names: list[str] = []
    for panel in (panel for panels in SECTIONS.values() for panel in panels):
        if isinstance(panel, Lines):
            names += panel.metrics
        elif isinstance(panel, Media):
            names += panel.keys
        elif isinstance(panel, Table):
            names.append(panel.name)
        elif isinstance(panel, Cost):
            names += (panel.cost, panel.quality)
        else:
            names += panel.results
    return list(dict.fromkeys(names))


def build_workspace(entity: str, project: str) -> Any:
    """The workspace, not yet saved.

    Args:
        entity: wandb user or team.
        project: Project of the runs, as in ``logger.wandb.project``.

    Raises:
        ValueError: ``wandb-workspaces`` is not installed.
    """
    _need_package()
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(name=name, panels=[_panel(panel) for panel in panels], is_open=index < 3)
        for index, (name, panels) in enumerate(SECTIONS.items())
    ]
    return ws.Workspace(entity=entity, project=project, name="ATP", sections=sections)


def _panel(panel: Any) -> Any:
    import wandb_workspaces.reports.v2 as wr

    if isinstance(panel, Lines):
        named: dict[str, Any] = {"metric_regex": panel.pattern} if panel.pattern else {"y": list(panel.metrics)}
        return wr.LinePlot(title=panel.title, x=STEP, log_y=panel.log or None, **named)
    if isinstance(panel, Media):
        return wr.MediaBrowser(title=panel.title, media_keys=list(panel.keys))
    if isinstance(panel, Table):
        return wr.WeavePanelSummaryTable(table_name=panel.name)
    if isinstance(panel, Cost):
        return wr.ScatterPlot(title=panel.title, x=wr.SummaryMetric(panel.cost), y=wr.SummaryMetric(panel.quality))
    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(key)) for key in panel.settings]
    columns += [wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(key)) for key in panel.results]
    return wr.ParallelCoordinatesPlot(columns=columns)


def workspace_json(workspace: Any) -> dict[str, Any]:
    """The definition that the server would get, as plain data; panels are numbered, so that it can be kept in git."""
    numbers = iter(range(10_000))

    def numbered(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: f"panel{next(numbers):04d}" if k == "__id__" and v else numbered(v) for k, v in node.items()}
        return [numbered(item) for item in node] if isinstance(node, list) else node

    return dict(numbered(json.loads(workspace._to_model().model_dump_json(by_alias=True))))


def save_sweep_report(entity: str, project: str, group: str) -> str:
    """Save a report of one sweep's runs on the server (which must be reachable); returns its address."""
    _need_package()
    import wandb_workspaces.reports.v2 as wr

    runset = wr.Runset(entity=entity, project=project, name=group, filters=f'Group == "{group}"')
    panels = [_panel(panel) for panel in SECTIONS["Across runs"]]
    blocks: list[Any] = [wr.H1(f"Sweep {group}"), wr.PanelGrid(runsets=[runset], panels=panels)]
    report = wr.Report(entity=entity, project=project, title=f"Sweep {group}", blocks=blocks)
    report.save()
    return str(report.url)


def _need_package() -> None:
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError("the dashboard needs the package wandb-workspaces: pip install 'atp[dashboard]'")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Args:
        argv: Arguments; the process' own when None.

    Returns:
        Exit code: 2 after a user's mistake.
    """
    return run_command(Options, _run, argv, name="dashboard")


def _run(options: Options) -> int:
    from atp.train.login import is_logged_in, wandb_server
    from atp.train.reach import why_unreachable

    online = is_logged_in() and os.environ.get("WANDB_MODE") not in ("offline", "disabled") and options.json is None
    if (online or options.sweep) and not options.entity:
        raise UserError("--entity is not set; give your wandb user or team, or --json FILE to write a file")
    if options.sweep and not online:
        raise UserError("--sweep builds a report on the server: log in with `wandb login` and leave out --json")
    reason = why_unreachable(wandb_server(os.environ)) if online else None
    if reason:
        raise UserError(f"{wandb_server(os.environ)} cannot be reached ({reason}); --json FILE writes a file")
    workspace = build_workspace(options.entity or "your-entity", options.project)
    if online:
        workspace.save()
        sys.stdout.write(f"workspace: {workspace.url}\n")
    else:
        target = options.json or Path("wandb_workspace.json")
        write_json(target, workspace_json(workspace))
        sys.stdout.write(f"workspace definition: {target} (log in with `wandb login` to save it on the server)\n")
    if options.sweep and options.entity:
        sys.stdout.write(f"report: {save_sweep_report(options.entity, options.project, options.sweep)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
