"""Writing a tokenizer beside a model's weights, so that users' own ``AutoTokenizer`` gives the ids that ours gave.

Part of :mod:`atp.export.hf.writing`. ``AutoTokenizer`` may choose a class by the model's type that puts its own rules
in place of those in ``tokenizer.json``; whether it does is tried on what was written. It knows nothing of weights.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from atp.data.encoding.tokenizer import same_ids

logger = logging.getLogger(__name__)

MODULE = "tokenization_atp"
CLASS = "FileTokenizer"
_CODE = f'''"""A tokenizer that follows the tokenizer.json beside it, whatever the type of the model."""

from transformers import PreTrainedTokenizerFast


class {CLASS}(PreTrainedTokenizerFast):
    """Reads tokenizer.json as it stands."""
'''


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer into a model directory whose ``config.json`` is already there.

    Args:
        tokenizer: The tokenizer.
        folder: The directory.
    """
    tokenizer.save_pretrained(str(folder))
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings.pop("auto_map", None)  # names code that is not here
    if settings.get("tokenizer_class") in ("TokenizersBackend", CLASS):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version of transformers knows
    _write(file, settings)
    if _read_back(tokenizer, folder):
        return
    # AutoTokenizer passes over its own choice by type where a class is named here. Without leave to run code it then
    # goes by tokenizer_class, and with leave it takes the class of this file.
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "auto_map": {"AutoTokenizer": [None, f"{MODULE}.{CLASS}"]},
    }
    _write(file, settings)
    (folder / f"{MODULE}.py").write_text(_CODE, encoding="utf-8")
    if not _read_back(tokenizer, folder):
        logger.warning(
            "AutoTokenizer reads text otherwise than the exported tokenizer.json; load it by "
            "PreTrainedTokenizerFast.from_pretrained"
        )


def _write(file: Path, settings: dict[str, object]) -> None:
    file.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_back(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether a user's AutoTokenizer gives the same ids."""
    again = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    return same_ids(again, tokenizer)
