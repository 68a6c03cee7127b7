"""A Hugging Face tokenizer as GGUF vocabulary.

Knows the two kinds that LLaMA-family models use: SentencePiece-like BPE over characters with byte fallback (Llama 1 and
2, Mistral), and byte-level BPE (Llama 3, Qwen). llama.cpp knows pre-tokenizers by name only, so a byte-level
tokenizer whose splitting rule has no name there is refused. It knows nothing of weights.

Not ``gguf.vocab``: its classes read files, infer bos and eos from them and pass over what they do not know; here the
loaded tokenizer is asked, and what has no equal is refused before training.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from atp.data.encoding.turn import end_token, template_of
from atp.errors import UserError
from atp.model.gguf.splitting import PRE_TOKENIZERS
from atp.model.gguf.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF stores of a tokenizer.

    Attributes:
        model: ``llama`` (characters with byte fallback) or ``gpt2`` (byte level).
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: Token texts by id.
        types: Token types by id.
        scores: Priority of each token's merge, ``llama`` only.
        merges: Merges in order, ``gpt2`` only.
        special: Ids by role: bos, eos, unk, pad; eot, where the model ends a turn with another token than eos.
        add_bos: Whether a text begins with bos.
        add_eos: Whether a text ends with eos.
        add_space_prefix: Whether a space is put before a text.
        chat_template: Jinja template, if there is one.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None


def gguf_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, stops: Collection[int] = ()) -> Vocabulary:
    """Translates a tokenizer.

    Args:
        tokenizer: A fast tokenizer.
        vocab_size: Rows of the model's embedding; ids without a token are written as unused.
        stops: Ids that end the model's generation.

    Raises:
        ValueError: The tokenizer is of a kind that llama.cpp has no equal of, or has more ids than the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"GGUF: {type(tokenizer).__name__} is not a fast tokenizer, so its rules cannot be read")
    rules = json.loads(backend.to_str())
    model = rules["model"]
    if model.get("type") != "BPE":
        raise UserError(f"GGUF: a {model.get('type')} tokenizer has no equal in llama.cpp here; export without it")
    by_characters = bool(model.get("byte_fallback"))
    pre = "default" if by_characters else _pre_tokenizer(rules)
    tokens, types = _tokens(rules, vocab_size)
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if by_characters:
        _mark_bytes(tokens, types, rules)
    special = {
        role: getattr(tokenizer, f"{role}_token_id")
        for role in ("bos", "eos", "unk", "pad")
        if getattr(tokenizer, f"{role}_token_id", None) is not None
    }
    if (end := end_token(tokenizer)) in stops and end is not None and end != special.get("eos"):
        special["eot"] = end
    begins, ends = _encloses(tokenizer)
    return Vocabulary(
        model="llama" if by_characters else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        scores=_scores(tokens, types, merges) if by_characters else None,
        merges=None if by_characters else [" ".join(merge) for merge in merges],
        special=special,
        add_bos=begins,
        add_eos=ends,
        add_space_prefix=_adds_space(rules) if by_characters else False,
        chat_template=template_of(tokenizer),
    )


def _steps(rule: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if rule is None:
        return []
    return [step for part in rule[inner] for step in _steps(part, inner)] if rule["type"] == "Sequence" else [rule]


def _pre_tokenizer(rules: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text."""
    signature = []
    for step in _steps(rules.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "ByteLevel":
            signature += ["gpt2"] if step.get("use_regex", True) else []
            if step.get("add_prefix_space"):
                signature.append("prefix space")
        elif step["type"] == "Digits" and step.get("individual_digits"):
            signature.append("digits")
        elif step["type"] == "Split" and "Regex" in step.get("pattern", {}):
            signature.append(f"split {step['pattern']['Regex']}")
        else:
            signature.append(step["type"])
    name = PRE_TOKENIZERS.get(tuple(signature))
    if name is None:
        known = ", ".join(sorted(PRE_TOKENIZERS.values()))
        raise UserError(
            f"GGUF: the tokenizer splits text by {signature or 'no rule'}, for which llama.cpp has no name known here "
            f"(known: {known}); export without tokenizer and pass token ids"
        )
    return name


def _tokens(rules: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Texts and types by id; ids that the tokenizer does not use are marked unused."""
    by_id = {index: token for token, index in rules["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in rules.get("added_tokens", [])}
    by_id |= {index: entry["content"] for index, entry in added.items()}
    if by_id and max(by_id) >= vocab_size:
        raise UserError(f"GGUF: the tokenizer has id {max(by_id)}, but the model only {vocab_size} embeddings")
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    types = []
    for index, token in enumerate(tokens):
        if index in added:
            unknown = token == rules["model"].get("unk_token")
            types.append(UNKNOWN if unknown else CONTROL if added[index]["special"] else USER_DEFINED)
        else:
            types.append(NORMAL if index in by_id else UNUSED)
    return tokens, types


def _mark_bytes(tokens: list[str], types: list[int], rules: dict[str, Any]) -> None:
    ids = {token: index for index, token in enumerate(tokens)}
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in ids]
    if missing:
        raise UserError(
            f"GGUF: the tokenizer lacks {len(missing)} of the 256 byte tokens, without which llama.cpp aborts on other "
            "characters; export without tokenizer and pass token ids"
        )
    for byte in range(256):
        types[ids[f"<0x{byte:02X}>"]] = BYTE
    unknown = rules["model"].get("unk_token")
    if unknown in ids:
        types[ids[unknown]] = UNKNOWN


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """Scores whose order is the order of merges: llama.cpp merges the neighbours whose union scores highest."""
    rank: dict[str, int] = {}
    for index, merge in enumerate(merges):
        rank.setdefault("".join(merge), index)
    last = len(merges)
    return [float(-rank.get(token, last)) if kind == NORMAL else 0.0 for token, kind in zip(tokens, types, strict=True)]


def _encloses(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts bos before and eos after a text."""
    ids = list(tokenizer("a")["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return bool(ids) and bos is not None and ids[0] == bos, bool(ids) and eos is not None and ids[-1] == eos


def _adds_space(rules: dict[str, Any]) -> bool:
    steps = _steps(rules.get("normalizer"), "normalizers") + _steps(rules.get("pre_tokenizer"), "pretokenizers")
    return any(
        (step["type"] == "Prepend" and step.get("prepend") == "▁")
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
