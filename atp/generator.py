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

from atp.space import PruningSpace


class Generator(nn.Module, ABC):
    """Base of all generators: ``generator()`` gives the logits [U]."""

    @abstractmethod
    def forward(self) -> Tensor:
        """Logits of all units, shape [U], float32."""

    def warm_start(self, scores_U: Tensor) -> None:
        """Begin with these logits [U].

        Raises:
            ValueError: This generator computes its logits and cannot be set to given ones.
        """
        raise ValueError(
            f"prune.warm_start.batches is set, but {type(self).__name__} cannot start from given scores; set it to 0 "
            "or use "
            "prune/generator=free"
        )


class FreeLogits(Generator):
    """One free parameter per unit (Compresso, L0 regularisation).

    Args:
        space: The pruning space.
        initial_std: Standard deviation of the normal initialisation around zero.
    """

    def __init__(self, space: PruningSpace, initial_std: float = 0.01) -> None:
        super().__init__()
        self.logits_U = nn.Parameter(torch.randn(space.num_units) * initial_std)

    def forward(self) -> Tensor:
        """The parameters themselves, [U]."""
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
            raise ValueError(f"prune.generator.width is {width}; it must be a multiple of num_heads = {num_heads}")
        tokens_LE = torch.empty(len(space.layers), width)
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


class RandomScores(Generator):
    """Scores drawn once and never trained: the random baseline.

    Args:
        space: The pruning space.
        seed: Seed of the draw, so that it does not depend on what ran before.
    """

    scores_U: Tensor

    def __init__(self, space: PruningSpace, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.register_buffer("scores_U", torch.rand(space.num_units, generator=draw))

    def forward(self) -> Tensor:
        """The drawn scores, [U]."""
        return self.scores_U


class MagnitudeScores(Generator):
    """Root mean square of the weights that each unit owns, computed once: the classic one-shot baseline.

    Args:
        space: The pruning space.
        state: Dense weights by parameter name, as in the base model's ``state_dict``.
    """

    scores_U: Tensor

    def __init__(self, space: PruningSpace, state: dict[str, Tensor]) -> None:
        super().__init__()
        sums_by_axis = {a.name: torch.zeros(a.size, dtype=torch.double) for a in space.axes}
        numbers = {name: value.clone() for name, value in sums_by_axis.items()}
        for weight in space.weights:
            squared = state[f"{weight.module}.weight"].detach().double().square()
            for side, sums in ((weight.rows, squared.sum(1)), (weight.columns, squared.sum(0))):
                per_entry = weight.rows.size * weight.columns.size / side.size
                for factor in side.factors:
                    by_unit = sums.view(factor.tile, factor.axis.size, factor.repeat)
                    sums_by_axis[factor.axis.name] += by_unit.sum((0, 2))
                    numbers[factor.axis.name] += per_entry * factor.tile * factor.repeat
        scores_U = torch.cat([(sums_by_axis[a.name] / numbers[a.name]).sqrt() for a in space.axes])
        self.register_buffer("scores_U", scores_U.float())

    def forward(self) -> Tensor:
        """The magnitudes, [U]."""
        return self.scores_U
