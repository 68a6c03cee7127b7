"""Quotes around what Hydra's grammar cannot read: paths are taken as they stand, other values are corrected.

Beside the command line, before Hydra parses it. Hydra reads a value as an expression, so that ``=``, brackets, ``~``,
commas and letters beyond ASCII need quotes inside the shell's quotes. Where a setting is a path there is no doubt what
was meant; elsewhere the command line with quotes is offered. It knows Hydra's grammar and which settings are paths.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from atp.config.schema import TrainConfig
from atp.errors import UserError

PATHS = (
    *("model.path", "data.path", "data.validation_path", "data.test_path", "data.tasks_file", "data.cache"),
    *("prompt.path", "prune.latency_table", "evaluate.path", "evaluate.harness_path", "evaluate.shared"),
    *("run_dir", "resume", "hydra.run.dir", "hydra.sweep.dir"),
)
_OPEN = ("trainer.extra",)  # mappings in which Hydra wants a plus before a new key, though every key is new
_SWEEP_FLAGS = ("-m", "--multirun")


def key_of(override: str) -> str:
    """The dotted name that an override is about."""
    return override.lstrip("+~").partition("=")[0]


def assigned(name: str, text: str) -> str:
    """An override that gives a setting a text, whatever is in it."""
    quote = Quote.single if '"' in text else Quote.double
    return f"{name}={QuotedString(text, quote).with_quotes()}"


def text_of(value: str) -> str:
    """A path as the user meant it, from an override's value with or without Hydra's quotes; ``~`` is the home."""
    parsed = _parsed(f"resume={value}")
    found = parsed.value() if parsed is not None else value  # without quotes
    return _at_home(found if isinstance(found, str) else value)


def sweeps(arguments: Sequence[str]) -> bool:
    """Whether a command line starts several runs."""
    return any(
        argument in _SWEEP_FLAGS
        or argument.lower() == "hydra.mode=multirun"
        or (argument.startswith("sweep=") and argument not in ("sweep=", "sweep=null"))
        for argument in arguments
    )


def readable(arguments: Sequence[str]) -> list[str]:
    """Arguments with quotes around paths that need them, and a plus before keys of open mappings."""
    several = sweeps(arguments)
    return [_readable(argument, several) for argument in arguments]


def corrected(arguments: Sequence[str]) -> str | None:
    """The command line with quotes where Hydra could not read it, ready to copy; None where nothing is certain."""
    several = sweeps(arguments)
    found = []
    for argument in readable(arguments):
        if argument.startswith("-") or "=" not in argument or _parsed(argument) is not None:
            found.append(argument)
            continue
        name, _, value = argument.partition("=")
        better = _quoted(name, value, several)
        if better is None:
            return None
        found.append(better)
    return command_line(found) if found != list(arguments) else None


def three_ways(arguments: Sequence[str], ambiguous: str) -> list[str]:
    """What a value with commas can mean, each with the command line for it."""
    name, _, value = ambiguous.partition("=")

    def with_value(new: str, *flags: str) -> str:
        return command_line([*flags, *(new if argument == ambiguous else argument for argument in arguments)])

    return [
        f"a text: {with_value(assigned(name, value))}",
        f"a list: {with_value(f'{name}=[{value}]')}",
        f"a sweep: {with_value(ambiguous, '-m')}",
    ]


def command_line(arguments: Sequence[str]) -> str:
    """A command as a shell takes it."""
    program = Path(sys.argv[0]).name
    start = ["python", "train.py"] if program == "train.py" else ["atp", "train"]
    return " ".join([*start, *map(shlex.quote, arguments)])


def _readable(argument: str, several: bool) -> str:
    bare = argument.lstrip("+")
    name, _, value = bare.partition("=")
    if any(name == mapping or name.startswith(f"{mapping}.") for mapping in _OPEN):
        is_new = name not in _OPEN or value.startswith("{")
        return f"++{bare}" if is_new else argument
    if name not in PATHS or not value:
        return argument
    return _path(argument[: len(argument) - len(bare)] + name, value, several) or argument


def _path(name: str, value: str, several: bool) -> str | None:
    """A path's override as Hydra can read it; None for one that it can, or that may mean something else."""
    parsed = _parsed(f"{name}={value}")
    if parsed is None:
        if _exists(value):
            return assigned(name, _at_home(value))
        return None if value[0] in "\"'{" else _quoted(name, value, several, _at_home)
    found: Any = parsed.value()
    if isinstance(found, ChoiceSweep):
        is_one = _exists(value) and not (several and any(_exists(part) for part in value.split(",")))
        return assigned(name, _at_home(value)) if is_one else None
    if isinstance(found, str):
        return assigned(name, _at_home(found)) if _at_home(found) != found else None
    return assigned(name, value) if value[0] in "[{" and _exists(value) else None


def _quoted(name: str, value: str, several: bool, change: Callable[[str], str] = str) -> str | None:
    """An override that Hydra cannot read, with quotes around the value or its parts; None if it still cannot."""

    def quoted(text: str) -> str:
        text = text.strip()
        is_fine = text and _parsed(f"{name}={text}") is not None
        return text if is_fine else assigned("", change(text))[1:]

    bare = name.lstrip("+~")
    if value.startswith("[") and value.endswith("]"):
        new = f"[{','.join(quoted(part) for part in value[1:-1].split(','))}]"
    elif value.startswith("{") and value.endswith("}"):
        pairs = [part.partition(":") for part in value[1:-1].split(",")]
        new = "{" + ",".join(f"{key.strip()}:{quoted(inner)}" for key, _, inner in pairs) + "}"
    elif not _takes_text(bare):
        return None
    elif "," in value and several:
        new = ",".join(quoted(part) for part in value.split(","))
    elif "," in value and bare in PATHS and change is not str:
        return None  # one path or several: asked
    else:
        new = assigned("", change(value))[1:]
    return f"{name}={new}" if _parsed(f"{name}={new}") is not None else None


def _takes_text(name: str) -> bool:
    """Whether a setting can be a text; also for a name that the schema does not have."""
    node: Any = TrainConfig()
    for part in name.split("."):
        if not is_dataclass(node):
            return True
        kinds = {item.name: str(item.type) for item in fields(node)}
        if part not in kinds:
            return True
        if not is_dataclass(getattr(node, part)):
            return kinds[part].startswith(("str", "Any"))
        node = getattr(node, part)
    return False


def _at_home(text: str) -> str:
    """A path with ``~`` and ``~user`` replaced; a file whose name begins with ``~`` is one of this folder."""
    if not text.startswith("~"):
        return text
    if Path(text).exists():
        return f"./{text}"
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        if text == "~" or text.startswith("~/"):
            raise UserError(f"{text}: there is no home directory (HOME is not set); write the whole path") from None
        return f"./{text}"


def _exists(text: str) -> bool:
    try:
        return Path(_at_home(text)).exists()
    except (OSError, ValueError):
        return False


def _parsed(override: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None
