"""What one model family is called and how it computes, as data: the fields of a row of the table.

Below :mod:`atp.model.families`, which holds the rows. Projections are spoken of by *role* everywhere else: ``query``,
``key``, ``value``, ``output``, ``gate``, ``up`` and ``down``. It imports nothing and knows nothing of masks, LoRA or
files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from atp.errors import UserError

PER_LAYER_PREFIX = "atp_"
"""What a family's ``model_type`` begins with in its form with widths per layer."""

ATTENTION_ROLES = ("query", "key", "value", "output")
FFN_ROLES = ("gate", "up", "down")
ROLES = (*ATTENTION_ROLES, *FFN_ROLES)
"""The linears of a decoder layer, in the order of the forward pass."""

ALWAYS = "always"
"""In :attr:`Family.biases`: the bias is there whatever the config says."""

SILU = ("silu", "swish")
"""What configs call the activation of SwiGLU."""


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm of a decoder layer.

    Attributes:
        module: Its name in the layer.
        block: ``attention`` or ``mlp``: with which block it goes.
        over: What it normalises: ``stream`` (the residual stream), or ``query`` or ``key`` (each head of them).
        after: Whether it comes after its block, on what the block adds to the stream.
        across_heads: Whether a norm of queries or keys goes over all heads at once, so that a head that is cut changes
            the others.
    """

    module: str
    block: str
    over: str = "stream"
    after: bool = False
    across_heads: bool = False


@dataclass(frozen=True)
class StockClass:
    """A class of transformers that can hold a pruned model of one width for all layers.

    Attributes:
        model_type: Its ``model_type``.
        heads_divide_hidden: Whether it takes only head counts that divide the hidden size.
        unless: Config fields that must be off, as the class has no weights for them.
        without: Config fields of the family that the class does not know.
        fields: Config fields that it needs to compute the same.
    """

    model_type: str
    heads_divide_hidden: bool = False
    unless: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """What one family is called and how it computes.

    Attributes:
        model_type: Its ``model_type`` in transformers.
        stock: Stock classes for widths that are equal in all layers, the first that fits is taken.
        gguf: llama.cpp's architecture for equal widths, and the one for widths per layer.
        biases: Config field that gives a projection its bias, by role; :data:`ALWAYS` where no field does.
        norms: Norms of a decoder layer.
        norm_offset: What norms add to their weight before it multiplies (1 where the stored weight is the distance from
            one).
        windows: Config field that says where attention slides: ``layer_types`` names the layers, ``sliding_window``
            alone means all of them.
        rotary: Which dimensions of a head rotate together: ``halves`` (i and i + H/2) or ``neighbours`` (2i, 2i + 1).
        unrotated: Config field that says of every layer whether its queries and keys are rotated.
        logit_divisor: Config field that the output head's logits are divided by.
        logit_cap: Config field of a soft cap on the logits: ``cap * tanh(logits / cap)``; none where it is unset.
        score_cap: Config field of such a cap on attention scores, which the kernel ``sdpa`` does not compute.
        score_size: Config field by whose root scores are divided, where that is not the head size.
        embedding_root: Whether embeddings are multiplied by the root of the hidden size.
        activation: Config field that names the FFN's activation.
        activations: Its values that the family is known with.
        gguf_fields: llama.cpp's metadata, below the architecture's name -> the config field that it is.
        gguf_window_step: Where llama.cpp's architecture slides its attention: in all layers but every so many-th; 0
            where it knows no window.
        gguf_wide_layers: Number of layers of the model for which llama.cpp takes the scale of scores from hidden size
            over heads in place of the head size.
        gguf_own_head: Whether llama.cpp's architecture wants an output head of its own even where it is the embeddings.
        gguf_tied_only: Whether llama.cpp's architecture knows no output head but the embeddings.
        gguf_base: Whether a GGUF file of its architecture is read as a base.
        refused: What the family cannot do -> why, in one sentence: a kind of unit, ``gguf`` for all of that format, or
            ``gguf:<kind>`` for files of models that lost units of a kind.
        remarks: What else a user should know, in sentences.
        requires: Config fields that must have one of these values, as the family computes nothing else here.
        linears: Module of each projection in a decoder layer, by role.
        attention: Module of the attention block in a decoder layer.
        mlp: Module of the FFN block in a decoder layer.
        layers: Module of the decoder layers.
        embeddings: Module of the input embeddings.
        final_norm: Module of the norm before the output head.
        head: Module of the output head, which shares the embeddings' weight where ``tie_word_embeddings`` is set.
    """

    model_type: str
    stock: tuple[StockClass, ...]
    gguf: tuple[str, str]
    biases: Mapping[str, str] = field(default_factory=dict)
    norms: tuple[Norm, ...] = (Norm("input_layernorm", "attention"), Norm("post_attention_layernorm", "mlp"))
    norm_offset: float = 0.0
    windows: str = "layer_types"
    rotary: str = "halves"
    unrotated: str = ""
    logit_divisor: str = ""
    logit_cap: str = ""
    score_cap: str = ""
    score_size: str = ""
    embedding_root: bool = False
    activation: str = "hidden_act"
    activations: tuple[str, ...] = SILU
    gguf_fields: Mapping[str, str] = field(default_factory=dict)
    gguf_window_step: int = 0
    gguf_wide_layers: int = 0
    gguf_own_head: bool = False
    gguf_tied_only: bool = False
    gguf_base: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    requires: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    linears: Mapping[str, str] = field(
        default_factory=lambda: {
            "query": "self_attn.q_proj",
            "key": "self_attn.k_proj",
            "value": "self_attn.v_proj",
            "output": "self_attn.o_proj",
            "gate": "mlp.gate_proj",
            "up": "mlp.up_proj",
            "down": "mlp.down_proj",
        }
    )
    attention: str = "self_attn"
    mlp: str = "mlp"
    layers: str = "model.layers"
    embeddings: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def per_layer_type(self) -> str:
        """The ``model_type`` of its form with widths per layer."""
        return PER_LAYER_PREFIX + self.model_type

    def has_bias(self, config: Any, role: str) -> bool:
        """Whether a config gives the projection of a role a bias."""
        name = self.biases.get(role)
        return name is not None and (name == ALWAYS or bool(getattr(config, name, False)))

    def block_of(self, role: str) -> str:
        """Module of the block that the projection of a role belongs to."""
        return self.attention if role in ATTENTION_ROLES else self.mlp

    def norm_over(self, over: str) -> Norm | None:
        """The norm of ``query`` or ``key``, where the family has it."""
        return next((norm for norm in self.norms if norm.over == over), None)

    def block_modules(self, block: str) -> tuple[str, ...]:
        """What goes with a block (``attention`` or ``mlp``) that has no unit left: the block and its norms' modules."""
        inside = {"attention": self.attention, "mlp": self.mlp}[block]
        beside = (norm.module for norm in self.norms if norm.block == block and not norm.module.startswith(inside))
        return (inside, *beside)

    def activation_of(self, config: Any) -> str:
        """Name of the activation that a config's FFN has."""
        return str(getattr(config, self.activation, None))

    def logit_changes(self, config: Any) -> tuple[float, float | None]:
        """What the output head's logits are divided by, and the soft cap on them."""
        cap = getattr(config, self.logit_cap, None) if self.logit_cap else None
        return float(getattr(config, self.logit_divisor)) if self.logit_divisor else 1.0, cap

    def caps_scores(self, config: Any) -> bool:
        """Whether attention scores of a config are capped."""
        return bool(self.score_cap) and getattr(config, self.score_cap, None) is not None

    def window(self, config: Any) -> int | None:
        """Tokens that attention reaches back in some layer or other; None where it reaches all."""
        size = getattr(config, "sliding_window", None)
        slides = "sliding_attention" in (getattr(config, "layer_types", None) or ()) or self.slides_everywhere(config)
        return int(size) if slides and size is not None else None

    def check(self, config: Any) -> None:
        """Refuse a config that asks of the family what is not computed here.

        Raises:
            UserError: The field and its value.
        """
        for name, values in self.requires.items():
            if getattr(config, name, None) not in values:
                raise UserError(
                    f"the config sets {name}={getattr(config, name)!r}, which is not supported for {self.model_type}: "
                    f"it may be {' or '.join(map(str, values))}"
                )

    def slides_everywhere(self, config: Any) -> bool:
        """Whether every layer of a config attends over a sliding window."""
        return self.windows == "sliding_window" and getattr(config, "sliding_window", None) is not None

    @property
    def embedding_tensors(self) -> tuple[str, str, str]:
        """Tensors of the input embeddings, of the last norm and of the output head."""
        return f"{self.embeddings}.weight", f"{self.final_norm}.weight", f"{self.head}.weight"
