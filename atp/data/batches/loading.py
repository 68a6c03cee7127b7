"""Loading: which examples make which batch, and loaders that resume within a run.

Sits between :mod:`atp.data.encoding` and :mod:`atp.data.batches`. It knows nothing of records or tokenizers, nor of the
model that batches are for.

Which examples batch ``k`` of a run holds is a function of the seed and ``k`` alone, so the place in the data is one
number, and resuming is starting to count from there.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from atp.data.batches.packing import PackedExample, block_mask
from atp.data.batches.store import TokenStore
from atp.data.encoding.example import Example, pad
from atp.errors import UserError

Batch = dict[str, Tensor]

_GROUPED_BATCHES = 50


class BatchOrder:
    """Which examples each batch holds: a function of the seed and the batch's index.

    Every pass over the data has an order of its own. Within a pass, stretches of 50 batches are sorted by length and
    cut into batches, which are then shuffled: batches hold examples of similar length, so little of them is padding.
    One batch of a pass may be short.

    Args:
        lengths: Tokens of each example.
        batch_size: Examples per batch.
        seed: Which order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.batch_size = batch_size
        self.seed = seed
        self.batches_per_pass = -(-len(lengths) // batch_size)
        self._lengths = np.asarray(lengths)
        self.tokens = int(self._lengths.sum())
        self._planned: tuple[int, list[np.ndarray]] | None = None

    def __getitem__(self, index: int) -> list[int]:
        """Return the positions of the examples in batch ``index``, counted from the start of the run."""
        passes, position = divmod(index, self.batches_per_pass)
        if self._planned is None or self._planned[0] != passes:
            self._planned = (passes, self._plan(passes))
        return self._planned[1][position].tolist()

    def _plan(self, passes: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self.seed, passes))
        order = rng.permutation(len(self._lengths))
        stretch = self.batch_size * _GROUPED_BATCHES
        batches: list[np.ndarray] = []
        for start in range(0, len(order), stretch):
            part = order[start : start + stretch]
            part = part[np.argsort(self._lengths[part], kind="stable")]
            batches.extend(part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size))
        return [batches[i] for i in rng.permutation(len(batches))]


class ResumableLoader:
    """Yields the batches of a run from where it stands; Lightning stores and restores that place.

    Lightning takes any sized iterable with ``state_dict`` and ``load_state_dict`` as a loader that resumes within an
    epoch. It expects the full length also after resuming. ``len(loader)`` is therefore that of the run, while iterating
    yields what is left of it. Not a torch ``DataLoader``, which Lightning would rebuild without the state.

    Args:
        examples: What to batch.
        order: Which examples make a batch.
        num_batches: Batches of the whole run, per process.
        pad_id: Token id of padding.
        num_workers: Processes that make batches; 0 makes them in this one.
        trained: Returns how many batches training has finished with; None counts those that were handed out. The two
            differ when a step fails: its batch was handed out, but is to come again.
        rank: This process' place among ``world_size``, each of which sees other batches.
        world_size: Number of processes that train together.
    """

    def __init__(
        self,
        examples: Sequence[Example] | Sequence[PackedExample],
        order: BatchOrder,
        *,
        num_batches: int,
        pad_id: int,
        num_workers: int = 0,
        trained: Callable[[], int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._examples = examples
        self._order = order
        self._num_batches = num_batches
        self._pad_id = pad_id
        self._num_workers = num_workers
        self._trained = trained
        self._rank = rank
        self._world_size = world_size
        self._start = 0
        self._yielded = 0

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        start, self._start = self._start, 0
        self._yielded = start
        steps = range(start, self._num_batches)
        batches = _Batches(self._order, [step * self._world_size + self._rank for step in steps])
        loader: DataLoader[Example] = DataLoader(
            self._examples,  # type: ignore[arg-type]
            batch_sampler=batches,
            num_workers=self._num_workers,
            collate_fn=Collate(self._pad_id),
            pin_memory=torch.cuda.is_available(),
            # Of its own, or starting to iterate would draw from the global one and shift what training draws later.
            generator=torch.Generator().manual_seed(self._order.seed),
        )
        for batch in loader:
            self._yielded += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the run: the batches done with, and what their order depends on."""
        return {"batch": self._yielded if self._trained is None else self._trained(), **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place in the run; the next iteration starts there.

        Raises:
            ValueError: The place belongs to other data, another seed or another batch size.
        """
        changed = {key: (state.get(key), value) for key, value in self._identity().items() if state.get(key) != value}
        if changed:
            told = ", ".join(f"{key} was {before}, is {now}" for key, (before, now) in changed.items())
            raise UserError(
                f"cannot resume within this data: {told}; resume with the settings and data that the run began with, "
                "or start a new run"
            )
        self._start = self._yielded = int(state["batch"])

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self._order.seed,
            "batch_size": self._order.batch_size,
            "examples": len(self._examples),
            "tokens": self._order.tokens,
            "processes": self._world_size,
        }


class FixedBatches:
    """The same batches at every iteration, in the order of the examples."""

    def __init__(self, examples: Sequence[Example], batch_size: int, pad_id: int) -> None:
        self._examples = examples
        self._batch_size = batch_size
        self._collate = Collate(pad_id)

    def __len__(self) -> int:
        return -(-len(self._examples) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self._examples), self._batch_size):
            yield self._collate(self._examples[start : start + self._batch_size])


class _Batches(Sampler[list[int]]):
    """The batch sampler of a stretch of the run."""

    def __init__(self, order: BatchOrder, indices: Sequence[int]) -> None:
        self._order = order
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[list[int]]:
        return (self._order[index] for index in self._indices)


class Collate:
    """Pads examples into a batch of tensors; a class, so that worker processes can be sent it."""

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, examples: Sequence[Example | PackedExample]) -> Batch:
        """Return the batch."""
        arrays = pad(examples, self._pad_id)
        packed = [example for example in examples if isinstance(example, PackedExample)]
        if packed:
            arrays["attention_mask"] = block_mask(packed, arrays["input_ids"].shape[1])
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def lengths_of(examples: Sequence[Example] | Sequence[PackedExample]) -> list[int]:
    """Return the tokens of each example."""
    return examples.lengths if isinstance(examples, TokenStore) else [len(one.input_ids) for one in examples]
