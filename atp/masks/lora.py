"""PEFT LoRA with masks: the model that trains.

Sits between the loaded base model and the training module: wraps the seven linears with LoRA adapters and multiplies
masks into the forward pass at the pruning space's sites (the figure in :mod:`atp.masks`). It knows masks as tensors and
nothing of how they come about; merging adapters back is in :mod:`atp.masks.merging`.

A site's mask multiplies the *input* of an output projection, before base weight and adapter alike, or the *output* of a
projection or embedding, after both, so a zero removes the unit's part in both branches. What the other projections
compute for a removed unit then has no path to the output. Of equivalent places the smallest tensor is taken (values
rather than what attention makes of them), and in FFN blocks the mask is part of the gated product
(:mod:`atp.masks.fused`), so that a masked step keeps fewer activations than a plain one.

Shape suffixes: U units, B batch, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.errors import UserError
from atp.masks.fused import FUSED, masked_gated
from atp.model.families import FFN_ROLES, family_of
from atp.space.space import PruningSpace, Side, Weight

_PREFIX = "base_model.model."


def add_lora(
    model: PreTrainedModel,
    *,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
) -> PeftModel:
    """Wrap a model with trainable float32 LoRA adapters; everything else is frozen.

    Args:
        model: Base model; its linears are wrapped in place.
        r: Rank.
        alpha: Scale numerator; the adapter's output is multiplied by alpha / r.
        dropout: Dropout before the A factor.
        target_modules: Names of the linears to adapt; None adapts the projections of all decoder layers.

    Raises:
        ValueError: A bad rank or dropout, or a target that matches no module.
    """
    if target_modules is None:
        target_modules = [name.rpartition(".")[2] for name in family_of(model.config).linears.values()]
    if r < 1:
        raise UserError(f"lora.r is {r}; the rank must be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"lora.dropout is {dropout}; it must lie in [0, 1)")
    _check_targets(model, target_modules)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT annotates int but divides
        lora_dropout=dropout,
        target_modules=list(target_modules),
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
    assert isinstance(peft_model, PeftModel)
    for module in peft_model.modules():
        if type(module) is LoraLinear and type(module.base_layer) is nn.Linear:
            module.forward = functools.partial(_add_in_place, module)  # type: ignore[method-assign]
    return peft_model


def _check_targets(model: PreTrainedModel, target_modules: Sequence[str]) -> None:
    """Refuse targets that match nothing, and a head whose weight is the embeddings'.

    Raises:
        UserError: Names the targets and what there is instead.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    endings = sorted({name.rpartition(".")[2] for name in linears})
    missing = [target for target in target_modules if not any(_is_target(name, target) for name in linears)]
    if missing or not target_modules:
        raise UserError(
            f"lora.target_modules holds {missing or 'no name'}, which matches no linear layer of "
            f"{type(model).__name__}; "
            f"its linears are {', '.join(endings)}"
        )
    head = family_of(model.config).head
    shared = [target for target in target_modules if _is_target(head, target)]
    if shared and model.config.tie_word_embeddings:
        # An adapter on one of two modules with one weight cannot be merged: the other would learn it too.
        raise UserError(
            f"lora.target_modules holds {shared}, but this base shares one weight between {head} and the input "
            "embeddings (tie_word_embeddings); take it out"
        )


def _is_target(name: str, target: str) -> bool:
    """Whether PEFT takes a module for a target: its whole name, or how it ends at a dot."""
    return name == target or name.endswith(f".{target}")


