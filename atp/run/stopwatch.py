"""Where a run's time goes: seconds by named part, each second in one part alone.

Held by the stages of a run, which enter a part while they are at it; what they take together is in ``metrics.json``
under ``run.parts``. It knows nothing of what the parts are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up seconds by part; a part entered inside another stops the outer one for as long."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block under ``with`` as this part."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Seconds of the parts since this was last called, by name, in the order in which they were first entered."""
        self._charge()
        taken, self._seconds = self._seconds, {}
        return {name: round(seconds, 2) for name, seconds in taken.items()}

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now
