"""When the live model can be cut while it trains: at the freeze, and before it.

Beside the joint training module, which asks and warns. Each function answers with the reason against it in the words of
the configuration, empty where there is none; nothing is cut here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from atp.cut.compaction import can_cut_live
from atp.masks.generator import GradientScores
from atp.space.space import PruningSpace

if TYPE_CHECKING:
    from atp.train.joint import PruningModule


def why_uncut(space: PruningSpace, gates: str, *, taught: bool) -> str:
    """Why the live model cannot be cut at the freeze.

    Args:
        space: The pruning space.
        gates: What kept units are scaled by (``prune.gates``).
        taught: Whether the dense base is still needed as a teacher and cannot be loaded anew.
    """
    if not can_cut_live(space):
        if any(norm.across_heads for norm in space.family.norms):
            return f"{space.family.model_type} normalises queries and keys over all heads at once"
        return "of prune.space only heads, query_heads and channels can be cut while training"
    if gates != "binary":
        return f"prune.gates is {gates}, which scales what is kept until the end"
    return "distillation needs the dense base as its teacher" if taught else ""


def why_not_early(module: PruningModule) -> str:
    """Why units cannot be cut before the freeze (``prune.progressive``)."""
    if not module.compaction:
        return module.uncut or "prune.compact is false"
    if not {axis.kind for axis in module.space.axes} <= {"heads", "channels"}:
        return "prune.space must be heads and channels alone"
    if module.round_to != 1:
        return f"prune.round_to is {module.round_to}, not 1"
    if module.calibration is not None:
        return "the cut is repaired (prune.repair.batches), which needs the dense layers"
    if isinstance(module.generator, GradientScores):
        return "the generator scores by gradients of what would be cut"
    return ""