def _add_in_place(layer: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    """PEFT's forward pass with scale and sum as part of the last product, which saves three passes over the output."""
    down, up, base = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer
    is_plain = not (args or options or layer.disable_adapters or layer.merged) and layer.active_adapters == ["default"]
    if not is_plain or not x.dtype == down.dtype == base.weight.dtype or torch.is_autocast_enabled(x.device.type):
        usual: Tensor = LoraLinear.forward(layer, x, *args, **options)
        return usual
    result: Tensor = base(x)
    reduced = nn.functional.linear(layer.lora_dropout["default"](x), down)
    flat = result.view(-1, result.shape[-1])
    flat.addmm_(reduced.view(-1, reduced.shape[-1]), up.t(), alpha=layer.scaling["default"])
    return result


class MaskedModel(nn.Module):
    """A PEFT model whose forward pass is multiplied by the current masks.

    Args:
        peft_model: From :func:`add_lora`.
        space: The pruning space of its base model.

    Attributes:
        aware: Whether masks leave the adapters' branch alone; see :meth:`set_masks`.
        live_U: Units whose weights are still there, 0 or 1, [U]; None while all are.
        is_compact: Whether masks are fixed, the weights cut to them.
    """

    def __init__(self, peft_model: PeftModel, space: PruningSpace) -> None:
        super().__init__()
        self.peft_model = peft_model
        self.space = space
        self.aware = False
        self._masks: dict[Side, Tensor] = {}
        self._frozen_masks: dict[Side, Tensor] = {}
        self._left: dict[Side, Tensor] = {}
        self._dense_weights: dict[str, Tensor] = {}
        self.live_U: Tensor | None = None
        self.is_compact = False
        fused = self._fuse_blocks()
        for module_name, side, on in (site.cheapest for site in space.sites):
            module = peft_model.get_submodule(_PREFIX + module_name)
            if on == "output":
                module.register_forward_hook(self._on_output(side))
            elif side not in fused:
                module.register_forward_pre_hook(self._on_input(side))
        self._own_rows = [weight for weight in space.weights if _has_own_rows(weight)]
        for weight in self._own_rows:
            linear: Any = self.linear(weight.module)
            getattr(linear, "base_layer", linear).register_forward_hook(self._on_frozen_output(weight.rows))

    def _fuse_blocks(self) -> set[Side]:
        """Give FFN blocks the fused masked forward pass; return the sides whose masks it applies."""
        family, fused = self.space.family, set[Side]()
        activation = family.activation_of(self.peft_model.config)
        if activation not in FUSED:
            return fused
        gate, up, down = (family.linears[role].rpartition(".")[2] for role in FFN_ROLES)
        for name, side in self.space.gated_blocks().items():
            block: Any = self.peft_model.get_submodule(_PREFIX + name)
            block.forward = functools.partial(self._forward_block, block, (gate, up, down), side, activation)
            fused |= {side} if side else set()
        return fused

    def _forward_block(
        self, block: Any, names: tuple[str, str, str], side: Side | None, activation: str, hidden: Tensor
    ) -> Tensor:
        mask = self._masks.get(side) if side else None
        gate, up, down = (getattr(block, name) for name in names)
        output: Tensor = down(masked_gated(gate(hidden), up(hidden), mask, activation))
        return output

    def _on_input(self, side: Side) -> Any:
        def multiply(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            mask = self._masks.get(side)
            if mask is None:
                return None
            return (inputs[0] * mask.to(inputs[0]), *inputs[1:])

        return multiply

    def _on_output(self, side: Side) -> Any:
        def multiply(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            mask = self._masks.get(side)
            return None if mask is None else output * mask.to(output)

        return multiply

    def _on_frozen_output(self, side: Side) -> Any:
        def multiply(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            mask = self._frozen_masks.get(side)
            return None if mask is None else output * mask.to(output)

        return multiply

    def linear(self, module: str) -> nn.Module:
        """The (wrapped) linear of the base model's name ``module``."""
        return self.peft_model.get_submodule(_PREFIX + module)

    def base_weight(self, module: str) -> nn.Parameter:
        """The frozen base weight [rows, columns] of the linear ``module``."""
        linear: Any = self.linear(module)
        return getattr(linear, "base_layer", linear).weight

    def adapter(self, module: str) -> tuple[nn.Parameter, nn.Parameter, float] | None:
        """The adapter of the linear ``module``: A [r, columns], B [rows, r] and their scale; None without one."""
        linear: Any = self.linear(module)
        if not isinstance(linear, LoraLayer):
            return None
        factors: Any = linear
        return factors.lora_A["default"].weight, factors.lora_B["default"].weight, factors.scaling["default"]

    def set_masks(self, masks_U: Tensor | None) -> None:
        """Set the masks [U] in [0, 1] of the forward passes to come; None runs the unmasked model.

        Gradients flow to ``masks_U`` when it requires them, so masks must be set anew for every backward pass. A
        compact model's masks are fixed; for it this does nothing.

        While :attr:`aware` is set, masks multiply the frozen branch of the projections alone and adapters see
        everything (ATP's LoRA-aware forward pass; section 1.4 of the methods note); only the residual stream is masked
        as a whole.
        """
        if self.is_compact:
            return
        self._masks, self._frozen_masks = {}, {}
        if masks_U is None:
            return
        by_axis = self.space.split(masks_U)
        sides = {side for _, side, _ in (site.cheapest for site in self.space.sites)}
        if self.aware:
            sides = {side for side in sides if any(f.axis.kind == "hidden" for f in side.factors)}
            self._frozen_masks = {weight.rows: weight.rows.expand(by_axis) for weight in self._own_rows}
        self._masks = {side: side.expand(by_axis) for side in sides}
        for side, left in self._left.items():
            self._masks[side] = self._masks[side][left]

    def refit(self, live_U: Tensor) -> None:
        """Adapt the widths of modules, and later masks, to weights that were cut to ``live_U`` [U]."""
        live = self.space.split(live_U.cpu())
        for weight in self.space.weights:
            _refit(self.peft_model.get_submodule(_PREFIX + weight.module))
        self.space.refit_groups(lambda name: self.peft_model.get_submodule(_PREFIX + name), live)
        self._left = {}
        for name, side, _ in (site.cheapest for site in self.space.sites):
            device = self.base_weight(name).device
            self._left[side] = side.expand(live).nonzero().flatten().to(device)
        self.live_U = live_U
        self._dense_weights = {}  # of shapes that are gone

    def fix_masks(self, masks_U: Tensor) -> None:
        """Fix masks for good, after the weights were cut to them.

        A mask that is one for every live unit is dropped: nothing is multiplied there any more.

        Args:
            masks_U: Final masks, 0 or 1, [U].
        """
        with torch.no_grad():
            self.set_masks(masks_U.detach())
        self._masks = {side: mask for side, mask in self._masks.items() if not mask.all()}
        self.is_compact = True

    def base_weight_name(self, module: str) -> str:
        """Name of :meth:`base_weight` in this model's state dict."""
        infix = ".base_layer" if self.adapter(module) is not None else ""
        return f"peft_model.{_PREFIX}{module}{infix}.weight"

    def effective_weight(self, module: str) -> Tensor:
        """Base weight plus adapter of the linear ``module``, float32, [rows, columns]."""
        weight, adapter = self.base_weight(module).detach().float(), self.adapter(module)
        if adapter is not None:
            down, up, scale = adapter
            weight = weight + scale * (up.detach().float() @ down.detach().float())
        return weight

    @contextmanager
    def unmasked(self) -> Iterator[None]:
        """Run the model without masks inside the block.

        Raises:
            RuntimeError: The model was cut to its masks; the dense one is gone.
        """
        if self.live_U is not None:
            raise RuntimeError("the live model was cut to its masks; set prune.compact=false to keep the dense one")
        masks, frozen = self._masks, self._frozen_masks
        self._masks, self._frozen_masks = {}, {}
        try:
            yield
        finally:
            self._masks, self._frozen_masks = masks, frozen

    def keep_dense(self, modules: Iterable[str]) -> None:
        """Keep copies of the base weights of these linears for :meth:`base_only`, before something changes them."""
        for module in modules:
            self._dense_weights.setdefault(module, self.base_weight(module).detach().clone())

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Run the dense base model inside the block: no masks, adapters off, base weights as they were loaded."""
        with self.unmasked(), self.peft_model.disable_adapter():
            self._swap_dense()
            try:
                yield
            finally:
                self._swap_dense()

    def _swap_dense(self) -> None:
        for module, kept in self._dense_weights.items():
            weight = self.base_weight(module)
            self._dense_weights[module], weight.data = weight.data, kept.to(weight.device)

    def forward(self, **batch: Tensor) -> Any:
        """The wrapped causal LM's output."""
        return self.peft_model(**batch)


def language_model(model: nn.Module) -> nn.Module:
    """Return the causal LM inside masks and adapters, which stay active; a plain model is returned as it is."""
    inner = model.peft_model if isinstance(model, MaskedModel) else model
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner


def _refit(module: nn.Module) -> None:
    """Set the widths that linears and adapters state to those of their weights."""
    for linear in module.modules():
        if not isinstance(linear, nn.Linear):
            continue
        linear.out_features, linear.in_features = linear.weight.shape
    if isinstance(module, LoraLayer):
        base: Any = module.get_base_layer()
        module.out_features, module.in_features = base.weight.shape


def _has_own_rows(weight: Weight) -> bool:
    """Whether pruned units own rows of a weight, besides the residual stream."""
    return any(factor.axis.kind != "hidden" for factor in weight.rows.factors)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
