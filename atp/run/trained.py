"""What joint training leaves: its checkpoint read back, the smaller model it stands for, and the masks as a file.

Beside the stages, which say when. A checkpoint written after the live model was cut has the small model's shapes; it is
brought back to the dense layout here, so that removal always starts from the base. It knows nothing of stages.

Shape suffixes: U units.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from atp.atomic import write_json
from atp.cut.compaction import expanded_state
from atp.cut.removal import remove, slice_adapter, widths_after
from atp.masks.adapter import extract_adapter
from atp.masks.gates import fold
from atp.masks.merging import base_tensors, merged_tensors
from atp.model.adapter import Adapter
from atp.space.space import PruningSpace
from atp.train.decisions import decisions
from atp.train.joint import PruningModule

log = logging.getLogger(__name__)


def load_trained(module: PruningModule, checkpoint: Path) -> None:
    """Bring a freshly built module to where training left it, its masks frozen.

    Args:
        module: Built from the run's configuration on the dense base; changed in place.
        checkpoint: What training wrote, whether or not its live model was cut.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    tensors, space = state["state_dict"], module.space
    live_U = tensors.get("progressive.live_U", torch.ones(space.num_units))
    masks_U = tensors["final_masks_U"] if bool(tensors.get("is_compact", False)) else live_U
    if not masks_U.all():
        tensors = dict(expanded_state(tensors, space, masks_U, live_U))
        tensors["is_compact"] = torch.zeros((), dtype=torch.bool)
    if "progressive.live_U" in tensors:
        tensors["progressive.live_U"] = torch.ones_like(live_U)
    module.on_load_checkpoint({**state, "state_dict": tensors})
    module.load_state_dict(tensors, strict=False)
    if not module.is_frozen:
        module.freeze_masks()


def cut_figures(module: PruningModule, masks_U: Tensor) -> dict[str, Any]:
    """Widths, sparsity and size that the final masks [U] leave, and how far masks had come when they were fixed."""
    space = module.space
    return {
        "widths": [asdict(widths) for widths in widths_after(space, masks_U)],
        "sparsity": float(space.sparsity(masks_U.double())),
        "at_freeze": decisions(space, module.sampler, module.final_scores_U.cpu()),
        "pruned_blocks": int(space.remaining_parameters(masks_U.double())),
    }


def cut_trained(
    module: PruningModule, base_config: PreTrainedConfig, device: torch.device, *, merge: bool
) -> tuple[PreTrainedModel, PreTrainedModel, Adapter | None]:
    """The smaller model of a trained module.

    Args:
        module: With final masks; they are set on its model.
        base_config: Of the dense base.
        device: Where the smaller model is made.
        merge: Whether the adapter is merged into what is stored (``export.merge``).

    Returns:
        The smaller model, the model to store, and the adapter to store beside it where it is not merged.
    """
    masked, masks_U = module.masked, module.final_masks_U.cpu()
    with torch.no_grad():
        masked.set_masks(module.frozen_masks())
    tensors = merged_tensors(masked.peft_model)
    if module.gates is not None:
        tensors = fold(tensors, module.space, module.gates(), tied=base_config.tie_word_embeddings)
    removed = remove(tensors, base_config, module.space, masks_U, device=device)
    if merge or module.gates is not None:
        if not merge:
            log.warning("export.merge=false is ignored: soft gates are folded into the merged weights")
        return removed, removed, None
    return removed, *cut_unmerged(module, base_config, device)


def cut_unmerged(
    module: PruningModule, base_config: PreTrainedConfig, device: torch.device
) -> tuple[PreTrainedModel, Adapter]:
    """The pruned base of a trained module, and its adapter cut to it."""
    peft_model, masks_U = module.masked.peft_model, module.final_masks_U.cpu()
    adapter = slice_adapter(extract_adapter(peft_model), module.space, masks_U)
    return remove(base_tensors(peft_model), base_config, module.space, masks_U, device=device), adapter


def write_masks(path: Path, space: PruningSpace, masks_U: Tensor, scores_U: Tensor) -> None:
    """Write masks [U] of 0 and 1, and how sure each unit was to stay [U], by axis."""
    axes = {name: [int(x) for x in values] for name, values in space.split(masks_U).items()}
    scores = {name: [round(float(x), 6) for x in values] for name, values in space.split(scores_U).items()}
    write_json(path, {"format": 1, "axes": axes, "scores": scores})
