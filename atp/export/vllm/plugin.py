"""The plugin through which vLLM serves exports with widths per layer, and the shapes it is told apart by.

vLLM loads the entry point ``vllm.general_plugins`` in each of its processes; :func:`register` names the class that
builds our architectures, so that a server needs no ``trust_remote_code``. The card of an export says with the same
words whether vLLM takes it (:func:`refusal`). Importing this costs nothing: vLLM, torch and transformers are imported
when they are needed, and without vLLM nothing happens.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from atp.errors import UserError
from atp.model.families import FAMILIES
from atp.model.widths import LayerWidths, layer_widths

log = logging.getLogger(__name__)

OLDEST = (0, 32)
"""The first vLLM whose Transformers backend sizes each attention layer by its own widths."""
_BACKEND = "atp.export.vllm.backend"


def register() -> None:
    """Makes vLLM know the architectures of exports with widths per layer; repeatable.

    A vLLM that is too old is told so and left as it is, since it may be serving another model altogether.
    """
    try:
        import vllm
        from vllm import ModelRegistry
    except ImportError:
        return
    if is_too_old(vllm.__version__):
        oldest = ".".join(map(str, OLDEST))
        log.warning(
            "vLLM %s serves no export with widths per layer, it needs %s or newer; exports with equal widths work",
            vllm.__version__,
            oldest,
        )
        return
    for architecture in architectures():
        ModelRegistry.register_model(architecture, f"{_BACKEND}:AtpForCausalLM")
    _check_configs_early()


def architectures() -> list[str]:
    """What the ``architectures`` of exports with widths per layer say, one name a family."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    return [f"Atp{names[family]}" for family in FAMILIES]


def is_too_old(version: str) -> bool:
    """Whether a version of vLLM comes before :data:`OLDEST`; builds from sources, which name none, do not."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and "dev" not in version and (int(numbers[1]), int(numbers[2])) < OLDEST


def refusal(widths: Sequence[LayerWidths]) -> str:
    """Why vLLM cannot serve a model of these widths, with the way out; empty if it can."""
    slim = [index for index, layer in enumerate(widths) if layer.is_slim]
    if not slim:
        return ""
    layers = ", ".join(map(str, slim[:8])) + (", ..." if len(slim) > 8 else "")
    return (
        f"heads keep only some of their dimensions (value_dims or qk_pairs, in layers {layers}), and vLLM's attention "
        "has one size for the queries, keys and values of a head; serve it with transformers, ONNX Runtime or as GGUF "
        "in llama.cpp, or prune heads and channels alone (prune.space without value_dims and qk_pairs)"
    )


class ConfigCheck:
    """Refuses in vLLM's first process, before weights are read, a model that it could not compute."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Called by vLLM with the model's part of its settings.

        Raises:
            UserError: vLLM cannot serve the shape.
        """
        if reason := refusal(layer_widths(model_config.hf_config)):
            raise UserError(f"vLLM cannot serve {model_config.model}: {reason}")

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Called by vLLM with all of its settings, of which none depends on widths."""


def _check_configs_early() -> None:
    """Enters :class:`ConfigCheck` where vLLM keeps such checks; elsewhere the modeling file refuses, a little later."""
    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    except ImportError:
        return
    MODELS_CONFIG_MAP.update(dict.fromkeys(architectures(), ConfigCheck))
