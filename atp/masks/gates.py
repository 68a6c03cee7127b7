"""Soft gates after the freeze: factors of the kept units, and folding them into the weights.

Sits between the freeze, after which every unit is kept or gone, and removal. A kept unit may go on with a factor of its
own: the soft value its gate had (Compresso), or one that trains for the rest of the run (GRASPrune's calibration). At
the end :func:`fold` multiplies the factors into the weights, so the removed model computes what the gated one did.

Shape suffixes: U units.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from atp.errors import UserError
from atp.space.space import PruningSpace
from atp.space.units import Side

GATES = ("binary", "soft", "calibrated")


class Gates(nn.Module):
    """Factors that multiply what each kept unit computes.

    Args:
        num_units: U.
        kind: ``soft`` keeps the values given at the freeze, ``calibrated`` trains ``1 + 0.5 tanh(s)`` from there on
            (GRASPrune, Liu et al. 2026, arXiv 2604.19398; section 6.2 of the methods note).

    Raises:
        ValueError: An unknown kind.
    """

    values_U: Tensor

    def __init__(self, num_units: int, kind: str) -> None:
        super().__init__()
        if kind not in GATES[1:]:
            raise UserError(f"prune.gates is {kind!r}; known: {', '.join(GATES)}")
        self.kind = kind
        self.register_buffer("values_U", torch.ones(num_units))
        self.scale_U = nn.Parameter(torch.zeros(num_units), requires_grad=kind == "calibrated")

    @torch.no_grad()
    def start(self, soft_U: Tensor, masks_U: Tensor) -> None:
        """Take the gates' noise-free values [U] at the freeze; a kept unit whose gate was shut starts at one."""
        if self.kind == "soft":
            self.values_U.copy_(torch.where((masks_U > 0) & (soft_U > 0), soft_U, torch.ones_like(soft_U)))

    def forward(self) -> Tensor:
        """Return the factor of every unit, [U]; those of masked units have no effect."""
        return self.values_U * (1.0 + 0.5 * torch.tanh(self.scale_U)) if self.kind == "calibrated" else self.values_U


def fold(
    tensors: Iterable[tuple[str, Tensor]], space: PruningSpace, gates_U: Tensor, *, tied: bool
) -> Iterator[tuple[str, Tensor]]:
    """Multiply gates into weights, so that the plain model computes what the gated one does.

    Where a gate acts on a module's input, the module's columns take it; on an output, its rows and bias. Factors on the
    residual stream scale the embedding, which a tied output head shares; the last norm takes them back there.

    Args:
        tensors: Names and tensors of the merged model.
        space: The pruning space.
        gates_U: Factors, positive where units are kept, [U].
        tied: Whether the output head is the embedding.
    """
    masks = space.split(gates_U.detach().double().cpu())
    by_tensor: dict[str, list[tuple[int, Tensor]]] = {}
    embeddings, final_norm, head = space.family.embedding_tensors

    def put(name: str, dimension: int, side: Side, *, invert: bool = False) -> None:
        factors = side.expand(masks)
        by_tensor.setdefault(name, []).append((dimension, _inverse(factors) if invert else factors))

    for site in space.sites:
        if site.module == space.family.embeddings:
            put(embeddings, 1, site.side)
            if tied:
                put(head, 1, site.side)
                put(final_norm, 0, site.side, invert=True)
        elif site.on == "input":
            put(f"{site.module}.weight", 1, site.side)
        else:
            put(f"{site.module}.weight", 0, site.side)
            put(f"{site.module}.bias", 0, site.side)
    for name, tensor in tensors:
        for dimension, factors in by_tensor.get(name, []):
            shaped = (
                factors.to(tensor.device) if dimension == tensor.dim() - 1 else factors.to(tensor.device).unsqueeze(1)
            )
            offset = space.family.norm_offset if name == final_norm else 0.0
            tensor = ((tensor.double() + offset) * shaped - offset).to(tensor.dtype)
        yield name, tensor


def _inverse(factors: Tensor) -> Tensor:
    return torch.where(factors > 0, 1.0 / factors.clamp(min=1e-12), torch.ones_like(factors))
