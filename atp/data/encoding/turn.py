"""The exchange that a prompt and its answer become in a chat template: what stands before the answer, what ends it.

A template is asked once, with stand-ins for what is said, how it writes the assistant's turn; a record's prompt is then
what generation would start from. Sits between :mod:`atp.data.encoding.tokenizer` and :mod:`atp.data.prompt`; whole
conversations are :mod:`atp.data.encoding.chat`. It knows nothing of records, token ids or models.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from atp.data.encoding.chat import said_in, stand_in
from atp.data.encoding.tokenizer import control_pattern, control_tokens
from atp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from atp.data.records import Frame

_SYSTEM, _USER, _ASSISTANT = map(stand_in, range(3))


class Turn(NamedTuple):
    """How a template writes the assistant's turn.

    Attributes:
        opening: What it writes between where generation begins and the answer, such as an empty chain of thought; it is
            given, not learnt.
        lead: Blanks that it puts before the answer, and that generation has to write.
        end: What follows the answer, up to the last control token; empty if there is none.
        system: Whether it writes system turns; if not, what they say stands before the user's words.
    """

    opening: str
    lead: str
    end: str
    system: bool


class Exchange(NamedTuple):
    """A prompt in a chat template.

    Attributes:
        prompt: All that stands before the answer, with the template's own beginning of a sequence.
        frame: Stretches of it that the template wrote, where the names of control tokens mean the tokens.
        turn: How the answer goes on.
    """

    prompt: str
    frame: Frame
    turn: Turn

    def answers(self, texts: Sequence[str]) -> list[str]:
        """Return answers as the template has them: the blanks before them are its own.

        Args:
            texts: The answers to one prompt; where they differ in these blanks alone, they are left as they are.
        """
        plain = [text.lstrip() for text in texts]
        if not all(plain) or len(set(plain)) < len(set(texts)):
            return list(texts)
        return [self.turn.lead + text for text in plain]


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a tokenizer's chat template, of several the default one; None if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    return str(template) if template else None


def exchange(tokenizer: PreTrainedTokenizerBase, template: str, system: str, user: str) -> Exchange:
    """Write a prompt with a chat template.

    Args:
        tokenizer: The tokenizer.
        template: The template.
        system: What the system turn says; empty for none.
        user: What the user's turn says.

    Raises:
        UserError: The template refuses it, or writes the assistant's turn so that the answer cannot be told.
    """
    turn = turn_of(tokenizer, template, bool(system))
    turns = [{"role": "user", "content": user}]
    if system and turn.system:
        turns = [{"role": "system", "content": system}, *turns]
    elif system:
        turns = [{"role": "user", "content": f"{system}\n\n{user}"}]
    said = [one["content"] for one in turns]
    text = _written(tokenizer, template, turns, prompt=True)
    bounds = [0, len(text) + len(turn.opening)]
    if any(map(_control(tokenizer, len(tokenizer)).search, said)):
        marked = [{**one, "content": stand_in(place)} for place, one in enumerate(turns)]
        own = said_in(text, _written(tokenizer, template, marked, prompt=True), said)
        if own is None:
            raise UserError(
                "it holds the name of a control token, and the chat template changes what turns say, so the two cannot "
                "be told apart; leave the record out, or use prompt.chat=never"
            )
        bounds = [0, *itertools.chain.from_iterable(own), bounds[1]]
    return Exchange(text + turn.opening, tuple(zip(bounds[::2], bounds[1::2], strict=True)), turn)


def turn_of(tokenizer: PreTrainedTokenizerBase, template: str, system: bool = False) -> Turn:
    """Return how a template writes the assistant's turn.

    Args:
        tokenizer: The tokenizer.
        template: The template.
        system: Whether there is something for a system turn to say.

    Raises:
        UserError: The template refuses a question and its answer, leaves the question out, or writes the answer
            otherwise than generation begins it.
    """
    return _turn_of(tokenizer, template, system, len(tokenizer))


@functools.lru_cache(maxsize=16)
def _turn_of(tokenizer: PreTrainedTokenizerBase, template: str, system: bool, size: int) -> Turn:
    asked = [{"role": "user", "content": _USER}]
    knows = False
    if system:
        turns = [{"role": "system", "content": _SYSTEM}, *asked]
        try:
            knows = _SYSTEM in _written(tokenizer, template, turns, prompt=True)
        except UserError:
            knows = False  # some know no system turn
        asked = turns if knows else asked
    begun = _written(tokenizer, template, asked, prompt=True)
    if _USER not in begun:
        raise UserError("the chat template leaves out what the user says")
    try:
        whole = _written(tokenizer, template, [*asked, {"role": "assistant", "content": _ASSISTANT}])
    except UserError:  # it writes nothing that ends in an answer, so that nothing of its own ends one
        return Turn("", "", "", knows)
    head, found, tail = whole.partition(_ASSISTANT)
    if not found or not head.startswith(begun):
        raise UserError("the chat template writes the assistant's turn otherwise than generation begins it")
    lead = head[len(begun) :]
    opening = lead.rstrip(" ") if lead.strip() else ""
    marks = list(_control(tokenizer, size).finditer(tail))
    return Turn(opening, lead[len(opening) :], tail[: marks[-1].end()] if marks else "", knows)


def end_token(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> int | None:
    """Return the control token that ends the assistant's turn in a template, by default the tokenizer's own.

    None where there is no template, none ends the turn, or that cannot be told.
    """
    template = template_of(tokenizer) if template is None else template
    if template is None:
        return None
    try:
        end = turn_of(tokenizer, template).end
    except UserError:
        return None
    mark = _control(tokenizer, len(tokenizer)).search(end)
    return control_tokens(tokenizer)[mark.group()] if mark else None


def is_instruct(tokenizer: PreTrainedTokenizerBase, stops: Iterable[int]) -> bool:
    """Return whether a model was taught to answer: it stops at what ends the assistant's turn in its chat template.

    Base models may carry the template of their instruct sibling, but stop at the end of a document.

    Args:
        tokenizer: Its tokenizer.
        stops: Ids that end its generation.
    """
    end = end_token(tokenizer)
    return end is not None and end in {*stops, tokenizer.eos_token_id}


@functools.lru_cache(maxsize=4)
def _control(tokenizer: PreTrainedTokenizerBase, size: int) -> Any:
    """What finds a tokenizer's control tokens by name; asked of every record."""
    return control_pattern(tokenizer)


def _written(
    tokenizer: PreTrainedTokenizerBase, template: str, turns: Sequence[Mapping[str, str]], *, prompt: bool = False
) -> str:
    how: dict[str, Any] = {"chat_template": template, "tokenize": False, "add_generation_prompt": prompt}
    try:
        return str(tokenizer.apply_chat_template([dict(turn) for turn in turns], **how))
    except (jinja2.TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(f"the chat template refuses the turns {roles}: {error}") from None
