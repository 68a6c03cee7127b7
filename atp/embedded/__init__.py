"""The base model, tokenizer and corpus that ship with ATP, all three made by this package.

What it is: what `model=embedded data=embedded_<domain>` stand for, so that the main job needs no network.
Where it sits: below data and pipeline. `records` gives the corpus, `base_dir` the checkpoint, and
`python -m atp.embedded.pretrain` makes corpus, tokenizer and weights anew.
What it does NOT know: pruning. Importing it loads neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

from atp.embedded.corpus import DEFAULT_COUNTS, DOMAINS, records

__all__ = ["DEFAULT_COUNTS", "DOMAINS", "base_dir", "records"]


def base_dir() -> Path:
    """Return the directory of the pretrained base model, for `AutoModelForCausalLM` and `AutoTokenizer`."""
    return Path(__file__).parent / "base"
