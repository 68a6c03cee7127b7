"""An exported directory written once more, with weights of another type, or a GGUF file as one: what ``--to hf`` does.

Carries along what the directory says of itself: provenance, prompt, and of its card the base model, licence and data.
Knows no run directories.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load
from transformers import PreTrainedConfig

from atp.data.encoding.tokenizer import check_ids, load_tokenizer
from atp.data.prompt import PROMPT_FILE
from atp.export.hf.card import CardFacts, base_license, model_card
from atp.export.hf.loading import load_exported
from atp.export.hf.writing import PROVENANCE_FILE, ExportResult, export_hf
from atp.model.families import is_stock
from atp.model.gguf.base import companions
from atp.model.loading import load_model
from atp.model.widths import layer_widths


def convert(directory: Path, output: Path, *, dtype: str | None = None, overwrite: bool = False) -> ExportResult:
    """Writes a model directory anew; an adapter beside the weights is merged into them, a GGUF file is de-quantised.

    Args:
        directory: A directory as :func:`atp.export.hf.writing.export_hf` writes it, or a GGUF file.
        output: The new one.
        dtype: Name of the type to store; the stored one by default, float32 for a GGUF file.
        overwrite: Replace the model directory that is already there.

    Raises:
        UserError: The directory is damaged, or the new one in use.
        OSError: If the disk is full.
    """
    if directory.is_file():
        model, directory = load_model(str(directory)), companions(directory)
    else:
        model = load_exported(directory)
    has_tokenizer = (directory / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(directory, local_files_only=True) if has_tokenizer else None
    if tokenizer is not None:
        check_ids(tokenizer, model.config.vocab_size, directory)
    result = export_hf(
        model,
        tokenizer,
        output,
        card=_carried_card(directory, output.name, model.config),
        provenance=_carried_provenance(directory),
        dtype=getattr(torch, dtype) if dtype else None,
        overwrite=overwrite,
    )
    if (directory / PROMPT_FILE).is_file():
        shutil.copy(directory / PROMPT_FILE, output)
    return result


def _carried_card(directory: Path, title: str, config: PreTrainedConfig) -> str:
    """A card for the converted model: base model, licence and data as in the card it had."""
    card = directory / "README.md"
    known = (metadata_load(card) if card.is_file() else None) or {}
    facts = CardFacts(
        title=title,
        architecture=str((config.architectures or [type(config).__name__])[0]),
        stock=is_stock(config),
        widths=layer_widths(config),
        base_model=known.get("base_model"),
        license_id=base_license(directory),
        datasets=known.get("datasets") or (),
        tags=known.get("tags") or (),
    )
    return model_card(facts)


def _carried_provenance(directory: Path) -> dict[str, Any]:
    """What the run noted of itself in the directory, if it did."""
    file = directory / PROVENANCE_FILE
    return dict(json.loads(file.read_text(encoding="utf-8")).get("run", {})) if file.is_file() else {}
