"""The loss of a causal LM, whatever masks and adapters are around it.

Sits between the models that train and everything that descends, differentiates or validates their loss. It knows where
a Hugging Face model keeps its decoder and its output head, through that library's own accessors, and no module name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.masks.fused import vocabulary_loss
from atp.masks.lora import language_model
from atp.model.families import family_of


def causal_loss(model: nn.Module, batch: Mapping[str, Tensor], learnt: int | None = None) -> Tensor:
    """The loss ``model(**batch).loss``, without the logits of all tokens in memory where the output head is frozen.

    Args:
        model: A causal language model, perhaps with masks and adapters around it.
        batch: Its inputs, and ``labels``.
        learnt: Number of labels that are learnt, where it is known, see :func:`atp.masks.fused.vocabulary_loss`.
    """
    return loss_and_states(model, batch, learnt, with_states=False)[0]


def loss_and_states(
    model: nn.Module, batch: Mapping[str, Tensor], learnt: int | None = None, *, with_states: bool = True
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """:func:`causal_loss` and, from the same pass, the hidden states [B, T, D] after every layer."""
    inner = language_model(model)
    head = inner.get_output_embeddings() if isinstance(inner, PreTrainedModel) else None
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
        output: Any = model(**batch, **({"output_hidden_states": True} if with_states else {}))
        return output.loss, output.hidden_states[1:] if with_states else ()
    output = _decode(inner, batch, with_states)
    divisor, cap = family_of(inner.config).logit_changes(inner.config)
    loss = vocabulary_loss(output.last_hidden_state, head.weight, batch["labels"], learnt, divisor=divisor, cap=cap)
    return loss, output.hidden_states[1:] if with_states else ()


def hidden_states(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Hidden states [B, T, D] after every layer, without logits."""
    states: tuple[Tensor, ...] = _decode(language_model(model), batch, True).hidden_states[1:]
    return states


def decode(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Run the model over a batch for those who watch its layers: no logits, no loss."""
    inner = language_model(model)
    if isinstance(inner, PreTrainedModel):
        _decode(inner, batch, False)
    else:
        model(**{name: value for name, value in batch.items() if name != "labels"})


def _decode(inner: nn.Module, batch: Mapping[str, Tensor], with_states: bool) -> Any:
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
    if with_states:
        inputs["output_hidden_states"] = True
    decoder: Any = cast(PreTrainedModel, inner).base_model
    return decoder(**inputs, use_cache=False)
