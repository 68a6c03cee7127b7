"""How scores are made: pruning-decision generators, one logit per unit.

Sits at the start of each training step: generator -> sampler -> masks. A generator maps nothing (or fixed tokens) to a
flat vector of logits over the pruning space's units; higher means keep. It knows how many units each axis has, not what
they are or cost.

Shape suffixes: U units, L layers, E generator width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from atp.errors import UserError
from atp.space.space import PruningSpace


class Generator(nn.Module, ABC):
    """Base of all generators: ``generator()`` gives the logits [U]."""

    @abstractmethod
    def forward(self) -> Tensor:
        """Logits of all units, shape [U], float32."""

    def warm_start(self, scores_U: Tensor) -> None:
        """Start from these logits [U].

        Raises:
            ValueError: This generator computes its logits and cannot be set to given ones.
        """
        self.check_warm_start()

    @classmethod
    def check_warm_start(cls) -> None:
        """Raise the error of :meth:`warm_start` before scores are measured; subclasses that take scores override it."""
        if cls.warm_start is Generator.warm_start:
            raise UserError(
                f"prune.warm_start.batches is set, but {cls.__name__} cannot start from given scores; set it to 0 "
                "or use "
                "prune/generator=free"
            )


class FreeLogits(Generator):
    """One free parameter per unit (Compresso, L0 regularisation).

    Args:
        space: The pruning space.
        initial_std: Standard deviation of the normal initialisation around zero.
        lower: Least logit; parameters that a step took below it are set back. None for no limit.
        upper: Greatest logit.
    """

    def __init__(
        self, space: PruningSpace, initial_std: float = 0.01, lower: float | None = None, upper: float | None = None
    ) -> None:
        super().__init__()
        if lower is not None and upper is not None and not lower < upper:
            raise UserError(f"prune.generator limits are ({lower}, {upper}); lower must be below upper")
        self.lower, self.upper = lower, upper
        self.logits_U = nn.Parameter(torch.randn(space.num_units) * initial_std)

    def forward(self) -> Tensor:
        """The parameters themselves, [U]."""
        if self.lower is not None or self.upper is not None:
            with torch.no_grad():
                self.logits_U.clamp_(self.lower, self.upper)
        return self.logits_U

    @torch.no_grad()
    def warm_start(self, scores_U: Tensor) -> None:
        """Set the parameters to the scores."""
        self.logits_U.copy_(scores_U)


class TransformerGenerator(Generator):
    """ATP's generator: a transformer encoder over one fixed token per layer (section 1.2 of the methods note).

    Tokens are orthogonal rows and do not train; there is no positional code. After the encoder and a LayerNorm, each
    axis of each layer has its own bias-free linear head.

    Args:
        space: The pruning space.
        width: E, the encoder's width.
        num_layers: Encoder layers.
        num_heads: Encoder attention heads.
        feedforward: Encoder FFN width.
        dropout: Active while training, as in the authors' code.
    """

    tokens_LE: Tensor

    def __init__(
        self,
        space: PruningSpace,
        width: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        feedforward: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise UserError(f"prune.generator.width is {width}; it must be a multiple of num_heads = {num_heads}")
        # an axis of the whole model has the last token, index -1, to itself
        tokens_LE = torch.empty(len(space.layers) + (space.hidden is not None), width)
        nn.init.orthogonal_(tokens_LE)
        self.register_buffer("tokens_LE", tokens_LE)
        layer = nn.TransformerEncoderLayer(width, num_heads, feedforward, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.axis_layers = [axis.layer for axis in space.axes]
        self.heads = nn.ModuleList(nn.Linear(width, axis.size, bias=False) for axis in space.axes)

    def forward(self) -> Tensor:
        """Logits [U] of one pass over the layers' tokens."""
        features_LE = self.norm(self.encoder(self.tokens_LE.unsqueeze(0))).squeeze(0)
        return torch.cat([head(features_LE[i]) for head, i in zip(self.heads, self.axis_layers, strict=True)])


class GRUGenerator(Generator):
    """DISP-LLM's generator: a bidirectional GRU over one fixed token per layer (section 1.9 of the methods note).

    Tokens are drawn once and do not train. After LayerNorm and GELU, each axis has its own bias-free linear head.

    Args:
        space: The pruning space.
        token_width: Width of a token.
        width: Width of each direction.
    """

    tokens_LE: Tensor

    def __init__(self, space: PruningSpace, token_width: int = 32, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("tokens_LE", torch.randn(len(space.layers) + (space.hidden is not None), token_width))
        self.gru = nn.GRU(token_width, width, bidirectional=True, batch_first=True)
        self.norm = nn.LayerNorm(2 * width)
        self.axis_layers = [axis.layer for axis in space.axes]
        self.heads = nn.ModuleList(nn.Linear(2 * width, axis.size, bias=False) for axis in space.axes)

    def forward(self) -> Tensor:
        """Logits [U] of one pass over the layers' tokens."""
        states_LE, _ = self.gru(self.tokens_LE.unsqueeze(0))
        features_LE = nn.functional.gelu(self.norm(states_LE.squeeze(0)))
        return torch.cat([head(features_LE[i]) for head, i in zip(self.heads, self.axis_layers, strict=True)])


class GradientScores(Generator):
    """LoRAPrune's scores: a running mean of the importance seen while training, as ranks within layer and kind.

    The rank of a unit is the share of its own layer and kind that is less important, so one threshold cuts the same
    share of every layer and kind. Nothing here trains; :meth:`observe` is fed after every backward pass.

    Args:
        space: The pruning space.
        decay: Share of the running mean that each step keeps; 0.9 in LoRAPrune's code.
    """

    mean_U: Tensor

    def __init__(self, space: PruningSpace, decay: float = 0.9) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise UserError(f"prune.generator.decay is {decay}; it must lie in [0, 1)")
        self.decay = decay
        self.sizes = [axis.size for axis in space.axes]
        self.register_buffer("mean_U", torch.zeros(space.num_units))

    @torch.no_grad()
    def observe(self, importance_U: Tensor) -> None:
        """Take a step's importance [U] into the running mean."""
        self.mean_U.mul_(self.decay).add_(importance_U.to(self.mean_U), alpha=1.0 - self.decay)

    def forward(self) -> Tensor:
        """Ranks in (-0.5, 0.5), [U]."""
        ranks = [(v.argsort(stable=True).argsort() + 0.5) / v.numel() - 0.5 for v in self.mean_U.split(self.sizes)]
        return torch.cat(ranks)


class FixedScores(Generator):
    """Scores that never train, for two-stage pruning: measured once (``prepare/criteria``) before the first step.

    Args:
        space: The pruning space.
    """

    scores_U: Tensor

    def __init__(self, space: PruningSpace) -> None:
        super().__init__()
        self.register_buffer("scores_U", torch.zeros(space.num_units))

    def forward(self) -> Tensor:
        """The scores, [U]."""
        return self.scores_U

    def warm_start(self, scores_U: Tensor) -> None:
        """Take over the scores, [U]."""
        self.scores_U.copy_(scores_U)
