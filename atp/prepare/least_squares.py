"""Closed-form repair of a cut: kept inputs learn to say what the removed ones said.

Sits at the cut, between the final masks and the steps that follow. For every output projection (o_proj, down_proj) the
kept columns are fitted by least squares so that they reproduce the dense projection's output on calibration batches:

    W'_K = W C_{:,K} (C_{K,K} + ridge)^-1,    C = sum over tokens of x x^T

(the weight update of Optimal Brain Surgeon at whole columns; Hassibi and Stork 1993, for LLMs FLAP, arXiv 2312.11983,
and SlimGPT, arXiv 2412.18110, use relatives of it). Inputs x are the dense model's, so one pass serves all layers. It
knows masked models and batches, and nothing of how masks were chosen or what is trained afterwards.

Shape suffixes: B batch, T tokens, U units, D inputs of a projection, K kept inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Self

import torch
from torch import Tensor

from atp.errors import UserError
from atp.masks.lora import MaskedModel
from atp.space.space import PruningSpace

BatchSource = Callable[[], Iterable[Mapping[str, Tensor]]]

_LARGEST_GRAM_BYTES = 2**31


@torch.no_grad()
def repair_outputs(
    masked: MaskedModel,
    masks_U: Tensor,
    batches: BatchSource,
    *,
    ridge: float = 1e-3,
    moments: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Refit the base weights of all output projections to the kept inputs, in place.

    Adapters count as part of the projection and stay as they are. Columns of removed units keep their values; masks
    hide them.

    Args:
        masked: The model, not yet compact.
        masks_U: Final masks, 0 or 1, shape [U].
        batches: Gives the calibration batches, on the model's device, each time it is called; large models read them
            more than once so that the moments of few layers are in memory at a time.
        ridge: Pull towards the present weights, relative to the inputs' mean square.
        moments: From :func:`shared_moments`, where several cuts of one model are tried; otherwise taken here.

    Returns:
        Names of the refitted base weights, as in the masked model's state dict.

    Raises:
        ValueError: No batch, a negative ridge, or activations that are not finite.
    """
    if ridge < 0:
        raise UserError(f"prune.repair.ridge is {ridge}; it cannot be negative")
    cut = cut_inputs(masked.space, masked.space.split(masks_U.detach()))
    training = masked.training
    masked.eval()
    names = []
    for some in _portions(cut):
        found = _second_moments(masked, some, batches) if moments is None else {name: moments[name] for name in some}
        for module, gram_DD in found.items():
            weight, dense = masked.base_weight(module), masked.effective_weight(module)
            fitted = fit_kept(dense, gram_DD, cut[module].to(gram_DD.device), ridge)
            kept_K = cut[module].nonzero().flatten().to(dense.device)
            change = fitted - dense[:, kept_K]
            weight.index_add_(1, kept_K, change.to(weight.dtype))
            names.append(masked.base_weight_name(module))
    masked.train(training)
    return names


def cut_inputs(space: PruningSpace, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return which inputs stay, bool [D], of every output projection that loses some but not all of them."""
    kept = {site.module: site.side.expand(masks) > 0 for site in space.sites if site.on == "input"}
    return {name: kept_D for name, kept_D in kept.items() if not kept_D.all() and kept_D.any()}


def fit_kept(weight: Tensor, gram_DD: Tensor, kept_D: Tensor, ridge: float) -> Tensor:
    """Weights of the kept inputs that reproduce the whole projection best.

    Args:
        weight: Dense projection, [out, D].
        gram_DD: Sum of x x^T over calibration tokens.
        kept_D: True where an input stays.
        ridge: Relative ridge; the penalty is on the distance from the present weights.

    Returns:
        [out, K], in the dtype of ``weight``.
    """
    gram = gram_DD.double()
    kept, penalty = gram[kept_D][:, kept_D], ridge * gram.diagonal().mean().clamp(min=1e-12)
    wanted = gram[kept_D] @ weight.double().T + penalty * weight[:, kept_D].double().T
    system = kept + (penalty + 1e-9 * gram.diagonal().mean()) * torch.eye(
        len(kept), dtype=kept.dtype, device=gram.device
    )
    return torch.linalg.solve(system, wanted).T.to(weight.dtype)


def shared_moments(masked: MaskedModel, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
    """Moments of the inputs of all output projections, [D, D] by module; None where they are too large to keep."""
    sizes = {site.module: site.side.size for site in masked.space.sites if site.on == "input"}
    if sum(4 * size**2 for size in sizes.values()) > _LARGEST_GRAM_BYTES:
        return None
    return _second_moments(masked, list(sizes), lambda: batches)


def _portions(cut: Mapping[str, Tensor]) -> Iterable[list[str]]:
    """Split modules into portions whose moments fit in memory together."""
    portion: list[str] = []
    used = 0
    for module, kept_D in cut.items():
        needed = 4 * kept_D.numel() ** 2
        if portion and used + needed > _LARGEST_GRAM_BYTES:
            yield portion
            portion, used = [], 0
        portion.append(module)
        used += needed
    if portion:
        yield portion


def _second_moments(masked: MaskedModel, modules: Sequence[str], batches: BatchSource) -> dict[str, Tensor]:
    """Sum of x x^T over real tokens, for the inputs of the named projections in the unmasked model."""
    with Moments(masked, modules) as moments, masked.unmasked():
        for batch in batches():
            moments.watch(batch["attention_mask"].bool())
            masked(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return moments.checked()


class Moments:
    """Sums of x x^T over the inputs of projections, taken while the model runs inside the ``with`` block.

    Args:
        masked: The model.
        modules: Names of the projections.
    """

    def __init__(self, masked: MaskedModel, modules: Sequence[str]) -> None:
        self._masked, self._modules = masked, modules
        self._by_module: dict[str, Tensor] = {}
        self._real_BT = torch.empty(0)
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        for module in self._modules:
            hook = self._masked.linear(module).register_forward_pre_hook(self._adder(module))
            self._hooks.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def watch(self, real_BT: Tensor) -> None:
        """Count these tokens of the batch that comes next, True or False, [B, T]."""
        self._real_BT = real_BT

    def _adder(self, module: str) -> Callable[..., None]:
        def add(_: object, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0][self._real_BT].float()
            gram = x.T @ x
            self._by_module[module] = self._by_module[module] + gram if module in self._by_module else gram

        return add

    def checked(self) -> dict[str, Tensor]:
        """The sums, [D, D] by module name.

        Raises:
            ValueError: Nothing ran, or activations are not finite.
        """
        missing = set(self._modules) - set(self._by_module)
        if missing or not all(torch.isfinite(gram).all() for gram in self._by_module.values()):
            raise UserError(
                "prune.repair: the calibration batches gave no finite activations; check the data, try "
                "model.dtype=float32, or set prune.repair.batches=0"
            )
        return self._by_module
