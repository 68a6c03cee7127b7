"""Prompts: what stands around a record's own prompt, the same way in training, evaluation and generation.

A prompt has a system part (Compresso's collaborative prompt, Tailored-LLaMA's task instruction, or the user's text) and
a template for the rest, both Jinja; where the tokenizer has a chat template, the two become its system and user turns.
It sits between :mod:`atp.data` and the stages: records in, records out. Of files it knows only
``prompt.json``; it knows nothing of token ids or models.

Running text has no prompt to stand before, and is left as it is.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta

from atp.data.encoding.chat import said_in, stand_in
from atp.data.encoding.tokenizer import control_pattern, surroundings
from atp.data.records import ChatRecord, ChoiceRecord, CompletionRecord, Frame, Record, Splits, TextRecord
from atp.data.streaming import StreamedRecords
from atp.data.tasks import ENVIRONMENT
from atp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PROMPT_FILE = "prompt.json"
"""What a run and an exported model keep their prompt in."""

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
        if self.chat is None or tokenizer is None:
            return f"{system}\n\n{rest}" if system else rest, ()
        return self._as_chat(system, rest, tokenizer)

    def _as_chat(self, system: str, rest: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, Frame]:
        user = {"role": "user", "content": rest}
        turns = [{"role": "system", "content": system}, user] if system else [user]
        how: dict[str, Any] = {"chat_template": self.chat, "tokenize": False, "add_generation_prompt": True}
        try:
            text = str(tokenizer.apply_chat_template(turns, **how))
        except jinja2.TemplateError:  # some templates know no system turn
            turns = [{"role": "user", "content": f"{system}\n\n{rest}" if system else rest}]
            text = str(tokenizer.apply_chat_template(turns, **how))
        said = [str(turn["content"]) for turn in turns]
        frame: Frame = ((0, len(text)),)
        control, start = _framing(tokenizer, len(tokenizer), tokenizer.bos_token)
        if any(map(control.search, said)):
            marked = [{**turn, "content": stand_in(place)} for place, turn in enumerate(turns)]
            own = said_in(text, str(tokenizer.apply_chat_template(marked, **how)), said)
            if own is None:
                raise UserError(
                    f"prompt={self.name}: the record that begins {rest[:60]!r} holds the name of a control token, and "
                    "the chat template changes what turns say, so the two cannot be told apart; leave the record out, "
                    "or use prompt.chat=never"
                )
            bounds = [0, *(place for span in own for place in span), len(text)]
            frame = tuple(zip(bounds[::2], bounds[1::2], strict=True))
        # The encoder puts before every sequence what the tokenizer puts there, so the template's own is taken away.
        cut = len(start) if start and text.startswith(start) else 0
        return text[cut:], tuple((max(low - cut, 0), high - cut) for low, high in frame if high > cut)

    def on(self, record: Record, tokenizer: PreTrainedTokenizerBase | None = None) -> Record:
        """Return the record with the prompt around its own; running text as it is."""
        if isinstance(record, TextRecord) or self.is_empty:
            return record
        if isinstance(record, ChatRecord):
            return self._on_chat(record)
        assert isinstance(record, CompletionRecord | ChoiceRecord)
        text, frame = self.framed(record.prompt, record.task, tokenizer)
        return replace(record, prompt=text, frame=frame)

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
        if not isinstance(splits.train, StreamedRecords) and all(isinstance(r, TextRecord) for r in splits.train):
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


@functools.lru_cache(maxsize=1)
def _framing(tokenizer: PreTrainedTokenizerBase, size: int, bos: str | None) -> tuple[re.Pattern[str], str]:
    """What finds a tokenizer's control tokens by name, and those that it puts before a text; asked of every record."""
    before, _ = surroundings(tokenizer)
    return control_pattern(tokenizer), "".join(tokenizer.convert_ids_to_tokens(before))


def _ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
