"""One process per run directory: the second is refused, and what a dead one has left is taken over.

Beside the run directory. The lock is one on a file of the directory, which the system lets go when its process ends,
however it ends; who holds it stands in a second file, for the message. It knows processes and files, nothing of runs.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from atp.atomic import write_json
from atp.errors import UserError

log = logging.getLogger(__name__)

LOCK = ".lock"
OWNER = ".lock.json"

_held: set[Path] = set()  # by this process, which does not refuse itself


class InUse(UserError):
    """Another process is at work in a run directory."""


@contextmanager
def hold(folder: Path, name: str = "run_dir") -> Iterator[None]:
    """Keep other processes out of a folder while the block runs.

    Args:
        folder: The folder; made if absent.
        name: The setting that named it.

    Raises:
        InUse: Another living process holds it; the message has its process id, host and start.
        UserError: The folder cannot be made or written to.
    """
    make(folder, name)
    path = folder.resolve()
    if path in _held:
        yield
        return
    lock = _acquired(path, folder, name)
    _held.add(path)
    try:
        started = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(path / OWNER, {"pid": os.getpid(), "host": platform.node(), "started": started})
        yield
    finally:
        _held.discard(path)
        (path / OWNER).unlink(missing_ok=True)
        if lock is not None:
            lock.release()


def make(folder: Path, name: str = "run_dir") -> None:
    """Make a folder that can be written to.

    Raises:
        UserError: It cannot; the message says why and which part of the path is in the way.
    """
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        raise UserError(f"{name}={folder}: {_why(folder, error)}; choose another {name}") from None


def _why(folder: Path, error: OSError | ValueError) -> str:
    file = next((one for one in (folder, *folder.parents) if _is_other(one)), None)
    if file is not None:
        return f"{file} is a file, not a folder"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
        reason = "no permission to write there"
    return f"cannot be made or written to ({reason})"


def _is_other(path: Path) -> bool:
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError):
        return False


def _acquired(path: Path, folder: Path, name: str) -> FileLock | None:
    """The lock of a folder, or None where the file system has none."""
    for _ in range(2):
        lock = FileLock(path / LOCK)
        try:
            lock.acquire(blocking=False)
            return lock
        except Timeout:
            owner = _owner(path)
            if not _is_dead(owner):
                raise InUse(_told(owner, folder, name)) from None
            log.warning("%s: taken over from process %s, which is gone", folder, owner["pid"])
            (path / LOCK).unlink(missing_ok=True)  # a child of it may hold the old file
        except (OSError, NotImplementedError) as error:
            log.warning("%s: this file system has no locks (%s); see that no second run writes there", folder, error)
            return None
    raise InUse(_told(_owner(path), folder, name))


def _owner(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((path / OWNER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether a lock's process is known to be gone; one of another machine never is."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or owner.get("host") != platform.node():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _told(owner: dict[str, Any], folder: Path, name: str) -> str:
    who = f"process {owner['pid']} on {owner.get('host')}, since {owner.get('started')}" if owner.get("pid") else ""
    return f"{name}={folder} is in use by {who or 'another process'}; wait until it ends, or choose another {name}"
