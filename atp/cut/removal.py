"""Physical removal: masks -> kept indices -> smaller weights -> a smaller model, checked against the masked one.

Sits after training. Takes the merged weights under the base model's own names and the final 0/1 masks; what it returns
is an ordinary Hugging Face model without masks or adapters. It knows the pruning space and nothing of how the masks
were found.

Shape suffixes: U units, L layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from atp.cut.agreement import Difference
from atp.errors import UserError
from atp.model.adapter import Adapter
from atp.model.widths import LayerWidths, build_model, pruned_config
from atp.space.space import LayerSpace, PruningSpace, Side


def kept_indices(side: Side, masks: Mapping[str, Tensor]) -> Tensor | None:
    """Indices of the kept entries of a side, ascending; None when the side is never cut."""
    if not side.factors:
        return None
    return side.expand(masks).nonzero().flatten()


def widths_after(space: PruningSpace, masks_U: Tensor) -> list[LayerWidths]:
    """Widths of every layer once the units with mask zero are gone.

    Raises:
        ValueError: KV heads of one layer that keep different numbers of query heads, which grouped-query attention
            cannot compute.
    """
    masks = space.split(_binary(masks_U))
    return [_layer_widths(layer, masks) for layer in space.layers]


def _layer_widths(layer: LayerSpace, masks: Mapping[str, Tensor]) -> LayerWidths:
    heads_K = masks[layer.axes["heads"].name] if "heads" in layer.axes else torch.ones(layer.num_kv_heads)
    if "query_heads" in layer.axes:
        queries_KG = masks[layer.axes["query_heads"].name].view(layer.num_kv_heads, layer.group_size)
    else:
        queries_KG = torch.ones(layer.num_kv_heads, layer.group_size)
    per_group = (queries_KG.sum(1)[heads_K > 0]).tolist()
    if len(set(per_group)) > 1 or 0 in per_group:
        raise UserError(
            f"{layer.prefix}: the kept KV heads keep {per_group} query heads each; every group must keep the same "
            "positive number"
        )
    kv_heads = int(heads_K.sum())
    channels = _kept(layer, "channels", masks, layer.ffn_width)
    if not kv_heads:
        return LayerWidths(0, 0, 0, channels)
    pairs = layer.rotary_pairs
    if "qk_pairs" in layer.axes:
        pairs = tuple(pairs[i] for i in masks[layer.axes["qk_pairs"].name].nonzero().flatten().tolist())
    values = _kept(layer, "value_dims", masks, layer.value_dim)
    if not pairs or not values:
        raise UserError(f"{layer.prefix}: the kept heads keep no dimension; keep one or remove the heads")
    return LayerWidths(
        int(sum(per_group)),
        kv_heads,
        layer.rotary_dim,
        channels,
        value_dim=values if values != layer.rotary_dim else None,
        rotary_pairs=pairs if 2 * len(pairs) != layer.rotary_dim else None,
    )


def _kept(layer: LayerSpace, kind: str, masks: Mapping[str, Tensor], dense: int) -> int:
    return int(masks[layer.axes[kind].name].sum()) if kind in layer.axes else dense


def config_after(config: PreTrainedConfig, space: PruningSpace, masks_U: Tensor) -> PreTrainedConfig:
    """Config of the smaller model: widths of every layer and of the residual stream, epsilon of its norms."""
    masks = space.split(_binary(masks_U))
    hidden = int(masks[space.hidden.name].sum()) if space.hidden else None
    _, epsilon = space.norm_scales(masks)
    return pruned_config(config, widths_after(space, masks_U), hidden_size=hidden, epsilon_factor=epsilon)


def slice_tensors(
    tensors: Iterable[tuple[str, Tensor]], space: PruningSpace, masks_U: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Cut each tensor of a state dict to what is kept, one at a time; blocks without any unit are left out.

    Args:
        tensors: Names and tensors, such as a state dict's items.
        space: The pruning space of the dense model.
        masks_U: Final masks, 0 or 1, shape [U].
    """
    masks = space.split(_binary(masks_U))
    rows: dict[str, Side] = {}
    columns: dict[str, Side] = {}
    for weight in space.weights:
        rows[f"{weight.module}.weight"] = rows[f"{weight.module}.bias"] = weight.rows
        columns[f"{weight.module}.weight"] = weight.columns
    for name, (row_side, column_side) in space.others.items():
        rows[name], columns[name] = row_side, column_side
    scales, _ = space.norm_scales(masks)
    gone = _gone_prefixes(space, masks)
    for name, tensor in tensors:
        if name.startswith(gone) and gone:
            continue
        kept_rows = kept_indices(rows[name], masks) if name in rows else None
        kept_columns = kept_indices(columns[name], masks) if name in columns else None
        if kept_rows is not None:
            tensor = tensor.index_select(0, kept_rows.to(tensor.device))
        if kept_columns is not None:
            tensor = tensor.index_select(1, kept_columns.to(tensor.device))
        if name in scales:  # norms over fewer dimensions: see PruningSpace.norm_scales
            is_norm = name in space.others and space.others[name][1].size == 1
            offset = space.family.norm_offset if is_norm else 0.0
            tensor = ((tensor.double() + offset) * scales[name] - offset).to(tensor.dtype)
        yield name, tensor


