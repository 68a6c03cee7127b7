"""How byte-level tokenizers split text before they merge: llama.cpp's names for the rules, and the rules.

llama.cpp knows such rules by name only (``tokenizer.ggml.pre``). Read in both directions: a tokenizer that is written
is given the name of its rules, a file that is read gets the rules of its name. Knows nothing of vocabularies.
"""

from __future__ import annotations

# The rule of Llama 3 and, with single digits, of Qwen 2: a fact of their tokenizer files.
_CONTRACTIONS_AND_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SIGNS_AND_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _CONTRACTIONS_AND_WORDS + r"\p{N}{1,3}" + _SIGNS_AND_SPACES
QWEN2 = _CONTRACTIONS_AND_WORDS + r"\p{N}" + _SIGNS_AND_SPACES

PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    ("gpt2",): "gpt-2",
    ("digits", "gpt2"): "smollm",
    (f"split {LLAMA3}",): "llama-bpe",
    (f"split {QWEN2}",): "qwen2",
}
"""Steps of a splitting rule -> llama.cpp's name for it."""

RULES = {name: steps for steps, name in PRE_TOKENIZERS.items()}
"""llama.cpp's name -> the steps."""
ALIASES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "phi-2": "gpt-2",
    "starcoder": "smollm",
    "refact": "smollm",
    "deepseek-r1-qwen": "qwen2",
    "megrez": "qwen2",
}
"""Further names that llama.cpp reads as one of :data:`RULES`."""
BEGIN_WITH_BOS = ("llama-bpe",)
"""Names whose texts begin with bos where the file does not say; words are also looked up whole before they merge."""
