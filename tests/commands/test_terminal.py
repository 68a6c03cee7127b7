"""Terminals that know few letters, are narrow, gone or never there: commands end as they would elsewhere."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from atp.commands.terminal import ReaderLeft, SteadyStream

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


def test_check_in_ascii_on_a_narrow_terminal_without_a_home() -> None:
    done = command("experiment=smoke", "name=x", "--check", **ASCII)
    assert done.returncode == 0, done.stderr.decode()
    assert b"train records" in done.stdout.replace(b"\n", b" ") and done.stdout.isascii()


def test_error_with_letters_the_terminal_lacks() -> None:
    done = command("model=local", "model.path=/none/dätä", "--check", **ASCII)
    assert done.returncode == 2 and b"model.path=/none/d" in done.stderr and b"Traceback" not in done.stderr


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
