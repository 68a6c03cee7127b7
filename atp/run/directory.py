"""The run directory: finding one, starting one, going on with one, and the results of finished stages.

Everything a run leaves lies in one directory, written so that a kill at any moment loses at most the step in hand: each
stage's result is a small JSON file, written under a temporary name and renamed. Knows files, nothing of what the stages
do.
"""

from __future__ import annotations

import itertools
import json
import logging
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from atp.atomic import write_json
from atp.config.moved import with_new_settings
from atp.config.names import with_short_names
from atp.config.schema import schema_default
from atp.errors import UserError

log = logging.getLogger(__name__)

RUNS = Path("runs")
CONFIG = "config.json"
METRICS = "metrics.json"

_PACKAGES = ("torch", "transformers", "peft", "lightning", "hydra-core")

# Settings that say where and how a run executes, not what it computes; they may differ when it goes on.
_MAY_DIFFER = (
    "resume",
    "run_dir",
    "logger",
    "callbacks",
    "threads",
    "trainer.accelerator",
    "optimized_metric",
    "evaluate.shared",
)

# Settings that change nothing in training, by prefix, with the stages that read them: those are done again when an
# unfinished run goes on with others. The first prefix that fits counts.
_REDONE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("export.push_to_hub", ()),
    ("export.artifact", ()),
    ("export", ("export", "pruned", "samples", "cost")),
    ("evaluate.speed", ("cost",)),
    ("evaluate.samples", ("samples",)),
    ("evaluate.baselines", ()),
    ("evaluate.reference", ()),
)


class RunInterrupted(Exception):
    """Ctrl-C or SIGTERM ended training; the message says how to go on."""


def find_run(name: str, run_name: str | None = None, root: Path = RUNS) -> Path:
    """The run directory to go on with.

    Args:
        name: A directory, or ``last`` for the newest one.
        run_name: With ``last``: look only at runs of this name.
        root: Folder of all runs.

    Raises:
        ValueError: No such run.
    """
    if name != "last":
        path = Path(name)
        if not (path / CONFIG).is_file():
            raise UserError(
                f"resume={name}: not a run directory (it holds no {CONFIG}); give one that a run has printed, or 'last'"
            )
        return path
    found = sorted(root.glob(f"{run_name or '*'}/*/{CONFIG}"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError(f"resume=last: there is no run under {root / (run_name or '')}; start one without resume")
    return found[-1].parent


def notebook_dir(name: str, root: Path = RUNS) -> Path:
    """A folder that is not there yet, for what a notebook's session writes: ``runs/notebooks/<name>/<number>``."""
    folder = root / "notebooks" / name
    number = next(n for n in itertools.count(1) if not (folder / str(n)).exists())
    (folder / str(number)).mkdir(parents=True)
    return folder / str(number)


def saved_overrides(run_dir: Path) -> list[str]:
    """The overrides that the run was started with."""
    return list(json.loads((run_dir / CONFIG).read_text(encoding="utf-8"))["overrides"])


class RunDirectory:
    """One run's directory.

    Args:
        path: The directory; made if absent.
        config: The resolved configuration as plain data.
        overrides: The command line's overrides, kept for resuming.
        resume: Whether the user asked to go on with it.

    Raises:
        ValueError: It holds another run (finished or not) and ``resume`` was not asked for, or settings differ that
            its training or finished results depend on.
    """

    def __init__(self, path: Path, config: dict[str, Any], overrides: list[str], *, resume: bool) -> None:
        self.path = path
        existing = path / CONFIG
        if existing.is_file() and not resume:
            state = "a finished run" if self.is_finished else "an unfinished run"
            raise UserError(
                f"run_dir={path} already holds {state}; choose another run_dir"
                + ("" if self.is_finished else f", or go on with it: resume={path}")
            )
        if existing.is_file():
            saved = json.loads(existing.read_text(encoding="utf-8"))["config"]
            saved = with_new_settings(saved, str(existing))
            changed = _differences(with_short_names(saved), with_short_names(config))
            redone = {name: _redone(name) for name in changed}
            refused = [line for name, line in changed.items() if self.is_finished or redone[name] is None]
            if refused:
                hint = "; formats of a finished run: python -m atp.export" if self.is_finished else ""
                raise UserError(
                    f"resume={path}: settings differ from the run's own ({'; '.join(refused[:4])}); leave them out or "
                    f"start anew{hint}"
                )
            if changed:
                self._forget({stage for stages in redone.values() for stage in stages or ()})
                write_json(existing, {"overrides": overrides, "config": config})
        else:
            write_json(existing, {"overrides": overrides, "config": config})

    def _forget(self, stages: set[str]) -> None:
        """Drop results that were made with other settings."""
        for name in sorted(stages):
            file = self.path / "stages" / f"{name}.json"
            if file.is_file():
                log.warning("%s is done again: its settings have changed", name)
                file.unlink()

    @property
    def is_finished(self) -> bool:
        """Whether the run has written its metrics."""
        return (self.path / METRICS).is_file()

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Result of a stage: from its file if it finished before, else by doing the work now."""
        path = self.path / "stages" / f"{name}.json"
        if path.is_file():
            log.info("%s: done before, taken from %s", name, path)
            return dict(json.loads(path.read_text(encoding="utf-8")))
        result = work()
        write_json(path, result)
        return result

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write ``metrics.json``, which makes the run a finished one."""
        write_json(self.path / METRICS, metrics)

    def read_metrics(self) -> dict[str, Any]:
        """The finished run's metrics."""
        return dict(json.loads((self.path / METRICS).read_text(encoding="utf-8")))

    def checkpoint(self, name: str) -> Path:
        """Return the checkpoint file of the training called ``name``."""
        return self.path / "checkpoints" / f"{name}.ckpt"


def provenance(overrides: list[str]) -> dict[str, Any]:
    """What produced a run: command, time, git commit of the code, versions of what matters."""
    versions = {name: metadata.version(name) for name in _PACKAGES}
    return {
        "command": " ".join(["python", "train.py", *overrides]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": _git_commit(),
        "versions": {"python": platform.python_version(), **versions},
    }


def _git_commit() -> str | None:
    """Commit of this checkout, with ``+`` for uncommitted changes; None for an installed package."""
    here = Path(__file__).resolve().parent.parent
    if not (here.parent / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(here)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed.strip() else "")


def _redone(name: str) -> tuple[str, ...] | None:
    """Return the stages to do again when a setting changes; None for a setting that changes training."""
    return next((stages for prefix, stages in _REDONE if name.startswith(prefix)), None)


def _differences(saved: Any, now: Any, prefix: str = "") -> dict[str, str]:
    """Return what differs, by dotted name; an option that an older version lacked counts as its default."""
    if prefix in _MAY_DIFFER:
        return {}
    if isinstance(saved, dict) and isinstance(now, dict):
        found: dict[str, str] = {}
        for key in sorted(set(saved) | set(now)):
            name = f"{prefix}.{key}" if prefix else key
            before = saved[key] if key in saved else schema_default(name)
            found |= _differences(before, now.get(key), name)
        return found
    return {} if saved == now else {prefix: f"{prefix}: was {saved!r}, now {now!r}"}
