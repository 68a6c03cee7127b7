"""Terminals that know few letters, are narrow, gone or never there: commands end as they would elsewhere."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from atp.commands.terminal import ReaderLeft, SteadyStream
from atp.commands.train import main
from atp.config.quoting import readable
from atp.data.encoding.cache import default_folder
from atp.errors import UserError

ROOT = Path(__file__).parent.parent.parent
BARE = {key: value for key, value in os.environ.items() if key not in ("HOME", "LANG", "LC_ALL", "TERM", "COLUMNS")}
ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "20"}


def command(*arguments: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    line = [sys.executable, str(ROOT / "train.py"), *arguments]
    shown = ["bash", "-c", f'set -o pipefail; "$@" {shell}', "bash", *line] if shell else line
    env = {**BARE, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(shown, env=env, capture_output=True, stdin=subprocess.DEVNULL, timeout=120, check=False)


@pytest.mark.parametrize("shell", ["| head -1", ">&-", "> /dev/null 2>&-"])
def test_help_for_nobody(shell: str) -> None:
    done = command("--help", shell=shell)
    assert (done.returncode, done.stderr) == (0, b"")


def test_check_in_ascii_on_a_narrow_terminal_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit) as stop:
        main(["experiment=smoke", 'name="größe"', "--check"])
    sys.stdout.flush()
    shown = sys.stdout.buffer.getvalue()  # type: ignore[attr-defined]
    assert stop.value.code == 0 and b"records" in shown and b"64" in shown


def test_error_with_letters_the_terminal_lacks() -> None:
    done = command("name=größe", **ASCII)
    assert done.returncode == 2 and b"error: cannot read the override" in done.stderr
    assert b"Traceback" not in done.stderr and done.stderr.isascii()


def test_no_home_directory_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a variable nor an entry in the list of users, as in a container with a number for its user."""
    for name in ("ATP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert default_folder().is_absolute()
    with pytest.raises(UserError, match=r"~/x: there is no home directory.*write the whole path"):
        readable(["data.path=~/x"])


def broken_pipe() -> io.TextIOWrapper:
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w", buffering=1)


def test_a_stream_goes_quiet_when_its_reader_left() -> None:
    with broken_pipe() as pipe:
        stream = SteadyStream(pipe)
        for _ in range(3):
            assert stream.write("line\n") == 5
            stream.flush()
    with broken_pipe() as pipe, pytest.raises(ReaderLeft):
        SteadyStream(pipe, leaves=True).write("line\n")


def test_other_faults_of_a_stream_are_told() -> None:
    with open("/dev/full", "w", buffering=1) as full:
        with pytest.raises(OSError, match="No space"):
            SteadyStream(full).write("line\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
