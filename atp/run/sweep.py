"""Sweeps: many runs in one folder, which can be started again without repeating anything.

Sits beside the run directory. A sweep's folder holds one run directory per job, ``sweep.json`` (what was swept) and
``shared/`` (results that all jobs need, such as the dense reference, kept by the settings they depend on). A job that
failed or was stopped early leaves ``job.json`` with the reason. Everything here is files and file locks, so jobs may
run one after another, side by side, or on other machines with a common disk. It knows neither Hydra nor what a run
does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from atp.atomic import write_json
from atp.run.directory import CONFIG, METRICS

log = logging.getLogger(__name__)

SWEEP = "sweep.json"
JOB = "job.json"

# What a reference does not depend on; everything else, also options added later, is part of its key.
_IRRELEVANT: tuple[str, ...] = (
    *("name", "run_dir", "resume", "experiment", "sweep", "optimized_metric", "prune", "export", "logger", "threads"),
    *("evaluate.reference", "evaluate.baselines", "evaluate.samples", "evaluate.shared"),
    *("trainer.accelerator", "trainer.checkpoint_every_n_steps", "trainer.log_every_n_steps"),
)
_TRAINING = ("lora", "optim", "trainer", "callbacks")


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        path: Its run directory.
        state: ``finished``, ``failed``, ``stopped`` (a bad trial ended early) or ``unfinished``.
        reason: Why it failed or was stopped.
        time: Unix time of the failure or the stop; 0 where there was none.
    """

    path: Path
    state: str
    reason: str = ""
    time: float = 0.0


def start_sweep(folder: Path, overrides: list[str]) -> None:
    """Make the sweep's folder, or open it again."""
    folder.mkdir(parents=True, exist_ok=True)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(folder / SWEEP, {"format": 1, "overrides": overrides, "started": started})


def sweep_of(run_dir: Path) -> Path | None:
    """The sweep that a run belongs to, if any."""
    return run_dir.parent if (run_dir.parent / SWEEP).is_file() else None


def mark_job(run_dir: Path, state: str, reason: str) -> None:
    """Note in ``job.json`` why a job did not finish."""
    write_json(run_dir / JOB, {"state": state, "reason": reason, "time": time.time()})


def clear_mark(run_dir: Path) -> None:
    """Forget an earlier failure: the job is tried again."""
    (run_dir / JOB).unlink(missing_ok=True)


def read_job(run_dir: Path) -> Job:
    """State of a job from its run directory."""
    try:
        mark = json.loads((run_dir / JOB).read_text(encoding="utf-8"))
        return Job(run_dir, str(mark["state"]), str(mark["reason"]), float(mark["time"]))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Job(run_dir, "failed", f"{JOB} cannot be read: {error}")
    return Job(run_dir, "finished" if (run_dir / METRICS).is_file() else "unfinished")


def read_jobs(folder: Path) -> list[Job]:
    """All jobs of a sweep, in the order of their names."""
    found = {path.parent for name in (CONFIG, JOB, METRICS) for path in folder.glob(f"*/{name}")}
    return [read_job(path) for path in sorted(found)]


def summary_lines(folder: Path, jobs: list[Job]) -> list[str]:
    """What happened, for the end of a sweep: counts, then every job that did not finish, with its reason."""
    counts = {
        state: sum(job.state == state for job in jobs) for state in ("finished", "stopped", "failed", "unfinished")
    }
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    lines = [f"sweep {folder}: {told or 'no jobs'}"]
    lines += [
        f"  {job.state}: {job.path.name}: {job.reason or 'interrupted'}" for job in jobs if job.state != "finished"
    ]
    if counts["failed"] or counts["unfinished"]:
        lines.append("  start the sweep again with the same command: finished jobs are skipped, the others go on")
    return [*lines, f"report:  python -m atp.report {folder}"]


class SharedResults:
    """Results that several runs need, computed by whichever comes first.

    Args:
        folder: Where they are kept; made when first needed.
        config: The run's settings as plain data.
    """

    STAGES = ("dense", "dense_lora")

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self._config = config

    def key(self, stage: str) -> str:
        """Digest of everything the stage's result depends on."""
        ignored = _IRRELEVANT + (_TRAINING if stage == "dense" else ())
        content = json.dumps([stage, _without(self._config, ignored)], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def take(self, stage: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a stage: another run's where one has it, else from ``work``, kept for the others.

        A run that finds another one at work on the same result waits for it. What is another's says so under
        ``shared_from``; its ``seconds`` are that run's.
        """
        path = self.folder / f"{stage}_{self.key(stage)}.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if path.is_file():
                log.info("%s: shared by this sweep, taken from %s", stage, path)
                return {**json.loads(path.read_text(encoding="utf-8")), "shared_from": str(path)}
            result = work()
            write_json(path, result)
            return result


def lease_gpu(folder: Path, count: int) -> int | None:
    """Reserve one of the machine's GPUs for this process, so that jobs side by side do not share one.

    The lease is a lock on a file in the sweep's folder and ends with the process. It must be taken before CUDA starts.

    Args:
        folder: The sweep's folder.
        count: GPUs of this machine.

    Returns:
        Index of the GPU, now the only one this process sees; None with fewer than two GPUs, where one was set by the
        caller already, or where all are taken.
    """
    if count < 2 or _leases:
        return None
    for index in range(count):
        lock = FileLock(folder / f".gpu{index}.{platform.node()}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        _leases.append(lock)
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) else str(index)
        return index
    log.warning("all %d GPUs are taken by other jobs; this one shares; lower hydra.launcher.n_jobs", count)
    return None


_leases: list[FileLock] = []


def _without(node: Any, ignored: tuple[str, ...], prefix: str = "") -> Any:
    if not isinstance(node, Mapping):
        return node
    named = {key: f"{prefix}.{key}".lstrip(".") for key in node}
    kept = {key: value for key, value in node.items() if not _is_ignored(named[key], ignored)}
    return {key: _without(value, ignored, named[key]) for key, value in kept.items()}


def _is_ignored(name: str, ignored: tuple[str, ...]) -> bool:
    return name in ignored or name.startswith("evaluate.speed")
