"""The base model, tokenizer and corpus that ship with ATP, all three made by this package.

`model=embedded data=embedded_<domain>` mean these, so that the main job needs no network. :func:`records` gives the
corpus and :func:`base_dir` the checkpoint; `python -m atp.embedded.pretrain` makes corpus, tokenizer and weights anew.
It knows nothing of pruning, and importing it loads neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

from atp.embedded.corpus import DEFAULT_COUNTS, DOMAINS, records

__all__ = ["DEFAULT_COUNTS", "DOMAINS", "base_dir", "records"]


def base_dir() -> Path:
    """Return the directory of the pretrained base model, for `AutoModelForCausalLM` and `AutoTokenizer`."""
    return Path(__file__).parent / "base"
