"""Tasks: a declarative description of each (``tasks.toml``), and how it makes records of a set's rows.

A task says where its rows are, which Jinja templates make a prompt and a target of them, and how answers are scored;
adding one is adding a table to a TOML file, this package's or the user's. It sits between
:mod:`atp.data.reading.files` (or the hub) and :mod:`atp.data.sources`. It knows nothing of splits, tokens or models,
and opens no data itself.
"""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import SandboxedEnvironment

from atp.data.records import ChoiceRecord, CompletionRecord, PathLike, Record, TextRecord, check_text, kind
from atp.errors import UserError

METRICS = ("accuracy", "macro_f1", "rouge", "perplexity")
NORMALISATIONS = ("tokens", "characters", "none")
_BUILT_IN = Path(__file__).with_name("tasks.toml")


def _between(text: str, start: str, end: str) -> str:
    """The part of a text after ``start`` (the whole of it where absent) and before ``end``."""
    return text.partition(start)[2 if start in text else 0].partition(end)[0].strip()


def _numbered(text: str) -> list[str]:
    """The options of an LLM-Adapters instruction: what follows ``Answer1:``, ``Answer2:``, ..."""
    options = re.split(r"\s*(?:Answer|Option|Ending|Solution)\d+:\s*", text.rpartition("\n\n")[0])
    return [option.strip() for option in options[1:]]


def _number(text: str) -> int:
    """The number in a text such as ``answer3``."""
    return int(re.sub(r"\D", "", text) or -1)


def _filled(value: Any) -> Any:
    if value is None:
        raise UserError("a column that it uses is null")
    return value


def make_environment() -> jinja2.Environment:
    """Return the Jinja environment of tasks and prompts: sandboxed, and an undefined variable is an error."""
    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_filled)
    environment.filters |= {"between": _between, "numbered": _numbered, "number": _number}
    return environment


ENVIRONMENT = make_environment()


@dataclass(frozen=True)
class Task:
    """One task; the fields are explained at the top of ``tasks.toml``."""

    name: str
    domain: str = "own"
    about: str = ""
    source: str = ""
    protocol: str = ""
    package: str = ""
    hub: str = ""
    subset: str | None = None
    revision: str = "main"
    hub_files: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Sequence[str]] = field(default_factory=dict)
    header: Sequence[str] | None = None
    skip_empty: Sequence[str] = ()
    instruction: str = ""
    prompt: str = ""
    target: str | None = None
    text: str | None = None
    choices: str | None = None
    options: Sequence[str] | str | None = None
    label: str | None = None
    metrics: Sequence[str] = ("perplexity",)
    normalise: str = "tokens"
    alternative: Mapping[str, Any] | None = None
    concatenate: bool = False
    credentialed: bool = False

    def __post_init__(self) -> None:
        shapes = [self.text is not None, self.target is not None, self.label is not None]
        if sum(shapes) != 1 or (self.label is not None and self.choices is None and self.options is None):
            raise UserError(
                f"task {self.name}: give either text, or prompt and target, or prompt, label and choices (or options)"
            )
        for value, known, what in (
            *((metric, METRICS, "metric") for metric in self.metrics),
            (self.normalise, NORMALISATIONS, "normalise"),
        ):
            if value not in known:
                raise UserError(f"task {self.name}: {what} {value!r} is unknown; {nearest(value, known)}")

    def record(self, row: Any, where: str) -> Record:
        """Make a record of a row.

        Args:
            row: Column to value.
            where: What to call its place in a message, e.g. ``train.jsonl:12``.

        Raises:
            ValueError: A column is missing, a template fails, a text is empty, or the label is none of the choices.
        """
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: a row of {self.name} must be an object with columns, got {kind(row)}")
        if self.alternative and set(self.alternative["when"]) <= row.keys():
            return self._alternative.record(row, where)
        if self.text is not None:
            return TextRecord(self._render("text", row, where), self.name)
        prompt = self._render("prompt", row, where)
        if self.target is not None:
            return CompletionRecord(prompt, " " + self._render("target", row, where).strip(), self.name)
        found = self.options if self.options is not None else self._evaluate("choices", row, where)
        if isinstance(found, str) or not isinstance(found, Sequence) or len(found) < 2:
            raise UserError(f"{where}: {self.name} needs at least two choices, got {kind(found)}")
        texts = ["" if choice is None else str(choice).strip() for choice in found]
        if not all(texts):
            raise UserError(f"{where}: choices[{texts.index('')}] is empty; fill it in or leave the record out")
        for text in texts:
            check_text(text, "choices", where)
        label = label_of(self._evaluate("label", row, where), texts, where)
        return ChoiceRecord(prompt, tuple(" " + text for text in texts), label, self.name)

    def skips(self, row: Any) -> bool:
        """Return whether a row leaves a column empty that the set is known to leave empty at times."""
        return isinstance(row, Mapping) and any(
            column in row and not str(row[column] or "").strip() for column in self.skip_empty
        )

    def with_options_of(self, rows: Iterable[Any]) -> Task:
        """Return the task with its options taken from the values of the column that it names, in sorted order."""
        if not isinstance(self.options, str):
            return self
        column = self.options
        values = {str(row[column]).strip() for row in rows if isinstance(row, Mapping) and column in row}
        if len(values) < 2:
            raise UserError(f"{self.name}: column {column!r} holds {sorted(values)}; it needs at least two answers")
        return replace(self, options=tuple(sorted(values)))

    @functools.cached_property
    def _alternative(self) -> Task:
        changes = {key: value for key, value in (self.alternative or {}).items() if key != "when"}
        return replace(self, alternative=None, **changes)

    @functools.cached_property
    def _compiled(self) -> dict[str, Callable[..., Any]]:
        made: dict[str, Callable[..., Any]] = {}
        for key in ("prompt", "target", "text", "choices", "label"):
            source = getattr(self, key)
            if source is None:
                continue
            try:
                if key in ("choices", "label"):
                    made[key] = ENVIRONMENT.compile_expression(source, undefined_to_none=False)
                else:
                    made[key] = ENVIRONMENT.from_string(source).render
            except jinja2.TemplateSyntaxError as error:
                raise UserError(f"task {self.name}: {key} is not valid Jinja ({error.message}): {source!r}") from None
        return made

    def _render(self, key: str, row: Mapping[str, Any], where: str) -> str:
        text = str(self._evaluate(key, row, where))
        if not text.strip():
            raise UserError(f"{where}: {key} is empty; fill it in or leave the record out")
        check_text(text, key, where)
        return text

    def _evaluate(self, key: str, row: Mapping[str, Any], where: str) -> Any:
        call = self._compiled[key]
        try:
            value = call(**row)
        except jinja2.UndefinedError as error:
            raise UserError(
                f"{where}: {key} of {self.name}: {error.message}; the columns are {sorted(map(str, row))}"
            ) from None
        except (TypeError, ValueError, KeyError, AttributeError, jinja2.TemplateError) as error:
            raise UserError(f"{where}: {key} of {self.name} cannot be made of this row: {error}") from None
        parts = value if isinstance(value, list) else [value]
        missing = next((part for part in parts if isinstance(part, jinja2.Undefined)), None)
        if missing is not None:
            raise UserError(
                f"{where}: {key} of {self.name}: {missing._undefined_name!r} is undefined; the columns are "
                f"{sorted(map(str, row))}"
            )
        return value


