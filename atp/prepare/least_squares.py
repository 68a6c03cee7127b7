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

import torch
from torch import Tensor

from atp.errors import UserError
from atp.masks.lora import MaskedModel
from atp.masks.loss import decode
from atp.prepare.passes import InputObserver
from atp.space.space import PruningSpace

BatchSource = Callable[[], Iterable[Mapping[str, Tensor]]]

_LARGEST_GRAM_BYTES = 2**31
_SMALLEST_SHARED_RIDGE = 1e-6  # below it an inverse loses digits that solving a system of what stays keeps


@torch.no_grad()
def repair_outputs(
    masked: MaskedModel,
    masks_U: Tensor,
    batches: BatchSource,
    *,
    ridge: float = 1e-3,
    fits: OutputFits | None = None,
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
        fits: Made of moments of these batches, where there are some; otherwise made here, with ``ridge``.

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
    for some in _portions(cut) if fits is None else [list(cut)]:
        here = fits or OutputFits(_second_moments(masked, some, batches), ridge)
        for module in some:
            weight, dense = masked.base_weight(module), masked.effective_weight(module)
            fitted = here.fit(module, dense, cut[module])
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


class OutputFits:
    """Fits of output projections from the moments of their inputs, for one cut or for several.

    For several, what does not depend on the cut is done once: with P = (C + ridge)^-1, removing the inputs R from a
    projection W and refitting the others gives W'_K = W_K - W_R (P_RR)^-1 P_RK, whose systems are of the size of what
    goes (block inverse; the same weights as :func:`fit_kept`'s to rounding in float64).

    Args:
        moments: Sums of x x^T, [D, D] by module; taken over, so not to be read any more if there are several cuts.
        ridge: As in :func:`fit_kept`.
        several: Whether more than one cut is to be fitted.
    """

    def __init__(self, moments: dict[str, Tensor], ridge: float, *, several: bool = False) -> None:
        self._moments, self._ridge = moments, ridge
        self._inverses: dict[str, Tensor] = {}
        self._indefinite: set[str] = set()
        size = sum(8 * gram_DD.numel() for gram_DD in moments.values())
        self._several = several and ridge >= _SMALLEST_SHARED_RIDGE and size <= _LARGEST_GRAM_BYTES

    @torch.no_grad()
    def fit(self, module: str, weight: Tensor, kept_D: Tensor) -> Tensor:
        """Weights of the kept inputs, [out, K].

        Args:
            module: Name of the projection.
            weight: Its dense weights, [out, D].
            kept_D: True where an input stays; some stay, some go.
        """
        inverse_DD = self._inverse(module) if self._several else None
        if inverse_DD is None:
            gram_DD = self._moments[module]
            return fit_kept(weight, gram_DD, kept_D.to(gram_DD.device), self._ridge)
        kept_K = kept_D.nonzero().flatten().to(inverse_DD.device)
        gone_R = (~kept_D).nonzero().flatten().to(inverse_DD.device)
        rows_RD = inverse_DD[gone_R]
        pushed_RO = torch.linalg.solve(rows_RD[:, gone_R], weight[:, gone_R].double().T)
        return (weight[:, kept_K].double() - pushed_RO.T @ rows_RD[:, kept_K]).to(weight.dtype)

    def _inverse(self, module: str) -> Tensor | None:
        """Inverse of the moments with the ridge of :func:`fit_kept`, float64, in place of the moments.

        None where rounding has left the moments, which are summed in float32, without a positive smallest eigenvalue.
        """
        if module not in self._inverses and module not in self._indefinite:
            system_DD = self._moments[module].double()
            mean = system_DD.diagonal().mean()
            system_DD.diagonal().add_(self._ridge * mean.clamp(min=1e-12) + 1e-9 * mean)
            factor_DD, failed = torch.linalg.cholesky_ex(system_DD)
            if int(failed):
                self._indefinite.add(module)
            else:
                self._inverses[module] = torch.cholesky_inverse(factor_DD)
                del self._moments[module]
        return self._inverses.get(module)


def output_moments(masked: MaskedModel, limit: int | None = None) -> Moments | None:
    """Return an observer of the inputs of all output projections; None where their moments are too large to keep."""
    sizes = {site.module: site.side.size for site in masked.space.sites if site.on == "input"}
    if sum(4 * size**2 for size in sizes.values()) > _LARGEST_GRAM_BYTES:
        return None
    return Moments(masked, list(sizes), limit)


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
            decode(masked, batch)
    return moments.checked()


class Moments(InputObserver):
    """Sums of x x^T over the inputs of projections, taken while the model runs inside the ``with`` block.

    Args:
        masked: The model.
        modules: Names of the projections.
        limit: Batches that are counted, the first ones; None for all.
    """

    def __init__(self, masked: MaskedModel, modules: Sequence[str], limit: int | None = None) -> None:
        super().__init__(masked, modules, limit)
        self._by_module: dict[str, Tensor] = {}
        self._products: dict[int, Tensor] = {}

    def add(self, module: str, x: Tensor) -> None:
        """Add a batch's inputs [tokens, D]; the product is formed in one matrix that all of a width share."""
        x, width = x.float(), x.shape[-1]
        if module not in self._by_module:
            self._by_module[module] = x.T @ x
            return
        total = self._by_module[module]
        product = self._products.get(width)
        if product is None or product.device != total.device:
            product = self._products[width] = torch.empty_like(total)
        total.add_(torch.mm(x.T, x, out=product))

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
