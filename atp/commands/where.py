"""Where a run or a sweep is written: made, and kept for one process, before Hydra writes there.

Beside the command line. It knows folders and the setting that names one, nothing of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from atp.config.quoting import assigned, key_of
from atp.run.lock import hold, make


@dataclass(frozen=True)
class Place:
    """The folder that Hydra is about to write to."""

    folder: Path
    setting: str
    is_sweep: bool

    def prepare(self, arguments: Sequence[str], held: ExitStack) -> list[str]:
        """Make the folder, keep other processes out of a run's, and name it in the arguments once and for all.

        Raises:
            UserError: It cannot be made, or another process is at work in it.
        """
        if self.is_sweep:
            make(self.folder, self.setting)
            return list(arguments)
        held.enter_context(hold(self.folder, self.setting))
        if self.setting != "run_dir" or any(key_of(argument) == "run_dir" for argument in arguments):
            return list(arguments)
        # The default has the time in it, which Hydra would read anew. Beside other overrides: flags may follow those.
        at = next((at for at, argument in enumerate(arguments) if "=" in argument and argument[0] != "-"), 0)
        return [*arguments[:at], assigned("run_dir", str(self.folder)), *arguments[at:]]
