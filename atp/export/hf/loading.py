"""An exported directory as a model of atp's own classes, tensor by tensor.

What export's own checks, the comparison of the removed with the reloaded model and generation load through. Strictness
is that of :class:`atp.model.stored.StoredModel`; a model is never held twice.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from atp.model.stored import StoredModel, expected_shapes
from atp.model.stored_names import differences
from atp.model.weight_files import INDEX_FILE, WEIGHTS_FILE
from atp.model.widths import build_model

__all__ = ["INDEX_FILE", "WEIGHTS_FILE", "StoredModel", "differences", "expected_shapes", "load_exported"]


def load_exported(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Loads an exported directory, refusing anything that does not match exactly.

    Args:
        path: A directory written by :func:`atp.export.hf.writing.export_hf`, or another safetensors directory of these
            families.
        dtype: Type of the parameters; by default the stored one.
        device: Where the model goes.

    Returns:
        The model in evaluation mode, the adapter beside the weights (if the export was not merged) added to them. Code
        beside the weights is not run: the classes are atp's own.

    Raises:
        UserError: Files are missing, truncated or pickled, or tensors are missing, unexpected, misshapen or not finite.
    """
    stored = StoredModel(path)
    model = build_model(stored.config, dtype=dtype or stored.dtype, device=device)
    targets = model.state_dict()
    with torch.no_grad():
        for name, tensor in stored.tensors(model.dtype):
            targets[name].copy_(tensor)
    if (stored.directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(stored.directory), local_files_only=True)
    return model