def label_of(value: Any, choices: Sequence[str], where: str) -> int:
    """Return the position of the right choice, given as a position (also in digits) or as the choice itself.

    Raises:
        ValueError: It is none of the choices.
    """
    if isinstance(value, str) and value.strip() in choices:
        return list(choices).index(value.strip())
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(choices):
        shown = ", ".join(repr(choice[:40]) for choice in choices)
        raise UserError(f"{where}: label {value!r} is none of the {len(choices)} choices ({shown}), nor a position")
    return value


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint: the nearest known names, and all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}(known: {', '.join(names)})"


def load_tasks(path: PathLike | None = None) -> dict[str, Task]:
    """Return the known tasks by name, those of a user's TOML file beside and before the built-in ones.

    Raises:
        ValueError: The file is missing or malformed, or a description has a key that no task has.
    """
    tables = _tables(_BUILT_IN)
    if path is not None:
        tables |= _tables(Path(path).expanduser())
    return {name: _task(name, tables) for name in tables}


def find_task(name: str, tasks: Mapping[str, Task]) -> Task:
    """Return a task; ``family/subset`` gives one part of a family such as ``legalbench`` or ``mmlu``.

    Raises:
        ValueError: It is unknown; the nearest names are offered.
    """
    if name in tasks:
        return tasks[name]
    family, _, subset = name.partition("/")
    if subset and family in tasks:
        return replace(tasks[family], name=name, subset=subset)
    raise UserError(f"there is no task {name!r}; {nearest(name, tasks)}")


def fill_prompt(name: str, text: str) -> str:
    """Return a task's prompt with one text in it, as training and evaluation would ask.

    Raises:
        ValueError: The task is unknown, or its prompt is made of more than one column.
    """
    task = find_task(name, load_tasks())
    columns = sorted(jinja2.meta.find_undeclared_variables(ENVIRONMENT.parse(task.prompt)))
    if len(columns) != 1:
        raise UserError(f"the prompt of task {name} is made of {columns or 'no column'}; give the whole prompt instead")
    return ENVIRONMENT.from_string(task.prompt).render({columns[0]: text})


def _tables(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"data.tasks_file={path}: cannot be read ({error.strerror})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"data.tasks_file={path}: not valid TOML ({error})") from None


def _task(name: str, tables: Mapping[str, Any]) -> Task:
    table = tables[name]
    if not isinstance(table, Mapping):
        raise UserError(f"data.tasks_file: {name!r} must be a table [{name}] that describes a task")
    base = table.get("like")
    if base is not None and base not in tables:
        raise UserError(f"task {name}: like={base!r} is no task; {nearest(str(base), tables)}")
    described = {**(tables[base] if base else {}), **{key: value for key, value in table.items() if key != "like"}}
    unknown = set(described) - set(Task.__dataclass_fields__)
    if unknown:
        key = sorted(unknown)[0]
        raise UserError(f"task {name}: there is no key {key!r}; {nearest(key, Task.__dataclass_fields__)}")
    return Task(name=name, **described)
