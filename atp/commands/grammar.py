"""One grammar for all commands beside ``train``, which speaks Hydra's: places, then options by name.

    atp COMMAND PLACE ... name=value --name value --name=value --switch --no-switch

A command says what it takes as a dataclass of :func:`argument` and :func:`option` fields; help, types, defaults and
complaints come from it. Numbers and switches are read by OmegaConf from that dataclass, as the settings of a run are.
Texts and paths are taken as they stand, since OmegaConf would read ``${...}`` and ``???`` in them. Knows no command.
"""

from __future__ import annotations

import difflib
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from atp.commands.terminal import ReaderLeft, steady
from atp.errors import UserError

USER_ERROR, INTERRUPTED = 2, 130
_NAMES = {int: "a whole number", float: "a number", bool: "true or false"}


def argument(text: str) -> Any:
    """A dataclass field for what is given without a name: a place, or several where the field is a list."""
    return field(metadata={"help": text, "argument": True})


def option(default: Any, text: str, *, choices: Collection[str] = (), also: Sequence[str] = ()) -> Any:
    """A dataclass field for what is given by name.

    Args:
        default: Its value where it is not given.
        text: What ``--help`` says of it.
        choices: The values it may have, such as the names of a table; any if empty.
        also: Further names of it.
    """
    told = {"help": text, "choices": choices, "also": tuple(also)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=told)
    return field(default=default, metadata=told)


@dataclass(frozen=True)
class _Field:
    """What the grammar needs to know of one field."""

    name: str
    kind: type
    many: bool
    metadata: Mapping[str, Any]
    default: Any

    @property
    def is_argument(self) -> bool:
        return bool(self.metadata.get("argument"))

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def run_command(
    options: type[Any],
    work: Callable[[Any], int],
    argv: Sequence[str] | None,
    *,
    name: str,
    ignored: Sequence[str] = (),
) -> int:
    """Read a command's words and do its work, with the help and the exit codes that all commands have.

    Args:
        options: Dataclass of what it takes; its docstring is the description.
        work: Takes an instance, returns the exit code.
        argv: Words after the command's name; the process' own when None.
        name: The command's name.
        ignored: Prefixes that names may have, such as the groups of a run's settings.

    Returns:
        The work's code, 0 for help or a reader who left, 2 after a user's mistake, 130 after Ctrl-C.
    """
    steady(leaves=True)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if {"-h", "--help"} & set(words):
            sys.stdout.write(help_text(options, name))
            return 0
        code = work(parse(options, words, ignored=ignored))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was being written is not there\n")
        return INTERRUPTED
    except ReaderLeft:  # whoever read the output has seen enough
        return 0
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR


def parse(options: type[Any], words: Sequence[str], *, ignored: Sequence[str] = ()) -> Any:
    """Read words into an instance of a dataclass.

    Args:
        options: The dataclass.
        words: Places and options in any order; after ``--`` all words are places.
        ignored: Prefixes that names may have.

    Raises:
        UserError: A word names no option (the nearest is told), a value cannot be read, an option is given twice, or
            there are too few or too many places.
    """
    known = _fields(options)
    given, places = _Reader(known, ignored).read(list(words))
    values = {name: _value(options, known[name], texts) for name, texts in given.items()}
    return options(**values, **_placed([item for item in known.values() if item.is_argument], places))


