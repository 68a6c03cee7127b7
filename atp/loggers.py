"""Experiment loggers that never stand in the way.

Weights & Biases goes online only for a user who is already logged in, otherwise writes offline runs that can be
synchronised later, and never asks for anything. Sits beside callbacks; knows nothing of what is logged.
"""

from __future__ import annotations

import csv
import logging
import netrc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

log = logging.getLogger(__name__)


def is_logged_in(environment: dict[str, str] | None = None) -> bool:
    """Whether a wandb API key is at hand: in the environment, or in the netrc file for the configured server."""
    env = os.environ if environment is None else environment
    if env.get("WANDB_API_KEY"):
        return True
    host = urlparse(env.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    candidates = [env["NETRC"]] if env.get("NETRC") else [str(Path.home() / ".netrc"), str(Path.home() / "_netrc")]
    for candidate in candidates:
        try:
            if netrc.netrc(candidate).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def wandb_logger(save_dir: str, *, name: str | None = None, offline: bool | None = None, **options: Any) -> WandbLogger:
    """A wandb logger: online when logged in, else offline.

    Args:
        save_dir: The run directory.
        name: Run name.
        offline: Force it either way; None decides by login and ``WANDB_MODE``.
        **options: Passed on, e.g. ``project``, ``group``, ``tags``.
    """
    mode = os.environ.get("WANDB_MODE", "")
    if offline is None:
        offline = mode in ("offline", "dryrun") or (mode != "online" and not is_logged_in())
    if offline and mode not in ("offline", "dryrun", "disabled"):
        log.info("wandb: not logged in, so the run is written offline; `wandb sync` uploads it later")
    os.environ.setdefault("WANDB_SILENT", "true")
    Path(save_dir).mkdir(parents=True, exist_ok=True)
    return WandbLogger(save_dir=save_dir, name=name, offline=offline, log_model=False, **options)


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
            new = list(csv.DictReader(file))
        if new:
            first = min(int(row["step"]) for row in new)
            rows = [row for row in rows if int(row["step"]) < first] + new
            columns += [name for name in new[0] if name not in columns]
    if not rows:
        return
    temporary = target.with_name(target.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, target)


def close_loggers(loggers: Sequence[Logger]) -> None:
    """Finish every wandb run, so that the next job starts clean, and say how to upload an offline one."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            if wandb.run is None:
                continue
            folder = Path(wandb.run.dir).parent
            is_offline = wandb.run.settings.mode == "offline" or wandb.run.offline
            wandb.finish()
            if is_offline:
                log.info("upload this run with: wandb sync %s", folder)
