"""What exports are compared with: tokens, the reference model's logits on them, and its greedy text, as files.

Written once for all formats of an export, as each runs in a process of its own. Reads a stored model's config and
tokenizer; knows no formats.

Shape suffixes: W windows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from atp.data.encoding.tokenizer import load_tokenizer
from atp.export.hf.loading import StoredModel
from atp.export.verify.rounding import ROUNDINGS, rounding_error

WINDOW = 256
PROMPT, NEW_TOKENS = 16, 24
SPELLED_CHARACTERS = 4000
SPELLED = (
    "It's 12 o'clock; they'll pay $3,450.75 (net) by 2031-05-06.\n\nSec. 2(b)  two  spaces, naïve café, 東京, 🙂.\n"
)
"""Text on which tokenizers are always compared: what their rules differ on."""


@dataclass
class Reference:
    """What formats are compared with, as files for the fresh processes.

    Attributes:
        folder: Where the files are.
        deviation: Standard deviation of the logits.
        perplexity: On the tokens.
        greedy: Greedy continuation of the first window's beginning.
        prompt: Tokens of that beginning.
        rounding: What rounding to a type does to the logits, root mean square, by type.
    """

    folder: Path
    deviation: float
    perplexity: float
    greedy: list[int] = field(default_factory=list)
    prompt: int = PROMPT
    rounding: dict[str, float] = field(default_factory=dict)


def spelled(stored: StoredModel, text: str | None) -> dict[str, Any]:
    """A text and its ids by the export's own tokenizer, for engines that bring another."""
    if not (stored.directory / "tokenizer.json").is_file():
        return {}
    tokenizer = load_tokenizer(stored.directory, local_files_only=True)
    text = (SPELLED + (text or ""))[:SPELLED_CHARACTERS]
    return {"text": text, "text_ids": list(tokenizer(text, verbose=False)["input_ids"])}


def token_windows(stored: StoredModel, text: str | None, tokens: int) -> np.ndarray:
    """Windows [W, T] of a text's tokens, no longer than every format's exact context; random without a tokenizer."""
    config = stored.config
    context = int(config.max_position_embeddings)
    if getattr(config, "sliding_window", None):
        context = min(context, int(config.sliding_window))
    length = min(WINDOW, context, tokens)
    ids: list[int] = []
    if text and (stored.directory / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(stored.directory, local_files_only=True)
        ids = list(tokenizer(text, verbose=False)["input_ids"])[:tokens]
    if len(ids) < length:
        ids = np.random.default_rng(0).integers(0, config.vocab_size, tokens).tolist()
    count = max(len(ids) // length, 1)
    return np.asarray(ids[: count * length], np.int64).reshape(count, length)


@torch.inference_mode()
def write_reference(
    model: PreTrainedModel, ids_WT: np.ndarray, folder: Path, rounded_types: Sequence[str] = ()
) -> Reference:
    """Writes reference logits, one window at a time.

    Args:
        model: The reference model.
        ids_WT: Token windows.
        folder: Where to write.
        rounded_types: Types of :data:`atp.export.verify.rounding.ROUNDINGS` that files to compare have.
    """
    np.save(folder / "ids.npy", ids_WT)
    shape = (*ids_WT.shape, model.config.vocab_size)
    logits_WTV = np.lib.format.open_memmap(folder / "reference.npy", mode="w+", dtype=np.float32, shape=shape)
    nll, squares = 0.0, 0.0
    for index, ids_T in enumerate(ids_WT):
        ids = torch.tensor(ids_T[None], device=model.device)
        logits_TV = model(input_ids=ids).logits[0].float()
        nll += float(torch.nn.functional.cross_entropy(logits_TV[:-1], ids[0, 1:], reduction="sum"))
        squares += float(logits_TV.var())
        logits_WTV[index] = logits_TV.cpu().numpy()
    logits_WTV.flush()
    scored = ids_WT.size - len(ids_WT)
    prompt = min(PROMPT, ids_WT.shape[1] // 2)
    new_tokens = min(NEW_TOKENS, ids_WT.shape[1] - prompt)
    perplexity = float(np.exp(min(nll / max(scored, 1), 700.0)))
    deviation = float(np.sqrt(squares / len(ids_WT)))
    return Reference(
        folder,
        deviation,
        perplexity,
        _greedy(model, ids_WT[0, :prompt], new_tokens),
        prompt,
        {name: rounding_error(model, ids_WT, logits_WTV, ROUNDINGS[name]) for name in rounded_types},
    )


def _greedy(model: PreTrainedModel, prompt_T: np.ndarray, new_tokens: int) -> list[int]:
    """Greedy continuation without a cache: what every engine's cache must reproduce."""
    ids = torch.tensor(prompt_T[None], device=model.device)
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return [int(index) for index in ids[0, len(prompt_T) :]]
