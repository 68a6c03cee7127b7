"""Prompts: what stands around a record's own prompt, the same way in training, evaluation and generation.

A prompt has a system part (Compresso's collaborative prompt, Tailored-LLaMA's task instruction, or the user's text) and
a template for the rest, both Jinja; of an instruct model the two become the system and user turns of its chat template,
also where nothing else is put around a record.
It sits between :mod:`atp.data` and the stages: records in, records out. Of files it knows only
``prompt.json``; it knows nothing of token ids or models.

Running text has no prompt to stand before, and is left as it is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta

from atp.data.encoding.turn import Exchange, exchange, is_instruct, template_of
from atp.data.records import ChatRecord, ChoiceRecord, CompletionRecord, Frame, Record, Splits, TextRecord
from atp.data.streaming import StreamedRecords
from atp.data.tasks import ENVIRONMENT
from atp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PROMPT_FILE = "prompt.json"
"""What a run and an exported model keep their prompt in."""

CHAT_NAME = "chat template"
"""What a prompt is called that is nothing but a chat template."""

VARIABLES = ("prompt", "task", "instruction")


@dataclass(frozen=True)
class Prompt:
    """A prompt, ready to be put around records.

    Attributes:
        name: Short name for reports.
        system: Jinja template of what stands before; empty for nothing.
        template: Jinja template of the rest, with ``{{ prompt }}`` for the record's own prompt.
        instructions: Task to what ``{{ instruction }}`` stands for; ``default`` for the other tasks.
        train: Whether training and validation use it.
        inference: Whether evaluation and generation use it.
        chat: The tokenizer's chat template; None puts system part and rest one after the other.

    Raises:
        ValueError: A template is not valid Jinja, or names a variable that there is not.
    """

    name: str = "none"
    system: str = ""
    template: str = "{{ prompt }}"
    instructions: Mapping[str, str] = field(default_factory=dict)
    train: bool = True
    inference: bool = True
    chat: str | None = None

    def __post_init__(self) -> None:
        _variables_of(self.system, "prompt.system")
        if "prompt" not in _variables_of(self.template, "prompt.template"):
            raise UserError(f"prompt.template={self.template!r} lacks {{{{ prompt }}}}, the record's own prompt")

    @property
    def is_empty(self) -> bool:
        """Whether this prompt adds nothing to any record."""
        return not self.system.strip() and self.template == "{{ prompt }}" and self.chat is None

    def render(self, text: str, task: str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
        """As :meth:`framed`, and gives the text alone."""
        return self.framed(text, task, tokenizer)[0]

    def framed(self, text: str, task: str, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[str, Frame]:
        """Put the prompt around a record's own.

        Args:
            text: The record's own prompt.
            task: Its task.
            tokenizer: Whose chat template to use, if ``chat`` is set.

        Returns:
            The text, and the stretches of it that the chat template wrote, where control tokens' names are tokens.

        Raises:
            ValueError: ``{{ instruction }}`` is used and the task has none, or a template fails on this record; names
                the task and how the record begins.
        """
        if self.chat is not None and tokenizer is not None:
            asked = self._in_template(text, task, tokenizer)
            return asked.prompt, asked.frame
        system, rest = self._parts(text, task)
        return f"{system}\n\n{rest}" if system else rest, ()

    def _parts(self, text: str, task: str) -> tuple[str, str]:
        """The system part and the rest, for one record."""
        values = {"prompt": text, "task": task}
        instruction = self.instructions.get(task, self.instructions.get("default"))
        if instruction is not None:
            values["instruction"] = instruction
        try:
            system = ENVIRONMENT.from_string(self.system).render(**values).strip()
            rest = ENVIRONMENT.from_string(self.template).render(**values)
        except (TypeError, ValueError, AttributeError, jinja2.TemplateError) as error:
            why = str(error) or type(error).__name__
            if isinstance(error, jinja2.UndefinedError) and "'instruction'" in why:
                why = f"there is no instruction for the task {task!r}"
            raise UserError(
                f"prompt={self.name}: {why} (task {task}, the record that begins {text[:60]!r}); mend the template, or "
                f"set prompt.instructions.{task} or prompt.instructions.default"
            ) from None
        return system, rest

    def _in_template(self, text: str, task: str, tokenizer: PreTrainedTokenizerBase) -> Exchange:
        """The prompt and how its answer goes on, in the chat template."""
        assert self.chat is not None
        system, rest = self._parts(text, task)
        try:
            return exchange(tokenizer, self.chat, system, rest)
        except UserError as error:
            raise UserError(f"prompt={self.name}: the record that begins {rest[:60]!r}: {error}") from None

    def on(self, record: Record, tokenizer: PreTrainedTokenizerBase | None = None) -> Record:
        """Return the record with the prompt around its own; running text as it is."""
        if isinstance(record, TextRecord) or self.is_empty:
            return record
        if isinstance(record, ChatRecord):
            return self._on_chat(record)
        assert isinstance(record, CompletionRecord | ChoiceRecord)
        if self.chat is None or tokenizer is None:
            return replace(record, prompt=self.render(record.prompt, record.task))
        asked = self._in_template(record.prompt, record.task, tokenizer)
        framed: dict[str, Any] = {"prompt": asked.prompt, "frame": asked.frame, "end": asked.turn.end}
        if isinstance(record, ChoiceRecord):
            return replace(record, choices=tuple(asked.answers(record.choices)), **framed)
        return replace(record, completion=asked.answers([record.completion])[0], **framed)

    def _on_chat(self, record: ChatRecord) -> ChatRecord:
        """The conversation with the system part before or as its system turn; its turns are not put into a template."""
        if not self.system.strip():
            return record
        asked = next((message["content"] for message in record.messages if message["role"] == "user"), "")
        system = replace(self, template="{{ prompt }}", chat=None).render(asked, record.task)
        system = system.removesuffix(asked).strip()
        first, *rest = record.messages
        if first["role"] in ("system", "developer"):
            first = {**first, "content": f"{system}\n\n{first['content']}".strip()}
            return replace(record, messages=(first, *rest))
        return replace(record, messages=({"role": "system", "content": system}, *record.messages))

    def on_splits(self, splits: Splits, tokenizer: PreTrainedTokenizerBase) -> Splits:
        """Return splits with the prompt around their records, where its switches say so."""
        if self.is_empty or not (self.train or self.inference):
            return splits
        asked = self.system.strip() or self.template != "{{ prompt }}"
        only_text = not isinstance(splits.train, StreamedRecords) and all(
            isinstance(record, TextRecord) for record in splits.train
        )
        if asked and only_text:
            log.warning("prompt=%s is ignored in training: %s holds only running text", self.name, splits.name)
        if self.template != "{{ prompt }}" and any(isinstance(record, ChatRecord) for record in splits.test):
            log.warning("prompt.template is ignored for conversations; only prompt.system is put before them")
        if self.train and isinstance(splits.train, StreamedRecords):
            splits = replace(splits, train=splits.train.transformed(lambda record: self.on(record, tokenizer)))
        elif self.train:
            splits = replace(splits, train=[self.on(record, tokenizer) for record in splits.train])
        if self.train:
            splits = replace(splits, validation=[self.on(record, tokenizer) for record in splits.validation])
        if self.inference:
            splits = replace(splits, test=[self.on(record, tokenizer) for record in splits.test])
        return splits

    def cost(
        self, plain: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> dict[str, float | int]:
        """Return what the prompt costs per record.

        Args:
            plain: Records without it.
            tokenizer: The tokenizer.
            max_length: Tokens of a sequence.

        Returns:
            ``tokens_added`` on average, ``share_of_context`` that they take, ``shared_prefix_tokens`` that all prompts
            begin with, and whose keys and values are therefore computed once, and ``records`` that were looked at.
        """
        asked = [record for record in plain if isinstance(record, CompletionRecord | ChoiceRecord)]
        if not asked or self.is_empty:
            return {"tokens_added": 0.0, "share_of_context": 0.0, "shared_prefix_tokens": 0, "records": len(asked)}
        before = _ids([record.prompt for record in asked], tokenizer)
        after = _ids([self.render(record.prompt, record.task, tokenizer) for record in asked], tokenizer)
        added = sum(map(len, after)) / len(after) - sum(map(len, before)) / len(before)
        first, last = min(after), max(after)
        shared = next(
            (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
        )
        return {
            "tokens_added": round(added, 2),
            "share_of_context": round(added / max_length, 4),
            "shared_prefix_tokens": shared,
            "records": len(asked),
        }

    def plain(self) -> dict[str, Any]:
        """Return it as plain data, for ``prompt.json``."""
        return asdict(self)

    @classmethod
    def from_plain(cls, data: Mapping[str, Any], where: str) -> Prompt:
        """Return what :meth:`plain` gave; ValueError names what it cannot read."""
        unknown = set(data) - set(cls.__dataclass_fields__)
        if unknown:
            raise UserError(
                f"{where}: unknown keys {sorted(unknown)}; a prompt has {', '.join(cls.__dataclass_fields__)}"
            )
        return cls(**data)


def read_prompt(path: Path) -> Prompt:
    """Return the prompt that a run or an exported model was evaluated with: from the file, or the one in a folder.

    A folder without one, and a prompt that was switched off at inference, give the empty prompt.

    Raises:
        ValueError: There is no such file, or it holds no prompt.
    """
    file = path / PROMPT_FILE if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        return Prompt()
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a prompt ({error})") from None
    if not isinstance(data, Mapping):
        raise UserError(f"{file}: a prompt is an object with {', '.join(Prompt.__dataclass_fields__)}")
    prompt = Prompt.from_plain(data, str(file))
    return prompt if prompt.inference else Prompt()


def prompt_of(folder: Path, tokenizer: PreTrainedTokenizerBase, stops: Iterable[int]) -> Prompt:
    """Return the prompt to ask a model with: its own (:func:`read_prompt`), else an instruct model's chat template.

    Args:
        folder: Where its ``prompt.json`` would be.
        tokenizer: Its tokenizer.
        stops: Ids that end its generation.

    Raises:
        ValueError: As :func:`read_prompt`.
    """
    if (folder / PROMPT_FILE).is_file():
        return read_prompt(folder)
    return Prompt(CHAT_NAME, chat=template_of(tokenizer)) if is_instruct(tokenizer, stops) else Prompt()


def from_text(text: str, where: str) -> dict[str, str]:
    """Return ``system`` and ``template`` of a user's file.

    It is a whole template where it names ``prompt``, else what stands before.

    Raises:
        ValueError: It is empty, not valid Jinja, or names a variable that there is not.
    """
    if not text.strip():
        raise UserError(f"{where} is empty; write what is to stand before each prompt, or use prompt=none")
    if "prompt" in _variables_of(text, where):
        return {"system": "", "template": text}
    return {"system": text.strip(), "template": "{{ prompt }}"}


def _variables_of(source: str, where: str) -> set[str]:
    """The variables that a template names; ValueError if it is not valid Jinja or names one that there is not."""
    try:
        ENVIRONMENT.compile(source)  # knows the filters, which parsing alone does not
        named = meta.find_undeclared_variables(ENVIRONMENT.parse(source))
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{where}:{error.lineno}: not valid Jinja ({error.message})") from None
    unknown = sorted(named - set(VARIABLES))
    if unknown:
        raise UserError(f"{where} names the undefined variable {unknown[0]!r}; there are {', '.join(VARIABLES)}")
    return named


def _ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
