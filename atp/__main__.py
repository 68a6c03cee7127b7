"""The commands of the package under one name: ``atp export ...`` is ``python -m atp.export ...``.

Above everything else. It knows the commands' names; what a command does and its options are its own.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "prune and tune a model; takes what train.py takes",
    "evaluate": "score a run, an export or any model",
    "export": "write a model in another format",
    "generate": "continue prompts with a model",
    "serve": "answer OpenAI's clients with a GGUF file",
    "report": "write the report of a run or of many",
    "compare": "lay runs side by side",
    "dashboard": "make a wandb workspace for runs",
}
_OPTIONS = "Options are written --name value or name=value; train takes Hydra's name=value alone."


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command by its name.

    Args:
        argv: Arguments without the program name; the process' own when None.

    Raises:
        SystemExit: With 2 for an unknown command, otherwise as the command ends.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    listed = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(f"usage: atp COMMAND ...; atp COMMAND --help explains one\n{listed}\n{_OPTIONS}\n")
        return
    name, *rest = arguments
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        sys.stderr.write(f"error: there is no command {name!r}; {hint}there are {', '.join(COMMANDS)}\n")
        raise SystemExit(2)
    raise SystemExit(importlib.import_module(f"atp.commands.{name}").main(rest))


if __name__ == "__main__":
    main()
