"""Everything a run writes of its pruned model: the Hugging Face directory, then the formats made from it.

Asks the rows of :mod:`atp.export.formats` in order for the pipeline: what can be refused is refused before training
(:func:`check_formats`), the directory comes first, every further format is made from what was written, and all of it is
verified in the end. Knows no configuration, only plain arguments, and no format by name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from atp.errors import UserError
from atp.export.formats import WEIGHT_DTYPES, Intended, asked_formats
from atp.export.verify.verification import Check, mismatches, verify

log = logging.getLogger(__name__)


def check_formats(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    uniform: bool,
    push_to_hub: str | None = None,
    public: bool = False,
    axes: Sequence[str] = (),
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    **wanted: Any,
) -> None:
    """Refuses, before any work is lost, what could not be written in the end.

    Args:
        config: Config of the base model.
        tokenizer: Its tokenizer.
        uniform: Whether pruning will leave equal widths in all layers.
        push_to_hub: Repository to upload to.
        public: Whether everyone shall see that repository.
        axes: Kinds of units that pruning may remove (``prune.space``).
        dtype: Type to store the weights in; None for the model's own.
        max_shard_size: Largest weight file, as text.
        **wanted: Further formats by name, as :func:`atp.export.formats.asked_formats` takes them.

    Raises:
        UserError: Formats cannot hold this model or lack a package (all are named), or the hub is not logged in to.
    """
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise UserError(f"export.dtype is {dtype!r}; known: {', '.join(WEIGHT_DTYPES)}, or null for the base model's")
    if not re.fullmatch(r"\d+(\.\d+)? *[KMGT]B", max_shard_size.strip().upper()):
        raise UserError(f"export.max_shard_size is {max_shard_size!r}; give a number and KB, MB, GB or TB, such as 5GB")
    intended = Intended(config, tokenizer, uniform, axes)
    if reasons := [reason for form, asked in asked_formats(wanted) if (reason := form.why_not(intended, asked))]:
        raise UserError("; ".join(reasons))
    if public and not push_to_hub:
        log.warning("export.public=true has no effect: export.push_to_hub names no repository")
    if push_to_hub:
        from huggingface_hub import get_token

        if get_token() is None:
            raise UserError(f"export.push_to_hub={push_to_hub}: not logged in; run `hf auth login`, or leave it out")


def write_formats(directory: Path, **wanted: Any) -> None:
    """Makes the further formats from an exported directory.

    Args:
        directory: The Hugging Face directory.
        **wanted: Formats by name, as :func:`atp.export.formats.asked_formats` takes them.
    """
    for form, asked in asked_formats(wanted):
        assert form.write is not None, form.name
        for made in form.write(directory, None, replace(asked, overwrite=True)):
            note = f"; {made.note}" if made.note else ""
            log.info("export: %s: %s (%.2f MiB%s)", form.name, made.path, made.size_bytes / 2**20, note)


def verify_formats(
    directory: Path, ids_WT: np.ndarray, reference_model: PreTrainedModel | None, threads: int | None = None
) -> list[Check]:
    """Verifies every format of a run's export and says how each compared.

    Args:
        directory: The exported directory.
        ids_WT: Token windows of the run's own data.
        reference_model: The model in memory, where its dtype is the stored one and float32.
        threads: Threads per process.
    """
    checks = verify(directory, ids_WT=ids_WT, reference_model=reference_model, threads=threads)
    for check in checks:
        found = (
            f"largest logit difference {check.max_abs:.2g}, top-1 {check.top1:.2%}" if check.top1 is not None else ""
        )
        log.info("verify: %s: %s%s", check.format, found, f" {check.note}" if check.note else "")
    for check in mismatches(checks):
        log.error("verify: %s does NOT match the model: %s", check.format, check.note)
    return checks


def windows_of(batches: Sequence[Any], tokens: int, length: int) -> np.ndarray:
    """Windows [W, T] of the real tokens of padded batches, laid end to end.

    Args:
        batches: Mappings with ``input_ids`` and ``attention_mask``.
        tokens: Most tokens to take.
        length: Longest window.
    """
    ids = np.concatenate([batch["input_ids"][batch["attention_mask"].bool()].cpu().numpy() for batch in batches])
    length = min(length, tokens, len(ids))
    count = max(min(tokens, len(ids)) // length, 1)
    return ids[: count * length].astype(np.int64).reshape(count, length)


def upload(directory: Path, repository: str, *, public: bool = False) -> str:
    """Uploads a directory to a hub repository, making it if need be; returns the address.

    Args:
        directory: What to upload.
        repository: Its name; one that exists keeps its visibility.
        public: Make a new repository for everyone to see. The hub's own default is that; here it has to be asked for,
            as a model may repeat what it was tuned on.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    existed = api.repo_exists(repository)
    api.create_repo(repository, private=not public, exist_ok=True)
    if existed and (hidden := bool(api.repo_info(repository).private)) == public:
        log.warning("%s exists and stays %s; change that on its page", repository, "private" if hidden else "public")
    return str(api.upload_folder(repo_id=repository, folder_path=str(directory)).commit_url)
