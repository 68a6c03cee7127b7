"""Chats: a conversation as the token ids of the model's own chat template, and which of them the assistant speaks.

Where the template marks what the assistant speaks (``{% generation %}``), the mark is followed. Otherwise a turn is
what writing the conversation with it adds to writing it without it, up to where generation would begin; that this is so
is checked for every turn, in the text and in the ids. Where a template writes earlier turns otherwise than the last one
(as those do that leave out earlier reasoning), each turn is a sequence of its own, as generation would see it.

Sits under :mod:`atp.data.encoding.encoder`, which cuts what is too long. It knows nothing of torch or models.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from atp.data.encoding.tokenizer import control_tokens
from atp.data.records.types import ChatRecord
from atp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NO_TEMPLATE = (
    "this is a conversation, and the tokenizer has no chat template. Either take a base with one (an instruct model, "
    "or write chat_template.jinja into the folder of model.path), or make prompts of the turns, for example "
    'data.fields={{prompt: "{{{{ {column}[0].content }}}}", completion: "{{{{ {column}[1].content }}}}"}}'
)


class ChatIds(NamedTuple):
    """Token ids of a conversation or a part of it, and whether each is learnt."""

    ids: list[int]
    learnt: list[bool]


class _Text(NamedTuple):
    """Turns written out, the places between which the assistant speaks, and whether generation would go on."""

    text: str
    spans: list[tuple[int, int]]
    messages: Sequence[Mapping[str, Any]]
    prompt: bool = False


class ChatTemplate:
    """Writes conversations with a tokenizer's chat template.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        template = getattr(tokenizer, "chat_template", None)
        texts = list(template.values()) if isinstance(template, Mapping) else [template or ""]
        self.text = "\x00".join(texts)
        self._marks = bool(getattr(tokenizer, "is_fast", False)) and all(_GENERATION.search(one) for one in texts)
        self._special = sorted(control_tokens(tokenizer))
        self._told = False

    def check(self, record: ChatRecord) -> None:
        """Write a conversation out and find the assistant's turns in it.

        Raises:
            ValueError: There is no template, it refuses the conversation or leaves turns out, or where the assistant
                speaks cannot be told.
        """
        self._write(record, record.messages)

    def sequences(self, record: ChatRecord, messages: Sequence[Mapping[str, Any]] | None = None) -> list[ChatIds]:
        """Return the ids of a conversation, or of some of its messages; several where each turn stands for itself.

        Raises:
            ValueError: As :meth:`check`.
        """
        messages = record.messages if messages is None else messages
        if self._marks and not self._special_in(messages):
            return [self._marked(record, messages)]
        return [self._ids(record, text) for text in self._write(record, messages)]

    def fitting(self, record: ChatRecord, most: int) -> tuple[list[ChatIds], bool]:
        """Return the ids of a conversation, in parts of whole exchanges where it is longer than ``most`` tokens.

        Each of the assistant's turns is learnt in exactly one part; a single exchange may still be too long.

        Returns:
            The parts, and whether it was too long.
        """
        found = self.sequences(record)
        if all(len(one.ids) <= most for one in found):
            return found, False
        lead, rest = exchanges(record.messages)
        if len(rest) == 1:
            return found, False

        def written(start: int, end: int) -> list[ChatIds]:
            return self.sequences(record, [*lead, *itertools.chain.from_iterable(rest[start:end])])

        def fits(parts: list[ChatIds]) -> bool:
            return all(len(one.ids) <= most for one in parts)

        parts: list[ChatIds] = []
        if len(found) > 1:  # turn by turn: each with as much of what came before as fits
            for end, exchange in enumerate(rest, start=1):
                turns = sum(message["role"] == "assistant" for message in exchange)
                tried = (written(start, end)[-turns:] for start in range(end))
                some = next((one for one in tried if fits(one)), None)
                parts += written(end - 1, end) if some is None else some
            return parts, True
        start = 0
        while start < len(rest):
            end, some = start + 1, written(start, start + 1)
            while end < len(rest) and fits(longer := written(start, end + 1)):
                end, some = end + 1, longer
            parts += some
            start = end
        return parts, True

    def without_ends(self, chat: ChatIds) -> list[bool]:
        """Return what is learnt without the marks that end a turn, which are no text."""
        special = set(control_tokens(self.tokenizer).values())
        learnt = list(chat.learnt)
        for place in range(len(learnt) - 1, -1, -1):
            if not chat.learnt[place] or (place + 1 < len(learnt) and chat.learnt[place + 1]):
                continue
            last = place
            while chat.learnt[last - 1] and not str(self.tokenizer.decode([chat.ids[last]])).strip():
                last -= 1
            if chat.ids[last] in special and last > 0 and chat.learnt[last - 1]:
                learnt[last : place + 1] = [False] * (place + 1 - last)
        return learnt

    def prompt_ids(self, record: ChatRecord) -> list[int]:
        """Return the ids to generate the last of the assistant's turns from."""
        messages = record.messages[: last_turn(record)]
        return self._ids(record, _Text(self._render(record, messages, prompt=True), [], messages, prompt=True)).ids

    def prompt_text(self, record: ChatRecord) -> str:
        """Return the text to generate the last of the assistant's turns from."""
        return self._render(record, record.messages[: last_turn(record)], prompt=True)

    def _write(self, record: ChatRecord, messages: Sequence[Mapping[str, Any]]) -> list[_Text]:
        if not self.text:
            raise UserError(f"{record.where}: {_NO_TEMPLATE.format(column='messages')}")
        whole = self._render(record, messages)
        self._nothing_left_out(record, messages, whole)
        if self._marks:
            self._marked(record, messages)
            if not self._special_in(messages):
                return [_Text(whole, [], messages)]
        spans: list[tuple[int, int]] = []
        alone: list[_Text] = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            begun = self._render(record, messages[:place], prompt=True)
            ended = self._render(record, messages[: place + 1])
            if not ended.startswith(begun) or len(ended) == len(begun):
                raise UserError(
                    f"{record.where}: the chat template writes an assistant's turn otherwise than generation begins "
                    "it, so what to learn cannot be told; mark it in the template with {% generation %} ... "
                    "{% endgeneration %}, or make prompts of the turns with data.fields"
                )
            spans.append((len(begun), len(ended)))
            alone.append(_Text(ended, [spans[-1]], messages[: place + 1]))
        ends = [text.text for text in alone]
        if all(whole.startswith(end) for end in ends):
            return [_Text(whole, spans, messages)]
        if not self._told:
            self._told = True
            log.warning(
                "%s: the chat template writes earlier turns otherwise than the last one; each of the assistant's turns "
                "is learnt as a sequence of its own, as generation would see it",
                record.where,
            )
        return alone

    def _render(
        self, record: ChatRecord, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False, **how: Any
    ) -> Any:
        tools: Any = [dict(tool) for tool in record.tools] or None
        how = {"tokenize": False, **how}
        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tools=tools, add_generation_prompt=prompt, **how
            )
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"{record.where}: the chat template refuses the turns {roles}: {error}; mend the record or leave it out"
            ) from None

    def _nothing_left_out(self, record: ChatRecord, messages: Sequence[Mapping[str, Any]], whole: str) -> None:
        """Refuse templates that drop system turns, tools or what users and tools say."""
        for message in messages:
            said = message["content"].strip()
            if message["role"] != "assistant" and said and said not in whole:
                raise UserError(
                    f"{record.where}: the chat template leaves out the {message['role']} turn {said[:40]!r}; take a "
                    "base whose template knows such turns, or leave the turn out of the data"
                )
        for tool in record.tools:
            name = str(tool.get("function", tool).get("name", ""))
            if name not in whole:
                raise UserError(
                    f"{record.where}: the chat template leaves out the tool {name!r}; take a base whose template knows "
                    "tools, or leave them out of the data"
                )

    def _marked(self, record: ChatRecord, messages: Sequence[Mapping[str, Any]]) -> ChatIds:
        """The ids, and what of them the template marks."""
        found = self._render(
            record, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, verbose=False
        )
        learnt = [bool(mark) for mark in found["assistant_masks"]]
        if not any(learnt):
            raise UserError(f"{record.where}: the chat template marks nothing of this conversation with generation")
        return ChatIds(list(found["input_ids"]), learnt)

    def _special_in(self, messages: Sequence[Mapping[str, Any]]) -> list[str]:
        return [token for token in self._special if any(token in message["content"] for message in messages)]

    def _ids(self, record: ChatRecord, text: _Text) -> ChatIds:
        """Tokenise a text whole, or where a token would span the beginning or end of a turn, part by part."""
        cuts = sorted({place for span in text.spans for place in span} - {0, len(text.text)})
        literal = self._literal(record, text) if self._special_in(text.messages) else []
        if not literal:
            whole, *parts = self._tokens([text.text, *(text.text[:cut] for cut in cuts)])
            if all(whole[: len(part)] == part for part in parts):
                at = dict(zip(cuts, map(len, parts), strict=True)) | {0: 0, len(text.text): len(whole)}
                learnt = [False] * len(whole)
                for start, end in text.spans:
                    learnt[at[start] : at[end]] = [True] * (at[end] - at[start])
                return ChatIds(whole, learnt)
        bounds = sorted({0, len(text.text), *cuts, *(place for span in literal for place in span)})
        ids: list[int] = []
        learnt = []
        for start, end in itertools.pairwise(bounds):
            plain = any(low <= start and end <= high for low, high in literal)
            part = self._tokens([text.text[start:end]], plain=plain)[0]
            ids += part
            learnt += [any(low <= start and end <= high for low, high in text.spans)] * len(part)
        return ChatIds(ids, learnt)

    def _literal(self, record: ChatRecord, text: _Text) -> list[tuple[int, int]]:
        """Where the turns' own words stand, in which a special token's name is only text.

        Found by writing the conversation with a stand-in for what each turn says.
        """
        stand_ins = [{**message, "content": stand_in(place)} for place, message in enumerate(text.messages)]
        frame = self._render(record, stand_ins, prompt=text.prompt)
        found = said_in(text.text, frame, [message["content"] for message in text.messages])
        if found is not None:
            return found
        raise UserError(
            f"{record.where}: a turn holds the name of a control token ({', '.join(self._special_in(text.messages))}), "
            "and the chat template changes what turns say, so the two cannot be told apart; leave the record out"
        )

    def _tokens(self, texts: Sequence[str], *, plain: bool = False) -> list[list[int]]:
        how: dict[str, Any] = {"split_special_tokens": True} if plain else {}
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False, **how
        )
        return encoded["input_ids"]


