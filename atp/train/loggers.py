"""Experiment loggers: wandb, TensorBoard and MLflow, each optional.

Weights & Biases goes online only for a user who is already logged in, otherwise writes offline runs that can be
synchronised later, and never asks for anything. TensorBoard and MLflow are chosen by one word as well. What the loggers
have no common call for (pictures, tables, artifacts) is told apart here and nowhere else. Sits beside callbacks; knows
nothing of what is logged.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import importlib.util
import io
import logging
import os
import re
import shlex
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from PIL.Image import Image

from atp.atomic import appearing, write_text
from atp.errors import UserError
from atp.train.login import goes_offline
from atp.train.reach import why_unreachable

log = logging.getLogger(__name__)


def wandb_logger(
    save_dir: str,
    *,
    name: str | None = None,
    offline: bool | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    **options: Any,
) -> WandbLogger:
    """A wandb logger: online when logged in, else offline.

    The run keeps its id in ``save_dir``, so that a resumed run goes on in the same wandb run.

    Args:
        save_dir: Where wandb writes, inside the run directory.
        name: Run name.
        offline: Force it either way; None decides by login and ``WANDB_MODE``.
        group: Runs shown together; unset takes the sweep's folder name inside a sweep, the run's name elsewhere.
        tags: Tags beside the ones given; empty ones are left out.
        **options: Passed on, e.g. ``project``.

    Raises:
        UserError: ``WANDB_MODE=online``, and the server cannot be reached.
    """
    if offline is None:
        offline = goes_offline(os.environ.get("WANDB_MODE", ""))
    os.environ.setdefault("WANDB_SILENT", "true")
    with contextlib.suppress(
        ImportError
    ):  # wandb imports it at the first picture: a second, better spent before training
        importlib.import_module("pandas")
    folder = Path(save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    sweep = folder.parent.parent
    if group is None:
        group = sweep.name if (sweep / "sweep.json").is_file() else name
    return WandbLogger(
        save_dir=save_dir,
        name=name,
        offline=offline,
        log_model=False,
        id=_run_id(folder / "run_id.txt"),
        resume="allow",
        group=group,
        tags=[str(tag) for tag in tags if tag],
        **options,
    )


def _run_id(path: Path) -> str:
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def tensorboard_logger(save_dir: str, *, name: str | None = None, **options: Any) -> Logger:
    """A TensorBoard logger; its files lie in ``save_dir``.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    _need("tensorboard", "tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(save_dir=save_dir, name="", version="", **options)


def mlflow_logger(
    save_dir: str,
    *,
    name: str | None = None,
    experiment: str = "atp",
    tracking_uri: str | None = None,
    tags: Sequence[str] = (),
    **options: Any,
) -> Logger:
    """An MLflow logger: to the tracking server that is configured, else into a database file in ``save_dir``.

    Args:
        save_dir: Where the files go when there is no server.
        name: Run name.
        experiment: MLflow experiment.
        tracking_uri: Server or store; unset takes ``MLFLOW_TRACKING_URI``, or local files. A server that does not
            answer is replaced by local files, with a warning.
        tags: Stored as tags with an empty value.
        **options: Passed on to Lightning's logger.

    Raises:
        ValueError: MLflow is not installed.
    """
    _need("mlflow", "mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    folder = Path(save_dir).resolve()
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    reason = why_unreachable(uri) if uri else None
    if reason:
        log.warning("mlflow: %s cannot be reached (%s), so the run is written to %s", _public(uri), reason, folder)
    if not uri or reason:
        folder.mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        options.setdefault("artifact_location", (folder / "artifacts").as_uri())
    return MLFlowLogger(
        experiment_name=experiment,
        run_name=name,
        tracking_uri=uri,
        tags={str(tag): "" for tag in tags if tag},
        **options,
    )


def _public(uri: str | None) -> str:
    """An address without the password that may stand in it."""
    return re.sub(r"//[^/@]*@", "//", uri or "")


def _need(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"logger={extra} needs the package {package}: pip install 'atp[{extra}]'")


def log_image(loggers: Sequence[Logger], name: str, image: Image, step: int, caption: str = "") -> None:
    """Show a picture in every logger that can.

    Args:
        loggers: Any loggers; those without pictures are passed over.
        name: Name of the panel.
        image: An RGB picture.
        step: Optimiser step.
        caption: One line below it.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [image], step, caption=[caption])
        elif _is(logger, "TensorBoardLogger"):
            logger.experiment.add_image(name, np.asarray(image), step, dataformats="HWC")  # type: ignore[attr-defined]
        elif _is(logger, "MLFlowLogger"):
            logger.experiment.log_image(logger.run_id, image, f"{name}_{step:06d}.png")  # type: ignore[attr-defined]


def log_table(
    loggers: Sequence[Logger], name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int | None = None
) -> None:
    """Hand a table to every logger that can hold one; arguments as in :func:`log_image`."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(name, columns=list(columns), data=[list(row) for row in rows], step=step)
        elif _is(logger, "TensorBoardLogger"):
            if len(rows) <= 100:  # larger ones are data, which it has no place for
                text = markdown_table(columns, rows)
                logger.experiment.add_text(name, text, step or 0)  # type: ignore[attr-defined]
        elif _is(logger, "MLFlowLogger"):
            suffix = "" if step is None else f"_{step:06d}"
            text = csv_text(columns, rows)
            logger.experiment.log_text(logger.run_id, text, f"{name}{suffix}.csv")  # type: ignore[attr-defined]


def log_figures(loggers: Sequence[Logger], figures: Mapping[str, float]) -> None:
    """Hand final figures to every logger; wandb shows them in the run's summary."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(dict(figures))
        elif not isinstance(logger, CSVLogger):
            logger.log_metrics(dict(figures), step=0)


def log_folder(loggers: Sequence[Logger], name: str, folder: Path) -> list[str]:
    """Hand a folder to every logger that keeps artifacts; returns the names of those that did."""
    took = []
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            artifact = wandb.Artifact(name, type="model")
            artifact.add_dir(str(folder))
            logger.experiment.log_artifact(artifact)
            took.append("wandb")
        elif _is(logger, "MLFlowLogger"):
            logger.experiment.log_artifacts(logger.run_id, str(folder), name)  # type: ignore[attr-defined]
            took.append("mlflow")
    return took


def _is(logger: Logger, class_name: str) -> bool:
    return type(logger).__name__ == class_name  # by name: the classes' packages are optional


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; pipes and line breaks inside cells are made harmless."""

    def line(cells: Sequence[Any]) -> str:
        texts = (str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in cells)
        return "| " + " | ".join(texts) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)]) + "\n"


