"""The loss of a causal LM, whatever masks and adapters are around it.

Sits between the models that train and everything that descends, differentiates or validates their loss. It knows where
a Hugging Face model keeps its decoder and its output head, through that library's own accessors, and no module name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.fused import vocabulary_loss
from atp.lora import language_model


def causal_loss(model: nn.Module, batch: Mapping[str, Tensor], learnt: int | None = None) -> Tensor:
    """The loss ``model(**batch).loss``, without the logits of all tokens in memory where the output head is frozen.

    Args:
        model: A causal language model, perhaps with masks and adapters around it.
        batch: Its inputs, and ``labels``.
        learnt: Number of labels that are learnt, where it is known, see :func:`atp.fused.vocabulary_loss`.
    """
    inner = language_model(model)
    head = inner.get_output_embeddings() if isinstance(inner, PreTrainedModel) else None
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
        loss: Tensor = model(**batch).loss
        return loss
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    decoder: Any = cast(PreTrainedModel, inner).base_model
    return vocabulary_loss(decoder(**inputs, use_cache=False).last_hidden_state, head.weight, batch["labels"], learnt)
