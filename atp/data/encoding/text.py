"""Texts as token ids, in which the name of a control token is text, as in ``"</s> is the end mark"``.

Only in what a chat template wrote around a text do such names mean the tokens; these stretches are its frame. What
stands before and after a sequence is told here as well. Sits between :mod:`atp.data.encoding.tokenizer` and
:mod:`atp.data.encoding.encoder`. It knows nothing of kinds of records.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from atp.data.encoding.tokenizer import control_pattern, surroundings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from atp.data.records import Frame


class TextReader:
    """Tokenises texts.

    Args:
        tokenizer: The tokenizer; what it puts around a text is left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._control = control_pattern(tokenizer)

    def ids(self, texts: Sequence[str], frames: Sequence[Frame] | None = None) -> list[list[int]]:
        """Return the ids of texts.

        Args:
            texts: The texts.
            frames: Of each the stretches, as (start, end) in characters, that a chat template wrote; None for none.
        """
        frames = [()] * len(texts) if frames is None else frames
        places: dict[bool, list[int]] = {True: [], False: []}  # by whether control tokens' names are tokens
        found: dict[int, list[int]] = {}
        for place, (text, frame) in enumerate(zip(texts, frames, strict=True)):
            if frame and self.names_control(text, frame):
                found[place] = self._by_stretches(text, frame)
            else:
                places[bool(frame)].append(place)
        for control, some in places.items():
            found |= zip(some, self._tokens([texts[place] for place in some], control=control), strict=True)
        return [found[place] for place in range(len(texts))]

    def names_control(self, text: str, frame: Frame = ()) -> bool:
        """Return whether the name of a control token stands in a text outside its frame."""
        return any(self._control.search(text[start:end]) for start, end, framed in stretches(text, frame) if not framed)

    def pairs(
        self, prompts: Sequence[tuple[str, Frame]], continuations: Sequence[str]
    ) -> list[tuple[list[int], list[int]]]:
        """Tokenise prompts and what follows them, with the boundary where generation has it."""
        distinct = list(dict.fromkeys(prompts))
        texts, frames = [text for text, _ in distinct], [frame for _, frame in distinct]
        alone = dict(zip(distinct, self.ids(texts, frames), strict=True))
        wholes = self.ids(
            [prompt + text for (prompt, _), text in zip(prompts, continuations, strict=True)],
            [frame for _, frame in prompts],
        )
        spanning = [i for i, whole in enumerate(wholes) if whole[: len(alone[prompts[i]])] != alone[prompts[i]]]
        apart = dict(zip(spanning, self.ids([continuations[i] for i in spanning]), strict=True))
        pairs = []
        for i, whole in enumerate(wholes):
            prompt = alone[prompts[i]]
            pairs.append((prompt, apart[i] if i in apart else whole[len(prompt) :]))
        return pairs

    def _by_stretches(self, text: str, frame: Frame) -> list[int]:
        parts = (self._tokens([text[start:end]], control=framed)[0] for start, end, framed in stretches(text, frame))
        return list(itertools.chain.from_iterable(parts))

    def _tokens(self, texts: list[str], *, control: bool) -> list[list[int]]:
        if not texts:
            return []
        how: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        if not control and any(map(self._control.search, texts)):
            how["split_special_tokens"] = True  # only where it matters: some tokenizers do not know the setting
        return self.tokenizer(texts, **how)["input_ids"]


class Around:
    """What stands before a prompt and after an answer.

    Args:
        reader: What tokenises.
        close: Whether anything ends an answer: to learn it, not to score text.

    Attributes:
        bos: Ids that the tokenizer puts before a text.
        eos: Ids of the end of sequence; none without ``close``.
    """

    def __init__(self, reader: TextReader, *, close: bool) -> None:
        self._reader = reader
        self._close = close
        self.bos, ends = surroundings(reader.tokenizer)
        eos = [] if reader.tokenizer.eos_token_id is None else [int(reader.tokenizer.eos_token_id)]
        self.eos = (ends or eos) if close else []
        self._ends: dict[str, list[int]] = {}

    def begin(self, frame: Frame) -> list[int]:
        """Return what stands before a prompt: nothing more where a chat template wrote its beginning."""
        return [] if frame and frame[0][0] == 0 else self.bos

    def end(self, text: str) -> list[int]:
        """Return what follows an answer: the end of sequence, or the text that a chat template writes there."""
        if not text or not self._close:
            return self.eos
        if text not in self._ends:
            [after], [alone], [before] = (
                self._reader.ids([one], [frame])
                for one, frame in ((f"a{text}", ((1, 1 + len(text)),)), (text, ((0, len(text)),)), ("a", ()))
            )
            self._ends[text] = after[len(before) :] if after[: len(before)] == before else alone
        return self._ends[text]


def stretches(text: str, frame: Frame) -> list[tuple[int, int, bool]]:
    """Return a text's stretches that are not empty, and whether each belongs to the frame."""
    bounds = sorted({0, len(text), *(place for span in frame for place in span)})
    return [
        (start, end, any(low <= start and end <= high for low, high in frame))
        for start, end in itertools.pairwise(bounds)
    ]
