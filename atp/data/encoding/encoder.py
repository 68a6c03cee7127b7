"""Encoding: records as token ids, and which of them count in the loss.

The one place that draws the boundary between prompt and completion and that cuts what is too long, so that training,
scoring and generation see the same ids. It sits between :mod:`atp.data.records` and its two readers, :mod:`atp.data`
and :mod:`atp.evaluate`. It knows nothing of torch, batches on a device, or models.

Boundary: the prompt is tokenised alone, as generation will see it. The completion's ids are what the whole text adds to
that; where a token of the whole text would span the boundary, the completion is tokenised alone as well. Before a
sequence stands what the tokenizer itself puts before a text (most often BOS, or nothing), and after it EOS; where a
chat template wrote the prompt, what that begins with and ends an answer with, and nothing else, as in transformers and
servers. The name of a control token that stands in a text is text; only what a template wrote around it means tokens.

Too long: a completion is kept whole as long as it fits with one token of its prompt; the prompt gives way, losing its
middle, because its beginning holds the task and the start of the document and its end the question (as LongBench does,
Bai et al. 2023, arXiv 2308.14508, section 4). Only a completion that leaves no room at all is cut, at its end. Running
text is never dropped but continued in further windows; a conversation goes on in further sequences, each with its
system turn and as many exchanges as fit.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from atp.data.encoding.chat import ChatIds, ChatTemplate
from atp.data.encoding.example import Choices, Example
from atp.data.encoding.text import Around, TextReader
from atp.data.records import ChatRecord, ChoiceRecord, CompletionRecord, Frame, Record, TextRecord
from atp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

LOSS_ON = ("auto", "completion", "all")
_CHUNK = 1024


class Encoder:
    """Encodes records for one tokenizer and one greatest length.

    Args:
        tokenizer: A tokenizer of transformers.
        max_length: Most tokens of a sequence, special ones included.
        close: Whether whole texts and completions end in an end-of-sequence token: to learn it, not to score text.
        stride: Tokens by which windows of running text move on: a window repeats what came before as context. None
            repeats only the token before it.

    Attributes:
        truncated: How many ``prompts``, ``completions``, ``texts`` (cut into windows) and ``chats`` (continued in
            further sequences) did not fit so far.

    Raises:
        ValueError: ``max_length`` is too small to hold a prompt and a completion.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, close: bool = True, stride: int | None = None
    ) -> None:
        if max_length < 8:
            raise UserError(f"data.max_length={max_length} is too short to hold a prompt and a completion; use >= 8")
        if stride is not None and not 1 <= stride <= max_length - 2:
            raise UserError(
                f"evaluate.stride={stride} must lie between 1 and data.max_length - 2 = {max_length - 2}, or be null"
            )
        self.stride = stride
        self.tokenizer = tokenizer
        self.chats = ChatTemplate(tokenizer)
        self.max_length = max_length
        self.truncated: Counter[str] = Counter(prompts=0, completions=0, texts=0, chats=0)
        self._answers = 0
        self._longest_answer = 0
        self._reader = TextReader(tokenizer)
        self._around = Around(self._reader, close=close)
        self._bos, self._eos = self._around.bos, self._around.eos
        self._closes = close

    @property
    def settings(self) -> list[int | list[int] | None]:
        """Return what decides the ids besides tokenizer and records."""
        return [self.max_length, self.stride, self._bos, self._eos]

    def fresh(self) -> Encoder:
        """Return an encoder of the same settings that has counted nothing."""
        encoder = copy.copy(self)
        encoder.truncated = Counter(dict.fromkeys(self.truncated, 0))
        encoder._answers = encoder._longest_answer = 0
        return encoder

    def counts(self) -> dict[str, int]:
        """Return what was counted so far, for :meth:`add_counts` where the same records are not encoded again."""
        return {**self.truncated, "answers": self._answers, "longest_answer": self._longest_answer}

    def add_counts(self, counts: Mapping[str, int]) -> None:
        """Count records that another encoder of these settings has encoded."""
        self.truncated.update({name: counts[name] for name in self.truncated})
        self._answers += counts["answers"]
        self._longest_answer = max(self._longest_answer, counts["longest_answer"])

    @property
    def pad_id(self) -> int:
        """Return the id to pad with; attention masks and labels hide it, so a stand-in does when there is none."""
        ids = (getattr(self.tokenizer, name) for name in ("pad_token_id", "eos_token_id"))
        return int(next((found for found in ids if found is not None), 0))

    def encode(self, records: Sequence[Record], loss_on: str = "auto") -> list[list[Example]]:
        """Encode records: each becomes one example, or several windows if it is long running text.

        A window after the first opens with the token before it as context, so every token is learnt exactly once.

        Args:
            records: What to encode; of choices, the right one.
            loss_on: ``completion`` (end of sequence included) or ``all`` tokens; ``auto`` takes completions where
                there are any and all tokens of running text.

        Returns:
            The examples of each record.

        Raises:
            ValueError: ``loss_on`` is unknown, or is ``completion`` and a record is running text.
        """
        if loss_on not in LOSS_ON:
            raise UserError(f"data.loss_on={loss_on!r} is unknown; choose one of {LOSS_ON}")
        found: list[list[Example]] = []
        for start in range(0, len(records), _CHUNK):
            found.extend(self._encode_chunk(records[start : start + _CHUNK], loss_on))
        return found

    def choices(self, records: Sequence[ChoiceRecord]) -> list[Choices]:
        """Encode multiple-choice items for scoring; a prompt that must be cut is cut alike for all its choices."""
        prompts = [(record.prompt, record.frame) for record in records for _ in record.choices]
        pairs = iter(self._reader.pairs(prompts, [text for record in records for text in record.choices]))
        found = []
        for record in records:
            parts = [next(pairs) for _ in record.choices]
            prompt = self._fit(record, parts[0][0], max(len(continuation) for _, continuation in parts))
            choices = zip(parts, record.choices, strict=True)
            closed = [self._close(record, prompt, ids, text) for (_, ids), text in choices]
            found.append(Choices(prompt, *(list(column) for column in zip(*closed, strict=True))))
        return found

    def prompts(self, texts: Sequence[str], new_tokens: int, frames: Sequence[Frame] | None = None) -> list[list[int]]:
        """Return the ids to generate from: beginning of sequence and prompt, leaving room for ``new_tokens``.

        Args:
            texts: The prompts.
            new_tokens: Longest continuation.
            frames: Of each prompt what a chat template wrote, as in :class:`atp.data.records.CompletionRecord`.

        Raises:
            ValueError: ``new_tokens`` leaves no room for a prompt.
        """
        frames = [()] * len(texts) if frames is None else frames
        room = self._room(new_tokens)
        return [
            self._around.begin(frame) + self._cut_middle(ids, room)
            for ids, frame in zip(self._reader.ids(texts, frames), frames, strict=True)
        ]

    def _room(self, new_tokens: int) -> int:
        room = self.max_length - new_tokens - len(self._bos)
        if room < 1:
            raise UserError(
                f"evaluate.max_new_tokens={new_tokens} leaves no room for a prompt within "
                f"data.max_length={self.max_length}; lower the one or raise the other"
            )
        return room

    def names_control_tokens(self, record: Record) -> bool:
        """Return whether the name of a control token stands in a record's own words, where it is read as text."""
        if isinstance(record, ChatRecord):
            return any(self._reader.names_control(message["content"]) for message in record.messages)
        if isinstance(record, TextRecord):
            return self._reader.names_control(record.text)
        answers = record.choices if isinstance(record, ChoiceRecord) else [record.completion]
        return self._reader.names_control(record.prompt, record.frame) or any(map(self._reader.names_control, answers))

    def chat_prompts(self, records: Sequence[ChatRecord], new_tokens: int) -> list[list[int]]:
        """Return the ids to generate the last of the assistant's turns from, leaving room for ``new_tokens``.

        Raises:
            ValueError: ``new_tokens`` leaves no room for a prompt.
        """
        room = self._room(new_tokens)
        return [self._cut_middle(self.chats.prompt_ids(record), room) for record in records]

    def check_answers(self, name: str, *, refuse: bool = True) -> None:
        """Warn of answers encoded so far that are longer than a sequence, which are cut at their end.

        Args:
            name: What to call the data.
            refuse: Whether it is an error if none of them fits.

        Raises:
            ValueError: ``refuse`` is set and no answer fits; says how long a sequence would have to be.
        """
        cut, needed = self.truncated["completions"], len(self._bos) + 1 + self._longest_answer
        if not cut:
            return
        told = (
            f"{name}: {cut} of {self._answers} answers are longer than data.max_length={self.max_length} tokens allow "
            f"and are cut at their end; the longest needs data.max_length={needed} (within the model's context). "
            'Otherwise shorten them, or give them as running text ({"text": ...}), which is continued in windows'
        )
        if refuse and cut == self._answers:
            raise UserError(told)
        log.warning("%s", told)

    def _encode_chunk(self, records: Sequence[Record], loss_on: str) -> Iterator[list[Example]]:
        texts = [record for record in records if isinstance(record, TextRecord)]
        if texts and loss_on == "completion":
            raise UserError(
                f"data.loss_on='completion', but {len(texts)} records are running text and have none, e.g. "
                f"{texts[0].text[:40]!r}; use data.loss_on=auto"
            )
        windows = (self._windows(ids, record.text) for ids, record in zip(self._texts(texts), texts, strict=True))
        prompted = [record for record in records if isinstance(record, CompletionRecord | ChoiceRecord)]
        answers = [_answer(record) for record in prompted]
        pairs = self._reader.pairs([(record.prompt, record.frame) for record in prompted], answers)
        fitted = iter(self._fitted(prompted, pairs, answers))
        for record in records:
            if isinstance(record, TextRecord):
                yield next(windows)
                continue
            if isinstance(record, ChatRecord):
                yield self._chat(record, loss_on)
                continue
            prompt, continuation, text_bytes = next(fitted)
            if loss_on == "all":
                text_bytes += self._bytes(prompt[len(self._around.begin(record.frame)) :])
            ids = np.array(prompt + continuation, dtype=np.int32)
            yield [Example(ids, 0 if loss_on == "all" else len(prompt), text_bytes)]

    def _chat(self, record: ChatRecord, loss_on: str) -> list[Example]:
        """The sequences of a conversation: one, or where it is too long several, of as many exchanges as fit."""
        found, parted = self.chats.fitting(record, self.max_length)
        self.truncated["chats"] += parted
        return [self._chat_example(one, loss_on) for one in found]

    def _chat_example(self, chat: ChatIds, loss_on: str) -> Example:
        """Make an example of ids; where they are too many, what comes before the first learnt turn loses its middle."""
        learnt = chat.learnt if self._closes else self.chats.without_ends(chat)
        first = learnt.index(True)
        prompt, rest = chat.ids[:first], chat.ids[first:]
        self._answers += 1
        self._longest_answer = max(self._longest_answer, len(rest))
        room = self.max_length - len(rest)
        prompt = self._cut_middle(prompt, room if room >= 1 else self.max_length // 8)
        if len(prompt) + len(rest) > self.max_length:
            self.truncated["completions"] += 1
            rest = rest[: self.max_length - len(prompt)]
        if loss_on == "all":
            ids = prompt + rest
            return Example(np.array(ids, dtype=np.int32), 0, self._spoken_bytes(ids))
        marks = [False] * len(prompt) + learnt[first : first + len(rest)]
        runs = [(mark, len(list(group))) for mark, group in itertools.groupby(marks)]
        ends = list(itertools.accumulate(size for _, size in runs))
        given = tuple((end - size, end) for (mark, size), end in zip(runs, ends, strict=True) if not mark)
        given = given[1:] if given and given[0][0] == 0 else given
        ids = prompt + rest
        said = sum(
            self._spoken_bytes(ids[end - size : end]) for (mark, size), end in zip(runs, ends, strict=True) if mark
        )
        return Example(np.array(ids, dtype=np.int32), len(prompt), said, given)

    def _spoken_bytes(self, ids: list[int]) -> int:
        return len(str(self.tokenizer.decode(ids, skip_special_tokens=True)).encode())

    def _fitted(
        self,
        records: Sequence[CompletionRecord | ChoiceRecord],
        pairs: Sequence[tuple[list[int], list[int]]],
        answers: Sequence[str],
    ) -> Iterator[tuple[list[int], list[int], int]]:
        """Yield prompt, closed answer and its bytes; a choice's prompt makes room for the longest of its choices."""
        crowded = [self._may_be_crowded(record, len(ids)) for record, (ids, _) in zip(records, pairs, strict=True)]
        tight = [record for record, flag in zip(records, crowded, strict=True) if flag]
        options = iter(self.choices([record for record in tight if isinstance(record, ChoiceRecord)]))
        for record, flag, (prompt, continuation), answer in zip(records, crowded, pairs, answers, strict=True):
            if flag and isinstance(record, ChoiceRecord):
                option = next(options)
                yield option.prompt, option.continuations[record.label], option.text_bytes[record.label]
            else:
                fitted = self._fit(record, prompt, len(continuation))
                yield fitted, *self._close(record, fitted, continuation, answer)

    def _may_be_crowded(self, record: CompletionRecord | ChoiceRecord, prompt: int) -> bool:
        """Whether some choice might not fit. A token spells at least a byte, so most often no choice is tokenised."""
        if not isinstance(record, ChoiceRecord):
            return False
        longest = max(len(choice.encode()) for choice in record.choices) + 1
        around = len(self._around.begin(record.frame)) + len(self._around.end(record.end))
        return around + prompt + longest > self.max_length

    def _windows(self, ids: list[int], text: str) -> list[Example]:
        """Cut running text; ``ids`` holds its end of sequence."""
        stream = self._bos + ids
        windows = [Example(np.array(stream[: self.max_length], dtype=np.int32), 0, len(text.encode()))]
        repeated = 1 if self.stride is None else max(1, self.max_length - len(self._bos) - self.stride)
        lead = len(self._bos) + repeated
        for start in range(self.max_length, len(stream), self.max_length - lead):
            window = self._bos + stream[start - repeated : start + self.max_length - lead]
            windows.append(Example(np.array(window, dtype=np.int32), lead, 0))
        self.truncated["texts"] += len(windows) > 1
        return windows

    def _fit(self, record: CompletionRecord | ChoiceRecord, prompt: list[int], completion: int) -> list[int]:
        """Return a prompt with what begins it, its middle cut to make room for a completion of so many tokens."""
        begin = self._around.begin(record.frame)
        room = self.max_length - len(begin) - completion - len(self._around.end(record.end))
        return begin + self._cut_middle(prompt, room if room >= 1 else self.max_length // 8)

    def _cut_middle(self, ids: list[int], room: int) -> list[int]:
        if len(ids) <= room:
            return ids
        self.truncated["prompts"] += 1
        tail = room // 2
        return ids[: room - tail] + ids[len(ids) - tail :]

    def _close(
        self, record: CompletionRecord | ChoiceRecord, prompt: list[int], ids: list[int], text: str
    ) -> tuple[list[int], int]:
        """Return the completion with its end, and its bytes; cut if it does not fit after the prompt."""
        room = self.max_length - len(prompt)
        end = self._around.end(record.end)
        self._answers += 1
        self._longest_answer = max(self._longest_answer, len(ids) + len(end))
        if len(ids) + len(end) <= room:
            return ids + end, len(text.encode())
        self.truncated["completions"] += 1
        return ids[:room], self._bytes(ids[:room])

    def _texts(self, records: Sequence[TextRecord]) -> list[list[int]]:
        return [ids + self._eos for ids in self._reader.ids([record.text for record in records])]

    def _bytes(self, ids: list[int]) -> int:
        return len(str(self.tokenizer.decode(ids)).encode())


def _answer(record: CompletionRecord | ChoiceRecord) -> str:
    return record.choices[record.label] if isinstance(record, ChoiceRecord) else record.completion
