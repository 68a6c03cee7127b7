"""One run, from configuration to report.

fit -> remove and export -> evaluate -> reference and baselines -> samples -> measure -> report.

The top of the flow. Every stage leaves its result in the run directory before the next begins, so an interrupted run
goes on where it stopped. It knows the order of stages and what each hands to the next; how anything is done is known
below.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers
from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from atp.config.moved import with_new_settings
from atp.config.schema import ExportConfig, TrainConfig
from atp.data import check
from atp.errors import UserError
from atp.export.bundle import upload
from atp.export.hf.writing import PROVENANCE_FILE
from atp.loading_lines import load_lines
from atp.model.widths import layer_widths
from atp.prepare.baselines import check_baselines
from atp.report.comparison import comparison_cells, comparison_table
from atp.report.evidence import evidence_tables
from atp.run import parts
from atp.run.agreement import NotVerified
from atp.run.checks import check_machine, check_values
from atp.run.directory import CONFIG, RunDirectory, provenance
from atp.run.lock import hold
from atp.run.results import assemble, final_figures, metric, write_card
from atp.run.stages import Stages
from atp.run.stopwatch import Stopwatch
from atp.run.sweep import SharedResults, sweep_of

log = logging.getLogger(__name__)


def run(cfg: DictConfig, run_dir: Path, *, overrides: list[str], go_on: bool = False) -> float | None:
    """Execute a run, or the rest of one.

    Args:
        cfg: The composed configuration.
        run_dir: The run directory.
        overrides: The command line's overrides, kept for resuming.
        go_on: Go on with what lies in the directory, as a sweep does when it is started again.

    Returns:
        The metric named by ``optimized_metric``.

    Raises:
        ValueError: A user's mistake.
        RunInterrupted: A signal ended training early.
        NotVerified: The export does not compute what was trained; everything is written.
    """
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, TrainConfig)
    _quiet_libraries()
    check_values(config)
    check_machine(config)
    check_baselines(config.evaluate.baselines)
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    plain.pop("run_dir")  # named after the moment of composing, so it differs when the run goes on
    with hold(run_dir):
        return _run(config, plain, run_dir, overrides, go_on=go_on)


def _run(
    config: TrainConfig, plain: dict[str, Any], run_dir: Path, overrides: list[str], *, go_on: bool
) -> float | None:
    """What :func:`run` does in a directory that no other process writes to."""
    directory = RunDirectory(run_dir, plain, overrides, resume=go_on or config.resume is not None)
    if go_on and directory.is_finished:
        log.info("%s is finished; skipped", run_dir)
        return metric(directory.read_metrics(), config.optimized_metric)
    console = Console()
    if directory.is_finished:
        log.info("%s is finished; nothing to do", run_dir)
    else:
        origin = provenance(overrides)
        stages = Stages(config, directory, plain, origin)
        try:
            _execute(stages, config, directory, origin)
        finally:
            stages.close()
    if not (run_dir / "report.html").is_file():
        from atp.report.page import write_report  # with matplotlib, which nothing before this needs

        started = time.perf_counter()
        write_report(run_dir)
        log.info("report: written in %.1f s", time.perf_counter() - started)
    metrics = directory.read_metrics()
    console.print(comparison_table(metrics), *evidence_tables(metrics), sep="\n")
    console.print(
        f"run directory: {run_dir}", f"report:        {run_dir / 'report.html'}", "", sep="\n", highlight=False
    )
    exported = metrics["export"]
    lines = load_lines(str(run_dir / "pruned"), stock=exported["stock"], adapter=exported.get("adapter", False))
    console.print(lines, highlight=False, markup=False, soft_wrap=True)
    if fault := metrics["removal"].get("not_verified"):
        raise NotVerified(f"not verified: {fault}. The weights are kept in {run_dir / 'pruned'}; do not use them as is")
    return metric(metrics, config.optimized_metric)


def export_adapter(run_dir: Path, output: Path, *, overwrite: bool = False) -> tuple[float, str]:
    """Write the model of a finished run once more, as pruned base with the adapter beside it.

    Args:
        run_dir: The run directory.
        output: Where it goes.
        overwrite: Replace a model directory that is there.

    Returns:
        Largest logit difference from what the run exported, and what is wrong if it is too large.

    Raises:
        ValueError: The directory is no finished run, or lacks what an adapter is made of.
    """
    file = run_dir / CONFIG
    saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "overrides" not in saved:
        raise UserError(f"{run_dir} is not a run directory; an adapter is made from a run's own checkpoint")
    named = {"run_dir": str(run_dir)}  # its default is named after the moment of composing
    settings = with_new_settings(saved["config"], str(file))
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), settings, named))
    assert isinstance(config, TrainConfig)
    config.export.gguf, config.export.onnx, config.export.push_to_hub = [], False, None
    directory = RunDirectory(run_dir, settings, saved["overrides"], resume=True)
    if not directory.is_finished:
        raise UserError(f"{run_dir} is not finished; go on with: python train.py resume={run_dir}")
    _quiet_libraries()
    written = json.loads((run_dir / "pruned" / PROVENANCE_FILE).read_text(encoding="utf-8"))
    stages = Stages(config, directory, settings, written["run"])
    try:
        compared = stages.export_unmerged(output, overwrite=overwrite)
    finally:
        stages.close()
    metrics = directory.read_metrics()
    write_card(output, {**metrics, "export": {**metrics["export"], "formats": []}})
    return compared


def check_data(cfg: DictConfig) -> int:
    """Print what a model would see of a configuration's data, and what is wrong with the user's own files.

    Args:
        cfg: The composed configuration.

    Returns:
        How many rows are bad.

    Raises:
        ValueError: A user's mistake other than bad rows.
    """
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, TrainConfig)
    check_values(config)
    console = Console()
    tokenizer = parts.load_tokenizer(config.model)
    faults = parts.data_faults(config.data, tokenizer)
    skips = config.data.on_error == "skip" and faults.good
    if faults.count:
        ways = "skipped (data.on_error=skip)" if skips else "mend or remove them, or skip them with data.on_error=skip"
        console.print(f"{faults.count} bad rows, {faults.good} good ones; {ways}:", style="bold red", soft_wrap=True)
    for fault in faults.lines[: check.MOST_FAULTS]:
        console.print(f"error: {fault}", style="red", highlight=False, markup=False, soft_wrap=True)
    if faults.count and not skips:
        return faults.count
    plain = parts.load_splits(config.data, config.seed, tokenizer)
    splits = parts.load_prompt(config, tokenizer).on_splits(plain, tokenizer)
    check.report(splits, tokenizer, max_length=config.data.max_length, loss_on=config.data.loss_on, console=console)
    return 0


def _execute(stages: Stages, config: TrainConfig, directory: RunDirectory, origin: dict[str, Any]) -> None:
    """Do all stages in order, then write metrics, card and final figures."""
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "fit": stages.fit_jointly,
        "export": stages.remove_and_export,
        "dense": lambda: stages.evaluate_model(stages.dense()),
        "pruned": lambda: stages.evaluate_model(stages.pruned()),
    }
    if config.evaluate.reference:
        work["dense_lora"] = lambda: stages.tune("dense_lora", stages.dense())
    for name in config.evaluate.baselines:
        work[name] = functools.partial(stages.tune_baseline, name)
    work |= {"samples": stages.write_samples, "cost": stages.measure}
    shared = _shared_results(config, directory, stages.plain_config)
    before = stages.watch.take()
    results: dict[str, dict[str, Any]] = {}
    for number, (name, do) in enumerate(work.items(), 1):
        log.info("stage %d of %d: %s", number, len(work), name)
        results[name] = _stage(name, do, config.seed, directory, stages.watch, shared)
    metrics = assemble(
        results,
        before=before,
        config=config,
        origin=origin,
        data={
            "name": stages.splits.name,
            **stages.splits.counts(),
            **({"skipped_rows": len(stages.splits.skipped)} if stages.splits.skipped else {}),
        },
        overlap=stages.splits.overlap,
        prompt=stages.prompt.plain(),
        dense_parameters=stages.dense_parameters,
        dense_blocks=stages.space.total_parameters,
        dense_widths=[asdict(widths) for widths in layer_widths(stages.base_config)],
        device=str(stages.device),
    )
    write_card(directory.path / "pruned", metrics)
    stages.publish(final_figures(metrics), comparison_cells(metrics))
    _upload(config.export, directory.path / "pruned", metrics)
    directory.write_metrics(metrics)


def _upload(settings: ExportConfig, folder: Path, metrics: dict[str, Any]) -> None:
    """Upload the export where the user asked for it and every format matches the model."""
    repository = settings.push_to_hub
    if repository is None:
        return
    if fault := metrics["removal"]["not_verified"]:
        log.error("export.push_to_hub=%s: not uploaded, not verified: %s", repository, fault)
    else:
        log.info("uploaded to %s", upload(folder, repository, public=settings.public))


def _shared_results(config: TrainConfig, directory: RunDirectory, plain: dict[str, Any]) -> SharedResults | None:
    sweep = sweep_of(directory.path)
    folder = Path(config.evaluate.shared) if config.evaluate.shared else sweep and sweep / "shared"
    return SharedResults(folder, plain) if folder else None


def _stage(
    name: str,
    work: Callable[[], dict[str, Any]],
    seed: int,
    directory: RunDirectory,
    watch: Stopwatch,
    shared: SharedResults | None = None,
) -> dict[str, Any]:
    """Return a stage's result with its seconds, all and by part; a resumed run reads it from its file."""

    def timed() -> dict[str, Any]:
        seed_everything(seed, workers=True, verbose=False)
        started = time.perf_counter()
        with watch.part(name):
            result = work()
            gc.collect()
        return {**result, "seconds": round(time.perf_counter() - started, 2), "parts": watch.take()}

    if shared is None or name not in SharedResults.STAGES:
        return directory.stage(name, timed)
    return directory.stage(name, lambda: shared.take(name, timed))


def _quiet_libraries() -> None:
    """Keep libraries from talking over the run's own lines."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", module="transformers", category=FutureWarning)