def stand_in(place: int) -> str:
    """Return what stands for the content of the turn at a place, to find out where the template puts it."""
    return f"\ue000{place}\ue001"


def said_in(text: str, frame: str, said: Sequence[str]) -> list[tuple[int, int]] | None:
    """Return where the contents of turns stand in a text that a template made of them.

    Args:
        text: What the template makes of the contents.
        frame: What it makes of their stand-ins (:func:`stand_in`).
        said: The contents.

    Returns:
        Start and end of each, in characters; None if the template changes them beyond the white space around.
    """
    for strip in (False, True):
        parts = re.split("\ue000(\\d+)\ue001", frame)
        parts[1::2] = [said[int(place)].strip() if strip else said[int(place)] for place in parts[1::2]]
        if "".join(parts) == text:
            ends = list(itertools.accumulate(map(len, parts)))
            return list(zip(ends[0::2], ends[1::2], strict=False))
    return None


def last_turn(record: ChatRecord) -> int:
    """Return the place of the last of the assistant's turns."""
    return max(place for place, message in enumerate(record.messages) if message["role"] == "assistant")


def exchanges(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[list[Mapping[str, Any]]]]:
    """Return the turns that stand before a conversation, and its exchanges.

    An exchange begins where someone else speaks after the assistant is done, and holds a turn of the assistant's; turns
    after the last of these belong to none.
    """
    lead = []
    rest = list(messages)
    while rest and rest[0]["role"] in ("system", "developer"):
        lead.append(rest.pop(0))
    found: list[list[Mapping[str, Any]]] = []
    current: list[Mapping[str, Any]] = []
    for message in rest:
        if message["role"] == "user" and any(one["role"] == "assistant" for one in current):
            found.append(current)
            current = []
        current.append(message)
    if any(one["role"] == "assistant" for one in current):
        found.append(current)
    return lead, found
