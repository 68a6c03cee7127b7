"""Importance criteria of two-stage pruning: how much a unit matters, judged before any training.

Sits beside :mod:`atp.prepare.importance`, between the masked model and the generator: a criterion turns calibration
batches into one number per unit, a ranking makes the numbers of different layers comparable, and selection cuts the
lowest. Each is the structured form of a published rule, computed on the same masked model and batches, so that
two-stage methods run through the path of the joint ones. It knows nothing of budgets, schedules or training.

Shape suffixes: U units, B batch, T tokens, O and I rows and columns of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atp.errors import UserError
from atp.masks.lora import MaskedModel
from atp.prepare.importance import fisher_importance, standardise
from atp.prepare.passes import Batches, InputObserver, Observer, WeightGradients, observe
from atp.space.space import PruningSpace, Side


def importance(name: str, masked: MaskedModel, batches: Iterable[Mapping[str, Tensor]], seed: int = 0) -> Tensor:
    """Importance of every unit by a named criterion.

    Args:
        name: One of :data:`CRITERIA`, or several joined by ``+``: their geometric mean after each is standardised
            within layer and kind, so that a unit must matter to all of them.
        masked: The model with all gates open and adapters at zero.
        batches: Calibration batches with labels, on the model's device; ``magnitude`` and ``random`` read none.
        seed: Of the ``random`` criterion.

    Returns:
        Importance [U], float32, not negative.

    Raises:
        ValueError: An unknown criterion, or one that needs batches and got none, or values that are not finite.
    """
    return importances([name], masked, batches, seed)[name]


def importances(
    names: Sequence[str],
    masked: MaskedModel,
    batches: Iterable[Mapping[str, Tensor]],
    seed: int = 0,
    observers: Sequence[Observer] = (),
) -> dict[str, Tensor]:
    """:func:`importance` by each of the names, all read off the same passes over the batches.

    Args:
        names: As in :func:`importance`; a criterion that several of them hold is measured once.
        masked: As there.
        batches: As there.
        seed: As there.
        observers: Others who want to see the passes, of which there is then at least one over all batches.
    """
    found = list(batches)
    alone = _measured(
        list(dict.fromkeys(one for name in names for one in name.split("+"))), masked, found, seed, observers
    )

    def joined(name: str) -> Tensor:
        parts = [standardise(masked.space, alone[one]).cpu() for one in name.split("+")]
        return torch.stack(parts).mean(0).exp()

    return {name: joined(name) if "+" in name else alone[name] for name in names}


def _measured(
    criteria: Sequence[str], masked: MaskedModel, found: Batches, seed: int, observers: Sequence[Observer]
) -> dict[str, Tensor]:
    """Importance by each single criterion."""
    for name in criteria:
        if name not in CRITERIA:
            raise UserError(f"prune.warm_start.criterion is {name!r}; known: {', '.join(CRITERIA)}")
        if name not in ("random", "magnitude") and not found:
            raise UserError(
                f"prune.warm_start.criterion {name} is measured on training batches and got none; "
                "set prune.warm_start.batches to at least 1"
            )
    moments = InputMoments(masked) if {"wanda", "fluctuation"} & {*criteria} else None
    gradients = WeightGradients(masked, _cut_modules(masked.space), len(found)) if "taylor" in criteria else None
    watching = [*observers, *([moments] if moments else [])]
    if watching or gradients:
        observe(masked, found, watching, gradients)
    ways: dict[str, Callable[[], Tensor]] = {
        "fisher": lambda: fisher_importance(masked, found),
        "taylor": lambda: _taylor(masked, gradients),
        "wanda": lambda: _wanda(masked, moments),
        "fluctuation": lambda: _fluctuation(masked, moments),
        "magnitude": lambda: magnitude(masked),
        "random": lambda: torch.rand(masked.space.num_units, generator=torch.Generator().manual_seed(seed)),
    }
    measured = {name: ways[name]() for name in criteria}
    for name, importance_U in measured.items():
        if not torch.isfinite(importance_U).all():
            raise UserError(f"prune.warm_start.criterion {name} is not finite; check the data, try model.dtype=float32")
    return measured


def rank(name: str, space: PruningSpace, importance_U: Tensor) -> Tensor:
    """Scores [U] that compare units of different layers.

    Args:
        name: ``layer`` (log importance standardised within each layer and kind), ``zscore`` (importance itself
            standardised so), ``centred`` (importance less its mean within each layer and kind, for importance that has
            been divided by a spread already), or ``global`` (log importance over all layers: raw importance's order).
        space: The pruning space.
        importance_U: From :func:`importance`.

    Raises:
        ValueError: An unknown ranking.
    """
    if name == "layer":
        return standardise(space, importance_U)
    if name == "zscore":
        return torch.cat([_standardised(values) for values in space.split(importance_U).values()])
    if name == "centred":
        return torch.cat([values - values.mean() for values in space.split(importance_U).values()])
    if name == "global":
        return _standardised(importance_U.clamp(min=1e-30).log())
    raise UserError(f"prune.warm_start.ranking is {name!r}; known: {', '.join(RANKINGS)}")


RANKINGS = ("layer", "zscore", "centred", "global")
"""Ways to compare units of different layers."""


def magnitude(masked: MaskedModel) -> Tensor:
    """Root mean square of the weights that each unit owns, [U]."""
    space = masked.space
    sums, numbers = _Tally(space), _Tally(space)
    for module, rows, columns in _sides(space):
        squared_OI = masked.base_weight(module).detach().double().square()
        sums.add(squared_OI, rows, columns)
        numbers.add(torch.ones_like(squared_OI), rows, columns)
    return (sums.total() / numbers.total()).sqrt().float()


def _taylor(masked: MaskedModel, gradients: WeightGradients | None) -> Tensor:
    """First-order Taylor importance: sum of ``|w dL/dw|`` over the weights of each unit.

    LLM-Pruner's element-wise first-order rule with group sum (Ma et al. 2023, arXiv 2305.11627, section 3.2), which
    Tailored-LLaMA uses unchanged. The gradient is the mean over the batches.
    """
    assert gradients is not None
    tally = _Tally(masked.space)
    for module, rows, columns in _sides(masked.space):
        weight_OI = gradients.weights[module].detach().float()
        tally.add((weight_OI * gradients.mean[module]).abs().double(), rows, columns)
    return tally.total().float()


def _wanda(masked: MaskedModel, moments: InputMoments | None) -> Tensor:
    """Wanda in its structured form: ``|W| ||x||`` of the weights where masks act, summed over each unit.

    The score ``|W_oi| ||x_i||_2`` of Sun et al. 2023 (arXiv 2306.11695, section 3), averaged over rows and summed over
    a unit's columns of the output projections, as the Wanda-sp baseline of FLAP does.
    """
    assert moments is not None
    norms = {module: found.square_sum.sqrt() for module, found in moments.of.items()}
    return _at_sites(masked, lambda weight_OI, module: weight_OI.abs() * norms[module])


def _fluctuation(masked: MaskedModel, moments: InputMoments | None) -> Tensor:
    """FLAP's weighted fluctuation: variance of an input times the squared norm of its weights, mean over a unit.

    The weighted input feature variance of An et al. 2023 (arXiv 2312.11983); as in its code squared where it is of
    attention, and divided by its spread over the entries (not the units) of a layer's inputs. With the ranking
    ``centred`` this is its standardisation: of single dimensions, of which a head then takes the mean. FLAP's bias
    compensation is left to the repair of the cut, which fits more than the mean.
    """
    assert moments is not None
    sums, numbers = _Tally(masked.space), _Tally(masked.space)
    for site in (site for site in masked.space.sites if site.module in moments.of):
        weighted_OI = masked.base_weight(site.module).detach().double().square() * moments.of[site.module].variance()
        entries = weighted_OI.sum(0 if site.on == "input" else 1)
        if any(factor.axis.kind not in ("channels", "hidden") for factor in site.side.factors):
            entries = entries.square()
        spread = entries.std() if len(entries) > 1 else entries.new_ones(())
        sums.add_entries(entries / spread.clamp(min=1e-30), site.side)
        numbers.add_entries(torch.ones_like(entries), site.side)
    return (sums.total() / numbers.total()).float()


def lora_gradient(masked: MaskedModel) -> Tensor:
    """LoRAPrune's importance of one step, from weights and the gradients of the LoRA factors alone, [U].

    Zhang et al. 2023 (arXiv 2305.18403), as its public code does: the gradient of a frozen weight is
    estimated as ``gB A + B gA - gB gA``; ``|gradient * (W + scale B A)|`` is summed over a unit's entries, divided by
    the norm of the module's scores, and added over the modules that share the unit. To be called after a backward
    pass; frozen weights need no gradients.
    """
    total = _Tally(masked.space)
    for module, rows, columns in _sides(masked.space):
        factors = masked.adapter(module)
        if factors is None or factors[0].grad is None or factors[1].grad is None:
            continue
        (a_RI, b_OR, scale), ga_RI, gb_OR = factors, factors[0].grad, factors[1].grad
        with torch.no_grad():
            gradient_OI = gb_OR @ a_RI + b_OR @ ga_RI - gb_OR @ ga_RI
            scores_OI = (gradient_OI * (masked.base_weight(module).float() + scale * b_OR @ a_RI)).abs()
            own = _Tally(masked.space)
            own.add(scores_OI, rows, columns)
        for name, values in own.sums.items():
            total.sums[name] += values / values.norm().clamp(min=1e-12)
    return total.total().float()


CRITERIA = ("fisher", "taylor", "wanda", "fluctuation", "magnitude", "random")
"""Names of criteria."""


@dataclass
class _Moments:
    """Running sums over the inputs of a module, per column."""

    count: int = 0
    total: Tensor | float = 0.0
    square_sum: Any = 0.0

    def variance(self) -> Tensor:
        return (self.square_sum / self.count - torch.as_tensor(self.total / self.count).square()).clamp(min=0.0)


class InputMoments(InputObserver):
    """Moments of the inputs of every linear that masks act on.

    Attributes:
        of: The sums so far, by module.
    """

    def __init__(self, masked: MaskedModel) -> None:
        super().__init__(masked, _acted_on(masked.space))
        self.of = {module: _Moments() for module in self._modules}

    def add(self, module: str, x: Tensor) -> None:
        """Add a batch's inputs [tokens, I]."""
        found, x = self.of[module], x.double()
        found.count += len(x)
        found.total = found.total + x.sum(0)
        found.square_sum = found.square_sum + x.square().sum(0)


class _Tally:
    """Sums per unit of values given per weight entry."""

    def __init__(self, space: PruningSpace) -> None:
        self.space = space
        self.sums = {axis.name: torch.zeros(axis.size, dtype=torch.double) for axis in space.axes}

    def add(self, values_OI: Tensor, rows: Side, columns: Side) -> None:
        for side, dimension in ((rows, 1), (columns, 0)):
            if side.factors:
                self.add_entries(values_OI.sum(dimension), side)

    def add_entries(self, values: Tensor, side: Side) -> None:
        """Add values [size] given per entry of a side."""
        for factor in side.factors:
            by_unit = values.double().cpu().view(factor.tile, factor.axis.size, factor.repeat)
            self.sums[factor.axis.name] += by_unit.sum((0, 2))

    def total(self) -> Tensor:
        return torch.cat([self.sums[axis.name] for axis in self.space.axes])


def _sides(space: PruningSpace) -> Iterable[tuple[str, Side, Side]]:
    """Modules with anything to cut, with their sides."""
    return [(w.module, w.rows, w.columns) for w in space.weights if w.rows.factors or w.columns.factors]


def _cut_modules(space: PruningSpace) -> list[str]:
    return [module for module, _, _ in _sides(space)]


def _acted_on(space: PruningSpace) -> set[str]:
    """Linears that masks act on."""
    return {site.module for site in space.sites} & {weight.module for weight in space.weights}


def _at_sites(masked: MaskedModel, metric: Callable[[Tensor, str], Tensor]) -> Tensor:
    """Unit sums of a metric [O, I] of the weights that masks act on."""
    tally = _Tally(masked.space)
    for site in masked.space.sites:
        if site.module not in _acted_on(masked.space):
            continue
        values_OI = metric(masked.base_weight(site.module).detach().double(), site.module)
        tally.add_entries(values_OI.mean(0) if site.on == "input" else values_OI.mean(1), site.side)
    return tally.total().float()


def _standardised(values: Tensor) -> Tensor:
    spread = values.std() if values.numel() > 1 else values.new_ones(())
    return (values - values.mean()) / spread.clamp(min=1e-12)