class _Reader:
    """Sorts words into options and places."""

    def __init__(self, known: Mapping[str, _Field], ignored: Sequence[str]) -> None:
        self._ignored = ignored
        self._named = {name: item for name, item in known.items() if not item.is_argument}
        self._also = {other: item.name for item in self._named.values() for other in item.metadata["also"]}
        self._given: dict[str, list[str]] = {}

    def read(self, words: list[str]) -> tuple[dict[str, list[str]], list[str]]:
        """Texts by option, and places."""
        places: list[str] = []
        while words:
            word = words.pop(0)
            if word == "--":
                return self._given, places + words
            if self._is_option(word):
                self._take(word, words)
            else:
                places.append(word)
        return self._given, places

    def _is_option(self, word: str) -> bool:
        """A sweep's run directory such as ``prune.sparsity=0.5`` is a place, if it is there."""
        if word.startswith("-") and word != "-":
            return True
        name, equals, _ = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z][\w.-]*", name):
            return False
        return self._name(name) in self._named or not Path(word).expanduser().exists()

    def _name(self, text: str) -> str:
        name = text.lstrip("-").replace("-", "_")
        for prefix in self._ignored:
            name = name.removeprefix(prefix)
        return self._also.get(name, name)

    def _take(self, word: str, rest: list[str]) -> None:
        text, equals, value = word.partition("=")
        name = self._name(text)
        turned_off = self._named.get(name.removeprefix("no_"))
        if name not in self._named and turned_off is not None and turned_off.kind is bool and not equals:
            name, equals, value = turned_off.name, "=", "false"
        if name not in self._named:
            close = difflib.get_close_matches(name, [*self._named, *self._also], n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(f"there is no option {text.lstrip('-')!r}; {hint}(known: {', '.join(self._named)})")
        item = self._named[name]
        texts = [value] if equals else self._following(item, rest)
        if name in self._given and not item.many:
            raise UserError(f"{name} is given twice, as {self._given[name][0]!r} and {texts[0]!r}; leave one out")
        self._given.setdefault(name, []).extend(texts)

    def _following(self, item: _Field, rest: list[str]) -> list[str]:
        """The values after ``--name``: none for a switch, one, or for a list all up to the next option."""
        if item.kind is bool:
            return ["true"]
        if not rest or (rest[0].startswith("--") and self._name(rest[0].partition("=")[0]) in self._named):
            raise UserError(f"{item.flag} has no value; give one, as in {item.name}=VALUE")
        texts = [rest.pop(0)]
        while item.many and rest and not self._is_option(rest[0]):
            texts.append(rest.pop(0))
        return texts


def _fields(options: type[Any]) -> dict[str, _Field]:
    hints = get_type_hints(options)
    found = {}
    for item in fields(options):
        hint = hints[item.name]
        if get_origin(hint) in (Union, UnionType):
            hint = next(part for part in get_args(hint) if part is not type(None))
        many = get_origin(hint) is list
        default = item.default if item.default_factory is MISSING else item.default_factory()
        kind = get_args(hint)[0] if many else hint
        found[item.name] = _Field(item.name, kind, many, item.metadata, default)
    return found


def _value(options: type[Any], item: _Field, texts: list[str]) -> Any:
    if item.many:
        texts = [part for text in texts for part in text.strip("[]").split(",") if part]
    for text in texts:
        _check_choice(item, text)
    if item.kind in (str, Path):
        read = [Path(text).expanduser() if item.kind is Path else text for text in texts]
        return read if item.many else read[0]
    from omegaconf import OmegaConf
    from omegaconf.errors import ValidationError

    settings = OmegaConf.structured(options)
    try:
        settings[item.name] = texts[0]
    except ValidationError:
        raise UserError(f"{item.name}={texts[0]!r} must be {_NAMES[item.kind]}") from None
    return settings[item.name]


def _check_choice(item: _Field, text: str) -> None:
    choices = item.metadata["choices"]
    if choices and text not in choices:
        close = difflib.get_close_matches(text, list(choices), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"{item.flag} {text}: unknown; {hint}known: {', '.join(choices)}")


def _placed(wanted: Sequence[_Field], places: Sequence[str]) -> dict[str, Any]:
    """Places given to arguments in order; a list takes all that are left."""
    many = any(item.many for item in wanted)
    if len(places) < len(wanted) or (len(places) > len(wanted) and not many):
        told = " ".join(_metavar(item) for item in wanted) or "no place"
        raise UserError(f"give {told}; got {' '.join(places) or 'none'}. --help explains")
    read: dict[str, Any] = {}
    for index, item in enumerate(wanted):
        texts = [Path(text).expanduser() if item.kind is Path else text for text in places[index:]]
        read[item.name] = texts if item.many else texts[0]
    return read


def _metavar(item: _Field) -> str:
    return item.name.upper() + (" ..." if item.many else "")


def help_text(options: type[Any], name: str) -> str:
    """The text of ``--help``: usage, description, places, and every option with type, meaning and default."""
    known = _fields(options)
    places = [item for item in known.values() if item.is_argument]
    usage = " ".join(["usage: atp", name, *map(_metavar, places), "[--name value | name=value] ..."])
    lines = [f"{usage}   (or: python -m atp.{name})", "", *(options.__doc__ or "").strip().splitlines(), ""]
    lines += [_line(_metavar(item), item.metadata["help"]) for item in places]
    lines += [""] if places else []
    for item in known.values():
        if not item.is_argument:
            lines.append(_line(f"{item.flag}{_shown_kind(item)}", item.metadata["help"] + _shown_default(item)))
    return "\n".join(lines) + "\n"


def _shown_kind(item: _Field) -> str:
    if item.kind is bool:
        return ""
    kind = "|".join(item.metadata["choices"]) or {int: "INT", float: "NUMBER", Path: "PATH"}.get(item.kind, "TEXT")
    return f" {kind}" + (" ..." if item.many else "")


def _shown_default(item: _Field) -> str:
    """In brackets; nothing where nothing is the default."""
    if item.default is None or item.default in ("", []):
        return ""
    if item.kind is bool:
        return f" [on; --no-{item.flag.removeprefix('--')}]" if item.default else ""
    return f" [{' '.join(item.default) if item.many else item.default}]"


def _line(head: str, text: str) -> str:
    """A head and its meaning beside it, or below it where the head is long."""
    start = f"  {head:<24} " if len(head) <= 24 else f"  {head}\n{'':<27}"
    return start + textwrap.fill(text, 83).replace("\n", "\n" + " " * 27)
