"""Where a model stops: the ids that end its generation, by its configs.

A file or an object may name one id, several or none. It knows nothing of tokenizers, whose own end counts as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig


def stop_ids(*settings: Any) -> list[int]:
    """Return the ids that end generation, in their order.

    Args:
        settings: Configs of a model and of its generation, as objects or mappings; None is passed over.
    """
    found: dict[int, None] = {}
    for one in settings:
        value = one.get("eos_token_id") if isinstance(one, Mapping) else getattr(one, "eos_token_id", None)
        some = value if isinstance(value, list | tuple) else [value]
        found |= dict.fromkeys(int(index) for index in some if index is not None)
    return list(found)


def stored_stops(source: str | Path, revision: str | None = None) -> list[int]:
    """Return the ids that end generation by the files of a model.

    Args:
        source: A directory or a hub id.
        revision: Branch, tag or commit on the hub.

    Raises:
        OSError: There is no config.
    """
    settings, _ = PreTrainedConfig.get_config_dict(str(source), revision=revision)
    try:
        own: Any = GenerationConfig.from_pretrained(str(source), revision=revision or "main")
    except OSError:  # most have none
        own = None
    return stop_ids(own, settings)
