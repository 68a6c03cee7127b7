"""The tokenizer of a GGUF file, built from the file's own vocabulary so that it gives llama.cpp's token ids.

Beside the weights. transformers' own reading drops the splitting rule that the file names (``tokenizer.ggml.pre``);
here the name is looked up in :mod:`atp.model.gguf.splitting`, and one that is not there is refused. Texts are not
normalised, as llama.cpp normalises none.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from atp.errors import UserError
from atp.model.gguf.reading import GgufFile
from atp.model.gguf.splitting import ALIASES, BEGIN_WITH_BOS, RULES

log = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of GGUF."""

_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_SPACE = "▁"


def gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer of a file, with its chat template.

    Raises:
        ValueError: The file has no vocabulary, one of another kind, or one whose splitting rule has no name known here.
    """
    kind = file.value("tokenizer.ggml.model")
    if kind in (None, "no_vocab", "none"):
        raise UserError(f"{file.path} holds no vocabulary; take a file with one (tokenizer.ggml.model)")
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"{file.path} has a vocabulary of the kind {kind!r}; known are gpt2 (byte-level BPE) and llama "
            "(SentencePiece BPE with byte fallback)"
        )
    words: list[str] = file.needed("tokenizer.ggml.tokens")
    types: list[int] = file.value("tokenizer.ggml.token_type") or [NORMAL] * len(words)
    if len(types) != len(words):
        raise UserError(f"{file.path} has {len(words)} tokens and {len(types)} token types; it is damaged")
    vocabulary = {word: index for index, word in enumerate(words) if types[index] != UNUSED}
    if len(vocabulary) < len(words) - types.count(UNUSED):
        twice = next(word for index, word in enumerate(words) if vocabulary.get(word, index) != index)
        raise UserError(f"{file.path} has the token {twice!r} more than once, so that ids are not one to one")
    special = _special(file, words)
    try:
        backend = _byte_level(file, vocabulary) if kind == "gpt2" else _characters(file, vocabulary, words, types)
    except UserError:
        raise
    except Exception as error:  # the Rust library raises plain Exception for merges of unknown tokens
        raise UserError(f"{file.path}: its vocabulary makes no tokenizer: {error}") from error
    _add_tokens(backend, words, types)
    _enclose(backend, file, special, begins=kind == "llama" or _rule(file) in BEGIN_WITH_BOS)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=int(file.needed(f"{file.needed('general.architecture')}.context_length")),
        clean_up_tokenization_spaces=False,
        chat_template=_chat_template(file),
        **{f"{role}_token": words[index] for role, index in special.items()},
    )


def _special(file: GgufFile, words: Sequence[str]) -> dict[str, int]:
    """Ids by role."""
    found = {}
    for role, name in _ROLES.items():
        index = file.value(f"tokenizer.ggml.{name}_token_id")
        if index is not None and not 0 <= index < len(words):
            raise UserError(f"{file.path}: its {role} token is {index}, but it has {len(words)} tokens")
        if index is not None:
            found[role] = int(index)
    return found


def _rule(file: GgufFile) -> str:
    """llama.cpp's name for how the file's texts are split; empty where it has none."""
    name = str(file.value("tokenizer.ggml.pre") or "")
    return ALIASES.get(name, name)


def _byte_level(file: GgufFile, vocabulary: dict[str, int]) -> Tokenizer:
    name = _rule(file)
    if name not in RULES:
        named = f"its splitting rule {name!r} is not known here" if name else "it names no splitting rule"
        raise UserError(
            f"{file.path}: {named} (tokenizer.ggml.pre), so that texts would be cut into other tokens than llama.cpp's "
            f"(known: {', '.join([*RULES, *ALIASES])}); take the model's Hugging Face directory"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in file.needed("tokenizer.ggml.merges")]
    whole = name in BEGIN_WITH_BOS
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole))
    steps = [_step(step) for step in RULES[name]]
    uses_regex = "gpt2" in RULES[name]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=uses_regex)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*(step for step in steps if step is not None), last])
    backend.decoder = decoders.ByteLevel()
    return backend


def _step(name: str) -> Any:
    """A step of a splitting rule; None where the byte level does it."""
    if name == "digits":
        return pre_tokenizers.Digits(individual_digits=True)
    if name.startswith("split "):
        return pre_tokenizers.Split(Regex(name.removeprefix("split ")), behavior="isolated")
    return None


def _characters(file: GgufFile, vocabulary: dict[str, int], words: Sequence[str], types: Sequence[int]) -> Tokenizer:
    """SentencePiece's BPE: the neighbours whose union scores highest are merged first; bytes stand for the rest."""
    scores = file.needed("tokenizer.ggml.scores")
    bytes_there = sum(kind == BYTE for kind in types)
    if bytes_there != 256:
        raise UserError(f"{file.path} has {bytes_there} of the 256 byte tokens, without which llama.cpp aborts")
    merges = []
    for index, word in enumerate(words):
        if types[index] == NORMAL and len(word) > 1:
            halves = [(word[:cut], word[cut:]) for cut in range(1, len(word))]
            known = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
            known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
            merges += [(-scores[index], index, pair) for pair in known]
    merges.sort(key=lambda merge: merge[:2])
    unknown = next((word for word, kind in zip(words, types, strict=True) if kind == UNKNOWN), None)
    ordered = [pair for _, _, pair in merges]
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=ordered, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = bool(file.value("tokenizer.ggml.add_space_prefix", True))
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    ends: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    return backend


def _add_tokens(backend: Tokenizer, words: Sequence[str], types: Sequence[int]) -> None:
    """Tells which tokens are found whole in a text, special ones among them."""
    added = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    for word, kind in zip(words, types, strict=True):
        if kind in added:
            token = AddedToken(word, special=added[kind], normalized=False)
            (backend.add_special_tokens if added[kind] else backend.add_tokens)([token])


def _enclose(backend: Tokenizer, file: GgufFile, special: dict[str, int], *, begins: bool) -> None:
    """Puts bos before and eos after a text, as the file or llama.cpp's default for its kind says."""
    wanted = {
        "bos": bool(file.value("tokenizer.ggml.add_bos_token", begins)),
        "eos": bool(file.value("tokenizer.ggml.add_eos_token", False)),
    }
    used = {role: special[role] for role, asked in wanted.items() if asked and role in special}
    if missing := [role for role, asked in wanted.items() if asked and role not in special]:
        log.warning("%s: texts should be enclosed in %s, but it has no such token", file.path, " and ".join(missing))
    if not used:
        return
    texts = {role: str(backend.id_to_token(index)) for role, index in used.items()}
    before, after = ([texts[role]] if role in texts else [] for role in ("bos", "eos"))
    pairs = [*before, "$A", *after, *(f"{text}:1" for text in before), "$B:1", *(f"{text}:1" for text in after)]
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=pairs,
        special_tokens=[(texts[role], index) for role, index in used.items()],
    )


def _chat_template(file: GgufFile) -> str | None:
    template = file.value("tokenizer.chat_template")
    if others := [key for key in file.metadata if key.startswith("tokenizer.chat_template.")]:
        log.warning("%s: further chat templates are not taken over: %s", file.path, ", ".join(others))
    return str(template) if template else None