def _gone_prefixes(space: PruningSpace, masks: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return name prefixes of the parameters of blocks that keep no unit."""
    return tuple(
        prefix
        for layer in space.layers
        for kind, prefixes in layer.absent_blocks.items()
        if kind in layer.axes and not masks[layer.axes[kind].name].any()
        for prefix in prefixes
    )


def slice_adapter(adapter: Adapter, space: PruningSpace, masks_U: Tensor) -> Adapter:
    """Cut a LoRA adapter like the weights it adds to: A along the kept columns, B along the kept rows.

    Args:
        adapter: The adapter of the dense model.
        space: The dense model's pruning space.
        masks_U: Final masks, 0 or 1, shape [U].

    Returns:
        The adapter of the smaller model; modules that are gone have none.
    """
    masks = space.split(_binary(masks_U))
    sides = {f"{weight.module}.weight": (weight.rows, weight.columns) for weight in space.weights} | space.others
    gone = _gone_prefixes(space, masks)
    scales, _ = space.norm_scales(masks)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for module, (down_RI, up_OR) in adapter.factors.items():
        if gone and f"{module}.".startswith(gone):
            continue
        if f"{module}.weight" in sides:
            rows, columns = (kept_indices(side, masks) for side in sides[f"{module}.weight"])
            down_RI = down_RI if columns is None else down_RI.index_select(1, columns.to(down_RI.device))
            up_OR = up_OR if rows is None else up_OR.index_select(0, rows.to(up_OR.device))
        if (factor := scales.get(f"{module}.weight")) is not None:  # as the weight that it adds to
            up_OR = (up_OR.double() * factor).to(up_OR.dtype)
        factors[module] = (down_RI, up_OR)
    return Adapter(adapter.config, factors)


def remove(
    tensors: Iterable[tuple[str, Tensor]],
    config: PreTrainedConfig,
    space: PruningSpace,
    masks_U: Tensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Build the smaller model from merged weights and final masks.

    Args:
        tensors: Merged weights under the base model's names.
        config: Config of the dense model.
        space: Its pruning space.
        masks_U: Final masks, 0 or 1, shape [U].
        dtype: Dtype of the result; the tensors' own when None.
        device: Where the result lives.

    Returns:
        A stock model where a stock class can hold the widths, otherwise the per-layer model of
        :mod:`atp.model.modeling_atp`; in eval mode.
    """
    sliced = slice_tensors(tensors, space, masks_U)
    first_name, first = next(sliced)  # the dtype must be known before the model that takes the tensors is built
    small_config = config_after(config, space, masks_U)
    small = build_model(small_config, dtype=dtype or first.dtype, device=device)
    targets, missing, unexpected = small.state_dict(), set(small.state_dict()), []
    with torch.no_grad():  # one tensor at a time, so that no second copy of the smaller model is ever held
        for name, tensor in itertools.chain([(first_name, first)], sliced):
            if name not in targets or targets[name].shape != tensor.shape:
                unexpected.append(f"{name} {list(tensor.shape)}")
                continue
            targets[name].copy_(tensor.detach())
            missing.discard(name)
    # A tied head may come without a tensor of its own; tie_weights gives it the embedding's.
    tied = set(getattr(small, "_tied_weights_keys", None) or {}) if small.config.tie_word_embeddings else set()
    if unexpected or missing - tied:
        raise RuntimeError(f"removal does not fit the smaller model: missing {missing}, unexpected {unexpected}")
    small.tie_weights()
    return small.eval()


def max_logit_difference(first: nn.Module, second: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """As :func:`logit_difference`, the largest difference alone."""
    return logit_difference(first, second, batches).largest


@torch.inference_mode()
def logit_difference(first: nn.Module, second: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Difference:
    """Largest absolute difference of two models' logits over real (unpadded) positions, and the first one's spread.

    Args:
        first: A causal LM, in eval mode.
        second: Another one with the same vocabulary.
        batches: Mappings with ``input_ids`` and ``attention_mask``, right-padded.
    """
    largest, variances = 0.0, []
    for batch in batches:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        real_BT = inputs["attention_mask"].bool()
        logits = [model(**inputs).logits.float() for model in (first, second)]
        difference = float((logits[0] - logits[1]).abs().amax(-1)[real_BT].max())
        largest = max(largest, difference if math.isfinite(difference) else math.inf)  # max() drops what is no number
        variances.append(float(logits[0][real_BT].var()))
    spread = math.sqrt(sum(variances) / len(variances)) if variances else 0.0
    return Difference(largest, spread if math.isfinite(spread) else 0.0)


def _binary(masks_U: Tensor) -> Tensor:
    masks_U = masks_U.detach().cpu()
    if not ((masks_U == 0) | (masks_U == 1)).all():
        raise UserError("removal needs masks of exact zeros and ones; freeze the masks first")
    return masks_U
