"""Output that never ends a run: letters a terminal lacks, readers who left, terminals that are gone.

The first thing every command does. What a run writes to its directory is the result; what it prints is for whoever
looks, and there may be nobody. It knows the two standard streams, nothing of what is printed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO, errno.ESHUTDOWN)


class ReaderLeft(Exception):
    """Nobody reads what a command prints."""


class SteadyStream:
    """A text stream that goes quiet when whoever read it is gone.

    Args:
        stream: The stream behind; everything but writing is its own.
        leaves: Whether a write raises :class:`ReaderLeft` then, since there is nothing else to do.
    """

    def __init__(self, stream: TextIO, *, leaves: bool = False) -> None:
        self._stream = stream
        self._leaves = leaves

    def write(self, text: str) -> int:
        """Write a text; its length in any case."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._go_quiet(error)
        if self._leaves:
            raise ReaderLeft
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand what was written to the reader."""
        try:
            self._stream.flush()
        except OSError as error:
            self._go_quiet(error)

    def _go_quiet(self, error: OSError) -> None:
        """Let everything that follows go nowhere, also what child processes and the interpreter's end write."""
        if error.errno not in _GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def steady(*, leaves: bool = False) -> None:
    """Make the standard streams steady; may be called repeatedly.

    Args:
        leaves: For a command that has nothing to do but print: :class:`ReaderLeft` where the reader of its output left.
    """
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # for the process' life
        elif not isinstance(stream, SteadyStream):
            with contextlib.suppress(AttributeError, ValueError):  # a stand-in for a stream, as notebooks have
                stream.reconfigure(errors="backslashreplace" if name == "stderr" else "replace")
            setattr(sys, name, SteadyStream(stream, leaves=leaves and name == "stdout"))
