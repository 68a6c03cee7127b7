"""One process per run directory."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from atp.commands.train import main
from atp.errors import UserError
from atp.run.lock import LOCK, OWNER, InUse, hold

HOLDER = """
import sys
from collections.abc import Iterator
from pathlib import Path
from atp.run.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_second_process_is_refused_and_a_dead_ones_lock_taken_over(
    other: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(InUse, match=rf"in use by process {other.pid} on {platform.node()}"), hold(folder):
        pass
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(SystemExit) as stop:
        main(["experiment=smoke", f"run_dir={folder}"])
    assert stop.value.code == 2 and f"process {other.pid}" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before
    other.kill()
    other.wait()
    with hold(folder):
        assert json.loads((folder / OWNER).read_text())["pid"] == os.getpid()
    assert not (folder / OWNER).exists()


def test_going_on_is_refused_while_the_run_is_at_work(
    other: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "config.json").write_text(json.dumps({"overrides": ["experiment=smoke"], "config": {}}))
    with pytest.raises(SystemExit) as stop:
        main([f"resume={tmp_path / 'run'}"])
    assert stop.value.code == 2 and "is in use by process" in capsys.readouterr().err


def test_lock_that_a_dead_process_left_to_its_child(tmp_path: Path) -> None:
    """A loader's worker that outlives its parent still holds the file."""
    import fcntl

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / OWNER).write_text(json.dumps({"pid": gone.pid, "host": platform.node(), "started": "then"}))
    with (tmp_path / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with hold(tmp_path):
            assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
        (tmp_path / OWNER).write_text(json.dumps({"pid": gone.pid, "host": "elsewhere", "started": "then"}))
    with (tmp_path / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InUse, match="on elsewhere, since then"), hold(tmp_path):
            pass


def test_a_process_does_not_refuse_itself(tmp_path: Path) -> None:
    with hold(tmp_path / "a"), hold(tmp_path / "a"):
        assert (tmp_path / "a" / OWNER).is_file()


def test_folder_that_cannot_be_made_names_what_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "x" / "y"):
        told = r"run_dir=.*file is a file, not a folder; choose another run_dir"
        with pytest.raises(UserError, match=told), hold(folder):
            pass
    with pytest.raises(UserError, match=r"run_dir=.*\(File name too long\)"), hold(tmp_path / ("x" * 300)):
        pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="no permission to write there"), hold(tmp_path / "a"):
        pass