def csv_text(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a table as CSV."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return buffer.getvalue()


def csv_logger(folder: Path) -> CSVLogger:
    """A CSV logger that writes beside what an interrupted fit has left in ``folder``, never over it."""
    parts = len(list(folder.glob("part_*")))
    return CSVLogger(save_dir=str(folder), name="", version=f"part_{parts}", flush_logs_every_n_steps=20)


def merge_csv(folder: Path, target: Path) -> None:
    """Join the parts of a fit in order; where a resumed part repeats steps, the later part counts."""
    rows: list[dict[str, str]] = []
    columns: list[str] = []
    for part in sorted(folder.glob("part_*/metrics.csv"), key=lambda p: int(p.parent.name.removeprefix("part_"))):
        with part.open(newline="", encoding="utf-8") as file:
            new = [row for row in csv.DictReader(file) if (row["step"] or "").isdecimal()]  # a kill cuts rows short
        if new:
            first = min(int(row["step"]) for row in new)
            rows = [row for row in rows if int(row["step"]) < first] + new
            columns += [name for name in new[0] if name not in columns]
    if not rows:
        return
    columns = [name for name in ("step", "epoch") if name in columns] + [
        c for c in columns if c not in ("step", "epoch")
    ]
    with appearing(target) as stage, stage.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a CSV file whole or not at all."""
    write_text(path, csv_text(columns, rows))


def close_loggers(loggers: Sequence[Logger]) -> None:
    """Finish every run that stays open, so that the next job starts clean, and say how to upload an offline one."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            if wandb.run is None:
                continue
            folder = Path(wandb.run.dir).parent
            is_offline = wandb.run.settings.mode == "offline" or wandb.run.offline
            wandb.finish()
            if is_offline:
                parts = [
                    shlex.quote(str(part)) for part in sorted(folder.parent.glob(f"offline-run-*-{logger.version}"))
                ]
                log.info("upload this run with: wandb sync %s", " ".join(parts or [shlex.quote(str(folder))]))
        else:
            logger.finalize("success")
